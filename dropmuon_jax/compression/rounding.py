"""Compressors that round: entries to powers of two, or to their signs."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dropmuon_jax.compression.compressors import Compressor

# Entry by entry at most as large means at most as long.
_MONOTONE = ("frobenius", "max", "sum", "columns", "longest_column")
_MANTISSA, _SIGN, _INFINITE = np.uint32(0x7FFFFF), np.uint32(1 << 31), np.uint32(0x7F800000)
_LARGEST = np.uint32(0x7F000000)  # 2^127


@dataclasses.dataclass(frozen=True)
class Natural(Compressor):
    r"""Rounds every entry to a power of two, at random so that its mean is the entry.

    .. math::
        C(x) = \operatorname{sign}(x) \cdot 2^{e + b}, \qquad 2^e \le |x| < 2^{e+1}, \quad
        b \sim \text{Bernoulli}(|x| / 2^e - 1)

    Attributes:
        code_bits: 16, a bfloat16 without mantissa, as the cost table of EF21-Muon seems to count;
            or 8, a sign and 7 bits of the exponent below the largest of the matrix, which costs one
            byte more for each matrix and loses entries below 2^-126 of the largest.
        nearest: Whether to round to the nearest power, without a key: biased, and a contraction of
            every norm that looks at sizes only.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> compressor, x = dm.compression.Natural(8, nearest=True), jnp.array([[3.1, -0.7, 0.0]])
        >>> print(compressor.decompress(compressor.compress(x), x))
        [[ 4.  -0.5  0. ]]

    References:
        Horváth et al., *Natural Compression for Distributed Deep Learning*, 2019. That α is 7/8 as
        it is, and 8/9 for the nearest power, is derived here; so is the form of 8 bits.
    """

    code_bits: Literal[8, 16] = 16
    nearest: bool = False

    def __post_init__(self):
        if self.code_bits not in (8, 16):
            raise ValueError(f"code_bits must be 8 or 16, got {self.code_bits!r}.")

    @property
    def is_random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.nearest

    def compress(self, x, key=None, memory=()):
        del memory
        words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        size = words & ~_SIGN
        # A carry into the exponent comes with the probability mantissa / 2^23, or from 1/2 on.
        if self.nearest:
            carry = jnp.uint32(1 << 22)
        else:
            if key is None:
                raise TypeError("Natural() rounds at random: give compress a key.")
            carry = jax.random.bits(key, x.shape, jnp.uint32) & _MANTISSA
        powers = jnp.minimum((size + carry) & ~_MANTISSA, _LARGEST)
        powers = jnp.where(size >= _INFINITE, size, powers)
        if self.code_bits == 16:  # a bfloat16, in an integer, which no backend widens
            return ((powers | (words & _SIGN)) >> 16).astype(jnp.uint16)
        exponents = (powers >> 23).astype(jnp.int32)
        top = jnp.max(exponents, axis=(-2, -1), keepdims=True, initial=0)
        below = top - exponents  # from 0 on; what is smaller by more than 2^-126 becomes 0
        code = jnp.where((exponents > 0) & (below < 127), below + 1, 0).astype(jnp.uint32)
        code |= (words & _SIGN) >> 24
        return {"codes": code.astype(jnp.uint8), "top": top.astype(jnp.uint8)}

    def decompress(self, payload, like):
        if self.code_bits == 16:
            return jax.lax.bitcast_convert_type(payload, jnp.bfloat16).astype(like.dtype)
        code = payload["codes"].astype(jnp.uint32)
        below, sign = code & 127, (code & 128) << 24
        exponent = payload["top"].astype(jnp.uint32) + 1 - below
        words = jnp.where(below == 0, 0, exponent << 23) | sign
        return jax.lax.bitcast_convert_type(words, jnp.float32).astype(like.dtype)

    def factors_of(self, shape):
        # Nearest: at most 1/3 of each entry is lost. At random: (x - 2^e)(2^(e+1) - x) ≤ x²/8.
        factors = {of: 8 / 9 for of in _MONOTONE}
        return factors if self.nearest else {"frobenius": 7 / 8}


@dataclasses.dataclass(frozen=True)
class ScaledSign(Compressor):
    """Sends signs, a bit each, and the mean size: α = ‖X‖₁² / (d ‖X‖₂²), of d entries.

    That α depends on the matrix. What `contraction` gives is its least value, 1 / d, which only a
    matrix of a single entry has; of many Gaussian entries it is 2 / π.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> compressor, x = dm.compression.ScaledSign(), jnp.array([[3.0, -1.0]])
        >>> print(compressor.decompress(compressor.compress(x), x))
        [[ 2. -2.]]
    """

    def compress(self, x, key=None, memory=()):
        del key, memory
        flat = x.reshape(*x.shape[:-2], -1)
        return {"signs": jnp.packbits(flat < 0, axis=-1), "mean": jnp.mean(jnp.abs(flat), -1)}

    def decompress(self, payload, like):
        size = math.prod(like.shape[-2:])
        is_negative = jnp.unpackbits(payload["signs"], axis=-1, count=size) == 1
        mean = payload["mean"].astype(like.dtype)[..., None]
        return jnp.where(is_negative, -mean, mean).reshape(like.shape)

    def factors_of(self, shape):
        return {"frobenius": 1 / max(1, math.prod(shape))}
