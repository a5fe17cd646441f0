"""`Layers`: which leaf belongs to which layer, and the layer masks made from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dropmuon_jax._checks import check_choice, check_index, describe, static_int
from dropmuon_jax.layers.rows import Leaf, StackedLeaves, flags_along, row_shape
from dropmuon_jax.layers.trees import leaf_keys, leaf_paths


@dataclasses.dataclass(frozen=True)
class Layers:
    """An order of layers, from the input (depth 0) to the output, over the leaves of a tree.

    A *layer* is a group of parameter leaves that are updated together. A *depth* s means that the
    layers s, s+1, …, num_layers - 1 are active. A *layer mask* is a tree with the structure of the
    parameters and Python booleans as leaves, True where the leaf is active; for leaves of
    :func:`stacked` layers also arrays of booleans, one for each layer: vectors, or along another
    axis a than the first of shape (1, …, 1, L), with a ones. `Layers` is immutable and hashable,
    holds no array, and is made by :func:`layers_by_path` or :func:`trace_layers`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"embed": jnp.zeros((9, 4)), "blocks": jnp.zeros((3, 4, 4))}
        >>> dm.layers_by_path(params, ["embed", dm.stacked("blocks")]).mask(2)
        {'blocks': array([False,  True,  True]), 'embed': False}
    """

    names: tuple[str, ...]  # one for each layer, shallow to deep
    treedef: Any = dataclasses.field(repr=False)
    leaves: tuple[Leaf, ...] = dataclasses.field(repr=False)
    stacks: tuple[StackedLeaves, ...] = dataclasses.field(repr=False, default=())

    @property
    def num_layers(self) -> int:
        """The number of layers b; depths are 0 … b - 1."""
        return len(self.names)

    def mask(self, depth: int | Int[Array, ""]) -> Any:
        """The layer mask of a depth: True from the layer `depth` to the last one.

        Args:
            depth: A Python integer in [0, num_layers), static under `jax.jit`. Where layers are
                stacked also an integer array, which may be traced and is clipped.

        Returns:
            A tree of Python booleans with the structure of the parameters, NumPy arrays where a
            part of a stack is active. Of an array: arrays, but True at leaves of the last layer.

        Raises:
            TypeError: If `depth` is no integer, or an array and no layers are stacked.
            ValueError: If a Python integer is out of range.
        """
        depth, last = self._check_depth(depth), self.num_layers - 1
        if isinstance(depth, int):
            return self.subset([layer >= depth for layer in range(self.num_layers)])
        clipped = jnp.clip(depth.astype(jnp.int32), 0, last)
        return self._mask_of(lambda x: True if isinstance(x, int) and x == last else clipped <= x)

    def subset(self, active: Sequence[bool] | Bool[Array, " num_layers"]) -> Any:
        """The layer mask of an arbitrary set of layers, a tree as :meth:`mask` returns it.

        Args:
            active: One Python boolean for each layer, shallow to deep. Where layers are stacked
                also a vector of booleans that may be traced, such as
                `jnp.asarray(sampler.subsets)[sampler.sample(count)]`.

        Raises TypeError or ValueError if they are not one boolean for each layer.
        """
        if np.shape(active) != (self.num_layers,):
            needed = f"{self.num_layers} entries, one for each of the layers"
            raise ValueError(
                f"active must have {needed} {', '.join(self.names)}; got {len(active)}."
            )
        if self.stacks and isinstance(active, jax.Array) and active.dtype == bool:
            return self._mask_of(lambda x: active[x])
        for flag in active:
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(f"active must hold Python booleans, got {flag!r}.")
        on = np.array(active, bool)
        return self._mask_of(lambda x: bool(on[x].all()) if on[x].all() == on[x].any() else on[x])

    def _mask_of(self, select: Callable[[Any], Any]) -> Any:
        """The mask, with the flags that are selected by an index or by those of a stack's rows."""
        flags = [select(leaf.layers[0]) for leaf in self.leaves]
        for stack in self.stacks:
            rows = select(np.array(stack.layers, np.int32))
            for leaf in stack.leaves:
                axis = self.leaves[leaf].row_axis
                flags[leaf] = flags_along(axis, rows) if np.ndim(rows) else rows
        return self.treedef.unflatten(flags)

    def stack_depth(self, depth: int | Int[Array, ""], stack: str | None = None) -> Any:
        """How many layers of a stack lie before a depth: the `depth` of :func:`scan_layers`.

        Args:
            depth: Among all layers, as :meth:`mask` takes it.
            stack: Which stack, where there are several: its patterns, joined by " + ".
        """
        stacks = {of.name: of for of in self.stacks}
        if not stacks:
            raise ValueError("stack_depth needs stacked layers, and there are none (dm.stacked).")
        if stack is None and len(stacks) > 1:
            raise ValueError(
                f"There are several stacks, {[*stacks]}: say which, stack={next(iter(stacks))!r}."
            )
        check_choice("stack", stack := stack or next(iter(stacks)), stacks)
        depth, rows = self._check_depth(depth), stacks[stack].layers
        if isinstance(depth, int):
            return sum(layer < depth for layer in rows)
        return jnp.sum(np.array(rows, np.int32) < depth)

    def _check_depth(self, depth: Any) -> Any:
        if self.stacks and isinstance(depth, jax.Array):
            check_index("depth", depth)
            return depth
        hint = (
            "Make it static, jax.jit(step, static_argnames='depth'), as sampler.depth(step) is. A "
            "depth drawn on the device needs dm.switch_depth, or layers that are dm.stacked."
        )
        depth, last = static_int("depth", depth, minimum=0, hint=hint), self.num_layers - 1
        if depth > last:
            raise ValueError(f"depth must be at most {last}, with {last + 1} layers, got {depth}.")
        return depth

    def group(self, num_groups: int, layer_costs: Sequence[float] | None = None) -> Layers:
        """Merges neighbouring layers into `num_groups` of similar cost.

        Fewer layers mean fewer executables, one for each depth. Of all ways to cut the order this
        one has the smallest sum of squared costs; the leaves and their order stay.

        Args:
            num_groups: The number of groups, from 1 to `num_layers`.
            layer_costs: What each layer costs, in any unit, such as measured seconds or counted
                FLOPs of its backward pass; by default its number of parameters.
        """
        total, costs = self.num_layers, self.layer_sizes if layer_costs is None else layer_costs
        if static_int("num_groups", num_groups, minimum=1) > total:
            raise ValueError(
                f"num_groups must be at most {total}, the number of layers, got {num_groups}."
            )
        if len(costs) != total or not all(0 <= cost < np.inf for cost in costs):
            raise ValueError(
                f"layer_costs must be {total} nonnegative numbers, one for each layer, "
                f"got {list(costs)}."
            )
        cuts = itertools.pairwise(_balanced_cuts(costs, num_groups))
        members = [self.names[i:j] for i, j in cuts]
        names = [of[0] if len(of) == 1 else f"{of[0]} … {of[-1]}" for of in members]
        groups = [group for group, of in enumerate(members) for _ in of]

        def regroup(leaf: Leaf) -> Leaf:
            layers, depths = (tuple(groups[i] for i in of) for of in (leaf.layers, leaf.depths))
            return leaf._replace(layers=layers, depths=depths)

        leaves = tuple(map(regroup, self.leaves))
        stacks = [dataclasses.replace(of, layers=leaves[of.leaves[0]].layers) for of in self.stacks]
        return Layers(tuple(names), self.treedef, leaves, tuple(stacks))

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """The number of parameters of each layer."""
        layers = [layer for leaf in self.leaves for layer in leaf.layers]
        sizes = [leaf.size // len(leaf.layers) for leaf in self.leaves for _ in leaf.layers]
        return tuple(
            np.bincount(np.array(layers, int), sizes, self.num_layers).astype(int).tolist()
        )

    @functools.cached_property
    def units(self) -> tuple[StackedLeaves, ...]:
        """What is stepped as one, shallow to deep: each stack, and the other leaves by layer."""
        members: dict[int, list[int]] = {}
        for i, leaf in enumerate(self.leaves):
            if leaf.row_axis is None:
                members.setdefault(leaf.layers[0], []).append(i)
        single = [StackedLeaves(self.names[i], tuple(of), (i,)) for i, of in members.items()]
        return tuple(sorted([*single, *self.stacks], key=lambda unit: unit.layers[0]))

    def units_of(self, tree: Any) -> Any:
        """The index in `units` of each leaf of a tree, which may be a part of the parameters."""
        unit_of = {self.leaves[x].key: i for i, unit in enumerate(self.units) for x in unit.leaves}
        return jax.tree.structure(tree).unflatten(unit_of[x.key] for x in self._leaves_of(tree))

    def rows_of(self, tree: Any) -> list[tuple[int, ...]]:
        """The layers of each leaf of a tree: one, or those of its rows."""
        return [leaf.layers for leaf in self._leaves_of(tree)]

    def row_axes_of(self, tree: Any) -> list[int | None]:
        """Along which axis each leaf of a tree is stacked; None for one that is not."""
        return [leaf.row_axis for leaf in self._leaves_of(tree)]

    def row_shapes(self, tree: Any) -> Any:
        """The tree of shapes and dtypes that one layer has: a stack's lack the axis of layers."""
        arrays, treedef = jax.tree.flatten(tree)
        pairs = zip(self.row_axes_of(tree), arrays, strict=True)
        return treedef.unflatten(
            jax.ShapeDtypeStruct(row_shape(x.shape, axis), jnp.result_type(x)) for axis, x in pairs
        )

    def flags_of(self, tree: Any, layer_mask: Any) -> Any:
        """The flags that a mask of the whole parameters has for a tree, which may be a part."""
        flags = dict(zip(self.leaves, jax.tree.leaves(layer_mask), strict=True))
        return jax.tree.structure(tree).unflatten(flags[leaf] for leaf in self._leaves_of(tree))

    def check_rows(self, layer_mask: Any) -> None:
        """Error for flags along an axis of a leaf that is not stacked so in these layers."""
        made = "Make it with layers.mask(depth) of the same layers."
        for leaf, flag in zip(
            self._leaves_of(layer_mask), jax.tree.leaves(layer_mask), strict=True
        ):
            if np.ndim(flag) and np.ndim(flag) - 1 != leaf.row_axis:
                where = f"axis {np.ndim(flag) - 1} of '{leaf.path}', which is not stacked so"
                raise ValueError(f"layer_mask has flags along {where} in these layers. {made}")
            is_known = np.ndim(flag) and isinstance(flag, np.ndarray)
            flags = flag.ravel().tolist() if is_known else leaf.layers
            if len({*zip(leaf.layers, flags, strict=True)}) > len({*leaf.layers}):
                raise ValueError(f"layer_mask splits a layer at '{leaf.path}'. {made}")

    def _leaves_of(self, tree: Any) -> list[Leaf]:
        """The leaves of which a tree consists; an error for one that is not among them."""
        leaves, known = {leaf.key: leaf for leaf in self.leaves}, [x.path for x in self.leaves]
        for key, path in zip(keys := leaf_keys(tree), leaf_paths(tree), strict=True):
            if key not in leaves:
                made_from = f"with the leaves {str(known[:8])[1:-1]}" + ", …" * (len(known) > 8)
                if path in known:
                    made_from = "whose containers differ, such as a list from a dict or a module"
                origin = f"the layers were made from a tree {made_from}. Make the layers from these"
                raise ValueError(f"Leaf '{path}' is in no layer: {origin} parameters.")
        return [leaves[key] for key in keys]

    def __str__(self) -> str:
        sizes, members = self.layer_sizes, [i for leaf in self.leaves for i in {*leaf.layers}]
        rows, total = [("depth", "layer", "leaves", "parameters", "share")], sum(sizes)
        for depth, (name, size) in enumerate(zip(self.names, sizes, strict=True)):
            share = f"{size / total:.1%}" if total else "-"
            rows.append((str(depth), name, str(members.count(depth)), f"{size:,}", share))
        rows.append(("", "total", str(len(self.leaves)), f"{total:,}", "100.0%"))
        lines = [format_table(rows, "><>>>")]
        for of in self.stacks:
            lines.append(
                f"'{of.name}' is {len(of.layers)} layers along axis {of.axis} of its leaves."
            )
        for path, depths in ((leaf.path, sorted({*leaf.depths})) for leaf in self.leaves):
            if len(depths) > 1:
                at = f"{', '.join(map(str, depths))}; it belongs to the shallowest, {depths[0]}."
                lines.append(f"'{path}' is used at depths {at}")
        return "\n".join(lines)


def format_table(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Lines of aligned columns; `sides` has "<" for each column to the left, ">" to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def check_layers(value: Any) -> None:
    """Error unless an argument is `Layers`."""
    if not isinstance(value, Layers):
        raise TypeError(
            f"layers must be made by layers_by_path or trace_layers, got {describe(value)}."
        )


def make_layers(
    params: Any, names: Sequence[str], places: Sequence[Any], stacks: Sequence[StackedLeaves] = ()
) -> Layers:
    """`Layers` over a tree; `places` are the fields of each :class:`Leaf` from `layers` on."""
    arrays, treedef = jax.tree.flatten(params)
    fields = zip(leaf_keys(params), leaf_paths(params), map(np.size, arrays), places, strict=True)
    leaves = [Leaf(key, path, size, *place) for key, path, size, place in fields]
    return Layers(tuple(names), treedef, tuple(leaves), tuple(stacks))


def _balanced_cuts(costs: Sequence[float], num_groups: int) -> list[int]:
    """Where groups whose squared costs have the smallest sum start and end."""
    ends = np.cumsum([0.0, *costs])
    squares = np.square(ends[:, None] - ends)  # of a group from layer i up to j, at [j, i]
    squares[np.triu_indices(len(ends))] = np.inf
    best, choices = squares[:, 0], []  # of the first j layers, by dynamic programming
    for _ in range(num_groups - 1):
        choices.append(np.argmin(best + squares, axis=1))
        best = np.min(best + squares, axis=1)
    cuts = [len(costs)]
    for choice in reversed(choices):
        cuts.insert(0, int(choice[cuts[0]]))
    return [0, *cuts]
