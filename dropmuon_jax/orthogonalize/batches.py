"""Many matrices at once: those of one shape are stacked and pass through one program.

This is the seam between the algorithm and a mesh of devices. An LMO hands all of its active leaves
to the `orthogonalize_all` of :func:`execution`; on a mesh `dropmuon_jax.sharding` puts another one
in its place, and nothing else knows that there is a mesh.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_floating, describe
from dropmuon_jax.layers.matrices import MatrixAxes, to_matrices

Orthogonalize = Callable[[Float[Array, "*batch rows cols"]], Float[Array, "*batch rows cols"]]
Matrices = Float[Array, "batch rows cols"]

DEFAULT_MEMORY_LIMIT = 2**28  # on a CPU the speed is the same between 32 MiB and 1 GiB
_MAX_GROUPS = 8  # of the leaves of a shape, as each is compiled


def orthogonalize_all(
    function: Orthogonalize, leaves: Sequence[Array], axes: Sequence[MatrixAxes], memory_limit: int
) -> list[Array]:
    """`function` of every matrix of every leaf.

    Matrices of one shape, and those of its transpose, are joined, so that the program holds
    `function` once for each shape, however many matrices there are; or up to eight times, where
    the joined stacks of all shapes do not fit into half of `memory_limit`: in groups, in turn.

    Args:
        function: From a stack of matrices, no taller than wide, to one of the same shape and dtype,
            in which every matrix depends on its own matrix only.
        leaves: Arrays of matrices.
        axes: The matrix axes of each leaf.
        memory_limit: In bytes, a third of it for the joined leaves of a group, and what is left for
            `function`, through which more passes in slices, of one matrix at least, in a loop.

    Returns:
        Arrays of the shapes of the leaves.
    """
    group_of = _group_of.get()
    if group_of and isinstance(function, Hashable):
        function = jax.jit(function, inline=True)
    stacks, restore = zip(*map(to_matrices, leaves, axes), strict=True) if leaves else ((), ())
    apart: dict[Any, dict[tuple, list[int]]] = {}
    for i, stack in enumerate(stacks):
        buckets = apart.setdefault(group_of(axes[i].path) if group_of else None, {})
        buckets.setdefault((*sorted(stack.shape[1:]), stack.dtype), []).append(i)
    results, last = list(leaves), None
    for waits, members in chain(*(_groups(stacks, of, memory_limit) for of in apart.values())):
        wide = [_transposed_if_tall(stacks[i], stacks[i].shape) for i in members]
        if waits and last is not None:
            wide[0] = _after(last, wide[0])
        joined = jnp.concatenate(wide) if len(wide) > 1 else wide[0]
        copied = joined.nbytes if len(wide) > 1 else 0
        slice_size = _slice_size(joined, memory_limit - 2 * copied)
        if slice_size >= len(joined):
            joined = check_polar_factors(joined, function(joined))
        else:
            joined = _in_slices(function, joined, slice_size)
        ends = np.cumsum([len(stack) for stack in wide])
        for i, piece in zip(members, jnp.split(joined, ends[:-1]), strict=True):
            results[i] = restore[i](_transposed_if_tall(piece, stacks[i].shape))
        last = results[members[-1]]
    return results


def _groups(
    stacks: Sequence[Matrices], buckets: Mapping[Any, list[int]], memory_limit: int
) -> list[tuple[bool, list[int]]]:
    """The members of each bucket, in groups that fit into the limit if all together do not.

    And whether a group waits for the one before. A stack of several leaves is a copy, of a tall one
    two, transposed and joined, and may be there twice, before and after what is done in place.
    """
    size = [stack.nbytes * (1 + (stack.shape[1] > stack.shape[2])) for stack in stacks]
    if sum(size[i] for i in chain(*buckets.values())) <= memory_limit // 2:
        return [(False, members) for members in buckets.values()]
    groups: list[list[int]] = []
    for members in buckets.values():
        first, sizes = stacks[members[0]], [size[i] for i in members]
        fits = min(memory_limit // 3, memory_limit - working_bytes(first.shape[1:], first.dtype))
        packed = _packed(members, size, fits)
        if len(packed) > _MAX_GROUPS:  # a full one then holds an eighth
            packed = _packed(members, size, -(-sum(sizes) // _MAX_GROUPS) + max(sizes) - 1)
        groups += packed
    return [(turn > 0, members) for turn, members in enumerate(groups)]


def _packed(members: Sequence[int], size: Sequence[int], most: int) -> list[list[int]]:
    """The members in order, as many in a group as `most` has room for, and one at least."""
    groups, left = [], -1
    for i in members:
        left -= size[i]
        if left < 0:
            groups, left = [*groups, []], most - size[i]
        groups[-1].append(i)
    return groups


def _after(done: Array, stack: Matrices) -> Matrices:
    """The stack, bit for bit, but not before something else is done.

    XLA's CPU backend drops `optimization_barrier` before it puts operations in an order. It does
    not know that an integer without its sign is never negative.
    """
    bits = jax.lax.bitcast_convert_type(done[(0,) * done.ndim], f"int{jnp.finfo(done.dtype).bits}")
    return jnp.where((bits & jnp.iinfo(bits.dtype).max) >= 0, stack, 0)


_group_of: ContextVar[Callable[[str], Any] | None] = ContextVar("_group_of", default=None)


@contextlib.contextmanager
def joining_within(group_of: Callable[[str], Any]) -> Iterator[None]:
    """Inside, matrices are joined only within a group of paths, such as a layer.

    Groups that are alike trace the function once.
    """
    token = _group_of.set(group_of)
    try:
        yield
    finally:
        _group_of.reset(token)


def _transposed_if_tall(stack: Matrices, shape: Sequence[int]) -> Matrices:
    return stack.mT if shape[1] > shape[2] else stack


class Execution(NamedTuple):
    """How arrays are computed with: what a mesh of devices does in its own way."""

    call: Callable[..., Any]
    """`call(function, *arguments, named, results_like)` is `function(*arguments)`, computed where
    no axis of a mesh is explicit. `named` is the tree among the arguments whose leaves are known by
    their paths, `results_like` a tree with the structure and the placement of the results.
    `function` closes over no arrays."""
    orthogonalize_all: Callable[..., list[Array]]
    """As :func:`orthogonalize_all`."""
    update_rows: Callable[..., tuple[Any, Any]] | None = None
    """The update of the active layers of a stack, as :func:`one_by_one`, in whose place it is."""


def _call(function: Callable[..., Any], *arguments: Any, named: Any, results_like: Any) -> Any:
    del named, results_like
    return function(*arguments)


LOCAL = Execution(_call, orthogonalize_all)
_is_on_mesh: Callable[..., bool] = lambda *trees: False  # noqa: E731
_on_mesh: Callable[..., Execution] = lambda *trees: LOCAL  # noqa: E731


def install(is_on_mesh: Callable[..., bool], on_mesh: Callable[..., Execution]) -> None:
    """Lets `on_mesh` say how trees of arrays are computed with, where `is_on_mesh` is true."""
    global _is_on_mesh, _on_mesh
    _is_on_mesh, _on_mesh = is_on_mesh, on_mesh


def execution(*trees: Any) -> Execution:
    """How these arrays are computed with."""
    return _on_mesh(*trees) if _is_on_mesh(*trees) else LOCAL


def check_polar_factors(stack: Matrices, result: Any) -> Matrices:
    """The result of a function of a stack; an error if its shape or dtype is another one."""
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


def check_matrices(x: Any) -> None:
    """Error unless something is an array of matrices."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(
            f"newton_schulz orthogonalizes an array, got {describe(x)}. For a tree take "
            "newton_schulz_lmo."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        check_floating("the array to orthogonalize", x.dtype)
    if x.ndim < 2:
        raise ValueError(
            f"The array to orthogonalize must have shape (*batch, rows, cols), got {x.shape}."
        )


def in_slices(function: Orthogonalize, stack: Matrices, memory_limit: int) -> Matrices:
    """`function` of the stack, in slices that take `memory_limit` bytes where it needs more."""
    size = _slice_size(stack, memory_limit)
    if size >= len(stack):
        return check_polar_factors(stack, function(stack))
    return _in_slices(function, stack, size)


def _in_slices(function: Orthogonalize, stack: Matrices, size: int) -> Matrices:
    """`function` of slices of `size` matrices, one by one and in place."""
    count = len(stack)
    num_slices = -(-count // size)
    padded = jnp.pad(stack, [(0, num_slices * size - count), (0, 0), (0, 0)])

    def replace_slice(i: Array, stack: Matrices) -> Matrices:
        piece = jax.lax.dynamic_slice_in_dim(stack, i * size, size)
        polar_factors = check_polar_factors(piece, function(piece))
        return jax.lax.dynamic_update_slice_in_dim(stack, polar_factors, i * size, axis=0)

    return jax.lax.fori_loop(0, num_slices, replace_slice, padded)[:count]


def _slice_size(stack: Matrices, memory_limit: int) -> int:
    """How many matrices pass at once: as many as there is memory for, with the least padding."""
    count, needed = len(stack), working_bytes(stack.shape[1:], stack.dtype)
    largest = max(1, min(count, memory_limit // max(1, needed)))
    return min(range(largest, largest // 2, -1), key=lambda size: -(-count // size) * size)


def working_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """What an iteration holds for one matrix: two of its size, and five Gram matrices."""
    short, long = sorted(shape)
    return (2 * short * long + 5 * short**2) * dtype.itemsize


def svd_polar_factor(x: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows cols"]:
    """UVᵀ over the singular values that are not zero to rounding; of UΣVᵀ, by its SVD."""
    dtype = np.promote_types(x.dtype, np.float32)
    u, s, vt = thin_svd(x.astype(dtype))
    # NumPy's rule for the rank of a matrix.
    threshold = s[..., :1] * (max(x.shape[-2:]) * jnp.finfo(dtype).eps)
    # Comparing with "not smaller or equal" keeps the NaN of a matrix with NaN.
    return jnp.matmul(u * jnp.where(s <= threshold, 0, 1)[..., None, :], vt).astype(x.dtype)


def thin_svd(x: Float[Array, "*batch rows cols"]) -> tuple[Array, Array, Array]:
    """U, the singular values and Vᵀ of matrices; NaN for one with NaN or infinities.

    Of a zero matrix all derivatives are zero. There are none at other equal singular values.
    """
    rows, cols = x.shape[-2:]
    is_zero = jnp.all(x == 0, axis=(-2, -1), keepdims=True)
    distinct = jnp.eye(rows, cols, dtype=x.dtype) / np.arange(1, cols + 1, dtype=x.dtype)[None]
    distinct = jnp.broadcast_to(distinct, x.shape)
    u, s, vt = jnp.linalg.svd(jnp.where(is_zero, distinct, finite_or_nan(x)), full_matrices=False)
    return u, jnp.where(is_zero[..., 0], 0, s), vt


def finite_or_nan(x: Array) -> Array:
    """NaN for infinities, with which an SVD on a CPU never returns."""
    return jnp.where(jnp.isinf(x), jnp.nan, x)


def to_unit_entries(x: Array, axes: int | tuple[int, ...] = (-2, -1)) -> tuple[Array, Array]:
    """The numbers times 2⁻ᵉ, exactly, the largest along the axes in [1/2, 1), and the integers e.

    The squares of 1e-30 and of 1e30 are then in range. The axes of e have length 1. Zeros, numbers
    that are not finite, and those too small to be normal, keep their size.
    """
    if x.dtype == jnp.float16:  # 1e-5 is no normal number there
        y, exponent = to_unit_entries(x.astype(jnp.float32), axes)
        return y.astype(x.dtype), exponent
    exponent = _largest_exponent(x, axes)
    # In two factors, as 2⁻ᵉ itself may be out of range.
    half = exponent // 2
    return x * _power_of_two(-half, x.dtype) * _power_of_two(half - exponent, x.dtype), exponent


def _largest_exponent(x: Array, axes: int | tuple[int, ...]) -> Array:
    """The e with which the largest |x| along the axes is in [2ᵉ⁻¹, 2ᵉ); 0 for what has none.

    Bits of floating-point numbers without their sign are ordered as the numbers are, and XLA's CPU
    backend finds the maximum of integers sooner than that of |x|, which small matrices feel.
    """
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, f"int{info.bits}")
    largest = jnp.max(bits & jnp.iinfo(bits.dtype).max, axis=axes, keepdims=True, initial=0)
    biased = (largest >> info.nmant).astype(jnp.int32)
    normal = (biased > 0) & (biased < 2 * info.maxexp - 1)
    return jnp.where(normal, biased - (int(info.maxexp) - 2), 0)


def _power_of_two(exponent: Array, dtype: np.dtype) -> Array:
    """2 to an integer, if that is a normal number of the dtype."""
    info = jnp.finfo(dtype)
    bits = (exponent + (int(info.maxexp) - 1)).astype(f"int{info.bits}") << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)
