"""Every method by name: what ``explain``, studies, benchmarks and the command line list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from captum_classemb.attr import baselines
from captum_classemb.attr._base import PatchAttribution
from captum_classemb.attr.all_path import AllPathImportance
from captum_classemb.attr.baselines._base import Baseline
from captum_classemb.attr.gradient import ClassEmbeddingGradient
from captum_classemb.attr.memory import MemoryPatchImportance
from captum_classemb.attr.patch_importance import PatchImportance
from captum_classemb.attr.projection import ClassEmbeddingProjection

__all__ = ["METHODS", "Method", "register_method"]


@dataclass(frozen=True)
class Method:
    """A method that explains images by scores of their patches.

    Attributes:
        name: on the command line, in tables and in files.
        build: the class, called with a model and options.
        caption: one line that says what its map shows.
        needs: what must be given beside the model, such as ``"probe"``; empty for nothing.
    """

    name: str
    build: Callable[..., PatchAttribution]
    caption: str
    needs: str = ""

    @property
    def baseline(self) -> bool:
        """Whether it is here to be compared with."""
        kinds = Baseline, baselines.LibraFullGrad
        return isinstance(self.build, type) and issubclass(self.build, kinds)


#: Every method by its name.
METHODS: dict[str, Method] = {}


def register_method(
    name: str, caption: str, needs: str = ""
) -> Callable[[Callable[..., PatchAttribution]], Callable[..., PatchAttribution]]:
    """Register a class of methods under a name.

    Args:
        name: on the command line, in tables and in files.
        caption: one line that says what its map shows.
        needs: what must be given beside the model; empty for nothing.

    Returns:
        a decorator for a subclass of :class:`PatchAttribution`.
    """

    def decorate(build: Callable[..., PatchAttribution]) -> Callable[..., PatchAttribution]:
        METHODS[name] = Method(name, build, caption, needs)
        return build

    return decorate


for _name, _build, _caption, _needs in (
    ("patch-importance", PatchImportance, "What speaks for the class in each patch", ""),
    (
        "all-path-importance",
        AllPathImportance,
        "What each patch brings to the class along every path",
        "",
    ),
    (
        "memory-patch-importance",
        MemoryPatchImportance,
        "What attention brings to the logit from each patch",
        "",
    ),
    (
        "class-embedding-gradient",
        ClassEmbeddingGradient,
        "Gradient of each block's own reading of the class",
        "",
    ),
    (
        "class-embedding-projection",
        ClassEmbeddingProjection,
        "What the class embedding reads of each patch token",
        "",
    ),
    ("chefer", baselines.CheferRelevance, "Relevance carried by attention (Chefer et al.)", ""),
    ("libra-fullgrad", baselines.LibraFullGrad, "Gradient × input at every block, balanced", ""),
    ("cp-lrp", baselines.CPLRP, "Gradient × input with attention frozen", ""),
    ("legrad", baselines.LeGrad, "Positive gradients of attention, block by block", ""),
    ("rollout", baselines.AttentionRollout, "Attention multiplied over blocks", ""),
    ("raw-attention", baselines.RawAttention, "Attention of the last block", ""),
    ("token-occlusion", baselines.TokenOcclusion, "Loss of the logit without each patch", ""),
    (
        "linear-probe",
        baselines.LinearProbeImportance,
        "What linear probes read of each patch token",
        "probe",
    ),
):
    register_method(_name, _caption, _needs)(_build)
