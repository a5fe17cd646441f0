"""Broximal operators with a formula: quadratics, linear functions, and |x|."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from dropmuon_jax._checks import check_positive, describe
from dropmuon_jax.contrib.broximal.oracle import Brox
from dropmuon_jax.norms.norm import Norm


def brox_linear(slope: Array, x: Array, radius: float | Array, norm: Norm) -> Brox:
    """Of ⟨slope, z⟩ in any norm: x + argmin ⟨slope, ·⟩, the step of Muon, Scion and the like.

    Args:
        slope: The gradient.
        x: The centre of the ball.
        radius: Its size, positive.
        norm: Of the ball.

    Returns:
        A :class:`Brox` with the gap 0 and no steps, as of every function here.

    Raises:
        TypeError: If `norm` is none.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> slope, x = jnp.array([[3.0], [-1.0]]), jnp.zeros((2, 1))
        >>> norm = dm.norms.sign_norm(normalized=False)
        >>> print(dm.contrib.broximal.brox_linear(slope, x, 2.0, norm).point.T)
        [[-2.  2.]]
    """
    if not isinstance(norm, Norm):
        called = " Call it: it makes one." if callable(norm) else ""
        raise TypeError(f"norm must be a dm.norms.Norm, got {describe(norm)}.{called}")
    point = x + norm.argmin(slope, radius)
    return _exactly(point, jnp.vdot(slope, point))


def brox_absolute(x: Array, radius: float | Array) -> Brox:
    """Of Σ|z_i| in the largest-entry norm: every entry moves towards 0, by the radius at most.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.contrib.broximal.brox_absolute(jnp.array([3.0, -0.5]), 1.0).point)
        [2. 0.]
    """
    check_positive("radius", radius)
    point = x - jnp.clip(x, -radius, radius)
    return _exactly(point, jnp.abs(point).sum())


def brox_quadratic(
    hessian: Float[Array, "n n"], slope: Float[Array, " n"], x: Float[Array, " n"], radius: float
) -> tuple[Brox, Float[Array, ""]]:
    r"""Of ½ zᵀAz - ⟨slope, z⟩ with a positive semidefinite A, in the Euclidean norm.

    The step s = -(A + cI)⁻¹ ∇f(x) has the length `radius` for one c > 0, which is found by
    bisection over the eigenvalues of A; or c = 0, if the ball has a minimizer of f in it.

    Args:
        hessian: A, symmetric.
        slope: The linear part.
        x: The centre of the ball.
        radius: Its size, positive.

    Returns:
        A :class:`Brox`, and c, with c (x - z) = ∇f(z).

    Raises:
        ValueError: For shapes that do not fit, and outside of `jax.jit` for an A that is not
            symmetric or has a negative eigenvalue: the formula is none then.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> quadratic = dm.contrib.broximal.brox_quadratic
        >>> found, c = quadratic(jnp.eye(2), jnp.zeros(2), jnp.array([3.0, 4.0]), 2.0)
        >>> bool(jnp.allclose(found.point, jnp.array([1.8, 2.4]))), bool(jnp.isclose(c, 1.5))
        (True, True)

    References:
        The subproblem of trust regions: Moré and Sorensen, 1983.
    """
    check_positive("radius", radius)
    if hessian.shape != (*x.shape, *x.shape) or slope.shape != x.shape or x.ndim != 1:
        raise ValueError(
            f"hessian, slope and x must be of shapes (n, n), (n,) and (n,), got {hessian.shape}, "
            f"{slope.shape} and {x.shape}."
        )
    hessian, slope, centre = (
        a.astype(np.promote_types(a.dtype, np.float32)) for a in (hessian, slope, x)
    )
    size, eigenvectors = jnp.linalg.eigh(hessian)
    if not isinstance(size, Tracer):
        _check_semidefinite(np.asarray(hessian), np.asarray(size))
    # What is 0 but for rounding: there a minimizer needs no step, or there is none.
    floor = len(size) * jnp.finfo(size.dtype).eps * jnp.maximum(size[-1], 0)
    size = jnp.where(size <= floor, 0, size)
    gradient = eigenvectors.T @ (hessian @ centre - slope)

    def step(c: Array) -> Array:
        total = size + c
        return jnp.where(total == 0, 0, -gradient / jnp.where(total == 0, 1, total))

    longest = jnp.linalg.norm(gradient) / radius
    flat = jnp.linalg.norm(jnp.where(size == 0, gradient, 0))
    is_inside = (jnp.linalg.norm(step(jnp.zeros_like(longest))) <= radius) & (
        flat <= 1e-6 * jnp.linalg.norm(gradient)
    )

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        is_long = jnp.linalg.norm(step(middle)) > radius
        return jnp.where(is_long, middle, low), jnp.where(is_long, high, middle)

    _, c = jax.lax.fori_loop(0, 100, halve, (jnp.zeros_like(longest), longest))
    c = jnp.where(is_inside, 0, c)
    point = centre + eigenvectors @ step(c)
    value = 0.5 * point @ hessian @ point - slope @ point
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else point.dtype
    return _exactly(point.astype(dtype), value), c


def _check_semidefinite(hessian: np.ndarray, eigenvalues: np.ndarray) -> None:
    """Error for a matrix that is not symmetric or has a negative eigenvalue, but for rounding."""
    rounding = 10 * len(hessian) * np.finfo(hessian.dtype).eps * np.abs(eigenvalues).max(initial=0)
    if np.abs(hessian - hessian.T).max(initial=0) > rounding:
        raise ValueError("hessian must be symmetric: give (A + A.T) / 2, of which f is the same.")
    if eigenvalues.min(initial=0) < -rounding:
        raise ValueError(
            f"hessian has the eigenvalue {eigenvalues.min():g}, and must be positive semidefinite: "
            "otherwise what is found need not be the smallest value in the ball."
        )


def _exactly(point: Array, value: Array) -> Brox:
    return Brox(point, value, jnp.zeros_like(value), jnp.int32(0))
