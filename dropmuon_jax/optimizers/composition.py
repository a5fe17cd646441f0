"""What the ready-made optimizers have in common: their outside, and chains by role."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax

from dropmuon_jax._checks import (
    check_nonnegative,
    check_number,
    check_parameters,
    check_transformation,
    describe,
    did_you_mean,
)
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.complex_leaves import refuse_split_by_optax
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.prefixes import given_mask
from dropmuon_jax.layers.roles import Roles
from dropmuon_jax.layers.states import checked_transformation
from dropmuon_jax.layers.trees import leaf_paths, mask_in_force
from dropmuon_jax.norms.named import column_norm, rms_norm, sign_norm, spectral_norm
from dropmuon_jax.norms.norm import Norm
from dropmuon_jax.orthogonalize.newton_schulz import newton_schulz
from dropmuon_jax.schedules import (
    Radius,
    check_radius,
    gluon_radius,
    mvr_radius,
    star_convex_rate,
)
from dropmuon_jax.transforms.frozen_momentum import frozen_momentum
from dropmuon_jax.transforms.lmo import norm_lmo
from dropmuon_jax.transforms.masked import chain_subtrees, freeze, promoting, required_mask
from dropmuon_jax.transforms.momentum import momentum as momentum_of
from dropmuon_jax.transforms.per_layer import per_layer
from dropmuon_jax.transforms.prev_params import keep_prev_params, keeps_prev_params

# Scion's norms (Pethick et al., 2025, arXiv:2502.07529) by role.
ROLE_NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "hidden": spectral_norm("scion", orthogonalize=newton_schulz()),
        "head": sign_norm(),
        # Of a table (tokens, features) that is an output layer too, the fan-in is the features.
        "tied_head": dataclasses.replace(
            sign_norm(), name="sign_norm() of a table", shape_factor="1/fan_out"
        ),
        "embedding": column_norm(),
        "bias": rms_norm(),
    }
)


def every_layer(
    name: str, transformation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that updates every layer in every step, and takes no layer mask."""
    inner = optax.with_extra_args_support(transformation)

    def init_fn(params: optax.Params) -> optax.OptState:
        check_parameters(params)
        return inner.init(params)

    def update_fn(updates, state, params=None, *, layer_mask=None, depth=None, **extra_args):
        del layer_mask, depth
        if mask_in_force():
            raise TypeError(
                f"{name} updates every layer and takes no layer_mask or depth; use drop_{name}."
            )
        return inner.update(updates, state, params, **extra_args)

    return checked_transformation(init_fn, update_fn)


def active_layers(
    transformation: optax.GradientTransformation, layers: Layers
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that updates the active layers of a mask or depth, and freezes the others."""
    inner = optax.with_extra_args_support(transformation)

    def init_fn(params: optax.Params) -> optax.OptState:
        check_parameters(params)
        refuse_split_by_optax(params)
        layers.units_of(params)  # an error if a leaf is in no layer
        return inner.init(params)

    def update_fn(updates, state, params=None, *, layer_mask=None, depth=None, **extra_args):
        given = given_mask(layers, updates, layer_mask, depth)
        layer_mask = required_mask(
            layers, updates, given, extra_args, otherwise=", or depth=depth in its place"
        )
        new_updates, new_state = inner.update(
            updates, state, params, layer_mask=layer_mask, **extra_args
        )
        return freeze(layer_mask, new_updates), new_state

    return checked_transformation(init_fn, update_fn)


def as_momentum(momentum: Any, layers: Layers | None) -> optax.GradientTransformation:
    """A momentum that was given as a transformation, or as the number that is its decay."""
    # A number, or a schedule of it.
    if any((np.isscalar(momentum), isinstance(momentum, jax.Array), callable(momentum))):
        return momentum_of(momentum)
    check_transformation("momentum", momentum)
    return frozen_momentum(momentum, layers)


def row_by_row(
    transformation: optax.GradientTransformation, layers: Layers | None
) -> optax.GradientTransformation:
    """Layer by layer where layers are stacked; else as it is, all matrices of a shape at once."""
    if layers is None or not layers.stacks:
        return transformation
    return per_layer(transformation, layers, takes_mask=True)


def rows_of(params: Any, layers: Layers | None) -> Any:
    """The parameters, or their shapes in one layer where layers are stacked."""
    if layers is not None:
        check_layers(layers)
    return params if layers is None or not layers.stacks else layers.row_shapes(params)


def with_prev_params(
    subtrees: optax.GradientTransformationExtraArgs, labels: Any, layers: Layers | None
) -> optax.GradientTransformation:
    """Keeps the previous parameters of other leaves too, if the momentum keeps those of its own."""
    keep = row_by_row(keep_prev_params(), layers)
    keeper = chain_subtrees({"matrix": optax.identity(), "other": keep}, labels)

    def init_fn(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        state: Any = subtrees.init(params)
        of_matrices, of_others = map(
            keeps_prev_params, map(state.inner_states.get, ("matrix", "other"))
        )
        kept = keeper.init(params) if of_matrices and not of_others else optax.EmptyState()
        return kept, state

    def update_fn(updates, state, params=None, **extra_args):
        kept, state = state
        if not isinstance(kept, optax.EmptyState):
            _, kept = keeper.update(updates, kept, params, **extra_args)
        updates, state = subtrees.update(updates, state, params, **extra_args)
        return updates, (kept, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def checked_rate(name: str, rate: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """The rate; an error if it is negative or no number, or once a schedule gives no number.

    An array of several numbers would be rates along the last axis of the leaves that it fits.
    """
    for factory in (gluon_radius, mvr_radius, star_convex_rate):
        if rate is factory:
            raise TypeError(f"{name} is dm.schedules.{factory.__name__} itself: call it.")
    if not callable(rate):
        check_nonnegative(name, rate)
        return rate

    def schedule(count: Any) -> Any:
        value = rate(count)
        check_number(f"{name}, a schedule,", value)
        return value

    return schedule


def role_subtrees(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius],
    momentum: Any,
    constrained: bool,
    norms: Mapping[str, Norm] | None,
    roles: Roles,
    dimension_numbers: DimensionNumbers | None,
    layers: Layers | None,
) -> optax.GradientTransformationExtraArgs:
    """A chain of momentum and LMO for each role, the pull to 0 of a constrained step, and the rate.

    With `layers`, the transformation takes masks.
    """
    learning_rate = checked_rate("learning_rate", learning_rate)
    check_dimension_numbers(dimension_numbers)
    norm_of_role = check_role_norms(norms)
    check_role_radii(radii, norm_of_role)
    for role in set(norms or ()) - set(radii):
        raise ValueError(
            f"norms names the role {role!r}, and radii is for {sorted(radii)}."
            f"{did_you_mean(role, radii)}"
        )
    momentum = as_momentum(momentum, layers)

    def labels(params: optax.Params) -> Any:
        rows = rows_of(params, layers)
        tree = roles.labels(rows, dimension_numbers)
        for path, role in zip(leaf_paths(params), jax.tree.leaves(tree), strict=True):
            if role not in radii:
                raise ValueError(
                    f"Leaf '{path}' is {role!r}, and radii has no such role: it has "
                    f"{sorted(radii)}.{did_you_mean(role, radii)}"
                )
        check_role_numbers(tree, dimension_numbers)
        return tree

    def of_role(role: str) -> optax.GradientTransformation:
        numbers = role_numbers(role, dimension_numbers)
        lmo = norm_lmo(norm_of_role[role], radii[role], dimension_numbers=numbers)
        return row_by_row(optax.chain(momentum, lmo), layers)

    chain = optax.chain(
        chain_subtrees({role: of_role(role) for role in radii}, labels),
        *([promoting(optax.add_decayed_weights(1.0))] if constrained else []),
        promoting(optax.scale_by_learning_rate(learning_rate)),
    )

    def update_fn(updates, state, params=None, **extra_args):
        if constrained and params is None:
            raise ValueError(
                "A constrained step pulls the parameters towards 0: pass them to update, "
                "tx.update(grads, opt_state, params)."
            )
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def role_numbers(role: str, numbers: DimensionNumbers | None) -> DimensionNumbers | None:
    """The dimension numbers of the leaves of a role.

    One for all leaves is for hidden leaves and heads, since tables are (tokens, features) in all
    libraries.
    """
    if role == "bias":
        return None
    if role == "tied_head" or (role == "embedding" and not isinstance(numbers, Mapping)):
        return "in_out"
    return numbers


def check_role_numbers(labels: Any, numbers: DimensionNumbers | None) -> None:
    """Error for dimension numbers of leaves whose role says which axes are which."""
    if not isinstance(numbers, Mapping):
        return
    paths = leaf_paths(labels)
    matches = match_leaves("dimension_numbers", numbers, paths)
    for path, role in zip(paths, jax.tree.leaves(labels), strict=True):
        # A pattern of a module is of its kernel, and leaves its bias alone.
        is_bias = role == "bias" and path in matches and matches[path].names_leaf
        if is_bias or (path in matches and role == "tied_head"):
            raise ValueError(
                f"dimension_numbers: '{matches[path].pattern}' matches '{path}', which is "
                f"{role!r}. A bias is a whole leaf, and a tied head a table (tokens, features): "
                "they take none."
            )


def check_role_norms(norms: Any) -> dict[str, Norm]:
    """The norm of each role, those of the table where nothing else is given."""
    if not isinstance(norms, Mapping | None):
        raise TypeError(f"norms must be a mapping from role to norm, got {describe(norms)}.")
    for role, norm in (norms or {}).items():
        if not isinstance(norm, Norm):
            raise TypeError(
                f"norms[{role!r}] must be a norm, such as dm.norms.sign_norm(), got "
                f"{describe(norm)}."
            )
    return {**ROLE_NORMS, **(norms or {})}


def check_role_radii(radii: Any, norms: Mapping[str, Norm]) -> None:
    """Error unless radii are a mapping from roles that have a norm."""
    if not isinstance(radii, Mapping):
        raise TypeError(
            "radii must be a mapping from role to radius, such as {'hidden': 50.0, 'head': 3000.0},"
            f" got {describe(radii)}."
        )
    for role in radii:
        if "/" in role:
            raise ValueError(
                f"radii is by role, and {role!r} is a path: give the radii of all leaves as "
                "dict.fromkeys(dm.layers.ROLES, by_path)."
            )
        if role not in norms:
            raise ValueError(
                f"radii names the role {role!r}, and the norms are for {sorted(norms)}."
                f"{did_you_mean(role, norms)} The norm of a role of your own goes into norms."
            )
        check_radius(f"radii[{role!r}]", radii[role])
