"""Meshes, trees that are sharded over them, and a network: for eight devices and for pods."""

import collections
import contextlib
import functools
import re
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all"


def graded(table: Mapping[str, Any], *core: str) -> list[Any]:
    """The cases of a table, by name; all but those of the core are deep."""
    return [
        pytest.param(
            *(case if type(case) is tuple else (case,)),
            id=name,
            marks=() if name in core else pytest.mark.deep,
        )
        for name, case in table.items()
    ]


def make_mesh(explicit: bool = False, **sizes: int) -> Mesh:
    """A mesh over the first devices, such as `make_mesh(fsdp=4, tensor=2)`."""
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices
    )


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh set, or none."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


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


def collectives(compiled: Any) -> collections.Counter:
    """How many instructions of each kind a compiled program has."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    found = re.finditer(rf"= \(?[^=]*? ({KINDS})(?:-start)?\(", text)
    return collections.Counter(match.group(1) for match in found)


COMPILED_STEPS: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _listen(name: str, *_: Any, fun_name: str = "", **__: Any) -> None:
    if name == "/jax/core/compile/backend_compile_duration" and fun_name == "jit(train_step)":
        COMPILED_STEPS.append(fun_name)


def assert_close(result: Any, expected: Any, rounding: float) -> None:
    """Of two trees of arrays, wherever they are, the same values to rounding."""
    result, expected = jax.tree.map(np.asarray, (result, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=rounding, atol=rounding)


def assert_placed(tree: Any, placed: Any) -> None:
    """Every array of the tree lies where its sharding says."""
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


NUM_ROWS, WIDTH = 8, 16
SHAPES = {
    "stem": {"kernel": (8, WIDTH), "bias": (WIDTH,)},
    "mid": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)},
    "blocks": {"up": (NUM_ROWS, WIDTH, 2 * WIDTH), "down": (NUM_ROWS, 2 * WIDTH, WIDTH)},
    "head": {"kernel": (WIDTH, 8), "bias": (8,)},
}
SPECS = {
    "stem": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
    "mid": {"kernel": P("tensor", "fsdp"), "bias": P()},
    "blocks": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
    "head": {"kernel": P(("fsdp", "tensor")), "bias": P()},
}


class Network:
    """A residual network in the widest floating-point numbers, its layers, and what it learns.

    In float64 another order of sums, which orthogonalizing magnifies, does not show.
    """

    def __init__(self, is_stacked: bool, axis: int = 0):
        middle = "blocks" if is_stacked else "mid"
        names = ("stem", middle, "head")
        self.params = jax.tree.map(
            lambda x: x.astype(float) / 4, normal({name: SHAPES[name] for name in names})
        )
        self.specs, self.axis = {name: SPECS[name] for name in names}, axis
        if is_stacked:
            of_blocks = self.params["blocks"], self.specs["blocks"]
            self.params["blocks"] = {k: np.moveaxis(x, 0, axis) for k, x in of_blocks[0].items()}
            self.specs["blocks"] = {
                k: P(*sides[:axis], of_rows, *sides[axis:])
                for k, (of_rows, *sides) in of_blocks[1].items()
            }
        patterns = ["stem", dm.stacked("blocks", axis=axis) if is_stacked else "mid", "head"]
        self.layers = dm.layers_by_path(self.params, patterns)

    @staticmethod
    def batch(step: int = 0) -> Any:
        """Inputs of a step, the same in every process."""
        return normal((16, 8), seed=step + 1).astype(float)

    def loss(self, params: Any, batch: Any, depth: Any = 0) -> jax.Array:
        """How far the outputs are from sin(inputs); a stack's backward pass ends at the depth."""
        # On explicit axes JAX asks how a product of sharded factors is to be sharded.
        kinds = jax.typeof(params["head"]["kernel"]).sharding.mesh.axis_types or ()
        out = P() if AxisType.Explicit in kinds else None
        product = functools.partial(jnp.matmul, out_sharding=out)

        def block(x: jax.Array, row: Any) -> tuple[jax.Array, None]:
            return x + product(jnp.tanh(product(x, row["up"])), row["down"]), None

        x = product(batch, params["stem"]["kernel"]) + params["stem"]["bias"]
        if "blocks" in params:
            depth = self.layers.stack_depth(depth)
            xs, x = params["blocks"], jnp.tanh(x)
            x, _ = dm.scan_layers(block, x, xs, depth=depth, axis=self.axis)
        else:
            x = product(jnp.tanh(x), params["mid"]["kernel"]) + params["mid"]["bias"]
        x = product(jnp.tanh(x), params["head"]["kernel"]) + params["head"]["bias"]
        return jnp.mean((x - jnp.sin(batch)) ** 2)
