"""What measure_dynamics.py found of several models, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["side_by_side"]

Found = Mapping[str, Any]


def _agreeing(found: Found, values: list[float], kind: str, rises: bool) -> str:
    """How many steps of a kind raise, or lower, a value: "3 of 4"."""
    kinds = [step[0] for step in found["steps"]]
    changes = [b - a for a, b, k in zip(values, values[1:], kinds[1:], strict=False) if k == kind]
    count = sum((c > 0) == rises for c in changes)
    return f"{count} of {len(changes)}" if changes else "–"


def _high(found: Found) -> list[float]:
    return [line[-1] for line in found["fourier"]["amplitude"]]


def _corrupted(found: Found, column: int) -> float:
    return 100 * float(
        np.mean([level[column] for t in found["robustness"].values() for level in t])
    )


def _noise(found: Found, bands: slice) -> float:
    """Points of accuracy that noise of some bands costs, their mean."""
    whole, *values = found["frequency_noise"]["accuracy"]
    return 100 * (float(np.mean(values[bands])) - whole)


def _training(found: Found) -> str:
    return str(found["training"]["epochs"]) if "training" in found else "packaged"


ROWS: Mapping[str, Callable[[Found], str]] = {
    "parameters": lambda f: f"{f['parameters']:,}",
    "epochs": _training,
    "test accuracy (%)": lambda f: f"{100 * f['clean']['accuracy']:.1f}",
    "NLL (nats)": lambda f: f"{f['clean']['nll']:.3f}",
    "calibration error (%)": lambda f: f"{100 * f['clean']['ece']:.1f}",
    "accuracy under corruption (%)": lambda f: f"{_corrupted(f, 0):.1f}",
    "calibration error under corruption (%)": lambda f: f"{_corrupted(f, 2):.1f}",
    "noise below π/2 (points)": lambda f: f"{_noise(f, slice(0, 4)):+.1f}",
    "noise above π/2 (points)": lambda f: f"{_noise(f, slice(4, 8)):+.1f}",
    "largest Hessian eigenvalue": (
        lambda f: f"{np.mean(np.max(f['hessian']['eigenvalues'], axis=1)):.1f}"
    ),
    "negative among the top 5 (%)": lambda f: f"{100 * f['hessian']['negative']:.0f}",
    "Hessian trace": lambda f: f"{np.mean(f['hessian']['traces']):.0f}",
    "attention lowers high frequencies": (
        lambda f: _agreeing(f, _high(f), "attention", rises=False)
    ),
    "MLP raises them": lambda f: _agreeing(f, _high(f), "mlp", rises=True),
    "convolution raises them": lambda f: _agreeing(f, _high(f), "convolution", rises=True),
    "attention lowers the varying share": (
        lambda f: _agreeing(f, f["varying"], "attention", rises=False)
    ),
    "MLP raises it": lambda f: _agreeing(f, f["varying"], "mlp", rises=True),
    "convolution raises it": lambda f: _agreeing(f, f["varying"], "convolution", rises=True),
}


def side_by_side(models: Mapping[str, Found]) -> str:
    """A Markdown table, a column a model."""
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for label, cell in ROWS.items():
        lines.append(f"| {label} | {' | '.join(cell(found) for found in models.values())} |")
    return "\n".join(lines) + "\n"
