"""Which leaves travel together on a mesh."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax

from dropmuon_jax._many_matrices._layouts import Bucket

Placement = tuple[tuple[str, ...], ...]
"""The axes that shard each axis of an array (batch, *fan_in, *fan_out)."""


class Kind(NamedTuple):
    """What is static of :class:`Blocks`."""

    num_in: int
    placement: Placement | None


class Member(NamedTuple):
    """A leaf of a bucket."""

    leaf: int
    transposed: bool


class Group(NamedTuple):
    """Leaves that travel together."""

    members: list[Member]
    placement: Placement | None
    """Of each of them, once transposed."""
    bucket: Bucket
    num_in: int


def plan_buckets(
    arrays: Sequence[Any], kinds: Sequence[Kind], axes: Collection[str]
) -> list[Group]:
    """The leaves of one shape, sharded in one way; those of the largest matrices first.

    Args:
        arrays: Of each leaf an array (batch, *fan_in, *fan_out), or its shape and dtype.
        kinds: Of each leaf.
        axes: Of the mesh, those that share out anything.
    """
    groups: dict[tuple, list[Member]] = {}
    for leaf, (array, kind) in enumerate(zip(arrays, kinds, strict=True)):
        shape, transposed = tuple(array.shape), False
        placement = None if kind.placement is None else _among(axes, kind.placement)
        if len(shape) == 3:  # else the axes that are merged would have to be moved
            transposed = shape[1] > shape[2]
            if placement is not None:
                of_batch, of_rows, of_cols = placement
                if shape[1] == shape[2]:  # either way: for all, the same sides sharded alike
                    transposed = of_rows > of_cols
                placement = (of_batch, of_cols, of_rows) if transposed else placement
            shape = (shape[0], *sorted(shape[1:]))
        # A batch that is sharded is joined with others of its size only, entry by entry.
        batch = shape[0] if placement and placement[0] else None
        key = (batch, shape[1:], placement, kind.num_in, array.dtype)
        groups.setdefault(key, []).append(Member(leaf, transposed))
    planned = []
    for (_, sides, placement, num_in, dtype), members in groups.items():
        fan_in, fan_out = math.prod(sides[:num_in]), math.prod(sides[num_in:])
        bucket = Bucket(
            num_matrices=sum(arrays[member.leaf].shape[0] for member in members),
            num_rows=min(fan_in, fan_out),
            num_cols=max(fan_in, fan_out),
            itemsize=dtype.itemsize,
            has_sides=len(sides) == 2,
            owners=placement[0] if placement else (),
            parts=sum(placement[1:], ()) if placement else (),
            is_known=placement is not None,
        )
        planned.append(Group(members, placement, bucket, num_in))
    return sorted(planned, key=lambda group: -group.bucket.num_rows * group.bucket.num_cols)


def _among(axes: Collection[str], placement: Placement) -> Placement:
    return tuple(tuple(name for name in names if name in axes) for names in placement)


def transposed_if(condition: bool, stack: jax.Array) -> jax.Array:
    """The stack, or of each matrix the transpose."""
    return stack.mT if condition else stack
