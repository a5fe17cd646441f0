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
    is_known: bool = False
    """Whether it is known; else leaves are taken to be sharded evenly over all axes."""

    def takes_one_exchange(self, layout: Layout) -> bool:
        """Whether exactly the axes that shard the matrices share out whole ones."""
        shards = bool(self.parts) and not self.owners and not layout.sides
        return shards and set(self.parts) == set(layout.whole)

    def ordered(self, layout: Layout) -> Layout:
        """The layout with its axes in the order in which least is moved.

        Those that share out matrices already; those that leaves are whole on, since cutting is for
        nothing and leaves less to exchange; and of one exchange all in the order of the sides.
        """
        if self.takes_one_exchange(layout):
            return layout.starting_with(self.parts)
        known = (*self.owners, *self.parts) if self.is_known else layout.whole
        cut = tuple(name for name in layout.whole if name not in known)
        return layout.starting_with(self.owners + cut)


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
    """Operations and bytes of the busiest device, empty places included.

    Along an axis that shards leaves and shares out something in the layout, matrices are exchanged,
    there and back. What other axes shard is gathered on the way there and cut, for nothing, on the
    way back; what leaves have whole is cut on the way there and gathered on the way back.
    """
    owners, parts = axes_size(axes, layout.whole), axes_size(axes, layout.sides)
    held = -(-bucket.num_matrices // owners)  # matrices, of which the device has a part each
    long, short = _multiplications(function, bucket.num_rows, bucket.num_cols)
    matrix_bytes = bucket.num_rows * bucket.num_cols * bucket.itemsize
    shared = layout.whole + layout.sides
    sharded = (*bucket.owners, *bucket.parts) if bucket.is_known else tuple(axes)
    cut = tuple(name for name in shared if name not in sharded)
    gathered = tuple(name for name in sharded if name not in shared)
    moved = [n for n in shared if n in sharded and not (n in bucket.owners and n in layout.whole)]
    sizes = [axes[name] for name in moved]
    if bucket.takes_one_exchange(layout):
        sizes = [owners]
    has = held * owners * matrix_bytes / axes_size(axes, cut + sharded)
    exchanged = sum(has * (1 - 1 / size) for size in sizes)
    there = held * matrix_bytes / parts * (1 - 1 / axes_size(axes, gathered))
    at_rest = held * owners * matrix_bytes / axes_size(axes, sharded)
    back = at_rest * (1 - 1 / axes_size(axes, cut))
    sums = 0.0
    if parts > 1:
        segments = long / (2 * bucket.num_rows**2 * bucket.num_cols)
        sums = segments * held * 2 * bucket.num_rows**2 * bucket.itemsize
    return LayoutCost(2 * held * (long / parts + short), 2 * exchanged + there + back + sums)


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
