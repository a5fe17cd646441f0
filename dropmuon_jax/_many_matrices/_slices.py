"""A function of many matrices within a limit of memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import describe

Stack = Float[Array, "batch rows cols"]

# 256 MiB. On a CPU the speed does not depend on it: measured within 10 % from 32 MiB to 1 GiB.
DEFAULT_MEMORY_LIMIT = 2**28


@dataclasses.dataclass(frozen=True)
class Checked:
    """A function of a stack, with an error if it changes shape or dtype."""

    function: Callable[[Any], Any]

    def __call__(self, stack: Stack) -> Stack:
        """The result, if it is like the stack."""
        result = self.function(stack)
        if not isinstance(result, jax.Array):
            raise TypeError(
                "The orthogonalize function must return an array of the shape it is given, "
                f"{list(stack.shape)}, and returned {describe(result)}."
            )
        if result.shape != stack.shape or result.dtype != stack.dtype:
            raise ValueError(
                f"The orthogonalize function was given {stack.dtype.name}{list(stack.shape)} and "
                f"returned {result.dtype.name}{list(result.shape)}: shape and dtype must stay."
            )
        return result


def in_slices(function: Callable[[Stack], Stack], stack: Stack, memory_limit: int) -> Stack:
    """`function` of the stack in slices that take `memory_limit` bytes, one by one and in place."""
    count = len(stack)
    size = _slice_size(count, stack.shape[1:], stack.dtype, memory_limit)
    if size >= count:
        return function(stack)
    num_slices = -(-count // size)
    padded = jnp.pad(stack, [(0, num_slices * size - count), (0, 0), (0, 0)])

    def replace_slice(i: Array, stack: Stack) -> Stack:
        piece = jax.lax.dynamic_slice_in_dim(stack, i * size, size)
        return jax.lax.dynamic_update_slice_in_dim(stack, function(piece), i * size, axis=0)

    return jax.lax.fori_loop(0, num_slices, replace_slice, padded)[:count]


def working_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Of the iteration for one matrix: itself, its successor, five of its Gram matrix's size."""
    short, long = sorted(shape)
    return (2 * short * long + 5 * short**2) * dtype.itemsize


def _slice_size(count: int, shape: Sequence[int], dtype: np.dtype, memory_limit: int) -> int:
    """How many matrices pass at once: as many as there is memory for, with the least padding."""
    largest = max(1, min(count, memory_limit // max(1, working_bytes(shape, dtype))))
    return min(range(largest, largest // 2, -1), key=lambda size: -(-count // size) * size)
