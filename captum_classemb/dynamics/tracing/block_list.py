"""The blocks of any vision model: elements of a container that run one after another.

Which modules those are is read off one traced forward pass, not off names or families.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from captum_classemb.dynamics.tracing.feature_maps import as_feature_map, evaluating, layout_of
from captum_classemb.dynamics.tracing.trace import key, trace


def tensors_of(value: object) -> list[Tensor]:
    """The tensors of a module's output, which may be one, a tuple or a list."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


class TracedRun:
    """A traced forward pass and what can be derived from it."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.modules = dict(model.named_modules())
        self.batch, self.size = images.shape[0], (images.shape[-2], images.shape[-1])
        self.prefix, self.channels_last = layout_of(model)
        with evaluating(model):
            self.events = trace(model, images)
        self.entered: dict[str, list[int]] = {}
        self.left: dict[str, list[int]] = {}
        for i, event in enumerate(self.events):
            if event.kind in ("enter", "exit"):
                times = self.entered if event.kind == "enter" else self.left
                times.setdefault(event.path, []).append(i)

    def map_of(self, value: object) -> Tensor | None:
        """A value of the traced pass as a feature map B×C×h×w; None if it is none."""
        return as_feature_map(value, self.batch, self.size, self.prefix, self.channels_last)

    def output_map(self, path: str) -> Tensor | None:
        """The feature map that the module puts out, if it runs once and puts out one."""
        if len(self.left.get(path, ())) != 1:
            return None
        return self.map_of(self.events[self.left[path][0]].output)

    def grid(self, path: str) -> tuple[int, int]:
        """Height and width of the feature map that the module puts out."""
        found = cast(Tensor, self.output_map(path))
        return found.shape[-2], found.shape[-1]

    def is_block(self, path: str) -> bool:
        """Whether the module is large enough for a block and puts out feature maps."""
        layers = sum(
            isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d)) for m in self.modules[path].modules()
        )
        return layers >= 2 and self.output_map(path) is not None

    def reads(self, path: str) -> tuple[int, int] | None:
        """The tensor that the module reads first of all."""
        inputs = self.events[self.entered[path][0]].inputs
        return key(inputs[0]) if inputs else None

    def writes(self, path: str) -> set[tuple[int, int]]:
        """The tensors that the module puts out."""
        return {key(x) for x in tensors_of(self.events[self.left[path][0]].output)}


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))] if path else []


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _children(run: TracedRun, path: str) -> list[str]:
    names = (name for name, _ in run.modules[path].named_children())
    paths = [f"{path}.{name}" if path else name for name in names]
    # A module with two parents is known by its first path alone.
    return [child for child in paths if child in run.modules]


def _block_list(run: TracedRun, path: str) -> list[str]:
    """The blocks among a module's children; none where the children are no list of blocks."""
    blocks = [child for child in _children(run, path) if run.is_block(child)]
    if isinstance(run.modules[path], (nn.Sequential, nn.ModuleList)):
        side_by_side = len(blocks) > 1 and len({run.reads(block) for block in blocks}) == 1
        return [] if side_by_side else blocks
    alike = len({type(run.modules[block]) for block in blocks}) == 1
    chained = all(
        run.reads(after) in run.writes(before)
        for before, after in zip(blocks, blocks[1:], strict=False)
    )
    return blocks if len(blocks) > 1 and alike and chained else []


def find_blocks(run: TracedRun) -> list[str]:
    """The innermost blocks, in the order in which they run."""
    found: set[str] = set()
    for path in list(run.modules)[1:]:
        blocks = _block_list(run, path)
        inside = [a for a in [*_ancestors(path)[1:], path] if a in found]
        weighted = sum(
            any(True for _ in run.modules[child].parameters()) for child in _children(run, path)
        )
        # A lone MLP in a small sequence within a block does not make that block a stage.
        if not blocks or (inside and 2 * len(blocks) <= weighted):
            continue
        found.difference_update(inside)
        found.update(blocks)
    # A stage of a single block is known by its kin.
    kin = {type(run.modules[_parent(path)]) for path in found} - {nn.Sequential, nn.ModuleList}
    for path, module in run.modules.items():
        if type(module) in kin and not any(_parent(block) == path for block in found):
            found.update(child for child in _children(run, path) if run.is_block(child))
    if not found:
        root = ""
        while len(only := _children(run, root)) == 1:
            root = only[0]
        found = {child for child in _children(run, root) if run.is_block(child)}
    for path in [path for path in found if _is_flat(run.modules[path])]:
        found.remove(path)
        found.update(_layers(run, path))
    # What reads the image itself is the embedding, however large.
    image = run.reads("")
    return sorted(
        (path for path in found if run.reads(path) != image), key=lambda path: run.left[path][0]
    )


def _is_flat(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and not any(
        True for child in module for _ in child.children()
    )


def _layers(run: TracedRun, path: str) -> list[str]:
    """The last module of each layer of a plain sequence, a layer beginning with its weights."""
    children = [child for child in _children(run, path) if run.output_map(child) is not None]
    ends = [
        before
        for before, after in zip(children, children[1:], strict=False)
        if isinstance(run.modules[after], nn.Conv2d)
    ]
    return [*ends, children[-1]]


def find_others(run: TracedRun, blocks: list[str]) -> list[str]:
    """Modules beside the blocks: pooling layers of stages, patch merging and the like."""
    opened = {ancestor for block in blocks for ancestor in _ancestors(block)}
    return [
        path
        for path in run.modules
        if path
        and path not in opened
        and path not in blocks
        and _parent(path) in opened
        and run.output_map(path) is not None
        and run.left[path][0] > run.left[blocks[0]][0]
    ]
