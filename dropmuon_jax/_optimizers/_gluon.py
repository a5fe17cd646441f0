"""Gluon, and Gluon with dropped layers."""

from __future__ import annotations

from collections.abc import Mapping

import optax

from dropmuon_jax._labels import ROLES
from dropmuon_jax._layers import Layers
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._momentum import gluon_decay
from dropmuon_jax._momentum import momentum as _momentum
from dropmuon_jax._optimizers._composition import every_layer, role_subtrees
from dropmuon_jax._radii import Radius
from dropmuon_jax._sampling import (
    AdaptiveDistribution,
    LayerDistribution,
    LayerMaskSampler,
    layer_mask_sampler,
)


def gluon(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius] | None = None,
    *,
    momentum: optax.GradientTransformation | None = None,
    lmos: Mapping[str, optax.GradientTransformation] | None = None,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gluon: a step in the ball of each leaf's norm, with the radii that its theory gives.

    .. math::
        M_i &\leftarrow \beta^k M_i + (1 - \beta^k)\, \nabla_i f(X; \xi),
        \qquad \beta^k = 1 - (k + 1)^{-1/2} \\
        X_i &\leftarrow X_i - t_i^k D_i(M_i), \qquad t_i^k = \gamma_k \cdot \text{radius}_i

    with the norms of :func:`scion`, unconstrained. Two ways to set the steps:

    * with stochastic gradients, `gluon(dm.gluon_radius(t))`: γ_k = t (k + 1)^(-3/4);
    * from the smoothness of each layer, with exact gradients:
      `gluon(1.0, {"hidden": dm.adaptive_radius(l0, l1), …}, momentum=dm.momentum(0.0))`.

    Args:
        learning_rate: γ, or a schedule of it over all steps, such as :func:`gluon_radius`.
        radii: From role to radius, as in :func:`scion`; by default 1 for every role. The radii of
            all leaves in one mapping `by_path` are `dict.fromkeys(dm.ROLES, by_path)`.
        momentum: By default `momentum(gluon_decay())`, the schedule above.
        lmos: As in :func:`scion`.
        roles: From path patterns to roles, where paths do not tell, as in :func:`role_labels`; in
            many networks `roles={"Dense_3": "head"}`. Print :func:`role_table` with the same.
        has_head: False for a network without a head.
        dimension_numbers: The axes of matrices that are no Flax kernels of dense layers or 2-D
            convolutions, such as attention's: a mapping from path patterns, as in :func:`norm_lmo`,
            for hidden leaves, heads and embeddings, or one for the hidden leaves alone. A network
            that keeps its kernels as (out, in) needs a mapping to
            `MuonDimensionNumbers(reduction_axis=1, output_axis=0)` with its head in it.

    Returns:
        A transformation. It takes no `layer_mask`; :func:`drop_gluon` does.

    Raises:
        TypeError: As :func:`scion`.
        ValueError: As :func:`scion`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"head": jnp.array([[2.0], [-1.0]])}
        >>> tx = dm.gluon(dm.gluon_radius(0.5))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates["head"].T)
        [[-0.25  0.25]]

    References:
        Riabinin, Shulgin, Gruntkowska, Richtárik, *Gluon: Making Muon & Scion Great Again!*, 2025,
        arXiv:2505.13416, Algorithm 1 with the stepsizes of its theorems.
    """
    subtrees = role_subtrees(
        learning_rate,
        dict.fromkeys(ROLES, 1.0) if radii is None else radii,
        momentum=_momentum(gluon_decay()) if momentum is None else momentum,
        constrained=False,
        lmos=lmos,
        roles=roles,
        has_head=has_head,
        dimension_numbers=dimension_numbers,
        layers=None,
    )
    return every_layer("gluon", subtrees)


def drop_gluon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    depth_distribution: LayerDistribution | AdaptiveDistribution,
    radii: Mapping[str, Radius] | None = None,
    *,
    seed: int,
    steps_per_draw: int | None = None,
    momentum: optax.GradientTransformation | None = None,
    lmos: Mapping[str, optax.GradientTransformation] | None = None,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> LayerMaskSampler:
    """Drop-Muon with the norms and radii of Gluon: :func:`gluon` in the layers that are drawn.

    With :func:`adaptive_radius`, exact gradients and `momentum(0.0)` it is the deterministic method
    of Drop-Muon, with one step size for each layer, whatever else is drawn. (Not with the default
    momentum: the decay counts all steps, so that of a layer first drawn in step k it keeps
    (k + 1)^-½ of the gradient, which a radius does not see and an adaptive one does.)

    Args:
        learning_rate: As in :func:`gluon`; schedules count all steps.
        layers: The layers, over the whole parameters.
        depth_distribution: What is drawn in each step, such as :func:`uniform_depth`, or
            :func:`time_aware_depth`, whose draws need the state, `depth(step, opt_state)`.
        radii: As in :func:`gluon`.
        seed: Seed of the draws, a Python integer.
        steps_per_draw: How many steps in a row share a draw, by default 1.
        momentum: As in :func:`gluon`.
        lmos: Likewise. What does not look at `layer_mask` goes, like a momentum that does not, into
            :func:`per_layer`.
        roles: Likewise.
        has_head: Likewise.
        dimension_numbers: Likewise.

    Returns:
        A :class:`LayerMaskSampler`, as :func:`drop_muon`.

    Raises:
        TypeError: As :func:`gluon`, if `seed` is missing, and in `update`, if `layer_mask` is.
        ValueError: As :func:`gluon`; at `init`, for a leaf in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["Dense_0", "head"])
        >>> tx = dm.drop_gluon(dm.gluon_radius(0.1), layers, dm.uniform_depth(), seed=0)
        >>> updates, _ = tx.update(params, tx.init(params), params, layer_mask=layers.mask(1))
        >>> print(bool(updates["Dense_0"].any()), bool(updates["head"].any()))
        False True

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1. Riabinin et al., *Gluon*, 2025, arXiv:2505.13416.
    """
    sampler = layer_mask_sampler(
        layers, depth_distribution, seed=seed, steps_per_draw=steps_per_draw
    )
    subtrees = role_subtrees(
        learning_rate,
        dict.fromkeys(ROLES, 1.0) if radii is None else radii,
        momentum=_momentum(gluon_decay()) if momentum is None else momentum,
        constrained=False,
        lmos=lmos,
        roles=roles,
        has_head=has_head,
        dimension_numbers=dimension_numbers,
        layers=layers,
    )
    return sampler.attach_to(optax.chain(subtrees, sampler))
