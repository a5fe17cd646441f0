"""What is known of the mesh while an update is traced.

JAX knows the mesh (`jax.set_mesh`, or the types of the leaves where axes are explicit), and on
automatic axes nothing about how a leaf is sharded. What a user says of that is kept in a context
variable for as long as the update is traced. It decides which matrices travel together and how,
never what is computed.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from dropmuon_jax._layers import leaf_paths


class LeafSharding(NamedTuple):
    """How a leaf is sharded."""

    spec: PartitionSpec
    rows: tuple[str, ...] = ()
    """The axes that shard an axis of the leaf that `jax.vmap` has taken away."""

    @property
    def leading(self) -> tuple[str, ...]:
        """The axes that shard the first axis of the leaf."""
        return axis_names(self.spec[0]) if len(self.spec) else ()

    def of_row(self) -> "LeafSharding":
        """Of the leaf without its first axis."""
        return LeafSharding(PartitionSpec(*self.spec[1:]), self.leading)


LAYOUTS = ("auto", "owner", "rows", "replicated")


@dataclasses.dataclass(frozen=True)
class MeshScope:
    """What a user, or the types of the leaves, have said."""

    layout: str = "auto"
    """One of `LAYOUTS`."""
    flops_per_byte: float = 1000.0
    """Floating-point operations that a device does while a byte arrives from another one."""
    is_probe: bool = False
    """Whether something is only tried, on no mesh."""
    in_rows: bool = False
    """Whether `jax.vmap` of this package goes over rows of stacked layers."""
    leaves: Mapping[str, LeafSharding] = dataclasses.field(default_factory=dict)
    """How leaves are sharded, by path."""


_SCOPE: contextvars.ContextVar[MeshScope | None] = contextvars.ContextVar(
    "dropmuon_jax_mesh_scope", default=None
)


def current_scope() -> MeshScope:
    """What holds now."""
    return _SCOPE.get() or MeshScope()


@contextlib.contextmanager
def scope(**changes: Any) -> Iterator[None]:
    """Within it, these fields of the scope hold."""
    token = _SCOPE.set(dataclasses.replace(current_scope(), **changes))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def within_rows(tree: Any) -> contextlib.AbstractContextManager[None]:
    """Within it, the leaves of the tree are known without their leading axis."""
    leaves = dict(current_scope().leaves)
    for path in leaf_paths(tree):
        if path in leaves:
            leaves[path] = leaves[path].of_row()
    return scope(leaves=leaves, in_rows=True)


def as_one_row(tree: Any) -> contextlib.AbstractContextManager[None]:
    """Within it, the leaves of the tree are known with a leading axis of length 1."""
    leaves = dict(current_scope().leaves)
    for path in leaf_paths(tree):
        if path in leaves:
            leaves[path] = LeafSharding(PartitionSpec(None, *leaves[path].spec))
    return scope(leaves=leaves)


def known_shardings(tree: Any) -> list[LeafSharding | None]:
    """How each leaf is sharded; None where nobody has said it."""
    leaves = current_scope().leaves
    return [leaves.get(path) for path in leaf_paths(tree)]


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh in an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def mesh_axes() -> dict[str, int]:
    """The sizes of the mesh's automatic axes by name, in its order; of size 1 left out.

    Empty without a mesh. Axes that `jax.shard_map` has taken are the user's own and not among them;
    explicit ones become automatic in :func:`on_auto_axes`.
    """
    if current_scope().is_probe:
        return {}
    mesh = jax.sharding.get_abstract_mesh()
    kinds = mesh.axis_types or ()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, kinds, strict=True)
        if kind == AxisType.Auto and size > 1
    }
