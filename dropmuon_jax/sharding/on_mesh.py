"""`on_mesh`: an optimizer configured for a mesh, and what holds while its update is traced.

JAX knows the mesh (`jax.set_mesh`, or the types of the leaves where axes are explicit), but on
automatic axes it does not know how a leaf is sharded. What a user configures is kept in a context
variable for as long as the update is traced. It decides which matrices are exchanged together and
how, never what is computed.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from dropmuon_jax._checks import check_choice, check_positive, check_transformation, describe
from dropmuon_jax.layers.states import checked_transformation
from dropmuon_jax.layers.trees import leaf_paths, masked_paths
from dropmuon_jax.sharding.layouts import LAYOUTS, LeafSharding


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """What a user, or the types of the leaves, have configured."""

    layout: str = "auto"
    """One of `LAYOUTS`."""
    flops_per_byte: float = 1000.0
    """Floating-point operations that a device does while a byte arrives from another one."""
    in_stack: bool = False
    """Whether `jax.vmap` of this package goes over the layers of a stack."""
    leaves: Mapping[str, LeafSharding] = dataclasses.field(default_factory=dict)
    """How leaves are sharded, by path."""


_CONFIG: contextvars.ContextVar[MeshConfig | None] = contextvars.ContextVar(
    "dropmuon_jax_mesh_config", default=None
)


def current_config() -> MeshConfig:
    """The configuration that holds now."""
    return _CONFIG.get() or MeshConfig()


@contextlib.contextmanager
def configured(**changes: Any) -> Iterator[None]:
    """Within it, these fields of the configuration hold."""
    token = _CONFIG.set(dataclasses.replace(current_config(), **changes))
    try:
        yield
    finally:
        _CONFIG.reset(token)


def within_stack(axes: Mapping[str, int]) -> contextlib.AbstractContextManager[None]:
    """Within it, the leaves of these paths are known without their axis of layers."""
    known = current_config().leaves
    of_rows = {path: known[path].of_layer(axis) for path, axis in axes.items() if path in known}
    return configured(leaves={**known, **of_rows}, in_stack=True)


def mesh_axes() -> dict[str, int]:
    """The sizes of the mesh's automatic axes of more than one device, by name, in its order.

    It is empty without a mesh. Axes that `jax.shard_map` has taken are the user's own and not among
    them; explicit axes become automatic in :func:`on_auto_axes`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = mesh.axis_types or ()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, kinds, strict=True)
        if kind == AxisType.Auto and size > 1
    }


def is_on_mesh(*trees: Any) -> bool:
    """Whether a mesh is set or given, or the types of arrays have explicit axes."""
    return bool(mesh_axes()) or explicit_mesh(trees) is not None


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the first leaf whose type has explicit axes."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def on_auto_axes(
    function: Callable[..., Any], *arguments: Any, named: Any, results_like: Any
) -> Any:
    """`function(*arguments)`, in which no axis of the mesh is explicit.

    Args:
        function: A function of trees of arrays, which closes over no others.
        *arguments: Its arguments.
        named: The tree among them whose shardings are known while the function is traced.
        results_like: A tree with the structure of the results, which are sharded like its leaves.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    leaves = dict(current_config().leaves)
    for path, leaf in zip(leaf_paths(named), jax.tree.leaves(named), strict=True):
        leaves[path] = LeafSharding(jax.typeof(leaf).sharding.spec)
    results = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, results_like)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    has_mesh = bool(jax.sharding.get_abstract_mesh().axis_names)
    of_leaves = contextlib.nullcontext() if has_mesh else jax.sharding.use_abstract_mesh(mesh)
    with of_leaves, configured(leaves=leaves):
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=results)(*arguments)


def on_mesh(
    transformation: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    shardings: Any = None,
    layout: str = "auto",
    flops_per_byte: float = 1000.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs a transformation on a mesh, with its matrices shared out in a layout.

    On a mesh, an LMO that orthogonalizes exchanges the matrices of a shape together: once to where
    they are iterated, without communication in between (but in layout "rows"), and once back. That
    needs the mesh, which is the one of `jax.set_mesh` or, where axes are explicit, of the leaves'
    types: then this wrapper can be left out. It is for the rest: a mesh as an argument, how leaves
    are sharded, and a layout of your choice.

    **Shardings** are known to JAX only where axes are explicit. Given here, leaves of one shape
    that are sharded in different ways, such as query and output projections, take one exchange for
    each way, where otherwise XLA moves them one by one; and stacked layers whose axis is
    sharded stay where they are, where otherwise they are gathered. What is computed is the same
    either way.

    **Layouts** are chosen for each shape of matrices; :func:`plan_layouts` shows the choice:

    * "owner": each device has whole matrices. Those of a shape are shared out evenly, what is left
      to the devices with the least work so far;
    * "rows": each device has a part of the longer side of every matrix, and only XXᵀ is summed over
      all devices, once a segment of the iteration. It is for few, large, oblong matrices.
      (Convolutions are owned.)
    * "replicated": each device has all matrices and does all the work; it is for small ones;
    * "auto": whichever takes the least time, operations / `flops_per_byte` + bytes received, by
      counting both on the busiest device. Each axis of the mesh may share out whole matrices,
      longer sides, or nothing, so that with more devices than matrices the bytes do not grow.

    (A function of your own that `jax.jit` has traced keeps the layout of its first trace: JAX does
    not know that it depends on it. And an axis of the mesh that `jax.vmap` has taken over a sharded
    axis of explicit arrays cannot share out anything: JAX refuses.)

    Args:
        transformation: Any transformation; the mesh and the layout hold for all that is inside.
            `update` must run in `jax.jit`, with arguments on the mesh,
            `jax.device_put(params, shardings)`: otherwise XLA says that a `GlobalToLocalShape` is
            not implemented.
        mesh: The mesh, by default the one of the shardings or of `jax.set_mesh`.
        shardings: A tree of `jax.sharding.NamedSharding` with the structure of the parameters, such
            as `jax.tree.map(lambda x: x.sharding, params)`; None if they are not known.
        layout: "auto", "owner", "rows" or "replicated".
        flops_per_byte: Floating-point operations that a device does while a byte arrives, for
            "auto". The default is about the ratio of an H100 in float16 with NVLink, 4e14 over
            4.5e11, and of a TPU v5e, 2e14 over 2e11; over a slower network it is larger.

    Returns:
        The transformation, with the same state.

    Raises:
        TypeError: If `mesh` is no mesh, or a leaf of `shardings` no `NamedSharding`, naming it.
        ValueError: For an unknown layout, or shardings on another mesh; at `init`, for a leaf
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
        >>> tx = dm.on_mesh(dm.muon(0.1), shardings=shardings, layout="owner")
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
    given, leaves = read_mesh(mesh, shardings)

    def init_fn(params: optax.Params) -> optax.OptState:
        if leaves:
            _check_leaves(leaves, params)
        return transformation.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        known = {**current_config().leaves, **leaves}
        config = {"layout": layout, "flops_per_byte": float(flops_per_byte), "leaves": known}
        with _entered(given), configured(**config):
            return inner.update(updates, state, params, **extra_args)

    return checked_transformation(init_fn, update_fn)


def read_mesh(mesh: Any, shardings: Any) -> tuple[AbstractMesh | None, dict[str, LeafSharding]]:
    """The mesh that was given, by itself or by shardings, and the shardings of leaves by path."""
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {describe(mesh)}. A tree of NamedSharding is "
            "given by name, shardings=…."
        )
    given = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    if shardings is None:
        return given, {}
    known: dict[str, LeafSharding] = {}
    for path, leaf in zip(leaf_paths(shardings), jax.tree.leaves(shardings), strict=True):
        if not isinstance(leaf, NamedSharding):
            raise TypeError(
                "shardings must be a tree of jax.sharding.NamedSharding, such as "
                f"jax.tree.map(lambda x: x.sharding, params), got {describe(leaf)}"
                f"{f' at {path!r}' if path else ''}."
            )
        given = leaf.mesh.abstract_mesh if given is None else given
        if leaf.mesh.abstract_mesh != given:
            raise ValueError(
                f"shardings must be on one mesh, {dict(given.shape)}, and '{path}' is on "
                f"{dict(leaf.mesh.shape)}."
            )
        known[path] = LeafSharding(leaf.spec)
    if not known:
        raise TypeError("shardings must be a tree of jax.sharding.NamedSharding, got no leaf.")
    return given, known


def _entered(given: AbstractMesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh made the current one, where there is none."""
    now = jax.sharding.get_abstract_mesh()
    if given is None or now.shape_tuple == given.shape_tuple:
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
                "Inside an optimizer of stacked layers a leaf is one layer of its stack: put "
                "on_mesh around all of it."
            )
    unknown = sorted(set(leaves) - set(leaf_paths(params)))
    if unknown and not masked_paths(params):
        raise ValueError(
            f"on_mesh was given a sharding for '{unknown[0]}', and the parameters have no such "
            "leaf."
        )
