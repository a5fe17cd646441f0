"""Norms of one array, and the steps that are steepest in them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dropmuon_jax._checks import check_choice, check_floating, check_positive, describe
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, LeafNumbers
from dropmuon_jax.layers.matrices import (
    MatrixAxes,
    MatrixShape,
    joined,
    matrix_axes,
    matrix_shape,
    parts_of,
    to_matrices,
    vector_axes,
)
from dropmuon_jax.orthogonalize.batches import Orthogonalize

Matrices = Float[Array, "batch fan_in fan_out"]
Lengths = Float[Array, " batch"]

# How the size of a unit ball depends on the shape of the matrix. A factor c turns a plain norm into
# ‖X‖/c, its dual into c‖G‖*, and the direction D into cD. The papers state these for PyTorch's
# weights (out, in); here fan-in and fan-out are told apart, so that they hold for every layout.
SPECTRAL_FACTORS: dict[str, Callable[[MatrixShape], float]] = {
    # The ball of the spectral norm itself.
    "spectral": lambda shape: 1.0,
    # Jordan et al., 2024: max(1, rows / cols)^½ of a PyTorch (out, in) matrix; also Scion's "max".
    "muon": lambda shape: math.sqrt(max(1.0, shape.fan_out / shape.fan_in)),
    # Liu et al., 2025 (Moonlight), arXiv:2502.16982: root mean square 0.2 of the entries, as AdamW.
    "moonlight": lambda shape: 0.2 * math.sqrt(max(shape.fan_in, shape.fan_out)),
    # Bernstein and Newhouse, 2024, arXiv:2410.21265: the operator norm from RMS to RMS.
    "rms_to_rms": lambda shape: math.sqrt(shape.fan_out / shape.fan_in),
    # Pethick et al., 2025 (Scion), arXiv:2502.07529: the same of a matrix, and of a convolution
    # √(channels out / channels in) / window.
    "scion": lambda shape: math.sqrt(shape.fan_out / (shape.fan_in / shape.window)) / shape.window,
}
SHAPE_FACTORS: dict[str, Callable[[MatrixShape], float]] = SPECTRAL_FACTORS | {
    "one": lambda shape: 1.0,
    # Pethick et al., 2025: the sign of an output layer, a column, a row, a bias.
    "1/fan_in": lambda shape: 1 / shape.fan_in,
    # The same of a tied embedding (tokens, features), whose fan-in as an output layer is features.
    "1/fan_out": lambda shape: 1 / shape.fan_out,
    "sqrt(fan_out)": lambda shape: math.sqrt(shape.fan_out),
    "1/sqrt(fan_in)": lambda shape: 1 / math.sqrt(shape.fan_in),
    "sqrt(size)": lambda shape: math.sqrt(shape.fan_in * shape.fan_out),
}


class Geometry(NamedTuple):
    """A norm of matrices without its shape factor: what a :class:`Norm` of your own is made of.

    The functions take a stack of matrices (batch, fan-in, fan-out), in float32 at least, and treat
    each matrix by itself.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> def largest_entry(g):  # the ball of Σ|x| has its steepest step in one entry
        ...     size = jnp.abs(g).max((-2, -1), keepdims=True)
        ...     return jnp.where((jnp.abs(g) == size) & (size > 0), jnp.sign(g), 0.0)
        >>> l1_norm = dm.norms.Norm(
        ...     "l1_norm()",
        ...     dm.norms.Geometry(
        ...         norm=lambda x: jnp.abs(x).sum((-2, -1)),
        ...         dual_norm=lambda g: jnp.abs(g).max((-2, -1)),
        ...         direction=largest_entry,
        ...         draw=lambda key, shape, dtype: jnp.zeros(shape, dtype).at[0, 0].set(1.0),
        ...     ),
        ... )
        >>> print(l1_norm.argmin(jnp.array([[3.0, -5.0]]), radius=2.0) + 0.0)
        [[0. 2.]]
        >>> tx = dm.norm_lmo(l1_norm, radius=2.0)
    """

    norm: Callable[[Matrices], Lengths]
    """From a stack to ‖X‖ of each matrix."""
    dual_norm: Callable[[Matrices], Lengths]
    """From a stack to ‖G‖* of each matrix."""
    direction: Callable[[Matrices], Matrices]
    """From a stack to D of each matrix: ‖D‖ ≤ 1 and ⟨G, D⟩ = ‖G‖*; zero for a zero matrix."""
    draw: Callable[[PRNGKeyArray, tuple[int, int], jnp.dtype], Array]
    """From a key, (fan-in, fan-out) and a dtype to one random matrix of norm 1."""
    orthogonalize: Orthogonalize | None = None
    """The kernel of `direction` where it is a polar factor; LMOs call it for many leaves at once.
    It takes stacks (batch, rows, cols) with rows ≤ cols and keeps their shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Norm:
    r"""A norm of one array, its dual norm, and the steps that are steepest in it.

    .. math::
        \|G\|_* = \max_{\|Z\| \le 1} \langle G, Z \rangle, \qquad
        \operatorname{argmin}_{\|Z\| \le \text{radius}} \langle G, Z \rangle
        = -\text{radius} \cdot D, \qquad
        G^\sharp = \operatorname{argmax}_Z \langle G, Z \rangle - \tfrac12 \|Z\|^2 = \|G\|_* D

    for one `direction` D(G). The method `argmin` has the sign of mathematics; the transformation
    :func:`norm_lmo` has the opposite one, that of the gradient. Arrays are matrices
    (fan-in, fan-out); with more axes convolutions (\*window, in, out), which are the matrices
    (window · in, out), unless `dimension_numbers` say otherwise; or, for
    :func:`~dropmuon_jax.norms.sign_norm`, :func:`~dropmuon_jax.norms.rms_norm` and
    :func:`~dropmuon_jax.norms.euclidean_norm`, vectors. All methods are pure and can be transformed
    by JAX; use `jax.vmap` for many arrays.

    The functions of `dropmuon_jax.norms` make norms, :func:`norm_lmo` and
    :func:`~dropmuon_jax.transforms.norm_sharp` make transformations of them, and a
    :class:`Geometry` makes a norm of your own.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> norm, gradient = dm.norms.spectral_norm(), jnp.diag(jnp.array([5.0, -0.5]))
        >>> print(norm.norm(gradient), norm.dual_norm(gradient))
        5.0 5.5
        >>> print(norm.argmin(gradient, radius=2.0).diagonal(), norm.sharp(gradient).diagonal())
        [-2.  2.] [ 5.5 -5.5]
    """

    name: str
    """What is printed."""
    geometry: Geometry
    """The norm without its shape factor."""
    shape_factor: str = "one"
    """What the ball is multiplied by: "one", a shape factor of
    :func:`~dropmuon_jax.norms.spectral_norm`, "1/fan_in", "1/fan_out", "sqrt(fan_out)",
    "1/sqrt(fan_in)" or "sqrt(size)"."""
    of: Literal["matrices", "matrices and vectors", "whole leaves"] = "matrices"
    """What the norm takes. A matrix that is a vector has fan-in 1; a whole leaf is one vector, of
    any shape."""
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

    def argmin(
        self,
        gradient: Array,
        radius: float | Array = 1.0,
        dimension_numbers: LeafNumbers | None = None,
    ) -> Array:
        """-radius · D, the argmin of ⟨G, Z⟩ over ‖Z‖ ≤ radius, where ⟨G, Z⟩ is -radius ‖G‖*."""
        check_positive("radius", radius)
        stack, restore, factor = self._view(gradient, dimension_numbers)
        size = jnp.asarray(radius, stack.dtype) * factor
        return restore(-size * self.geometry.direction(stack)).astype(gradient.dtype)

    def sharp(self, gradient: Array, dimension_numbers: LeafNumbers | None = None) -> Array:
        """‖G‖* · D, the argmax of ⟨G, Z⟩ - ½‖Z‖², with ‖G‖* from ⟨G, D⟩."""
        stack, restore, factor = self._view(gradient, dimension_numbers)
        direction = self.geometry.direction(stack) * factor
        dual_norm = jnp.sum(stack * direction, (-2, -1), keepdims=True)
        return restore(dual_norm * direction).astype(gradient.dtype)

    def init(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        dtype: Any = jnp.float32,
        dimension_numbers: LeafNumbers | None = None,
    ) -> Array:
        """A random array of norm 1, or zeros for an RMS norm: an initializer of Flax and JAX.

        It is orthogonal for the spectral norms, ±1 for the sign norms, and has columns, rows or
        entries of one length for the others, times the shape factor. See :meth:`initializer`.
        """
        check_floating("dtype", dtype)
        leaf = jnp.zeros(shape, dtype)
        return self.init_leaf(key, leaf, self._axes_of_one(leaf, dimension_numbers))

    def directions(
        self,
        leaves: Sequence[Array],
        axes: Sequence[MatrixAxes],
        orthogonalize_all: Callable[..., list[Array]],
        memory_limit: int,
    ) -> list[Array]:
        """D of every matrix of every leaf, those of one shape at once where D is a polar factor."""
        of_leaves = list(map(parts_of, leaves, axes))
        parts = list(itertools.chain(*of_leaves))
        of_parts = [of.of_part for of, x in zip(axes, of_leaves, strict=True) for _ in x]
        if self.geometry.orthogonalize is not None:
            kernel = self.geometry.orthogonalize
            found = orthogonalize_all(kernel, parts, of_parts, memory_limit)
        else:
            stacks = map(to_matrices, parts, of_parts)
            found = [restore(self.geometry.direction(stack)) for stack, restore in stacks]
        factors = map(self.factor, map(matrix_shape, parts, of_parts))
        scaled = iter([factor * x for factor, x in zip(factors, found, strict=True)])
        return [
            joined(list(itertools.islice(scaled, len(x))), of)
            for x, of in zip(of_leaves, axes, strict=True)
        ]

    def init_leaf(self, key: PRNGKeyArray, leaf: Array, axes: MatrixAxes) -> Array:
        """A random array like a leaf with these axes, in which each matrix has norm 1."""
        if self.starts_at_zero:
            return jnp.zeros_like(leaf)
        parts = parts_of(leaf, axes)
        wide = np.promote_types(leaf.dtype, np.float32)

        def draw(key: PRNGKeyArray, part: Array) -> Array:
            stack, restore = to_matrices(part, axes.of_part)
            sizes = matrix_shape(part, axes.of_part)
            keys = jax.random.split(key, len(stack))
            drawn = jax.vmap(lambda one: self.geometry.draw(one, sizes[:2], wide))(keys)
            return restore(drawn * self.factor(sizes)).astype(leaf.dtype)

        keys = [key] if len(parts) == 1 else jax.random.split(key, len(parts))
        return joined(list(map(draw, keys, parts)), axes)

    def initializer(self, radius: float = 1.0) -> Callable[..., Array]:
        """`init` times the radius, a point on the boundary, for `nn.Dense(kernel_init=…)`."""
        check_positive("radius", radius)

        def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any):
            unit = self.init(key, shape, dtype)
            return jnp.asarray(radius, unit.dtype) * unit

        return init

    def factor(self, shape: MatrixShape) -> float:
        """The shape factor of a matrix; an empty one is taken to have a size of 1."""
        return SHAPE_FACTORS[self.shape_factor](MatrixShape(*(max(1, size) for size in shape)))

    def axes(self, tree: Any, dimension_numbers: DimensionNumbers | None) -> list[MatrixAxes]:
        """The matrix axes of each leaf of a tree; an error for a leaf that has no such norm."""
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
    ) -> tuple[Matrices, Callable[[Array], Array], float]:
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
        """The axes of an array that is in no tree."""
        check_floating("the array", x.dtype)
        if self.of == "matrices" and x.ndim < 2:
            raise ValueError(
                f"{self} is of matrices (in, out) and convolutions (*window, in, out), got an "
                f"array of shape {x.shape}."
            )
        if numbers is None and x.ndim > 2 and self.of != "whole leaves":
            numbers = "in_out"
        (axes,) = self.axes(x, numbers)
        is_batch = self.of != "whole leaves" and {*range(x.ndim)} > {*axes.fan_in, *axes.fan_out}
        if is_batch or axes.cut:
            raise ValueError(
                f"An array of shape {x.shape} with these dimension_numbers is a batch of matrices: "
                "take jax.vmap over its other axes, and parts one by one."
            )
        return axes
