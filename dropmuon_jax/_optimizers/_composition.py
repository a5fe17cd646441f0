"""What the ready-made optimizers have in common: chains by role, and checks of their parts."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dropmuon_jax._checks import (
    check_extra_args,
    check_nonnegative,
    check_transformation,
    describe,
    did_you_mean,
    is_python_number,
)
from dropmuon_jax._labels import ROLES, role_labels
from dropmuon_jax._layers import leaf_paths
from dropmuon_jax._lmo import norm_lmo
from dropmuon_jax._matrices import DimensionNumbers
from dropmuon_jax._norms import Norm, column_norm, rms_norm, sign_norm, spectral_norm
from dropmuon_jax._orthogonalize import newton_schulz
from dropmuon_jax._radii import Radius
from dropmuon_jax._subtrees import chain_subtrees

Freeze = Callable[[optax.GradientTransformation], optax.GradientTransformation]

# Scion's norms (Pethick et al., 2025, arXiv:2502.07529) by role.
ROLE_NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "hidden": spectral_norm("scion", orthogonalize=newton_schulz()),
        "head": sign_norm(),
        # Of a table (tokens, features) that is an output layer too: its fan-in is the features.
        "tied_head": dataclasses.replace(sign_norm(), shape_factor="1/fan_out"),
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
    freeze: Freeze,
) -> optax.GradientTransformationExtraArgs:
    """A chain for each role: momentum, LMO, the pull to 0 of a constrained step, learning rate."""
    check_rate("learning_rate", learning_rate)
    if constrained and is_python_number(learning_rate) and learning_rate > 1:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(
            f"learning_rate is the γ of (1 - γ)X + γ lmo, at most 1, got {learning_rate}. The "
            "length of a step is γ · radius."
        )
    check_direction("momentum", momentum)
    check_role_radii(radii)
    directions: dict[str, optax.GradientTransformation] = {
        role: norm_lmo(
            ROLE_NORMS[role],
            radius,
            dimension_numbers=dimension_numbers if role == "hidden" else None,
        )
        for role, radius in radii.items()
    }
    for role, lmo in (lmos or {}).items():
        check_direction(f"lmos[{role!r}]", lmo)
        directions[role] = lmo
    toward_zero = [freeze(optax.add_decayed_weights(1.0))] if constrained else []

    def labels(params: optax.Params) -> Any:
        tree = role_labels(params, roles, has_head=has_head)
        for path, role in zip(leaf_paths(params), jax.tree.leaves(tree), strict=True):
            if role not in directions:
                raise ValueError(
                    f"Leaf '{path}' is {role!r}, and neither radii nor lmos has that role: they "
                    f"have {sorted(directions)}."
                )
        return tree

    return chain_subtrees(
        {
            role: optax.chain(
                momentum, lmo, *toward_zero, optax.scale_by_learning_rate(learning_rate)
            )
            for role, lmo in directions.items()
        },
        labels,
    )


def check_role_radii(radii: Any) -> None:
    """Error unless radii are a mapping from known roles."""
    if not isinstance(radii, Mapping):
        raise TypeError(
            "radii must be a mapping from role to radius, such as {'hidden': 50.0, 'head': 3000.0},"
            f" got {describe(radii)}."
        )
    for role in radii:
        if role not in ROLE_NORMS:
            raise ValueError(
                f"radii names the role {role!r}, and the norms are for {sorted(ROLE_NORMS)}."
                f"{did_you_mean(role, ROLE_NORMS)} An LMO for a role of your own goes, with its "
                "radius, into lmos."
            )


def every_layer(
    name: str, transformation: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation without layer masks, which it would not honour everywhere."""

    def update_fn(updates, state, params=None, **extra_args):
        if extra_args.get("layer_mask") is not None:
            raise TypeError(f"{name} updates every layer and takes no layer_mask; use drop_{name}.")
        check_extra_args(extra_args)
        return transformation.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(transformation.init, update_fn)


def check_rate(name: str, rate: optax.ScalarOrSchedule) -> None:
    """Error for a learning rate that is negative or no number; a schedule passes."""
    if not callable(rate):
        check_nonnegative(name, rate)


def check_direction(name: str, transformation: optax.GradientTransformation) -> None:
    """Error for a transformation that turns the gradient's sign, such as a whole optimizer."""
    check_transformation(name, transformation)
    probe = {"probe": jnp.ones((2, 2))}
    try:
        with jax.ensure_compile_time_eval():
            update: Any = transformation.update(probe, transformation.init(probe), probe)[0]
            descends = bool(jnp.sum(update["probe"]) < 0)
    except (LookupError, TypeError, ValueError):
        return  # made for other parameters, or of traced numbers, whose sign is not known here
    if descends:
        raise ValueError(
            f"{name} must keep the gradient's sign, and the one given descends by itself: it has a "
            "learning rate already. Give the direction alone, such as optax.scale_by_adam() in "
            "place of optax.adam(…), and the rate as learning_rate or auxiliary_learning_rate."
        )
