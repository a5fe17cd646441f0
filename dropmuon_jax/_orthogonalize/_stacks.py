"""Many matrices at once: those of one shape are stacked and pass through one program."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import describe

Stack = Float[Array, "batch rows cols"]

# 256 MiB. On a CPU the speed does not depend on it: measured within 10 % from 32 MiB to 1 GiB.
DEFAULT_MEMORY_LIMIT = 2**28


def map_stacks(
    function: Callable[[Stack], Stack],
    stacks: Sequence[Stack],
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> list[Stack]:
    """`function` of every matrix of every stack.

    Stacks of one shape, and those of its transpose, are joined, so that the program holds
    `function` once for each shape, however many matrices there are.

    Args:
        function: From a stack of matrices, no taller than wide, to one of the same shape and dtype,
            in which every matrix depends on its own matrix only.
        stacks: Of any number of matrices of any shape.
        memory_limit: Of the working memory of `function`, in bytes; a joined stack that needs more
            passes through it in slices, of one matrix at least, in a loop.
    """
    function = _checked(function)
    buckets: dict[tuple, list[int]] = {}
    for i, stack in enumerate(stacks):
        buckets.setdefault((*sorted(stack.shape[1:]), stack.dtype), []).append(i)
    results = list(stacks)
    for members in buckets.values():
        wide = [_transposed_if_tall(stacks[i], stacks[i].shape) for i in members]
        joined = jnp.concatenate(wide) if len(wide) > 1 else wide[0]
        slice_size = _slice_size(len(joined), joined.shape[1:], joined.dtype, memory_limit)
        joined = _in_slices(function, joined, slice_size)
        ends = np.cumsum([len(stacks[i]) for i in members])
        for i, piece in zip(members, jnp.split(joined, ends[:-1]), strict=True):
            results[i] = _transposed_if_tall(piece, stacks[i].shape)
    return results


def _checked(function: Callable[[Stack], Stack]) -> Callable[[Stack], Stack]:
    """The function, with an error if it changes shape or dtype."""

    def checked(stack: Stack) -> Stack:
        result = function(stack)
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

    return checked


def working_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Of the iteration for one matrix: itself, its successor, five of its Gram matrix's size."""
    short, long = sorted(shape)
    return (2 * short * long + 5 * short**2) * dtype.itemsize


def _transposed_if_tall(stack: Stack, shape: Sequence[int]) -> Stack:
    return stack.mT if shape[1] > shape[2] else stack


def _slice_size(count: int, shape: Sequence[int], dtype: np.dtype, memory_limit: int) -> int:
    """How many matrices pass at once: as many as there is memory for, with the least padding."""
    largest = max(1, min(count, memory_limit // max(1, working_bytes(shape, dtype))))
    return min(range(largest, largest // 2, -1), key=lambda size: -(-count // size) * size)


def _in_slices(function: Callable[[Stack], Stack], stack: Stack, size: int) -> Stack:
    """`function` of the stack, slice by slice and in place."""
    count = len(stack)
    if size >= count:
        return function(stack)
    num_slices = -(-count // size)
    padded = jnp.pad(stack, [(0, num_slices * size - count), (0, 0), (0, 0)])

    def replace_slice(i: Array, stack: Stack) -> Stack:
        piece = jax.lax.dynamic_slice_in_dim(stack, i * size, size)
        return jax.lax.dynamic_update_slice_in_dim(stack, function(piece), i * size, axis=0)

    return jax.lax.fori_loop(0, num_slices, replace_slice, padded)[:count]
