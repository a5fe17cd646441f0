"""Momentum variance reduction: MVR-1, MVR-2 and MVR-3."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dropmuon_jax._checks import check_choice, check_floating, static_int
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.trees import restructure_like
from dropmuon_jax.schedules import check_decay_or_schedule, check_q_or_schedule
from dropmuon_jax.transforms.masked import masked_transformation
from dropmuon_jax.transforms.momentum import wide_dtype, zeros_of
from dropmuon_jax.transforms.prev_params import PrevParamsState, init_prev_params, remember

Start = Literal["gradient", "zero"]
OnReactivate = Literal["correct", "restart", "decay"]

# The paper's experiments (arXiv:2512.16598).
_DEFAULT_Q = 0.5


class MVRMomentumState(NamedTuple):
    """State of :func:`mvr_momentum`; of a leaf, as of the last step in which it was active."""

    momentum: optax.Updates
    """M, with the structure of the parameters."""
    estimator: optax.Updates
    """G, with the structure of the parameters; empty for variant 1, which has none."""
    prev_params: PrevParamsState
    """X of the previous step, which :func:`prev_params` reads, and the count of all steps."""


@names_counterparts
def mvr_momentum(
    decay: float | jax.Array | optax.Schedule = 0.9,
    *,
    variant: Literal[1, 2, 3] = 1,
    q: float | jax.Array | optax.Schedule | None = None,
    start: Start = "gradient",
    on_reactivate: OnReactivate = "correct",
    dtype: Any = None,
    prev_params_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients of active layers by a momentum with reduced variance (MVR).

    An average of old gradients lags behind: they were taken at other parameters. MVR moves the
    average along. It takes two gradients on each batch ξ_k, g = ∇f(X_k; ξ_k) and
    g' = ∇f(X_{k-1}; ξ_k), and adds their difference, whose noise shrinks with the step:

    .. math::
        \text{MVR-1:}\quad M &\leftarrow g + \text{decay}\,(M - g') \\
        \text{MVR-2:}\quad G &\leftarrow g + (1 - q)(G - g'), \qquad
            M \leftarrow \text{decay}\, M + (1 - \text{decay})\, G \\
        \text{MVR-3:}\quad G &\leftarrow g + (1 - q)(G - g'), \qquad
            M \leftarrow \text{decay}\, M + (1 - \text{decay})\, G + \text{decay}\,(g - g')

    g' is passed to `update` as `prev_params_grads`. In the training step::

        prev_params = dm.prev_params(opt_state, params)
        loss, (grads, prev_grads) = dm.masked_value_and_grad_pair(loss_fn)(
            params, prev_params, batch, layer_mask=mask
        )
        updates, opt_state = tx.update(
            grads, opt_state, params, layer_mask=mask, prev_params_grads=prev_grads
        )

    With all layers in every step, as in :func:`muon`, `layer_mask=None` in the pair, and no mask in
    `update`. The second gradient is **not** that of the step before, on another batch: with it
    MVR-1 is the raw gradient, all of its noise included. With one gradient a step there is
    :func:`mars_momentum`.

    ================= ============ ================================================================
    \                 gradients    memory beside the parameters, in copies of them
    ================= ============ ================================================================
    `momentum`        1            1 (M)
    `mars_momentum`   1            2 (M, last gradient)
    MVR-1             2            2 (M, previous parameters), and a second gradient in the step
    MVR-2, MVR-3      2            3 (M, G, previous parameters), and a second gradient in the step
    ================= ============ ================================================================

    **The optimizers of the theory** are compositions. Gluon-MVR is :func:`gluon` with this momentum
    and the schedules :func:`mvr_radius` and :func:`mvr_decay`; its variants 2 and 3 have a fixed
    decay and `q=dm.schedules.mvr_q()`. Muon-MVR for star-convex problems steps within a ball,
    X ← (1 - γ) X - γ · radius · UVᵀ(M) with decay ≤ 1 - γ: :func:`muon` with the learning rate
    γ · radius and the weight decay 1 / radius. The theory asks for a radius of at least ‖X⁰‖ and
    ‖X*‖ in the spectral norm, so that X stays in a ball with the solution in it. Both are below.

    **Dropped layers** (ours; the papers treat none). A layer that was last active in step j has the
    M of step j. Its previous parameters are therefore those of step j, not of step k - 1: its own
    move is corrected in full, and with it the last moves of the other active layers. Layers that
    are inactive now are the same in both gradients, which saves a forward pass. Moves of others
    while it was inactive remain uncorrected, and so do moves of others that its M has seen already,
    if they are reactivated later. `on_reactivate` says what to do about that:

    * "correct": nothing.
    * "decay": decay and 1 - q count once for each step since j, decay^(k - j).
    * "restart": M = G = g; for exact gradients.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps, such as :func:`mvr_decay`. The weight of the new gradient is 1 - decay.
        variant: 1, 2 or 3. Static.
        q: The weight of the new gradient in the estimator G of variants 2 and 3, in (0, 1]: a
            number, a scalar array or a schedule, such as :func:`mvr_q`; by default 0.5. Variant 1
            has none. Variant 3 with q = 1 is variant 1, and with decay = 0 it is variant 1 of
            decay 1 - q.
        start: "gradient": M = G = g in a leaf's first step. "zero": M = G = 0 before it, and g' = g
            in it, so that M is (1 - decay) g in variant 1. Static.
        on_reactivate: What to do after a layer has been inactive; above. Static.
        dtype: The dtype in which M and G are stored, by default the parameter's. The arithmetic
            is in float32 at least.
        prev_params_dtype: The dtype in which previous parameters are kept, by default theirs. A
            lower one saves memory and defeats the purpose: bfloat16 rounds a parameter by up to
            0.4 %, often more than a step moves it.

    Returns:
        A transformation whose `update` needs `params` and the extra argument `prev_params_grads`,
        with the structure and shapes of the gradients, and takes `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype, and its sign. An inactive leaf has
        update zero and keeps every bit of its state, a :class:`MVRMomentumState`. It looks at the
        mask itself: in :func:`per_layer`, where stacked layers go, say `takes_mask=True`.

        Both gradients must be changed alike: put nothing that changes gradients, such as clipping,
        before it in a chain; scale both before `update`, by
        `factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))`. `optax.MultiSteps` averages
        the first alone: average what :func:`masked_value_and_grad_pair` gives for each micro-batch,
        and update once. `optax.apply_if_finite` looks at the first alone. Gradients in bfloat16 are
        rounded by 0.4 %, which may be more than they differ.

    Raises:
        TypeError: If `variant` is no Python integer or `dtype` not of floating-point numbers; in
            `update`, without `prev_params_grads`, or with the last step's gradient by its name.
        ValueError: For numbers out of range (of schedules the first values), an unknown variant or
            rule, and a `q` for variant 1; in `update`, without `params`, and for gradients of
            another structure, naming a leaf.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.mvr_momentum(decay=0.9)
        >>> gradient = lambda w, noise: {"w": 3.0 * w["w"] + noise}  # of a quadratic
        >>> start, end = {"w": jnp.array([2.0])}, {"w": jnp.array([1.0])}
        >>> _, state = tx.update(gradient(start, 0.0), tx.init(start), start,
        ...                      prev_params_grads=gradient(start, 0.0))
        >>> updates, _ = tx.update(gradient(end, 1.0), state, end,
        ...                        prev_params_grads=gradient(start, 1.0))
        >>> print(updates["w"])  # the gradient is 3, and the average of 6 and 4 would be 5.8
        [3.1]
        >>> params = {"head": jnp.array([[2.0], [-1.0]])}
        >>> gluon_mvr = dm.gluon(
        ...     dm.schedules.mvr_radius(0.5), momentum=dm.mvr_momentum(dm.schedules.mvr_decay())
        ... )
        >>> updates, _ = gluon_mvr.update(
        ...     params, gluon_mvr.init(params), params, prev_params_grads=params
        ... )
        >>> print(updates["head"].T)
        [[-0.25  0.25]]
        >>> params = {"kernel": jnp.eye(2)}
        >>> gamma, radius = dm.schedules.star_convex_rate(), 3.0
        >>> muon_mvr = dm.muon(
        ...     lambda count: radius * gamma(count),
        ...     shape_factor="spectral",
        ...     weight_decay=1 / radius,
        ...     momentum=dm.mvr_momentum(lambda count: 1 - gamma(count)),
        ... )
        >>> updates, _ = muon_mvr.update(
        ...     params, muon_mvr.init(params), params, prev_params_grads=params
        ... )
        >>> new = params["kernel"] + updates["kernel"]  # γ = 1 goes all the way to the boundary
        >>> bool(jnp.allclose(new, -radius * jnp.eye(2), rtol=0.14))
        True

    References:
        Qian, Rammal, Kovalev, Richtárik, *Muon is Provably Faster with Momentum Variance
        Reduction*, 2025, arXiv:2512.16598: Gluon-MVR-1, -2 and -3, as reviews of it state them, and
        the conditions of Theorem 1. The last term of MVR-3, the schedules and the step of Muon-MVR
        are derived, from its special cases, its rates and its conditions. The start is that of
        STORM (Cutkosky and Orabona, 2019, arXiv:1905.10018), of which MVR-1 is the estimator.
    """
    hint = "It is static: under optax.inject_hyperparams name it in static_args."
    if static_int("variant", variant, minimum=1, hint=hint) > 3:
        raise ValueError(f"variant must be 1, 2 or 3, got {variant}.")
    if variant == 1 and q is not None:
        raise ValueError("variant 1 has no q: leave it out, or take variant=2 or 3.")
    q = _DEFAULT_Q if q is None else q
    check_q_or_schedule("q", q)
    check_decay_or_schedule("decay", decay)
    check_choice("start", start, get_args(Start))
    check_choice("on_reactivate", on_reactivate, get_args(OnReactivate))
    for name, given in (("dtype", dtype), ("prev_params_dtype", prev_params_dtype)):
        if given is not None:
            check_floating(name, given)

    def init(params: optax.Params) -> MVRMomentumState:
        return MVRMomentumState(
            zeros_of(params, dtype),
            () if variant == 1 else zeros_of(params, dtype),
            init_prev_params(params, prev_params_dtype),
        )

    def averages(
        leaf: tuple[Array, ...], weights: tuple[Array, Array], last_step: Array, count: Array
    ) -> tuple[Array, Array]:
        """The new M and G of an active leaf, from M, G, g, g' and the weights decay and 1 - q."""
        wide = wide_dtype(leaf[0], leaf[2])
        m, estimator, g, g_prev, decay, keep = (x.astype(wide) for x in (*leaf, *weights))
        is_first = last_step < 0
        steps_since = jnp.where(is_first, 1, count - last_step)
        is_fresh = is_first if start == "gradient" else jnp.zeros_like(is_first)
        if start == "zero":
            g_prev = jnp.where(is_first, g, g_prev)
        if on_reactivate == "restart":
            is_fresh = is_fresh | (steps_since > 1)
        elif on_reactivate == "decay":
            decay, keep = (jax.lax.pow(weight, steps_since) for weight in (decay, keep))

        if variant == 1:
            estimator = m = g + decay * (m - g_prev)
        else:
            estimator = g + keep * (estimator - g_prev)
            m = decay * m + (1 - decay) * estimator
            if variant == 3:
                m = m + decay * (g - g_prev)
        return jnp.where(is_fresh, g, m), jnp.where(is_fresh, g, estimator)

    def update(
        updates: optax.Updates, state: Any, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, MVRMomentumState]:
        prev_grads = extra_args.get("prev_params_grads")
        if prev_grads is None:
            raise TypeError(_missing_second_gradient(extra_args))
        prev_grads = restructure_like("prev_params_grads", prev_grads, updates)
        remembered = remember(state.prev_params, params, layer_mask, name="mvr_momentum")
        _, last_step, count = state.prev_params
        weights = (
            jnp.asarray(decay(count) if callable(decay) else decay),
            1 - jnp.asarray(q(count) if callable(q) else q),
        )
        directions, structure = jax.tree.flatten(updates)
        momentum, treedef = jax.tree.flatten(state.momentum)
        estimator = list(momentum) if variant == 1 else jax.tree.leaves(state.estimator)
        seconds, flags = jax.tree.leaves(prev_grads), jax.tree.leaves(layer_mask)
        for i, (g, g_prev, is_active) in enumerate(zip(directions, seconds, flags, strict=True)):
            if not is_active:
                directions[i] = jnp.zeros_like(g)
                continue
            leaf = momentum[i], estimator[i], g, g_prev
            m, new_estimator = averages(leaf, weights, last_step[i], count)
            directions[i] = m.astype(g.dtype)
            momentum[i] = m.astype(momentum[i].dtype)
            estimator[i] = new_estimator.astype(estimator[i].dtype)
        new_state = MVRMomentumState(
            treedef.unflatten(momentum),
            () if variant == 1 else treedef.unflatten(estimator),
            remembered,
        )
        return structure.unflatten(directions), new_state

    return masked_transformation(init, update)


def _missing_second_gradient(extra_args: Mapping[str, Any]) -> str:
    """The message for an `update` without the second gradient, which may have another name."""
    message = (
        "mvr_momentum needs the extra argument 'prev_params_grads', the gradient of this batch at "
        "the previous parameters: take both with dm.masked_value_and_grad_pair(loss_fn)(params, "
        "dm.prev_params(opt_state, params), batch, layer_mask=…)."
    )
    for name in extra_args:
        words = set(name.lower().split("_"))
        is_gradient = words & {"g", "grad", "grads", "gradient", "gradients"}
        if is_gradient and words & {"prev", "previous", "last", "old"} and "param" not in name:
            return (
                f"update() got {name!r}, which sounds like the gradient of the last step, on "
                f"another batch. With it MVR is the raw gradient. {message} With one gradient a "
                "step take dm.transforms.mars_momentum, which remembers the last one itself."
            )
        if difflib.get_close_matches(name.lower(), ("prev_params_grads",), n=1, cutoff=0.75):
            return f"update() got {name!r}. Did you mean 'prev_params_grads'? {message}"
    return message
