"""Scores of weights: what is lost with each, by its size and by what meets it.

W_jk is the weight from input j to output k, X_:j and Y_k: are what the input and the output were
over all rows. Norms of activations are root mean squares here, ‖·‖₂ / √rows, which orders weights
alike. A weight with a low score is pruned first.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dropmuon_jax._checks import check_nonnegative, check_positive, describe, is_python_number
from dropmuon_jax.contrib.pruning.kernels import Kernel, Kernels, check_kernels

Weights = Float[Array, "batch fan_in fan_out"]
Scores = dict[str, Array]


def magnitude(params: Any, kernels: Kernels) -> Scores:
    """The size `|W_jk|`.

    Args:
        params: The parameters, all of them.
        kernels: What is scored: all that :func:`record_kernels` found, or a part.

    Returns:
        A mapping from the path of each kernel to its scores, with the shape of the leaf. So does
        every function here.

    Raises:
        TypeError: If `kernels` are not what :func:`record_kernels` returns.
        ValueError: If `params` have no such leaf.
    """
    return _scores(params, kernels, lambda w, _: jnp.abs(w))


def wanda(params: Any, kernels: Kernels) -> Scores:
    """`|W_jk| ‖X_:j‖₂`: what the outputs lose, in the Frobenius norm, without this one weight.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params, x = {"w": jnp.array([[3.0], [1.0]])}, jnp.array([[1.0, 5.0]])
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [x])
        >>> print(pruning.wanda(params, kernels)["w"].T)  # the smaller weight weighs more
        [[3. 5.]]

    References:
        Sun, Liu, Bair, Kolter, *A Simple and Effective Pruning Approach for Large Language Models*,
        2023, arXiv:2306.11695. The authors compare the scores of one output,
        `make_masks(…, per="output")`.
    """
    return _scores(params, kernels, lambda w, of: jnp.abs(w) * of.rms_of_inputs())


def owanda(params: Any, kernels: Kernels) -> Scores:
    """`|W_jk| ‖Y_k:‖₂`, with the output that the weight contributes to.

    Within one output this is the magnitude: compare the scores of a layer or of all.

    References:
        Yi and Richtárik, *Symmetric Pruning for Large Language Models*, 2025, arXiv:2501.18980: the
        name, and the case X = 0 of its objective ‖X(W̃ - W)‖ + ‖(W̃ - W)Y‖, as a review states it.
        The formula is derived from it; that Y are the layer's own outputs, before the bias, is
        our choice.
    """
    return _scores(params, kernels, lambda w, of: jnp.abs(w) * of.rms_of_outputs())


def symwanda(params: Any, kernels: Kernels, *, squared: bool = False) -> Scores:
    """`|W_jk| (‖X_:j‖₂ + ‖Y_k:‖₂)`, or with `(‖X_:j‖₂² + ‖Y_k:‖₂²)^½` if `squared`.

    The first is what ‖X(W̃ - W)‖_F + ‖(W̃ - W)Y‖_F becomes without this one weight; the second the
    root of what the sum of the squares becomes.

    Args:
        params: The parameters.
        kernels: What is scored.
        squared: Whether the norms of the objective are squared.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params, x = {"w": jnp.array([[3.0], [1.0]])}, jnp.array([[1.0, -3.0]])
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"] + 4.0, params, [x])
        >>> print(pruning.symwanda(params, kernels)["w"].T)  # the output, before the 4, is 0
        [[3. 3.]]

    References:
        Yi and Richtárik, 2025, arXiv:2501.18980: the objective, as a review states it. The
        formulas are derived from it; for Y see :func:`owanda`.
    """

    def score(w: Weights, of: Kernel) -> Weights:
        x, y = of.rms_of_inputs(), of.rms_of_outputs()
        return jnp.abs(w) * (jnp.sqrt(x**2 + y**2) if squared else x + y)

    return _scores(params, kernels, score)


def ria(params: Any, kernels: Kernels, *, power: float | Array = 0.5, order: float = 1.0) -> Scores:
    """`(|W_jk| / ‖W_j:‖_p + |W_jk| / ‖W_:k‖_p) ‖X_:j‖₂^power`: relative importance, activations.

    No input and no output loses all of its weights only because they are small.

    Args:
        params: The parameters.
        kernels: What is scored.
        power: Of the activations, at least 0; 0 is the relative importance alone.
        order: p of the norms, at least 1, possibly infinite.

    Raises:
        ValueError: For numbers out of range.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params = {"w": jnp.array([[100.0, 300.0], [1.0, 1.0]])}
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [jnp.ones((1, 2))])
        >>> print(pruning.ria(params, kernels)["w"].round(2))
        [[1.24 1.75]
         [0.51 0.5 ]]

    References:
        Zhang et al., *Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
        Models*, 2024, whose code has p = 1 and power ½ and by default compares all weights of a
        kernel, `make_masks(…, per="kernel")`. Other orders: Yi and Richtárik, 2025,
        arXiv:2501.18980, as reviews tell.
    """
    check_nonnegative("power", power)
    check_order(order)

    def score(w: Weights, of: Kernel) -> Weights:
        return _relative(w, order) * of.rms_of_inputs() ** jnp.asarray(power, w.dtype)

    return _scores(params, kernels, score)


def stochastic_ria(
    params: Any, kernels: Kernels, *, key: PRNGKeyArray, fraction: float = 0.1
) -> Scores:
    """`|W_jk| / Σ_S |W_jl| + |W_jk| / Σ_T |W_lk|`, over random sets S of outputs and T of inputs.

    The relative importance from a part of the weights, without activations. A set has one index at
    random of each of ⌈fraction · n⌉ equal stretches, another one for each input and output.

    Args:
        params: The parameters.
        kernels: What is scored.
        key: Of the sets.
        fraction: Their relative size, in (0, 1]; at 1 this is :func:`ria` with power 0.

    Raises:
        ValueError: For a fraction out of range.

    References:
        stochRIA of Yi and Richtárik, 2025, arXiv:2501.18980, with fraction 0.1, as a review states
        it. How a set is drawn is ours.
    """
    check_positive("fraction", fraction)
    if fraction > 1:
        raise ValueError(f"fraction must be at most 1, got {fraction}.")

    def sampled_sums(key: PRNGKeyArray, size: Weights) -> Float[Array, "batch rows 1"]:
        """Σ over a random set of columns, another one in each row."""
        *rows, columns = size.shape
        count = math.ceil(fraction * columns)
        offset = jax.random.uniform(key, (*rows, count), size.dtype)
        stretch = jax.lax.broadcasted_iota(size.dtype, offset.shape, len(rows))
        index = ((stretch + offset) * (columns / count)).astype(int)
        picked = jnp.take_along_axis(size, jnp.minimum(index, columns - 1), -1)
        return picked.sum(-1, keepdims=True) * (columns / count)

    def score(key: PRNGKeyArray, w: Weights) -> Weights:
        of_rows, of_columns = jax.random.split(key)
        size = jnp.abs(w)
        sums = sampled_sums(of_rows, size), sampled_sums(of_columns, size.mT).mT
        return sum((_ratio(size, total) for total in sums), jnp.zeros_like(size))

    keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))
    return {
        path: _score_of(lambda w, _, path=path: score(keys[path], w), leaf, kernels[path])
        for path, leaf in check_kernels(params, kernels).items()
    }


def _scores(params: Any, kernels: Kernels, score: Callable[[Weights, Kernel], Weights]) -> Scores:
    leaves = check_kernels(params, kernels)
    return {path: _score_of(score, leaf, kernels[path]) for path, leaf in leaves.items()}


def _score_of(score: Callable[[Weights, Kernel], Weights], leaf: Array, kernel: Kernel) -> Array:
    stack, restore = kernel.matrices(leaf)
    return restore(score(stack.astype(np.promote_types(leaf.dtype, np.float32)), kernel))


def _relative(w: Weights, order: float) -> Weights:
    """|W_jk| / ‖W_j:‖_p + |W_jk| / ‖W_:k‖_p."""
    size = jnp.abs(w)
    sums = (jnp.linalg.norm(size, order, axis, keepdims=True) for axis in (-1, -2))
    return sum((_ratio(size, total) for total in sums), jnp.zeros_like(size))


def _ratio(size: Array, total: Array) -> Array:
    """Their ratio; zero where all that was summed is zero."""
    return jnp.where(total == 0, 0, size / jnp.where(total == 0, 1, total))


def check_order(order: Any) -> None:
    """Error unless the order of a norm is a number of at least 1."""
    if not is_python_number(order) or not order >= 1:
        raise ValueError(f"order must be a number of at least 1, got {describe(order)}.")
