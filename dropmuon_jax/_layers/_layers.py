"""`Layers`: which leaf belongs to which layer, and the layer masks made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dropmuon_jax._checks import check_choice, check_index, describe, static_int
from dropmuon_jax._layers._grouping import balanced_cuts
from dropmuon_jax._layers._paths import leaf_keys, leaf_paths
from dropmuon_jax._layers._table import layer_table


@dataclasses.dataclass(frozen=True)
class Stack:
    """Leaves with a leading axis, of which each row is a layer."""

    name: str
    leaves: tuple[int, ...]
    layers: tuple[int, ...]
    """The layer of each row, shallow to deep."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """An order of layers, from the input (depth 0) to the output, over the leaves of a tree.

    A *layer* is a group of parameter leaves that are updated together. A *depth* s means that the
    layers s, s+1, …, num_layers - 1 are active. A *layer mask* is a tree with the structure of the
    parameters and Python booleans as leaves, True where the leaf is active. `Layers` is immutable
    and hashable, holds no array, and is made by :func:`layers_by_path` or :func:`trace_layers`.

    **Stacked layers**, named by :func:`stacked`, share their leaves: row i of each is layer i of
    the stack. The mask of such a leaf is True, False, or a vector of booleans with an entry for
    each row; and the depth of a mask may be traced, which makes booleans into arrays.

    Attributes:
        names: One name for each layer, shallow to deep.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"head": jnp.zeros((4, 2)), "stem": jnp.zeros((3, 4))}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> print(layers)
        depth  layer  leaves  parameters   share
            0  stem        1          12   60.0%
            1  head        1           8   40.0%
               total       2          20  100.0%
        >>> layers.mask(1)
        {'head': True, 'stem': False}
        >>> params = {"embed": jnp.zeros((9, 4)), "blocks": jnp.zeros((3, 4, 4))}
        >>> layers = dm.layers_by_path(params, ["embed", dm.stacked("blocks")])
        >>> layers.names
        ('embed', 'blocks[0]', 'blocks[1]', 'blocks[2]')
        >>> layers.mask(2)
        {'blocks': array([False,  True,  True]), 'embed': False}
    """

    names: tuple[str, ...]
    layer_of_leaf: tuple[int, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)
    leaf_keys: tuple[str, ...] = dataclasses.field(repr=False)
    leaf_paths: tuple[str, ...] = dataclasses.field(repr=False)
    leaf_sizes: tuple[int, ...] = dataclasses.field(repr=False)
    shared_leaves: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Leaves used at several depths, as (leaf, depths); each belongs to the shallowest."""
    stacks: tuple[Stack, ...] = ()
    """Those that :func:`stacked` names; in `layer_of_leaf` their leaves have that of row 0."""

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
            A tree of Python booleans with the structure of the parameters. A stack of which some
            rows are active has a vector of NumPy booleans. Of a traced depth all are arrays, of
            shapes () and (rows,), but for leaves of the last layer, which is always active.

        Raises:
            TypeError: If `depth` is an array and no layers are stacked, or no integer.
            ValueError: If a Python integer is out of range.
        """
        if self.stacks and isinstance(depth, jax.Array):
            check_index("depth", depth)
            last = self.num_layers - 1
            clipped = jnp.clip(depth.astype(jnp.int32), 0, last)
            return self._mask_of(
                lambda layer: True if layer == last else clipped <= layer,
                lambda layers: clipped <= np.array(layers, np.int32),
            )
        depth = self._checked_depth(depth)
        return self.subset([layer >= depth for layer in range(self.num_layers)])

    def subset(self, active: Sequence[bool] | Bool[Array, " num_layers"]) -> Any:
        """The layer mask of an arbitrary set of layers.

        Args:
            active: One Python boolean for each layer, shallow to deep. Where layers are stacked
                also a vector of booleans that may be traced, such as
                `jnp.asarray(sampler.subsets)[sampler.sample(count)]`.

        Returns:
            A tree as :meth:`mask` returns.

        Raises:
            TypeError: If an entry is not a Python boolean.
            ValueError: If their number is not `num_layers`.
        """
        if np.shape(active) != (self.num_layers,):
            raise ValueError(
                f"active must have {self.num_layers} entries, one for each of the layers "
                f"{', '.join(self.names)}; got {len(active)}."
            )
        if self.stacks and isinstance(active, jax.Array) and active.dtype == bool:
            return self._mask_of(
                lambda layer: active[layer], lambda layers: active[np.array(layers, np.int32)]
            )
        for flag in active:
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(f"active must hold Python booleans, got {flag!r}.")
        flags = np.array(active, bool)

        def of_rows(layers: tuple[int, ...]) -> Any:
            rows = flags[list(layers)]
            return bool(rows[0]) if (rows == rows[0]).all() else rows

        return self._mask_of(lambda layer: bool(flags[layer]), of_rows)

    def stack_depth(self, depth: int | Int[Array, ""], stack: str | None = None) -> Any:
        """How many layers of a stack lie before a depth: the `depth` of :func:`scan_layers`.

        Args:
            depth: Among all layers, as in :meth:`mask`: a Python integer, or an integer array.
            stack: Its name, that of the patterns in :func:`stacked`, where there are several.

        Returns:
            An integer in [0, rows of the stack], of the kind of `depth`.

        Raises:
            TypeError: If `depth` is no integer.
            ValueError: If a Python integer is out of range, or no layers are stacked; for an
                unknown name, or none where there are several.

        Examples:
            >>> import jax.numpy as jnp, dropmuon_jax as dm
            >>> params = {"embed": jnp.zeros((9, 4)), "blocks": jnp.zeros((3, 4, 4))}
            >>> layers = dm.layers_by_path(params, ["embed", dm.stacked("blocks")])
            >>> [layers.stack_depth(depth) for depth in range(4)]
            [0, 0, 1, 2]
        """
        names = [of.name for of in self.stacks]
        if not names:
            raise ValueError(
                "stack_depth needs stacked layers, and there are none: name them by dm.stacked in "
                "dm.layers_by_path."
            )
        if stack is None and len(names) > 1:
            raise ValueError(f"There are several stacks, {names}: say which, stack={names[0]!r}.")
        check_choice("stack", stack or names[0], names)
        rows = self.stacks[names.index(stack or names[0])].layers
        if isinstance(depth, jax.Array):
            check_index("depth", depth)
            return jnp.sum(np.array(rows, np.int32) < depth)
        depth = self._checked_depth(depth)
        return sum(layer < depth for layer in rows)

    def _checked_depth(self, depth: Any) -> int:
        depth = static_int(
            "depth",
            depth,
            minimum=0,
            hint="Make it static, jax.jit(step, static_argnames='depth'), and take it from "
            "sampler.depth(step); a depth drawn on the device goes through dm.switch_depth, or "
            "needs layers that are stacked, dm.stacked in dm.layers_by_path.",
        )
        if depth >= self.num_layers:
            raise ValueError(
                f"depth must be at most {self.num_layers - 1}, with {self.num_layers} layers, "
                f"got {depth}."
            )
        return depth

    def _mask_of(
        self, of_layer: Callable[[int], Any], of_rows: Callable[[tuple[int, ...]], Any]
    ) -> Any:
        """The mask of a flag for each layer, and a flag or a vector for the rows of each stack."""
        flags = [of_layer(layer) for layer in self.layer_of_leaf]
        for stack in self.stacks:
            rows = of_rows(stack.layers)
            for leaf in stack.leaves:
                flags[leaf] = rows
        return self.treedef.unflatten(flags)

    def group(self, num_groups: int, costs: Sequence[float] | None = None) -> Layers:
        """Merges neighbouring layers into `num_groups` of similar cost.

        Fewer layers mean fewer executables, one for each depth. The cuts are the ones whose
        groups have the smallest sum of squared costs, found by dynamic programming.

        Args:
            num_groups: The number of groups, from 1 to `num_layers`.
            costs: What each layer costs, in any unit, such as measured seconds or counted FLOPs of
                its backward pass; by default its number of parameters.

        Returns:
            `Layers` of the same leaves, in the same order.

        Raises:
            ValueError: If `num_groups` is out of range, or `costs` are not one nonnegative number
                for each layer.

        Examples:
            >>> import jax.numpy as jnp, dropmuon_jax as dm
            >>> params = [jnp.zeros((4, 4)) for _ in range(6)]
            >>> layers = dm.layers_by_path(params, [str(i) for i in range(6)])
            >>> layers.group(3).names
            ('0 … 1', '2 … 3', '4 … 5')
        """
        num_groups = static_int("num_groups", num_groups, minimum=1)
        if num_groups > self.num_layers:
            raise ValueError(
                f"num_groups must be at most {self.num_layers}, the number of layers, "
                f"got {num_groups}."
            )
        if costs is None:
            costs = self.layer_sizes
        if len(costs) != self.num_layers or not all(
            math.isfinite(cost) and cost >= 0 for cost in costs
        ):
            raise ValueError(
                f"costs must be {self.num_layers} nonnegative numbers, one for each layer, "
                f"got {list(costs)}."
            )
        starts = balanced_cuts(costs, num_groups)
        stops = [*starts[1:], self.num_layers]
        group_of_layer = [
            g for g, (i, j) in enumerate(zip(starts, stops, strict=True)) for _ in range(i, j)
        ]
        shared = []
        for leaf, depths in self.shared_leaves:
            groups = tuple(sorted({group_of_layer[depth] for depth in depths}))
            if len(groups) > 1:
                shared.append((leaf, groups))
        return dataclasses.replace(
            self,
            names=tuple(
                self.names[i] if j - i == 1 else f"{self.names[i]} … {self.names[j - 1]}"
                for i, j in zip(starts, stops, strict=True)
            ),
            layer_of_leaf=tuple(group_of_layer[layer] for layer in self.layer_of_leaf),
            shared_leaves=tuple(shared),
            stacks=tuple(
                dataclasses.replace(
                    stack, layers=tuple(group_of_layer[layer] for layer in stack.layers)
                )
                for stack in self.stacks
            ),
        )

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """The number of parameters of each layer."""
        sizes = [0] * self.num_layers
        for rows, size in zip(self._rows_of_leaf(), self.leaf_sizes, strict=True):
            for layer in rows:
                sizes[layer] += size // len(rows)
        return tuple(sizes)

    def _rows_of_leaf(self) -> list[tuple[int, ...]]:
        """The layers that share each leaf: those of its rows, or the one it belongs to."""
        rows: list[tuple[int, ...]] = [(layer,) for layer in self.layer_of_leaf]
        for stack in self.stacks:
            for leaf in stack.leaves:
                rows[leaf] = stack.layers
        return rows

    @property
    def units(self) -> tuple[Stack, ...]:
        """What is stepped as one: the leaves of a layer that are not stacked, and each stack.

        Shallow to deep; those of a layer are a stack of one row whose leaves lack the axis.
        """
        stacked_leaves = {leaf for stack in self.stacks for leaf in stack.leaves}
        members: dict[int, list[int]] = {}
        for leaf, layer in enumerate(self.layer_of_leaf):
            if leaf not in stacked_leaves:
                members.setdefault(layer, []).append(leaf)
        single = [Stack(self.names[i], tuple(leaves), (i,)) for i, leaves in members.items()]
        return tuple(sorted([*single, *self.stacks], key=lambda unit: unit.layers[0]))

    def units_of(self, tree: Any) -> Any:
        """The index in `units` of each leaf of a tree, maybe a masked part of the parameters.

        Raises:
            ValueError: If a leaf is not one of the parameters that the layers were made from.
        """
        of_leaf = {leaf: i for i, unit in enumerate(self.units) for leaf in unit.leaves}
        return jax.tree.unflatten(
            jax.tree.structure(tree), [of_leaf[leaf] for leaf in self._indices(tree)]
        )

    def row_shapes(self, tree: Any) -> Any:
        """The shapes and dtypes that a layer has: those of a stack without their leading axis.

        Args:
            tree: The parameters, or a masked part of them.

        Returns:
            A tree of `jax.ShapeDtypeStruct`s, which :func:`matrix_labels` and :func:`role_labels`
            take.

        Raises:
            ValueError: If a leaf is not one of the parameters that the layers were made from.
        """
        stacked_leaves = {leaf for stack in self.stacks for leaf in stack.leaves}
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(
            jax.ShapeDtypeStruct(x.shape[1:] if leaf in stacked_leaves else x.shape, x.dtype)
            for leaf, x in zip(self._indices(tree), leaves, strict=True)
        )

    def rows_of(self, tree: Any) -> list[tuple[int, ...]]:
        """The layers of the rows of each leaf of a tree; of a leaf that is not stacked, its layer.

        Raises:
            ValueError: If a leaf is not one of the parameters that the layers were made from.
        """
        rows = self._rows_of_leaf()
        return [rows[leaf] for leaf in self._indices(tree)]

    def _indices(self, tree: Any) -> list[int]:
        """Which of the parameters each leaf of a tree is."""
        index = {key: leaf for leaf, key in enumerate(self.leaf_keys)}
        keys = leaf_keys(tree)
        for key, path in zip(keys, leaf_paths(tree), strict=True):
            if key not in index:
                raise ValueError(
                    f"Leaf '{path}' is in no layer: the layers were made from a tree with the "
                    f"leaves {_listing(self.leaf_paths)}. Make the layers from these parameters."
                )
        return [index[key] for key in keys]

    def __str__(self) -> str:
        sizes = self.layer_sizes
        members = [layer for rows in self._rows_of_leaf() for layer in set(rows)]
        leaves = np.bincount(members, minlength=self.num_layers).tolist()
        shared = [
            f"'{self.leaf_paths[leaf]}' is used at depths {', '.join(map(str, depths))}; "
            f"it belongs to the shallowest, {min(depths)}."
            for leaf, depths in self.shared_leaves
        ]
        return "\n".join([layer_table(self.names, leaves, sizes, len(self.leaf_sizes)), *shared])


def check_layers(value: Any) -> None:
    """Error unless an argument is `Layers`."""
    if not isinstance(value, Layers):
        raise TypeError(
            f"layers must be made by layers_by_path or trace_layers, got {describe(value)}."
        )


def make_layers(
    params: Any,
    names: Sequence[str],
    layer_of_leaf: Sequence[int],
    shared_leaves: Sequence[tuple[int, tuple[int, ...]]] = (),
    stacks: Sequence[Stack] = (),
) -> Layers:
    """`Layers` over a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    leaves, treedef = jax.tree.flatten(params)
    return Layers(
        names=tuple(names),
        layer_of_leaf=tuple(layer_of_leaf),
        treedef=treedef,
        leaf_keys=tuple(leaf_keys(params)),
        leaf_paths=tuple(leaf_paths(params)),
        leaf_sizes=tuple(math.prod(np.shape(leaf)) for leaf in leaves),
        shared_leaves=tuple(shared_leaves),
        stacks=tuple(stacks),
    )


def _listing(paths: Sequence[str], limit: int = 8) -> str:
    """A few quoted paths for a message."""
    shown = ", ".join(f"'{path}'" for path in paths[:limit])
    return shown + (f", … ({len(paths)} in all)" if len(paths) > limit else "")
