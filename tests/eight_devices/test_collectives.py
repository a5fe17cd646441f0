"""What a compiled update exchanges between devices: counted in the program, never timed."""

from typing import Any

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import collectives, compiled_step, make_mesh, normal, shardings

import dropmuon_jax as dm

ROWS, COLS = 16, 32
FSDP = P("fsdp")


def matrices(count: int, shape: tuple[int, int] = (ROWS, COLS)) -> Any:
    return normal({f"w{i}": shape for i in range(count)})


def exchanges(tx: optax.GradientTransformation, params: Any, spec: P = FSDP, **sizes: int) -> Any:
    """The collectives of a step with all leaves sharded like this, on a mesh that is set."""
    mesh = make_mesh(**(sizes or {"fsdp": 8}))
    placed = shardings(mesh, jax.tree.map(lambda _: spec, params))
    with jax.set_mesh(mesh):
        return collectives(compiled_step(tx, params, placed))


def owned(**kwargs: Any) -> optax.GradientTransformation:
    return dm.on_mesh(dm.newton_schulz_lmo(**kwargs), layout="owner")


@pytest.mark.parametrize("count", [8, 13, 48])
def test_any_number_of_matrices_makes_one_exchange_there_and_one_back(count):
    assert exchanges(owned(), matrices(count)) == {"all-to-all": 2}


def test_the_number_of_iteration_steps_adds_none():
    few, many = (exchanges(owned(num_steps=steps), matrices(8)) for steps in (2, 12))
    assert few == many == {"all-to-all": 2}


def test_two_axes_of_a_mesh_take_an_exchange_each_if_nothing_is_known():
    two_axes = {"fsdp": 4, "tensor": 2}
    assert exchanges(owned(), matrices(8), P("fsdp", "tensor"), **two_axes) == {"all-to-all": 4}
    # Sharded over one of them and replicated over the other: cut on the way there.
    assert exchanges(owned(), matrices(8), P("fsdp"), **two_axes) == {
        "all-to-all": 2,
        "all-gather": 1,
    }


def test_each_further_shape_takes_as_many():
    shapes = [(16, 32), (16, 48), (24, 32)]
    trees = [{f"shape{i}": matrices(8, shape)} for i, shape in enumerate(shapes)]
    params: Any = {}
    for number, tree in enumerate(trees, 1):
        params |= tree
        assert exchanges(owned(), params) == {"all-to-all": 2 * number}


def test_a_shape_and_its_transpose_are_exchanged_together():
    params = {"wide": matrices(4), "tall": matrices(4, (COLS, ROWS))}
    mesh = make_mesh(fsdp=8)
    specs = {
        "wide": dict.fromkeys(params["wide"], P("fsdp")),
        "tall": dict.fromkeys(params["tall"], P(None, "fsdp")),
    }
    placed = shardings(mesh, specs)
    compiled = compiled_step(dm.on_mesh(dm.newton_schulz_lmo(), shardings=placed), params, placed)
    assert collectives(compiled) == {"all-to-all": 2}


def test_what_is_known_of_shardings_keeps_projections_together():
    """Query and output projections are sharded the other way round; one of them is transposed."""
    params = {"query": matrices(4, (16, 16)), "out": matrices(4, (16, 16))}
    mesh = make_mesh(fsdp=4, tensor=2)
    specs = {
        "query": dict.fromkeys(params["query"], P("fsdp", "tensor")),
        "out": dict.fromkeys(params["out"], P("tensor", "fsdp")),
    }
    placed = shardings(mesh, specs)
    known = compiled_step(dm.on_mesh(dm.newton_schulz_lmo(), shardings=placed), params, placed)
    assert collectives(known) == {"all-to-all": 2}
    with jax.set_mesh(mesh):
        unknown = compiled_step(dm.newton_schulz_lmo(), params, placed)
    assert collectives(unknown).total() > 4


def test_layouts_say_what_they_promise():
    params, mesh = matrices(2, (16, 64)), make_mesh(fsdp=8)
    placed = shardings(mesh, jax.tree.map(lambda _: FSDP, params))

    def of(layout: str) -> Any:
        tx = dm.on_mesh(dm.newton_schulz_lmo(), shardings=placed, layout=layout)
        return collectives(compiled_step(tx, params, placed))

    assert of("replicated") == {"all-gather": 1}
    rows = of("rows")
    segments = dm.orthogonalize.newton_schulz().multiplications(16, 64)[0] // (2 * 16 * 16 * 64)
    # The largest entry, by which a matrix is divided first, and XXᵀ of each segment.
    assert rows == {"all-to-all": 2, "all-reduce": 1 + segments}


def test_convolutions_move_without_being_gathered():
    params = {f"conv{i}": normal((3, 3, 8, 16), i) for i in range(8)}
    two_axes = {"fsdp": 4, "tensor": 2}
    spec = P(None, None, "fsdp", "tensor")
    assert exchanges(owned(), params, spec, **two_axes) == {"all-to-all": 4}


def test_optax_communicates_inside_its_iteration():
    muon = optax.contrib.muon(0.1)
    ours, optaxs = exchanges(owned(), matrices(4)), exchanges(muon, matrices(4))
    assert optaxs.total() >= 4 * ours.total()


@pytest.mark.parametrize("depth", range(3))
def test_a_frozen_layer_exchanges_nothing(depth):
    params = {name: matrices(8, (16, 16 * i)) for i, name in enumerate(["a", "b", "c"], 2)}
    layers = dm.layers_by_path(params, ["a", "b", "c"])
    mesh = make_mesh(fsdp=8)
    placed = shardings(mesh, jax.tree.map(lambda _: P("fsdp"), params))
    tx = dm.drop_muon(0.1, layers)
    masked = optax.GradientTransformationExtraArgs(
        tx.init,
        lambda grads, state, params: tx.update(grads, state, params, layer_mask=layers.mask(depth)),
    )
    with jax.set_mesh(mesh):
        compiled = compiled_step(masked, params, placed)
    assert collectives(compiled) == {"all-to-all": 2 * (3 - depth)}


def test_without_a_mesh_nothing_changes():
    """Leaves that are sharded, and no mesh to be found: the program of one device, for XLA."""
    params, mesh = matrices(2), make_mesh(fsdp=8)
    tx = dm.newton_schulz_lmo()
    unconfigured = dm.on_mesh(tx)

    def text(tx: Any) -> str:
        return jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(params).as_text()

    assert text(tx) == text(unconfigured)
    assert "sharding" not in text(tx)
    with jax.set_mesh(mesh):
        assert "sharding" in text(tx)
