"""Any Optax transformation, frozen layer by layer, and row by row in stacked layers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dropmuon_jax._checks import check_transformation
from dropmuon_jax._layers import Layers, Stack, check_layers, leaf_paths
from dropmuon_jax._masks import check_rows, ignores_mask, is_static, resolve_mask
from dropmuon_jax._mesh import as_one_row, on_auto_axes
from dropmuon_jax._subtrees._rows import update_rows
from dropmuon_jax._subtrees._second_gradient import with_second_gradient


class PerLayerState(NamedTuple):
    """State of :func:`per_layer`."""

    inner_states: tuple[optax.OptState, ...]
    """One state of the inner transformation for each layer, counts included; for each stack one, of
    which every leaf has a row for each layer."""


def per_layer(
    inner: optax.GradientTransformation, layers: Layers, *, takes_mask: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax transformation layer by layer, so that an inactive layer is frozen whole.

    Each layer has a state of its own. An active layer's updates go through `inner` as if its leaves
    were the only parameters; an inactive layer has update zero and keeps every bit of its state,
    moments and counts included, so that Adam's bias correction counts the layer's own steps and
    weight decay acts on active layers only. Transformations that look at all leaves at once, such
    as `optax.clip_by_global_norm`, see one layer at a time; put those outside. (So does an LMO on a
    mesh, whose matrices then move layer by layer, but those of a stack together: an LMO looks at
    masks itself, and needs no `per_layer` where layers are not stacked.) Learning-rate
    schedules belong outside too: there they count all steps, and give the zero update the sign that
    keeps every bit even of a parameter of -0.0.

    **Stacked layers** (:func:`stacked`) pass row by row, in a loop over the active rows: `inner`
    is in the program once, however many layers there are, takes the time of the active ones, and
    sees leaves without their leading axis, so that a stack of biases is vectors and a stack of
    kernels matrices. This is where masks with rows, and traced ones, are taken: put all that has
    to do with stacks inside, such as
    `per_layer(chain(momentum(), newton_schulz_lmo()), layers, takes_mask=True)`.

    Args:
        inner: The transformation.
        layers: The layers, over the whole parameters; `per_layer` itself may run on a part of them,
            as inside :func:`chain_subtrees`.
        takes_mask: Whether `inner` looks at `layer_mask` itself, as the transformations of this
            package do, and Optax's do not. Then it hears of the steps in which a layer sleeps, by a
            mask that is False, so that schedules of decay and radius count all steps and
            :func:`mvr_momentum` knows how long a layer slept. Without, it does not run in these
            steps, and with numbers in place of schedules that is the same.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Extra arguments are passed on, those with the structure of the updates cut to the
        layer. The state is a :class:`PerLayerState`.

    Raises:
        TypeError: In `update`, if `inner` changes the dtype of its state in a stack.
        ValueError: At construction, for an `inner` that does not look at the mask it is to take; at
            `init`, for a leaf that is in no layer, or not of its stack's size; in `update`, for a
            mask that splits a layer. All but the first name the path.

    Examples:
        >>> import jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.ones(2), "head": jnp.ones(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> tx = dm.per_layer(optax.scale_by_adam(), layers)
        >>> _, state = tx.update(params, tx.init(params), layer_mask=layers.mask(1))
        >>> [int(inner.count) for inner in state.inner_states]
        [0, 1]
        >>> params = {"blocks": jnp.ones((3, 2))}
        >>> layers = dm.layers_by_path(params, [dm.stacked("blocks")])
        >>> tx = dm.per_layer(optax.scale_by_adam(), layers)
        >>> _, state = tx.update(params, tx.init(params), layer_mask=layers.mask(1))
        >>> print(state.inner_states[0].count)
        [0 1 1]
    """
    check_transformation("inner", inner)
    check_layers(layers)
    if takes_mask and ignores_mask(inner):
        raise ValueError(
            "takes_mask=True is for an inner that looks at layer_mask, and the one given changes "
            "its state in a layer that is not active, as Optax's own do: leave takes_mask out."
        )
    inner = optax.with_extra_args_support(inner)
    units = layers.units

    def init_fn(params: optax.Params) -> PerLayerState:
        unit_of_leaf = layers.units_of(params)
        _check_stacks(params, unit_of_leaf, layers)
        present = set(jax.tree.leaves(unit_of_leaf))
        states = []
        for index, unit in enumerate(units):
            init = jax.vmap(inner.init) if unit in layers.stacks else inner.init
            of_unit = _cut(params, unit_of_leaf, index)
            states.append(init(of_unit) if index in present else inner.init(of_unit))
        if not takes_mask and optax.tree.get_all_with_path(states, "MVRMomentumState"):
            raise ValueError(
                "mvr_momentum looks at the layer mask itself, and inside per_layer it cannot know "
                "how long a layer slept: leave per_layer out, or say takes_mask=True. It cannot be "
                "the auxiliary of drop_muon; write the chain with dm.chain_subtrees."
            )
        return PerLayerState(tuple(states))

    def update_fn(updates, state, params=None, *, layer_mask=None, **extra_args):
        layer_mask = resolve_mask(layer_mask, updates, extra_args, takes_rows=bool(layers.stacks))
        check_rows(layer_mask, layers)
        extra_args = with_second_gradient(extra_args, updates)
        unit_of_leaf = layers.units_of(updates)
        flags = _unit_flags(layer_mask, unit_of_leaf, units)
        structure = jax.tree.structure(updates)
        trees = {"updates": updates} | ({} if params is None else {"params": params})
        whole: dict[str, Any] = {}
        for name, value in extra_args.items():
            (trees if jax.tree.structure(value) == structure else whole)[name] = value

        def update(
            arguments: dict[str, Any], state: Any, whole: dict[str, Any] = whole, *, awake: bool
        ) -> tuple[Any, Any]:
            of_layer = dict(arguments)
            grads, params = of_layer.pop("updates"), of_layer.pop("params", None)
            if takes_mask:
                of_layer["layer_mask"] = jax.tree.map(lambda _: awake, grads)
            return inner.update(grads, state, params, **of_layer, **whole)

        def update_layer(arguments: Any, state: Any, active: bool) -> tuple[Any, Any]:
            if active:
                return update(arguments, state, awake=True)
            # Traced for the dtypes that an active layer would have, and never computed.
            shapes, _ = jax.eval_shape(functools.partial(update, awake=True), arguments, state)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return zeros, update(arguments, state, awake=False)[1] if takes_mask else state

        def update_stack(arguments: dict[str, Any], state: Any, rows: Any) -> tuple[Any, Any]:
            flags = {"rows": rows} if isinstance(rows, jax.Array) else {}
            arrays = {key: x for key, x in whole.items() if isinstance(x, jax.Array)}

            def of_rows(
                arguments: Any, state: Any, arrays: dict[str, Any], flags: dict[str, Any]
            ) -> tuple[Any, Any]:
                step = functools.partial(update, whole=whole | arrays)
                return update_rows(
                    step, arguments, state, flags.get("rows", rows), tells=takes_mask
                )

            grads = arguments["updates"]
            return on_auto_axes(
                of_rows, arguments, state, arrays, flags, named=grads, results_like=(grads, state)
            )

        leaves, inner_states = jax.tree.leaves(updates), list(state.inner_states)
        unit_indices = jax.tree.leaves(unit_of_leaf)
        for index, flag in flags.items():
            arguments = {name: _cut(tree, unit_of_leaf, index) for name, tree in trees.items()}
            old = inner_states[index]
            if units[index] in layers.stacks:
                rows = np.broadcast_to(flag, len(units[index].layers)) if is_static(flag) else flag
                new, inner_states[index] = update_stack(arguments, old, rows)
            elif is_static(flag):
                new, inner_states[index] = update_layer(arguments, old, flag)
            else:  # a stack of one row, since a loop of no turn costs nothing
                arguments, old = jax.tree.map(lambda x: x[None], (arguments, old))
                with as_one_row(arguments["updates"]):
                    result = update_stack(arguments, old, flag[None])
                new, inner_states[index] = jax.tree.map(lambda x: x[0], result)
            members = [i for i, of_leaf in enumerate(unit_indices) if of_leaf == index]
            for i, leaf in zip(members, jax.tree.leaves(new), strict=True):
                leaves[i] = leaf
        return jax.tree.unflatten(structure, leaves), PerLayerState(tuple(inner_states))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_stacks(params: Any, unit_of_leaf: Any, layers: Layers) -> None:
    """Error for a leaf of a stack without an entry for each row."""
    leaves = map(jax.tree.leaves, (params, unit_of_leaf))
    for path, leaf, index in zip(leaf_paths(params), *leaves, strict=True):
        unit = layers.units[index]
        if unit in layers.stacks and np.shape(leaf)[:1] != (len(unit.layers),):
            raise ValueError(
                f"Leaf '{path}' has shape {np.shape(leaf)}, and the stack '{unit.name}' "
                f"{len(unit.layers)} layers. Is this inside another dm.per_layer, which takes the "
                "leading axis away, as drop_muon does for its momentum and lmo? One is enough: "
                "write the chain with dm.per_layer(optax.chain(…), layers)."
            )


def _cut(tree: Any, unit_of_leaf: Any, index: int) -> Any:
    """The leaves of a unit; the others are masked."""
    return jax.tree.map(
        lambda of_leaf, x: x if of_leaf == index else optax.MaskedNode(), unit_of_leaf, tree
    )


def _unit_flags(layer_mask: Any, unit_of_leaf: Any, units: tuple[Stack, ...]) -> dict[int, Any]:
    """The flag of each unit of which there are leaves; an error if a mask splits a layer."""
    flags: dict[int, Any] = {}
    for path, flag, index in zip(
        leaf_paths(layer_mask),
        *map(jax.tree.leaves, (layer_mask, unit_of_leaf)),
        strict=True,
    ):
        first = flags.setdefault(index, flag)
        known = not isinstance(flag, jax.Array) and not isinstance(first, jax.Array)
        if (known and not np.array_equal(first, flag)) or np.shape(first) != np.shape(flag):
            raise ValueError(
                f"layer_mask is {flag} at '{path}' and {first} at another leaf of layer "
                f"{units[index].name}. per_layer freezes whole layers; make masks with layers.mask "
                "or layers.subset of the same layers."
            )
    return dict(sorted(flags.items()))
