"""Momentum variance reduction: MVR-1, MVR-2 and MVR-3."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from dropmuon_jax._checks import check_choice, check_floating, static_int
from dropmuon_jax._layers import restructure_like
from dropmuon_jax._masks import resolve_mask
from dropmuon_jax._momentum._prev_params import PrevParamsState, init_prev_params, remember
from dropmuon_jax._momentum._schedules import check_decay_or_schedule, check_q_or_schedule
from dropmuon_jax._momentum._second_gradient import missing_second_gradient

Start = Literal["gradient", "zero"]
OnWaking = Literal["correct", "restart", "decay"]
Scalar = Float[Array, ""]

# The paper's experiments (arXiv:2512.16598).
_DEFAULT_Q = 0.5


class MVRMomentumState(NamedTuple):
    """State of :func:`mvr_momentum`; of a leaf, as of the last step in which it was active."""

    momentum: optax.Updates
    """M, with the structure of the parameters."""
    estimator: optax.Updates
    """G, likewise; empty for variant 1, which has none."""
    prev_params: PrevParamsState
    """X of the previous step, which :func:`prev_params` reads, and the count of all steps."""


def mvr_momentum(
    decay: float | jax.Array | optax.Schedule = 0.9,
    *,
    variant: Literal[1, 2, 3] = 1,
    q: float | jax.Array | optax.Schedule | None = None,
    start: Start = "gradient",
    on_waking: OnWaking = "correct",
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

    **When it pays.** It removes the lag of an average, which grows with the steps and with
    1 / (1 - decay), and adds the noise of the differences. The rate K^-⅓ can be seen beside K^-¼
    (`benchmarks/convergence_rates.py`), and on a quadratic M is closer to the gradient
    (`estimator_error.py`). In training a transformer it has not paid, with batches of 8 to 256 and
    decays 0.2 to 0.9: averages with twice the steps or twice the batch ended lower wherever they
    took part, and MVR-2 was at best level with an average after equal steps (`momentum.py`).

    **Dropped layers** (ours; the papers treat none). A layer that slept since step j has the M of
    step j. Its previous parameters are therefore those of step j, not of step k - 1: its own move
    is corrected in full, and with it the last moves of the other active layers; layers that sleep
    now are the same in both gradients, which saves a forward pass. What remains wrong is the moves
    of others while it slept, and moves of others that its M has seen already, if they wake later.
    `on_waking` says what to do about that:

    * "correct": nothing. Of the nine rules that `estimator_error.py` compares for MVR-1 and MVR-3
      on a quadratic of six layers, with depths drawn uniformly, it has the smallest error of M in
      38 of 48 configurations; with the parameters of step k - 1 in 2 or none.
    * "decay": decay and 1 - q count once for each step since j, decay^(k - j). Its error is 0.8
      times that of "correct" where there is nearly no noise, and 1.3 times where there is.
    * "restart": M = G = g. 1.9 times, and 4 times; for exact gradients.

    Args:
        decay: The weight of the past, in [0, 1): a number, a scalar array or a schedule of it over
            all steps, such as :func:`mvr_decay`. The weight of the new gradient is 1 - decay.
        variant: 1, 2 or 3. Static.
        q: The weight of the new gradient in the estimator G of variants 2 and 3, in (0, 1]: a
            number, a scalar array or a schedule, such as :func:`mvr_q`; by default 0.5. Variant 1
            has none. Variant 3 with q = 1 is variant 1, and with decay = 0 it is variant 1 of
            decay 1 - q.
        start: "gradient": M = G = g in a leaf's first step. "zero": M = G = 0 before it, and g' = g
            in it, so that M is (1 - decay) g in variant 1.
        on_waking: What to do after a layer has slept; above. Static.
        dtype: The dtype in which M and G are stored, by default the parameter's. The arithmetic
            is in float32 at least.
        prev_params_dtype: The dtype in which previous parameters are kept, by default theirs. A
            lower one saves memory and costs the point: bfloat16 rounds a parameter by up to 0.4 %,
            often more than a step moves it.

    Returns:
        A transformation whose `update` needs `params` and the extra argument `prev_params_grads`,
        with the structure and shapes of the gradients, and takes `layer_mask` (by default all
        active). Updates have the gradient's shape and dtype, and its sign. An inactive leaf has
        update zero and keeps every bit of its state, a :class:`MVRMomentumState`. It looks at the
        mask itself: in :func:`per_layer`, where stacked layers go, say `takes_mask=True`.

        What changes gradients before it must change both alike. So nothing stands before it in a
        chain that does, such as clipping; scale both before `update`, by
        `factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))`. `optax.MultiSteps` averages
        the first alone: average what :func:`masked_value_and_grad_pair` gives for each micro-batch,
        and update once. `optax.apply_if_finite` looks at the first alone. Gradients in bfloat16 are
        rounded by 0.4 %, which may be more than they differ.

    Raises:
        TypeError: If `variant` is no Python integer or `dtype` not of floating-point numbers; in
            `update`, without `prev_params_grads`, or with the last step's gradient by its name.
        ValueError: For numbers out of range (of schedules the first values), an unknown variant or
            rule, and a `q` for variant 1;
            in `update`, without `params`, and for gradients of another structure, naming a leaf.

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

    References:
        Qian, Rammal, Kovalev, Richtárik, *Muon is Provably Faster with Momentum Variance
        Reduction*, 2025, arXiv:2512.16598: Gluon-MVR-1, -2 and -3, as reviews of it state them; the
        last term of MVR-3 is derived from its special cases. The start is that of STORM (Cutkosky
        and Orabona, 2019, arXiv:1905.10018), of which MVR-1 is the estimator.
    """
    _check_variant(variant)
    if variant == 1 and q is not None:
        raise ValueError("variant 1 has no q: leave it out, or take variant=2 or 3.")
    check_q_or_schedule("q", _DEFAULT_Q if q is None else q)
    check_decay_or_schedule("decay", decay)
    check_choice("start", start, get_args(Start))
    check_choice("on_waking", on_waking, get_args(OnWaking))
    for name, given in (("dtype", dtype), ("prev_params_dtype", prev_params_dtype)):
        if given is not None:
            check_floating(name, given)

    def init_fn(params: optax.Params) -> MVRMomentumState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or p.dtype), params)

        return MVRMomentumState(
            zeros(),
            () if variant == 1 else zeros(),
            init_prev_params(params, prev_params_dtype),
        )

    def update_fn(
        updates, state, params=None, *, layer_mask=None, prev_params_grads=None, **extra_args
    ):
        layer_mask = resolve_mask(layer_mask, updates, extra_args)
        if not isinstance(state, MVRMomentumState) or not _has_estimator(state, variant):
            raise TypeError(
                f"The state given to mvr_momentum is none of variant {variant}: make one with "
                "tx.init(params), as for a run that goes on with another momentum."
            )
        if prev_params_grads is None:
            raise TypeError(missing_second_gradient(extra_args))
        prev_grads = restructure_like("prev_params_grads", prev_params_grads, updates)
        remembered = remember(state.prev_params, params, layer_mask, name="mvr_momentum")
        count, last_step = state.prev_params.count, state.prev_params.last_step
        past = jnp.asarray(decay(count) if callable(decay) else decay)
        q_now = _DEFAULT_Q if q is None else q(count) if callable(q) else q
        past_of_estimator = 1 - jnp.asarray(q_now)

        leaves, treedef = jax.tree.flatten(state.momentum)
        estimators = leaves if variant == 1 else jax.tree.leaves(state.estimator)
        gradients = zip(*map(jax.tree.leaves, (updates, prev_grads, layer_mask)), strict=True)
        momentum, estimator, directions = list(leaves), list(estimators), []
        for i, (g, g_prev, active) in enumerate(gradients):
            if not active:
                directions.append(jnp.zeros_like(g))
                continue
            wide = np.result_type(np.float32, leaves[i].dtype, g.dtype)
            new, new_estimator = _step(
                (leaves[i].astype(wide), estimators[i].astype(wide)),
                (g.astype(wide), g_prev.astype(wide)),
                (past.astype(wide), past_of_estimator.astype(wide)),
                variant=variant,
                first=last_step[i] < 0,
                steps_since=jnp.where(last_step[i] < 0, 1, count - last_step[i]),
                start=start,
                on_waking=on_waking,
            )
            directions.append(new.astype(g.dtype))
            momentum[i] = new.astype(leaves[i].dtype)
            estimator[i] = new_estimator.astype(estimators[i].dtype)
        new_state = MVRMomentumState(
            treedef.unflatten(momentum),
            () if variant == 1 else treedef.unflatten(estimator),
            remembered,
        )
        return jax.tree.unflatten(jax.tree.structure(updates), directions), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(
    averages: tuple[Array, Array],
    gradients: tuple[Array, Array],
    past: tuple[Scalar, Scalar],
    *,
    variant: int,
    first: Bool[Array, ""],
    steps_since: Int[Array, ""],
    start: Start,
    on_waking: OnWaking,
) -> tuple[Array, Array]:
    """M and G of an active leaf after a step.

    Args:
        averages: M and G before it.
        gradients: g and g'.
        past: The weights of M and of G: decay and 1 - q.
        variant: 1, 2 or 3.
        first: Whether it is the leaf's first step.
        steps_since: The steps since the last one in which the leaf was active, that one included.
        start: What to do in the first step.
        on_waking: What to do if the leaf slept.
    """
    (m, estimator), (g, g_prev) = averages, gradients
    fresh = first if start == "gradient" else jnp.zeros_like(first)
    if start == "zero":
        g_prev = jnp.where(first, g, g_prev)
    if on_waking == "restart":
        fresh = fresh | (steps_since > 1)
    elif on_waking == "decay":
        past = past[0] ** steps_since, past[1] ** steps_since
    decay, keep = past

    if variant == 1:
        estimator = new = g + decay * (m - g_prev)
    else:
        estimator = g + keep * (estimator - g_prev)
        new = decay * m + (1 - decay) * estimator
        if variant == 3:
            new = new + decay * (g - g_prev)
    return jnp.where(fresh, g, new), jnp.where(fresh, g, estimator)


def _has_estimator(state: MVRMomentumState, variant: int) -> bool:
    """Whether a state has G if and only if the variant has."""
    num_leaves = 0 if variant == 1 else len(jax.tree.leaves(state.momentum))
    return len(jax.tree.leaves(state.estimator)) == num_leaves


def _check_variant(variant: Any) -> None:
    integer = static_int(
        "variant",
        variant,
        minimum=1,
        hint="It is static: under optax.inject_hyperparams name it in static_args.",
    )
    if integer > 3:
        raise ValueError(f"variant must be 1, 2 or 3, got {variant}.")
