"""Workers: what they exchange, what of a state is their own, and updates that run on all of them.

Inside `jax.shard_map` or `jax.vmap` a worker is a place on a named axis. Payloads travel as
integers of their width, since backends widen the collectives of narrow floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from dropmuon_jax._checks import check_transformation, static_int
from dropmuon_jax.layers.trees import restructure_like
from dropmuon_jax.transforms.accumulation import AccumulatedState


class WorkerState(NamedTuple):
    """The part of a state that each worker has of its own: with other numbers, and never sent.

    Outside of `jax.shard_map` its arrays have a leading axis of workers.
    """

    inner_state: optax.OptState
    """Of the worker's momentum, M_j."""
    estimate: optax.Updates
    """G_j, what the others know of it."""
    memory: Any
    """Of the compressor, by leaf."""


def map_worker_states(function: Callable[[Array], Any], state: Any, otherwise: Any = None) -> Any:
    """`function` of the arrays that are a worker's own; `otherwise` of the others, or these."""

    def of_node(node: Any) -> Any:
        if isinstance(node, WorkerState):
            return jax.tree.map(function, node)
        return node if otherwise is None else otherwise(node)

    return jax.tree.map(of_node, state, is_leaf=lambda node: isinstance(node, WorkerState))


def worker_specs(opt_state: optax.OptState, axis: str = "workers") -> Any:
    """For each array of a state: `jax.P(axis)` if every worker has its own, else `jax.P()`.

    These are the `in_specs` and `out_specs` of a state in a `jax.shard_map` of your own, and what
    places it: `NamedSharding(mesh, spec)`. Arrays that differ between workers must not be taken for
    replicated ones: a checkpoint would keep a part of each.

    Args:
        opt_state: A state, or the shapes of one, of an optimizer with :func:`ef21` or
            :func:`~dropmuon_jax.privacy.norm_ec` in it.
        axis: The axis of workers.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.compression.ef21(dm.compression.TopK(0.5))
        >>> specs = dm.compression.worker_specs(tx.init({"w": jnp.ones(3)}))
        >>> print(specs.worker.estimate["w"], specs.estimate["w"])
        P('workers',) P()
    """
    return map_worker_states(lambda _: jax.P(axis), opt_state, lambda _: jax.P())


def on_workers(
    optimizer: optax.GradientTransformation, workers: Any, *, axis: str = "workers"
) -> optax.GradientTransformationExtraArgs:
    """Runs an update on all workers at once, from gradients with a leading axis of workers.

    The gradients are those of each worker's own data, such as
    `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batches)`. On a mesh whose axis shards
    the batches, every device takes the gradient of its own ones, exchanges nothing for that, and
    then what the optimizer sends.

    Args:
        optimizer: An optimizer with :func:`ef21` or :func:`~dropmuon_jax.privacy.norm_ec` in it.
        workers: A mesh with the axis of workers, one on each of its places; other axes of the mesh
            are left to XLA. Or their number: then they run side by side on one device, by
            `jax.vmap`, and exchange nothing.
        axis: The name of the axis, the one that the optimizer was given.

    Returns:
        A transformation. `update` takes gradients (and `prev_params_grads`) with a leading axis of
        workers and gives updates without it, so no `optax.MultiSteps` or `optax.apply_if_finite`
        goes around it, nor around the exchange inside: means over micro-batches come before, and a
        step is left out, of all workers, by `jax.lax.cond`. `init` gives workers' own arrays a
        leading axis (:func:`worker_specs`).

    Raises:
        TypeError: If `workers` is neither; at `init`, if what gathers or leaves out steps goes
            around an exchange.
        ValueError: If the mesh has no such axis; in `update`, for gradients of another number of
            workers, or of none, and for updates or a state that would differ between workers.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.compression.on_workers(
        ...     dm.compression.ef21(dm.compression.Identity(), momentum=0.0), 2
        ... )
        >>> grads = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # of two workers
        >>> params = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(updates["w"], state.worker.estimate["w"].shape)
        [2. 4.] (2, 2)
    """
    check_transformation("optimizer", optimizer)
    inner = optax.with_extra_args_support(optimizer)
    mesh = workers if hasattr(workers, "axis_names") else None
    if mesh is not None:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"axis is {axis!r}, and the mesh has the axes {list(mesh.axis_names)}: name the "
                "one over which workers differ, here and in the optimizer."
            )
        count = dict(mesh.shape)[axis]
    else:
        hint = "Give the mesh, or how many workers run side by side on one device."
        count = static_int("workers", workers, minimum=1, hint=hint)

    def init_fn(params: optax.Params) -> optax.OptState:
        _refuse_wrapped(state := inner.init(params))
        return map_worker_states(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), state)

    def update_fn(updates, state, params=None, **extra_args):
        for path, x in jax.tree_util.tree_leaves_with_path(updates):
            if jnp.shape(x)[:1] != (count,):
                at = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"The gradient of '{at}' has shape {jnp.shape(x)}, and needs a leading axis of "
                    f"{count} workers: jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, "
                    "batches), with batches of each worker. (No optax.MultiSteps goes around: its "
                    "sums have no such axis. Give the means over the micro-batches of each worker.)"
                )
        more = {}
        if (second := extra_args.pop("prev_params_grads", None)) is not None:
            more["prev_params_grads"] = restructure_like("prev_params_grads", second, updates)

        def update(of_worker: Any, state: Any, params: Any) -> Any:
            return inner.update(of_worker[0], state, params, **extra_args, **of_worker[1])

        given = (updates, more), state, params
        axes = map_worker_states(lambda _: 0, state, lambda _: None)
        beside = jax.vmap(update, (0, axes, None), (None, axes), axis_name=axis, axis_size=count)
        try:
            if mesh is None:
                return beside(*given)
            # A mesh would take what differs for replicated, without a word.
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), given)
            jax.eval_shape(beside, *shapes)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "Updates or states would differ between workers. Exchange gradients first, by "
                "dm.compression.ef21 or dm.privacy.norm_ec, and keep no state of those before it."
            ) from None

        def on_device(of_worker: Any, state: Any, params: Any) -> Any:
            one = jax.tree.map(lambda x: x[0], of_worker)
            updates, state = update(one, map_worker_states(lambda x: x[0], state), params)
            return updates, map_worker_states(lambda x: x[None], state)

        specs = worker_specs(state, axis)
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(jax.P(axis), specs, jax.P()),
            out_specs=(jax.P(), specs),
            axis_names={axis},
            check_vma=False,  # loops over the layers of a stack start from zeros
        )(*given)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refuse_wrapped(opt_state: optax.OptState) -> None:
    """Error for what would exchange on some workers only, or in every micro-batch."""
    wrappers = optax.MultiStepsState, AccumulatedState, optax.ApplyIfFiniteState

    def within(kinds: Any, tree: Any) -> list[Any]:
        nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
        return [node for node in nodes if isinstance(node, kinds)]

    # Behind the exchange all workers have the same.
    for node in (of for of in within(wrappers, opt_state) if within(WorkerState, of)):
        if isinstance(node, optax.ApplyIfFiniteState):
            raise TypeError(
                "optax.apply_if_finite goes around what workers exchange, and each would decide by "
                "its own gradient alone whether it does. Decide by those of all, in the step: "
                "jax.lax.cond(is_finite, take_step, leave_out, grads, opt_state, params)."
            )
        raise TypeError(
            "optimizer accumulates, by optax.MultiSteps or dm.accumulate, around what workers "
            "exchange, and each would have sums of its own: give update the means over the "
            "micro-batches of each worker."
        )


def worker_place(axis: str | None, *trees: Any) -> Int[Array, ""]:
    """Which worker this is.

    Raises:
        ValueError: Outside of the axis; or if gradients are known to be the same for all workers.
    """
    if axis is None:
        return jnp.zeros((), jnp.int32)
    try:
        index = jax.lax.axis_index(axis)
    except NameError:
        raise ValueError(
            f"update() runs outside of the axis {axis!r} of workers. Wrap the optimizer, "
            "dm.compression.on_workers(optimizer, mesh); or call it inside of jax.shard_map over a "
            "mesh with this axis; or say axis=None, if there is one worker."
        ) from None
    if _is_tracked(axis):
        for path, x in jax.tree_util.tree_leaves_with_path(trees):
            if axis not in jax.typeof(x).manual_axis_type.varying:
                at = jax.tree_util.keystr(path[1:], simple=True, separator="/")
                raise ValueError(
                    f"The gradient of '{at}' is the same for all {axis!r}: inside of jax.shard_map "
                    "the gradient for replicated weights has been summed over them, uncompressed. "
                    f"Differentiate for jax.lax.pcast(params, {axis!r}, to='varying')."
                )
    return index


def _is_tracked(axis: str) -> bool:
    """Whether types say what varies over the axis, as `jax.shard_map` has it by default."""
    return axis in jax.typeof(jax.lax.axis_index(axis)).manual_axis_type.varying


def gather(tree: Any, axis: str | None) -> Any:
    """The arrays of all workers, along a new leading axis: one exchange for each width."""
    leaves, treedef = jax.tree.flatten(tree)
    if axis is None:
        return treedef.unflatten([x[None] for x in leaves])
    words = [_as_words(x) for x in leaves]
    gathered = list(words)
    for dtype in sorted({x.dtype for x in words}, key=lambda of: of.itemsize):
        members = [i for i, x in enumerate(words) if x.dtype == dtype]
        joined = jnp.concatenate([words[i].reshape(-1) for i in members])
        # The result is the same for all workers, which types that are tracked must say.
        to = "invarying" if _is_tracked(axis) else "varying"
        everyone = jax.lax.all_gather(joined, axis, to=to)
        ends = np.cumsum([words[i].size for i in members])
        pieces = jnp.split(everyone, ends[:-1], axis=1)
        for i, piece in zip(members, pieces, strict=True):
            gathered[i] = piece.reshape(len(piece), *words[i].shape)
    restored = (_from_words(x, like.dtype) for x, like in zip(gathered, leaves, strict=True))
    return treedef.unflatten(restored)


def _as_words(x: Array) -> Array:
    """The bits of numbers as unsigned integers of their width."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    dtype = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _from_words(x: Array, dtype: Any) -> Array:
    if dtype == jnp.bool_ or x.dtype == dtype:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, dtype)


def mean_over_workers(function: Callable[[Any], Any], gathered: Any, zeros: Any) -> Any:
    """The mean of a function of what each worker sent, added one after the other.

    In a loop, so that one result is held at a time, and in one order everywhere: collectives that
    sum have another one over processes than on the devices of one.
    """

    def add(total: Any, of_worker: Any) -> Any:
        return jax.tree.map(jnp.add, total, function(of_worker)), None

    total, _ = jax.lax.scan(add, zeros, gathered)
    count = len(jax.tree.leaves(gathered)[0])
    return jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)


def mean_of_arrays(tree: Any, axis: str) -> Any:
    """The mean of what each worker has, of which each adds up a part: as many bytes as a sum."""
    count = jax.lax.axis_size(axis)

    def of_array(x: Array) -> Array:
        own = jnp.pad(x.reshape(-1), (0, -x.size % count)).reshape(count, -1)
        parts = jax.lax.all_to_all(own, axis, split_axis=0, concat_axis=0)
        zeros = jnp.where(False, parts[0], -0.0)  # of a type that may differ, as the parts do
        mean = mean_over_workers(lambda part: part, parts, zeros)
        return gather(mean, axis).reshape(-1)[: x.size].reshape(x.shape)

    return jax.tree.map(of_array, tree)
