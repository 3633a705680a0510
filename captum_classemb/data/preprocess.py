"""One preprocessing: what a model reads of a photograph, with its mask and its boxes.

One geometry serves image, mask and boxes, so that a mask never slips off its image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from captum_classemb.data.sample import CONTEXT, OBJECT
from captum_classemb.errors import DataError, InputError

#: x0, y0, x1, y1 in pixels; x1 and y1 are the far edges.
Box = tuple[float, float, float, float]
ResizeMode = Literal["crop", "squash"]

#: Of an image that was resized but not cut yet.
_MOST_PIXELS = 2**28

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def data_config(model: nn.Module) -> dict[str, Any]:
    """What a model asks of its images: size, resize, mean and standard deviation.

    Args:
        model: a model of timm or open_clip; one of Hugging Face that came from a folder with an
            image processor; or an adapted model.

    Raises:
        InputError: if that is not known of the model.
    """
    inner = getattr(model, "pixels_of", model)
    for candidate in (getattr(model, "model", model), inner):
        config = None if candidate is None else _known_config(candidate)
        if config is not None:
            break
    else:
        name = type(getattr(model, "model", model)).__qualname__
        raise InputError(
            f"it is not known what {name} asks of its images: give a Preprocess with size, mean "
            "and std (in Python, preprocess=)."
        )
    channels = getattr(model, "channels", None) or getattr(candidate, "in_chans", None)
    size = getattr(model, "image_size", None)
    # Of a timm model that takes any size, the one that its positions were made for.
    size = size or getattr(getattr(candidate, "patch_embed", None), "img_size", None)
    first, *sides = config["input_size"]
    return {**config, "input_size": (channels or first, *(size or sides))}


def _known_config(model: Any) -> dict[str, Any] | None:
    """In timm's words, what a model of a known library says of its images."""
    if getattr(model, "pretrained_cfg", None) is not None:
        from timm.data import resolve_model_data_config

        config: dict[str, Any] = resolve_model_data_config(model)
        return config
    if isinstance(getattr(model, "preprocess_cfg", None), Mapping):
        return _of_open_clip(model.preprocess_cfg)
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if folder and (Path(folder) / "preprocessor_config.json").is_file():
        return _of_hugging_face(json.loads((Path(folder) / "preprocessor_config.json").read_text()))
    return None


def _of_open_clip(settings: Mapping[str, Any]) -> dict[str, Any]:
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "input_size": (3, height, width),
        "crop_pct": 1.0,
        "crop_mode": "squash" if settings.get("resize_mode") == "squash" else "center",
        "interpolation": settings.get("interpolation", "bicubic"),
        "mean": settings["mean"],
        "std": settings["std"],
    }


#: What Pillow calls the numbers in a ``preprocessor_config.json``.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _of_hugging_face(settings: Mapping[str, Any]) -> dict[str, Any]:
    def sides(size: Any) -> tuple[int, int]:
        if isinstance(size, Mapping):
            short = size.get("shortest_edge")
            return (short, short) if short else (size["height"], size["width"])
        return size, size

    size = sides(settings["size"])
    cut = sides(settings["crop_size"]) if settings.get("do_center_crop") else size
    squash = "shortest_edge" not in (settings["size"] if isinstance(settings["size"], dict) else {})
    half, normal = [0.5] * 3, settings.get("do_normalize", True)
    return {
        "input_size": (3, *cut),
        "crop_pct": cut[0] / size[0],
        "crop_mode": "squash" if squash else "center",
        "interpolation": _RESAMPLE.get(settings.get("resample", 2), "bilinear"),
        "mean": settings.get("image_mean", half) if normal else [0.0] * 3,
        "std": settings.get("image_std", half) if normal else [1.0] * 3,
    }


@dataclass(frozen=True)
class _Geometry:
    """Resize to ``resized``, then cut ``size`` out at ``offset`` (each height, width)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        height, width = self.resized
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        top, left = self.offset
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def apply_box(self, box: Box) -> Box:
        y_scale, x_scale = (new / old for new, old in zip(self.resized, self.original, strict=True))
        top, left = self.offset
        x0, x1 = (min(max(x * x_scale - left, 0.0), self.size[1]) for x in (box[0], box[2]))
        y0, y1 = (min(max(y * y_scale - top, 0.0), self.size[0]) for y in (box[1], box[3]))
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Preprocess:
    """Resize, cut and normalise an image; resize and cut its mask and boxes in the same way.

    ``mode="crop"`` is timm's evaluation transform: the shorter side is resized to
    ⌊size / crop_pct⌋ and the centre is cut out. ``mode="squash"`` resizes both sides so, whatever
    the image's proportions; with ``crop_pct=1`` nothing of image and mask is lost. Masks are
    resized by nearest neighbour.

    Attributes:
        size: height and width that the model reads.
        mode: ``"crop"`` or ``"squash"``.
        crop_pct: the share of each side of the resized image that is kept.
        interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
        mean: of the three channels, for values in 0–1; one number for a model of gray images.
        std: of the three channels, or of gray.

    Raises:
        InputError: for an unknown mode or interpolation.
    """

    size: tuple[int, int] = (224, 224)
    mode: ResizeMode = "crop"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.mode not in ("crop", "squash"):
            raise InputError(f"resize mode {self.mode!r} is unknown: give 'crop' or 'squash'.")
        if self.interpolation not in _FILTERS:
            known = ", ".join(_FILTERS)
            raise InputError(f"interpolation {self.interpolation!r} is unknown: give {known}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], mode: ResizeMode = "crop") -> Preprocess:
        """The transform of a timm data configuration (``timm.data.resolve_data_config``).

        ``"crop"`` is the model's own evaluation transform; ``"squash"`` shows it the whole image.

        Raises:
            InputError: if the configuration asks for borders, which a mask cannot follow, or the
                model does not read colours.
        """
        channels = config["input_size"][0]
        if channels not in (1, 3):
            raise InputError(
                f"the model reads images of {channels} channels: photographs have 3 (RGB), or 1 "
                "of gray."
            )
        mean, std = (
            values if len(values) == channels else (sum(values) / len(values),)
            for values in (config["mean"], config["std"])
        )
        crop_mode = config.get("crop_mode", "center")
        if mode == "crop" and crop_mode == "border":
            raise InputError("the model's preprocessing pads images: use the resize mode 'squash'.")
        height, width = config["input_size"][-2:]
        interpolation = config.get("interpolation", "bicubic")
        return cls(
            size=(height, width),
            mode="squash" if crop_mode == "squash" else mode,
            crop_pct=1.0 if mode == "squash" else float(config.get("crop_pct") or 0.875),
            interpolation="bilinear" if interpolation == "random" else interpolation,
            mean=tuple(mean),
            std=tuple(std),
        )

    @classmethod
    def of_model(cls, model: nn.Module, mode: ResizeMode = "crop") -> Preprocess:
        """The transform that a model asks for (:func:`data_config`)."""
        return cls.from_config(data_config(model), mode)

    def describe(self) -> dict[str, Any]:
        """The settings as plain values, for a result's record."""
        return {
            "input_size": [len(self.mean), *self.size],
            "resize": self.mode,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __str__(self) -> str:
        """The settings in words."""
        (height, width), gray = self.size, " in gray" if len(self.mean) == 1 else ""
        cut = "cut" if self.mode == "crop" else "squashed"
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return (
            f"{cut} to {width}×{height} pixels ({self.interpolation}){gray}, minus {mean}, "
            f"divided by {std}"
        )

    def view(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """What the model sees: the image resized and cut, H×W×3, before normalisation.

        Raises:
            DataError: if the image is so elongated that it could not be held when resized.
        """
        geometry = self._geometry((image.height, image.width))
        return np.array(geometry.apply(image.convert("RGB"), _FILTERS[self.interpolation]))

    def tensor(self, view: npt.NDArray[np.uint8]) -> Tensor:
        """What the model reads: a view H×W×3, normalised, as a float32 tensor 3×H×W or 1×H×W."""
        if len(self.mean) == 1:
            view = np.array(Image.fromarray(view).convert("L"))[..., None]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = torch.from_numpy(view).permute(2, 0, 1).float() / 255.0
        return (pixels - mean) / std

    def _geometry(self, original: tuple[int, int]) -> _Geometry:
        scaled = (
            math.floor(self.size[0] / self.crop_pct),
            math.floor(self.size[1] / self.crop_pct),
        )
        if self.mode == "squash":
            resized = scaled
        elif scaled[0] == scaled[1]:
            # As torchvision's Resize with one number: the longer side is cut off to an integer.
            short, long = min(original), max(original)
            longer = int(scaled[0] * long / short)
            resized = (scaled[0], longer) if original[0] <= original[1] else (longer, scaled[0])
        else:
            factor = max(new / old for new, old in zip(scaled, original, strict=True))
            resized = tuple(round(side * factor) for side in original)  # type: ignore[assignment]
        if resized[0] * resized[1] > _MOST_PIXELS:
            raise DataError(
                f"an image of {original[1]}×{original[0]} pixels is too elongated to be cropped: "
                "cut it, or resize with 'squash'."
            )
        offset = tuple(
            round((big - small) / 2.0) for big, small in zip(resized, self.size, strict=True)
        )
        return _Geometry(original, resized, (offset[0], offset[1]), self.size)

    def __call__(
        self,
        image: Image.Image,
        mask: Tensor | None = None,
        boxes: Sequence[Box] | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Box] | None]:
        """Transform an image with whatever belongs to it.

        Args:
            image: any mode; read as RGB.
            mask: uint8, H×W of the stored image.
            boxes: in pixels of the stored image.

        Returns:
            The image 3×H×W, its mask H×W and its boxes in pixels of the result; None where None
            was given. A box that is cut away entirely has no area.

        Raises:
            DataError: see :meth:`view`.
        """
        geometry = self._geometry((image.height, image.width))
        tensor = self.tensor(self.view(image))
        new_mask = None
        if mask is not None:
            stored = Image.fromarray(mask.numpy())
            cut = geometry.apply(stored, Image.Resampling.NEAREST)
            new_mask = torch.from_numpy(np.array(cut))
        new_boxes = None if boxes is None else [geometry.apply_box(box) for box in boxes]
        return tensor, new_mask, new_boxes


def boxes_to_mask(boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
    """A mask of the pixels whose centre lies in one of the boxes: uint8, H×W.

    Examples:
        >>> boxes_to_mask([(1.0, 0.0, 3.0, 1.0)], (2, 4))
        tensor([[0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.uint8)
    """
    mask = torch.full(size, CONTEXT, dtype=torch.uint8)
    y = torch.arange(size[0])[:, None] + 0.5
    x = torch.arange(size[1])[None, :] + 0.5
    for x0, y0, x1, y1 in boxes:
        mask[(y >= y0) & (y < y1) & (x >= x0) & (x < x1)] = OBJECT
    return mask
