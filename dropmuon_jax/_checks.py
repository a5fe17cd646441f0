"""Argument checks, one wording each.

Hyper-parameters are checked only when they are Python numbers: an array may be traced (a schedule,
`optax.inject_hyperparams`), and its value is not known here.
"""

import difflib
import math
import numbers
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Leaves that are statistics, whatever is beside them.
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")


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


def static_int(name: str, value: Any, *, minimum: float, hint: str = "") -> int:
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
            # Its gradient_transformation() takes no extra arguments, and so loses the layer mask.
            called = (
                " Give optax.GradientTransformationExtraArgs(steps.init, steps.update) of your "
                f"{type(value).__name__} `steps`; or, where micro-batches share a depth, as in "
                "dm.train_step, dm.accumulate(optimizer, sampler)."
            )
        elif callable(value):
            called = (
                " If it makes one, call it; a function that orthogonalizes matrices goes into "
                "dm.norms.spectral_norm(orthogonalize=…)."
            )
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
    """Error for an extra argument of `update` whose name is a slip for `layer_mask`.

    Optax hands every extra argument to every link of a chain, so other unknown names are let
    through, `layers=` too; `layer_masks=` would silently mean "all layers active".
    """
    for name in extra_args:
        if difflib.get_close_matches(name.lower(), ("layer_mask",), n=1, cutoff=0.8):
            raise TypeError(
                f"update() got an unknown extra argument {name!r}. Did you mean 'layer_mask'?"
            )


def check_parameters(tree: Any, argument: str = "params") -> None:
    """Error for a leaf that is no trainable floating-point array, with what was probably given."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None:
        nodes = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, nnx.Module | nnx.Variable)
        )
        for path, node in nodes:
            if isinstance(node, nnx.Module):
                raise TypeError(
                    f"{argument} holds the nnx.Module {type(node).__name__}, whose statistics, "
                    "keys and counts are no parameters: give nnx.state(module, nnx.Param)."
                )
            if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
                at = jax.tree_util.keystr(path, simple=True, separator="/")
                raise TypeError(
                    f"{argument}: '{at}' is an nnx.{type(node).__name__}, no parameter. Give the "
                    "parameters alone, such as nnx.state(module, nnx.Param)."
                )
    # A node comes before what is in it.
    for node in _mappings(tree):
        if "params" in node and len(node) > 1:
            others = ", ".join(repr(name) for name in node if name != "params")
            raise TypeError(
                f"{argument} holds {others} beside 'params', as the variables of Flax Linen do, "
                "and statistics and caches are not trained: give variables['params']; if all of it "
                "is trained, rename 'params'."
            )
    _check_statistics(tree, argument)
    eqx: Any = sys.modules.get("equinox")
    is_equinox = eqx is not None and isinstance(tree, eqx.Module)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            continue
        if not path and isinstance(leaf, int):
            cure = "The number of a step is for a step alone: what looks at one takes the rest"
        elif callable(leaf) or is_equinox:
            cure = (
                "Of an Equinox model give the arrays alone: eqx.filter(model, eqx.is_inexact_array)"
            )
        elif isinstance(leaf, float | complex):
            cure = f"Make it an array, jnp.asarray({leaf})"
        elif dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            cure = (
                "Train its real and imaginary part: params = dm.layers.split_complex(params), and "
                "dm.layers.join_complex(params) in the loss"
            )
        else:
            cure = (
                "Statistics, keys, counts and tables of integers are not trained: keep them beside "
                "the parameters (of NNX give nnx.state(module, nnx.Param), of Equinox "
                "eqx.filter(model, eqx.is_inexact_array))"
            )
        kind = describe(leaf) if dtype is None else f"an array of {dtype}"
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        raise TypeError(
            f"{argument} must be trainable floating-point arrays, and leaf '{at}' is {kind}. "
            f"{cure}."
        )


def _mappings(tree: Any) -> Iterator[Mapping[Any, Any]]:
    """All mappings in a tree, the outer ones first."""
    inner, _ = jax.tree.flatten(
        tree, is_leaf=lambda node: node is not tree and isinstance(node, Mapping)
    )
    if isinstance(tree, Mapping):
        yield tree
    for node in inner:
        if isinstance(node, Mapping) and node is not tree:
            yield from _mappings(node)


def _check_statistics(tree: Any, argument: str) -> None:
    """Error for running statistics among parameters, known by their names and neighbours."""
    eqx: Any = sys.modules.get("equinox")
    is_index: Any = (lambda node: isinstance(node, eqx.nn.StateIndex)) if eqx else None
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_index)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in nodes]
    called = [at.replace(".", "/").rpartition("/") for at in names]  # PyTorch has dots
    modules: dict[str, set[str]] = {}
    for module, _, name in called:
        modules.setdefault(module, set()).add(name)
    for at, (module, _, name), (_, node) in zip(names, called, nodes, strict=True):
        beside = modules[module]
        of_norm = beside & {"scale", "bias"} or "norm" in module.rpartition("/")[2].lower()
        is_pair = name in ("mean", "var") and {"mean", "var"} <= beside and of_norm
        if is_index is not None and is_index(node) and jax.tree.leaves(node):
            cure = "of Equinox take eqx.nn.make_with_state(…), or eqx.nn.delete_init_state(model)"
        elif is_pair or name in _STATISTICS or "batch_stats" in at.split("/"):
            cure = (
                "give variables['params'], nnx.state(module, nnx.Param) or, of Keras, "
                "model.trainable_variables; or rename it"
            )
        else:
            continue
        raise TypeError(
            f"{argument}: '{at}' is a running statistic, no parameter, and would be trained: keep "
            f"it beside the parameters ({cure})."
        )
