"""Handwritten digits in procedural scenes, so that object and context are known to the pixel."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from captum_classemb.data import _render as draw
from captum_classemb.data.sample import Sample
from captum_classemb.errors import InputError, MissingExtraError

Split = Literal["train", "val", "test"]
Floats = NDArray[np.float32]

SCENE_CLASSES: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
SCENE_SIZE: Final = 64
"""Side of a scene in pixels."""

# Seven, one and two tenths of the 1,797 digits, shuffled once: every writer is in every split, no
# digit is in two.
_SCANS: Final = 1797
_SHARES: Final[dict[Split, tuple[int, int]]] = {
    "train": (0, 1257),
    "val": (1257, 1437),
    "test": (1437, _SCANS),
}
_LENGTHS: Final[dict[Split, int]] = {"train": 20_000, "val": 2_000, "test": 5_000}


@dataclass(frozen=True)
class Texture:
    """What lies behind everything: arguments of ``texture`` and the two colours it mixes."""

    family: int
    period: float
    tilt: float
    phase: tuple[float, float]
    seed: int
    colours: Floats
    """2×3, RGB in 0..1."""


@dataclass(frozen=True)
class Digit:
    """The object: which scan of the split, and how it is drawn."""

    scan: int
    centre: tuple[float, float]
    height: float
    angle: float
    shear: float
    weight: float
    colour: Floats


@dataclass(frozen=True)
class Figure:
    """A distractor: a letter or sign drawn with a shaky hand."""

    lines: tuple[Floats, ...]
    centre: tuple[float, float]
    height: float
    angle: float
    pen: float
    colour: Floats


@dataclass(frozen=True)
class Scene:
    """Everything that there is to know of one image."""

    label: int
    texture: Texture
    digit: Digit
    figures: tuple[Figure, ...]


class Scenes(Dataset[Sample]):
    """A digit on a textured background, among figures that are no digits.

    Item ``i`` depends on ``(seed, split, i)`` and nothing else; its label is ``i % 10``. The
    digits are real scans, different ones in different splits. With probability
    ``context_correlation`` the background is the texture family of the digit's class (family
    ``c`` of class ``c``), otherwise any of the ten, all equally likely: at 0 the context says
    nothing about the class, at 1 everything.

    Items are ``Sample(image, label, mask, name)``: image 3×64×64 in 0..1 before ``transform``, in
    steps of 1/255; mask 64×64, 1 exactly on the pixels that the digit changes, else 0.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        context_correlation: between 0 and 1.
        length: number of items; 20,000, 2,000 or 5,000 by default.
        seed: of everything random.
        transform: applied to the image; may not move anything, for the mask stays as it is.

    Raises:
        InputError: if an argument is outside its range.
        MissingExtraError: if scikit-learn, where the scans come from, is not installed.
    """

    def __init__(
        self,
        split: Split = "test",
        context_correlation: float = 0.0,
        length: int | None = None,
        seed: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split not in get_args(Split):
            raise InputError(f"split is {split!r}; it must be one of {', '.join(get_args(Split))}.")
        if not 0 <= context_correlation <= 1:
            raise InputError(
                f"context_correlation is {context_correlation}; it must lie between 0 and 1."
            )
        if length is not None and length < 1:
            raise InputError(f"length is {length}; it must be at least 1.")
        if seed < 0:
            raise InputError(f"seed is {seed}; it must not be negative.")
        self.split: Split = split
        self.context_correlation = context_correlation
        self.seed = seed
        self.transform = transform
        self._length = _LENGTHS[split] if length is None else length
        images, labels = _scans()
        mine = scan_indices(split)
        self._glyphs = images[mine]
        self._of_class = [np.flatnonzero(labels[mine] == c) for c in range(10)]

    def __len__(self) -> int:
        return self._length

    @property
    def labels(self) -> list[int]:
        """The label of each image, without drawing it."""
        return [index % 10 for index in range(len(self))]

    def scene(self, index: int) -> Scene:
        """What is where in item ``index``, before anything is drawn.

        Raises:
            IndexError: if there is no such item.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        rng = np.random.default_rng((self.seed, get_args(Split).index(self.split), index))
        label = index % 10
        scan = int(rng.choice(self._of_class[label]))
        family = label if rng.random() < self.context_correlation else int(rng.integers(10))
        return _draw_scene(rng, label, scan, family)

    def render(self, scene: Scene, with_object: bool = True) -> tuple[Tensor, Tensor]:
        """Image 3×H×W (before the transform) and mask H×W of a scene, or of its context alone."""
        image, mask = render_scene(scene, self._glyphs[scene.digit.scan], with_object)
        scaled = torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255
        return scaled, torch.from_numpy(mask)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        image, mask = self.render(scene)
        if self.transform is not None:
            image = self.transform(image)
        return Sample(image, scene.label, mask, f"{self.split}_{index:06d}")


def render_scene(
    scene: Scene, glyph: Floats, with_object: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draws a scene.

    Args:
        scene: what is where.
        glyph: 8×8 scan of the digit, ink in 0..1.
        with_object: False leaves the digit away and changes nothing else.

    Returns:
        Image H×W×3 and mask H×W, 1 on the object; without object the mask is empty.
    """
    back, digit, size = scene.texture, scene.digit, SCENE_SIZE
    mix = draw.texture(back.family, size, back.period, back.tilt, back.phase, back.seed)
    canvas = back.colours[0] + mix[..., None] * (back.colours[1] - back.colours[0])
    for figure in scene.figures:
        coverage = draw.figure_coverage(
            figure.lines, size, figure.centre, figure.height, figure.angle, figure.pen
        )
        canvas = draw.blend(canvas, coverage, figure.colour)
    coverage = np.zeros((size, size), np.float32)
    if with_object:
        coverage = draw.glyph_coverage(
            glyph, size, digit.centre, digit.height, digit.angle, digit.shear, digit.weight
        )
        canvas = draw.blend(canvas, coverage, digit.colour)
    return np.round(255 * np.clip(canvas, 0, 1)).astype(np.uint8), (coverage > 0).astype(np.uint8)


def scan_indices(split: Split) -> NDArray[np.intp]:
    """Which of scikit-learn's digits a split draws from."""
    first, last = _SHARES[split]
    return np.random.default_rng(0).permutation(_SCANS)[first:last]


@cache
def _scans() -> tuple[Floats, NDArray[np.int64]]:
    """All scans, 1797×8×8 in 0..1, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "scenes") from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def _draw_scene(rng: np.random.Generator, label: int, scan: int, family: int) -> Scene:
    """Draws all that label, scan and texture family leave open."""
    hue = rng.random()
    dim, light = rng.uniform(0.15, 0.3), rng.uniform(0.35, 0.5)
    second_hue = hue + rng.uniform(-0.12, 0.12)
    colours = np.stack(
        [
            _colour(hue, rng.uniform(0.2, 0.7), dim),
            _colour(second_hue, rng.uniform(0.2, 0.7), light),
        ]
    )
    texture = Texture(
        family,
        period=rng.uniform(8, 13),
        tilt=rng.uniform(-0.12, 0.12),
        phase=(rng.random(), rng.random()),
        seed=int(rng.integers(2**31)),
        colours=colours,
    )
    height = rng.uniform(26, 40)
    digit = Digit(
        scan,
        centre=_place(rng, 0.56 * height),
        height=height,
        angle=rng.uniform(-0.22, 0.22),
        shear=rng.uniform(-0.15, 0.15),
        weight=rng.uniform(-0.05, 0.1),
        colour=_ink(rng),
    )
    figures: list[Figure] = []
    taken = [(digit.centre, 0.5 * height)]
    wanted = int(rng.integers(1, 4))
    for _ in range(4 * wanted):
        if len(figures) == wanted:
            break
        figure = _draw_figure(rng)
        radius = 0.55 * figure.height
        # A figure may not touch the digit or another figure; a crowded scene has fewer.
        if all(np.hypot(*np.subtract(c, figure.centre)) > r + radius + 2 for c, r in taken):
            figures.append(figure)
            taken.append((figure.centre, radius))
    return Scene(label, texture, digit, tuple(figures))


def _draw_figure(rng: np.random.Generator) -> Figure:
    names = tuple(draw.FIGURES)
    lines = draw.FIGURES[names[int(rng.integers(len(names)))]]
    height = rng.uniform(13, 20)
    return Figure(
        tuple(
            (np.asarray(line) + rng.normal(0, 0.04, (len(line), 2))).astype(np.float32)
            for line in lines
        ),
        centre=_place(rng, 0.6 * height),
        height=height,
        angle=rng.uniform(-0.35, 0.35),
        pen=rng.uniform(2.0, 3.2),
        colour=_ink(rng),
    )


def _place(rng: np.random.Generator, margin: float) -> tuple[float, float]:
    x, y = rng.uniform(margin, SCENE_SIZE - margin, 2)
    return float(x), float(y)


def _ink(rng: np.random.Generator) -> Floats:
    """Clearly lighter than any background, so that what is drawn shows."""
    return _colour(rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.8, 0.95))


def _colour(hue: float, saturation: float, luminance: float) -> Floats:
    """RGB of a hue, mixed with black or white until its luminance is as asked."""
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, 1), np.float32)
    own = float(colour @ np.array([0.299, 0.587, 0.114], np.float32))
    if own > luminance:
        return (colour * (luminance / own)).astype(np.float32)
    share = (luminance - own) / (1 - own)
    return (colour + share * (1 - colour)).astype(np.float32)
