"""The decay of a momentum, and the schedules with which theory proves its rates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from dropmuon_jax._checks import check_decay, check_number, is_python_number


def check_decay_or_schedule(name: str, value: Any) -> None:
    """Error unless a decay is a number in [0, 1), a scalar array or a schedule."""
    check_called(name, value)
    check_decay(name, first_value(value))


def check_q_or_schedule(name: str, value: Any) -> None:
    """Error unless the weight of a new gradient is a number in (0, 1], an array or a schedule."""
    check_called(name, value)
    first = first_value(value)
    check_number(name, first)
    if is_python_number(first) and not 0 < first <= 1:
        raise ValueError(
            f"{name} is the weight of the new gradient in the estimator and must lie in (0, 1], "
            f"got {first}."
        )


def first_value(value: Any) -> Any:
    """A number as it is, and of a schedule the first one, as a Python number if it is known now."""
    if not callable(value):
        return value
    first: Any = value(jnp.zeros((), jnp.int32))
    return first if isinstance(first, Tracer) or np.ndim(first) else float(first)


def check_called(name: str, value: Any) -> None:
    """Error for what makes a schedule, in the place of one."""
    for factory in (gluon_decay, mvr_decay, mvr_q):
        if value is factory:
            raise TypeError(f"{name} is dm.{factory.__name__} itself: call it.")


def gluon_decay() -> optax.Schedule:
    """Gluon's decay of the momentum for stochastic gradients: 1 - (k + 1)^-½ in step k.

    The first momentum is the first gradient, and the past weighs more and more.

    Returns:
        A schedule for :func:`momentum`.

    Examples:
        >>> import dropmuon_jax as dm
        >>> decay = dm.gluon_decay()
        >>> print(decay(0), decay(3), decay(99))
        0.0 0.5 0.9

    References:
        Riabinin et al., *Gluon*, 2025, arXiv:2505.13416, the stochastic theorem, with
        :func:`gluon_radius`.
    """

    def schedule(count: Any) -> jax.Array:
        steps = jnp.asarray(count, jnp.result_type(float)) + 1
        return 1 - steps**-0.5

    return schedule


def mvr_decay() -> optax.Schedule:
    """The decay of MVR for noisy non-convex problems: 1 - (k + 1)^-⅔ in step k.

    With steps of length :func:`mvr_radius` the error of the momentum falls as K^-⅓, and with it
    the gradient; the averages of :func:`gluon_decay` reach K^-¼.

    Returns:
        A schedule for the decay of variant 1 of :func:`mvr_momentum`. In variants 2 and 3 it is
        :func:`mvr_q` that brings the rate, with any fixed decay.

    Examples:
        >>> import dropmuon_jax as dm
        >>> decay = dm.mvr_decay()
        >>> print(f"{decay(0):.3f} {decay(7):.3f}")
        0.000 0.750

    References:
        Qian et al., 2025, arXiv:2512.16598: the rate. The schedule is derived from it: weights of
        the new gradient and steps ∝ K^-⅔ balance noise and movement, as in STORM.
    """
    weight = mvr_q()
    return lambda count: 1 - weight(count)


def mvr_q() -> optax.Schedule:
    """The weight q of the new gradient in MVR-2 and MVR-3 for noisy problems: (k + 1)^-⅔ in step k.

    Returns:
        A schedule for the `q` of :func:`mvr_momentum`.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(f"{dm.mvr_q()(7):.3f}")
        0.250

    References:
        As :func:`mvr_decay`.
    """

    def schedule(count: Any) -> jax.Array:
        steps = jnp.asarray(count, jnp.result_type(float)) + 1
        return steps ** (-2 / 3)

    return schedule
