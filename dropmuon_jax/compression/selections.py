"""Compressors that keep the largest of a matrix: entries, columns or singular values."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dropmuon_jax._checks import check_choice, is_python_number
from dropmuon_jax.compression.compressors import Compressor, Identity, Shape
from dropmuon_jax.compression.rounding import Natural
from dropmuon_jax.orthogonalize.batches import thin_svd


@dataclasses.dataclass(frozen=True)
class _Selection(Compressor):
    """What the compressors have in common that keep k of something, or a share k of it."""

    k: float
    coder: Identity | Natural = dataclasses.field(default_factory=Identity)
    what: ClassVar[str] = ""

    def __post_init__(self):
        if not is_python_number(self.k):
            raise TypeError(
                f"k must be a Python integer, or a float that is a share of all, got {self.k!r}."
            )
        if not (self.k >= 1 if isinstance(self.k, int) else 0 < self.k <= 1):
            raise ValueError(
                f"k must be an integer of at least 1, or a share in (0, 1], got {self.k}. All are "
                "1.0, and one is 1."
            )
        if not isinstance(self.coder, Identity | Natural):
            raise TypeError(
                "coder must be dm.compression.Natural(…) or dm.compression.Identity(), got "
                f"{self.coder!r}."
            )

    def total(self, shape: Shape) -> int:
        """How many there are of what is kept."""
        raise NotImplementedError

    def count(self, shape: Shape) -> int:
        """How many are kept, at least one."""
        if isinstance(self.k, int):
            return self.k
        return max(1, math.floor(self.k * self.total(shape)))

    def share(self, shape: Shape) -> float:
        """The part that is kept."""
        return min(1.0, self.count(shape) / max(1, self.total(shape)))

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.coder.is_random

    def check(self, path, shape):
        if self.of_matrices and min(shape[-2:]) < 2:
            raise ValueError(
                f"{self} is of matrices, and leaf '{path}' is a vector of {math.prod(shape)} "
                "entries: send it by another compressor, with dm.chain_subtrees."
            )
        if self.count(shape) > self.total(shape):
            raise ValueError(
                f"k is {self.k}, and leaf '{path}' has {self.total(shape)} {self.what}. Give a "
                "share, such as 0.1, which fits leaves of all sizes."
            )


def largest(sizes: Float[Array, "*batch d"], k: int) -> Int[Array, "*batch k"]:
    """The indices of the k largest of numbers that are at least 0, in ascending order.

    The threshold is found bit by bit, in 31 passes: for a tenth of ten million numbers on a CPU
    this takes a fraction of the time of a sort. Of equal numbers the first are kept.
    """
    words = jax.lax.bitcast_convert_type(sizes.astype(jnp.float32), jnp.uint32)

    def with_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (jnp.uint32(30) - jnp.asarray(i, jnp.uint32)))
        enough = jnp.sum(words >= higher[..., None], axis=-1, dtype=jnp.int32) >= k
        return jnp.where(enough, higher, threshold)

    # A zero that varies over the axes of a mesh as the numbers do.
    threshold = jax.lax.fori_loop(0, 31, with_bit, words[..., 0] & 0)[..., None]
    above, equal = words > threshold, words == threshold
    missing = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    kept = above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= missing))
    # The index of the j-th kept one is where their running count first reaches j.
    running = jnp.cumsum(kept, axis=-1, dtype=jnp.int32)
    wanted = jnp.arange(1, k + 1, dtype=jnp.int32)
    flat = running.reshape(-1, running.shape[-1])
    found = jax.vmap(lambda row: jnp.searchsorted(row, wanted, side="left"))(flat)
    return found.reshape(*running.shape[:-1], k).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class ColumnTopK(_Selection):
    """Keeps the longest columns: α = k / n of n columns, and 1 - (1 - k/n)² in the norm Σ‖column‖₂.

    A column is one of the papers' W = kernelᵀ, as in :func:`~dropmuon_jax.norms.column_norm`: what
    one input gives, a *row* of a kernel (in, out). An index takes 16 bits where there are up to
    65,536 columns, and 32 where there are more.

    Attributes:
        k: How many: an integer, or a float that is a share of all.
        coder: How the values are sent, by default as they are; :class:`Natural` makes the first α
            times its own.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> compressor, x = dm.compression.ColumnTopK(1), jnp.array([[3.0, 1.0], [0.0, 9.0]])
        >>> print(compressor.decompress(compressor.compress(x), x))
        [[0. 0.]
         [0. 9.]]
    """

    of_matrices: ClassVar[bool] = True
    what: ClassVar[str] = "columns"
    norm: ClassVar[str] = "columns"
    """The sum of the sizes of what is kept or not."""

    def total(self, shape):
        return shape[-2]

    def view(self, shape: Shape) -> Shape:
        """A matrix whose rows are kept or not."""
        return shape

    def compress(self, x, key=None, memory=()):
        del memory
        x = x.reshape(self.view(x.shape))
        indices = largest(jnp.linalg.norm(x, axis=-1), self.count(x.shape))
        kept = jnp.take_along_axis(x, indices[..., None], axis=-2)
        dtype = jnp.uint16 if self.total(x.shape) <= 1 << 16 else jnp.uint32
        return {"values": self.coder.compress(kept, key), "indices": indices.astype(dtype)}

    def decompress(self, payload, like):
        indices, (*_, rows, width) = payload["indices"].astype(jnp.int32), self.view(like.shape)
        of_kept = jax.ShapeDtypeStruct((*indices.shape, width), like.dtype)
        kept = self.coder.decompress(payload["values"], of_kept)

        def scatter(kept: Array, indices: Array) -> Array:
            empty = jnp.zeros((rows, width), like.dtype)
            return empty.at[indices].set(kept, unique_indices=True, indices_are_sorted=True)

        flat = kept.reshape(-1, *kept.shape[-2:]), indices.reshape(-1, indices.shape[-1])
        return jax.vmap(scatter)(*flat).reshape(like.shape)

    def factors_of(self, shape):
        share, coded = self.share(shape), self.coder.factors_of((1, 1))["frobenius"]
        factors = {"frobenius": coded * share}
        return factors | ({self.norm: 1 - (1 - share) ** 2} if self.coder.is_exact else {})


@dataclasses.dataclass(frozen=True)
class TopK(ColumnTopK):
    """Keeps the largest entries: α = k / d of d entries, and 1 - (1 - k/d)² in the norm Σ|x|.

    Attributes:
        k: How many: an integer, or a float that is a share of all.
        coder: How the values are sent, as in :class:`ColumnTopK`; the indices likewise.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> compressor = dm.compression.TopK(0.5, dm.compression.Natural(nearest=True))
        >>> x = jnp.array([[3.1, -0.1], [0.0, -9.0]])
        >>> print(compressor.decompress(compressor.compress(x), x))
        [[ 4.  0.]
         [ 0. -8.]]
    """

    of_matrices: ClassVar[bool] = False
    what: ClassVar[str] = "entries"
    norm: ClassVar[str] = "sum"

    def total(self, shape):
        return math.prod(shape[-2:])

    def view(self, shape):
        return (*shape[:-2], self.total(shape), 1)


@dataclasses.dataclass(frozen=True)
class RankK(_Selection):
    r"""Sends two factors of rank k, (rows, k) and (k, cols).

    ========== ============================================= =====================================
    `method`   factors                                       contraction, of r singular values
    ========== ============================================= =====================================
    "exact"    the largest k singular values, by an SVD      k / r, and 1 - (1 - k/r)² nuclear
    "random"   P and PᵀX, P of orthonormal columns that      k / r on average; near the largest
               span XΩ, Ω Gaussian                           singular values if they stand out
    "warm"     the same, with k - 1 directions of the last   1 / r on average; the largest
               payload: a step of subspace iteration         singular values if they stay
    ========== ============================================= =====================================

    None is contractive in the spectral norm: where all singular values are equal, what is left out
    is as long as the whole. So it is for the gradients of Muon, whose norm is the nuclear one, and
    not for its model.

    Attributes:
        k: The rank: an integer, or a float that is a share of min(rows, cols).
        coder: How the factors are sent, by default as they are. With :class:`Natural` α is 47/64
            of that above.
        method: As in the table.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> compressor = dm.compression.RankK(1, method="exact")
        >>> x = jnp.diag(jnp.array([1.0, 3.0]))
        >>> print(compressor.decompress(compressor.compress(x), x))
        [[0. 0.]
         [0. 3.]]
        >>> compressor.contraction("nuclear", (2, 2)), compressor.contraction("spectral", (2, 2))
        (0.75, 0.0)

    References:
        Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011; Vogels et al.,
        *PowerSGD*, 2019, for "warm". The contractions are derived here: that of "random" because
        the span of XΩ leans to the larger singular values (and checked), that of coded factors
        because both are rounded independently.
    """

    method: Literal["exact", "random", "warm"] = "random"

    of_matrices: ClassVar[bool] = True
    what: ClassVar[str] = "singular values"

    def __post_init__(self):
        super().__post_init__()
        check_choice("method", self.method, ("exact", "random", "warm"))

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.coder.is_random or self.method != "exact"

    def total(self, shape):
        return min(shape[-2:])

    def compress(self, x, key=None, memory=()):
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        k = self.count(x.shape)
        if self.method == "exact":
            left, s, right = thin_svd(x)
            left, right = left[..., :k], s[..., :k, None] * right[..., :k, :]
        else:
            if (of_drawn := keys[2]) is None:
                raise TypeError(f"RankK(method={self.method!r}) draws directions: give it a key.")
            fresh = 1 if self.method == "warm" else k
            drawn = jax.random.normal(of_drawn, (*x.shape[:-2], x.shape[-1], fresh), x.dtype)
            known = [memory[..., : k - 1].astype(x.dtype)] if self.method == "warm" else []
            left, _ = jnp.linalg.qr(x @ jnp.concatenate([*known, drawn], axis=-1))
            right = left.mT @ x
        left, right = self.coder.compress(left, keys[0]), self.coder.compress(right, keys[1])
        return {"left": left, "right": right}

    def decompress(self, payload, like):
        k = self.count(like.shape)
        *batch, rows, cols = like.shape
        left, right = (
            self.coder.decompress(payload[name], jax.ShapeDtypeStruct((*batch, *of), like.dtype))
            for name, of in (("left", (rows, k)), ("right", (k, cols)))
        )
        return left @ right

    def init(self, shape, dtype):
        if self.method != "warm":
            return ()
        # Any directions: the same for all workers, and full of numbers of one size.
        start = jax.random.normal(jax.random.key(0), (shape[-1], self.count(shape)), dtype)
        return jnp.broadcast_to(start, (*shape[:-2], *start.shape))

    def remember(self, payload, like):
        if self.method != "warm":
            return ()
        *batch, _, cols = like.shape
        of_right = jax.ShapeDtypeStruct((*batch, self.count(like.shape), cols), like.dtype)
        return self.coder.decompress(payload["right"], of_right).mT

    def factors_of(self, shape):
        share, coded = self.share(shape), self.coder.factors_of((1, 1))["frobenius"]
        if self.method == "warm":  # of what the others leave, the drawn one has 1/r on average
            share = 1 / max(1, self.total(shape))
        if self.coder.is_exact:
            exact = {"nuclear": 1 - (1 - share) ** 2} if self.method == "exact" else {}
            return {"frobenius": share} | exact
        # Independent factors L, R with E‖l‖² ≤ (1 + ω)‖l‖²: E‖LR - lr‖² ≤ ((1 + ω)² - 1)‖r‖².
        lost = (2 - coded) ** 2 - 1
        return {"frobenius": share * (1 - lost)} if self.coder.is_random else {}
