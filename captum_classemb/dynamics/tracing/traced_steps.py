"""The steps of any vision model, found from the model: embedding, attention, MLP, convolution.

One traced forward pass tells which modules form the model's list of blocks (elements of a
container that run one after another and put out feature maps) and where inside a block the
residual stream is complete again (a sum that a module reads and a later sum adds to). Neither
names nor families are asked for, so CNNs, hierarchical models and hybrids need no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_classemb.dynamics.tracing.block_list import (
    TracedRun,
    find_blocks,
    find_others,
    tensors_of,
)
from captum_classemb.dynamics.tracing.feature_maps import (
    as_feature_map,
    evaluating,
    layout_of,
    without_wrapper,
)
from captum_classemb.dynamics.tracing.trace import Event, key
from captum_classemb.errors import InputError, UnsupportedModelError
from captum_classemb.hooks import after, before, hooks_removed

# Two, so that what has a batch dimension can be told from what has none.
_TRACED_IMAGES = 2

StepKind = Literal["embedding", "attention", "mlp", "convolution", "pooling", "block"]


@dataclass(frozen=True)
class TracedStep:
    """A place where the residual stream, or a CNN's feature map, is complete.

    Attributes:
        name: unique within the model.
        kind: what happened since the step before. ``pooling`` is any step that makes the grid
            smaller; ``block`` one in which attention and what follows it cannot be told apart.
        block: index of the block, −1 for the embedding; a pooling layer between blocks has that
            of the block before it.
        module: path of the module whose input or output is the feature map.
        side: which of the two.
        branch: path of the module whose output is added to the residual stream in this step;
            None where the step adds nothing, or a sum that no single module puts out.
    """

    name: str
    kind: StepKind
    block: int
    module: str
    side: Literal["input", "output"]
    branch: str | None = None


class _Sum(NamedTuple):
    """A residual sum within a block: when, which module reads it, which one puts out the addend."""

    time: int
    reader: str | None
    branch: str | None


def _sums(run: TracedRun, path: str) -> list[_Sum]:
    """The residual sums of a block; the last one is its output and has no reader."""
    start, end = run.entered[path][0], run.left[path][0]
    events = run.events[start:end]
    made_by = _sum_before(events, {key(x) for x in _map_tensors(run, path)})
    if made_by is None:
        # The block ends in a norm or an activation.
        made_by = _sum_before(events, None, _map_tensors(run, path)[0].numel())
    found: list[_Sum] = []
    reader: str | None = None
    while made_by is not None:
        operands = {key(x) for x in events[made_by].inputs}
        earlier = _sum_before(events[:made_by], operands)
        reads = None
        if earlier is not None:
            total = cast(Tensor, events[earlier].output)
            reads = _reader(run, events[earlier:made_by], key(total))
        since = 0 if earlier is None or reads is None else earlier
        branch = _branch(run, events, since, made_by)
        if reader is not None or not found:
            found.append(_Sum(start + made_by, reader, branch))
        if earlier is None or reads is None:
            break
        made_by, reader = earlier, reads
    return found[::-1]


def _map_tensors(run: TracedRun, path: str) -> list[Tensor]:
    """The tensor of a module's output that holds its feature map."""
    outputs = tensors_of(run.events[run.left[path][0]].output)
    return [x for x in outputs if run.map_of(x) is not None][:1]


def _sum_before(
    events: Sequence[Event], wanted: set[tuple[int, int]] | None, size: int = 0
) -> int | None:
    """The last sum among the events that made one of the tensors, or any sum of that size."""
    for i in range(len(events) - 1, -1, -1):
        output = events[i].output
        if events[i].kind == "add" and isinstance(output, Tensor):
            if wanted is None and output.numel() == size:
                return i
            if wanted is not None and key(output) in wanted:
                return i
    return None


def _branch(run: TracedRun, events: Sequence[Event], since: int, until: int) -> str | None:
    """The module whose output was added, where the other operand is older than the step."""
    given = {key(x) for x in events[0].inputs}
    operands = [key(x) for x in events[until].inputs if key(x) not in given]
    for event in reversed(events[since:until]):
        if event.kind == "exit" and len(run.left[event.path]) == 1:
            written = {key(x) for x in tensors_of(event.output)}
            made = [operand for operand in operands if operand in written]
            if len(made) == 1:
                return event.path
    return None


def _reader(run: TracedRun, events: Sequence[Event], wanted: tuple[int, int]) -> str | None:
    """The first module that reads a tensor and does something to it."""
    for event in events:
        if event.kind == "enter" and event.inputs and key(event.inputs[0]) == wanted:
            if len(run.entered[event.path]) > 1 or run.map_of(event.inputs[0]) is None:
                return None
            if wanted not in run.writes(event.path):
                return event.path
    return None


def _kind_of(events: Sequence[Event], smaller: bool) -> StepKind:
    # What does not grow with the batch, such as the network of a position bias, mixes no features.
    kinds = [e.kind for e in events if e.inputs and e.inputs[0].shape[0] % _TRACED_IMAGES == 0]
    if smaller:
        return "pooling"
    if "attention" in kinds:
        # A linear layer and an activation after attention are an MLP beside or behind it.
        behind = kinds[kinds.index("attention") :]
        mlp = "linear" in behind and "activation" in behind[behind.index("linear") :]
        return "block" if mlp else "attention"
    if "convolution" in kinds:
        return "convolution"
    return "mlp" if "linear" in kinds else "pooling"


def find_steps(model: nn.Module, images: Tensor) -> tuple[TracedStep, ...]:
    """Name the steps of a model, from the embedding to the last block.

    Args:
        model: any vision model, of timm, torchvision, transformers or one's own.
        images: B×3×H×W that the model takes; the first image is enough.

    Returns:
        The steps in the order in which they run: the embedding (what the first block reads), then
        for each block the sums within it and its output, and pooling layers between blocks.

    Raises:
        InputError: ``images`` is no batch of images.
        UnsupportedModelError: no block of the model puts out feature maps, or its tokens are kept
            in an order other than the image's.
    """
    model = without_wrapper(model)
    if images.dim() != 4:
        raise InputError(
            f"Steps are found with images B×3×H×W, but a tensor of shape {tuple(images.shape)} "
            "was given."
        )
    name = type(model).__name__
    if any(path.rpartition(".")[2] == "unroll" for path, _ in model.named_modules()):
        raise UnsupportedModelError(
            f"{name} keeps its tokens unrolled by mask unit, so its blocks hold no feature maps; "
            "give a model whose tokens stay in the image's order."
        )
    run = TracedRun(model, images[:1].expand(_TRACED_IMAGES, -1, -1, -1).contiguous())
    blocks = find_blocks(run)
    reads = _reader_input(run, blocks[0]) if blocks else None
    if reads is None:
        raise UnsupportedModelError(
            f"{name} has no spatial features: no block that reads and puts out B×C×h×w, B×h×w×C or "
            f"a grid of tokens was found for images of {images.shape[-2]}×{images.shape[-1]}."
        )
    return _steps(run, blocks, (reads.shape[-2], reads.shape[-1]))


def _reader_input(run: TracedRun, block: str) -> Tensor | None:
    return run.map_of(list(run.events[run.entered[block][0]].inputs))


def _steps(run: TracedRun, blocks: list[str], grid: tuple[int, int]) -> tuple[TracedStep, ...]:
    steps = [TracedStep("embedding", "embedding", -1, blocks[0], "input")]
    others = find_others(run, blocks)
    time = run.entered[blocks[0]][0]
    index = -1
    for path in sorted([*blocks, *others], key=lambda p: run.left[p][0]):
        new = run.grid(path)
        smaller = new[0] * new[1] < grid[0] * grid[1]
        end = run.left[path][0]
        branch: str | None = None
        if path in blocks:
            index += 1
            sums = [] if smaller else _sums(run, path)
            for now, reader, addend in sums:
                if reader is None:
                    branch = addend
                    continue
                kind = _kind_of(run.events[time:now], False)
                steps.append(TracedStep(f"{path}.{kind}", kind, index, reader, "input", addend))
                time = now
        elif not smaller:
            continue
        kind = _kind_of(run.events[time:end], smaller)
        steps.append(TracedStep(f"{path}.{kind}", kind, index, path, "output", branch))
        time, grid = end, new
    return _unique(steps)


def _unique(steps: list[TracedStep]) -> tuple[TracedStep, ...]:
    seen: dict[str, int] = {}
    named = []
    for step in steps:
        count = seen[step.name] = seen.get(step.name, 0) + 1
        name = step.name if count == 1 else f"{step.name}_{count}"
        named.append(replace(step, name=name))
    return tuple(named)


def watch_steps(
    model: nn.Module,
    images: Tensor,
    steps: Sequence[TracedStep],
    use: Callable[[int, Tensor], None],
) -> None:
    """Call a function with the feature maps of each step in one pass, without gradients.

    Args:
        model: the model that ``steps`` were found in.
        images: B×3×H×W.
        steps: from :func:`find_steps`.
        use: called with a step's index and its feature maps B×C×h×w, prefix tokens left out. They
            are a view of what the model computes with: not to be kept or written to.

    Raises:
        UnsupportedModelError: a step put out no feature maps for these images.
    """
    model = without_wrapper(model)
    modules = dict(model.named_modules())
    prefix, channels_last = layout_of(model)
    size = (images.shape[-2], images.shape[-1])
    handles: list[RemovableHandle] = []

    def hand_on(i: int, value: object) -> None:
        found = as_feature_map(value, images.shape[0], size, prefix, channels_last)
        if found is None:
            raise UnsupportedModelError(
                f"TracedStep {steps[i].name} of {type(model).__name__} put out no feature maps for "
                f"images of {size[0]}×{size[1]}: give images of the size that the steps were "
                "found with."
            )
        use(i, found)

    def watch(i: int, step: TracedStep) -> RemovableHandle:
        module = modules[step.module]
        if step.side == "input":
            return before(module, lambda args, kwargs: hand_on(i, [*args, *kwargs.values()]))
        return after(module, lambda args, kwargs, output: hand_on(i, output))

    with hooks_removed(handles), evaluating(model), torch.no_grad():
        for i, step in enumerate(steps):
            handles.append(watch(i, step))
        model(images)


def record_steps(model: nn.Module, images: Tensor, steps: Sequence[TracedStep]) -> list[Tensor]:
    """Keep the feature maps of :func:`watch_steps`.

    Returns:
        One B×C×h×w per step; C, h and w are the step's own.
    """
    maps: dict[int, Tensor] = {}

    def keep(i: int, found: Tensor) -> None:
        # The model may go on to change its tensors in place.
        maps[i] = found.clone()

    watch_steps(model, images, steps, keep)
    return [maps[i] for i in range(len(steps))]
