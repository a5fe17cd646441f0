"""The norms by name."""

from dropmuon_jax._checks import check_choice, describe
from dropmuon_jax._norms._geometries import COLUMNS, EUCLIDEAN, MAXIMUM, NUCLEAR, ROWS, spectral
from dropmuon_jax._norms._norm import Norm
from dropmuon_jax._norms._shape_factors import SPECTRAL_FACTORS
from dropmuon_jax._orthogonalize import Orthogonalize, newton_schulz


def spectral_norm(
    shape_factor: str = "spectral", *, orthogonalize: Orthogonalize | None = None
) -> Norm:
    r"""The largest singular value, divided by a shape factor: the norm of Muon and Scion.

    .. math::
        \|X\| = \sigma_1(X) / c, \qquad \|G\|_* = c \textstyle\sum_j \sigma_j(G), \qquad
        D = c\, UV^\top

    with c of this table, where a convolution (\*window, in, out) is the matrix (window · in, out):

    ============== ============================================ ==================================
    `shape_factor` c                                            who
    ============== ============================================ ==================================
    "spectral"     1                                            the ball of σ₁
    "muon"         max(1, fan-out / fan-in)^½                   Muon; Scion's "max"
    "moonlight"    0.2 max(fan-in, fan-out)^½                   Moonlight
    "rms_to_rms"   (fan-out / fan-in)^½                         the operator norm from RMS to RMS
    "scion"        (out / in)^½ / window                        Scion: the same for matrices, and
                                                                convolutions with their channels
    ============== ============================================ ==================================

    Args:
        shape_factor: A row of the table.
        orthogonalize: What gives UVᵀ, by default an SVD; :func:`newton_schulz` makes faster ones,
            whose accuracy `direction`, `lmo`, `sharp` and `dual_norm`, then ⟨G, D⟩, share.

    Raises:
        TypeError: If `orthogonalize` cannot be called.
        ValueError: If `shape_factor` is unknown.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> norm = dm.spectral_norm("rms_to_rms")
        >>> kernel = norm.init(jax.random.key(0), (2, 8))
        >>> print(norm.norm(kernel).round(5), (kernel @ kernel.T).round(3).diagonal())
        1.0 [4. 4.]

    References:
        Jordan et al., 2024; Liu et al., 2025, arXiv:2502.16982; Bernstein and Newhouse, 2024,
        arXiv:2410.21265; Pethick et al., 2025, arXiv:2502.07529. Scion's code initialises the
        positions of a convolution's window each orthogonally, which is a point of norm up to
        window^½; `init` stays on the sphere.
    """
    check_choice("shape_factor", shape_factor, SPECTRAL_FACTORS)
    exact = orthogonalize is None
    if not (exact or callable(orthogonalize)) or orthogonalize is newton_schulz:
        raise TypeError(
            "orthogonalize must be a function from matrices to their polar factors, such as "
            f"dm.newton_schulz() with its parentheses, got {describe(orthogonalize)}."
        )
    return Norm(f"spectral_norm({shape_factor!r})", spectral(orthogonalize), shape_factor)


def nuclear_norm() -> Norm:
    """The sum of the singular values; its LMO has rank one, as in Frank-Wolfe for low rank.

    ‖X‖ = Σσ(X), ‖G‖* = σ₁(G), D = u₁v₁ᵀ, by an SVD.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.nuclear_norm().lmo(jnp.diag(jnp.array([5.0, -0.5]))) + 0.0)
        [[-1. 0.]
         [ 0. 0.]]
    """
    return Norm("nuclear_norm()", NUCLEAR, "one")


def sign_norm(*, normalized: bool = True) -> Norm:
    """The largest entry, times the fan-in: the norm of an output layer in Scion.

    ‖X‖ = fan-in · max |x|, ‖G‖* = Σ|g| / fan-in, D = sign(G) / fan-in; without `normalized` all of
    it without fan-in, which is signSGD. A vector has fan-in 1.

    Args:
        normalized: Whether fan-in enters: then ‖X‖ bounds every output of an input with entries up
            to 1.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.sign_norm().lmo(jnp.array([[3.0], [-0.1]])))
        [[-0.5]
         [ 0.5]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "Sign".
    """
    name = "sign_norm()" if normalized else "sign_norm(normalized=False)"
    return Norm(name, MAXIMUM, "1/fan_in" if normalized else "one", "matrices and vectors")


def column_norm() -> Norm:
    """The largest root mean square of what one input gives: the norm of an embedding in Scion.

    A column is one of the papers' W = kernelᵀ, and so a *row* of a Flax kernel (in, out) and of an
    `nn.Embed` table (tokens, features): one vector of length fan-out for each input.
    ‖X‖ = max ‖column‖₂ / √fan-out, ‖G‖* = √fan-out Σ ‖column‖₂, D = √fan-out column / ‖column‖₂.
    The columns of tokens that a batch has not are zero in its gradient, and have direction zero.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.column_norm().lmo(jnp.array([[3.0, 0.0, 4.0, 0.0]])) + 0.0)
        [[-1.2  0.  -1.6  0. ]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "ColNorm".
    """
    return Norm("column_norm()", COLUMNS, "sqrt(fan_out)")


def row_norm() -> Norm:
    """The largest output of an input with root mean square 1: Scion's other norm of a head.

    A row is one of the papers' W = kernelᵀ, and so a *column* of a Flax kernel (in, out): one
    vector of length fan-in for each output. ‖X‖ = √fan-in max ‖row‖₂, ‖G‖* = Σ ‖row‖₂ / √fan-in,
    D = row / (√fan-in ‖row‖₂).

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.row_norm().lmo(jnp.array([[3.0], [0.0], [4.0], [0.0]])).T + 0.0)
        [[-0.3  0.  -0.4  0. ]]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "RowNorm".
    """
    return Norm("row_norm()", ROWS, "1/sqrt(fan_in)")


def rms_norm() -> Norm:
    """The root mean square of a whole leaf: the norm of biases and scales in Scion.

    ‖x‖ = ‖x‖₂ / √d, ‖g‖* = √d ‖g‖₂, D = √d g / ‖g‖₂ for a leaf of d entries, of any shape: the
    biases of layers or heads that are stacked in one leaf share its ball. `init` gives zeros.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.rms_norm().lmo(jnp.array([3.0, 0.0, 4.0, 0.0])) + 0.0)
        [-1.2  0.  -1.6  0. ]

    References:
        Pethick et al., 2025 (Scion), arXiv:2502.07529, "BiasRMS".
    """
    return Norm("rms_norm()", EUCLIDEAN, "sqrt(size)", "whole leaves", starts_at_zero=True)


def euclidean_norm() -> Norm:
    """The Euclidean norm of a whole leaf, of any shape: normalised gradient descent.

    ‖x‖ = ‖x‖* = ‖x‖₂, D = g / ‖g‖₂, and the sharp operator is the identity.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> print(dm.euclidean_norm().lmo(jnp.array([3.0, 4.0])).round(3))
        [-0.6 -0.8]
    """
    return Norm("euclidean_norm()", EUCLIDEAN, "one", "whole leaves")
