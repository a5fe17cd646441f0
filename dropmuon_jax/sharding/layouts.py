"""Which matrices are exchanged together on a mesh, and where they are iterated, by counted cost."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from dropmuon_jax.layers.rows import row_shape
from dropmuon_jax.orthogonalize.newton_schulz import NewtonSchulz, newton_schulz

LAYOUTS = ("auto", "owner", "rows", "replicated")

BlockSharding = tuple[tuple[str, ...], ...]
"""The axes of a mesh that shard each axis of the blocks of a leaf, (batch, *fan_in, *fan_out)."""


class Layout(NamedTuple):
    """What each axis of a mesh shares out; over the axes in neither field all is replicated."""

    owner_axes: tuple[str, ...] = ()
    """The axes that share out whole matrices: each is iterated on one device, its owner."""
    row_axes: tuple[str, ...] = ()
    """The axes that share out the longer side of every matrix: XXᵀ is summed over them."""

    @property
    def name(self) -> str:
        """The name by which users choose the layout."""
        if self.owner_axes and self.row_axes:
            return "owner, rows"
        return "owner" if self.owner_axes else "rows" if self.row_axes else "replicated"

    def starting_with(self, names: Sequence[str]) -> "Layout":
        """The layout with these axes the major ones among those that share out matrices."""
        first = tuple(name for name in names if name in self.owner_axes)
        return self._replace(owner_axes=first + tuple(n for n in self.owner_axes if n not in first))


class LayoutCost(NamedTuple):
    """The cost of one step of all matrices of a bucket, on the busiest device."""

    flops: float
    received: float
    """Bytes that come from other devices: on the way there, in the iteration, on the way back."""

    def time(self, flops_per_byte: float) -> float:
        """The time, in units of the time in which one byte arrives."""
        return self.flops / flops_per_byte + self.received


class Bucket(NamedTuple):
    """Matrices of one shape that are sharded in one way."""

    num_matrices: int
    num_rows: int
    """The shorter side."""
    num_cols: int
    itemsize: int
    has_long_axis: bool = True
    """Whether the longer side is one axis of an array; in a convolution it may be several."""
    batch_axes: tuple[str, ...] = ()
    """The axes of the mesh that shard the batch, so that they share out matrices already."""
    side_axes: tuple[str, ...] = ()
    """The axes of the mesh that shard every matrix."""
    is_known: bool = False
    """Whether the shardings are known; if not, leaves count as sharded evenly over all axes."""

    def takes_one_exchange(self, layout: Layout) -> bool:
        """Whether exactly the axes that shard the matrices share out whole ones."""
        is_exchange = bool(self.side_axes) and not self.batch_axes and not layout.row_axes
        return is_exchange and set(self.side_axes) == set(layout.owner_axes)

    def ordered(self, layout: Layout) -> Layout:
        """The layout with its axes in the order in which the fewest bytes are exchanged.

        First come the axes that share out matrices already, then the axes on which leaves are
        replicated, since cutting is free and leaves less to exchange. Where one exchange does it
        all, the axes have the order of the sides that they shard.
        """
        if self.takes_one_exchange(layout):
            return layout.starting_with(self.side_axes)
        known = (*self.batch_axes, *self.side_axes) if self.is_known else layout.owner_axes
        cut = tuple(name for name in layout.owner_axes if name not in known)
        return layout.starting_with(self.batch_axes + cut)


class LeafSharding(NamedTuple):
    """How a leaf is sharded."""

    spec: PartitionSpec
    stack_axes: tuple[str, ...] = ()
    """The axes of the mesh that shard the axis of a stack that `jax.vmap` has taken away."""

    def along(self, axis: int) -> tuple[str, ...]:
        """The axes of the mesh that shard an axis of the leaf."""
        return axis_names(self.spec[axis]) if axis < len(self.spec) else ()

    def of_layer(self, axis: int) -> "LeafSharding":
        """The sharding of one layer of a stack, without the axis of layers."""
        return LeafSharding(PartitionSpec(*row_shape(self.spec, axis)), self.along(axis))


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh in an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


class Kind(NamedTuple):
    """What is static about the blocks of a leaf, its array of shape (batch, *fan_in, *fan_out)."""

    num_in: int
    """The number of fan-in axes."""
    sharding: BlockSharding | None = None
    """None where it is not known."""
    stack_axes: tuple[str, ...] = ()
    """The axes of the mesh that shard the axis of the stack that `jax.vmap` has taken away."""


class Member(NamedTuple):
    """A leaf of a bucket."""

    leaf: int
    transposed: bool


class Group(NamedTuple):
    """Leaves whose matrices are exchanged together."""

    members: list[Member]
    sharding: BlockSharding | None
    """The sharding of each of them, once transposed."""
    bucket: Bucket
    num_in: int


def plan_buckets(
    arrays: Sequence[Any], kinds: Sequence[Kind], axes: Collection[str]
) -> list[Group]:
    """Groups leaves of one shape that are sharded in one way; the largest matrices come first.

    Args:
        arrays: The blocks of each leaf, or their shape and dtype.
        kinds: The kind of each leaf.
        axes: The axes of the mesh of more than one device.
    """
    groups: dict[tuple, list[Member]] = {}
    for leaf, (array, kind) in enumerate(zip(arrays, kinds, strict=True)):
        shape, transposed, sharding = tuple(array.shape), False, kind.sharding
        if sharding is not None:
            sharding = tuple(tuple(name for name in names if name in axes) for names in sharding)
        if len(shape) == 3:  # else the axes that are merged would have to be moved
            transposed = shape[1] > shape[2]
            if sharding is not None:
                of_batch, of_rows, of_cols = sharding
                if shape[1] == shape[2]:  # either way is right: shard the same side in all
                    transposed = of_rows > of_cols
                sharding = (of_batch, of_cols, of_rows) if transposed else sharding
            shape = (shape[0], *sorted(shape[1:]))
        # A batch that is sharded is joined with others of its size only, entry by entry.
        batch = shape[0] if sharding and sharding[0] else None
        key = (batch, shape[1:], sharding, kind.num_in, array.dtype)
        groups.setdefault(key, []).append(Member(leaf, transposed))
    planned = []
    for (_, sides, sharding, num_in, dtype), members in groups.items():
        fan_in, fan_out = math.prod(sides[:num_in]), math.prod(sides[num_in:])
        bucket = Bucket(
            num_matrices=sum(arrays[member.leaf].shape[0] for member in members),
            num_rows=min(fan_in, fan_out),
            num_cols=max(fan_in, fan_out),
            itemsize=dtype.itemsize,
            has_long_axis=len(sides) == 2,
            batch_axes=sharding[0] if sharding else (),
            side_axes=sum(sharding[1:], ()) if sharding else (),
            is_known=sharding is not None,
        )
        planned.append(Group(members, sharding, bucket, num_in))
    return sorted(planned, key=lambda group: -group.bucket.num_rows * group.bucket.num_cols)


def choose_layout(
    function: Callable[..., Any],
    bucket: Bucket,
    axes: Mapping[str, int],
    name: str,
    flops_per_byte: float,
) -> Layout:
    """The fastest layout of this name by :func:`layout_cost`; the simplest of equal ones.

    Args:
        function: What iterates the matrices.
        bucket: The matrices.
        axes: The sizes of the axes of the mesh, by name.
        name: One of `LAYOUTS`.
        flops_per_byte: Floating-point operations of a device while a byte arrives.
    """
    if name == "rows" and not bucket.has_long_axis:
        name = "owner"
    candidates = [
        layout for layout in _layouts(axes) if _is_called(name, layout, function, bucket, axes)
    ]
    return min(
        candidates or [Layout()],  # there is one device
        key=lambda layout: (
            layout_cost(function, bucket, axes, layout).time(flops_per_byte),
            len(layout.row_axes),
            len(layout.owner_axes),
        ),
    )


def layout_cost(
    function: Callable[..., Any], bucket: Bucket, axes: Mapping[str, int], layout: Layout
) -> LayoutCost:
    """Operations and bytes of the busiest device, empty places included.

    Along an axis that shards leaves and shares out something in the layout, matrices are exchanged,
    there and back. Along an axis that only shards leaves they are gathered on the way there and
    cut, which is free, on the way back; along one that only shares out, the other way round.
    """
    owners, parts = axes_size(axes, layout.owner_axes), axes_size(axes, layout.row_axes)
    held = -(-bucket.num_matrices // owners)  # the device has a part of each of these matrices
    long, short = _multiplications(function, bucket.num_rows, bucket.num_cols)
    matrix_bytes = bucket.num_rows * bucket.num_cols * bucket.itemsize
    shared = layout.owner_axes + layout.row_axes
    sharded = (*bucket.batch_axes, *bucket.side_axes) if bucket.is_known else tuple(axes)
    cut = tuple(name for name in shared if name not in sharded)
    gathered = tuple(name for name in sharded if name not in shared)
    stays = [name for name in bucket.batch_axes if name in layout.owner_axes]
    sizes = [axes[name] for name in shared if name in sharded and name not in stays]
    if bucket.takes_one_exchange(layout):
        sizes = [owners]
    has = held * owners * matrix_bytes / axes_size(axes, cut + sharded)
    exchanged = sum(has * (1 - 1 / size) for size in sizes)
    there = held * matrix_bytes / parts * (1 - 1 / axes_size(axes, gathered))
    at_rest = held * owners * matrix_bytes / axes_size(axes, sharded)
    back = at_rest * (1 - 1 / axes_size(axes, cut))
    sums = 0.0
    if parts > 1:
        segments = long / max(1, 2 * bucket.num_rows**2 * bucket.num_cols)  # 1 of an empty one
        sums = segments * held * 2 * bucket.num_rows**2 * bucket.itemsize
    return LayoutCost(2 * held * (long / parts + short), 2 * exchanged + there + back + sums)


def axes_size(axes: Mapping[str, int], names: tuple[str, ...]) -> int:
    """How many parts these axes make."""
    return math.prod(axes[name] for name in names)


def _layouts(axes: Mapping[str, int]) -> Iterator[Layout]:
    """Every layout: each axis shares out whole matrices, or longer sides, or nothing.

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


def _is_called(
    name: str,
    layout: Layout,
    function: Callable[..., Any],
    bucket: Bucket,
    axes: Mapping[str, int],
) -> bool:
    if name == "auto":
        # A Newton-Schulz iteration needs of the other parts only the sum of XXᵀ; an SVD, or a
        # function of the user's, would need the matrix.
        is_iteration = isinstance(function, NewtonSchulz)
        return not layout.row_axes or (is_iteration and bucket.has_long_axis)
    if name == "rows":
        return len(layout.row_axes) == len(axes)
    return layout.name == name


def _multiplications(function: Callable[..., Any], num_rows: int, num_cols: int) -> tuple[int, int]:
    kernel = function if isinstance(function, NewtonSchulz) else _default_kernel()
    return kernel.multiplications(num_rows, num_cols)


@functools.cache
def _default_kernel() -> NewtonSchulz:
    """The kernel whose cost stands for that of an unknown function."""
    return newton_schulz()
