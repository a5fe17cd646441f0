"""`Layers`: which leaf belongs to which layer, and the layer masks made from it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dropmuon_jax._checks import describe, static_int
from dropmuon_jax._layers._grouping import balanced_cuts
from dropmuon_jax._layers._paths import leaf_keys, leaf_paths


@dataclasses.dataclass(frozen=True)
class Layers:
    """An order of layers, from the input (depth 0) to the output, over the leaves of a tree.

    A *layer* is a group of parameter leaves that are updated together. A *depth* s means that the
    layers s, s+1, …, num_layers - 1 are active. A *layer mask* is a tree with the structure of the
    parameters and Python booleans as leaves, True where the leaf is active. `Layers` is immutable
    and hashable, holds no array, and is made by :func:`layers_by_path` or :func:`trace_layers`.

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
    """

    names: tuple[str, ...]
    layer_of_leaf: tuple[int, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)
    leaf_keys: tuple[str, ...] = dataclasses.field(repr=False)
    leaf_paths: tuple[str, ...] = dataclasses.field(repr=False)
    leaf_sizes: tuple[int, ...] = dataclasses.field(repr=False)
    shared_leaves: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Leaves used at several depths, as (leaf, depths); each belongs to the shallowest."""

    @property
    def num_layers(self) -> int:
        """The number of layers b; depths are 0 … b - 1."""
        return len(self.names)

    def mask(self, depth: int) -> Any:
        """The layer mask of a depth: True from the layer `depth` to the last one.

        Args:
            depth: A Python integer in [0, num_layers); static under `jax.jit`.

        Returns:
            A tree of Python booleans with the structure of the parameters.

        Raises:
            TypeError: If `depth` is an array or traced.
            ValueError: If it is out of range.
        """
        depth = static_int(
            "depth",
            depth,
            minimum=0,
            hint="Make it static, jax.jit(step, static_argnames='depth'), and take it from "
            "sampler.depth(step); a depth drawn on the device goes through dm.switch_depth.",
        )
        if depth >= self.num_layers:
            raise ValueError(
                f"depth must be at most {self.num_layers - 1}, with {self.num_layers} layers, "
                f"got {depth}."
            )
        return self.subset([layer >= depth for layer in range(self.num_layers)])

    def subset(self, active: Sequence[bool]) -> Any:
        """The layer mask of an arbitrary set of layers.

        Args:
            active: One Python boolean for each layer, shallow to deep.

        Returns:
            A tree of Python booleans with the structure of the parameters.

        Raises:
            TypeError: If an entry is not a Python boolean.
            ValueError: If their number is not `num_layers`.
        """
        if len(active) != self.num_layers:
            raise ValueError(
                f"active must have {self.num_layers} entries, one for each of the layers "
                f"{', '.join(self.names)}; got {len(active)}."
            )
        for flag in active:
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(f"active must hold Python booleans, got {flag!r}.")
        return self.treedef.unflatten([bool(active[layer]) for layer in self.layer_of_leaf])

    def group(self, num_groups: int, costs: Sequence[float] | None = None) -> "Layers":
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
        )

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """The number of parameters of each layer."""
        sizes = [0] * self.num_layers
        for layer, size in zip(self.layer_of_leaf, self.leaf_sizes, strict=True):
            sizes[layer] += size
        return tuple(sizes)

    def depths_of(self, tree: Any) -> Any:
        """The layer index of each leaf of a tree, which may be a masked part of the parameters.

        Raises:
            ValueError: If a leaf is not one of the parameters that the layers were made from.
        """
        index = dict(zip(self.leaf_keys, self.layer_of_leaf, strict=True))
        keys = leaf_keys(tree)
        for key, path in zip(keys, leaf_paths(tree), strict=True):
            if key not in index:
                raise ValueError(
                    f"Leaf '{path}' is in no layer: the layers were made from a tree with the "
                    f"leaves {_listing(self.leaf_paths)}. Make the layers from these parameters."
                )
        return jax.tree.unflatten(jax.tree.structure(tree), [index[key] for key in keys])

    def __str__(self) -> str:
        total = sum(self.leaf_sizes)
        leaves = np.bincount(self.layer_of_leaf, minlength=self.num_layers)
        rows = [("depth", "layer", "leaves", "parameters", "share")]
        for depth, (name, size) in enumerate(zip(self.names, self.layer_sizes, strict=True)):
            share = f"{size / total:.1%}" if total else "-"
            rows.append((str(depth), name, str(leaves[depth]), f"{size:,}", share))
        rows.append(("", "total", str(len(self.leaf_sizes)), f"{total:,}", "100.0%"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 1 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        for leaf, depths in self.shared_leaves:
            lines.append(
                f"'{self.leaf_paths[leaf]}' is used at depths {', '.join(map(str, depths))}; "
                f"it belongs to the shallowest, {min(depths)}."
            )
        return "\n".join(lines)


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
    )


def _listing(paths: Sequence[str], limit: int = 8) -> str:
    """A few quoted paths for a message."""
    shown = ", ".join(f"'{path}'" for path in paths[:limit])
    return shown + (f", … ({len(paths)} in all)" if len(paths) > limit else "")
