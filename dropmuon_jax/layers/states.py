"""States of optimizers: whether one fits, the types that it keeps, and the mask of its parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey, KeyPath, keystr

from dropmuon_jax._checks import check_extra_args, check_parameters, check_transformation
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.trees import (
    inside_update,
    leaf_keys,
    leaf_paths,
    mask_in_force,
    resolve_whole_mask,
    restructure_like,
)

_KINDS = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)


def checked_transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that runs others, with a mask in force, on states that keep their types."""

    def init_fn(params: optax.Params) -> optax.OptState:
        # Arrays of a weak type would become strong ones in the first update, and compile it twice.
        state = init(params)
        return state_like(state, state)

    check = StateCheck(init_fn)

    def update_fn(updates, state, params=None, **extra_args):
        check(state, updates, params)
        has_mask = bool(mask_in_force()) or extra_args.get("depth") is not None
        if extra_args.get("layer_mask") is None:
            check_extra_args(extra_args)
        else:
            has_mask, layer_mask = True, extra_args["layer_mask"]
            extra_args["layer_mask"] = resolve_whole_mask(layer_mask, updates, extra_args)
        with inside_update(has_mask):
            new_updates, new_state = update(updates, state, params, **extra_args)
        return new_updates, state_like(state, new_state)

    return optax.GradientTransformationExtraArgs(check.init, update_fn)


def state_like(old: Any, new: Any) -> Any:
    """The new state in the dtypes of the old one, strongly typed, so that a loop can carry it."""

    def cast(like: Any, x: Any) -> Any:
        dtype, of_new = jax.typeof(like).dtype, jax.typeof(x)
        return x if of_new.dtype == dtype and not of_new.weak_type else jnp.asarray(x, dtype)

    return jax.tree.map(cast, old, new)


class StateCheck:
    """Refuses a state that `init` would not have made.

    Only the outermost transformation asks, and what has passed once is known by its structure,
    shapes and dtypes: one look-up in an eager update, and nothing in a compiled one.
    """

    def __init__(self, init: Callable[[Any], Any]) -> None:
        self._init = init
        self._known: set[Any] = set()

    def init(self, params: Any) -> Any:
        """The state of these parameters, which fits updates like them."""
        state = self._init(params)
        self._known |= {_key(state, params, None), _key(state, params, params)}
        return state

    def __call__(self, state: Any, updates: Any, params: Any = None) -> None:
        """Error unless the state fits the updates, and these the parameters, if there are any."""
        if mask_in_force() is None and (key := _key(state, updates, params)) not in self._known:
            if params is not None:
                _refuse_updates(updates, params)
            refuse_unfit(state, self._init, updates)
            self._known.add(key)


def _key(*trees: Any) -> Any:
    leaves, structure = jax.tree.flatten(trees)
    return structure, tuple((np.shape(x), getattr(x, "dtype", None)) for x in leaves)


def check_state(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    layers: Layers | None = None,
) -> None:
    """Checks, before a run, that a restored state is one of this optimizer and these parameters.

    Compares it with what `optimizer.init(params)` would make, of which nothing is computed:
    containers, leaves, shapes and kinds of dtypes. Holes (None), which Orbax leaves where a
    checkpoint of another arrangement has nothing, are found too. It is for the state of any
    optimizer, Optax's own included. The optimizers of this package refuse such a state themselves,
    while `update` is traced; this says so before anything is compiled.

    Args:
        optimizer: The transformation.
        params: The parameters, or `jax.ShapeDtypeStruct`s of them.
        state: The state.
        layers: The layers of this run; then parts of the state that are kept layer by layer must be
            those of the same layers, in the same order.

    Raises:
        TypeError: For an `optimizer` that is no transformation, or parameters that are no arrays of
            floating-point numbers.
        ValueError: If the state does not fit, naming field and leaf, and what may have changed; if
            it has a negative count; or if :func:`record_gains` was called with another sampler.

    Warns:
        UserWarning: If the state has other floating-point dtypes than `init` would give it, or
            plans by other costs. They are used, and kept.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> optimizer = dm.muon(0.1)
        >>> dm.check_state(optimizer, params, optimizer.init(params))
        >>> narrower = params | {"stem": jnp.ones((3, 2))}
        >>> try:
        ...     dm.check_state(optimizer, params, optimizer.init(narrower))
        ... except ValueError as error:
        ...     print(error)
        opt_state is not the state of this optimizer for these parameters: momentum of 'stem' is
        (3, 2) in place of (3, 4); parameters or stacks had other shapes. Make it with ...
    """
    check_transformation("optimizer", optimizer)
    check_parameters(params)
    expected = refuse_unfit(state, optimizer.init, params)
    _check_origin(state, optimizer.init, params)
    if layers is not None:
        check_layers(layers)
        _check_units(expected, params, layers)
    told: list[str] = []
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True)
    for (path, x), like in leaves:
        if path and path[-1] == GetAttrKey("count") and _is_known(x) and (np.asarray(x) < 0).any():
            raise ValueError(f"opt_state has a negative count: {_name_of(path, params)} is {x}.")
        if (dtype := jnp.result_type(x)) != like.dtype:
            told.append(f"{_name_of(path, params)} is {dtype} in place of {like.dtype}")
    if told:
        warnings.warn(
            f"opt_state has other dtypes than optimizer.init(params): {'; '.join(told[:3])}"
            f"{'; …' if told[3:] else ''}. They are used and kept; cast what should not be so.",
            stacklevel=2,
        )


def _is_known(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer)


def refuse_unfit(state: Any, init: Callable[[Any], Any], params: Any) -> Any:
    """Error unless a state has the containers, shapes and kinds of dtypes of `init(params)`'s."""
    expected = jax.eval_shape(init, params)
    given, wanted = _entries(state), _entries(expected)
    if given == wanted and jax.tree.structure(state) == jax.tree.structure(expected):
        return expected
    found = list(_differences(given, wanted))
    names = [f"{_name_of(path, params)} {words}; " for path, words in found[:3]]
    raise ValueError(
        "opt_state is not the state of this optimizer for these parameters: "
        f"{''.join(names)}{_cause(state, expected, found)} Make it with optimizer.init(params), of "
        "an NNX module with optimizer.init(nnx.state(module, nnx.Param)), or restore it onto that "
        "of the optimizer that has saved it."
    )


def _entries(tree: Any) -> dict[KeyPath, Any]:
    """By path: shape and kind of dtype of an array, and the type of a node without children."""

    def is_childless(x: Any) -> bool:
        return not jax.tree.leaves(x, is_leaf=lambda child: child is not x)

    def entry(x: Any) -> Any:
        if is_childless(x):
            return type(x)
        dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
        kinds = (kind.__name__ for kind in _KINDS if jnp.issubdtype(dtype, kind))
        return np.shape(x), next(kinds, str(dtype))

    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_childless)
    return {path: entry(x) for path, x in nodes}


def _differences(
    given: dict[KeyPath, Any], wanted: dict[KeyPath, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Where two states differ, and in what."""
    for path in {**wanted, **given}:
        x, y = given.get(path), wanted.get(path)
        if x == y:
            continue
        if isinstance(y, tuple) and not isinstance(x, tuple):
            yield path, "is None, a hole" if x is type(None) else "is missing"
        elif isinstance(x, tuple) and not isinstance(y, tuple):
            yield path, "is in it, and does not belong there"
        elif isinstance(x, tuple) and isinstance(y, tuple):
            words = next((of, due) for of, due in zip(x, y, strict=True) if of != due)
            yield path, "is {} in place of {}".format(*words)  # the shape or the kind


def _cause(state: Any, expected: Any, found: list[tuple[KeyPath, str]]) -> str:
    """What has probably changed between the optimizer that made a state and this one."""
    for given, wanted in zip(_containers(state), _containers(expected), strict=False):
        if given is not wanted:
            return (
                f"it has {given.__name__} where {wanted.__name__} belongs, as of an optimizer with "
                "other parts or of parameters in other containers, or if it was restored without "
                "its own."
            )
    if any(words.startswith("is None") for _, words in found):
        return "a checkpoint of other roles, layers or options leaves holes."
    if all(words.startswith("is (") for _, words in found):
        return "parameters or stacks had other shapes."
    return "other roles, layers or options keep other leaves."


def _containers(tree: Any) -> list[type]:
    """The types of the nodes of a tree, from the root on."""
    nodes: list[Any] = []
    jax.tree.leaves(tree, is_leaf=lambda x: bool(nodes.append(x)))  # none is one
    is_absent = (type(None), optax.MaskedNode)
    return [
        type(x) for x in nodes if not isinstance(x, is_absent) and not jax.tree_util.all_leaves([x])
    ]


def _name_of(path: KeyPath, params: Any) -> str:
    """A leaf of a state as `momentum of 'blocks/kernel'`, or by its path where it is of no one."""
    known = {of for of, _ in jax.tree_util.tree_leaves_with_path(params)}
    start = next((i for i in range(len(path)) if path[i:] in known), len(path))
    fields = [key.name for key in path[:start] if isinstance(key, GetAttrKey)]
    if start == len(path) or not fields:
        return f"opt_state{keystr(path)}"
    return f"{fields[-1]} of '{keystr(path[start:], simple=True, separator='/')}'"


def _refuse_updates(updates: Any, params: Any) -> None:
    """Error unless updates have the leaves and shapes of the parameters."""
    if leaf_keys(updates) != leaf_keys(params):
        check_parameters(params)  # which may be a whole module
        missing = sorted(set(leaf_paths(params)) - set(leaf_paths(updates)))
        if missing:
            raise ValueError(
                f"The updates have no leaf '{missing[0]}', which is one of params. The gradient of "
                "an inactive leaf is zeros, as dm.masked_value_and_grad makes it; what is never "
                "trained is left out of params too, by the same eqx.filter or eqx.partition."
            )
    restructure_like("updates", updates, params, reference_name="parameters")
    given, wanted = map(jax.tree.structure, (updates, params))
    if given != wanted:
        raise ValueError(
            f"The updates must have the containers of params, {wanted}, and have {given}: "
            "differentiate what was given to init, and give it to update."
        )


def _check_origin(state: Any, init: Callable[[Any], Any], params: Any) -> None:
    """Error if a state says itself that it is of another run than what `init` would make."""

    def origins(tree: Any) -> list[Any]:
        nodes = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "refuse_other"))
        return [node for node in nodes if hasattr(node, "refuse_other")]

    if (given := origins(state)) and all(map(_is_known, jax.tree.leaves(given))):
        own = jax.jit(lambda: origins(init(optax.tree.zeros_like(params))))()  # and nothing else
        for one, other in zip(*jax.tree.map(np.asarray, (given, own)), strict=True):
            one.refuse_other(other, [])


def _check_units(expected: Any, params: Any, layers: Layers) -> None:
    """Error unless what a state keeps layer by layer is of these layers."""
    units = jax.tree.leaves(layers.units_of(params))
    leaves = zip(leaf_keys(params), leaf_paths(params), units, strict=True)
    known = sorted(leaves, key=lambda of: -len(of[0]))  # `block/norm/scale` before `norm/scale`
    for _, node in optax.tree.get_all_with_path(expected, "PerLayerState"):
        for index, of_layer in enumerate(node.inner_states):
            for key in leaf_keys(of_layer):
                fits = (of[1:] for of in known if of[0] and key.endswith(of[0]))
                if (found := next(fits, ("", index)))[1] != index:
                    raise ValueError(
                        f"The optimizer was made for other layers: it keeps '{found[0]}' in "
                        f"its layer {index}, and these layers have it in {found[1]}."
                    )
