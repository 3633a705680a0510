"""One run over files: read, explain in batches, draw, write."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captum_classemb.attr import METHODS
from captum_classemb.data import Preprocess
from captum_classemb.data.images import Source, find_images, printable, read_photograph
from captum_classemb.data.marks import JSON_MARK, MARK, NPZ_MARK, PNG_MARK
from captum_classemb.data.preprocess import ResizeMode
from captum_classemb.errors import ClassEmbError, DataError, InputError
from captum_classemb.explain.compute import OWN, Explainer, Explanation, check_methods
from captum_classemb.explain.outputs import Protected, check_writable, unique_stems, write_together
from captum_classemb.explain.subject import Texts, load_subject, of_file
from captum_classemb.models.demo import demo_image_paths
from captum_classemb.models.elsewhere import elsewhere
from captum_classemb.models.load import load_model
from captum_classemb.models.names import DEMO_MODEL, ClassNames
from captum_classemb.plot.explain import MAX_TARGETS, ClassScore, PatchMaps, explanation_figure
from captum_classemb.readout import load_readout
from captum_classemb.versions import versions
from captum_classemb.vit import adapt

_DPI = 160
_SUFFIXES = (".png", ".npz", ".json")


@dataclass(frozen=True)
class Options:
    """What a run is asked to do; see the command line's help."""

    images: Sequence[Path] = ()
    model: str | torch.nn.Module = DEMO_MODEL
    checkpoint: Path | None = None
    shape: Mapping[str, int] = field(default_factory=dict)
    class_names: Sequence[str] | Path = ()
    texts: Texts = Texts()
    preprocess: Preprocess | None = None
    targets: Sequence[str | int] = ()
    methods: Sequence[str] = OWN
    readout: Path | None = None
    resize: ResizeMode = "crop"
    device: str = "auto"
    dtype: torch.dtype = torch.float32
    batch_size: int = 8
    output: Path = Path("explanations")
    page: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one path: either an error, or a picture and what it shows.

    Of a file of several frames the first is explained.
    """

    path: Path
    error: ClassEmbError | None = None
    picture: Path | None = None
    targets: Sequence[ClassScore] = ()
    top: Sequence[ClassScore] = ()
    frames: int = 1


@dataclass(frozen=True)
class _Photograph:
    path: Path
    stem: str
    size: tuple[int, int]
    source: Source
    view: npt.NDArray[np.uint8]


@dataclass
class Run:
    """A run whose options are checked and whose model is loaded.

    Args:
        options: what to do.
        say: is told that the model will be loaded, which may take a download, beforehand.

    Raises:
        ClassEmbError: if an option cannot be followed; nothing has been written then.
    """

    options: Options
    say: Callable[[str], None] | None = None
    files: list[Path] = field(init=False)
    missing: list[Outcome] = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        check_methods(options.methods)
        if options.batch_size < 1:
            raise InputError(f"The batch size {options.batch_size} is too small: give 1 or more.")
        check_writable(options.output if options.page is None else options.page.parent)
        self._find_files()
        inputs = [*self.files, *_files(options)]
        self.protected = Protected(inputs, options.overwrite)
        self.protected.check(self._names())
        self._load()

    def _names(self) -> Iterator[Path]:
        """Every file that will be written."""
        if self.options.page is not None:
            yield self.options.page
            return
        for stem in unique_stems(self.files):
            yield from (self.options.output / f"{stem}{suffix}" for suffix in _SUFFIXES)

    def _find_files(self) -> None:
        found: list[Path] = []
        self.missing = []
        for path in self.options.images or demo_image_paths()[:1]:
            try:
                found += find_images(path)
            except DataError as error:
                self.missing.append(Outcome(Path(path), error=error))
        self.files = list(dict.fromkeys(found))

    def _load(self) -> None:
        options = self.options
        if isinstance(options.model, str):
            if not elsewhere(options.model):
                # Before any weights are fetched: is it a model that can be explained?
                bare = adapt(load_model(options.model, random_init=True, device="meta"))
                _ = None if options.checkpoint or options.texts else bare.readout
            if self.say is not None:
                self.say(f"loading {options.model} …")
        self.subject = subject = load_subject(
            options.model,
            options.checkpoint,
            shape=options.shape,
            names=options.class_names,
            texts=options.texts,
            preprocess=options.preprocess,
            resize=options.resize,
            device=options.device,
            dtype=options.dtype,
        )
        vit, self.names, self.preprocess = subject.vit, subject.names, subject.preprocess
        if not vit.has_readout:
            raise InputError(
                f"{subject.name} has no classifier: classes by name need a file of weights with "
                "one, or --class with a model of open_clip."
            )
        targets = list(dict.fromkeys(self.names.find(target) for target in options.targets))
        if len(targets) > MAX_TARGETS:
            raise InputError(
                f"{len(targets)} targets were given: one figure shows up to {MAX_TARGETS}."
            )
        readout = None if options.readout is None else load_readout(options.readout, vit.readout)
        self.explainer = Explainer(vit, list(dict.fromkeys(options.methods)), targets, readout)

    def __len__(self) -> int:
        """The number of outcomes."""
        return len(self.files) + len(self.missing)

    def __iter__(self) -> Iterator[Outcome]:
        """Explain file after file; one that cannot be read does not stop the others."""
        yield from self.missing
        batch: list[_Photograph] = []
        for path, stem in zip(self.files, unique_stems(self.files), strict=True):
            try:
                batch.append(self._read(path, stem))
            except DataError as error:
                yield Outcome(path, error=error)
            if len(batch) == self.options.batch_size:
                yield from self._explain(batch)
                batch = []
        yield from self._explain(batch)

    def _read(self, path: Path, stem: str) -> _Photograph:
        photo = read_photograph(path)
        try:
            view = self.preprocess.view(photo.image)
        except DataError as error:
            raise DataError(f"The image {path} is refused: {error}") from error
        return _Photograph(path, stem, photo.image.size, photo.source, view)

    def _explain(self, batch: Sequence[_Photograph]) -> Iterator[Outcome]:
        if not batch:
            return
        tensors = torch.stack([self.preprocess.tensor(photo.view) for photo in batch])
        try:
            explanations = self.explainer(tensors)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"A batch of {len(batch)} images does not fit into the memory of "
                f"{self.options.device}: give a smaller --batch-size."
            ) from error
        for photo, explanation in zip(batch, explanations, strict=True):
            yield self._write(photo, explanation)

    def _write(self, photo: _Photograph, explanation: Explanation) -> Outcome:
        targets = scores(self.names, explanation.probabilities, explanation.targets)
        top = scores(self.names, explanation.probabilities, explanation.top)
        record = self._record(photo, explanation, targets, top)
        contents = {
            f"{photo.stem}.png": self._picture(photo, explanation, targets, top),
            f"{photo.stem}.npz": _archive(photo, explanation),
            f"{photo.stem}.json": (json.dumps(record, indent=2) + "\n").encode(),
        }
        # Once more, for long work leaves time for files to appear.
        self.protected.check(self.options.output / name for name in contents)
        write_together(self.options.output, contents)
        picture = self.options.output / f"{photo.stem}.png"
        frames = photo.source.frames
        return Outcome(photo.path, picture=picture, targets=targets, top=top, frames=frames)

    def _picture(
        self,
        photo: _Photograph,
        explanation: Explanation,
        targets: Sequence[ClassScore],
        top: Sequence[ClassScore],
    ) -> bytes:
        h, w = explanation.patches.shape[-2:]
        figure = explanation_figure(
            photo.view,
            [
                PatchMaps(name, METHODS[name].caption, values)
                for name, values in explanation.maps.items()
            ],
            targets,
            top,
            explanation.patches.reshape(*explanation.patches.shape[:2], h * w),
            explanation.cls,
            title=printable(photo.path.name),
            subtitle=f"{self.subject.name}, {h}×{w} patches",
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata=PNG_MARK)
        return buffer.getvalue()

    def _readout(self) -> dict[str, str]:
        """What the hidden states were read with."""
        path = self.options.readout
        if path is None:
            return {"source": "model"}
        return {"source": "file", "kind": type(self.explainer.readout).__name__, **of_file(path)}

    def _record(
        self,
        photo: _Photograph,
        explanation: Explanation,
        targets: Sequence[ClassScore],
        top: Sequence[ClassScore],
    ) -> dict[str, Any]:
        """What was computed on what."""
        vit = self.explainer.vit
        return {
            **JSON_MARK,
            "image": {
                "file": str(photo.path),
                "sha256": photo.source.sha256,
                "frames": photo.source.frames,
                "width": photo.size[0],
                "height": photo.size[1],
            },
            "model": {
                "name": self.subject.name,
                "class": f"{type(vit.model).__module__}.{type(vit.model).__qualname__}",
                "weights": self.subject.weights,
                "parameters": sum(p.numel() for p in vit.model.parameters()),
                "blocks": len(vit.blocks),
                "classes": vit.num_classes,
                "prefix_tokens": vit.prefix_tokens,
                "grid": list(explanation.patches.shape[-2:]),
                "device": str(vit.device),
                "dtype": str(vit.dtype).removeprefix("torch."),
            },
            "preprocess": self.preprocess.describe(),
            **({"zero_shot": self.subject.zero_shot} if self.subject.zero_shot else {}),
            "targets": [vars(score) for score in targets],
            "top": [vars(score) for score in top],
            "methods": {
                name: {
                    "class": f"{type(method).__module__}.{type(method).__qualname__}",
                    "scores": METHODS[name].caption,
                    "options": method.options(),
                }
                for name, method in self.explainer.methods.items()
            },
            "readout": self._readout(),
            "identifiability": {"site": "resid_post", "blocks": "all"},
            "seed": None,
            "versions": versions(),
        }


def _files(options: Options) -> Iterator[Path]:
    """Files that are read beside the images."""
    given = (options.checkpoint, options.readout, options.texts.features, options.class_names)
    yield from (path for path in given if isinstance(path, Path) and path.exists())


def scores(
    names: ClassNames, probabilities: npt.NDArray[np.floating], indices: Sequence[int]
) -> list[ClassScore]:
    """Classes with their names and probabilities."""
    return [ClassScore(index, names[index], float(probabilities[index])) for index in indices]


def _archive(photo: _Photograph, explanation: Explanation) -> bytes:
    arrays: dict[str, Any] = {
        **explanation.maps,
        "targets": np.array(explanation.targets),
        "probabilities": explanation.probabilities,
        "identifiability_patches": explanation.patches,
        "image": photo.view,
        NPZ_MARK: np.array(MARK),
    }
    if explanation.cls is not None:
        arrays["identifiability_cls"] = explanation.cls
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
