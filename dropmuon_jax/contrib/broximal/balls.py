"""Balls of norms of the leaves of a tree: linear minimizers, and the nearest points in them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dropmuon_jax._checks import describe
from dropmuon_jax.layers.by_path import match_leaves
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.matrices import MatrixAxes, joined, matrix_shape, parts_of, to_matrices
from dropmuon_jax.layers.trees import leaf_paths
from dropmuon_jax.norms.named import (
    column_norm,
    euclidean_norm,
    nuclear_norm,
    row_norm,
    sign_norm,
    spectral_norm,
)
from dropmuon_jax.norms.norm import Geometry, Norm

Matrices = Float[Array, "batch fan_in fan_out"]
Norms = Norm | Mapping[str, Norm]


class Ball(NamedTuple):
    """The ball of a leaf's norm around zero; each matrix of a stack has one of its own."""

    norm: Norm
    axes: MatrixAxes
    radius: Array

    def argmin(self, gradient: Array) -> Array:
        """The point with the smallest ⟨gradient, point⟩, which is -radius ‖gradient‖*."""
        return self._of_each(lambda g, size: -size * self.norm.geometry.direction(g), gradient)

    @property
    def project(self) -> Callable[[Array], Array] | None:
        """To the nearest point in the Euclidean distance; None where no formula is known."""
        formula = _PROJECTIONS.get(self.norm.geometry)
        return formula and (lambda point: self._of_each(formula, point))

    def _of_each(self, function: Callable[[Matrices, Array], Matrices], leaf: Array) -> Array:
        """A function of matrices and of the radius in their plain norm."""
        of_parts = []
        for part in parts_of(leaf, self.axes):
            stack, restore = to_matrices(part, self.axes.of_part)
            factor = self.norm.factor(matrix_shape(part, self.axes.of_part))
            of_parts.append(restore(function(stack, self.radius.astype(leaf.dtype) * factor)))
        return joined(of_parts, self.axes)


def balls_of(
    tree: Any, norms: Norms, radii: list[Array], dimension_numbers: DimensionNumbers | None
) -> list[Ball]:
    """The ball of each leaf; an error for a leaf that has no such norm, or none at all."""
    if isinstance(norms, Norm):
        axes = norms.axes(tree, dimension_numbers)
        return [Ball(norms, of, radius) for of, radius in zip(axes, radii, strict=True)]
    paths, (leaves, structure) = leaf_paths(tree), jax.tree.flatten(tree)
    found = match_leaves("norm", norms, paths)
    if missing := [path for path in paths if path not in found]:
        raise ValueError(f"norm has no pattern for {missing[:3]}: every leaf needs one.")
    balls: list[Any] = [None] * len(leaves)
    for pattern, norm in norms.items():
        mine = [i for i, path in enumerate(paths) if found[path].pattern == pattern]
        nodes = [x if i in mine else optax.MaskedNode() for i, x in enumerate(leaves)]
        of_part = None if norm.of == "whole leaves" else dimension_numbers
        all_axes = norm.axes(structure.unflatten(nodes), of_part)
        for i, axes in zip(mine, all_axes, strict=True):
            balls[i] = Ball(norm, axes, radii[i])
    return balls


def check_norms(norms: Any, dimension_numbers: Any) -> None:
    """Error unless an argument is a norm, or a mapping from patterns to norms."""
    check_dimension_numbers(dimension_numbers)
    for norm in norms.values() if isinstance(norms, Mapping) else [norms]:
        if not isinstance(norm, Norm):
            called = " Call it: it makes one." if callable(norm) else ""
            raise TypeError(
                f"norm must be a dm.norms.Norm, or a mapping from path patterns to them, got "
                f"{describe(norm)}.{called}"
            )


def _scale(x: Matrices, size: Array, axes: Any) -> Matrices:
    length = jnp.linalg.norm(x, axis=axes, keepdims=True)
    return x * jnp.minimum(1, size / jnp.where(length == 0, 1, length))


def _on_singular_values(function: Callable[..., Array]) -> Callable[[Matrices, Array], Matrices]:
    def project(x: Matrices, size: Array) -> Matrices:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        return (u * function(s, size)[..., None, :]) @ vt

    return project


def _lower(s: Float[Array, "batch count"], size: Array) -> Float[Array, "batch count"]:
    """The nearest point with Σs ≤ size, of s that descend and are not negative."""
    excess = (jnp.cumsum(s, -1) - size) / jnp.arange(1, s.shape[-1] + 1, dtype=s.dtype)[None]
    threshold = jnp.maximum(excess.max(-1, keepdims=True), 0)
    return jnp.maximum(s - threshold, 0)


# Of a stack of matrices and the radius, in the plain norm without shape factor.
_PROJECTIONS: dict[Geometry, Callable[[Matrices, Array], Matrices]] = {
    euclidean_norm().geometry: lambda x, size: jax.vmap(lambda m: _scale(m, size, None))(x),
    sign_norm().geometry: lambda x, size: jnp.clip(x, -size, size),
    column_norm().geometry: lambda x, size: _scale(x, size, -1),
    row_norm().geometry: lambda x, size: _scale(x, size, -2),
    spectral_norm().geometry: _on_singular_values(jnp.minimum),
    nuclear_norm().geometry: _on_singular_values(_lower),
}
