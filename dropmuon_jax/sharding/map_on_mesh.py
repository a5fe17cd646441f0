"""Many matrices on a mesh: exchanged once, iterated where they are then, and exchanged back once.

The layers of a stack pass many at once, so that every device has a matrix.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from dropmuon_jax.layers.matrices import MatrixAxes
from dropmuon_jax.layers.rows import RowAxes, flags_along, map_rows, row_shape
from dropmuon_jax.layers.trees import leaf_paths, where_active
from dropmuon_jax.orthogonalize.batches import (
    Execution,
    Orthogonalize,
    in_slices,
    orthogonalize_all,
)
from dropmuon_jax.sharding.exchange import Owners, in_layout, joined_here, taken_apart, to_blocks
from dropmuon_jax.sharding.layouts import (
    Kind,
    LeafSharding,
    axis_names,
    choose_layout,
    layout_cost,
    plan_buckets,
)
from dropmuon_jax.sharding.on_mesh import (
    configured,
    current_config,
    explicit_mesh,
    mesh_axes,
    on_auto_axes,
    within_stack,
)

# A group of layers that are not known before the step runs takes at most this part of the stack.
# Places that it has left are exchanged and iterated for nothing, and more groups take more
# exchanges.
_PART_OF_STACK = 4


def execution_on_mesh(*trees: Any) -> Execution:
    """How these arrays are computed with on a mesh."""
    mesh, is_shared = explicit_mesh(trees), bool(mesh_axes())
    is_shared = is_shared or (mesh is not None and mesh.size > 1)
    update_rows = update_layers_on_mesh if is_shared else None
    return Execution(on_auto_axes, orthogonalize_on_mesh, update_rows)


def orthogonalize_on_mesh(
    function: Orthogonalize, leaves: Sequence[Array], axes: Sequence[MatrixAxes], memory_limit: int
) -> list[Array]:
    """`function` of every matrix of leaves that are sharded over the axes of :func:`mesh_axes`.

    Leaves of one shape that are known to be sharded in different ways make a bucket each: joining
    them would move them one by one. What is batched by `jax.vmap`, as the layers of a stack are, is
    more matrices of the same buckets. Arguments and result are those of `orthogonalize_all`.
    """
    if not mesh_axes():
        return orthogonalize_all(function, leaves, axes, memory_limit)
    known = current_config().leaves
    blocks = [
        to_blocks(x, a, sharding_of_part(known.get(a.path), a))
        for x, a in zip(leaves, axes, strict=True)
    ]
    arrays, kinds = [array for array, _, _ in blocks], [kind for _, kind, _ in blocks]
    results = _orthogonalize_blocks(function, arrays, kinds, memory_limit)
    return [restore(x) for (_, _, restore), x in zip(blocks, results, strict=True)]


def sharding_of_part(sharding: LeafSharding | None, axes: MatrixAxes) -> LeafSharding | None:
    """The sharding of a part of a leaf; not known if a mesh shards the axis that was cut."""
    if sharding is None or axes.replaced is None:
        return sharding
    axis, num_axes = axes.replaced
    entries = (*sharding.spec, *(None,) * (axis + 1))
    if axis_names(entries[axis]):
        return None
    spec = PartitionSpec(*entries[:axis], *(None,) * num_axes, *sharding.spec[axis + 1 :])
    return sharding._replace(spec=spec)


def _orthogonalize_blocks(
    function: Orthogonalize, arrays: list[Array], kinds: list[Kind], memory_limit: int
) -> list[Array]:
    """The results in the shapes of the blocks; as more matrices under `jax.vmap` of a stack."""
    if any(not array.size for array in arrays):
        filled = [i for i, array in enumerate(arrays) if array.size]
        of_filled = [arrays[i] for i in filled], [kinds[i] for i in filled]
        rest = iter(_orthogonalize_blocks(function, *of_filled, memory_limit))
        return [next(rest) if array.size else array for array in arrays]
    config = current_config()
    static = function, memory_limit, tuple(kinds), config.layout, config.flops_per_byte
    if not config.in_stack:  # a user's own `jax.vmap` and derivatives go through it as ever
        return _orthogonalize_buckets(arrays, *static)

    @jax.custom_batching.custom_vmap
    def mapped(arrays: list[Array]) -> list[Array]:
        return _orthogonalize_buckets(arrays, *static)

    @mapped.def_vmap
    def _(axis_size: int, in_batched: list, arrays: list[Array]) -> tuple[list, list[bool]]:
        stacks = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(arrays, in_batched[0], strict=True)
        ]
        merged = [_merged(x, kind) for x, kind in zip(stacks, kinds, strict=True)]
        of_layers = [array for array, _ in merged], [kind for _, kind in merged]
        with configured(in_stack=False):
            results = _orthogonalize_blocks(function, *of_layers, memory_limit)
        results = [_unmerged(*pair) for pair in zip(results, stacks, kinds, strict=True)]
        return results, [True] * len(results)

    return mapped(arrays)


def _merged(stack: Array, kind: Kind) -> tuple[Array, Kind]:
    """An array (layers, batch, …) with its first two axes merged: more matrices."""
    sharding = kind.sharding
    if sharding is not None:
        sharding = (kind.stack_axes or sharding[0], *sharding[1:])
    if _has_batch_first(kind):
        stack = stack.swapaxes(0, 1)
    return stack.reshape(-1, *stack.shape[2:]), Kind(kind.num_in, sharding)


def _unmerged(merged: Array, stack: Array, kind: Kind) -> Array:
    """What :func:`_merged` has merged, in the shape of the stack again."""
    if _has_batch_first(kind):
        return merged.reshape(*stack.shape[1::-1], *stack.shape[2:]).swapaxes(0, 1)
    return merged.reshape(stack.shape)


def _has_batch_first(kind: Kind) -> bool:
    """Whether only the batch is sharded, not the layers: merged, the first axis still is."""
    return bool(kind.sharding and kind.sharding[0] and not kind.stack_axes)


# In a jit of its own because outside one JAX takes no constraint that leaves anything open.
@functools.partial(
    jax.jit, static_argnames=("function", "memory_limit", "kinds", "layout", "flops_per_byte")
)
def _orthogonalize_buckets(
    arrays: list[Array],
    function: Orthogonalize,
    memory_limit: int,
    kinds: tuple[Kind, ...],
    layout: str,
    flops_per_byte: float,
) -> list[Array]:
    axes = mesh_axes()
    owners = Owners(axes)
    results = list(arrays)
    for members, sharding, bucket, num_in in plan_buckets(arrays, kinds, axes):
        oriented = [_transposed_if(m.transposed, arrays[m.leaf]) for m in members]
        chosen = bucket.ordered(choose_layout(function, bucket, axes, layout, flops_per_byte))
        cost = layout_cost(function, bucket._replace(num_matrices=1), axes, chosen).flops

        def of_blocks(array: Array, num_in: int = num_in) -> Array:
            sides = array.shape[1:]
            fan_in, fan_out = math.prod(sides[:num_in]), math.prod(sides[num_in:])
            matrices = array.reshape(len(array), fan_in, fan_out)
            polar = in_slices(function, _transposed_if(fan_in > fan_out, matrices), memory_limit)
            return _transposed_if(fan_in > fan_out, polar).reshape(array.shape)

        joined = joined_here(oriented, sharding)
        mapped = in_layout(of_blocks, joined, chosen, axes, owners, cost, sharding)
        apart = taken_apart(mapped, [len(array) for array in oriented], sharding)
        for member, array in zip(members, apart, strict=True):
            results[member.leaf] = _transposed_if(member.transposed, array)
    return results


def _transposed_if(condition: bool, stack: Array) -> Array:
    return stack.mT if condition else stack


def update_layers_on_mesh(
    step: Callable[[Any, Any], tuple[Any, Any]],
    arguments: dict[str, Any],
    state: Any,
    updates: Any,
    active: Bool[np.ndarray, " layers"] | Bool[Array, " layers"],
    axes: RowAxes,
) -> tuple[Any, Any]:
    """The updates and the new state of a stack: its active layers together, or in groups.

    Args:
        step: From the arguments and the state of one active layer to its update and its state, in
            the same dtypes.
        arguments: Trees of arrays with an axis of layers, `updates` among them.
        state: A tree of arrays with an axis of layers.
        updates: Zeros, into which the updates are written.
        active: Which layers are active. Those of a NumPy array are known now, and pass all at once;
            of those of a JAX array the device decides only how many groups pass.
        axes: Along which axes layers lie.
    """
    of_grads = jax.tree.leaves(jax.tree.broadcast(axes.updates, arguments["updates"]))
    by_path = dict(zip(leaf_paths(arguments["updates"]), of_grads, strict=True))
    of_whole = axes.updates, axes.state

    def of_layers(layers: Any, state: Any) -> tuple[Any, Any]:
        with within_stack(by_path):
            rows = _take((arguments, state), layers, axes[:2])
            return jax.vmap(step, axes[:2], of_whole)(*rows)

    num_layers, known = len(active), current_config().leaves
    if isinstance(active, np.ndarray) and not active.any():
        return updates, state
    if any(known[path].along(axis) for path, axis in by_path.items() if path in known):
        # Each device has layers of its own and works on them at the same time as the others: it is
        # done no sooner with fewer, and to share out fewer, layers would have to be exchanged.
        everything = of_layers(slice(0, num_layers), state)

        def select(axis: int, new: Array, old: Array) -> Array:
            return where_active(flags_along(axis, active), new, old)

        return map_rows(select, of_whole, everything, (updates, state))
    if isinstance(active, np.ndarray):
        layers = _at_once(np.flatnonzero(active))
        return _write((updates, state), layers, of_layers(layers, state), of_whole)

    size = _group_size(jax.tree.leaves(arguments["updates"]), of_grads, num_layers)
    num_groups = -(-num_layers // size)
    # What is left of the last group has the number of no layer, and is not written.
    order = jnp.nonzero(active, size=num_groups * size, fill_value=num_layers)[0]

    # What a turn computes is written at the beginning of the next. So the stack is read only after
    # it is written, and XLA does both in place; the other way round it may copy the whole stack in
    # every turn, as it cannot see that no layer is read again.
    def turn(j: Array, carry: tuple[Any, Any, Array]) -> Any:
        whole, pending, last = carry
        whole = _write(whole, last, pending, of_whole)
        layers = jax.lax.dynamic_slice_in_dim(order, j * size, size)
        return whole, of_layers(layers, whole[1]), layers

    whole = updates, state

    def zeros(axis: int, x: Array) -> Array:
        return jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)

    pending = map_rows(zeros, of_whole, whole)
    nowhere = jnp.full(size, num_layers, order.dtype)
    whole, pending, last = jax.lax.fori_loop(
        0, -(-jnp.sum(active) // size), turn, (whole, pending, nowhere)
    )
    return _write(whole, last, pending, of_whole)


def _group_size(updates: Sequence[Array], axes: Sequence[int], num_layers: int) -> int:
    """As many layers as give every device a matrix."""
    rows = [row_shape(x.shape, axis) for x, axis in zip(updates, axes, strict=True)]
    shapes = collections.Counter(tuple(sorted(row)) for row in rows if len(row) > 1)
    in_a_layer = max(shapes.values(), default=1)
    num_devices = int(np.prod(list(mesh_axes().values())))
    return min(-(-num_devices // in_a_layer), -(-num_layers // _PART_OF_STACK))


def _at_once(layers: Int[np.ndarray, " active"]) -> slice | np.ndarray:
    """The layers as a slice, if they are neighbours: a whole stack is then not copied."""
    first, past = int(layers[0]), int(layers[-1]) + 1
    return slice(first, past) if past - first == len(layers) else layers


def _take(tree: Any, layers: Any, axes: Any) -> Any:
    def take(axis: int, x: Array) -> Array:
        if isinstance(layers, jax.Array):
            return jnp.take(x, layers, axis=axis, mode="clip")
        return x[(slice(None),) * axis + (layers,)]

    return map_rows(take, axes, tree)


def _write(whole: Any, layers: Any, part: Any, axes: Any) -> Any:
    def write(axis: int, x: Array, new: Array) -> Array:
        new = new.astype(x.dtype)
        if isinstance(layers, slice):
            return jax.lax.dynamic_update_slice_in_dim(x, new, layers.start, axis)
        return x.at[(slice(None),) * axis + (layers,)].set(new, mode="drop")

    return map_rows(write, axes, whole, part)
