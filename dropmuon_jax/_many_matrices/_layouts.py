"""Where the matrices of a bucket lie on a mesh while they are iterated, chosen by counted cost."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dropmuon_jax._orthogonalize import NewtonSchulz, newton_schulz


class Layout(NamedTuple):
    """Which axes of a mesh share out what; over the others everything is replicated."""

    whole: tuple[str, ...] = ()
    """Whole matrices: no device needs another one during the iteration."""
    sides: tuple[str, ...] = ()
    """The longer side of every matrix: XXᵀ is summed over these axes once a segment."""

    @property
    def name(self) -> str:
        """As users choose it."""
        if self.whole and self.sides:
            return "owner, rows"
        return "owner" if self.whole else "rows" if self.sides else "replicated"

    def starting_with(self, names: Sequence[str]) -> "Layout":
        """With these axes the major ones among those that share out whole matrices."""
        first = tuple(name for name in names if name in self.whole)
        return self._replace(whole=first + tuple(n for n in self.whole if n not in first))


class LayoutCost(NamedTuple):
    """Of one step of all matrices of a bucket, on the busiest device."""

    flops: float
    received: float
    """Bytes from other devices: there, during the iteration, and back."""

    def time(self, flops_per_byte: float) -> float:
        """In the time in which one byte arrives."""
        return self.flops / flops_per_byte + self.received


class Bucket(NamedTuple):
    """Matrices of one shape."""

    num_matrices: int
    num_rows: int
    """The shorter side."""
    num_cols: int
    itemsize: int
    has_sides: bool = True
    """Whether their longer side is one axis of an array; of a convolution it is several."""
    owners: tuple[str, ...] = ()
    """The axes that share out whole matrices already, where leaves are at rest."""
    parts: tuple[str, ...] = ()
    """The axes that shard every matrix at rest, where that is known: an exchange takes them all."""


def choose_layout(
    function: Callable[..., Any],
    bucket: Bucket,
    axes: Mapping[str, int],
    kind: str,
    flops_per_byte: float,
) -> Layout:
    """The fastest of the layouts of a kind by :func:`layout_cost`; of equal ones the simplest."""
    if kind == "rows" and not bucket.has_sides:
        kind = "owner"
    candidates = [
        layout for layout in _layouts(axes) if _is_of(kind, layout, function, bucket, axes)
    ]
    return min(
        candidates or [Layout()],  # of one device
        key=lambda layout: (
            layout_cost(function, bucket, axes, layout).time(flops_per_byte),
            len(layout.sides),
            len(layout.whole),
        ),
    )


def layout_cost(
    function: Callable[..., Any], bucket: Bucket, axes: Mapping[str, int], layout: Layout
) -> LayoutCost:
    """Operations and bytes of the busiest device.

    A matrix that comes to be owned leaves each device's part of it and returns to it. Leaves are
    taken to be sharded evenly over all axes, except those whose matrices are owned already.
    """
    owners, parts = axes_size(axes, layout.whole), axes_size(axes, layout.sides)
    devices = axes_size(axes, tuple(axes))
    held = -(-bucket.num_matrices // owners)  # matrices, of which the device has a part each
    long, short = _multiplications(function, bucket.num_rows, bucket.num_cols)
    matrix_bytes = bucket.num_rows * bucket.num_cols * bucket.itemsize
    # An exchange moves all but a part of what a device has, empty places included.
    has = held * owners * matrix_bytes / devices
    at_once = bucket.parts and set(bucket.parts) == set(layout.whole) and parts == 1
    sizes = [owners] if at_once else [axes[name] for name in layout.whole + layout.sides]
    exchanged = sum(has * (1 - 1 / size) for size in sizes)
    # Then what the other axes shard is gathered; on the way back it is cut, for nothing.
    gathered = held * matrix_bytes / parts * (1 - owners * parts / devices)
    there, back = exchanged + gathered, exchanged
    if bucket.owners and set(bucket.owners) == set(layout.whole) and parts == 1:
        there = back = 0
    sums = 0.0
    if parts > 1:
        segments = long / (2 * bucket.num_rows**2 * bucket.num_cols)
        sums = segments * held * 2 * bucket.num_rows**2 * bucket.itemsize
    return LayoutCost(2 * held * (long / parts + short), there + back + sums)


def axes_size(axes: Mapping[str, int], names: tuple[str, ...]) -> int:
    """How many parts these axes make."""
    return math.prod(axes[name] for name in names)


def _layouts(axes: Mapping[str, int]) -> Iterator[Layout]:
    """Every axis shares out whole matrices, or sides, or nothing.

    The last axis of the mesh comes first: where two axes shard one dimension of a leaf, it is the
    minor one, and XLA moves that without the other.
    """
    names = tuple(reversed(tuple(axes)))
    for uses in itertools.product(range(3), repeat=len(names)):
        used = list(zip(names, uses, strict=True))
        yield Layout(
            tuple(name for name, use in used if use == 1),
            tuple(name for name, use in used if use == 2),
        )


def _is_of(
    kind: str,
    layout: Layout,
    function: Callable[..., Any],
    bucket: Bucket,
    axes: Mapping[str, int],
) -> bool:
    if kind == "auto":
        # Sums of XXᵀ are all that a Newton-Schulz iteration needs of the others; an SVD, or a
        # function of the user's, would need the matrix.
        return not layout.sides or (isinstance(function, NewtonSchulz) and bucket.has_sides)
    if kind == "rows":
        return len(layout.sides) == len(axes)
    return layout.name == kind


def _multiplications(function: Callable[..., Any], num_rows: int, num_cols: int) -> tuple[int, int]:
    kernel = function if isinstance(function, NewtonSchulz) else _default_kernel()
    return kernel.multiplications(num_rows, num_cols)


@functools.cache
def _default_kernel() -> NewtonSchulz:
    """What stands for the cost of a function that is not known."""
    return newton_schulz()
