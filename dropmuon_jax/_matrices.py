"""Leaves as matrices: which axes of a leaf are fan-in and which fan-out."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, check_floating
from dropmuon_jax._layers import leaf_paths, masked_paths, match_leaves
from dropmuon_jax._mesh import LeafSharding, axis_names

LeafNumbers = MuonDimensionNumbers | Literal["conv"]
DimensionNumbers = LeafNumbers | Mapping[str, LeafNumbers]


class MatrixAxes(NamedTuple):
    """The fan-in and fan-out axes of one leaf; all others are batch axes."""

    path: str
    """Of the leaf."""
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    window: tuple[int, ...] = ()
    """Those of the fan-in axes that a convolution slides over."""


class MatrixShape(NamedTuple):
    """What the size of a ball may depend on."""

    fan_in: int
    """Of a convolution the window included."""
    fan_out: int
    window: int = 1
    """Entries of a convolution's window: height · width."""


def check_dimension_numbers(dimension_numbers: Any) -> None:
    """Error unless the argument is dimension numbers, a mapping to them, or None."""
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Mapping | None | str):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, 'conv', or a mapping "
            f"from path patterns to them, got {dimension_numbers!r}."
        )
    if isinstance(dimension_numbers, str):
        check_choice("dimension_numbers", dimension_numbers, ["conv"])


def vector_axes(tree: Any) -> list[MatrixAxes]:
    """Each leaf as one vector: a matrix of fan-in 1."""
    all_axes = []
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        check_floating(f"leaf '{path}'", leaf.dtype)
        all_axes.append(MatrixAxes(path, (), tuple(range(leaf.ndim))))
    return all_axes


def matrix_axes(
    tree: Any, dimension_numbers: DimensionNumbers | None, *, vectors: bool = False
) -> list[MatrixAxes]:
    """The axes of each leaf, in the order of the leaves.

    Args:
        tree: Of arrays.
        dimension_numbers: Those of all leaves, or by pattern; "conv" is (*window, in, out).
        vectors: Whether leaves of fewer than two axes are allowed, as matrices of fan-in 1.

    Raises:
        ValueError: For a leaf that is no matrix, naming its path, and for a pattern of the mapping
            that matches no leaf or a leaf that two patterns match.
    """
    leaves = jax.tree.leaves(tree)
    paths = leaf_paths(tree)
    numbers: list[LeafNumbers | None]
    if isinstance(dimension_numbers, Mapping):
        matches = match_leaves("dimension_numbers", dimension_numbers, paths, masked_paths(tree))
        numbers = [matches[path].value if path in matches else None for path in paths]
    else:
        numbers = [dimension_numbers] * len(paths)
    return [
        _leaf_axes(path, leaf, spec, vectors)
        for path, leaf, spec in zip(paths, leaves, numbers, strict=True)
    ]


def _leaf_axes(path: str, leaf: Any, spec: LeafNumbers | None, vectors: bool) -> MatrixAxes:
    check_floating(f"leaf '{path}'", leaf.dtype)
    shape, ndim = leaf.shape, leaf.ndim
    if vectors and ndim < 2:
        return MatrixAxes(path, (), tuple(range(ndim)))
    if ndim < 2:
        raise ValueError(
            f"An LMO of matrices needs matrices, and leaf '{path}' has shape {shape}. Give vectors "
            "and scalars a chain of their own with dm.chain_subtrees."
        )
    if spec is None or isinstance(spec, str):
        check_choice(f"dimension_numbers of leaf '{path}'", spec or "conv", ["conv"])
        # (1, in, out) is the same matrix as a batch of one and as a window of one.
        if spec is None and ndim not in (2, 4) and set(shape[:-2]) != {1}:
            raise ValueError(
                f"An LMO of matrices cannot tell which axes of leaf '{path}', of shape {shape}, "
                f"are fan-in and fan-out. Say it with dimension_numbers={{'{path}': "
                "optax.contrib.MuonDimensionNumbers(reduction_axis=…, output_axis=…)}, where a key "
                "may be a pattern such as 'query/kernel' and axes in neither are batch axes, or, "
                "for a convolution, with 'conv'. (dm.muon and dm.drop_muon have it inside "
                "lmo=dm.newton_schulz_lmo(shape_factor='muon', …). Of stacked layers say in "
                "dm.layers_by_path that they are dm.stacked, and put the LMO into dm.per_layer.)"
            )
        return MatrixAxes(path, tuple(range(ndim - 1)), (ndim - 1,), tuple(range(ndim - 2)))
    if not isinstance(spec, MuonDimensionNumbers):
        raise TypeError(
            f"dimension_numbers of leaf '{path}' must be an optax.contrib.MuonDimensionNumbers, "
            f"got {spec!r}."
        )
    axes = []
    for named in (spec.reduction_axis, spec.output_axis):
        named = (named,) if isinstance(named, int) else tuple(named)
        if any(not -ndim <= axis < ndim for axis in named):
            raise ValueError(
                f"dimension_numbers name an axis of {named}, but leaf '{path}' has {ndim} axes."
            )
        axes.append(tuple(axis % ndim for axis in named))
    if len({*axes[0], *axes[1]}) < len(axes[0]) + len(axes[1]) or not (axes[0] and axes[1]):
        raise ValueError(
            "dimension_numbers must name at least one axis each for fan-in and fan-out, and none "
            f"twice; leaf '{path}' got reduction_axis={axes[0]}, output_axis={axes[1]}."
        )
    return MatrixAxes(path, axes[0], axes[1])


def matrix_shape(leaf: jax.Array, axes: MatrixAxes) -> MatrixShape:
    """Fan-in, fan-out and window of each matrix of a leaf."""
    return MatrixShape(*(math.prod(leaf.shape[axis] for axis in group) for group in axes[1:]))


class Blocks(NamedTuple):
    """The matrices of a leaf before their axes are merged: what is sharded by axes still is."""

    array: jax.Array
    """Of shape (batch, *fan_in, *fan_out)."""
    num_in: int
    """How many axes fan-in has."""
    placement: tuple[tuple[str, ...], ...] | None = None
    """The axes of a mesh that shard each axis of the array; None where that is not known."""
    rows: tuple[str, ...] = ()
    """Those that shard the axis that `jax.vmap` has taken away, if any has."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, fan-in, fan-out)."""
        batch, *sizes = self.array.shape
        return batch, math.prod(sizes[: self.num_in]), math.prod(sizes[self.num_in :])

    def matrices(self) -> Float[Array, "batch fan_in fan_out"]:
        """With the axes merged."""
        return self.array.reshape(self.shape)


def to_blocks(
    leaf: jax.Array, axes: MatrixAxes, sharding: LeafSharding | None = None
) -> tuple[Blocks, Callable[[jax.Array], jax.Array]]:
    """The matrices of a leaf that is sharded like this, and the way back from their array."""
    batch = _batch_axes(axes, leaf.ndim, sharding.spec if sharding else PartitionSpec())
    order = batch + axes.fan_in + axes.fan_out
    moved = leaf.transpose(order)
    size = math.prod(leaf.shape[axis] for axis in batch)
    blocks = Blocks(moved.reshape(size, *moved.shape[len(batch) :]), len(axes.fan_in))
    if sharding is not None:
        blocks = blocks._replace(placement=placement(axes, sharding.spec), rows=sharding.rows)

    def restore(array: jax.Array) -> jax.Array:
        return array.reshape(moved.shape).transpose(np.argsort(order))

    return blocks, restore


def placement(axes: MatrixAxes, spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The axes of a mesh that shard each axis of the blocks of a leaf with this sharding."""
    matrix = axes.fan_in + axes.fan_out
    ndim = max(len(spec), *(axis + 1 for axis in matrix))
    entries = [axis_names(entry) for entry in (*spec, *(None,) * ndim)]
    batch = _batch_axes(axes, ndim, spec)
    return entries[batch[0]] if batch else (), *(entries[axis] for axis in matrix)


def _batch_axes(axes: MatrixAxes, ndim: int, spec: PartitionSpec) -> tuple[int, ...]:
    """The batch axes, a sharded one first: once they are merged, it alone is still sharded."""
    batch = [axis for axis in range(ndim) if axis not in axes.fan_in + axes.fan_out]
    return tuple(sorted(batch, key=lambda axis: not (axis < len(spec) and spec[axis])))


def to_matrices(
    leaf: jax.Array, axes: MatrixAxes
) -> tuple[Float[Array, "batch fan_in fan_out"], Callable[[jax.Array], jax.Array]]:
    """A leaf as a stack of matrices, and the way back."""
    blocks, restore = to_blocks(leaf, axes)
    return blocks.matrices(), restore
