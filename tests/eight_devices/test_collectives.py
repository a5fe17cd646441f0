"""What a compiled update exchanges, which is counted, and that it is the one of one device."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from meshes import assert_close, collectives, graded, make_mesh, normal, on, shardings

FSDP, BOTH, TWO_AXES = P("fsdp"), P("fsdp", "tensor"), {"fsdp": 4, "tensor": 2}


class Case(NamedTuple):
    """Gradients on a mesh, and the collectives of their update."""

    shapes: dict[str, tuple[int, ...]]
    specs: Any
    """Of each leaf, or of all."""
    expected: dict[str, int]
    axes: dict[str, int] = {"fsdp": 8}  # noqa: RUF012
    given: str = "shardings"
    """What the optimizer is told: "shardings", the "mesh", or "nothing", if a mesh is set."""
    layout: str = "owner"
    num_steps: int = 3
    numbers: Any = None
    is_stacked: bool = False
    depth: int = 0
    axis: int = 0


def matrices(count: int, *shape: int, name: str = "w") -> dict[str, tuple[int, ...]]:
    return {f"{name}{i}": shape or (16, 32) for i in range(count)}


def there_and_back(count: int = 1, **others: int) -> dict[str, int]:
    return {"all-to-all": 2 * count} | {k.replace("_", "-"): n for k, n in others.items()}


KERNEL = dm.orthogonalize.newton_schulz(num_steps=3)
# The largest entry, by which a matrix is divided first, and XXᵀ of each segment.
NUM_SUMS = 1 + KERNEL.multiplications(16, 64)[0] // (2 * 16 * 16 * 64)
SHAPES = matrices(8) | matrices(8, 16, 48, name="long") | matrices(8, 24, 32, name="high")
WIDE_AND_TALL = matrices(4) | matrices(4, 32, 16, name="tall")
TO_TALL = {name: P(None, "fsdp") if "tall" in name else FSDP for name in WIDE_AND_TALL}
PROJECTIONS = matrices(4, 16, 16) | matrices(4, 16, 16, name="out")
TO_OUT = {name: P("tensor", "fsdp") if "out" in name else BOTH for name in PROJECTIONS}
IN_PYTORCH = matrices(3) | {"conv": (16, 8, 3, 3)}
EXPERTS = ({"moe": (2, 8, 16, 32)}, P(None, "expert"), {}, {"expert": 8})
LAST_AXES = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
STACK = {"up": (8, 16, 32), "down": (8, 32, 16), "square": (8, 16, 16)}
SIDES = {"up": P(None, *BOTH), "down": P(None, "tensor", "fsdp"), "square": P(None, *BOTH)}
CASES = {
    "8 matrices, 2 steps": Case(matrices(8), FSDP, there_and_back(), num_steps=2),
    "13 matrices, unknown": Case(matrices(13), FSDP, there_and_back(), given="nothing"),
    "13 matrices, mesh given": Case(matrices(13), FSDP, there_and_back(), given="mesh"),
    "48 matrices, 12 steps": Case(matrices(48), FSDP, there_and_back(), num_steps=12),
    "each further shape takes as many": Case(SHAPES, FSDP, there_and_back(3)),
    "a shape and its transpose go together": Case(WIDE_AND_TALL, TO_TALL, there_and_back()),
    "projections go together": Case(PROJECTIONS, TO_OUT, there_and_back(), TWO_AXES),
    # If nothing is known, an exchange for each axis; one that replicates is cut on the way there.
    "two axes, unknown": Case(matrices(8), BOTH, there_and_back(2), TWO_AXES, "nothing"),
    "one axis, unknown": Case(matrices(8), FSDP, there_and_back(all_gather=1), TWO_AXES, "nothing"),
    "convolutions are not gathered": Case(
        matrices(8, 3, 3, 8, 16),
        *(P(None, None, *BOTH), there_and_back(2), TWO_AXES, "nothing"),
        numbers={"*": "in_out"},
    ),
    "fan-out first": Case(IN_PYTORCH, FSDP, there_and_back(2), numbers="out_in"),
    "layout of rows": Case(
        matrices(2, 16, 64), FSDP, there_and_back(all_reduce=NUM_SUMS), layout="rows"
    ),
    "layout of copies": Case(matrices(2), FSDP, {"all-gather": 1}, layout="replicated"),
    "batches of any size go together": Case(
        {f"w{n}": (n, 16, 32) for n in (1, 2, 5)},
        *(P(None, "fsdp"), there_and_back()),
        given="nothing",
        numbers=LAST_AXES,
    ),
    "experts stay": Case(*EXPERTS, numbers=LAST_AXES),
    "experts of stacked layers stay": Case(*EXPERTS, numbers=LAST_AXES, is_stacked=True),
    "frozen layers move no byte": Case(SHAPES, FSDP, there_and_back(), depth=16),
    "rows of a stack go at once": Case(STACK, SIDES, there_and_back(2), TWO_AXES, is_stacked=True),
    "frozen rows move no byte": Case(
        STACK, SIDES, there_and_back(2), TWO_AXES, is_stacked=True, depth=3
    ),
    "frozen rows along the last axis move no byte": Case(
        {name: (*sides, rows) for name, (rows, *sides) in STACK.items()},
        {name: P(*spec[1:], None) for name, spec in SIDES.items()},
        *(there_and_back(2), TWO_AXES),
        is_stacked=True,
        depth=3,
        axis=-1,
    ),
    "rows that devices have stay": Case(
        STACK, P(("fsdp", "tensor")), {}, TWO_AXES, is_stacked=True, depth=5
    ),
}
CORE = "13 matrices, unknown", "projections go together", "frozen rows move no byte"


def update(tx: Any, layers: dm.Layers, grads: Any, depth: Any) -> Any:
    """Updates and state of a first step."""
    return tx.update(grads, tx.init(grads), grads, layer_mask=layers.mask(depth))


@pytest.mark.parametrize("case", graded(CASES, *CORE, "frozen layers move no byte"))
def test_an_update_takes_these_exchanges_and_is_that_of_one_device(case):
    mesh, grads = make_mesh(**case.axes), normal(case.shapes)
    specs = case.specs if isinstance(case.specs, dict) else dict.fromkeys(grads, case.specs)
    placed = shardings(mesh, specs)
    stack = dm.stacked(*grads, axis=case.axis)
    layers = dm.layers_by_path(grads, [stack] if case.is_stacked else list(grads))
    tx: Any = dm.newton_schulz_lmo(num_steps=case.num_steps, dimension_numbers=case.numbers)
    if case.is_stacked:
        tx = dm.per_layer(tx, layers, takes_mask=True)
    expected, _ = jax.jit(update, static_argnums=(0, 1, 3))(tx, layers, grads, case.depth)
    given: dict[str, Any] = {"shardings": {"shardings": placed}, "mesh": {"mesh": mesh}}
    tx = dm.on_mesh(tx, **given.get(case.given, {}), layout=case.layout)
    with on(mesh if case.given == "nothing" else None):
        step = functools.partial(update, tx, layers, depth=case.depth)
        step = (
            jax.jit(step, out_shardings=(placed, None))
            .lower(jax.device_put(grads, placed))
            .compile()
        )
        assert collectives(step) == case.expected
        assert_close(step(jax.device_put(grads, placed))[0], expected, rounding=1e-4)


WAYS = {
    way: (is_traced, way.split(", ")[1])
    for is_traced, kind in ((False, "static"), (True, "traced"))
    for way in (f"{kind}, known", f"{kind}, set", f"{kind}, explicit")
}


@pytest.mark.parametrize(("is_traced", "given"), graded(WAYS, "traced, known"))
def test_layers_beside_a_stack_and_its_rows_are_those_of_one_device(is_traced, given):
    """Updates and momenta, with flags that are static or traced."""
    mesh, grads = make_mesh(given == "explicit", **TWO_AXES), normal({"stem": (16, 48), **STACK})
    placed = shardings(mesh, {"stem": BOTH, **SIDES})
    layers = dm.layers_by_path(grads, ["stem", dm.stacked(*STACK)])
    link = optax.chain(dm.momentum(0.9), dm.newton_schulz_lmo(num_steps=3))
    tx = dm.per_layer(link, layers, takes_mask=True)

    def updates(tx: Any, grads: Any) -> Any:
        step = jax.jit(update, static_argnums=(0, 1) if is_traced else (0, 1, 3))
        # All; three rows, which are not a whole number of groups of two; none but the last row.
        depths = map(jnp.int32, (0, 6, 8)) if is_traced else (0, 6, 8)
        return [step(tx, layers, grads, depth) for depth in depths]

    expected = updates(tx, grads)
    tx = dm.on_mesh(tx, shardings=placed) if given == "known" else tx
    with on(None if given == "known" else mesh):
        assert_close(updates(tx, jax.device_put(grads, placed)), expected, rounding=1e-4)


def test_without_a_mesh_nothing_changes():
    """Leaves that are sharded, and no mesh to be found: the program of one device, for XLA."""
    grads, tx = normal(matrices(2)), dm.newton_schulz_lmo()

    def text(tx: Any) -> str:
        return jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(grads).as_text()

    assert text(tx) == text(dm.on_mesh(tx))
    assert "sharding" not in text(tx)
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert "sharding" in text(tx)
