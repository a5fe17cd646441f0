"""Gluon and Muon with variance-reduced momentum, and the step sizes of their theory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.core import Tracer

from dropmuon_jax._lmo import newton_schulz_lmo
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._momentum import check_decay_or_schedule, mvr_decay, mvr_momentum, mvr_q
from dropmuon_jax._optimizers._composition import check_constrained_rate, check_rate, every_layer
from dropmuon_jax._optimizers._gluon import gluon
from dropmuon_jax._optimizers._muon import muon
from dropmuon_jax._radii import Radius


def gluon_mvr(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius] | None = None,
    *,
    variant: Literal[1, 2, 3] = 1,
    decay: float | jax.Array | optax.Schedule | None = None,
    q: float | jax.Array | optax.Schedule | None = None,
    lmos: Mapping[str, optax.GradientTransformation] | None = None,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gluon-MVR-1, -2 or -3: :func:`gluon` with variance-reduced momentum in every leaf.

    `gluon_mvr(dm.mvr_radius(t))` is the form of the theory, for noisy gradients; with radii from
    the smoothness give `radii`. Each step takes two gradients on its batch, as in
    :func:`mvr_momentum`, without masks. With dropped layers it is
    `drop_gluon(…, momentum=dm.mvr_momentum(dm.mvr_decay()))`.

    Args:
        learning_rate: γ, or a schedule of it over all steps, such as :func:`mvr_radius`.
        radii: As in :func:`gluon`.
        variant: As in :func:`mvr_momentum`.
        decay: Likewise; by default :func:`mvr_decay` in variant 1, and 0.9 in variants 2 and 3.
        q: Likewise; by default :func:`mvr_q` in variants 2 and 3.
        lmos: As in :func:`gluon`.
        roles: As in :func:`gluon`.
        has_head: As in :func:`gluon`.
        dimension_numbers: As in :func:`gluon`.

    Returns:
        A transformation whose `update` needs `params` and `prev_params_grads`. It takes no
        `layer_mask`.

    Raises:
        TypeError: As :func:`mvr_momentum` and :func:`gluon`.
        ValueError: As :func:`mvr_momentum` and :func:`gluon`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"head": jnp.array([[2.0], [-1.0]])}
        >>> tx = dm.gluon_mvr(dm.mvr_radius(0.5))
        >>> updates, _ = tx.update(params, tx.init(params), params, prev_params_grads=params)
        >>> print(updates["head"].T)
        [[-0.25  0.25]]

    References:
        Qian, Rammal, Kovalev, Richtárik, *Muon is Provably Faster with Momentum Variance
        Reduction*, 2025, arXiv:2512.16598. The schedules are derived from its rates.
    """
    if decay is None:
        decay = mvr_decay() if variant == 1 else 0.9
    if q is None and variant != 1:
        q = mvr_q()
    tx = gluon(
        learning_rate,
        radii,
        momentum=mvr_momentum(decay, variant=variant, q=q),
        lmos=lmos,
        roles=roles,
        has_head=has_head,
        dimension_numbers=dimension_numbers,
    )
    return every_layer(
        "gluon_mvr", tx, dropping="drop_gluon(…, momentum=dm.mvr_momentum(dm.mvr_decay()))"
    )


def muon_mvr(
    learning_rate: optax.ScalarOrSchedule,
    radius: Radius,
    *,
    decay: float | jax.Array | optax.Schedule | None = None,
    auxiliary: optax.GradientTransformation | None = None,
    auxiliary_learning_rate: optax.ScalarOrSchedule | None = None,
    labels: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon-MVR, the constrained form for star-convex problems: a step of MVR-1 within a ball.

    .. math::
        M &\leftarrow g + \text{decay}_k\,(M - g') \\
        X &\leftarrow (1 - \gamma_k) X - \gamma_k \cdot \text{radius} \cdot UV^\top(M)

    The paper's β is γ, its η is γ · radius, and its α, the weight of the new gradient, 1 - decay.
    The theory asks for a radius of at least ‖X⁰‖ and ‖X*‖ in the spectral norm, so that X stays in
    a ball with the solution in it, and for 1 - decay ≥ γ. With :func:`star_convex_rate` f - f* then
    falls as K^-½, where averages of gradients reach K^-⅓.

    It is `muon(γ, momentum=mvr_momentum(1 - γ), lmo=newton_schulz_lmo(radius), weight_decay=1.0)`.
    For a network with a ball for each role: `scion(…, momentum=dm.mvr_momentum(…))`.

    Args:
        learning_rate: γ, at most 1, or a schedule of it over all steps, such as
            :func:`star_convex_rate`, whose first step goes all the way to the boundary.
        radius: Of the ball, in the spectral norm of each matrix: what
            :func:`newton_schulz_lmo` takes. Its five steps make the ball larger by up to 14 %.
        decay: As in :func:`mvr_momentum`; by default 1 - γ, the largest that the theory allows.
        auxiliary: As in :func:`muon`.
        auxiliary_learning_rate: Likewise; by default γ, which is long for Adam.
        labels: As in :func:`muon`.

    Returns:
        A transformation whose `update` needs `params` and `prev_params_grads`. It takes no
        `layer_mask`.

    Raises:
        TypeError: As :func:`mvr_momentum` and :func:`muon`.
        ValueError: Likewise, and for a γ above 1 or above 1 - decay; of schedules the first values
            are checked.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"kernel": jnp.eye(2)}
        >>> tx = dm.muon_mvr(0.5, radius=3.0)
        >>> updates, _ = tx.update(params, tx.init(params), params, prev_params_grads=params)
        >>> new = params["kernel"] + updates["kernel"]
        >>> bool(jnp.allclose(new, (0.5 - 0.5 * 3) * jnp.eye(2), atol=0.2))
        True

    References:
        Qian, Rammal, Kovalev, Richtárik, *Muon is Provably Faster with Momentum Variance
        Reduction*, 2025, arXiv:2512.16598, Theorem 1: the conditions and the rate. The step, not
        seen written out, is the one that fits them.
    """
    check_rate("learning_rate", learning_rate)
    check_constrained_rate(learning_rate)
    if decay is not None:
        check_decay_or_schedule("decay", decay)
        _check_weights(decay, learning_rate)

    def one_minus_rate(count: Any) -> Any:
        return 1 - (learning_rate(count) if callable(learning_rate) else learning_rate)

    tx = muon(
        learning_rate,
        momentum=mvr_momentum(one_minus_rate if decay is None else decay),
        lmo=newton_schulz_lmo(radius),
        weight_decay=1.0,
        auxiliary=auxiliary,
        auxiliary_learning_rate=auxiliary_learning_rate,
        labels=labels,
    )
    return every_layer(
        "muon_mvr", tx, dropping="drop_scion(…, momentum=dm.mvr_momentum(decay)), which has balls"
    )


def _check_weights(decay: Any, learning_rate: Any) -> None:
    """Error for α < β, as far as the numbers are known: of schedules the first ones."""
    past = decay(0) if callable(decay) else decay
    rate = learning_rate(0) if callable(learning_rate) else learning_rate
    if isinstance(past, Tracer) or isinstance(rate, Tracer):
        return
    if past + rate > 1 + 1e-6:  # type: ignore[operator]
        raise ValueError(
            f"The theory asks for 1 - decay ≥ learning_rate, and 1 - {past} < {rate}: lower one of "
            "them. Any combination is allowed in dm.muon(…, momentum=dm.mvr_momentum(decay))."
        )
