"""`on_mesh`: an optimizer told on which mesh it runs, and how its leaves are sharded."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dropmuon_jax._checks import check_choice, check_positive, check_transformation, describe
from dropmuon_jax._layers import leaf_paths, masked_paths
from dropmuon_jax._mesh import LAYOUTS, LeafSharding, current_scope, scope
from dropmuon_jax._sampling import LayerMaskSampler


def on_mesh(
    transformation: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh | Any = None,
    *,
    layout: str = "auto",
    flops_per_byte: float = 1000.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Tells a transformation of the mesh that it runs on, and how matrices are shared out there.

    On a mesh, what orthogonalizes matrices moves those of a shape together: once to where they are
    iterated, without any communication in between (but in layout "rows"), and once back. That needs
    the mesh, which is that of `jax.set_mesh` or, where axes are explicit, of the leaves' types:
    then this wrapper can be left out. It is for the rest: a mesh as an argument, how leaves are
    sharded, and a layout of your choice.

    **How leaves are sharded** is known to JAX only where axes are explicit. Given here, leaves of
    one shape that are sharded in different ways, such as query and output projections, travel in
    an exchange for each way, where otherwise XLA moves them one by one; and stacked layers whose
    leading axis is sharded stay where they are, where otherwise they are gathered. What is computed
    is the same either way.

    **Layouts**, for each shape of matrices on its own; :func:`plan_layouts` shows the choice:

    * "owner": each device has whole matrices. Those of a shape are shared out evenly, what is left
      to the devices with the least work so far;
    * "rows": each device has a part of the longer side of every matrix, and only XXᵀ is summed over
      all devices, once a segment of the iteration. For few, large, oblong matrices. (Convolutions
      are owned.)
    * "replicated": each device has all matrices, and does all the work: for small ones;
    * "auto": whichever takes the least time, operations / `flops_per_byte` + bytes received, by
      counting both on the busiest device. Each axis of the mesh may share out whole matrices,
      longer sides, or nothing, so that with more devices than matrices the bytes do not grow.

    (A function of your own that `jax.jit` has traced keeps the layout of its first trace: JAX does
    not know that it depends on it. And an axis of the mesh that `jax.vmap` has taken over a sharded
    axis of explicit arrays cannot share out anything: JAX refuses.)

    Args:
        transformation: Any; what is said here holds for all that is inside. `update` is to run in
            `jax.jit`, and its arguments to lie on the mesh, `jax.device_put(params, shardings)`:
            of others XLA says that a `GlobalToLocalShape` is not implemented.
        mesh: A `jax.sharding.Mesh`, or a tree of `jax.sharding.NamedSharding` with the structure of
            the parameters, which has the mesh too; None for the mesh of `jax.set_mesh`.
        layout: "auto", "owner", "rows" or "replicated".
        flops_per_byte: Floating-point operations that a device does while a byte arrives, for
            "auto". The default is about that of an H100 in float16 with NVLink, 4e14 over 4.5e11,
            and of a TPU v5e, 2e14 over 2e11; over a slower network it is larger.

    Returns:
        The transformation; a :class:`LayerMaskSampler` if it was one, with its draws.

    Raises:
        TypeError: If `mesh` is neither, naming the leaf.
        ValueError: For an unknown layout, or shardings on several meshes; at `init`, for a leaf
            without a sharding, or with a longer one than its shape; in `update`, if another mesh
            is set.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {"a": jnp.eye(2), "b": jnp.eye(2)}
        >>> shardings = {
        ...     "a": NamedSharding(mesh, PartitionSpec("fsdp", None)),
        ...     "b": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        ... }
        >>> tx = dm.on_mesh(dm.muon(0.1), shardings, layout="owner")
        >>> step = jax.jit(tx.update)
        >>> updates, _ = step(params, tx.init(params), params)
        >>> print(updates["a"].round(1))
        [[-0.1 -0. ]
         [-0.  -0.1]]
    """
    check_transformation("transformation", transformation)
    check_choice("layout", layout, LAYOUTS)
    check_positive("flops_per_byte", flops_per_byte)
    inner = optax.with_extra_args_support(transformation)
    given, leaves = read_mesh(mesh)

    def init_fn(params: optax.Params) -> optax.OptState:
        if leaves:
            _check_leaves(leaves, params)
        return transformation.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        known = {**current_scope().leaves, **leaves}
        with (
            _entered(given),
            scope(layout=layout, flops_per_byte=float(flops_per_byte), leaves=known),
        ):
            return inner.update(updates, state, params, **extra_args)

    told = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return transformation.attach_to(told) if isinstance(transformation, LayerMaskSampler) else told


def read_mesh(mesh: Any) -> tuple[AbstractMesh | None, dict[str, LeafSharding]]:
    """The mesh that was given, and the shardings of leaves by path."""
    if mesh is None:
        return None, {}
    if isinstance(mesh, Mesh | AbstractMesh):
        return (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh), {}
    leaves = jax.tree.leaves(mesh)
    known: dict[str, LeafSharding] = {}
    for path, leaf in zip(leaf_paths(mesh), leaves, strict=True):
        if not isinstance(leaf, NamedSharding):
            raise TypeError(
                "mesh must be a jax.sharding.Mesh or a tree of NamedSharding, such as "
                f"jax.tree.map(lambda x: x.sharding, params), got {describe(leaf)}"
                f"{f' at {path!r}' if path else ''}."
            )
        known[path] = LeafSharding(leaf.spec)
        if leaf.mesh.abstract_mesh != leaves[0].mesh.abstract_mesh:
            raise ValueError(
                f"mesh has shardings on several meshes: {leaf.mesh.shape} at '{path}', "
                f"{leaves[0].mesh.shape} at '{next(iter(known))}'."
            )
    if not known:
        raise TypeError("mesh must be a jax.sharding.Mesh or a tree of NamedSharding, got no leaf.")
    return leaves[0].mesh.abstract_mesh, known


def _entered(given: AbstractMesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh made the current one, where there is none."""
    now = jax.sharding.get_abstract_mesh()
    if given is None or now.shape_tuple == given.shape_tuple or current_scope().is_probe:
        return contextlib.nullcontext()
    if now.axis_names:
        raise ValueError(
            f"on_mesh was given the mesh {dict(given.shape)}, and update runs on "
            f"{dict(now.shape)}. Give it that one, or leave it out."
        )
    return jax.sharding.use_abstract_mesh(given)


def _check_leaves(leaves: dict[str, LeafSharding], params: Any) -> None:
    """Error for a leaf that is not among the shardings, or does not fit its own."""
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        if path not in leaves:
            raise ValueError(
                f"on_mesh was given no sharding for leaf '{path}': it knows "
                f"{', '.join(sorted(leaves)[:5])}, …. Make them from the same parameters, such as "
                "jax.tree.map(lambda x: x.sharding, params)."
            )
        if len(leaves[path].spec) > leaf.ndim:
            raise ValueError(
                f"on_mesh was given {leaves[path].spec} for leaf '{path}', of shape {leaf.shape}. "
                "Inside an optimizer of stacked layers leaves are rows: put on_mesh around all "
                "of it."
            )
    unknown = sorted(set(leaves) - set(leaf_paths(params)))
    if unknown and not masked_paths(params):
        raise ValueError(
            f"on_mesh was given a sharding for '{unknown[0]}', and the parameters have no such "
            "leaf."
        )
