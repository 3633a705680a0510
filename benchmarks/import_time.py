"""How long importing the package takes beyond importing captum and timm.

    python benchmarks/import_time.py --output benchmarks/results/import_time.json

Each import is a process of its own; the two alternate, and medians are taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from timing import environment

IMPORTS = {
    "captum and timm": "import captum.attr, timm",
    "captum_classemb": "import captum_classemb",
    "captum_classemb and a method": "from captum_classemb import PatchImportance",
}


def seconds(code: str) -> float:
    """The time that a fresh interpreter takes for some imports, its own start left out."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for code in IMPORTS.values():
        seconds(code)
    for _ in range(args.rounds):
        for name, code in IMPORTS.items():
            found[name].append(seconds(code))
    rows = {name: round(statistics.median(each), 3) for name, each in found.items()}
    for name, median in rows.items():
        print(f"{name}: {median:.2f} s")
    if args.output:
        record = {"environment": environment(torch.device("cpu")), "seconds": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
