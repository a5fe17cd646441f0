"""The previous parameters, at which variance reduction takes the second gradient of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dropmuon_jax._checks import check_floating
from dropmuon_jax.layers.trees import leaf_keys, leaf_paths, map_active, restructure_like
from dropmuon_jax.transforms.masked import masked_transformation
from dropmuon_jax.transforms.momentum import active_entries, num_entries


class PrevParamsState(NamedTuple):
    """State of :func:`keep_prev_params`, and a part of that of :func:`mvr_momentum`."""

    params: optax.Params
    """X of each leaf before the last step in which it was active; at first the initial X."""
    last_step: Int[Array, " leaves"]
    """Which step that was, -1 before the first; a single entry where there are no leaves."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps."""


def keep_prev_params(dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """Passes the gradients on, and keeps the parameters for :func:`prev_params`.

    :func:`mvr_momentum` keeps the parameters of its own leaves. This is for leaves that other
    chains step: the second gradient of a batch is that of the whole network at its previous
    parameters. :func:`muon` and :func:`drop_muon` put it where it is needed.

    Args:
        dtype: The dtype in which parameters are kept, by default theirs.

    Returns:
        A transformation whose `update` needs `params` and takes the extra argument `layer_mask`
        (by default all active). The gradients of active leaves are returned as they are; an
        inactive leaf has update zero and keeps every bit of its state, a :class:`PrevParamsState`.

    Raises:
        TypeError: At construction, if `dtype` is not of floating-point numbers.
        ValueError: In `update`, without `params`.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tx = optax.chain(dm.transforms.keep_prev_params(), optax.sgd(0.5))
        >>> params = {"w": jnp.array([2.0])}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params["w"], dm.prev_params(state, params)["w"])
        [1.] [2.]
    """
    if dtype is not None:
        check_floating("dtype", dtype)

    def update(
        updates: optax.Updates, state: Any, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, PrevParamsState]:
        del extra_args
        state = remember(state, params, layer_mask, name="keep_prev_params")
        return map_active(lambda update: update, layer_mask, updates), state

    return masked_transformation(lambda params: init_prev_params(params, dtype), update)


def prev_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters before the last step, as the state of an optimizer with MVR keeps them.

    With dropped layers each leaf is as it was before the last step in which it was active, which is
    what :func:`masked_value_and_grad_pair` takes.

    Args:
        opt_state: The state of an optimizer that contains :func:`mvr_momentum`, before `update`.
        params: The parameters, all of them.

    Returns:
        A tree like `params`; before the first step the parameters that `init` saw.

    Raises:
        ValueError: If the state keeps no parameters, or not those of every leaf, naming one; for
            the state of `optax.MultiSteps`, which would lose gradients.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tx = optax.chain(dm.mvr_momentum(), optax.scale(-1.0))
        >>> params = {"w": jnp.array([2.0])}
        >>> updates, state = tx.update(params, tx.init(params), params, prev_params_grads=params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(params["w"], dm.prev_params(state, params)["w"])
        [0.] [2.]
    """
    for node in jax.tree.leaves(opt_state, is_leaf=_accumulates):
        if _accumulates(node) and keeps_prev_params(node.inner_opt_state):
            raise ValueError(
                "optax.MultiSteps averages the gradients of its micro-batches, and not "
                "prev_params_grads, of which the optimizer would see the last alone. Leave it out: "
                "average both gradients of dm.masked_value_and_grad_pair over the micro-batches, "
                "and update once."
            )
    found = _kept_leaves(opt_state)
    leaves, treedef = jax.tree.flatten(params)
    keys = leaf_keys(params)
    if not all(key in found for key in keys):
        path = next(
            path for key, path in zip(keys, leaf_paths(params), strict=True) if key not in found
        )
        way_out = (
            "Put dm.transforms.keep_prev_params() first into the chain that steps it, in muon as "
            "auxiliary=optax.chain(dm.transforms.keep_prev_params(), optax.scale_by_adam())."
            if found
            else "Is there a dm.mvr_momentum in the optimizer, and is this its state?"
        )
        raise ValueError(f"opt_state keeps no previous parameters of '{path}'. {way_out}")
    previous = treedef.unflatten(
        found[key].astype(leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    )
    return restructure_like("opt_state's params", previous, params, reference_name="parameters")


def _kept_leaves(opt_state: optax.OptState) -> dict[str, Array]:
    """The previous parameters in a state, by the key of their leaf."""
    found: dict[str, Array] = {}
    for node in filter(_keeps_params, jax.tree.leaves(opt_state, is_leaf=_keeps_params)):
        kept = jax.tree.leaves(node.params)
        keys = leaf_keys(node.params)
        repeated = [i for i, key in enumerate(keys) if key in found]
        if repeated:
            path = leaf_paths(node.params)[repeated[0]]
            raise ValueError(
                f"opt_state keeps the previous parameters of '{path}' twice. Give the state of one "
                "optimizer, with dm.transforms.keep_prev_params() only in chains without "
                "mvr_momentum."
            )
        found.update(zip(keys, kept, strict=True))
    return found


def keeps_prev_params(opt_state: Any) -> bool:
    """Whether some part of a state keeps parameters."""
    return any(map(_keeps_params, jax.tree.leaves(opt_state, is_leaf=_keeps_params)))


def init_prev_params(params: optax.Params, dtype: Any = None) -> PrevParamsState:
    """The state before the first step. Copies, so that parameters and state can be donated."""
    canonical = jax.dtypes.canonicalize_dtype
    return PrevParamsState(
        jax.tree.map(lambda p: jnp.array(p, dtype=canonical(dtype or p.dtype), copy=True), params),
        jnp.full(num_entries(params), -1, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def remember(
    state: PrevParamsState, params: optax.Params | None, layer_mask: Any, *, name: str
) -> PrevParamsState:
    """The state after a step in which the leaves of a mask are active; messages say `name`."""
    if params is None:
        raise ValueError(
            f"{name} keeps the parameters: pass them to update, "
            "tx.update(grads, opt_state, params)."
        )
    params = restructure_like("params", params, state.params, reference_name="state")
    return PrevParamsState(
        copied_like(state.params, params, layer_mask),
        jnp.where(active_entries(layer_mask), state.count, state.last_step),
        jnp.asarray(optax.safe_increment(state.count)),
    )


def copied_like(old: Any, new: Any, layer_mask: Any) -> Any:
    """Copies of the new leaves where they are active, in the dtypes of the old ones.

    Copies, so that a step that donates parameters and state does not donate one buffer twice.
    """
    leaves, treedef = jax.tree.flatten(old)
    return treedef.unflatten(
        jnp.array(fresh, dtype=kept.dtype, copy=True) if active else kept
        for kept, fresh, active in zip(
            leaves, jax.tree.leaves(new), jax.tree.leaves(layer_mask), strict=True
        )
    )


def _keeps_params(node: Any) -> bool:
    return isinstance(node, PrevParamsState)


def _accumulates(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)
