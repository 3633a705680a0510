"""The numbers of the page on how Vision Transformers work are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "dynamics"
PAGE = (ROOT / "docs" / "how_vits_work.md").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_models_side_by_side() -> None:
    path = ROOT / "benchmarks" / "dynamics_table.py"
    spec = importlib.util.spec_from_file_location("dynamics_table", path)
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    models = {name: read(name) for name in ("ResNet", "ViT", "AlterNet", "demo")}
    assert table.side_by_side(models) in PAGE


def test_counts_of_blocks_on_photographs() -> None:
    found = read("fourier_variance_vit_tiny_patch16_224")
    claims = {
        "attention lowers high frequencies": "attention lowers high frequencies",
        "mlp raises high frequencies": "the MLP raises them",
        "attention lowers variance": "attention lowers the variance",
        "mlp raises variance": "the MLP raises it",
    }
    for key, words in claims.items():
        counts = [found[variant][key] for variant in ("corrected", "paper")]
        assert [n for _, n in counts] == [12, 12]
        assert f"| {words} | {counts[0][0]} | {counts[1][0]} |" in PAGE
    assert f"at {found['throughput_ratio']:.2f} of the bare" in PAGE
    assert f"demo ViT {read('hessian_speed')['seconds']:.1f} seconds" in PAGE
    variance, share = found["paper"]["variance"], found["paper"]["largest_channel"]
    rest = found["variance_without_largest_channel"]
    assert f"jumps from {variance[15]:.2f} to {variance[16]:.1f} in one step" in PAGE
    assert f"from {rest[15]:.2f} to {rest[16]:.1f}" in PAGE
    assert f"{100 * min(share[16:]):.0f} to {100 * max(share[16:]):.0f} %" in PAGE
    assert f"up to {found['largest_activation'][16]:.0f} into one channel" in PAGE
