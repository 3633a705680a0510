"""Hooks of one forward pass: they answer only to the thread that set them, and never stay behind.

Several threads may explain images with one model at once. Each sets hooks of its own on the shared
modules, so a hook sees the other threads' passes too and has to leave them alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def before(
    module: nn.Module, hook: Callable[[tuple[Any, ...], Any], Any], first: bool = False
) -> RemovableHandle:
    """Call ``hook(args, kwargs)`` before the module; what it returns replaces both.

    With ``first`` it is called before the hooks that are there already.
    """
    guarded = _of_this_thread(hook)
    return module.register_forward_pre_hook(guarded, prepend=first, with_kwargs=True)


def after(module: nn.Module, hook: Callable[[tuple[Any, ...], Any, Any], Any]) -> RemovableHandle:
    """Call ``hook(args, kwargs, output)`` after the module; what it returns replaces the output."""
    return module.register_forward_hook(_of_this_thread(hook), with_kwargs=True)


def keep_output(module: nn.Module, kept: dict[nn.Module, Tensor]) -> RemovableHandle:
    """Keep what the module returns as ``kept[module]``."""
    return after(module, lambda args, kwargs, output: kept.update({module: output}))


@contextmanager
def hooks_removed(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks gathered in ``handles`` at the end, whatever happened.

    Within, what ``torch.compile`` made runs uncompiled: a compiled graph calls no hook that was set
    after it was made, and would be compiled anew for each.
    """
    try:
        with uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, what ``torch.compile`` made runs as it was written."""
    # Nothing was compiled where the compiler was never imported; torch before 2.6 has no stance.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    _eager.enter()
    try:
        yield
    finally:
        _eager.leave()


class _Eager:
    """The compiler's stance is one for all threads: the last to leave restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(None, None, None)


_eager = _Eager()


def _of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    # Another thread may call a hook that has just been removed, then without keyword arguments.
    def guarded(_: nn.Module, *call: Any) -> Any:
        return hook(*call) if threading.get_ident() == thread else None

    return guarded


def changes_by_hand(model: nn.Module) -> str:
    """A clause that names hooks and replaced forwards of a model's modules; empty if none is set.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> def steer(module, args, output):
        ...     return output + 1
        >>> handle = model[0].register_forward_hook(steer)
        >>> changes_by_hand(model)
        'hook steer on 0'
    """
    torch_wide = nn.modules.module
    every = (*torch_wide._global_forward_pre_hooks.values(),)
    every += (*torch_wide._global_forward_hooks.values(),)
    found = [f"hook {_name(hook)} on every module" for hook in every]
    for name, module in model.named_modules():
        where = name or type(module).__qualname__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        found += [f"hook {_name(hook)} on {where}" for hook in hooks]
        if "forward" in vars(module):
            found.append(f"replaced forward of {where}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _name(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__qualname__", type(hook).__qualname__)).replace("<locals>.", "")
