"""Scion, and Scion with dropped layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from dropmuon_jax._checks import describe
from dropmuon_jax._labels import role_labels
from dropmuon_jax._layers import Layers, leaf_paths
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._momentum import momentum as _momentum
from dropmuon_jax._norms import Norm
from dropmuon_jax._optimizers._composition import (
    ROLE_NORMS,
    check_role_numbers,
    check_role_radii,
    every_layer,
    role_numbers,
    role_subtrees,
)
from dropmuon_jax._radii import AdaptiveRadius, Radius, leaf_radii
from dropmuon_jax._sampling import (
    AdaptiveDistribution,
    LayerDistribution,
    LayerMaskSampler,
    layer_mask_sampler,
)

# The radii of Scion's recipes (arXiv:2502.07529 and its repository): for a GPT-2 of width 768 with
# a tied head and without learned positions, biases and scales, and for the CNN of airbench, whose
# biases are those of batch norms.
SCION_GPT_RADII: Mapping[str, float] = MappingProxyType(
    {"hidden": 50.0, "head": 3000.0, "tied_head": 3000.0}
)
SCION_CNN_RADII: Mapping[str, float] = MappingProxyType({"hidden": 8.0, "head": 128.0, "bias": 8.0})


def scion(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius],
    *,
    constrained: bool = True,
    momentum: optax.GradientTransformation | None = None,
    lmos: Mapping[str, optax.GradientTransformation] | None = None,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
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
    "head"          :func:`sign_norm`                                  sign / fan-in
    "tied_head"     the same, of a table (tokens, features)            sign / features
    "embedding"     :func:`column_norm`                                each token to RMS 1
    "bias"          :func:`rms_norm`                                   to RMS 1
    =============== ================================================== ===========================

    Constrained iterates stay in the ball, ‖X‖ ≤ radius, if they start there, γ ≤ 1 and the radius
    does not fall: start with :func:`scion_init`, or they are drawn into it. ("hidden" takes the
    five steps of :func:`newton_schulz_lmo`, so there the ball is larger by up to 14 %; give
    `lmos={"hidden": dm.newton_schulz_lmo(50.0, shape_factor="scion", num_steps=7)}` for 1e-4.)

    **Recipes**, with a learning rate that falls to 0 at the end of the run, roles named where paths
    do not tell, and ReLU or GELU scaled by √2; a role that the authors' networks have not, such as
    "embedding" in the first, needs a radius of yours, `{**SCION_GPT_RADII, "embedding": …}`:

    * a GPT with a tied head, from the framework's own initial parameters:
      `scion(schedule, SCION_GPT_RADII, roles={"wte": "tied_head"})`, γ = 3.6e-4, decay 0.9;
    * a CNN: `scion(schedule, SCION_CNN_RADII, momentum=momentum(decay=0.4),
      roles={"Dense_0": "head"})`, γ = 0.05.

    The directions are exact down to the smallest numbers, where Scion's code adds 1e-8 to what it
    divides by: the row of a token that no batch has any more goes on in steps of full length as
    long as its momentum is not zero.

    Args:
        learning_rate: γ, at most 1 where constrained, or a schedule of it over all steps.
        radii: From role to radius: a number, a schedule, :func:`adaptive_radius`, or a mapping from
            path patterns to these. Every role of the network needs one.
        constrained: Whether X is pulled towards 0, which is weight decay γ: Scion's own default. An
            adaptive radius is for unconstrained steps.
        momentum: By default `momentum(decay=0.9)`.
        lmos: From role to an LMO that takes the place of the table's, with its own radius; also for
            roles of your own.
        roles: From path patterns to roles, where paths do not tell, as in :func:`role_labels`; in
            many networks `roles={"Dense_3": "head"}`. Print :func:`role_table` with the same.
        has_head: False for a network without a head.
        dimension_numbers: The axes of matrices that are no Flax kernels of dense layers or 2-D
            convolutions, such as attention's: a mapping from path patterns, as in :func:`norm_lmo`,
            for hidden leaves, heads and embeddings, or one for the hidden leaves alone. A network
            that keeps its kernels as (out, in) needs a mapping to
            `MuonDimensionNumbers(reduction_axis=1, output_axis=0)` with its head in it.

    Returns:
        A transformation. It takes no `layer_mask`; :func:`drop_scion` does.

    Raises:
        TypeError: For a `layer_mask` in `update`, and for parts that are no transformations.
        ValueError: For bad numbers, an unknown role, or a part that descends by itself; of a
            schedule of γ the first value is checked. At `init`, with the path, for a leaf whose
            role is ambiguous or has no radius.

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
    subtrees = role_subtrees(
        learning_rate,
        radii,
        momentum=_momentum(decay=0.9) if momentum is None else momentum,
        constrained=constrained,
        lmos=lmos,
        roles=roles,
        has_head=has_head,
        dimension_numbers=dimension_numbers,
        layers=None,
    )
    return every_layer("scion", subtrees)


def scion_init(
    key: PRNGKeyArray,
    params: Any,
    radii: Mapping[str, Radius],
    *,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
    layers: Layers | None = None,
) -> Any:
    """Random parameters on the boundary of the balls of :func:`scion`, where it may start.

    Hidden matrices are orthogonal times radius and shape factor, heads ± radius / fan-in, and
    embeddings of root mean square radius token by token. Biases and scales stay what they are: in
    Flax 0 and 1, inside a ball of radius 1. So do leaves of a role of your own. Of a convolution
    the whole matrix is orthogonal, so that its norm is the radius; Scion's code makes each position
    of the window so, which is larger by up to window^½ and outside the ball.

    Args:
        key: A PRNG key; each leaf gets its own.
        params: The parameters, of which structure, shapes, dtypes and biases are taken.
        radii: As in :func:`scion`, of numbers only: from role to one, or to a mapping by path.
        roles: As in :func:`scion`.
        has_head: Likewise.
        dimension_numbers: Likewise.
        layers: Needed where layers are stacked: each row is then drawn for itself.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: As :func:`scion`.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.zeros((4, 4)), "head": jnp.zeros((4, 1))}
        >>> params = dm.scion_init(jax.random.key(0), params, {"hidden": 3.0, "head": 8.0})
        >>> print(f"{jnp.linalg.norm(params['Dense_0'], 2):.3f}", abs(params["head"]).T)
        3.000 [[2. 2. 2. 2.]]

    References:
        Pethick et al., 2025, arXiv:2502.07529, and its repository.
    """
    check_role_radii(radii)
    rows = params if layers is None else layers.row_shapes(params)
    labels = role_labels(rows, roles, has_head=has_head)
    check_role_numbers(labels, dimension_numbers)
    for path, role in zip(leaf_paths(params), jax.tree.leaves(labels), strict=True):
        if role in ROLE_NORMS and role not in radii:
            raise ValueError(f"Leaf '{path}' is {role!r}, and radii has only {sorted(radii)}.")

    drawn = params
    for role, role_key in zip(ROLE_NORMS, jax.random.split(key, len(ROLE_NORMS)), strict=True):
        if role not in radii or role == "bias":
            continue
        norm, subtree = ROLE_NORMS[role], _cut(rows, labels, role)
        leaf_radius: list[Any] = leaf_radii(f"radii[{role!r}]", radii[role], subtree)
        for radius in leaf_radius:
            if callable(radius) or isinstance(radius, AdaptiveRadius):
                raise TypeError(
                    f"radii[{role!r}] must be a number where parameters are drawn, got "
                    f"{describe(radius)}; of a schedule give the first value."
                )
        all_axes = norm.axes(subtree, role_numbers(role, dimension_numbers))
        leaves, treedef = jax.tree.flatten(_cut(drawn, labels, role))
        keys = jax.random.split(role_key, len(leaves))
        new = [
            (radius * _init_leaf(norm, leaf_key, leaf, axes, of_row)).astype(leaf.dtype)
            for radius, leaf_key, leaf, axes, of_row in zip(
                leaf_radius, keys, leaves, all_axes, jax.tree.leaves(subtree), strict=True
            )
        ]
        drawn = jax.tree.map(
            lambda label, old, replaced, role=role: replaced if label == role else old,
            labels,
            drawn,
            treedef.unflatten(new),
        )
    return drawn


def _init_leaf(norm: Norm, key: PRNGKeyArray, leaf: Any, axes: Any, row: Any) -> jax.Array:
    """A draw for the leaf, or for each row of it if it is stacked."""
    if np.shape(leaf) == row.shape:
        return norm.init_leaf(key, leaf, axes)
    keys = jax.random.split(key, len(leaf))
    return jax.vmap(lambda key, x: norm.init_leaf(key, x, axes))(keys, leaf)


def _cut(tree: Any, labels: Any, role: str) -> Any:
    """The leaves of one role; placeholders for the others."""
    return jax.tree.map(lambda label, x: x if label == role else optax.MaskedNode(), labels, tree)


def drop_scion(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    depth_distribution: LayerDistribution | AdaptiveDistribution,
    radii: Mapping[str, Radius],
    *,
    seed: int,
    steps_per_draw: int | None = None,
    constrained: bool = True,
    momentum: optax.GradientTransformation | None = None,
    lmos: Mapping[str, optax.GradientTransformation] | None = None,
    roles: Mapping[str, str] | None = None,
    has_head: bool = True,
    dimension_numbers: DimensionNumbers | None = None,
) -> LayerMaskSampler:
    """Drop-Muon with the norms of Scion: a step of :func:`scion` in the layers that are drawn.

    Inactive layers stay bit for bit what they are: they are not pulled towards 0 either, and so
    stay in their ball.

    Args:
        learning_rate: As in :func:`scion`.
        layers: The layers, over the whole parameters.
        depth_distribution: What is drawn in each step, such as :func:`uniform_depth`, or
            :func:`time_aware_depth`, whose draws need the state, `depth(step, opt_state)`.
        radii: As in :func:`scion`.
        seed: Seed of the draws, a Python integer.
        steps_per_draw: How many steps in a row share a draw, by default 1.
        constrained: As in :func:`scion`.
        momentum: Likewise.
        lmos: Likewise. What does not look at `layer_mask` goes, like a momentum that does not, into
            :func:`per_layer`.
        roles: Likewise.
        has_head: Likewise.
        dimension_numbers: Likewise.

    Returns:
        A :class:`LayerMaskSampler`, as :func:`drop_muon`.

    Raises:
        TypeError: As :func:`scion`, if `seed` is missing, and in `update`, if `layer_mask` is.
        ValueError: As :func:`scion`; at `init`, for a leaf in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"Dense_0": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["Dense_0", "head"])
        >>> radii = {"hidden": 1.0, "head": 8.0}
        >>> tx = dm.drop_scion(0.5, layers, dm.uniform_depth(), radii, seed=0)
        >>> updates, _ = tx.update(params, tx.init(params), params, layer_mask=layers.mask(1))
        >>> print(bool(updates["Dense_0"].any()), bool(updates["head"].any()))
        False True

    References:
        Gruntkowska, Maziane, Qu, Richtárik, *Drop-Muon: Update Less, Converge Faster*, 2025,
        arXiv:2510.02239, Algorithm 1 with a norm for each layer; the constrained step in it is
        ours. Pethick et al., 2025, arXiv:2502.07529.
    """
    sampler = layer_mask_sampler(
        layers, depth_distribution, seed=seed, steps_per_draw=steps_per_draw
    )
    subtrees = role_subtrees(
        learning_rate,
        radii,
        momentum=_momentum(decay=0.9) if momentum is None else momentum,
        constrained=constrained,
        lmos=lmos,
        roles=roles,
        has_head=has_head,
        dimension_numbers=dimension_numbers,
        layers=layers,
    )
    return sampler.attach_to(optax.chain(subtrees, sampler))
