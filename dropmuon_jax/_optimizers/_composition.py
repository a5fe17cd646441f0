"""What the ready-made optimizers have in common: chains by role, and checks of their parts."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dropmuon_jax._checks import (
    check_extra_args,
    check_nonnegative,
    check_transformation,
    describe,
    did_you_mean,
)
from dropmuon_jax._labels import ROLES, role_labels
from dropmuon_jax._layers import Layers, leaf_paths, match_leaves
from dropmuon_jax._lmo import norm_lmo
from dropmuon_jax._masks import ignores_mask
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._mesh import scope
from dropmuon_jax._norms import Norm, column_norm, rms_norm, sign_norm, spectral_norm
from dropmuon_jax._orthogonalize import newton_schulz
from dropmuon_jax._radii import (
    AdaptiveRadius,
    Radius,
    check_radius,
    distinct_radii,
    gluon_radius,
    mvr_radius,
    star_convex_rate,
)
from dropmuon_jax._subtrees import chain_subtrees, per_layer

# Scion's norms (Pethick et al., 2025, arXiv:2502.07529) by role.
ROLE_NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "hidden": spectral_norm("scion", orthogonalize=newton_schulz()),
        "head": sign_norm(),
        # Of a table (tokens, features) that is an output layer too: its fan-in is the features.
        "tied_head": dataclasses.replace(
            sign_norm(), name="sign_norm() of a table", shape_factor="1/fan_out"
        ),
        "embedding": column_norm(),
        "bias": rms_norm(),
    }
)
assert set(ROLE_NORMS) == set(ROLES)


def role_subtrees(
    learning_rate: optax.ScalarOrSchedule,
    radii: Mapping[str, Radius],
    *,
    momentum: optax.GradientTransformation,
    constrained: bool,
    lmos: Mapping[str, optax.GradientTransformation] | None,
    roles: Mapping[str, str] | None,
    has_head: bool,
    dimension_numbers: DimensionNumbers | None,
    layers: Layers | None,
) -> optax.GradientTransformationExtraArgs:
    """A chain for each role: momentum, LMO, the pull to 0 of a constrained step, learning rate.

    With `layers`, some are dropped, and a sampler comes behind, which sets the updates of inactive
    ones to 0.
    """
    drops_layers = layers is not None
    check_rate("learning_rate", learning_rate)
    check_role_radii(radii)
    if constrained:
        check_constrained_rate(learning_rate)
        _check_constrained(radii)
    check_direction("momentum", momentum, drops_layers=drops_layers)
    directions: dict[str, optax.GradientTransformation] = {
        role: norm_lmo(
            ROLE_NORMS[role], radius, dimension_numbers=role_numbers(role, dimension_numbers)
        )
        for role, radius in radii.items()
    }
    if not isinstance(lmos, Mapping | None):
        raise TypeError(f"lmos must be a mapping from role to LMO, got {describe(lmos)}.")
    for role, lmo in (lmos or {}).items():
        check_direction(f"lmos[{role!r}]", lmo, drops_layers=drops_layers)
        directions[role] = lmo
    toward_zero = [optax.add_decayed_weights(1.0)] if constrained else []

    def labels(params: optax.Params) -> Any:
        params = params if layers is None else layers.row_shapes(params)
        for pattern, role in (roles or {}).items() if isinstance(roles, Mapping | None) else ():
            if isinstance(role, str) and role not in directions:
                raise ValueError(
                    f"roles gives '{pattern}' the role {role!r}, and neither radii nor lmos has it:"
                    f" they have {sorted(directions)}.{did_you_mean(role, directions)}"
                )
        tree = role_labels(params, roles, has_head=has_head)
        found = jax.tree.leaves(tree)
        for path, role in zip(leaf_paths(params), found, strict=True):
            if role not in directions:
                raise ValueError(
                    f"Leaf '{path}' is {role!r}, and neither radii nor lmos has that role: they "
                    f"have {sorted(directions)}.{did_you_mean(role, directions)}"
                )
        check_role_numbers(tree, dimension_numbers)
        for role in lmos or {}:
            if found and role not in found:
                raise ValueError(
                    f"lmos names the role {role!r}, and no leaf has it: the roles are "
                    f"{sorted(set(found))}.{did_you_mean(role, found)}"
                )
        return tree

    subtrees = chain_subtrees(
        {
            role: optax.chain(
                row_by_row(optax.chain(momentum, lmo, *toward_zero), layers),
                optax.scale_by_learning_rate(learning_rate),
            )
            for role, lmo in directions.items()
        },
        labels,
    )

    def update_fn(updates, state, params=None, **extra_args):
        if constrained and params is None:
            raise ValueError(
                "A constrained step pulls the parameters towards 0: pass them to update, "
                "tx.update(grads, opt_state, params)."
            )
        return subtrees.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(subtrees.init, update_fn)


def row_by_row(
    transformation: optax.GradientTransformation, layers: Layers | None
) -> optax.GradientTransformation:
    """Layer by layer where layers are stacked; else as it is, all matrices of a shape at once."""
    if layers is None or not layers.stacks:
        return transformation
    return per_layer(transformation, layers, takes_mask=True)


def role_numbers(role: str, numbers: DimensionNumbers | None) -> DimensionNumbers | None:
    """The dimension numbers of the leaves of a role: one for all leaves is for hidden ones."""
    if role in ("bias", "tied_head") or (role != "hidden" and not isinstance(numbers, Mapping)):
        return None
    return numbers


def check_role_numbers(labels: Any, numbers: DimensionNumbers | None) -> None:
    """Error for dimension numbers of leaves that have their own."""
    if not isinstance(numbers, Mapping):
        return
    paths = leaf_paths(labels)
    matches = match_leaves("dimension_numbers", numbers, paths)
    for path, role in zip(paths, jax.tree.leaves(labels), strict=True):
        if path in matches and role in ("bias", "tied_head"):
            raise ValueError(
                f"dimension_numbers: '{matches[path].pattern}' matches '{path}', which is "
                f"{role!r}. A bias is a whole leaf, and a tied head a table (tokens, features): "
                "they take none."
            )


def check_constrained_rate(learning_rate: optax.ScalarOrSchedule) -> None:
    """Error for a learning rate above 1, with which X would leave its ball."""
    first = learning_rate(0) if callable(learning_rate) else learning_rate
    if not isinstance(first, Tracer) and first > 1:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"learning_rate is the γ of (1 - γ)X + γ lmo, at most 1, got {first}. The length of a "
            "step is γ · radius."
        )


def _check_constrained(radii: Mapping[str, Radius]) -> None:
    """Error for a radius without a ball that stays."""
    for role, radius in radii.items():
        if any(isinstance(of_leaf, AdaptiveRadius) for of_leaf in distinct_radii(radius)):
            raise ValueError(
                f"radii[{role!r}] is adaptive, and a constrained step needs one ball to stay in: "
                "say constrained=False, or take dm.gluon."
            )


def check_role_radii(radii: Any) -> None:
    """Error unless radii are a mapping from known roles."""
    if not isinstance(radii, Mapping):
        raise TypeError(
            "radii must be a mapping from role to radius, such as {'hidden': 50.0, 'head': 3000.0},"
            f" got {describe(radii)}."
        )
    for role in radii:
        if "/" in role:
            raise ValueError(
                f"radii is by role, and {role!r} is a path: give the radii of all leaves as "
                "dict.fromkeys(dm.ROLES, by_path)."
            )
        if role not in ROLE_NORMS:
            raise ValueError(
                f"radii names the role {role!r}, and the norms are for {sorted(ROLE_NORMS)}."
                f"{did_you_mean(role, ROLE_NORMS)} An LMO for a role of your own goes, with its "
                "radius, into lmos."
            )
        check_radius(f"radii[{role!r}]", radii[role])


def every_layer(
    name: str, transformation: optax.GradientTransformation, *, dropping: str = ""
) -> optax.GradientTransformationExtraArgs:
    """The transformation without layer masks, which it would not honour everywhere.

    `dropping` is what does, by default `drop_` and the name.
    """
    transformation = optax.with_extra_args_support(transformation)

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        if layer_mask is not None:
            raise TypeError(
                f"{name} updates every layer and takes no layer_mask; use "
                f"{dropping or f'drop_{name}'}."
            )
        check_extra_args(extra_args)
        return transformation.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(transformation.init, update_fn)


def check_rate(name: str, rate: optax.ScalarOrSchedule) -> None:
    """Error for a learning rate that is negative or no number; a schedule passes."""
    for factory in (gluon_radius, mvr_radius):
        if rate is factory:
            raise TypeError(
                f"{name} is dm.{factory.__name__} itself: call it with the first radius."
            )
    if rate is star_convex_rate:
        raise TypeError(f"{name} is dm.star_convex_rate itself: call it.")
    if not callable(rate):
        check_nonnegative(name, rate)


def check_direction(
    name: str, transformation: optax.GradientTransformation, *, drops_layers: bool = False
) -> None:
    """Error for a transformation that turns the gradient's sign, such as a whole optimizer.

    Where layers are dropped, also for one that has a memory and does not look at `layer_mask`.
    """
    if isinstance(transformation, Norm):
        raise TypeError(
            f"{name} must be a transformation, got the norm {transformation}: make one with "
            "dm.norm_lmo(norm, radius)."
        )
    check_transformation(name, transformation)
    transformation = optax.with_extra_args_support(transformation)
    probe = {"probe": jnp.ones((2, 2))}
    try:
        with jax.ensure_compile_time_eval(), scope(is_probe=True):
            state = transformation.init(probe)
            step = functools.partial(transformation.update, prev_params_grads=probe)
            update: Any = step(probe, state, probe)[0]
            descends = bool(jnp.sum(update["probe"]) < 0)
    except (LookupError, TypeError, ValueError):
        return  # made for other parameters, or of traced numbers, whose sign is not known here
    if descends:
        raise ValueError(
            f"{name} must keep the gradient's sign, and the one given descends by itself: it has a "
            "learning rate already. Give the direction alone, such as optax.scale_by_adam() in "
            "place of optax.adam(…), and the rate as learning_rate or auxiliary_learning_rate."
        )
    if drops_layers and ignores_mask(transformation):
        raise ValueError(
            f"{name} changes its state in a layer that is not drawn, since it does not look at "
            "layer_mask. Freeze it layer by layer: dm.per_layer(…, layers). (With stacked layers "
            "write the whole chain: dm.per_layer(optax.chain(…), layers).)"
        )
