"""The numbers behind the explorer's page, collected from one model and one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from captum_classemb.attr import (
    METHODS,
    AllPathImportance,
    ClassEmbeddingProjection,
    MemoryPatchImportance,
    PatchAttribution,
    PatchImportance,
)
from captum_classemb.attr._forward_pass import ForwardPassAttribution
from captum_classemb.attr.together import SharedPass
from captum_classemb.data import Preprocess, read_image
from captum_classemb.data.images import as_rgb, printable
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.explain.compute import OWN, TOP, check_methods, every_token
from captum_classemb.explorer import explorer_page
from captum_classemb.explorer.contents import Contents, LedgerEntries, MethodMaps
from captum_classemb.explorer.page import ExplorerPage
from captum_classemb.explorer.quantise import quantise
from captum_classemb.functional.identifiability import rank
from captum_classemb.functional.ledger import LogitLedger
from captum_classemb.models.names import ClassNames, class_names
from captum_classemb.plot import DIVERGING
from captum_classemb.vit import ViT, adapt

Floats = npt.NDArray[np.floating]

#: Classes beside those in focus that have maps, where each costs time: otherwise all have.
_FEW = {PatchImportance: 64, AllPathImportance: 0}


def explore(
    model: nn.Module,
    image: str | Path | Image.Image,
    targets: Sequence[str | int] = (),
    *,
    names: ClassNames | None = None,
    preprocess: Preprocess | None = None,
) -> ExplorerPage:
    """A page to explore one image; a notebook shows it in place, `save` writes it to a file.

    Args:
        model: whatever the methods take, with a classifier of its own.
        image: the image, or its file.
        targets: classes by index or name; the five most probable ones are added.
        names: of the classes. Default: what the model's configuration calls them.
        preprocess: what the model wants of its images. Default: what the model's library
            knows of it.

    Raises:
        ClassEmbError: if the model is not supported, a target unknown or the image unreadable.

    Examples:
        >>> from captum_classemb.models import demo_image_paths, demo_vit
        >>> page = explore(demo_vit(), demo_image_paths()[0], targets=["seven"])
        >>> page.document[:15]
        '<!doctype html>'
    """
    vit = adapt(model)
    names = names or class_names(vit)
    preprocess = preprocess or Preprocess.of_model(vit)
    title = printable(Path(image).name) if isinstance(image, (str, Path)) else "Image"
    photo = as_rgb(image) if isinstance(image, Image.Image) else read_image(image)
    run = Explore(vit, preprocess.view(photo), preprocess)
    wanted = [names.find(target) for target in targets]
    for step in run.steps(wanted):
        step()
    called = type(run.vit.model).__qualname__
    return run.page(names, title=title, model=called)


@dataclass
class Explore:
    """The work behind one page, in steps, so that whoever runs it can show how far it is.

    Args:
        vit: the adapted model.
        view: H×W×3, 8 bits: what the model sees.
        preprocess: what makes of it what the model reads.
        methods: names of :data:`~captum_classemb.attr.METHODS`, of those with entries by block.

    Raises:
        InputError: if a method is unknown, or has no entries by block.
        UnsupportedModelError: by the first step, if a block holds no patch tokens.

    Examples:
        >>> from captum_classemb.models import demo_image_paths, demo_vit
        >>> model = demo_vit()
        >>> preprocess = Preprocess.of_model(model)
        >>> view = preprocess.view(read_image(demo_image_paths()[0]))
        >>> methods = ["patch-importance", "memory-patch-importance"]
        >>> exploring = Explore(adapt(model), view, preprocess, methods)
        >>> steps = exploring.steps(targets=[7])
        >>> for number, step in enumerate(steps, 1):
        ...     step()
        ...     print(f"{number} of {len(steps)}")
        1 of 4
        2 of 4
        3 of 4
        4 of 4
        >>> exploring.focus[0]
        7
        >>> page = exploring.page(class_names(model), title="A digit", model="demo_vit")
        >>> "<title>A digit</title>" in page.document
        True
    """

    vit: ViT
    view: npt.NDArray[np.uint8]
    preprocess: Preprocess
    methods: Sequence[str] = OWN

    def steps(self, targets: Sequence[int] = ()) -> list[Callable[[], None]]:
        """What there is to do, in this order."""
        self._targets = list(dict.fromkeys(targets))
        self._maps: list[MethodMaps] = []
        self._notes = [f"The model reads the image {self.preprocess}.", *self._refused]
        self._ledger: LedgerEntries | None = None
        per_method = [self._method_step(key) for key in self._built]
        return [self._read_tokens, *per_method, self._read_ledger]

    def page(self, names: ClassNames, *, title: str, model: str) -> ExplorerPage:
        """The page, once every step is done."""
        prefix = ["CLS", *(f"Prefix {i}" for i in range(1, self.vit.prefix_tokens))]
        return explorer_page(
            Contents(
                image=self.view,
                grid=self._grid,
                title=title,
                model=model,
                names=[names[index] for index in range(len(names))],
                probabilities=self.probabilities,
                focus=self.focus,
                targets=len(self._targets),
                top_classes=self._top_classes,
                top_probabilities=self._top_probabilities,
                ranks=self._ranks,
                prefix=prefix[: self.vit.prefix_tokens],
                methods=self._maps,
                ledger=self._ledger,
                colors=_lut(),
                notes=self._notes,
            )
        )

    # -- steps

    def __post_init__(self) -> None:
        check_methods(self.methods)
        self._built: dict[str, PatchAttribution] = {}
        self._refused: list[str] = []
        for name in self.methods:
            try:
                method = METHODS[name].build(self.vit)
            except UnsupportedModelError as error:
                self._refused.append(f"{name} is missing: {error}")
                continue
            if not isinstance(method, (ForwardPassAttribution, ClassEmbeddingProjection)):
                raise InputError(f"the page shows entries by block: {name} has none, leave it out.")
            self._built[name] = method

    def _read_tokens(self) -> None:
        """Top classes of every token after every block, and the ranks of the classes in focus."""
        vit = self.vit
        pixels = self.preprocess.tensor(self.view)[None].to(vit.device, vit.dtype)
        methods = list(self._built.values())
        ledgers = [m.ledger_needs() for m in methods if isinstance(m, MemoryPatchImportance)]
        self._pass = SharedPass(vit, methods, pixels, also=[every_token(vit), *ledgers])
        recording = self._pass.done.recording
        assert recording is not None
        self._pass.finish()
        self._grid = vit.grid((pixels.shape[2], pixels.shape[3]))
        probabilities = self._pass.done.logits.float().softmax(-1)[0]
        self.probabilities = probabilities.cpu().numpy()
        self._order = np.argsort(-self.probabilities, kind="stable")
        self.top = [int(index) for index in self._order[:TOP]]
        self.focus = list(dict.fromkeys([*self._targets, *self.top]))
        focus = torch.tensor(self.focus, device=vit.device)
        tokens = vit.prefix_tokens + self._grid[0] * self._grid[1]
        classes, shares, ranks, projected = [], [], [], []
        with torch.no_grad():
            for hidden in recording["resid_post"]:
                if hidden.shape[1] != tokens:
                    raise UnsupportedModelError(
                        f"Some blocks of {type(vit.model).__qualname__} hold no patch tokens: "
                        "the page needs them after every block."
                    )
                logits = vit.readout.project(hidden)[0].float()
                best = logits.softmax(-1).topk(min(TOP, logits.shape[-1]))
                classes.append(best.indices.cpu().numpy())
                shares.append(best.values.cpu().numpy())
                by_class = logits.expand(len(focus), -1, -1)
                ranks.append(rank(by_class, focus[:, None]).cpu().numpy())
                projected.append(_numpy(logits[vit.prefix_tokens :, focus].T))
        self._top_classes, self._top_probabilities = np.stack(classes), np.stack(shares)
        self._ranks = np.stack(ranks, 1)
        self._projected = np.stack(projected, 1).reshape(len(focus), -1, 1, *self._grid)

    def _method_step(self, name: str) -> Callable[[], None]:
        def step() -> None:
            try:
                self._maps.append(self._read_method(name, self._built[name]))
            except UnsupportedModelError as error:
                self._notes.append(f"{name} is missing: {error}")

        return step

    def _read_method(self, name: str, method: PatchAttribution) -> MethodMaps:
        classes = self._classes_with_maps(method)
        maps = self._pass.maps(method, torch.from_numpy(classes))[0]
        if isinstance(method, ForwardPassAttribution):
            parts = np.stack([self._parts(method, i) for i in self.focus])
            whole = "all blocks" + " and heads" * method.by_head
        else:
            # The tokens of every block are read already.
            parts, whole = self._projected, "last block"
        self._pass.finish()
        return MethodMaps(
            key=name,
            title=name,
            caption=METHODS[name].caption,
            whole=whole,
            classes=classes,
            maps=quantise(_numpy(maps)),
            parts=quantise(parts),
            totals=parts.sum((-2, -1)),
        )

    def _parts(self, method: ForwardPassAttribution, index: int) -> Floats:
        """One class by block and head: L×H'×h×w, all heads together first."""
        done, target = self._pass.done, torch.tensor([index], device=self.vit.device)
        by_head = _numpy(method.one_class(done, target, summed=False)[0])
        by_head = by_head.reshape(*by_head.shape[:2], *self._grid)
        if not method.by_head:
            return by_head
        return np.concatenate([by_head.sum(1, keepdims=True), by_head], 1)

    def _read_ledger(self) -> None:
        drawn = [self._built[method.key] for method in self._maps]
        memory = next((m for m in drawn if isinstance(m, MemoryPatchImportance)), None)
        if memory is None:
            return
        targets = torch.tensor(self.focus, device=self.vit.device)
        ledgers = [memory.ledger_of(self._pass.done, index) for index in targets[:, None]]
        self._pass.finish()
        first = self.vit.prefix_tokens

        def each(read: Callable[[LogitLedger], Tensor]) -> Floats:
            return np.stack([_numpy(read(ledger)[0]) for ledger in ledgers])

        self._ledger = LedgerEntries(
            patches=each(lambda ledger: ledger.patches),
            heads=each(lambda ledger: ledger.attention[..., first:].sum(-1)),
            prefix=each(lambda ledger: ledger.attention[..., :first].sum(-1)),
            mlp=each(lambda ledger: ledger.mlp),
            embedding=each(lambda ledger: ledger.embedding),
            bias=each(lambda ledger: ledger.bias),
            pool=each(_pool),
            score=each(lambda ledger: ledger.score),
        )

    def _classes_with_maps(self, method: PatchAttribution) -> npt.NDArray[np.integer]:
        # Those in focus first: however improbable a target is, it is asked for.
        chosen = list(dict.fromkeys([*self.focus, *map(int, self._order)]))
        most = next((n for kind, n in _FEW.items() if isinstance(method, kind)), len(chosen))
        return np.array(chosen[: max(most, len(self.focus))])


def _pool(ledger: LogitLedger) -> Tensor:
    return torch.zeros_like(ledger.score) if ledger.pool is None else ledger.pool


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()


def _lut() -> npt.NDArray[np.uint8]:
    colors = DIVERGING(np.arange(DIVERGING.N))[:, :3]
    lut: npt.NDArray[np.uint8] = np.rint(255 * colors).astype(np.uint8)
    return lut
