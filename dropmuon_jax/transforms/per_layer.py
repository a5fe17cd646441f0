"""Any Optax transformation, frozen layer by layer, also in stacked layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from dropmuon_jax._checks import check_transformation
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.prefixes import remembered_labels, without_masked
from dropmuon_jax.layers.rows import (
    RowAxes,
    StackedLeaves,
    flags_along,
    one_by_one,
    row_axes,
    take_row,
    zeros_for_rows,
)
from dropmuon_jax.layers.states import state_like
from dropmuon_jax.layers.trees import inside_update, is_static, leaf_paths, where_active
from dropmuon_jax.orthogonalize.batches import execution
from dropmuon_jax.transforms.masked import (
    masked_transformation,
    promoting,
    with_second_gradient,
)

Rows = Bool[np.ndarray, " layers"] | Bool[Array, " *layers"]
Result = tuple[Any, Any]  # updates and state
Step = Callable[[Any, Any], Result]  # from the arguments and the state of an active layer


class PerLayerState(NamedTuple):
    """State of :func:`per_layer`."""

    inner_states: tuple[optax.OptState, ...]
    """One state of the inner transformation for each layer, counts included, without the keys of
    other layers; for each stack one, of which every leaf has an entry for each layer: along the
    axis of a parameter if it has its path and shape, as momenta do, and else along the first."""


def per_layer(
    inner: optax.GradientTransformation, layers: Layers, *, takes_mask: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Runs any Optax transformation layer by layer, so that an inactive layer is frozen whole.

    Each layer has a state of its own. An active layer's updates go through `inner` as if its leaves
    were the only parameters; an inactive layer has update zero and keeps every bit of its state,
    moments and counts included, so that Adam's bias correction counts the layer's own steps and
    weight decay acts on active layers only. Transformations that look at all leaves at once, such
    as `optax.clip_by_global_norm`, see one layer at a time; put those outside. Learning-rate
    schedules belong outside too: there they count all steps, and give the zero update the sign that
    keeps every bit even of a parameter of -0.0. The momenta and LMOs of this package look at masks
    themselves, and need no `per_layer` where layers are not stacked.

    **Stacked layers** (:func:`stacked`) are updated one by one, in a loop over the active ones:
    `inner` is in the program once, however many layers there are, takes the time of the active
    ones, and sees leaves without their axis of layers, so that a stack of biases is vectors and a
    stack of kernels matrices. This is where masks with flags for a stack, and traced ones, are
    taken: put all that has to do with stacks inside, such as
    `per_layer(chain(momentum(), newton_schulz_lmo()), layers, takes_mask=True)`.

    The state keeps its dtypes, whatever dtypes the gradients have: what `inner` returns is cast.

    Args:
        inner: The transformation.
        layers: The layers, over the whole parameters; `per_layer` itself may run on a part of them,
            as inside :func:`chain_subtrees`.
        takes_mask: Whether `inner` looks at `layer_mask` itself, as the transformations of this
            package do, and Optax's do not. Then it also runs in the steps in which a layer is
            inactive, with a mask that is False, so that schedules of decay and radius count all
            steps and :func:`mvr_momentum` knows how long a layer was inactive. Without, it does not
            run in these steps, and with numbers in place of schedules that is the same.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). Extra arguments are passed on, those with the structure of the updates cut to the
        layer. The state is a :class:`PerLayerState`.

    Raises:
        TypeError: At construction, for an `inner` that is no transformation, or that takes no extra
            arguments where it is to take the mask.
        ValueError: At `init`, for a leaf that is in no layer, or not of its stack's size; in
            `update`, for a mask that splits a layer. All name the path.

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
    if takes_mask and not isinstance(inner, optax.GradientTransformationExtraArgs):
        raise TypeError(
            "takes_mask=True is for an inner that looks at layer_mask, and this one takes no extra "
            "arguments, as most of Optax's own do: leave takes_mask out."
        )
    inner = optax.with_extra_args_support(inner) if takes_mask else promoting(inner)
    units = layers.units
    state_of = remembered_labels(
        lambda of_unit: jax.eval_shape(inner.init, layers.row_shapes(of_unit))
    )
    axes_of = remembered_labels(
        lambda of_unit: row_axes(
            inner.init, layers.row_shapes(of_unit), layers.row_axes_of(of_unit)
        )
    )

    def init(params: optax.Params) -> PerLayerState:
        unit_of_leaf, states = layers.units_of(params), []
        for index, unit in enumerate(units):
            of_unit, init_unit = _cut(params, unit_of_leaf, index), inner.init
            if unit in layers.stacks and jax.tree.leaves(of_unit):
                _check_stack(of_unit, layers.row_axes_of(of_unit), unit)
                axes = axes_of(of_unit)
                init_unit = jax.vmap(inner.init, (axes.updates,), axes.state)
            state = init_unit(of_unit)
            states.append(without_masked(state_like(state, state)))
        if not takes_mask and optax.tree.get_all_with_path(states, "MVRMomentumState"):
            raise ValueError(
                "mvr_momentum looks at the layer mask itself, and inside per_layer it cannot know "
                "how long a layer was inactive: leave per_layer out, or say takes_mask=True. It "
                "cannot be the auxiliary of drop_muon; write the chain with dm.chain_subtrees."
            )
        return PerLayerState(tuple(states))

    def update(
        updates: optax.Updates, state: PerLayerState, params: Any, layer_mask: Any, extra_args: Any
    ) -> tuple[optax.Updates, PerLayerState]:
        if layers.stacks:
            layers.check_rows(layer_mask)
        unit_of_leaf, structure = layers.units_of(updates), jax.tree.structure(updates)
        trees = {"updates": updates} if params is None else {"updates": updates, "params": params}
        whole: dict[str, Any] = {}
        for name, value in with_second_gradient(extra_args, updates).items():
            (trees if jax.tree.structure(value) == structure else whole)[name] = value
        states, of_units = list(state.inner_states), {}
        for index, flag in _unit_flags(layer_mask, unit_of_leaf, layers).items():
            arguments = {name: _cut(tree, unit_of_leaf, index) for name, tree in trees.items()}
            step = _LayerStep(inner, takes_mask, whole)
            if units[index] in layers.stacks:
                xp = jnp if isinstance(flag, jax.Array) else np
                flag = xp.broadcast_to(flag, (len(units[index].layers),))
                step = step._replace(axes=axes_of(arguments["updates"]).of(arguments))
            update_unit: Any = _update_layer if is_static(flag) else _update_in_loop
            kept, stored = jax.tree.flatten(states[index])
            old = jax.tree.structure(state_of(arguments["updates"])).unflatten(kept)
            new, after = update_unit(step, arguments, old, flag)
            of_units[index] = iter(jax.tree.leaves(new))
            states[index] = stored.unflatten(jax.tree.leaves(after))
        leaves = [next(of_units[index]) for index in jax.tree.leaves(unit_of_leaf)]
        return structure.unflatten(leaves), PerLayerState(tuple(states))

    return masked_transformation(init, update, takes_rows=bool(layers.stacks))


class _LayerStep(NamedTuple):
    """What a step does to a layer: functions of its state, and by name of what `update` takes."""

    inner: optax.GradientTransformationExtraArgs
    takes_mask: bool
    whole: dict[str, Any]
    """The extra arguments that have not the structure of the updates."""
    axes: RowAxes = RowAxes()
    """Of a stack."""

    def active(self, arguments: dict[str, Any], state: Any) -> Result:
        """The updates and the new state of an active layer."""
        return self._update(arguments, state, active=True)

    def inactive(self, arguments: dict[str, Any], state: Any) -> Any:
        """The new state of an inactive layer."""
        return self._update(arguments, state, active=False)[1] if self.takes_mask else state

    def _update(self, arguments: dict[str, Any], state: Any, *, active: bool) -> Result:
        of_layer = dict(arguments)
        grads, params = of_layer.pop("updates"), of_layer.pop("params", None)
        if self.takes_mask:
            of_layer["layer_mask"] = jax.tree.map(lambda _: active, grads)
        with inside_update(has_mask=self.takes_mask):
            updates, new = self.inner.update(grads, state, params, **of_layer, **self.whole)
        return updates, state_like(state, new)


def _update_layer(step: _LayerStep, arguments: Any, state: Any, active: bool) -> Result:
    """The updates and the new state of a layer that is not stacked."""
    if active:
        return step.active(arguments, state)
    # Traced for the dtypes that the updates would have, and never computed.
    updates, _ = jax.eval_shape(step.active, arguments, state)
    zeros = jax.tree.map(
        lambda g, update: jnp.zeros_like(g, dtype=update.dtype), arguments["updates"], updates
    )
    return zeros, step.inactive(arguments, state)


def _update_in_loop(step: _LayerStep, arguments: Any, state: Any, active: Rows) -> Result:
    """The updates and the new state of a stack, or of a layer whose flag is not known now."""
    grads, on_devices = arguments["updates"], execution(arguments, state)
    given = step.whole, active
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, given)

    def run(arguments: Any, state: Any, arrays: Any) -> Result:
        # All arrays are arguments, since `call` allows of none in a closure.
        whole, active = jax.tree.map(lambda x, y: x if y is None else y, given, arrays)
        of_layer = step._replace(whole=whole)
        is_stack = np.ndim(active) == 1
        loop, of_one, axes = _at_most_once, (arguments, state), step.axes
        if is_stack:
            loop = functools.partial(on_devices.update_rows or one_by_one, axes=axes)
            of_one = take_row(of_one, 0, axes[:2])
        zeros = zeros_for_rows(
            lambda *one: of_layer.active(*one)[0], np.size(active), *of_one, axes=axes.updates
        )
        updates, new = loop(of_layer.active, arguments, state, zeros, active)
        if step.takes_mask and not (isinstance(active, np.ndarray) and active.all()):
            new = _advance_inactive(of_layer, arguments, state, new, active)
        return updates, new

    return on_devices.call(run, arguments, state, arrays, named=grads, results_like=(grads, state))


def _at_most_once(step: Step, arguments: Any, state: Any, updates: Any, active: Array) -> Result:
    """The same of a layer that is not stacked, where `updates` has a leading axis of length 1."""
    start, count = (take_row(updates, 0), state), active.astype(jnp.int32)
    # A loop of one turn or none is computed in place; XLA's conditionals may copy the state.
    return jax.lax.fori_loop(0, count, lambda _, carry: step(arguments, carry[1]), start)


def _advance_inactive(step: _LayerStep, arguments: Any, old: Any, new: Any, active: Rows) -> Any:
    """The new state, with what a step changes in inactive layers too, such as counts."""

    def changes(arguments: Any, state: Any) -> dict[int, Array]:
        after = jax.tree.leaves(step.inactive(arguments, state))
        leaves = enumerate(zip(jax.tree.leaves(state), after, strict=True))
        return {i: leaf for i, (before, leaf) in leaves if leaf is not before}

    changed = (jax.vmap(changes, step.axes[:2]) if np.ndim(active) else changes)(arguments, old)
    leaves, treedef = jax.tree.flatten(new)
    axes = jax.tree.leaves(jax.tree.broadcast(step.axes.state, new))
    for i, leaf in changed.items():
        leaf = jnp.moveaxis(leaf, 0, axes[i]) if axes[i] else leaf
        leaves[i] = where_active(flags_along(axes[i], active), leaves[i], leaf)
    return treedef.unflatten(leaves)


def _check_stack(params: Any, axes: list[int | None], stack: StackedLeaves) -> None:
    """Error for a leaf of a stack without an entry for each layer."""
    leaves = jax.tree.leaves(params)
    for path, leaf, axis in zip(leaf_paths(params), leaves, axes, strict=True):
        if axis is None or np.shape(leaf)[axis : axis + 1] != (len(stack.layers),):
            raise ValueError(
                f"Leaf '{path}' has shape {np.shape(leaf)}, and the stack '{stack.name}' "
                f"{len(stack.layers)} layers. Is this inside another dm.per_layer, which takes the "
                "axis of layers away, as drop_muon does for its momentum? One is enough: write the "
                "chain with dm.per_layer(optax.chain(…), layers)."
            )


def _cut(tree: Any, unit_of_leaf: Any, index: int) -> Any:
    """The leaves of a unit; the others are masked."""
    return jax.tree.map(lambda i, x: x if i == index else optax.MaskedNode(), unit_of_leaf, tree)


def _unit_flags(layer_mask: Any, unit_of_leaf: Any, layers: Layers) -> dict[int, Any]:
    """The flag of each unit of which there are leaves; an error if a mask splits a layer."""
    flags: dict[int, Any] = {}
    leaves = map(jax.tree.leaves, (layer_mask, unit_of_leaf))
    for i, (flag, index) in enumerate(zip(*leaves, strict=True)):
        flag = flag.ravel() if np.ndim(flag) > 1 else flag
        first = flags.setdefault(index, flag)
        known = not isinstance(flag, jax.Array) and not isinstance(first, jax.Array)
        if (known and not np.array_equal(first, flag)) or np.shape(first) != np.shape(flag):
            raise ValueError(
                f"layer_mask is {flag} at '{leaf_paths(layer_mask)[i]}' and {first} at another "
                f"leaf of layer {layers.units[index].name}. per_layer freezes whole layers; make "
                "masks with layers.mask or layers.subset of the same layers."
            )
    return dict(sorted(flags.items()))
