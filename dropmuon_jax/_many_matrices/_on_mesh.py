"""Many matrices on a mesh: they move once, are iterated where they lie, and move back once."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from dropmuon_jax._many_matrices._buckets import Kind, Placement, plan_buckets, transposed_if
from dropmuon_jax._many_matrices._layouts import (
    Layout,
    axes_size,
    choose_layout,
    layout_cost,
)
from dropmuon_jax._many_matrices._owners import Owners
from dropmuon_jax._many_matrices._redistribution import (
    from_layout,
    from_owners,
    joined_here,
    taken_apart,
    to_layout,
    to_owners,
    with_all_matrices_here,
    with_whole_rows_here,
)
from dropmuon_jax._many_matrices._slices import Checked, in_slices
from dropmuon_jax._matrices import Blocks
from dropmuon_jax._mesh import current_scope, mesh_axes, scope

Stack = Float[Array, "batch rows cols"]


def map_on_mesh(function: Checked, leaves: Sequence[Blocks], memory_limit: int) -> list[jax.Array]:
    """As :func:`map_matrices`, of leaves that are sharded over the axes of :func:`mesh_axes`.

    Leaves of one shape that are known to be sharded in different ways make a bucket each: joining
    them would move them one by one. What is batched by `jax.vmap`, as rows of stacked layers are,
    is more matrices of the same buckets.
    """
    if any(not leaf.array.size for leaf in leaves):
        rest = iter(map_on_mesh(function, [x for x in leaves if x.array.size], memory_limit))
        return [next(rest) if leaf.array.size else leaf.array for leaf in leaves]
    said = current_scope()
    kinds = tuple(Kind(leaf.num_in, leaf.placement) for leaf in leaves)

    def of_all(arrays: list[jax.Array]) -> list[jax.Array]:
        return _mapped(arrays, function, memory_limit, kinds, said.layout, said.flops_per_byte)

    if not said.in_rows:  # a user's own `jax.vmap` and derivatives go through it as ever
        return of_all([leaf.array for leaf in leaves])

    @jax.custom_batching.custom_vmap
    def mapped(arrays: list[jax.Array]) -> list[jax.Array]:
        return of_all(arrays)

    @mapped.def_vmap
    def _(axis_size: int, in_batched: list, arrays: list[jax.Array]) -> tuple[list, list[bool]]:
        whole = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(arrays, in_batched[0], strict=True)
        ]
        flat = [_with_rows(leaf, x) for leaf, x in zip(leaves, whole, strict=True)]
        with scope(in_rows=False):
            results = map_on_mesh(function, flat, memory_limit)
        results = [_rows_of(leaf, x, y) for leaf, x, y in zip(leaves, whole, results, strict=True)]
        return results, [True] * len(results)

    return mapped([leaf.array for leaf in leaves])


def _with_rows(leaf: Blocks, rows: jax.Array) -> Blocks:
    """The leaf with an array (rows, batch, …), as more matrices."""
    placement = leaf.placement
    if placement is not None:
        placement = (leaf.rows or placement[0], *placement[1:])
    if _has_batch_first(leaf):
        rows = rows.swapaxes(0, 1)
    return leaf._replace(array=rows.reshape(-1, *rows.shape[2:]), placement=placement, rows=())


def _rows_of(leaf: Blocks, rows: jax.Array, merged: jax.Array) -> jax.Array:
    """What :func:`_with_rows` has merged, in the shape of the rows again."""
    if _has_batch_first(leaf):
        return merged.reshape(*rows.shape[1::-1], *rows.shape[2:]).swapaxes(0, 1)
    return merged.reshape(rows.shape)


def _has_batch_first(leaf: Blocks) -> bool:
    """Whether the batch is sharded and rows are not: merged, the first axis is still sharded."""
    return bool(leaf.placement and leaf.placement[0] and not leaf.rows)


# In a jit of its own because outside one JAX takes no constraint that leaves anything open.
@functools.partial(
    jax.jit, static_argnames=("function", "memory_limit", "kinds", "layout", "flops_per_byte")
)
def _mapped(
    arrays: list[jax.Array],
    function: Checked,
    memory_limit: int,
    kinds: tuple[Kind, ...],
    layout: str,
    flops_per_byte: float,
) -> list[jax.Array]:
    axes = mesh_axes()
    owners = Owners(axes)
    results = list(arrays)
    for members, placement, bucket, num_in in plan_buckets(arrays, kinds, axes):
        oriented = [transposed_if(m.transposed, arrays[m.leaf]) for m in members]
        chosen = choose_layout(function.function, bucket, axes, layout, flops_per_byte)
        chosen = bucket.ordered(chosen)
        cost = layout_cost(function.function, bucket._replace(num_matrices=1), axes, chosen).flops

        def of_blocks(array: jax.Array, num_in: int = num_in) -> jax.Array:
            matrices = Blocks(array, num_in).matrices()
            is_tall = matrices.shape[1] > matrices.shape[2]
            polar = in_slices(function, transposed_if(is_tall, matrices), memory_limit)
            return transposed_if(is_tall, polar).reshape(array.shape)

        joined = joined_here(oriented, placement)
        mapped = _in_layout(of_blocks, joined, chosen, axes, owners, cost, placement)
        apart = taken_apart(mapped, [len(array) for array in oriented], placement)
        for member, array in zip(members, apart, strict=True):
            results[member.leaf] = transposed_if(member.transposed, array)
    return results


def _in_layout(
    function: Callable[[jax.Array], jax.Array],
    joined: jax.Array,
    layout: Layout,
    axes: Mapping[str, int],
    owners: Owners,
    cost: float,
    placement: Placement | None,
) -> jax.Array:
    """`function` of the matrices, each where the layout has it."""
    count, num_cols = len(joined), joined.shape[-1]
    matrices, filled = owners.share_out(count, cost, layout.whole)
    places = matrices.shape[1]
    at_rest, sides = 0, None
    if placement is not None:
        of_batch, *of_sides = placement
        at_rest = len(of_batch) if layout.whole[: len(of_batch)] == of_batch else 0
        sides = tuple(of_sides) if not of_batch and layout.whole == sum(of_sides, ()) else None
    if not filled.all():
        joined, at_rest = joined[matrices.reshape(-1)], 0
    # Columns of zeros change neither XXᵀ nor the others.
    padding = -num_cols % axes_size(axes, layout.sides)
    if padding:
        joined = jnp.pad(joined, [(0, 0)] * (joined.ndim - 1) + [(0, padding)])

    def of_one_owner(stack: jax.Array) -> jax.Array:
        if filled.all():
            return function(stack)
        has_last = jnp.asarray(filled)[jax.lax.axis_index(layout.whole)]
        last = jax.lax.cond(has_last, function, lambda x: x, stack[-1:])
        return jnp.concatenate([function(stack[:-1]), last]) if places > 1 else last

    if sides:
        placed = to_owners(joined, sides, axes)
    else:
        placed = to_layout(joined, layout, at_rest)
    if layout.whole:
        of_owner = PartitionSpec(layout.whole)
        placed = jax.shard_map(
            of_one_owner,
            in_specs=of_owner,
            out_specs=of_owner,
            axis_names=set(layout.whole),
            # Inside a user's own, which may check how values vary, and so has to be told.
            check_vma=_is_inside_shard_map(),
        )(placed)
    else:
        placed = function(placed)
    if sides:
        result = from_owners(placed, sides, axes)
    else:
        result = from_layout(placed, layout, at_rest)
    if padding:
        result = with_whole_rows_here(result)[..., :num_cols]
    if filled.all():
        return result
    result = with_all_matrices_here(result)
    place_of = np.zeros(count, int)
    taken = np.arange(places) < np.where(filled, places, places - 1)[:, None]
    place_of[matrices[taken]] = np.flatnonzero(taken)
    return result[place_of]


def _is_inside_shard_map() -> bool:
    kinds = jax.sharding.get_abstract_mesh().axis_types or ()
    return AxisType.Manual in kinds
