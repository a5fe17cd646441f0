"""Compressors: what travels in the place of a matrix, and how far what arrives may be from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dropmuon_jax._checks import check_choice, check_index, is_python_number, static_int

Matrices = Float[Array, "*batch rows cols"]
Payload = Any
Shape = tuple[int, ...]

# The norms of a matrix in which contractions are known. "columns" is the sum of the lengths of the
# papers' columns, which are rows of a kernel (in, out), and "longest_column" its dual.
NORMS: tuple[str, ...] = (
    "frobenius",
    "spectral",
    "nuclear",
    "max",
    "sum",
    "columns",
    "longest_column",
)


@dataclasses.dataclass(frozen=True)
class Compressor:
    r"""What is sent for a matrix: a payload of static shapes, from which an approximation is made.

    A compressor C is contractive in a norm if for some α in (0, 1], in every step or on average,

    .. math::
        \mathbb{E}\,\|C(X) - X\|^2 \le (1 - \alpha)\,\|X\|^2

    This is the base class: compressors, your own too, are small frozen values that define
    `compress`, `decompress` and `factors_of`. Arrays are stacks (\*batch, rows, cols), each matrix
    of which is compressed by itself, in float32 at least.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> x = jnp.array([[3.0, -0.5, 0.0, -4.0]])
        >>> compressor = dm.compression.TopK(2)
        >>> payload = compressor.compress(x)
        >>> print(compressor.decompress(payload, x))
        [[ 3.  0.  0. -4.]]
        >>> compressor.contraction("frobenius", x.shape), compressor.bits(x.shape)
        (0.5, 96)
    """

    is_exact: ClassVar[bool] = False
    """Whether what arrives is what was sent, bit for bit."""
    is_random: ClassVar[bool] = False
    """Whether `compress` needs a key, and the contraction is one on average."""
    of_matrices: ClassVar[bool] = False
    """Whether rows and columns count; otherwise a leaf is one vector, whatever its axes."""

    def compress(self, x: Matrices, key: PRNGKeyArray | None = None, memory: Any = ()) -> Payload:
        """The payload of a stack: a tree of arrays whose shapes depend on its shape only."""
        raise NotImplementedError

    def decompress(self, payload: Payload, like: Any) -> Matrices:
        """C(X) in the shape and dtype of `like`."""
        raise NotImplementedError

    def factors_of(self, shape: Shape) -> Mapping[str, float]:
        """α by norm, for matrices of this shape; norms that are not named have none."""
        raise NotImplementedError

    def init(self, shape: Shape, dtype: Any) -> Any:
        """What a sender remembers of its last payload; by default nothing."""
        del shape, dtype
        return ()

    def remember(self, payload: Payload, like: Any) -> Any:
        """The memory after a payload."""
        del payload, like
        return ()

    def is_sent(self, key: PRNGKeyArray) -> Array | None:
        """Whether anything is sent in a step, by a key that all workers share; None for always."""
        del key

    def check(self, path: str, shape: Shape) -> None:
        """Error, naming the leaf, for a matrix that this compressor does not take."""

    def contraction(self, norm: str, shape: Shape) -> float:
        """α in a norm of `NORMS`, for matrices of a shape (rows, cols); 0 if there is none.

        Raises:
            ValueError: For another norm.
        """
        check_choice("norm", norm, NORMS)
        return self.factors_of(shape[-2:]).get(norm, 0.0)

    def is_contractive(self, norm: str) -> bool:
        """Whether there is an α > 0 in a norm for matrices of every shape."""
        # A single entry, row or rank is all of a small matrix.
        return self.contraction(norm, (10_000, 10_000)) > 0

    def bits(self, shape: Shape, dtype: Any = jnp.float32, *, index_bits: int | None = None) -> int:
        r"""The bits of a payload, as its arrays have them.

        Args:
            shape: (\*batch, rows, cols).
            dtype: Of the values before they are compressed.
            index_bits: What an index counts, in the place of the width of its dtype.
        """
        like = jax.ShapeDtypeStruct(shape, dtype)
        key, memory = jax.eval_shape(lambda: (jax.random.key(0), self.init(shape, dtype)))
        payload = jax.eval_shape(self.compress, like, key, memory)
        total = 0
        for path, x in jax.tree_util.tree_leaves_with_path(payload):
            is_index = index_bits is not None and "'indices'" in jax.tree_util.keystr(path)
            total += x.size * (index_bits if is_index else 8 * x.dtype.itemsize)
        return total


def check_contractive(compressor: Any, norm: str, *, name: str = "compressor") -> None:
    """Error unless a value is a compressor that is contractive in a norm."""
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"{name} must be a compressor, such as dm.compression.TopK(0.1), got {compressor!r}."
        )
    if not compressor.is_contractive(norm):
        known = [of for of in NORMS if compressor.is_contractive(of)]
        raise ValueError(
            f"{name}={compressor} is not contractive in the {norm} norm: what it leaves out may be "
            f"as long as the whole. It is in {known}: name one of these norms, in which the theory "
            "holds with the constants of their equivalence, or take "
            "dm.compression.RandomDropout(p) or dm.compression.Damping(γ), which contract in "
            "every norm."
        )


def _check_static(name: str, value: Any) -> None:
    """Error unless a value is a Python number."""
    if not is_python_number(value):
        raise TypeError(f"{name} must be a Python number, got {value!r}. It is static.")


def check_seed(seed: Any) -> None:
    """Error unless a seed is a nonnegative integer, or an array of one, whose value may be traced.

    `optax.inject_hyperparams` makes arrays of all numbers, those of defaults too.
    """
    if isinstance(seed, jax.Array):
        check_index("seed", seed)
    else:
        static_int("seed", seed, minimum=0, hint="Keys are made of it for each step.")


@dataclasses.dataclass(frozen=True)
class Identity(Compressor):
    """Sends the matrix itself: error feedback with it is the method without compression.

    Examples:
        >>> import dropmuon_jax as dm
        >>> dm.compression.Identity().bits((10, 10))
        3200
    """

    is_exact: ClassVar[bool] = True

    def compress(self, x, key=None, memory=()):
        del key, memory
        return x

    def decompress(self, payload, like):
        return payload.astype(like.dtype)

    def factors_of(self, shape):
        return dict.fromkeys(NORMS, 1.0)


@dataclasses.dataclass(frozen=True)
class Damping(Compressor):
    """Sends γX: no byte less, and a contraction of every norm, α = 1 - (1 - γ)².

    Attributes:
        factor: γ, in (0, 2).

    Examples:
        >>> import dropmuon_jax as dm
        >>> dm.compression.Damping(0.5).contraction("spectral", (3, 4))
        0.75
    """

    factor: float

    def __post_init__(self):
        _check_static("factor", self.factor)
        if not 0 < self.factor < 2:
            raise ValueError(f"factor must lie in (0, 2), got {self.factor}.")

    def compress(self, x, key=None, memory=()):
        del key, memory
        return jnp.asarray(self.factor, x.dtype) * x

    def decompress(self, payload, like):
        return payload.astype(like.dtype)

    def factors_of(self, shape):
        return dict.fromkeys(NORMS, 1 - (1 - self.factor) ** 2)


@dataclasses.dataclass(frozen=True)
class RandomDropout(Compressor):
    """Sends in a share of the steps only: the inner C(X) with probability p, and else 0.

    Whether it sends is drawn from seed, step and leaf, and the same for all workers: then the
    exchange of the leaf is left out by all of them. A compiled program has it, in a conditional, so
    `bits` are those of a step that sends; on average it is p of them. `compress` and `decompress`
    are those of a step that sends too; `is_sent` says whether one does. α is p times the inner one,
    in every norm in which there is one.

    Attributes:
        probability: p, in (0, 1].
        inner: What is sent then, by default :class:`Identity`.

    Examples:
        >>> import dropmuon_jax as dm
        >>> dm.compression.RandomDropout(0.25).contraction("spectral", (3, 4))
        0.25
    """

    probability: float
    inner: Compressor = dataclasses.field(default_factory=Identity)
    is_random: ClassVar[bool] = True

    def __post_init__(self):
        _check_static("probability", self.probability)
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must lie in (0, 1], got {self.probability}.")
        if not isinstance(self.inner, Compressor) or isinstance(self.inner, RandomDropout):
            raise TypeError(f"inner must be a compressor that is no dropout, got {self.inner!r}.")

    @property
    def of_matrices(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.of_matrices

    def compress(self, x, key=None, memory=()):
        return self.inner.compress(x, key, memory)

    def decompress(self, payload, like):
        return self.inner.decompress(payload, like)

    def factors_of(self, shape):
        return {of: self.probability * a for of, a in self.inner.factors_of(shape).items()}

    def init(self, shape, dtype):
        return self.inner.init(shape, dtype)

    def remember(self, payload, like):
        return self.inner.remember(payload, like)

    def is_sent(self, key):
        return jax.random.bernoulli(key, self.probability)

    def check(self, path, shape):
        self.inner.check(path, shape)
