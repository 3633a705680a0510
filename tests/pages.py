"""Pages of the explorer for tests: one of noise, and what a browser would read from a page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

import numpy as np

from captum_classemb.explain.compute import OWN
from captum_classemb.explorer.contents import Contents, LedgerEntries, MethodMaps
from captum_classemb.explorer.page import ExplorerPage
from captum_classemb.explorer.quantise import quantise

#: Methods without entries of heads.
HEADLESS = ("class-embedding-projection", "all-path-importance")


def noise(
    blocks: int = 3, heads: int = 2, side: int = 4, classes: int = 12, detailed: int = 9
) -> Contents:
    """Noise of a given size, which compresses as badly as anything."""
    rng = np.random.default_rng(0)
    patches, focus = side * side, min(9, classes)
    methods = []
    for key in OWN:
        columns = 1 if key in HEADLESS else heads + 1
        # Maps of many classes along all paths would take long.
        mapped = focus if key == "all-path-importance" else classes
        parts = rng.normal(size=(detailed, blocks, columns, side, side))
        methods.append(
            MethodMaps(
                key=key,
                title=key.title(),
                caption="noise",
                whole="all",
                classes=np.arange(mapped),
                maps=quantise(rng.normal(size=(mapped, side, side))),
                parts=quantise(parts),
                totals=parts.sum((-2, -1)),
            )
        )
    return Contents(
        image=rng.integers(0, 256, (16 * side, 16 * side, 3), dtype=np.uint8),
        grid=(side, side),
        title="a <b> & c.png",
        model="noise",
        names=[f"class </script> {index}" for index in range(classes)],
        probabilities=rng.dirichlet(np.ones(classes)),
        focus=list(range(focus)),
        targets=1,
        top_classes=rng.integers(0, classes, (blocks, patches + 1, 5)),
        top_probabilities=rng.random((blocks, patches + 1, 5)),
        ranks=rng.integers(0, classes, (focus, blocks, patches + 1)),
        prefix=["CLS"],
        methods=methods,
        ledger=LedgerEntries(
            patches=rng.normal(size=(focus, patches)),
            heads=rng.normal(size=(focus, blocks, heads)),
            prefix=rng.normal(size=(focus, blocks, heads)),
            mlp=rng.normal(size=(focus, blocks)),
            embedding=rng.normal(size=focus),
            bias=rng.normal(size=focus),
            pool=np.zeros(focus),
            score=rng.normal(size=focus),
        ),
        colors=rng.integers(0, 256, (257, 3), dtype=np.uint8),
    )


def unpacked(page: ExplorerPage) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What data.js reads."""
    match = re.search(r'id="data">([^<]*)<', page.document)
    assert match
    raw = gzip.decompress(base64.b64decode(match[1]))
    end = 8 + int.from_bytes(raw[:8], "little")
    facts = json.loads(raw[8:end])
    arrays = {}
    for name, entry in facts["arrays"].items():
        size = int(np.prod(entry["shape"]))
        array = np.frombuffer(raw, entry["type"], size, end + entry["offset"])
        arrays[name] = array.reshape(entry["shape"])
    return facts, arrays
