"""The steps of the norms of matrices that need no iteration: signs, columns, rows."""

import optax

from dropmuon_jax._lmo._norm_lmo import norm_lmo, norm_sharp
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._norms import column_norm, row_norm, sign_norm
from dropmuon_jax._radii import Radius


def sign_lmo(
    radius: Radius = 1.0,
    *,
    normalized: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by their signs, over the fan-in.

    The step of :func:`sign_norm`, for an output layer, and for vectors, which have fan-in 1. A tied
    embedding (tokens, features) is an output layer of fan-in features:
    `dimension_numbers=optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)`.

    Args:
        radius: As in :func:`norm_lmo`.
        normalized: As in :func:`sign_norm`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.sign_lmo()
        >>> grads = {"w": jnp.array([[3.0], [-0.1]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[ 0.5]
        [-0.5]]
    """
    return norm_lmo(sign_norm(normalized=normalized), radius, dimension_numbers=dimension_numbers)


def sign_sharp(
    step_size: Radius = 1.0,
    *,
    normalized: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by ‖G‖* times their signs over the fan-in.

    The sharp form of :func:`sign_lmo`, with ‖G‖* = Σ|g| / fan-in.

    Args:
        step_size: As in :func:`norm_sharp`.
        normalized: As in :func:`sign_norm`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_sharp`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`norm_sharp`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.sign_sharp()
        >>> grads = {"w": jnp.array([[3.0], [-1.0]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[ 1.]
        [-1.]]
    """
    return norm_sharp(
        sign_norm(normalized=normalized), step_size, dimension_numbers=dimension_numbers
    )


def column_lmo(
    radius: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by what each input gives, scaled to root mean square 1.

    The step of :func:`column_norm`, for embeddings: the row of each token in a Flax table, scaled
    to length √fan-out.

    Args:
        radius: As in :func:`norm_lmo`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.column_lmo()
        >>> grads = {"w": jnp.array([[3.0, 0.0, 4.0, 0.0]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[1.2 0.  1.6 0. ]]
    """
    return norm_lmo(column_norm(), radius, dimension_numbers=dimension_numbers)


def column_sharp(
    step_size: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by ‖G‖* times what each input gives, scaled to RMS 1.

    The sharp form of :func:`column_lmo`, with ‖G‖* = √fan-out Σ ‖column‖₂.

    Args:
        step_size: As in :func:`norm_sharp`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_sharp`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`norm_sharp`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.column_sharp()
        >>> grads = {"w": jnp.array([[3.0, 0.0, 4.0, 0.0]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[12. 0. 16. 0.]]
    """
    return norm_sharp(column_norm(), step_size, dimension_numbers=dimension_numbers)


def row_lmo(
    radius: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by what each output takes, scaled to length 1/√fan-in.

    The step of :func:`row_norm`: the column of each output in a Flax kernel.

    Args:
        radius: As in :func:`norm_lmo`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_lmo`.

    Raises:
        ValueError: As :func:`norm_lmo`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.row_lmo()
        >>> grads = {"w": jnp.array([[3.0], [0.0], [4.0], [0.0]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[0.3]
        [0. ]
        [0.4]
        [0. ]]
    """
    return norm_lmo(row_norm(), radius, dimension_numbers=dimension_numbers)


def row_sharp(
    step_size: Radius = 1.0,
    *,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of active layers by ‖G‖* times what each output takes, scaled.

    The sharp form of :func:`row_lmo`, with ‖G‖* = Σ ‖row‖₂ / √fan-in.

    Args:
        step_size: As in :func:`norm_sharp`.
        dimension_numbers: Likewise.

    Returns:
        A transformation, as :func:`norm_sharp`.

    Raises:
        TypeError: As :func:`norm_sharp`.
        ValueError: As :func:`norm_sharp`.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, dropmuon_jax as dm
        >>> tx = dm.row_sharp()
        >>> grads = {"w": jnp.array([[3.0], [0.0], [4.0], [0.0]])}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> print(np.asarray(updates["w"]).round(3))
        [[0.75]
         [0. ]
         [1. ]
         [0. ]]
    """
    return norm_sharp(row_norm(), step_size, dimension_numbers=dimension_numbers)
