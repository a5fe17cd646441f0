"""Argument checks, one wording each.

Hyper-parameters are checked only when they are Python numbers: an array may be traced (a schedule,
`optax.inject_hyperparams`), and its value is not known here.
"""

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_python_number(value: Any) -> bool:
    """Whether a value is a number known now, not an array and not a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checkable(name: str, value: Any) -> bool:
    """Whether the range of a numeric argument can be checked now; an error if it is no number."""
    if is_python_number(value):
        return True
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if np.shape(value) != ():
            raise ValueError(f"{name} must be one number, got an array of shape {value.shape}.")
        return False
    raise TypeError(f"{name} must be a number or a scalar array, got {value!r}.")


def check_number(name: str, value: Any) -> None:
    """Error unless a value is a number or a scalar array."""
    _checkable(name, value)


def check_positive(name: str, value: Any) -> None:
    """Error unless a Python number is finite and greater than zero."""
    if _checkable(name, value) and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Error unless a Python number is finite and at least zero."""
    if _checkable(name, value) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}.")


def check_decay(name: str, value: Any) -> None:
    """Error unless a Python number lies in [0, 1)."""
    if _checkable(name, value) and not 0 <= value < 1:
        raise ValueError(
            f"{name} is the weight of the past and must lie in [0, 1), got {value}. "
            "Drop-Muon's β, which weighs the new gradient, is 1 - decay."
        )


def check_floating(name: str, dtype: Any) -> None:
    """Error unless a dtype is one of real floating-point numbers."""
    if isinstance(dtype, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a dtype, got an array. It is static: under optax.inject_hyperparams, "
            "which takes dtypes for schedules, name it in static_args."
        )
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        raise TypeError(f"{name} must be a dtype, such as jnp.bfloat16, got {dtype!r}.") from None
    if not is_floating:
        raise TypeError(f"{name} must be of a floating-point dtype, got {jnp.dtype(dtype).name}.")


def static_int(name: str, value: Any, *, minimum: int, hint: str = "") -> int:
    """The Python integer that a static argument must be.

    Args:
        name: What the message calls it.
        value: What was given.
        minimum: The smallest allowed value.
        hint: The way out, for a value that is no Python integer.

    Raises:
        TypeError: If `value` is traced or no integer.
        ValueError: If it is below `minimum`.
    """
    hint = f" {hint}" if hint else ""
    if isinstance(value, jax.Array) or isinstance(value, bool):
        kind = "an array" if isinstance(value, jax.Array) else "a truth value"
        raise TypeError(f"{name} must be a Python integer, got {kind}.{hint}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a Python integer, got {value!r}.{hint}") from None
    if integer < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {integer}.")
    return integer


def check_index(name: str, value: jax.Array) -> None:
    """Error unless an array is one integer."""
    if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be one integer, got an array of {value.dtype.name}{list(value.shape)}."
        )


def check_transformation(name: str, value: Any) -> None:
    """Error unless a value is an Optax transformation: a pair of `init` and `update`."""
    if not isinstance(value, optax.GradientTransformation):
        called = ""
        if hasattr(value, "gradient_transformation"):  # optax.MultiSteps
            called = " Give its gradient_transformation()."
        elif callable(value):
            called = " If it makes one, call it; a function of matrices goes into dm.spectral_lmo."
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {describe(value)}.{called}"
        )


def describe(value: Any) -> str:
    """A value for a message: numbers and names as they are, of anything larger the type."""
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    return f"a {type(value).__name__}"


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Error unless a name is among the known ones; the message lists them."""
    known = sorted(choices)
    if value not in known:
        raise ValueError(
            f"{name} must be one of {known}, got {value!r}.{did_you_mean(value, known)}"
        )


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_extra_args(extra_args: Mapping[str, Any]) -> None:
    """Error for an extra argument of `update` that stands where `layer_mask` is missing.

    Optax hands every extra argument to every link of a chain, so unknown names must be let
    through; `layer_masks=` would then silently mean "all layers active".
    """
    for name in extra_args:
        if difflib.get_close_matches(name.lower(), ("layer_mask", "mask"), n=1, cutoff=0.75):
            raise TypeError(
                f"update() got an unknown extra argument {name!r}. Did you mean 'layer_mask'?"
            )
