"""Many matrices at once: those of one shape are stacked and pass through one program."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._many_matrices._on_mesh import map_on_mesh
from dropmuon_jax._many_matrices._slices import DEFAULT_MEMORY_LIMIT, Checked, in_slices
from dropmuon_jax._matrices import Blocks
from dropmuon_jax._mesh import mesh_axes

Stack = Float[Array, "batch rows cols"]


def map_matrices(
    function: Callable[[Stack], Stack],
    leaves: Sequence[Blocks],
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> list[jax.Array]:
    """`function` of every matrix of every leaf.

    Matrices of one shape, and those of its transpose, are joined, so that the program holds
    `function` once for each shape, however many matrices there are.

    Args:
        function: From a stack of matrices, no taller than wide, to one of the same shape and dtype,
            in which every matrix depends on its own matrix only.
        leaves: Of any number of matrices of any shape.
        memory_limit: Of the working memory of `function`, in bytes; a joined stack that needs more
            passes through it in slices, of one matrix at least, in a loop.

    Returns:
        Arrays of the shapes of the leaves' arrays.
    """
    function = Checked(function)
    if mesh_axes():
        return map_on_mesh(function, leaves, memory_limit)
    buckets: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(leaves):
        buckets.setdefault((*sorted(leaf.shape[1:]), leaf.array.dtype), []).append(i)
    results = [leaf.array for leaf in leaves]
    for members in buckets.values():
        wide = [_transposed_if_tall(leaves[i].matrices(), leaves[i].shape) for i in members]
        joined = jnp.concatenate(wide) if len(wide) > 1 else wide[0]
        joined = in_slices(function, joined, memory_limit)
        ends = np.cumsum([len(stack) for stack in wide])
        for i, piece in zip(members, jnp.split(joined, ends[:-1]), strict=True):
            results[i] = _transposed_if_tall(piece, leaves[i].shape).reshape(results[i].shape)
    return results


def _transposed_if_tall(stack: Stack, shape: Sequence[int]) -> Stack:
    return stack.mT if shape[1] > shape[2] else stack
