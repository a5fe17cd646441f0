"""Where matrices and optimizer states lie on a mesh: layouts explained, and shardings of states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from dropmuon_jax._checks import check_choice, check_positive, check_transformation, describe
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.matrices import MatrixAxes, matrix_axes, parts_of
from dropmuon_jax.layers.roles import Roles, matrix_labels
from dropmuon_jax.layers.trees import leaf_paths, resolve_mask
from dropmuon_jax.orthogonalize.batches import Orthogonalize
from dropmuon_jax.orthogonalize.newton_schulz import newton_schulz
from dropmuon_jax.sharding.exchange import block_sharding, to_blocks
from dropmuon_jax.sharding.layouts import (
    LAYOUTS,
    Bucket,
    Kind,
    LeafSharding,
    axes_size,
    choose_layout,
    layout_cost,
    plan_buckets,
)
from dropmuon_jax.sharding.map_on_mesh import sharding_of_part
from dropmuon_jax.sharding.on_mesh import read_mesh


class ShapeLayout(NamedTuple):
    """Where matrices that are exchanged together are iterated, and what a step of them costs."""

    shape: tuple[int, int]
    """The shorter side first."""
    num_matrices: int
    layout: str
    """"owner", "rows", "replicated", or "owner, rows" where axes of the mesh differ."""
    owner_axes: tuple[str, ...]
    """The axes of the mesh that share out whole matrices."""
    row_axes: tuple[str, ...]
    """The axes of the mesh that share out longer sides."""
    matrices_held: int
    """The number of matrices of which the busiest device has its part, or all of it."""
    flops: float
    """Floating-point operations of the busiest device in a step."""
    bytes_received: float
    """Bytes that it receives from other devices: matrices, there and back, and sums of XXᵀ."""
    slowdowns: dict[str, float]
    """The time of "owner", "rows" and "replicated", as multiples of the chosen layout's."""


class LayoutPlan(tuple[ShapeLayout, ...]):
    """What :func:`plan_layouts` returns, the largest matrices first; `str()` is a table."""

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
                    *(f"{of_shape.slowdowns[name]:.2f}" for name in LAYOUTS[1:]),
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
    mesh: Mesh | AbstractMesh | None = None,
    *,
    shardings: Any = None,
    layers: Layers | None = None,
    layer_mask: Any = None,
    layout: str = "auto",
    flops_per_byte: float = 1000.0,
    orthogonalize: Orthogonalize | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    roles: Roles | Mapping[str, str] | None = None,
) -> LayoutPlan:
    """The layout of each shape of matrices on a mesh, and what it and the others would cost.

    It says what an optimizer does on a mesh, without doing it: all of it is counted, nothing
    measured, and no device is needed. Each shape has the count of its own busiest device; what is
    left over of several goes to different ones, so that their sum is an upper bound.

    Args:
        params: The parameters, or their shapes and dtypes. Leaves that :func:`matrix_labels` does
            not call matrices are left out.
        mesh: A mesh, such as a `jax.sharding.AbstractMesh` of any size; by default the mesh of the
            shardings.
        shardings: A tree of `jax.sharding.NamedSharding` with the structure of the parameters; None
            if they are not known.
        layers: The layers, needed for stacks: each layer of a stack has a matrix.
        layer_mask: Which layers are active, by default all.
        layout: The layout that :func:`on_mesh` would be given.
        flops_per_byte: Floating-point operations that a device does while a byte arrives.
        orthogonalize: The function of matrices, by default :func:`newton_schulz`.
        dimension_numbers: Which axes are fan-in and which fan-out, as :func:`norm_lmo` takes them.
        roles: Roles of leaves where paths and shapes do not tell, as :func:`matrix_labels` takes
            them.

    Returns:
        A tuple of :class:`ShapeLayout`; `str()` is a table.

    Raises:
        TypeError: If neither a mesh nor shardings are given, or something else in their place.
        ValueError: For an unknown layout, shardings on another mesh, a mask that does not fit, and
            a leaf that is no matrix.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for i in range(12)}
        >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
        >>> print(dm.sharding.plan_layouts(params, mesh))
        shape      matrices  layout  shared out over  held  GFLOP  MB  owner  rows  replicated
        1024×1024        12  owner   tensor, fsdp        2   64.4  21   1.00  7.96        5.04
    """
    check_choice("layout", layout, LAYOUTS)
    check_positive("flops_per_byte", flops_per_byte)
    abstract, known = read_mesh(mesh, shardings)
    if abstract is None:
        raise TypeError("mesh must be a jax.sharding.Mesh, got None: give mesh or shardings.")
    axes = {name: size for name, size in dict(abstract.shape).items() if size > 1}
    kernel = orthogonalize or newton_schulz()
    of_layer = params if layers is None else layers.row_shapes(params)
    labels = matrix_labels(of_layer, dimension_numbers, roles)
    of_layer = jax.tree.map(
        lambda leaf, label: leaf if label == "matrix" else optax.MaskedNode(), of_layer, labels
    )
    mask = resolve_mask(layer_mask, params, takes_rows=layers is not None and bool(layers.stacks))
    matrices = _matrices(params, of_layer, layers, mask, dimension_numbers, known)
    arrays, kinds = zip(*matrices, strict=True) if matrices else ((), ())

    def of_shape(bucket: Bucket) -> ShapeLayout:
        layouts = {
            name: choose_layout(kernel, bucket, axes, name, flops_per_byte) for name in LAYOUTS
        }
        costs = {name: layout_cost(kernel, bucket, axes, it) for name, it in layouts.items()}
        # An empty matrix takes no time in any layout.
        times = {name: max(1e-30, cost.time(flops_per_byte)) for name, cost in costs.items()}
        chosen = layouts[layout]
        return ShapeLayout(
            shape=(bucket.num_rows, bucket.num_cols),
            num_matrices=bucket.num_matrices,
            layout=chosen.name,
            owner_axes=chosen.owner_axes,
            row_axes=chosen.row_axes,
            matrices_held=-(-bucket.num_matrices // axes_size(axes, chosen.owner_axes)),
            flops=costs[layout].flops,
            bytes_received=costs[layout].received,
            slowdowns={name: times[name] / times[layout] for name in LAYOUTS[1:]},
        )

    return LayoutPlan(of_shape(group.bucket) for group in plan_buckets(arrays, kinds, axes))


def _matrices(
    params: Any,
    of_layer: Any,
    layers: Layers | None,
    layer_mask: Any,
    dimension_numbers: DimensionNumbers | None,
    known: dict[str, LeafSharding],
) -> list[tuple[jax.ShapeDtypeStruct, Kind]]:
    """The active matrices of each leaf: the shape and dtype of its blocks, and their kind.

    The leaves of `of_layer` are the matrices; those of stacks are without their axis of layers.
    """
    row_axes = {}
    if layers is not None:
        row_axes = dict(zip(leaf_paths(params), layers.row_axes_of(params), strict=True))
    flags = dict(zip(leaf_paths(params), jax.tree.leaves(layer_mask), strict=True))
    whole = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    leaves = []
    all_axes = matrix_axes(of_layer, dimension_numbers)
    for axes, leaf in zip(all_axes, jax.tree.leaves(of_layer), strict=True):
        row_axis, sharding = row_axes.get(axes.path), known.get(axes.path)
        num_rows = 1 if row_axis is None else np.shape(whole[axes.path])[row_axis]
        num_active = int(np.broadcast_to(np.ravel(flags[axes.path]), num_rows).sum())
        if not num_active:
            continue
        if row_axis is not None and sharding and sharding.along(row_axis):
            num_active = num_rows  # devices work on all the layers that they have
        of_leaf = sharding.of_layer(row_axis) if row_axis is not None and sharding else sharding
        known_part, placed = sharding_of_part(of_leaf, axes.of_part), None
        if known_part:
            of_batch, *sides = block_sharding(axes.of_part, known_part.spec)
            placed = (known_part.stack_axes or of_batch, *sides)

        def blocks(leaf: jax.Array, axes: MatrixAxes = axes) -> list[jax.Array]:
            return [to_blocks(part, axes.of_part)[0] for part in parts_of(leaf, axes)]

        kind, dtype = Kind(len(axes.of_part.fan_in), placed), np.promote_types(leaf.dtype, "f4")
        for x in jax.eval_shape(blocks, leaf):
            shape = (num_active * x.shape[0], *x.shape[1:])
            leaves.append((jax.ShapeDtypeStruct(shape, dtype), kind))
    return leaves


def state_shardings(
    transformation: optax.GradientTransformation, params: optax.Params, shardings: Any = None
) -> Any:
    """The `NamedSharding` of each leaf of an optimizer's state, for `jax.jit` and orbax.

    A leaf of the state whose path ends with the path of a parameter, and that has its shape, such
    as a momentum, is sharded as that parameter; everything else, such as counts, is replicated.
    Nothing is computed: parameters may be `jax.ShapeDtypeStruct`, as `jax.eval_shape` gives them.

    Args:
        transformation: Any transformation, also one of Optax.
        params: The parameters; None in the place of a leaf has no sharding.
        shardings: A tree of `NamedSharding` with the structure of the parameters, by default their
            own `.sharding`.

    Returns:
        A tree of `NamedSharding` with the structure of `transformation.init(params)`.

    Raises:
        TypeError: If a parameter, or a leaf of `shardings`, has no `NamedSharding`, naming it.
        ValueError: If `shardings` has another structure than the parameters, or a leaf of it more
            axes than its parameter.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))}
        >>> tx = dm.momentum(0.9)
        >>> placed = dm.state_shardings(tx, params, shardings)
        >>> placed.momentum["kernel"].spec == PartitionSpec("fsdp")
        True
        >>> init = jax.jit(tx.init, out_shardings=placed)
    """
    check_transformation("transformation", transformation)
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    found: list[Any] = [getattr(leaf, "sharding", None) for leaf in leaves]
    if shardings is not None:
        found, given = jax.tree.leaves(shardings), leaf_paths(shardings)
        if given != paths:
            raise ValueError(
                f"shardings has {len(given)} leaves and the parameters {len(paths)}; they differ "
                f"in {sorted(set(given) ^ set(paths))[:3]}. Give a tree of NamedSharding with the "
                "structure of the parameters."
            )
    for path, leaf, sharding in zip(paths, leaves, found, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"The sharding of '{path}' must be a NamedSharding, got {describe(sharding)}. Put "
                "the parameters on the mesh, jax.device_put(params, shardings), or give shardings."
            )
        if len(sharding.spec) > np.ndim(leaf):
            raise ValueError(
                f"'{path}' has shape {np.shape(leaf)}, and its sharding {sharding.spec}."
            )
    keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    of_param = {
        (key, np.shape(leaf)): sharding
        for key, leaf, sharding in zip(keys, leaves, found, strict=True)
    }
    replicated = NamedSharding(found[0].mesh, PartitionSpec()) if found else None

    def of_leaf(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
        for start in range(len(path) + 1):  # the longest path first
            sharding = of_param.get((path[start:], leaf.shape))
            if sharding is not None:
                return sharding
        return replicated

    state = jax.eval_shape(transformation.init, params)
    return jax.tree_util.tree_map_with_path(of_leaf, state)
