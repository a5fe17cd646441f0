"""Matrices on a mesh: their shapes, how they are sharded, and the least that a step moves."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dropmuon_jax as dm
from scale_study.settings import Arrangement, Settings


class Arranged(NamedTuple):
    """Layers of matrices, of each shape one a layer."""

    mesh: Mesh
    params: Any
    """A tree of `jax.ShapeDtypeStruct`."""
    shardings: Any
    layers: dm.Layers
    is_apart: bool
    """Whether each matrix is shared out over all devices, and not whole on one."""

    def least_bytes(self, depth: int) -> float:
        """Received by a device, on average, if each active matrix meets on one and returns.

        Of a matrix evenly spread over D devices, (D − 1)/D come to its owner from others, and as
        much goes back: 2 (D − 1)/D of all bytes, summed over devices.
        """
        devices = math.prod(self.mesh.shape.values())
        active = 1 - depth / self.layers.num_layers
        size = active * sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params)
        )
        return 2 * size * (devices - 1) / devices**2 if self.is_apart else 0.0


def is_possible(arrangement: Arrangement, num_layers: int, settings: Settings) -> bool:
    """Whether the devices can share out the rows of a stack evenly, if they are to."""
    return arrangement != "stack_axis" or num_layers % settings.devices == 0


def arrange(
    arrangement: Arrangement, num_layers: int, num_shapes: int, settings: Settings
) -> Arranged:
    """So many layers with a matrix of each shape."""
    if arrangement == "fsdp_tensor":
        sizes, names = (settings.devices // 2, 2), ("fsdp", "tensor")
    else:
        sizes, names = (settings.devices,), ("fsdp",)
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    rows, shortest = settings.rows, settings.cols
    if arrangement == "fsdp_tensor":
        shortest = rows  # as query and output projections, then MLPs
    shapes = [(rows, shortest + rows * i) for i in range(num_shapes)]
    spec = PartitionSpec(*names)
    if arrangement in ("stacked", "stack_axis"):
        spec = PartitionSpec("fsdp") if arrangement == "stack_axis" else PartitionSpec(None, "fsdp")
        leaves = {f"shape{i}": (num_layers, *shape) for i, shape in enumerate(shapes)}
        specs = {"blocks": dict.fromkeys(leaves, spec)}
        tree, prefixes = {"blocks": leaves}, [dm.stacked("blocks")]
    else:
        tree, specs = {}, {}
        for layer in range(num_layers):
            turned = arrangement == "fsdp_tensor" and layer % 2 == 1
            name, step = f"layer{layer:03}", -1 if turned else 1
            tree[name] = {f"shape{i}": shape[::step] for i, shape in enumerate(shapes)}
            specs[name] = dict.fromkeys(tree[name], PartitionSpec(*spec[::step]))
        prefixes = list(tree)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return Arranged(
        mesh,
        params,
        jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        ),
        dm.layers_by_path(params, prefixes),
        arrangement != "stack_axis",
    )
