"""Norms of one array, and the steps that they define."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dropmuon_jax._checks import check_choice, check_floating, check_positive, describe
from dropmuon_jax._matrices import (
    DimensionNumbers,
    LeafNumbers,
    MatrixAxes,
    MatrixShape,
    matrix_axes,
    matrix_shape,
    to_matrices,
    vector_axes,
)
from dropmuon_jax._norms._geometries import Geometry, inner
from dropmuon_jax._norms._shape_factors import SHAPE_FACTORS


@dataclasses.dataclass(frozen=True)
class Norm:
    r"""A norm of one array, its dual norm, and the steps that are steepest in it.

    .. math::
        \|G\|_* = \max_{\|Z\| \le 1} \langle G, Z \rangle, \qquad
        \operatorname{lmo}(G) = \operatorname{argmin}_{\|Z\| \le \text{radius}}
        \langle G, Z \rangle, \qquad
        G^\sharp = \operatorname{argmax}_Z \langle G, Z \rangle - \tfrac12 \|Z\|^2

    with the signs of mathematics: lmo(G) = -radius · D and :math:`G^\sharp` = ‖G‖* · D for the same
    D(G), the `direction`. Arrays are matrices (fan-in, fan-out); with more axes convolutions
    (\*window, in, out), which are the matrices (window · in, out), unless `dimension_numbers`, an
    `optax.contrib.MuonDimensionNumbers`, say otherwise; or, for :func:`sign_norm`,
    :func:`rms_norm` and :func:`euclidean_norm`, vectors. All methods are pure and can be
    transformed by JAX; use `jax.vmap` for many arrays.

    Made by :func:`spectral_norm`, :func:`nuclear_norm`, :func:`sign_norm`, :func:`column_norm`,
    :func:`row_norm`, :func:`rms_norm` and :func:`euclidean_norm`; made into transformations by
    :func:`norm_lmo` and :func:`norm_sharp`. For one of your own see :class:`Geometry`.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> norm, gradient = dm.spectral_norm(), jnp.diag(jnp.array([5.0, -0.5]))
        >>> print(norm.norm(gradient), norm.dual_norm(gradient))
        5.0 5.5
        >>> print(norm.lmo(gradient, radius=2.0).diagonal(), norm.sharp(gradient).diagonal())
        [-2.  2.] [ 5.5 -5.5]
    """

    name: str
    """How it is printed."""
    geometry: Geometry
    """Without the shape factor."""
    shape_factor: str = "one"
    """What the ball is multiplied by: "one", those of :func:`spectral_norm`, "1/fan_in",
    "1/fan_out", "sqrt(fan_out)", "1/sqrt(fan_in)" or "sqrt(size)"."""
    of: Literal["matrices", "matrices and vectors", "whole leaves"] = "matrices"
    """A matrix that is a vector has fan-in 1; a whole leaf is one vector, of any shape."""
    starts_at_zero: bool = False
    """Whether `init` gives zeros, as biases have them."""

    def __post_init__(self):
        check_choice("shape_factor", self.shape_factor, SHAPE_FACTORS)
        check_choice("of", self.of, ["matrices", "matrices and vectors", "whole leaves"])

    def __repr__(self) -> str:
        return self.name

    def norm(self, x: Array, dimension_numbers: LeafNumbers | None = None) -> Float[Array, ""]:
        """‖X‖."""
        stack, _, factor = self._view(x, dimension_numbers)
        return self.geometry.norm(stack)[0] / factor

    def dual_norm(
        self, gradient: Array, dimension_numbers: LeafNumbers | None = None
    ) -> Float[Array, ""]:
        """‖G‖*."""
        stack, _, factor = self._view(gradient, dimension_numbers)
        return self.geometry.dual_norm(stack)[0] * factor

    def direction(self, gradient: Array, dimension_numbers: LeafNumbers | None = None) -> Array:
        """D with ‖D‖ ≤ 1 and ⟨G, D⟩ = ‖G‖*; zero for a zero array."""
        stack, restore, factor = self._view(gradient, dimension_numbers)
        return restore(self.geometry.direction(stack) * factor).astype(gradient.dtype)

    def lmo(
        self,
        gradient: Array,
        radius: float | Array = 1.0,
        dimension_numbers: LeafNumbers | None = None,
    ) -> Array:
        """-radius · D, the argmin of ⟨G, Z⟩ over ‖Z‖ ≤ radius; ⟨G, -radius · D⟩ = -radius ‖G‖*."""
        check_positive("radius", radius)
        stack, restore, factor = self._view(gradient, dimension_numbers)
        size = jnp.asarray(radius, stack.dtype) * factor
        return restore(-size * self.geometry.direction(stack)).astype(gradient.dtype)

    def sharp(self, gradient: Array, dimension_numbers: LeafNumbers | None = None) -> Array:
        """‖G‖* · D, the argmax of ⟨G, Z⟩ - ½‖Z‖², with ‖G‖* from ⟨G, D⟩."""
        stack, restore, factor = self._view(gradient, dimension_numbers)
        direction = self.geometry.direction(stack) * factor
        dual_norm = inner(stack, direction)[:, None, None]
        return restore(dual_norm * direction).astype(gradient.dtype)

    def init(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        dtype: Any = jnp.float32,
        dimension_numbers: LeafNumbers | None = None,
    ) -> Array:
        """A random array of norm 1, or zeros for :func:`rms_norm`: an initializer of Flax and JAX.

        Orthogonal for the spectral norms, ±1 for the sign norms, and each column, row or array of
        its length for the others, times the shape factor. See :meth:`initializer`.
        """
        check_floating("dtype", dtype)
        leaf = jnp.zeros(shape, dtype)
        return self.init_leaf(key, leaf, self._axes_of_one(leaf, dimension_numbers))

    def init_leaf(self, key: PRNGKeyArray, leaf: Array, axes: MatrixAxes) -> Array:
        """As `init`, of an array with these axes: each matrix of a batch has norm 1."""
        if self.starts_at_zero:
            return jnp.zeros_like(leaf)
        stack, restore = to_matrices(leaf, axes)
        sizes = matrix_shape(leaf, axes)
        wide = np.promote_types(leaf.dtype, np.float32)
        draw = jax.vmap(lambda one: self.geometry.draw(one, sizes[:2], wide))
        drawn = draw(jax.random.split(key, len(stack)))
        return restore(drawn * self.factor(sizes)).astype(leaf.dtype)

    def initializer(self, radius: float = 1.0) -> Callable[..., Array]:
        """`init` times the radius, a point on the boundary, for `nn.Dense(kernel_init=…)`."""
        check_positive("radius", radius)

        def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any):
            unit = self.init(key, shape, dtype)
            return jnp.asarray(radius, unit.dtype) * unit

        return init

    def factor(self, shape: MatrixShape) -> float:
        """The shape factor of a matrix; of an empty one any."""
        return SHAPE_FACTORS[self.shape_factor](MatrixShape(*(max(1, size) for size in shape)))

    def axes(self, tree: Any, dimension_numbers: DimensionNumbers | None) -> list[MatrixAxes]:
        """How this norm looks at each leaf of a tree; an error for a leaf that it cannot take."""
        if self.of == "whole leaves":
            if dimension_numbers is not None:
                raise ValueError(
                    f"{self} is of whole leaves, whatever their axes: leave out dimension_numbers."
                )
            return vector_axes(tree)
        vectors = self.of == "matrices and vectors"
        return matrix_axes(tree, dimension_numbers, vectors=vectors)

    def _view(
        self, x: Array, numbers: LeafNumbers | None
    ) -> tuple[Array, Callable[[Array], Array], float]:
        """The array as a stack of one matrix, in float32 at least, the way back, and the factor."""
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(
                f"A norm takes one array, got {describe(x)}. Use jax.tree.map for a tree."
            )
        x = jnp.asarray(x)
        axes = self._axes_of_one(x, numbers)
        stack, restore = to_matrices(x, axes)
        wide = stack.astype(np.promote_types(x.dtype, np.float32))
        return wide, restore, self.factor(matrix_shape(x, axes))

    def _axes_of_one(self, x: Array, numbers: LeafNumbers | None) -> MatrixAxes:
        """The axes of an array that stands for itself, in no tree."""
        check_floating("the array", x.dtype)
        if self.of == "matrices" and x.ndim < 2:
            raise ValueError(
                f"{self} is of matrices (in, out) and convolutions (*window, in, out), got an "
                f"array of shape {x.shape}."
            )
        if numbers is None and x.ndim > 2 and self.of != "whole leaves":
            numbers = "conv"
        (axes,) = self.axes(x, numbers)
        if self.of != "whole leaves" and set(range(x.ndim)) > {*axes.fan_in, *axes.fan_out}:
            raise ValueError(
                f"An array of shape {x.shape} with these dimension_numbers is a batch of matrices: "
                "take jax.vmap over its other axes."
            )
        return axes
