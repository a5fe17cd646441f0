"""Which device iterates which matrix: shared out evenly, in the layout that counts least."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dropmuon_jax as dm
from dropmuon_jax.sharding.exchange import Owners

MESHES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@settings(max_examples=30, deadline=None)
@given(
    axes=st.sampled_from(MESHES),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    data=st.data(),
)
def test_each_matrix_has_one_owner_and_all_owners_as_much_work_as_can_be(axes, counts, data):
    owners = Owners(axes)
    costs = sorted((data.draw(st.integers(1, 9)) for _ in counts), reverse=True)
    names = data.draw(st.permutations(list(axes)))
    for count, cost in zip(counts, costs, strict=True):
        matrices, filled = owners.share_out(count, cost, tuple(names))
        rows = zip(matrices.tolist(), filled, strict=True)
        held = [row if is_full else row[:-1] for row, is_full in rows]
        assert sorted(itertools.chain(*held)) == list(range(count))
        assert matrices.shape == (8, -(-count // 8))
    work = owners._work
    assert work.sum() == pytest.approx(np.dot(counts, costs))
    # Equal but for what one matrix is: no device could give one away and be better off.
    assert work.max() - work.min() <= max(costs)


def test_what_is_left_of_one_shape_goes_where_another_left_least():
    owners = Owners({"fsdp": 8})
    _, first = owners.share_out(3, 2.0, ("fsdp",))
    _, second = owners.share_out(5, 1.0, ("fsdp",))
    assert not (first & second).any()
    assert owners._work.max() == 2.0


def test_owners_on_one_axis_of_two_have_the_work_on_all_devices_of_the_other():
    owners = Owners({"fsdp": 4, "tensor": 2})
    owners.share_out(2, 1.0, ("tensor",))
    np.testing.assert_array_equal(owners._work, np.ones((4, 2)))
    owners.share_out(1, 1.0, ("tensor", "fsdp"))
    assert owners._work.sum() == 9


def planned(params, mesh=None, **options):
    """The plan of parameters whose matrices are all of one shape."""
    (plan,) = dm.sharding.plan_layouts(params, mesh, **options)
    return plan


def shapes(**sizes: tuple[int, tuple[int, int]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        f"{name}{i}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, (count, shape) in sizes.items()
        for i in range(count)
    }


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("axes", MESHES)
def test_an_empty_matrix_costs_nothing_in_any_layout(axes, shape):
    plan = planned(shapes(w=(1, shape)), AbstractMesh(tuple(axes.values()), tuple(axes)))
    assert (plan.flops, plan.bytes_received) == (0, 0)
    assert set(plan.slowdowns.values()) == {1.0}


def test_whole_matrices_are_owned_where_there_are_enough():
    plan = planned(shapes(w=(48, (1024, 1024))), AbstractMesh((8,), ("fsdp",)))
    assert (plan.layout, plan.owner_axes, plan.matrices_held) == ("owner", ("fsdp",), 6)
    # Each matrix leaves and returns once: 7/8 of what a device will hold comes from elsewhere.
    assert plan.bytes_received == 2 * 7 / 8 * 6 * 1024**2 * 4
    assert plan.slowdowns["owner"] == 1 <= min(plan.slowdowns.values())


def test_two_axes_take_an_exchange_each_unless_it_is_known_what_they_shard():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    params = shapes(w=(48, (1024, 1024)))
    plan = planned(params, mesh)
    assert plan.owner_axes == ("tensor", "fsdp")
    assert plan.bytes_received == 2 * (3 / 4 + 1 / 2) * 6 * 1024**2 * 4
    placed = dict.fromkeys(params, NamedSharding(mesh, P("fsdp", "tensor")))
    plan = planned(params, shardings=placed)
    assert plan.bytes_received == 2 * 7 / 8 * 6 * 1024**2 * 4


def test_bytes_follow_from_what_is_known_of_the_shardings():
    """Of 8 matrices of 2 KiB, counted in compiled programs by a reviewer."""
    params = shapes(w=(8, (16, 32)))

    def received(spec: P, layout: str, **sizes: int) -> float:
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        placed = dict.fromkeys(params, NamedSharding(mesh, spec))
        return planned(params, shardings=placed, layout=layout).bytes_received

    assert received(P(), "owner", data=8) == 7 / 8 * 8 * 2048
    assert received(P(), "replicated", data=8) == 0
    assert received(P("fsdp"), "owner", fsdp=8) == 2 * 7 / 8 * 2048
    # Cut over `data` for nothing, exchanged over `fsdp` there and back, gathered over `data`.
    assert received(P("fsdp"), "owner", data=2, fsdp=4) == 2 * 3 / 4 * 2048 + 1 / 2 * 4096


def test_with_more_devices_than_matrices_bytes_do_not_grow():
    params = shapes(w=(8, (1024, 1024)))
    few, many = (planned(params, AbstractMesh((n, 8), ("data", "fsdp"))) for n in (1, 64))
    assert many.flops == few.flops
    assert many.bytes_received <= few.bytes_received * 8 / 7


def test_one_large_oblong_matrix_is_cut_along_its_longer_side_unless_for_an_svd():
    params, mesh = shapes(head=(1, (768, 50257))), AbstractMesh((8,), ("fsdp",))
    plan = planned(params, mesh)
    assert (plan.layout, plan.row_axes) == ("rows", ("fsdp",))
    assert plan.slowdowns["owner"] > 3
    assert planned(params, mesh, orthogonalize=lambda x: x).layout == "replicated"


def test_a_slow_network_replicates_a_small_matrix():
    params, mesh = shapes(w=(1, (16, 16))), AbstractMesh((8,), ("fsdp",))
    fast, slow = (planned(params, mesh, flops_per_byte=flops) for flops in (1.0, 1e9))
    assert slow.layout == "replicated" != fast.layout


@pytest.mark.parametrize("flops_per_byte", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("layout", ["auto", "owner", "rows", "replicated"])
def test_the_automatic_layout_is_never_slower_by_its_own_count(layout, flops_per_byte):
    params = shapes(a=(3, (256, 256)), b=(9, (256, 1024)), c=(1, (64, 8000)))
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    for of_shape in dm.sharding.plan_layouts(params, mesh, flops_per_byte=flops_per_byte):
        assert of_shape.slowdowns.get(layout, 1.0) >= 1 - 1e-12


@pytest.mark.parametrize("layout", ["auto", "owner", "rows", "replicated"])
def test_one_device_has_everything(layout):
    mesh = AbstractMesh((1, 1), ("data", "fsdp"))
    plan = planned(shapes(w=(3, (64, 64))), mesh, layout=layout)
    assert (plan.layout, plan.matrices_held, plan.bytes_received) == ("replicated", 3, 0)


def test_masks_stacks_and_shardings_are_planned_as_they_will_run():
    stack = jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)
    params = {"blocks": {"query": stack, "out": stack}, "bias": jax.ShapeDtypeStruct((4,), "f4")}
    layers = dm.layers_by_path(params, [dm.stacked("blocks"), "bias"])
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    specs = {"query": P(None, "fsdp", "tensor"), "out": P(None, "tensor", "fsdp")}
    placed = {
        "blocks": {name: NamedSharding(mesh, spec) for name, spec in specs.items()},
        "bias": NamedSharding(mesh, P()),
    }
    known = {"shardings": placed, "layers": layers}
    assert planned(params, **known).num_matrices == 24  # one of them is transposed
    assert planned(params, **known, layer_mask=layers.mask(9)).num_matrices == 6
    assert not dm.sharding.plan_layouts(params, **known, layer_mask=layers.mask(12))
    rows = jax.tree.map(lambda _: NamedSharding(mesh, P(("fsdp", "tensor"))), placed["blocks"])
    plan = planned(params, shardings=placed | {"blocks": rows}, layers=layers)
    assert (plan.layout, plan.bytes_received) == ("owner", 0)


def test_part_of_a_tree_may_know_the_shardings_of_the_whole():
    """Inside chain_subtrees a transformation sees some leaves, and the shardings are of all."""
    params = {"stem": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    shardings = dict.fromkeys(params, NamedSharding(mesh, P()))
    on_mesh = dm.on_mesh(dm.newton_schulz_lmo(), shardings=shardings)
    transforms = {"stem": on_mesh, "head": optax.identity()}
    tx = dm.chain_subtrees(transforms, {name: name for name in params})
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["head"], params["head"])
