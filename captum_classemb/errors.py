"""The exceptions of the library; each message is one sentence: what was given, what is right."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClassEmbError",
    "ClassEmbWarning",
    "DataError",
    "InputError",
    "MissingExtraError",
    "ModelNameError",
    "NonFiniteError",
    "OutputError",
    "TargetError",
    "UnsupportedModelError",
]


class ClassEmbError(Exception):
    """Base class of every error that the library raises on purpose."""


class UnsupportedModelError(ClassEmbError, TypeError):
    """The model is no Vision Transformer that the library can read exactly."""


class InputError(ClassEmbError, ValueError):
    """An input tensor or an option has a wrong shape, type or value."""


class NonFiniteError(InputError):
    """NaN or infinity where finite numbers are needed."""


class TargetError(ClassEmbError, ValueError):
    """The target class is missing, out of range, or of the wrong length or type."""


class ModelNameError(ClassEmbError, ValueError):
    """No model has this name."""


class CheckpointError(ClassEmbError, ValueError):
    """Weights cannot be read, or do not fit the model."""


class DataError(ClassEmbError, ValueError):
    """A dataset or an image is missing, unreadable or inconsistent."""


class OutputError(ClassEmbError, OSError):
    """A result cannot be written."""


class ClassEmbWarning(UserWarning):
    """Something that a user should know of results, which are sound all the same."""


class MissingExtraError(ClassEmbError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed: run `pip install 'captum-classemb[{extra}]'`."
        )
