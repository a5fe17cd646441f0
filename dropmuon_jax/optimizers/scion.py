"""Scion and Gluon, a norm for each role; all layers, or the active ones of a depth."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax
from jax.core import Tracer

from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.roles import ROLES, Roles, as_roles
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.optimizers.composition import (
    active_layers,
    every_layer,
    role_subtrees,
)
from dropmuon_jax.schedules import AdaptiveRadius, Radius, distinct_radii, gluon_decay

# The radii of Scion's recipes (arXiv:2502.07529 and its repository): for a GPT-2 of width 768 with
# a tied head and without learned positions, biases and scales, and for the CNN of airbench, whose
# biases are those of batch norms.
SCION_GPT_RADII: Mapping[str, float] = MappingProxyType(
    {"hidden": 50.0, "head": 3000.0, "tied_head": 3000.0}
)
SCION_CNN_RADII: Mapping[str, float] = MappingProxyType({"hidden": 8.0, "head": 128.0, "bias": 8.0})

Momentum = float | jax.Array | optax.Schedule | optax.GradientTransformation


@names_counterparts
def scion(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius],
    *,
    constrained: bool = True,
    momentum: Momentum = 0.9,
    norms: Mapping[str, Norm] | None = None,
    roles: Roles | Mapping[str, str] | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scion: each leaf steps in the ball of the norm that its role in the network suggests.

    .. math::
        M &\leftarrow \text{decay}\, M + (1 - \text{decay})\, \nabla f(X; \xi) \\
        X &\leftarrow (1 - \gamma) X - \gamma\, \text{radius}\, D(M)
        \quad\text{(constrained)} \\
        X &\leftarrow X - \gamma\, \text{radius}\, D(M) \quad\text{(unconstrained)}

    =============== ================================================== ===========================
    role            norm                                               direction D
    =============== ================================================== ===========================
    "hidden"        `spectral_norm("scion")`: RMS to RMS               (out/in)^½ / window · UVᵀ
    "head"          `sign_norm()`                                      sign / fan-in
    "tied_head"     the same, of a table (tokens, features)            sign / features
    "embedding"     `column_norm()`                                    each token to RMS 1
    "bias"          `rms_norm()`                                       to RMS 1
    =============== ================================================== ===========================

    Constrained iterates stay in the ball, ‖X‖ ≤ radius, if they start there, γ ≤ 1 and the radius
    does not fall: start with :func:`scion_init`, or they are drawn into it. (For "hidden" UVᵀ is
    that of :func:`newton_schulz`, whose band widens the ball.)

    **Recipes**, with a learning rate that falls to 0 at the end of the run, roles named where paths
    do not tell, and ReLU or GELU scaled by √2:

    * a GPT with a tied head, from the framework's own initial parameters:
      `scion(schedule, SCION_GPT_RADII, roles={"wte": "tied_head"})`, γ = 3.6e-4, decay 0.9;
    * a CNN: `scion(schedule, SCION_CNN_RADII, momentum=0.4, roles={"Dense_0": "head"})`, γ = 0.05.

    A role that the authors' networks have not, such as "embedding" in the first, needs a radius of
    yours. The directions are exact down to the smallest numbers, where Scion's code adds 1e-8 to
    what it divides by.

    Args:
        learning_rate: γ, at most 1 where constrained, or a schedule of it over all steps.
        radii: From role to radius: a number, a schedule, :func:`adaptive_radius`, or a mapping from
            path patterns to these. Every role of the network needs one.
        constrained: Whether X is pulled towards 0, which is weight decay γ: Scion's own default. An
            adaptive radius is for unconstrained steps.
        momentum: The decay of the momentum, a number or a schedule; or a transformation.
        norms: From role to a norm that takes the place of the table's; also for roles of your own.
        roles: What the leaves are, where paths do not tell: :class:`Roles`, or its mapping from
            path patterns to roles; in many networks `{"Dense_3": "head"}`.
        dimension_numbers: The axes of matrices that are no Flax kernels of dense layers or 2-D
            convolutions, as in :func:`norm_lmo`: a mapping from path patterns, for hidden leaves,
            heads and embeddings; or one for all hidden leaves and heads, such as "out_in" where
            kernels are (out, in, \*window), as Equinox keeps them.

    Returns:
        A transformation. It takes no `layer_mask`; :func:`drop_scion` does.

    Raises:
        TypeError: For a `layer_mask` in `update`, and for parts of another type.
        ValueError: For bad numbers and an unknown role; of a schedule of γ the first value is
            checked. At `init`, with the path, for a leaf whose role is ambiguous or has no radius.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.eye(2), "Dense_1": jnp.eye(2)}
        >>> tx = dm.scion(0.5, {"hidden": 1.0, "head": 8.0}, roles={"Dense_1": "head"})
        >>> updates, _ = tx.update(params, tx.init(params), params)  # (1 - γ)X + γ · 8 · sign / 2
        >>> print(params["Dense_1"] + updates["Dense_1"])
        [[-1.5  0. ]
         [ 0.  -1.5]]

    References:
        Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher, *Training Deep Learning Models
        with Norm-Constrained LMOs*, 2025, arXiv:2502.07529, Algorithms 1 and 2. Their α is
        1 - decay.
    """
    chain = role_subtrees(
        learning_rate, radii, momentum, constrained, norms, as_roles(roles), dimension_numbers, None
    )
    if constrained:
        _check_constrained(learning_rate, radii)
    return every_layer("scion", chain)


@names_counterparts
def drop_scion(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    radii: Mapping[str, Radius],
    *,
    constrained: bool = True,
    momentum: Momentum = 0.9,
    norms: Mapping[str, Norm] | None = None,
    roles: Roles | Mapping[str, str] | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Drop-Muon with the norms of Scion: a step of :func:`scion` in the active layers.

    Inactive layers stay bit for bit what they are: they are not pulled towards 0 either, and so
    stay in their ball. `layers` are the layers over the whole parameters; the other arguments are
    those of :func:`scion`.

    Returns:
        A transformation whose `update` requires `layer_mask` or `depth`, as :func:`drop_muon`.

    Raises:
        TypeError: As :func:`scion`, and in `update` without `layer_mask` and `depth`.
        ValueError: As :func:`scion`; at `init`, for a leaf in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["Dense_0", "head"])
        >>> optimizer = dm.drop_scion(0.5, layers, {"hidden": 1.0, "head": 8.0})
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params, depth=1)
        >>> print(bool(updates["Dense_0"].any()), bool(updates["head"].any()))
        False True

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1 with a norm for each layer; the constrained step in it is
        ours. Pethick et al., 2025, arXiv:2502.07529.
    """
    check_layers(layers)
    roles = as_roles(roles)
    chain = role_subtrees(
        learning_rate, radii, momentum, constrained, norms, roles, dimension_numbers, layers
    )
    if constrained:
        _check_constrained(learning_rate, radii)
    return active_layers(chain, layers)


@names_counterparts
def gluon(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius] | None = None,
    *,
    momentum: Momentum | None = None,
    norms: Mapping[str, Norm] | None = None,
    roles: Roles | Mapping[str, str] | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gluon: a step in the ball of each leaf's norm, with the radii that its theory gives.

    .. math::
        M_i &\leftarrow \beta^k M_i + (1 - \beta^k)\, \nabla_i f(X; \xi),
        \qquad \beta^k = 1 - (k + 1)^{-1/2} \\
        X_i &\leftarrow X_i - t_i^k D_i(M_i), \qquad t_i^k = \gamma_k \cdot \text{radius}_i

    with the norms of :func:`scion`, unconstrained. Two ways to set the steps:

    * with stochastic gradients, `gluon(dm.schedules.gluon_radius(t))`: γ_k = t (k + 1)^(-3/4);
    * from the smoothness of each layer, with exact gradients:
      `gluon(1.0, {"hidden": dm.schedules.adaptive_radius(l0, l1), …}, momentum=0.0)`.

    Args:
        learning_rate: γ, or a schedule of it over all steps, such as :func:`gluon_radius`.
        radii: From role to radius, by default 1 for every role. The radii of all leaves in one
            mapping `by_path` are `dict.fromkeys(dm.layers.ROLES, by_path)`.
        momentum: By default the schedule above, :func:`gluon_decay`.
        norms: From role to norm, as in :func:`scion`.
        roles: What the leaves are, as in :func:`scion`.
        dimension_numbers: The axes of matrices, as in :func:`scion`.

    Returns:
        A transformation. It takes no `layer_mask`; :func:`drop_gluon` does.

    Raises:
        TypeError: As :func:`scion`.
        ValueError: As :func:`scion`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"head": jnp.array([[2.0], [-1.0]])}
        >>> tx = dm.gluon(dm.schedules.gluon_radius(0.5))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates["head"].T)
        [[-0.25  0.25]]

    References:
        Riabinin, Shulgin, Gruntkowska, Richtárik, *Gluon: Making Muon & Scion Great Again!*, 2025,
        arXiv:2505.13416, Algorithm 1 with the stepsizes of its theorems.
    """
    radii = dict.fromkeys(ROLES, 1.0) if radii is None else radii
    momentum = gluon_decay() if momentum is None else momentum
    chain = role_subtrees(
        learning_rate, radii, momentum, False, norms, as_roles(roles), dimension_numbers, None
    )
    return every_layer("gluon", chain)


@names_counterparts
def drop_gluon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    radii: Mapping[str, Radius] | None = None,
    *,
    momentum: Momentum | None = None,
    norms: Mapping[str, Norm] | None = None,
    roles: Roles | Mapping[str, str] | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Drop-Muon with the norms and radii of Gluon: :func:`gluon` in the active layers.

    With :func:`adaptive_radius`, exact gradients and `momentum=0.0` it is the deterministic method
    of Drop-Muon, with one step size for each layer. (The default momentum counts all steps: of a
    layer first active in step k it keeps (k + 1)^-½ of the gradient, which a radius does not see
    and an adaptive one does.) `layers` are the layers over the whole parameters; the other
    arguments are those of :func:`gluon`.

    Returns:
        A transformation whose `update` requires `layer_mask` or `depth`, as :func:`drop_muon`.

    Raises:
        TypeError: As :func:`scion`, and in `update` without `layer_mask` and `depth`.
        ValueError: As :func:`scion`; at `init`, for a leaf in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["Dense_0", "head"])
        >>> optimizer = dm.drop_gluon(dm.schedules.gluon_radius(0.1), layers)
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params, depth=1)
        >>> print(bool(updates["Dense_0"].any()), bool(updates["head"].any()))
        False True

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1. Riabinin et al., *Gluon*, 2025, arXiv:2505.13416.
    """
    check_layers(layers)
    radii = dict.fromkeys(ROLES, 1.0) if radii is None else radii
    momentum = gluon_decay() if momentum is None else momentum
    roles = as_roles(roles)
    chain = role_subtrees(
        learning_rate, radii, momentum, False, norms, roles, dimension_numbers, layers
    )
    return active_layers(chain, layers)


def _check_constrained(learning_rate: Any, radii: Mapping[str, Radius]) -> None:
    """Error for a learning rate above 1, with which X leaves its ball, or for a ball that moves."""
    first = learning_rate(0) if callable(learning_rate) else learning_rate
    if not isinstance(first, Tracer) and first > 1:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"learning_rate is the γ of (1 - γ)X + γ lmo, at most 1, got {first}. The length of a "
            "step is γ · radius."
        )
    for role, radius in radii.items():
        if any(isinstance(of_leaf, AdaptiveRadius) for of_leaf in distinct_radii(radius)):
            raise ValueError(
                f"radii[{role!r}] is adaptive, and a constrained step needs one ball to stay in: "
                "say constrained=False, or take dm.gluon."
            )
