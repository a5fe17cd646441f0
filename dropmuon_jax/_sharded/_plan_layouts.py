"""Which layout the matrices of a network have on a mesh, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dropmuon_jax._checks import check_choice, check_positive
from dropmuon_jax._labels import matrix_labels
from dropmuon_jax._layers import Layers, leaf_paths
from dropmuon_jax._many_matrices import (
    Bucket,
    Kind,
    axes_size,
    choose_layout,
    layout_cost,
    plan_buckets,
)
from dropmuon_jax._masks import resolve_mask
from dropmuon_jax._matrices import DimensionNumbers, matrix_axes, placement, to_blocks
from dropmuon_jax._mesh import LAYOUTS, LeafSharding
from dropmuon_jax._orthogonalize import Orthogonalize, newton_schulz
from dropmuon_jax._sharded._on_mesh import read_mesh


class ShapeLayout(NamedTuple):
    """Of the matrices that travel together: where they are iterated, and what a step costs."""

    shape: tuple[int, int]
    """The shorter side first."""
    num_matrices: int
    layout: str
    """"owner", "rows", "replicated", or "owner, rows" where axes of the mesh differ."""
    owner_axes: tuple[str, ...]
    """The axes of the mesh that share out whole matrices."""
    row_axes: tuple[str, ...]
    """Those that share out longer sides."""
    matrices_held: int
    """By the busiest device, of each the part that it has."""
    flops: float
    """Floating-point operations of the busiest device in a step."""
    bytes_received: float
    """By it, from other devices: the matrices on their way there and back, and sums of XXᵀ."""
    slowdowns: dict[str, float]
    """The time of "owner", "rows" and "replicated", as multiples of the chosen layout's."""


class LayoutPlan(tuple[ShapeLayout, ...]):
    """What :func:`plan_layouts` gives, the largest matrices first; `str()` is a table."""

    def __str__(self) -> str:
        lines = [
            ["shape", "matrices", "layout", "shared out over", "held", "GFLOP", "MB", *LAYOUTS[1:]]
        ]
        for of_shape in self:
            rows, cols = of_shape.shape
            lines.append(
                [
                    f"{rows}×{cols}",
                    str(of_shape.num_matrices),
                    of_shape.layout,
                    ", ".join(of_shape.owner_axes + of_shape.row_axes) or "-",
                    str(of_shape.matrices_held),
                    f"{of_shape.flops / 1e9:.3g}",
                    f"{of_shape.bytes_received / 1e6:.3g}",
                    *(f"{of_shape.slowdowns[kind]:.2f}" for kind in LAYOUTS[1:]),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        words = {0, 2, 3}
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def plan_layouts(
    params: optax.Params,
    mesh: Mesh | AbstractMesh | Any,
    *,
    layers: Layers | None = None,
    layer_mask: Any = None,
    layout: str = "auto",
    flops_per_byte: float = 1000.0,
    orthogonalize: Orthogonalize | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> LayoutPlan:
    """The layout of each shape of matrices on a mesh, and what it and the others would cost.

    What :func:`on_mesh` and a mesh alone do, without doing it: all of it is counted, nothing
    measured, and no device is needed. Each shape has the count of its own busiest device; what is
    left over of several goes to different ones, so that their sum is an upper bound.

    Args:
        params: The parameters, or their shapes and dtypes. Leaves that :func:`matrix_labels` does
            not call matrices are left out.
        mesh: As in :func:`on_mesh`; a `jax.sharding.AbstractMesh` of any size.
        layers: The layers, needed for stacks: of those each row has a matrix.
        layer_mask: Which layers are active, by default all.
        layout: As in :func:`on_mesh`.
        flops_per_byte: Likewise.
        orthogonalize: What iterates, by default :func:`newton_schulz`.
        dimension_numbers: As in :func:`norm_lmo`.

    Returns:
        A tuple of :class:`ShapeLayout`; `str()` is a table.

    Raises:
        TypeError: As :func:`on_mesh`.
        ValueError: As :func:`on_mesh`, and for a leaf that is no matrix.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(12)}
        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
        >>> print(dm.plan_layouts(params, mesh))
        shape      matrices  layout  shared out over  held  GFLOP  MB  owner  rows  replicated
        1024×1024        12  owner   tensor, fsdp        2   64.4  21   1.00  7.96        5.04
    """
    check_choice("layout", layout, LAYOUTS)
    check_positive("flops_per_byte", flops_per_byte)
    abstract, known = read_mesh(mesh)
    if abstract is None:
        raise TypeError("mesh must be a jax.sharding.Mesh or a tree of NamedSharding, got None.")
    axes = {name: size for name, size in dict(abstract.shape).items() if size > 1}
    kernel = orthogonalize or newton_schulz()
    matrices = _matrices(params, layers, layer_mask, dimension_numbers, known)
    arrays, kinds = zip(*matrices, strict=True) if matrices else ((), ())

    def of_shape(bucket: Bucket) -> ShapeLayout:
        layouts = {
            kind: choose_layout(kernel, bucket, axes, kind, flops_per_byte) for kind in LAYOUTS
        }
        costs = {kind: layout_cost(kernel, bucket, axes, it) for kind, it in layouts.items()}
        times = {kind: cost.time(flops_per_byte) for kind, cost in costs.items()}
        chosen = layouts[layout]
        return ShapeLayout(
            shape=(bucket.num_rows, bucket.num_cols),
            num_matrices=bucket.num_matrices,
            layout=chosen.name,
            owner_axes=chosen.whole,
            row_axes=chosen.sides,
            matrices_held=-(-bucket.num_matrices // axes_size(axes, chosen.whole)),
            flops=costs[layout].flops,
            bytes_received=costs[layout].received,
            slowdowns={kind: times[kind] / times[layout] for kind in LAYOUTS[1:]},
        )

    return LayoutPlan(of_shape(group.bucket) for group in plan_buckets(arrays, kinds, axes))


def _matrices(
    params: Any,
    layers: Layers | None,
    layer_mask: Any,
    dimension_numbers: DimensionNumbers | None,
    known: dict[str, LeafSharding],
) -> list[tuple[jax.ShapeDtypeStruct, Kind]]:
    """The matrices of all leaves: shapes (batch, *fan_in, *fan_out), and how they are sharded."""
    has_stacks = layers is not None and bool(layers.stacks)
    mask = resolve_mask(layer_mask, params, {}, takes_rows=has_stacks)
    flags = dict(zip(leaf_paths(params), jax.tree.leaves(mask), strict=True))
    rows = params if layers is None else layers.row_shapes(params)
    labels = jax.tree.leaves(matrix_labels(rows))
    matrices = jax.tree.unflatten(
        jax.tree.structure(rows),
        [
            leaf if label == "matrix" else optax.MaskedNode()
            for leaf, label in zip(jax.tree.leaves(rows), labels, strict=True)
        ],
    )
    whole = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    leaves = []
    for path, row, axes in zip(
        leaf_paths(matrices),
        jax.tree.leaves(matrices),
        matrix_axes(matrices, dimension_numbers),
        strict=True,
    ):
        stacked = np.ndim(whole[path]) > len(row.shape)
        num_rows = int(np.broadcast_to(flags[path], whole[path].shape[:stacked] or 1).sum())
        if not num_rows:
            continue
        if stacked and path in known and known[path].leading:
            num_rows = whole[path].shape[0]  # devices work on all the rows that they have
        array = jax.eval_shape(lambda leaf, axes=axes: to_blocks(leaf, axes)[0].array, row)
        array = jax.ShapeDtypeStruct(
            (num_rows * array.shape[0], *array.shape[1:]), np.promote_types(row.dtype, np.float32)
        )
        placed = None
        if path in known and stacked:
            of_row = known[path].of_row()
            of_batch, *sides = placement(axes, of_row.spec)
            placed = (of_row.rows or of_batch, *sides)
        elif path in known:
            placed = placement(axes, known[path].spec)
        leaves.append((array, Kind(len(axes.fan_in), placed)))
    return leaves
