"""Eigendecomposition of one factor: scaled, verified, and retried by other solvers on failure.

Resolution: for a second moment summed in float32, float64 resolves eigenvalues to 1 % down to about
4e-8 of the largest, float32 to about 2e-5. Smaller ones are rounding error (:data:`RESOLUTION`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.errors import (
    DecompositionError,
    NonFiniteError,
    NumericalWarning,
    PerformanceWarning,
    first_line,
)
from curvfast.ops import devices

NARROW = 512
"""Factors below this width are batched on a GPU, and not worth a search for leading pairs."""
DTYPES = (torch.float64, torch.float32)
RESOLUTION = {torch.float64: 4e-8, torch.float32: 2e-5}
"""Share of the largest eigenvalue below which others are rounding error, by solver's dtype."""
# Largest residual ‖MV - VΛ‖ / ‖M‖ and departure of VᵀV from the identity accepted, per feature.
_TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenpairs of a symmetric positive semidefinite matrix, descending."""

    values: Tensor
    """[d] float64, non-negative."""
    vectors: Tensor
    """[d, d] float32 columns, or the leading ones only, [d, k]; the largest entry of each is
    positive."""
    negative: float
    """Size of the most negative eigenvalue over the largest, before it was set to 0."""

    def to(self, device: torch.device) -> Spectrum:
        """Return a copy on ``device``."""
        return Spectrum(self.values.to(device), self.vectors.to(device), self.negative)


def decompose_factors(
    matrices: Sequence[Tensor], *, dtype: torch.dtype, titles: Sequence[str]
) -> list[Spectrum]:
    """Eigendecompose matrices of one width, as :func:`decompose_factor` does, in one call.

    Those whose result fails verification, or all if the call fails, are decomposed one by one.

    Args:
        matrices: Each [d, d].
        dtype: float64 or float32, of the first solver.
        titles: Name of each matrix, for messages.

    Returns:
        The eigenpairs of each.

    Raises:
        NonFiniteError: If one holds NaN or infinity.
        DecompositionError: If every solver failed on one.
    """
    solved: list[tuple[Tensor, Tensor] | None] = [None] * len(matrices)
    if len(matrices) > 1:
        for matrix, title in zip(matrices, titles, strict=True):
            require_finite(matrix, title)
        scaled = [prepared(matrix, dtype) for matrix in matrices]
        try:
            solved = [*zip(*torch.linalg.eigh(torch.stack([m for m, _ in scaled])), strict=True)]
        except RuntimeError as error:
            say_next(f"a batch of {len(matrices)} factors", first_line(error), error)
    found = []
    for number, (matrix, title) in enumerate(zip(matrices, titles, strict=True)):
        pair = solved[number]
        if pair is None or _certificate(scaled[number][0], *pair) is not None:
            found.append(decompose_factor(matrix, dtype=dtype, title=title))
        else:
            found.append(ordered(*pair, scaled[number][1], matrix.device))
    return found


def decompose_factor(matrix: Tensor, *, dtype: torch.dtype, title: str) -> Spectrum:
    """Eigendecompose a symmetric positive semidefinite matrix.

    It is symmetrised and scaled by a power of two, so that factors neither overflow nor underflow.
    Solvers are tried in turn: on the matrix's device in ``dtype``, on the CPU in float64 by torch,
    then by NumPy; each result is checked, and each gets a fresh copy, since a failed solver may
    spoil its input.

    Args:
        matrix: [d, d], any float dtype.
        dtype: float64 or float32, of the first solver.
        title: Name of the matrix, for messages.

    Returns:
        Eigenpairs, on the matrix's device.

    Raises:
        NonFiniteError: If it holds NaN or infinity.
        DecompositionError: If every solver failed.
    """
    require_finite(matrix, title)
    problems = []
    for name, solve, (scaled, exponent) in _stages(matrix, dtype):
        try:
            values, vectors = solve(scaled.clone())
        except RuntimeError as error:
            problem = f"{name}: {first_line(error)}"
            say_next(title, problem, error)
        else:
            wrong = _certificate(scaled, values, vectors)
            if wrong is None:
                return ordered(values, vectors, exponent, matrix.device)
            problem = f"{name}: {wrong}"
            say_next(title, problem, None)
        problems.append(problem)
    raise DecompositionError(
        f"no solver decomposed {title} [{len(matrix)} x {len(matrix)}]:\n  " + "\n  ".join(problems)
    )


def require_finite(matrix: Tensor, title: str) -> None:
    """Raise unless every entry of a matrix is a number.

    Raises:
        NonFiniteError: If one is not.
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(
            f"{title} holds NaN or infinity: a loss or gradient overflowed while it was collected. "
            "Collect again; under fp16 autocast pass grad_scaler= so that skipped steps are left "
            "out"
        )


def _exponent(matrix: Tensor) -> int:
    """Return the power of two nearest to the mean eigenvalue."""
    mean = float(matrix.diagonal().double().abs().mean()) if len(matrix) else 0.0
    return math.frexp(mean)[1] if mean > 0 else 0


Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def takes_batches(device: torch.device) -> bool:
    """Return whether small factors are best decomposed many at a time: a GPU waits for each call.

    Asked here and by module, as the questions of :mod:`curvfast.ops.devices`, so tests can answer.
    """
    return device.type != "cpu"


def _stages(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Solver, tuple[Tensor, int]]]:
    """Yield each solver with its input matrix."""
    first = f"{matrix.device.type} {str(dtype).removeprefix('torch.')}"
    try:
        yield first, _by_torch, prepared(matrix, dtype)
    except torch.OutOfMemoryError as error:
        say_next(title="a factor", problem=f"{first}: out of memory", error=error)
    on_cpu = prepared(matrix.cpu(), torch.float64)
    if devices.on_accelerator(matrix.device) or dtype != torch.float64:
        yield "cpu float64", _by_torch, on_cpu
    yield "numpy float64", _by_numpy, on_cpu


def prepared(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (M + Mᵀ) / 2 over 2^exponent in ``dtype``, by way of float64, and the exponent."""
    exponent = _exponent(matrix)
    scaled = torch.ldexp(matrix.double(), torch.tensor(-exponent, device=matrix.device)).to(dtype)
    return (scaled + scaled.T) / 2, exponent


def _by_torch(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _by_numpy(matrix: Tensor) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        values, vectors = np.linalg.eigh(matrix.numpy())
    except np.linalg.LinAlgError as error:
        raise RuntimeError(str(error)) from error
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _certificate(matrix: Tensor, values: Tensor, vectors: Tensor) -> str | None:
    """Return what is wrong with a decomposition (residual, orthonormality), or None."""
    d = len(matrix)
    limit = _TOLERANCE[matrix.dtype] * max(d, 16)
    norm = matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    residual = float((matrix @ vectors - vectors * values).norm() / norm)
    if not residual <= limit:
        return f"residual {residual:.1e} is above {limit:.1e}"
    identity = torch.eye(d, dtype=vectors.dtype, device=vectors.device)
    departure = float((vectors.T @ vectors - identity).abs().max()) if d else 0.0
    if not departure <= limit:
        return f"eigenvectors depart from orthonormal by {departure:.1e}, above {limit:.1e}"
    return None


def ordered(values: Tensor, vectors: Tensor, exponent: int, device: torch.device) -> Spectrum:
    """Return ascending eigenpairs of M / 2^exponent as those of M, in canonical order and signs."""
    values, vectors = values.flip(0).double(), vectors.flip(1)
    negative = 0.0
    if len(values) and values[-1] < 0:
        top = values[0].abs().clamp_min(torch.finfo(torch.float64).tiny)
        negative = float(-values[-1] / top)
    values = torch.ldexp(values.clamp_min(0), torch.tensor(exponent, device=values.device))
    # Signs are arbitrary; making the largest entry of each vector positive makes them unique.
    largest = vectors.abs().argmax(0, keepdim=True)
    signed = vectors * vectors.gather(0, largest).sign()
    return Spectrum(values.to(device), signed.float().contiguous().to(device), negative)


def say_next(title: str, problem: str, error: BaseException | None) -> None:
    """Warn that the next solver has to decompose a factor, and why."""
    memory = isinstance(error, torch.OutOfMemoryError)
    warnings.warn(
        f"{title} is decomposed by the next solver: {problem}",
        PerformanceWarning if memory else NumericalWarning,
        stacklevel=5,
    )
