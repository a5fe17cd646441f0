"""Leaves as matrices: which axes of a leaf are fan-in and which fan-out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.trees import leaf_paths, masked_paths

# "in_out" is (*window, in, out), as Flax, Haiku and Keras keep kernels; "out_in" is
# (out, in, *window), as Equinox and PyTorch do.
LeafNumbers = MuonDimensionNumbers | Literal["in_out", "out_in"]
DimensionNumbers = LeafNumbers | Mapping[str, LeafNumbers]
LAYOUTS = ("in_out", "out_in")
# Kernels of Equinox and PyTorch have these names and are (out, in, *window). Elsewhere a leaf of
# such a name may be (in, out).
NAMES_IN_DOUBT = ("weight", "weight_ih", "weight_hh")


class MatrixAxes(NamedTuple):
    """The fan-in and fan-out axes of one leaf; all others are batch axes."""

    path: str
    """The path of the leaf."""
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    window: tuple[int, ...] = ()
    """The fan-in axes over which a convolution slides."""


class MatrixShape(NamedTuple):
    """What the size of a ball may depend on."""

    fan_in: int
    """The entries that each output depends on, the window of a convolution included."""
    fan_out: int
    window: int = 1
    """Entries of a convolution's window: height · width."""


def check_dimension_numbers(dimension_numbers: Any) -> None:
    """Error unless the argument is dimension numbers, a mapping to them, or None."""
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Mapping | None | str):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, 'in_out', 'out_in', "
            f"or a mapping from path patterns to them, got {dimension_numbers!r}."
        )
    if isinstance(dimension_numbers, str):
        check_choice("dimension_numbers", dimension_numbers, LAYOUTS)


def numbers_of_leaves(
    dimension_numbers: DimensionNumbers | None, paths: Sequence[str], elsewhere: Sequence[str] = ()
) -> list[LeafNumbers | None]:
    """The dimension numbers of the leaf at each path; None where a mapping says nothing of it.

    Raises:
        ValueError: For a pattern that matches no path, here or elsewhere, and for a path that two
            patterns match.
    """
    if not isinstance(dimension_numbers, Mapping):
        return [dimension_numbers] * len(paths)
    matches = match_leaves("dimension_numbers", dimension_numbers, paths, elsewhere)
    return [matches[path].value if path in matches else None for path in paths]


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
    paths, leaves = leaf_paths(tree), jax.tree.leaves(tree)
    numbers = numbers_of_leaves(dimension_numbers, paths, masked_paths(tree))
    return [
        MatrixAxes(path, (), tuple(range(leaf.ndim)))
        if vectors and leaf.ndim < 2
        else leaf_axes(path, leaf.shape, spec)
        for path, leaf, spec in zip(paths, leaves, numbers, strict=True)
    ]


def leaf_axes(path: str, shape: tuple[int, ...], numbers: LeafNumbers | None) -> MatrixAxes:
    """The axes of a leaf of two axes or more; an error if they are not known."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(
            f"An LMO of matrices needs matrices, and leaf '{path}' has shape {shape}. Give vectors "
            "and scalars a chain of their own with dm.chain_subtrees."
        )
    if numbers is None:
        _check_layout_is_known(path, shape)
        numbers = "in_out"
    if numbers == "in_out":
        window = tuple(range(ndim - 2))
        return MatrixAxes(path, (*window, ndim - 2), (ndim - 1,), window)
    if numbers == "out_in":
        window = tuple(range(2, ndim))
        return MatrixAxes(path, (*window, 1), (0,), window)
    if isinstance(numbers, str):
        check_choice(f"dimension_numbers of leaf '{path}'", numbers, LAYOUTS)
    if not isinstance(numbers, MuonDimensionNumbers):
        raise TypeError(
            f"dimension_numbers of leaf '{path}' must be an optax.contrib.MuonDimensionNumbers, "
            f"'in_out' or 'out_in', got {numbers!r}."
        )
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


def needs_numbers(shape: tuple[int, ...]) -> bool:
    """Whether the number of axes does not say which of them are fan-in and fan-out."""
    # (1, in, out) is the same matrix as a batch of one and as a window of one.
    return len(shape) not in (2, 4) and set(shape[:-2]) != {1}


def _check_layout_is_known(path: str, shape: tuple[int, ...]) -> None:
    """Error for a leaf that needs dimension numbers, and has none."""
    if path.rsplit("/", 1)[-1] in NAMES_IN_DOUBT:
        raise ValueError(
            f"Leaf '{path}' of shape {shape} may be kept as (out, in, *window), as in Equinox and "
            "PyTorch, or as (*window, in, out), as in Flax. Say it with "
            "dimension_numbers='out_in' or 'in_out', for the whole tree, or by pattern, "
            f"{{'{path}': 'out_in'}}; dm.matrix_labels and dm.Roles take them too."
        )
    if needs_numbers(shape):
        raise ValueError(
            f"An LMO of matrices cannot tell which axes of leaf '{path}', of shape {shape}, are "
            f"fan-in and fan-out. Say it with dimension_numbers={{'{path}': "
            "optax.contrib.MuonDimensionNumbers(reduction_axis=…, output_axis=…)}, where a key may "
            "be a pattern such as 'query/kernel' and axes in neither are batch axes; or, for a "
            "convolution, with 'in_out', which is (*window, in, out), or 'out_in', "
            "(out, in, *window). (Of stacked layers say in dm.layers_by_path that they are "
            "dm.stacked, and put the LMO into dm.per_layer.)"
        )


def matrix_shape(leaf: jax.Array, axes: MatrixAxes) -> MatrixShape:
    """Fan-in, fan-out and window of each matrix of a leaf."""
    return MatrixShape(*(math.prod(leaf.shape[axis] for axis in group) for group in axes[1:]))


def to_matrices(
    leaf: jax.Array, axes: MatrixAxes
) -> tuple[Float[Array, "batch fan_in fan_out"], Callable[[jax.Array], jax.Array]]:
    """A leaf as a stack of matrices, and the function that makes a leaf of such a stack again."""
    batch = tuple(axis for axis in range(leaf.ndim) if axis not in axes.fan_in + axes.fan_out)
    order = batch + axes.fan_in + axes.fan_out
    moved = leaf.transpose(order)
    groups = (batch, axes.fan_in, axes.fan_out)
    stack = moved.reshape([math.prod(leaf.shape[axis] for axis in group) for group in groups])

    def restore(matrices: jax.Array) -> jax.Array:
        return matrices.reshape(moved.shape).transpose(np.argsort(order))

    return stack, restore
