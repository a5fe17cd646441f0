"""How far results are from the polar factor, on ill-conditioned matrices of known spectrum."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from orthogonalization.compiled_programs import compile_program
from orthogonalization.orthogonalizers import MethodName

GAIN_THRESHOLD = 1e-3  # of the Frobenius norm: singular values from here on are promised a band
GAIN_CONDITION = 1e3  # up to which condition the band is judged


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Of one method on one matrix; NaN where the result is not finite."""

    method: MethodName
    rows: int
    cols: int
    condition: float
    seed: int
    error: float
    """‖UVᵀ − O‖_F / √rank."""
    smallest: float
    """Singular value of the result O."""
    largest: float
    smallest_gain: float
    """uᵢᵀ O vᵢ, over the singular values σᵢ ≥ 1e-3 ‖·‖_F of the input."""
    largest_gain: float


def ill_conditioned(rows: int, cols: int, condition: float, seed: int) -> np.ndarray:
    """UΣVᵀ in float64, with random U and V and singular values from 1 down to 1/condition.

    The spectrum is geometric. The columns of U and V are orthonormal, drawn uniformly.
    """
    generator = np.random.default_rng(seed)
    rank = min(rows, cols)
    u, v = (_orthonormal(generator.standard_normal((size, rank))) for size in (rows, cols))
    return (u * np.geomspace(1, 1 / condition, rank)) @ v.T


def _orthonormal(gaussian: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(gaussian)
    return q * np.sign(np.diag(r))


class Decomposition(NamedTuple):
    """UΣVᵀ, in float64."""

    u: np.ndarray
    singular_values: np.ndarray
    vt: np.ndarray


def compare(matrix: Decomposition, result: np.ndarray) -> dict[str, float]:
    """A result against a decomposed matrix, as fields of :class:`Accuracy`."""
    names = ("error", "smallest", "largest", "smallest_gain", "largest_gain")
    if not np.isfinite(result).all():
        return dict.fromkeys(names, math.nan)
    u, singular_values, vt = matrix
    kept = singular_values >= GAIN_THRESHOLD * np.linalg.norm(singular_values)
    gains = np.sum(u * (result @ vt.T), axis=0)[kept]
    of_result = np.linalg.svd(result, compute_uv=False)
    error = np.linalg.norm(u @ vt - result) / math.sqrt(len(singular_values))
    values = (error, of_result.min(), of_result.max(), gains.min(), gains.max())
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def measure_accuracy(
    methods: Sequence[MethodName],
    shapes: Sequence[tuple[int, int]],
    conditions: Sequence[float],
    seeds: Sequence[int],
    *,
    dtype: str,
    num_steps: int | None,
    console: Console,
) -> list[Accuracy]:
    """Every method on the same matrices, which are first rounded to the dtype of the leaves."""
    cases = [
        (rows, cols, condition, seed)
        for rows, cols in shapes
        for condition in conditions
        for seed in seeds
    ]
    accuracies = []
    for rows, cols, condition, seed in track(cases, "accuracy", console=console):
        leaf = jnp.asarray(ill_conditioned(rows, cols, condition, seed), dtype)
        rounded = np.asarray(leaf).astype(np.float64)
        matrix = Decomposition(*np.linalg.svd(rounded, full_matrices=False))
        for method in methods:
            program = compile_program(method, ((rows, cols),), dtype, num_steps)
            (result,) = program.compiled([leaf])
            found = compare(matrix, np.asarray(result).astype(np.float64))
            accuracies.append(Accuracy(method, rows, cols, condition, seed, **found))
    return accuracies


def median_error(accuracies: Sequence[Accuracy], method: MethodName, condition: float) -> float:
    """Over shapes and seeds; NaN if one of them is."""
    errors = [a.error for a in accuracies if (a.method, a.condition) == (method, condition)]
    return math.nan if any(map(math.isnan, errors)) else statistics.median(errors)


def largest_error_ratio(
    accuracies: Sequence[Accuracy], method: MethodName, reference: MethodName
) -> float:
    """The error of a method in that of the reference on the same matrix, where it is largest."""
    errors = {(a.method, (a.rows, a.cols, a.condition, a.seed)): a.error for a in accuracies}
    ratios = [
        error / errors[reference, case] for (own, case), error in errors.items() if own == method
    ]
    return math.nan if any(map(math.isnan, ratios)) else max(ratios)
