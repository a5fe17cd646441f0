"""Dimension numbers: what users say of the axes of a leaf."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from optax.contrib import MuonDimensionNumbers

from dropmuon_jax._checks import check_choice, static_int

# "in_out" is (*window, in, out), as Flax, Haiku and Keras keep kernels, and "out_in" is
# (out, in, *window), as Equinox and PyTorch do. "transposed" is (*window, out, in), as Haiku and
# Keras keep transposed convolutions, and Flax with transpose_kernel=True. "depthwise" is
# (*window, 1, channels), as in Flax and Haiku, or (*window, channels, multiplier), as in Keras.
LAYOUTS = ("in_out", "out_in", "transposed", "depthwise")


class Grouped(NamedTuple):
    """Dimension numbers of a convolution in groups, whose channels out are split into them.

    Each group has a matrix of its own, with a shape factor of its own. A depthwise convolution
    whose channels out are more than those in has a group for each channel in.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 8)).at[..., 4:].multiply(0.01)}}
        >>> tx = dm.newton_schulz_lmo(dimension_numbers={"conv": dm.layers.Grouped(2)})
        >>> step = tx.update(params, tx.init(params))[0]["conv"]["kernel"]
        >>> first, second = jnp.linalg.norm(step.reshape(18, 2, 4), axis=(0, 2))
        >>> print(jnp.isclose(first, second, rtol=1e-2))
        True
    """

    groups: int
    layout: Literal["in_out", "out_in"] = "in_out"

    def __str__(self) -> str:
        return f"{self.groups} groups"


Layout = Literal["in_out", "out_in", "transposed", "depthwise"]


class Parts(NamedTuple):
    """Dimension numbers of a leaf in which parts of an axis are matrices of their own.

    A step is that of separate leaves, one for each part, joined: each has its own shape factor,
    adaptive radius and dual norm. (What clips a leaf before, as `mars_momentum` does, knows
    no parts.) Of a fused kernel (d, q + k + v) say `Parts(1, (q, k, v))`, of
    (d, heads + 2 · kv, size) `Parts(1, (heads, kv, kv), MuonDimensionNumbers(0, (1, 2)))`, of gate
    and up in one kernel `Parts(-1, (f, f))`; `(size,) * heads` gives each head a matrix. Where a
    mesh shards the axis of the parts itself, XLA moves them together before they are stepped.

    Args:
        axis: The axis that is cut, negative from the end; of one layer of a stack.
        sizes: The sizes of the parts, in their order.
        of: The dimension numbers that the leaf has as a whole, by default those without parts.
        groups: How often the sizes are repeated along the axis, as in a kernel that keeps
            [q … q k v] of one group of queries after the other, (8, 2, 2) in each: a part is what
            all groups have of it.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"qkv": jnp.tile(jnp.eye(4), (1, 4)).at[:, 8:].multiply(0.01)}
        >>> tx = dm.newton_schulz_lmo(dimension_numbers={"qkv": dm.layers.Parts(1, (8, 4, 4))})
        >>> step = tx.update(params, tx.init(params))[0]["qkv"]
        >>> print([round(float(jnp.linalg.norm(x, 2))) for x in jnp.split(step, (8, 12), 1)])
        [1, 1, 1]
    """

    axis: int
    sizes: tuple[int, ...]
    of: MuonDimensionNumbers | Layout | None = None
    groups: int = 1

    def __str__(self) -> str:
        sizes = " + ".join(map(str, self.sizes))
        return f"parts {sizes}" if self.groups == 1 else f"parts {self.groups} × ({sizes})"


LeafNumbers = MuonDimensionNumbers | Grouped | Parts | Layout
DimensionNumbers = LeafNumbers | Mapping[str, LeafNumbers]


def check_dimension_numbers(dimension_numbers: Any) -> None:
    """Error unless the argument is dimension numbers, a mapping to them, or None."""
    if isinstance(dimension_numbers, Mapping | None):
        return
    if not isinstance(dimension_numbers, MuonDimensionNumbers | Grouped | Parts | str):
        raise TypeError(
            "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, 'in_out', 'out_in', "
            f"or a mapping from path patterns to them, got {dimension_numbers!r}."
        )
    check_leaf_numbers("dimension_numbers", dimension_numbers)


def check_leaf_numbers(name: str, numbers: Any) -> None:
    """Error unless a value is dimension numbers of a leaf."""
    if isinstance(numbers, str):
        check_choice(name, numbers, LAYOUTS)
    elif isinstance(numbers, Grouped):
        static_int(f"{name}: groups", numbers.groups, minimum=1)
        check_choice(f"{name}: layout", numbers.layout, LAYOUTS[:2])
    elif isinstance(numbers, Parts):
        static_int(f"{name}: axis", numbers.axis, minimum=-sys.maxsize)
        static_int(f"{name}: groups", numbers.groups, minimum=1)
        if not isinstance(numbers.sizes, Sequence):
            raise TypeError(f"{name}: sizes must be a tuple of integers, got {numbers.sizes!r}.")
        for size in numbers.sizes:
            static_int(f"{name}: sizes", size, minimum=1)
        if isinstance(numbers.of, Grouped | Parts):
            raise TypeError(
                f"{name}: of must be a layout or an optax.contrib.MuonDimensionNumbers, got "
                f"{numbers.of!r}. Parts of parts, and of groups, are parts too: name all sizes."
            )
        if numbers.of is not None:
            check_leaf_numbers(f"{name}: of", numbers.of)
    elif not isinstance(numbers, MuonDimensionNumbers):
        hint = " Of a leaf that Muon is not to step, Optax's None, say its role, roles={…: 'bias'}."
        raise TypeError(
            f"{name} must be an optax.contrib.MuonDimensionNumbers, 'in_out' or 'out_in', got "
            f"{numbers!r}.{hint if numbers is None else ''}"
        )
