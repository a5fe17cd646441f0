"""The steps of the norms of whole leaves."""

import optax

from dropmuon_jax._lmo._norm_lmo import norm_lmo, norm_sharp
from dropmuon_jax._norms import euclidean_norm, rms_norm
from dropmuon_jax._radii import Radius


def rms_lmo(radius: Radius = 1.0) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active leaves by themselves, scaled to root mean square 1.

    The step of :func:`rms_norm`, for biases and scales. Each leaf is one vector, of any shape.

    Args:
        radius: As in :func:`norm_lmo`.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.rms_lmo()
        >>> grads = {"w": jnp.array([3.0, 0.0, 4.0, 0.0])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [1.2 0.  1.6 0. ]
    """
    return norm_lmo(rms_norm(), radius)


def rms_sharp(step_size: Radius = 1.0) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active leaves by their number of entries times themselves.

    The sharp form of :func:`rms_lmo`, with ‖g‖* = √d ‖g‖₂: d · g.

    Args:
        step_size: As in :func:`norm_sharp`.

    Returns:
        A transformation, as :func:`norm_sharp`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`norm_sharp`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.rms_sharp()
        >>> grads = {"w": jnp.array([3.0, 0.0, 4.0, 0.0])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [12. 0. 16. 0.]
    """
    return norm_sharp(rms_norm(), step_size)


def euclidean_lmo(radius: Radius = 1.0) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active leaves by themselves, scaled to length 1.

    The step of :func:`euclidean_norm`: normalised gradient descent, leaf by leaf.

    Args:
        radius: As in :func:`norm_lmo`.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.euclidean_lmo()
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [0.6 0.8]
    """
    return norm_lmo(euclidean_norm(), radius)


def euclidean_sharp(step_size: Radius = 1.0) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active leaves by the step size times themselves: gradient descent.

    The sharp form of :func:`euclidean_lmo`, with ‖g‖* = ‖g‖₂.

    Args:
        step_size: As in :func:`norm_sharp`.

    Returns:
        A transformation, as :func:`norm_sharp`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`norm_sharp`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.euclidean_sharp(0.5)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [1.5 2. ]
    """
    return norm_sharp(euclidean_norm(), step_size)
