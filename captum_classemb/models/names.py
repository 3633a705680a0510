"""Names: of models, as the papers and timm write them, and of classes."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_classemb.errors import InputError, ModelNameError, TargetError

DEMO_MODEL = "demo_vit"

_SUGGESTED = 6


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        timm_name: the name timm knows it by, with the tag of its weights where there is one; or
            that of the packaged model.
        num_classes: the number of classes, where it is not that of timm's weights.
        checkpoint: for weights that timm does not publish, the file that must be given.
        unused: beginnings of the names of entries in that file that the classifier does not use.
        data_config: what the weights were trained on, where it is not what timm says of the name.
        published: how the published code reads images for it, where it is not what timm says.
    """

    timm_name: str
    num_classes: int | None = None
    checkpoint: str | None = None
    unused: tuple[str, ...] = ()
    data_config: tuple[tuple[str, Any], ...] = ()
    published: tuple[tuple[str, Any], ...] = ()


_HALF = (0.5, 0.5, 0.5)
_WHOLE = (("mean", _HALF), ("std", _HALF), ("crop_pct", 1.0), ("crop_mode", "squash"))
#: transformers' ViTImageProcessor.
_PROCESSOR = (*_WHOLE, ("interpolation", "bilinear"))
#: transformers' DeiTImageProcessor: squashed to 256×256, and the 224×224 in the middle.
_DEIT_PROCESSOR = (
    ("mean", (0.485, 0.456, 0.406)),
    ("std", (0.229, 0.224, 0.225)),
    ("crop_pct", 0.875),
    ("crop_mode", "squash"),
    ("interpolation", "bicubic"),
)

PAPER_MODELS: dict[str, ModelSource] = {
    "vit_b_32": ModelSource("vit_base_patch32_224.augreg_in21k_ft_in1k", published=_PROCESSOR),
    "vit_b_16": ModelSource("vit_base_patch16_224.augreg_in21k_ft_in1k", published=_PROCESSOR),
    "vit_large_16": ModelSource("vit_large_patch16_224.augreg_in21k_ft_in1k", published=_PROCESSOR),
    "vit_miil_16": ModelSource("vit_base_patch16_224_miil.in21k_ft_in1k"),
    "vit_gap_16": ModelSource("vit_base_patch16_rpn_224.sw_in1k", published=_PROCESSOR),
    "vit_cifar_16": ModelSource(
        "vit_base_patch16_224",
        num_classes=100,
        checkpoint=(
            "a ViT-B/16 fine-tuned on CIFAR-100 at 224 pixels with 100 classes "
            "(vit_base_patch16_224-CIFAR100.pt of the paper's release)"
        ),
        data_config=_WHOLE,
        published=_PROCESSOR,
    ),
    # The "Refinement" model of the paper: a DeiT-B/16 trained together with heads on its inner
    # blocks, which its classifier does not read.
    "deit_ensemble_16": ModelSource(
        "deit_base_patch16_224",
        checkpoint=(
            "the DeiT-B with refined tokens of Naseer et al., 'On Improving Adversarial "
            "Transferability of Vision Transformers' (deit_base_trm.pth of their release)"
        ),
        unused=("transformerheads.",),
        published=_DEIT_PROCESSOR,
    ),
}


def find_model(name: str) -> ModelSource:
    """Where the model of a given name comes from.

    Args:
        name: a name that timm knows, with or without the tag of its weights; one of the papers'
            short names (`PAPER_MODELS`); or that of the packaged model (`DEMO_MODEL`).

    Returns:
        The source.

    Raises:
        ModelNameError: if nobody knows the name; the message offers the nearest ones.
    """
    import timm
    from timm.models import is_model, split_model_name_tag

    if name == DEMO_MODEL:
        return ModelSource(DEMO_MODEL)
    if name in PAPER_MODELS:
        return PAPER_MODELS[name]
    # A path or a URL is no name, and timm's own parser refuses it in words of its own.
    architecture, tag = split_model_name_tag(name)
    if re.fullmatch(r"[\w.]+", name) and is_model(architecture):
        if not tag:
            return ModelSource(name)
        tagged = timm.list_models(architecture + ".*", pretrained=True)
        if name in tagged:
            return ModelSource(name)
        raise ModelNameError(
            f"timm has no weights {tag!r} for {architecture}: "
            + (f"it has {', '.join(tagged)}." if tagged else "it publishes none for it.")
        )
    known = [DEMO_MODEL, *PAPER_MODELS, *timm.list_models(), *timm.list_pretrained()]
    raise ModelNameError(
        f"No model is named {name!r}: " + closest(name, known, "give a name that timm knows.")
    )


def published_transform(name: str) -> dict[str, Any]:
    """How the published code reads images for one of its models, as changes of timm's settings.

    Of MIIL's model it is timm's own transform, of the others a processor of transformers.

    Raises:
        ModelNameError: for any other model.
    """
    if name not in PAPER_MODELS:
        raise ModelNameError(
            f"the published code has no transform for {name!r}: give one of "
            f"{', '.join(PAPER_MODELS)}, or another way to resize."
        )
    return dict(PAPER_MODELS[name].published)


def closest(given: str, known: Iterable[str], otherwise: str) -> str:
    """Names that are spelt like the one given, as the end of a sentence."""
    near = difflib.get_close_matches(given, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(match) for match in near)}?" if near else otherwise


class ClassNames:
    """The names of a model's classes: several synonyms for each, the first of them the main one.

    Args:
        synonyms: for each of the C classes its names.
        wordnet_ids: of each class, where they are those of a known ImageNet set.
        named: whether these are names, and no numbers in their place.
    """

    def __init__(
        self,
        synonyms: Sequence[Sequence[str]],
        wordnet_ids: Sequence[str] = (),
        *,
        named: bool = True,
    ) -> None:
        self._synonyms = [tuple(names) for names in synonyms]
        self.wordnet_ids = tuple(wordnet_ids)
        self.named = named
        self._index: dict[str, list[int]] = defaultdict(list)
        self._full: dict[str, list[int]] = defaultdict(list)
        for index, names in enumerate(self._synonyms):
            self._full[_key(", ".join(names))].append(index)
            for key in dict.fromkeys(map(_key, names)):
                self._index[key].append(index)

    def __len__(self) -> int:
        return len(self._synonyms)

    def __getitem__(self, index: int) -> str:
        """The main name of a class; with its index where another class bears it too."""
        name = self._synonyms[index][0]
        return f"{name} ({index})" if len(self._index[_key(name)]) > 1 else name

    def with_full_name(self, text: str) -> list[int]:
        """The classes whose whole name this is: all synonyms, separated by commas.

        Case is no matter, and ``_``, ``-`` and a space are alike.
        """
        return list(self._full.get(_key(text), ()))

    def with_name(self, text: str) -> list[int]:
        """The classes that have this among their synonyms."""
        return list(self._index.get(_key(text), ()))

    def suggest(self, text: str) -> str:
        """Names that hold this word or are spelt like it, as the end of a sentence."""
        known = [name for names in self._synonyms for name in names]
        word = re.compile(rf"\b{re.escape(_key(text))}\b") if _key(text) else None
        holding = [name for name in known if word and word.search(_key(name))]
        if holding:
            more = ", …" if len(holding) > _SUGGESTED else ""
            return f"did you mean {', '.join(map(repr, holding[:_SUGGESTED]))}{more}?"
        return closest(text.lower(), known, f"give an index, 0 to {len(self) - 1}.")

    def find(self, target: str | int) -> int:
        """The index of a class given by index or by any of its names, whatever their case.

        Args:
            target: "281", 281, "tabby", "tabby cat", ...

        Returns:
            The index, 0 ≤ index < C.

        Raises:
            TargetError: if the index is out of range, or the name is unknown (the message offers
                the nearest ones) or borne by several classes (the message gives their indices).
        """
        text = str(target).strip()
        if re.fullmatch(r"[+-]?\d+", text):
            if 0 <= int(text) < len(self):
                return int(text)
            raise TargetError(
                f"Class {text} is out of range: the model has {len(self)} classes, "
                f"0 to {len(self) - 1}."
            )
        found = self.with_name(text)
        if len(found) == 1:
            return found[0]
        if found:
            bearers = " and ".join(f"{i} ({', '.join(self._synonyms[i])})" for i in found)
            raise TargetError(
                f"The name {text!r} is borne by the classes {bearers}: give the index."
            )
        raise TargetError(f"No class of the model is named {text!r}: {self.suggest(text)}")


def _key(name: str) -> str:
    plain = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.sub(r"[_\s-]", " ", plain).split())


def class_names(model: nn.Module) -> ClassNames:
    """The names of the classes of a model.

    They are those of a zero-shot classifier, of the model's `pretrained_cfg` (`label_names`), or of
    Hugging Face's `id2label` where it says them, those of ImageNet (timm's lists, by the number
    of classes) where the number fits, else "class 0", "class 1", ...

    Args:
        model: a model of timm or Hugging Face, or any adapted model.

    Returns:
        Names for every class.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    given = getattr(model, "classes", None)
    if isinstance(given, tuple):
        return ClassNames([(name,) for name in given])
    known = [getattr(model, name, None) for name in ("num_classes", "num_labels")]
    count = next((int(number) for number in known if isinstance(number, int)), 0)
    if not count:
        raise InputError(
            f"{type(model).__qualname__} does not say how many classes it has: give adapt(model), "
            "or their names."
        )
    labels = _labels(getattr(model, "model", model))
    labels = labels or _labels(getattr(model, "pixels_of", model))
    if labels is not None and len(labels) == count:
        return ClassNames([(label,) for label in labels])
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return ClassNames([(f"class {index}",) for index in range(count)], named=False)
    info = ImageNetInfo(subset)
    descriptions = [text.split(", ") for text in info.label_descriptions()]
    return ClassNames(descriptions, info.label_names())


def _labels(model: Any) -> Sequence[str] | None:
    """Names that a model of timm or Hugging Face brings along."""
    known = getattr(model, "pretrained_cfg", None) or {}
    labels: Sequence[str] | None = known.get("label_names")
    by_index = getattr(getattr(model, "config", None), "id2label", None)
    if labels is None and by_index:
        named = [str(by_index[index]) for index in sorted(by_index)]
        # What the library writes where nobody gave names.
        labels = None if all(re.fullmatch(r"LABEL_\d+", name) for name in named) else named
    return labels
