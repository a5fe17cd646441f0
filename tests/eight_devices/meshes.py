"""Meshes, trees that are sharded over them, and steps, for the tests on eight devices."""

import collections
import contextlib
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "ragged-all-to-all",
)


def make_mesh(explicit: bool = False, **sizes: int) -> Mesh:
    """A mesh over the first devices, such as `make_mesh(fsdp=4, tensor=2)`."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices
    )


def normal(shapes: Any, seed: int = 0) -> Any:
    """Random arrays of these shapes on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Of specs, without the axes that the mesh lacks."""

    def known(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in names if name in mesh.axis_names)
        return names if len(names) > 1 else names[0] if names else None

    return jax.tree.map(
        lambda spec: NamedSharding(mesh, P(*map(known, spec))),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh set, or none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def collectives(compiled: Any) -> collections.Counter:
    """How many instructions of each kind a compiled program has."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    pattern = rf"= \(?[^=]*? ({'|'.join(KINDS)})(?:-start)?\("
    return collections.Counter(match.group(1) for match in re.finditer(pattern, text))


def assert_close(result: Any, expected: Any, rounding: float) -> None:
    """Of two trees of arrays, wherever they are, the same values to this part of the largest."""
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        largest = np.abs(b).max(initial=1)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rounding * largest, err_msg=jax.tree_util.keystr(path)
        )


def compiled_step(tx: optax.GradientTransformation, params: Any, placed: Any) -> Any:
    """One update of all leaves, compiled, with parameters and gradients sharded like this."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = params = jax.tree.map(jax.device_put, params, placed)
    state = tx.init(params)
    return jax.jit(step, out_shardings=(placed, None)).lower(params, grads, state).compile()
