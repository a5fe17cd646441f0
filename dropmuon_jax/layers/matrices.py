"""Leaves as matrices: which axes of a leaf are fan-in and which fan-out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax.layers.dimension_numbers import LAYOUTS, DimensionNumbers
from dropmuon_jax.layers.kinds import check_axes
from dropmuon_jax.layers.sites import Cut, Site, cut_of, sites_of
from dropmuon_jax.layers.trees import leaf_paths


class MatrixAxes(NamedTuple):
    """The fan-in and fan-out axes of one leaf; all others are batch axes."""

    path: str
    """The path of the leaf."""
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    window: tuple[int, ...] = ()
    """The fan-in axes over which a convolution slides."""
    cut: Cut | None = None
    """How an axis is cut into parts that are matrices of their own; `parts_of` does it."""
    replaced: tuple[int, int] | None = None
    """Of a part the axis of the leaf that was cut, and how many axes the part has in its place."""

    @property
    def of_part(self) -> MatrixAxes:
        """The axes of each part: neighbours of one size are a batch between groups and size."""
        cut = self.cut
        if cut is None:
            return self
        more, at = cut.batch_axis + 1 - cut.axis, cut.batch_axis

        def moved(axis: int) -> tuple[int, ...]:
            if axis == cut.axis:
                return (*range(cut.axis, at), at + 1)
            return (axis + more * (axis > cut.axis),)

        groups = (self.fan_in, self.fan_out, self.window)
        fan_in, fan_out, window = (sum(map(moved, group), ()) for group in groups)
        return MatrixAxes(self.path, fan_in, fan_out, window, replaced=(cut.axis, more + 1))


class MatrixShape(NamedTuple):
    """What the size of a ball may depend on."""

    fan_in: int
    """The entries that each output depends on, the window of a convolution included."""
    fan_out: int
    window: int = 1
    """Entries of a convolution's window: height · width."""


def vector_axes(tree: optax.Params) -> list[MatrixAxes]:
    """The axes of leaves that are each one vector: a matrix of fan-in 1."""
    leaves = zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return [MatrixAxes(path, (), tuple(range(leaf.ndim))) for path, leaf in leaves]


def matrix_axes(
    tree: optax.Params, dimension_numbers: DimensionNumbers | None, *, vectors: bool = False
) -> list[MatrixAxes]:
    """The axes of each leaf, in the order of the leaves.

    Without dimension numbers, leaves of two and of four axes are (*window, in, out).

    Args:
        tree: The parameters, a part of them, or their shapes.
        dimension_numbers: One for all leaves, or by pattern.
        vectors: Whether leaves of fewer than two axes are allowed, as matrices of fan-in 1.

    Raises:
        ValueError: For a leaf that is no matrix, or whose layout is not known, naming its path; for
            a pattern of the mapping that matches no leaf, or a leaf that two patterns match.
    """
    leaves, structure = jax.tree.flatten(tree)
    by_pattern = isinstance(dimension_numbers, Mapping)
    said: Any = tuple(dimension_numbers.items()) if by_pattern else dimension_numbers
    given: Any = structure, tuple(leaf.shape for leaf in leaves), by_pattern, said, vectors
    try:
        hash(given)
    except TypeError:  # numbers of axes in lists, or a module with a static field without a hash
        return _matrix_axes.__wrapped__(*given)
    return _matrix_axes(*given)


@functools.lru_cache(maxsize=1024)
def _matrix_axes(
    structure: Any, shapes: Sequence[tuple[int, ...]], by_pattern: bool, said: Any, vectors: bool
) -> list[MatrixAxes]:
    """The axes of a tree of this structure, looked up once: an update knows them from `init`."""
    tree = structure.unflatten(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    sites = sites_of(tree, dict(said) if by_pattern else said)
    check_axes(sites)
    return [
        MatrixAxes(site.path, (), tuple(range(len(site.shape))))
        if vectors and len(site.shape) < 2
        else _axes_with_cut(site)
        for site in sites
    ]


def _axes_with_cut(site: Site) -> MatrixAxes:
    """The axes of a leaf of two axes or more, and how one is cut into parts."""
    axes, cut = _axes_of(site), cut_of(site)
    if cut and cut.axis not in axes.fan_in + axes.fan_out:
        raise ValueError(
            f"Axis {cut.axis} of leaf '{site.path}', of shape {site.shape}, is neither fan-in nor "
            "fan-out: what lies along it are matrices of their own without dm.layers.Parts."
        )
    return axes._replace(cut=cut)


def _axes_of(site: Site) -> MatrixAxes:
    """The axes of a leaf as a whole; an error if they are not known."""
    path, shape, numbers = site.path, site.shape, site.numbers
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            f"An LMO of matrices needs matrices, and leaf '{path}' has shape {shape}. Give vectors "
            "and scalars a chain of their own with dm.chain_subtrees."
        )
    if site.is_unreadable:
        raise ValueError(
            f"An LMO of matrices cannot tell which axes of leaf '{path}', of shape {shape}, are "
            f"fan-in and fan-out. Say it with dimension_numbers={{'{path}': "
            "optax.contrib.MuonDimensionNumbers(reduction_axis=…, output_axis=…)}, where a key may "
            "be a pattern such as 'query/kernel' and axes in neither are batch axes; or, for a "
            "convolution, with 'in_out' of (*window, in, out), 'out_in' of (out, in, *window), or "
            "'depthwise'. (Of stacked layers say in dm.layers_by_path that they are dm.stacked, "
            "and put the LMO into dm.per_layer.)"
        )
    if not isinstance(numbers, MuonDimensionNumbers):
        return _axes_of_layout(site)
    axes = []
    for named in (numbers.reduction_axis, numbers.output_axis):
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


def _axes_of_layout(site: Site) -> MatrixAxes:
    """The axes of a leaf whose layout has a name."""
    path, shape, layout = site.path, site.shape, site.layout
    *window, first, second = range(len(shape))
    if layout == "out_in":
        first, second, *window = range(len(shape))
    of_window = tuple(window)
    if layout in LAYOUTS[2:] and not window:
        raise ValueError(
            f"dimension_numbers: {layout!r} is a layout of convolutions, and leaf '{path}' has "
            f"shape {shape}. Of a matrix say 'in_out' or 'out_in'."
        )
    if layout == "depthwise":
        # (*window, 1, channels), or (*window, channels, multiplier): a matrix for each channel.
        out = first if shape[first] == 1 else second
        return MatrixAxes(path, of_window, (out,), of_window)
    fan_in, fan_out = (first, second) if layout == "in_out" else (second, first)
    return MatrixAxes(path, (*of_window, fan_in), (fan_out,), of_window)


def matrix_shape(leaf: jax.Array, axes: MatrixAxes) -> MatrixShape:
    """Fan-in, fan-out and window of each matrix of a leaf without parts."""
    groups = axes.fan_in, axes.fan_out, axes.window
    return MatrixShape(*(math.prod(leaf.shape[axis] for axis in group) for group in groups))


def parts_of(leaf: jax.Array, axes: MatrixAxes) -> list[jax.Array]:
    """A leaf as arrays with the axes `axes.of_part`; :func:`joined` goes back."""
    cut = axes.cut
    if cut is None:
        return [leaf]
    at, before, after = cut.batch_axis, leaf.shape[: cut.axis], leaf.shape[cut.axis + 1 :]
    groups = (cut.groups,) * (at - cut.axis)
    whole = leaf.reshape(*before, *groups, sum(cut.sizes), *after)
    ends = np.cumsum([count * size for count, size in cut.runs])
    pieces = zip(jnp.split(whole, ends[:-1], at), cut.runs, strict=True)
    return [x.reshape(*before, *groups, *run, *after) for x, run in pieces]


def part_shapes(leaf: jax.Array, axes: MatrixAxes) -> list[MatrixShape]:
    """Fan-in, fan-out and window of the matrices of each part of a leaf."""
    shape = jax.ShapeDtypeStruct(leaf.shape, np.float32)  # wherever the leaf lies
    parts = jax.eval_shape(functools.partial(parts_of, axes=axes), shape)
    return [matrix_shape(part, axes.of_part) for part in parts]


def joined(parts: Sequence[jax.Array], axes: MatrixAxes) -> jax.Array:
    """The leaf whose parts these are."""
    cut = axes.cut
    if cut is None:
        return parts[0]
    at = cut.batch_axis
    after = parts[0].shape[at + 2 :]
    pieces = [x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *after) for x in parts]
    size = cut.groups * sum(cut.sizes)
    return jnp.concatenate(pieces, at).reshape(*parts[0].shape[: cut.axis], size, *after)


def sum_of_each(leaf: jax.Array, axes: MatrixAxes) -> jax.Array:
    """The sum of the entries of each matrix, in a shape that broadcasts with the leaf."""
    of_part, parts = axes.of_part, parts_of(leaf, axes)
    sums = [jnp.sum(x, of_part.fan_in + of_part.fan_out, keepdims=True) for x in parts]
    if axes.cut is None:
        return sums[0]
    wide = [jnp.broadcast_to(total, x.shape) for total, x in zip(sums, parts, strict=True)]
    return joined(wide, axes)


def to_matrices(
    leaf: jax.Array, axes: MatrixAxes
) -> tuple[Float[Array, "batch fan_in fan_out"], Callable[[jax.Array], jax.Array]]:
    """A leaf without parts as a stack of matrices, and the way back from such a stack."""
    batch = tuple(axis for axis in range(leaf.ndim) if axis not in axes.fan_in + axes.fan_out)
    order = batch + axes.fan_in + axes.fan_out
    moved = leaf.transpose(order)
    groups = (batch, axes.fan_in, axes.fan_out)
    stack = moved.reshape([math.prod(leaf.shape[axis] for axis in group) for group in groups])

    def restore(matrices: jax.Array) -> jax.Array:
        return matrices.reshape(moved.shape).transpose(np.argsort(order))

    return stack, restore
