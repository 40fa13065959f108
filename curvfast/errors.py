"""Errors and warnings; every message says what happened, the likely cause, and what to pass."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class CurvfastError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(CurvfastError, ValueError):
    """An argument is out of range or contradicts another."""


class ShapeError(CurvfastError, ValueError):
    """A tensor does not have the shape it must have."""


class LayerNotFound(CurvfastError, ValueError):
    """A requested layer does not exist, or cannot be used."""


class CoverageError(CurvfastError, RuntimeError):
    """A chosen layer was not measured, or not on the same rows for A and G."""


class EvidenceError(CurvfastError, RuntimeError):
    """What was measured is not known: its rows or its unit are unproven, or contradicted."""


class NonFiniteError(CurvfastError, ValueError):
    """A factor holds NaN or infinity."""


class DecompositionError(CurvfastError, RuntimeError):
    """No solver could decompose a factor."""


class BasisMismatch(CurvfastError, ValueError):
    """A basis or selection does not belong to the model."""


class PatchMismatch(CurvfastError, ValueError):
    """A patch does not fit the weights as they are."""


class StorageError(CurvfastError, RuntimeError):
    """A folder cannot be written, or is missing, foreign, damaged or too new."""


class FormatError(StorageError):
    """A folder holds something else, or a newer format."""


class DistributedError(CurvfastError, RuntimeError):
    """Another process is gone, or did not make the same call."""


class DownloadError(CurvfastError, RuntimeError):
    """A model or text of the demo cannot be had."""


class BackendUnavailable(CurvfastError, RuntimeError):
    """A backend was named that cannot run here, or not on these tensors."""


class NumericalWarning(UserWarning):
    """A result is numerically less accurate than its digits suggest."""


class EvidenceWarning(UserWarning):
    """The gradients show something that the caller should know about what was counted."""


class PerformanceWarning(UserWarning):
    """A computation runs slower than it could."""
