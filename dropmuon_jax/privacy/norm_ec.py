"""Gradients of clients, bounded in length and with noise: α-NormEC, Clip21 and DP-SGD.

What a client sends is at most of length 1, or of the clip, whatever its data.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, UInt32

from dropmuon_jax._checks import check_choice, check_nonnegative, check_positive, describe
from dropmuon_jax.compression.error_feedback import wide_zeros
from dropmuon_jax.compression.exchange import WorkerState, mean_of_arrays, worker_place
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.privacy.guarantees import PrivacyPlan, checked_seed, with_noise
from dropmuon_jax.transforms.masked import masked_transformation


class NormECState(NamedTuple):
    """State of :func:`norm_ec`, :func:`clip21` and :func:`bounded_mean`."""

    worker: WorkerState
    """g_i, of each client its own, without noise: it is never sent."""
    estimate: optax.Updates
    """ĝ, which all have."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of rounds."""
    settings: UInt32[Array, " 2"]
    """The seed, and a checksum of the arguments, which all processes must share."""
    noise_multiplier: Array
    """Of the plan; 0 without one."""


def norm_ec(
    alpha: float,
    beta: float,
    *,
    plan: PrivacyPlan | None = None,
    server_normalization: bool = True,
    by: Literal["tree", "leaf"] = "tree",
    norm: Norm | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    axis: str | None = "workers",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""α-NormEC: clients send smoothly normalised errors, of length below 1, and keep what is left.

    .. math::
        \Delta_i &= \frac{\nabla f_i(x) - g_i}{\alpha + \|\nabla f_i(x) - g_i\|}, \qquad
        g_i \leftarrow g_i + \beta \Delta_i \\
        \hat g &\leftarrow \hat g + \tfrac{\beta}{n} \textstyle\sum_i (\Delta_i + z_i), \qquad
        z_i \sim N(0, \sigma^2 I)

    and the update is ĝ, or ĝ / ‖ĝ‖ with server normalisation. Noise is drawn by each client for
    itself, and is in no client's g_i: it adds up in ĝ, to βσ √(rounds / n) in each entry, so that
    private runs want a small β. The mean is over all n clients of the axis, whatever their data.

    A client's error stays below R = max ‖∇f_i(x⁰) - g_i⁰‖ if steps are short: :func:`safe_step`. It
    starts from g_i = ĝ = 0.

    Args:
        alpha: α, at least 0.
        beta: β > 0, how much of what is sent is added.
        plan: Adds its noise, and sends zeros after its rounds: then updates are zero, and outside
            of `jax.jit` an error. Needs `by="tree"` in the Euclidean norm, for which a message is
            at most 1 long. None for no noise.
        server_normalization: Whether the update has length 1.
        by: "tree", of all leaves together, or "leaf", each for itself.
        norm: Of a leaf, with `by="leaf"`; by default the Euclidean norm.
        dimension_numbers: Of that norm, of every leaf.
        axis: The axis of clients, as in :func:`~dropmuon_jax.compression.ef21`.
        seed: Of the noise, needed with a plan. Who knows it can take the noise away, so give one
            that nobody can guess, such as `secrets.randbits(32)`, and keep it for restarts.

    Returns:
        A transformation with a :class:`NormECState`. It takes no `layer_mask` that leaves out
        leaves.

    Raises:
        TypeError, ValueError: For bad arguments; in `update`, outside of the axis, for a mask, or
            after the last round of the plan.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.privacy.norm_ec(1.0, 0.5, server_normalization=False, axis=None)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> print(updates["w"].round(3))  # of [0.5, 0.667] the part β
        [0.25  0.333]

    References:
        Shulgin, Malinovsky, Khirirat, Richtárik and others, α-NormEC, 2025, arXiv:2502.13482, as
        it is told by secondary sources; the paper has no accountant and no constants of privacy.
    """
    check_nonnegative("alpha", alpha)
    check_positive("beta", beta)
    bound = functools.partial(_normalized, alpha=alpha)
    name = f"norm_ec({alpha}, {beta}, {server_normalization}, {by}, {norm}, {plan})"
    form = _Form(name, bound, 1.0, beta, True, server_normalization, by, norm, dimension_numbers)
    return _bounded(form, plan, axis, seed)


def clip21(
    clip_norm: float,
    *,
    plan: PrivacyPlan | None = None,
    server_normalization: bool = False,
    axis: str | None = "workers",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip21: as :func:`norm_ec`, with errors that are clipped to a length, and β = 1.

    .. math::
        \Delta_i = \min\left(1, \tfrac{\tau}{\|\nabla f_i(x) - g_i\|}\right)
        (\nabla f_i(x) - g_i), \qquad g_i \leftarrow g_i + \Delta_i

    Args:
        clip_norm: τ > 0; a plan's noise is multiplied by it.
        plan: As in :func:`norm_ec`.
        server_normalization: As there.
        axis: As there.
        seed: As there.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.privacy.clip21(2.5, axis=None)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> print(updates["w"])
        [1.5 2. ]
    """
    check_positive("clip_norm", clip_norm)
    bound = functools.partial(_clipped, limit=clip_norm)
    name = f"clip21({clip_norm}, {server_normalization}, {plan})"
    form = _Form(name, bound, clip_norm, 1.0, True, server_normalization)
    return _bounded(form, plan, axis, seed)


def bounded_mean(
    *,
    alpha: float | None = None,
    clip_norm: float | None = None,
    plan: PrivacyPlan | None = None,
    server_normalization: bool = False,
    axis: str | None = "workers",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The mean of the clients' bounded gradients, with noise and without error feedback: DP-SGD.

    Args:
        alpha: Normalises as :func:`norm_ec`; or
        clip_norm: clips as :func:`clip21`. One of the two.
        plan: As in :func:`norm_ec`, and so on.
        server_normalization: As there.
        axis: As there.
        seed: As there.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.privacy.bounded_mean(alpha=0.0, axis=None)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> print(tx.update(grads, tx.init(grads))[0]["w"])
        [0.6 0.8]
    """
    if alpha is not None and clip_norm is None:
        check_nonnegative("alpha", alpha)
        bound, length = functools.partial(_normalized, alpha=alpha), 1.0
    elif clip_norm is not None and alpha is None:
        check_positive("clip_norm", clip_norm)
        bound, length = functools.partial(_clipped, limit=clip_norm), clip_norm
    else:
        raise ValueError("Give one of alpha and clip_norm.")
    name = f"bounded_mean({alpha}, {clip_norm}, {server_normalization}, {plan})"
    form = _Form(name, bound, length, 1.0, False, server_normalization)
    return _bounded(form, plan, axis, seed)


class _Form(NamedTuple):
    """What the methods have in common."""

    name: str
    bound: Callable[[Array], Array]
    """From a length to the factor that shortens it."""
    length: float
    """The longest message."""
    beta: float
    has_feedback: bool
    server_normalization: bool
    by: str = "tree"
    norm: Norm | None = None
    numbers: Any = None

    def shorten(self, error: Any) -> Any:
        """Δ of a tree."""
        if self.by == "tree":
            factor = self.bound(_length(error))
            return jax.tree.map(lambda x: factor.astype(x.dtype) * x, error)

        def of_leaf(x: Array) -> Array:
            size = _length(x) if self.norm is None else self.norm.norm(x, self.numbers)
            return self.bound(size).astype(x.dtype) * x

        return jax.tree.map(of_leaf, error)


def _length(tree: Any) -> Array:
    """The Euclidean length. No square underflows: messages would become too long by that."""
    leaves = jax.tree.leaves(tree)
    dtype = functools.reduce(np.promote_types, (x.dtype for x in leaves), np.dtype(np.float32))
    tops = [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in leaves]
    top = functools.reduce(jnp.maximum, tops, jnp.zeros((), dtype))
    unit = jnp.where(top > 0, top, 1)
    return unit * optax.tree.norm([x.astype(dtype) / unit for x in leaves])


def _normalized(length: Array, alpha: float) -> Array:
    return jnp.where(length > 0, 1 / jnp.where(length > 0, alpha + length, 1), 0)


def _clipped(length: Array, limit: float) -> Array:
    return jnp.where(length > limit, limit / jnp.where(length > limit, length, 1), 1)


def _bounded(
    form: _Form, plan: PrivacyPlan | None, axis: str | None, given_seed: int | None
) -> optax.GradientTransformationExtraArgs:
    seed = checked_seed(plan, given_seed)
    check_choice("by", form.by, ("tree", "leaf"))
    check_dimension_numbers(form.numbers)
    if not isinstance(form.norm, Norm | None):
        raise TypeError(f"norm must be a dm.norms.Norm, got {describe(form.norm)}.")
    if form.norm is not None and form.by == "tree":
        raise ValueError("norm is of a leaf: say by='leaf'.")
    if plan is not None and form.by == "leaf":
        raise ValueError(
            "A message is at most 1 long in the Euclidean norm of the whole tree, for which plan "
            "has its noise: leave out by and norm."
        )
    multiplier = plan.noise_multiplier if plan is not None else 0.0
    about = zlib.crc32(form.name.encode())
    settings = np.array([seed & 0xFFFFFFFF, about], np.uint32)

    def init(params: optax.Params) -> NormECState:
        worker, count = WorkerState((), wide_zeros(params), ()), jnp.zeros((), jnp.int32)
        noise = jnp.asarray(multiplier, jnp.float32)
        return NormECState(worker, wide_zeros(params), count, jnp.asarray(settings), noise)

    def update(updates: Any, state: NormECState, params: Any, layer_mask: Any, extra_args: Any):
        del params, extra_args
        if not all(flag is True for flag in jax.tree.leaves(layer_mask)):
            raise TypeError("A message is bounded as a whole: give no layer_mask that freezes.")
        index, count = worker_place(axis, updates), state.count
        if plan is not None and not isinstance(count, Tracer):
            plan.epsilon_after(0 if int(count) < plan.rounds else int(count) + 1)
        own = state.worker.estimate
        error = jax.tree.map(lambda g, e: g.astype(e.dtype) - e, updates, own)
        if plan is not None:  # NaN has no bound
            is_finite = jnp.isfinite(_length(error))
            error = jax.tree.map(lambda x: jnp.where(is_finite, x, 0), error)
        message = form.shorten(error)
        if form.has_feedback:
            own = jax.tree.map(lambda e, x: e + jnp.asarray(form.beta, x.dtype) * x, own, message)
        if plan is not None:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), index)
            message = with_noise(message, key, form.length * multiplier)
            message = _until(plan.rounds, count, message)
        if axis is not None:  # by the number of clients, whatever their data
            message = mean_of_arrays(message, axis)
        estimate = message
        if form.has_feedback:
            estimate = jax.tree.map(
                lambda e, x: e + jnp.asarray(form.beta, x.dtype) * x, state.estimate, message
            )
        steps = estimate
        if form.server_normalization:
            factor = _normalized(optax.tree.norm(estimate), 0.0)
            steps = jax.tree.map(lambda x: factor.astype(x.dtype) * x, estimate)
        if plan is not None:
            steps = _until(plan.rounds, count, steps)
        steps = jax.tree.map(lambda x, g: x.astype(g.dtype), steps, updates)
        count = jnp.asarray(optax.safe_increment(count))
        worker = state.worker._replace(estimate=own)
        return steps, state._replace(worker=worker, estimate=estimate, count=count)

    return masked_transformation(init, update)


def _until(rounds: int, count: Array, tree: Any) -> Any:
    """The tree, and zeros from a round on."""
    return jax.tree.map(lambda x: jnp.where(count < rounds, x, 0), tree)
