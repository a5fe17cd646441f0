"""The side of the server: its model X, the model W of workers, and what is before a first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array

from dropmuon_jax._checks import check_transformation, describe
from dropmuon_jax.compression.compressors import Compressor, check_contractive, check_seed
from dropmuon_jax.compression.error_feedback import EF21State, cuts_of
from dropmuon_jax.compression.exchange import WorkerState
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.prefixes import given_mask
from dropmuon_jax.layers.states import checked_transformation
from dropmuon_jax.layers.trees import leaf_keys, restructure_like
from dropmuon_jax.transforms.momentum import MomentumState


class ServerModelState(NamedTuple):
    """State of :func:`server_model`."""

    inner_state: optax.OptState
    """Of the optimizer, which steps X."""
    params: optax.Params
    """X, the model of the server."""
    memory: Any
    """Of the compressor, by leaf."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps."""


def server_model(
    optimizer: optax.GradientTransformation,
    compressor: Compressor,
    *,
    norm: str = "spectral",
    seed: int | jax.Array = 0,
    layers: Layers | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an optimizer step a model X of the server, of which workers get what is new.

    .. math::
        X \leftarrow X + \text{step}(G), \qquad S = C(X - W), \qquad W \leftarrow W + S

    The parameters that `update` is given, and the loss is differentiated at, are W; its updates are
    S, the payload of which a server would send to each worker. X is in the state:
    :func:`server_params` finds it. Say of a loss whether it is that of X or of W; they can differ
    by far.

    Where workers gather the payloads of :func:`ef21` from each other, each of them runs the server
    by itself and needs to be sent nothing, so this saves no byte there. It is the method as it is
    written, for servers that do send, and to see what their compression costs.

    Inactive layers are not sent: their X and W stay as they are. With :class:`Identity` W is X, bit
    for bit.

    Args:
        optimizer: The whole optimizer. It is given X as the parameters, which matters for weight
            decay and constrained steps.
        compressor: C, such as :class:`RandomDropout` or :class:`Damping`. Its key is the same for
            all workers.
        norm: A norm in which `compressor` must be contractive: that of the step, in the theory. Of
            Muon's spectral norm few are; "frobenius" holds with the constants of norm equivalence.
        seed: Of a compressor that draws.
        layers: The layers, needed if some are stacked, or where `depth` is given to `update`.
        dimension_numbers: As in :func:`ef21`.

    Returns:
        A transformation whose `update` needs `params`, which are W, and hands on all extra
        arguments. The state is a :class:`ServerModelState`.

    Raises:
        TypeError: If `optimizer` or `compressor` are none.
        ValueError: If `compressor` is not contractive in the norm; in `update`, without `params`.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tx = dm.compression.server_model(optax.sgd(1.0), dm.compression.Damping(0.5))
        >>> w = {"w": jnp.zeros(2)}
        >>> updates, state = tx.update({"w": jnp.array([4.0, 2.0])}, tx.init(w), w)
        >>> w = optax.apply_updates(w, updates)
        >>> print(w["w"], dm.compression.server_params(state, w)["w"])
        [-2. -1.] [-4. -2.]

    References:
        Gruntkowska, Maziane, Qu, Richtárik and others, *EF21-Muon*, 2025, arXiv:2510.00643.
    """
    check_transformation("optimizer", optimizer)
    check_contractive(compressor, norm, name="server compressor")
    check_dimension_numbers(dimension_numbers)
    check_seed(seed)
    inner = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> ServerModelState:
        cuts = cuts_of(compressor, params, layers, dimension_numbers)
        memory = [compressor.init(cut.shape, cut.dtype) for cut in cuts]
        memory = jax.tree.structure(params).unflatten(memory)
        copies = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return ServerModelState(inner.init(params), copies, memory, jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *, layer_mask=None, depth=None, **extra_args):
        if params is None:
            raise ValueError(
                "server_model sends what the model of the workers lacks: pass it to update, "
                "tx.update(grads, opt_state, params)."
            )
        if depth is not None:
            if layers is None:
                raise TypeError("depth is for server_model(…, layers=layers).")
            layer_mask = given_mask(layers, updates, layer_mask, depth)
        masked = {} if layer_mask is None else {"layer_mask": layer_mask}
        steps, inner_state = inner.update(
            updates, state.inner_state, state.params, **masked, **extra_args
        )
        model: Any = optax.apply_updates(state.params, steps)
        if not compressor.is_exact:
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            cuts = cuts_of(compressor, params, layers, dimension_numbers)
            mask = jax.tree.map(lambda _: True, params) if layer_mask is None else layer_mask
            treedef, sent = jax.tree.structure(params), []
            memory = treedef.flatten_up_to(state.memory)
            leaves = zip(cuts, *map(jax.tree.leaves, (mask, model, params)), strict=True)
            for i, (cut, flag, x, w) in enumerate(leaves):
                step, rows = jnp.full_like(w, -0.0), cut.active(flag)
                if rows is not None:
                    new, of_leaf = cut.take(x, rows) - cut.take(w, rows), cut.key(key)
                    remembered = jax.tree.map(lambda of, rows=rows: of[rows], memory[i])
                    payload = compressor.compress(new, jax.random.fold_in(of_leaf, 1), remembered)
                    fresh = compressor.remember(payload, new)
                    memory[i] = jax.tree.map(
                        lambda of, to, rows=rows: of.at[rows].set(to), memory[i], fresh
                    )
                    arrived = compressor.decompress(payload, new)
                    if (is_sent := compressor.is_sent(of_leaf)) is not None:
                        arrived = jnp.where(is_sent, arrived, -0.0)
                    step = cut.put(step, rows, arrived)
                sent.append(step)
            steps, state = treedef.unflatten(sent), state._replace(memory=treedef.unflatten(memory))
        count = jnp.asarray(optax.safe_increment(state.count))
        return steps, ServerModelState(inner_state, model, state.memory, count)

    return checked_transformation(init_fn, update_fn)


def server_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """X, the model of the server; the parameters W themselves if no server is compressed.

    Args:
        opt_state: The state of an optimizer.
        params: W, the parameters that are trained.

    Raises:
        ValueError: If the state has several models, or one of other leaves.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params, tx = {"w": jnp.eye(2)}, dm.muon(0.1)
        >>> dm.compression.server_params(tx.init(params), params) is params
        True
    """

    def is_server(node: Any) -> bool:
        return isinstance(node, ServerModelState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_server) if is_server(node)]
    if len(found) > 1:
        raise ValueError("opt_state has several models of a server: one around all is meant.")
    if not found:
        return params
    return restructure_like("the model of the server", found[0].params, params)


def start_from_gradients(opt_state: optax.OptState, grads: optax.Updates) -> optax.OptState:
    """The state with M_j = G_j = the given gradients, and G their mean: where the theory starts.

    The gradients are sent as they are, once. The first step, on the same batches and with M_j an
    average, then finds nothing new and steps along G.

    Args:
        opt_state: The state of :func:`on_workers` of an optimizer with :func:`ef21` in it, before
            the first step.
        grads: The gradients of all workers, with a leading axis of workers.

    Raises:
        ValueError: If the state has no :func:`ef21`, or the gradients lack one of its leaves.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.compression.ef21(dm.compression.TopK(1), momentum=0.9)
        >>> tx, params = dm.compression.on_workers(tx, 2), {"w": jnp.zeros(2)}
        >>> grads = {"w": jnp.array([[4.0, 3.0], [2.0, 1.0]])}
        >>> state = dm.compression.start_from_gradients(tx.init(params), grads)
        >>> updates, state = tx.update(grads, state, params)
        >>> print(updates["w"])
        [3. 2.]
    """
    known = dict(zip(leaf_keys(grads), jax.tree.leaves(grads), strict=True))
    found = False

    def fill(tree: Any, function: Callable[[Array, Array], Array]) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        keys = leaf_keys(tree)
        if missing := [key for key in keys if key not in known]:
            raise ValueError(f"grads has no leaf {missing[0]}, which the state has.")
        return treedef.unflatten([function(x, known[k]) for k, x in zip(keys, leaves, strict=True)])

    def as_given(x: Array, grad: Array) -> Array:
        if x.shape != grad.shape:
            raise ValueError(
                f"grads has shape {grad.shape}, and the state {x.shape}: give those of all workers,"
                " to the state of dm.compression.on_workers(optimizer, workers).init(params)."
            )
        return grad.astype(x.dtype)

    def start(node: Any) -> Any:
        nonlocal found
        if isinstance(node, MomentumState):
            return node._replace(momentum=fill(node.momentum, as_given))
        if not isinstance(node, EF21State):
            return node
        found = True
        inner = jax.tree.map(start, node.worker.inner_state, is_leaf=_is_momentum)
        worker = node.worker._replace(
            inner_state=inner, estimate=fill(node.worker.estimate, as_given)
        )
        mean = fill(node.estimate, lambda x, grad: jnp.mean(grad.astype(x.dtype), axis=0))
        return node._replace(worker=worker, estimate=mean)

    started = jax.tree.map(start, opt_state, is_leaf=lambda node: isinstance(node, EF21State))
    if not found:
        raise ValueError("opt_state has no dm.compression.ef21 to start.")
    return started


def _is_momentum(node: Any) -> bool:
    return isinstance(node, MomentumState)


def check_processes(opt_state: optax.OptState) -> None:
    """Error if processes have made their optimizers with other compressors or seeds.

    They would read each other's payloads as something else, or wait for each other forever. Call it
    once, before the first step; it does nothing in a single process.

    Raises:
        TypeError: If the state is traced.
        ValueError: If processes differ, saying how; or if no part of the state has a compressor.
    """

    def sends(node: Any) -> bool:  # of ef21 and norm_ec, and not any state that has settings
        return isinstance(getattr(node, "worker", None), WorkerState)

    nodes = filter(sends, jax.tree.leaves(opt_state, is_leaf=sends))
    settings = [node.settings for node in nodes]
    if not settings:
        raise ValueError(
            f"opt_state has no part that sends anything: {describe(opt_state)}. Give the state of "
            "an optimizer with dm.compression.ef21 or dm.privacy.norm_ec in it."
        )
    if any(isinstance(x, Tracer) for x in settings):
        raise TypeError("check_processes compares values: call it outside of jax.jit.")
    if jax.process_count() == 1:
        return
    # Imported here for the sake of one process, where it would take time for nothing.
    from jax.experimental import multihost_utils

    here = [x.addressable_data(0) if isinstance(x, jax.Array) else x for x in settings]
    mine = np.concatenate([np.ravel(np.asarray(x)) for x in here])
    everyone = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    if (everyone == everyone[0]).all():
        return
    says = (
        f"process {i} has seed {of[0]} and compressor {of[1]:08x}"
        for i, of in enumerate(everyone.reshape(len(everyone), -1, 2)[:, 0].tolist())
    )
    raise ValueError(
        f"The processes would not understand each other's payloads: {'; '.join(says)}. Give all "
        "one seed, and the same compressors in the same order."
    )
