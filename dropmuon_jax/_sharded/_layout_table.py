"""Which layout the matrices of a network have on a mesh, and why."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dropmuon_jax._checks import check_choice, check_positive
from dropmuon_jax._labels import matrix_labels
from dropmuon_jax._layers import Layers, leaf_paths
from dropmuon_jax._matrices import DimensionNumbers, matrix_axes, placement, to_blocks
from dropmuon_jax._mesh import LAYOUTS, LeafSharding
from dropmuon_jax._orthogonalize import (
    Kind,
    LayoutCost,
    Orthogonalize,
    choose_layout,
    layout_cost,
    newton_schulz,
    plan_buckets,
)
from dropmuon_jax._sharded._on_mesh import read_mesh


def layout_table(
    params: optax.Params,
    mesh: Mesh | AbstractMesh | Any,
    *,
    layers: Layers | None = None,
    layout: str = "auto",
    flops_per_byte: float = 1000.0,
    orthogonalize: Orthogonalize | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> str:
    """The layout of each shape of matrices on a mesh, and what it and the others would cost.

    A line for each set of matrices that travel together: their shape, how many there are, the
    layout, the axes of the mesh that share them out, how many matrices the busiest device has,
    its operations and the bytes it receives in a step of all layers, and how long each layout would
    take, as a multiple of the chosen one's time. All of it is counted, not measured.

    Args:
        params: The parameters, or their shapes and dtypes. Leaves that :func:`matrix_labels` does
            not call matrices are left out.
        mesh: As in :func:`on_mesh`.
        layers: The layers, needed for stacks: of those each row has a matrix.
        layout: As in :func:`on_mesh`.
        flops_per_byte: Likewise.
        orthogonalize: What iterates, by default :func:`newton_schulz`.
        dimension_numbers: As in :func:`norm_lmo`.

    Returns:
        The table.

    Raises:
        TypeError: As :func:`on_mesh`.
        ValueError: As :func:`on_mesh`, and for a leaf that is no matrix.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(12)}
        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
        >>> print(dm.layout_table(params, mesh))
        shape      matrices  layout  shared out over  held  GFLOP    MB  owner  rows  replicated
        1024×1024        12  owner   tensor, fsdp        2   64.4  15.7   1.00  8.44        5.37
    """
    check_choice("layout", layout, LAYOUTS)
    check_positive("flops_per_byte", flops_per_byte)
    abstract, known = read_mesh(mesh)
    if abstract is None:
        raise TypeError("mesh must be a jax.sharding.Mesh or a tree of NamedSharding, got None.")
    axes = {name: size for name, size in dict(abstract.shape).items() if size > 1}
    kernel = orthogonalize or newton_schulz()
    matrices = _matrices(params, layers, dimension_numbers, known)
    header = ["shape", "matrices", "layout", "shared out over", "held", "GFLOP", "MB", *LAYOUTS[1:]]
    lines = [header]
    arrays, kinds = zip(*matrices, strict=True) if matrices else ((), ())
    for group in plan_buckets(arrays, kinds):
        bucket = group.bucket
        layouts = {
            kind: choose_layout(kernel, bucket, axes, kind, flops_per_byte) for kind in LAYOUTS
        }
        costs: dict[str, LayoutCost] = {
            kind: layout_cost(kernel, bucket, axes, chosen) for kind, chosen in layouts.items()
        }
        chosen, cost = layouts[layout], costs[layout]
        owners = int(np.prod([axes[name] for name in chosen.whole], dtype=int))
        time = cost.time(flops_per_byte)
        lines.append(
            [
                f"{bucket.num_rows}×{bucket.num_cols}",
                str(bucket.num_matrices),
                chosen.name,
                ", ".join(chosen.whole + chosen.sides) or "-",
                str(-(-bucket.num_matrices // owners)),
                f"{cost.flops / 1e9:.3g}",
                f"{cost.received / 1e6:.3g}",
                *(f"{costs[kind].time(flops_per_byte) / time:.2f}" for kind in LAYOUTS[1:]),
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


def _matrices(
    params: Any,
    layers: Layers | None,
    dimension_numbers: DimensionNumbers | None,
    known: dict[str, LeafSharding],
) -> list[tuple[jax.ShapeDtypeStruct, Kind]]:
    """The matrices of all leaves: shapes (batch, *fan_in, *fan_out), and how they are sharded."""
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
        num_rows = whole[path].shape[0] if np.ndim(whole[path]) > len(row.shape) else 1
        array = jax.eval_shape(lambda leaf, axes=axes: to_blocks(leaf, axes)[0].array, row)
        array = jax.ShapeDtypeStruct(
            (num_rows * array.shape[0], *array.shape[1:]), np.promote_types(row.dtype, np.float32)
        )
        placed = None
        if path in known and num_rows > 1:
            of_row = known[path].of_row()
            of_batch, *sides = placement(axes, of_row.spec)
            placed = (of_row.rows + of_batch, *sides)
        elif path in known:
            placed = placement(axes, known[path].spec)
        leaves.append((array, Kind(len(axes.fan_in), placed)))
    return leaves
