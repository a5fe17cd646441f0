"""Parts of an axis are matrices of their own: a step is that of separate leaves, joined."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Axes

import dropmuon_jax as dm
from dropmuon_jax.layers import Parts

EXACT = {"orthogonalize": dm.orthogonalize.svd_polar_factor}
# A shape, and the parts of one of its axes.
CASES = {
    "queries in groups": ((6, 12), Parts(1, (6, 3, 3))),
    "gate and up": ((3, 10), Parts(-1, (5, 5))),
    "as PyTorch keeps it": ((12, 5), Parts(0, (6, 4, 2), "out_in")),
    "group by group": ((5, 18), Parts(1, (4, 1, 1), groups=3)),
    "group by group, as Megatron keeps it": ((20, 6), Parts(-2, (4, 4, 1, 1), "out_in", 2)),
    "heads": ((4, 8, 3), Parts(1, (4, 2, 2), Axes(0, (1, 2)))),
    "three axes out": ((4, 3, 2, 3), Parts(1, (1, 1, 1), Axes(0, (1, 2, 3)))),
    "groups with an axis": ((4, 2, 5, 3), Parts(2, (3, 1, 1), Axes(0, (1, 2, 3)))),
    "an axis in": ((2, 6, 5), Parts(1, (4, 2), Axes((0, 1), 2))),
    "experts": ((3, 4, 10), Parts(2, (6, 4), Axes(1, 2))),
    "a convolution": ((3, 3, 2, 7), Parts(3, (3, 4), "in_out")),
    "one part": ((3, 4), Parts(0, (3,))),
    "heads one by one": ((6, 12), Parts(1, (2,) * 4 + (4,))),
}


def of_parts(leaf, axis, parts):
    """The parts of a leaf by name, and the function that joins them."""
    places = np.arange(leaf.shape[axis]).reshape(parts.groups, -1)
    places = [x.ravel() for x in np.split(places, np.cumsum(parts.sizes)[:-1], 1)]
    apart = {f"part_{i}": jnp.take(leaf, x, axis) for i, x in enumerate(places)}

    def join(apart):
        back = np.argsort(np.concatenate(places))
        return jnp.take(jnp.concatenate(list(apart.values()), axis), back, axis)

    return apart, join


NORMS, RADIUS = dm.norms, dm.schedules.adaptive_radius(2.0, 0.5)


def transformations(numbers):
    """Of all kinds, of hidden matrices that have these dimension numbers."""
    for factor in ("muon", "moonlight", "scion"):
        norm = NORMS.spectral_norm(factor, **EXACT)
        yield dm.norm_lmo(norm, RADIUS, dimension_numbers=numbers)
    for norm in (NORMS.sign_norm(), NORMS.column_norm(), NORMS.row_norm()):
        yield dm.transforms.norm_sharp(norm, 0.3, dimension_numbers=numbers)
    yield dm.newton_schulz_lmo(0.3, memory_limit=3000, num_steps=2, dimension_numbers=numbers)
    of = {"roles": dm.Roles({"x": "hidden"}, has_head=False), "dimension_numbers": numbers}
    momentum = dm.momentum(0.9, nesterov=True, dtype=jnp.bfloat16)
    yield dm.muon(0.1, momentum=momentum, weight_decay=0.1, **EXACT, **of)
    exact = {"hidden": NORMS.spectral_norm("scion", **EXACT)}
    yield dm.scion(0.1, {"hidden": 3.0}, norms=exact, **of)
    yield dm.gluon(0.1, {"hidden": RADIUS}, norms=exact, **of)


def two_steps(tx, params, later=jnp.cos):
    _, state = tx.update(params, tx.init(params), params)
    return tx.update(jax.tree.map(later, params), state, params)[0]["x"]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, [jnp.float32, jnp.bfloat16][i % 2], marks=[pytest.mark.deep] * (i > 4))
        for i, case in enumerate(CASES)
    ],
)
def test_a_step_with_parts_is_that_of_separate_leaves_joined(case, dtype):
    shape, parts = CASES[case]
    leaf = np.random.default_rng(0).normal(size=shape)
    leaf = leaf * np.linspace(0.1, 3.0, leaf.size).reshape(shape)
    apart, join = of_parts(jnp.asarray(leaf, dtype), parts.axis % len(shape), parts)
    numbers = {"x": parts}, {"x": parts.of or "in_out"}

    @jax.jit
    def steps(apart):
        made = zip(*map(transformations, numbers), strict=True)
        return [
            (two_steps(together, {"x": join(apart)}), join(two_steps(alone, {"x": apart})))
            for together, alone in made
        ]

    tolerance = 2e-5 if dtype == jnp.float32 else 1e-2
    for i, (found, expected) in enumerate(steps(apart)):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            *map(np.float32, (found, expected)), rtol=tolerance, atol=tolerance, err_msg=str(i)
        )


PARTS = Parts(1, (4, 1, 1), groups=2)
OF_LAYERS = {"roles": dm.Roles({"x": "hidden", "y": "head"}), "dimension_numbers": {"x": PARTS}}
EXACT_ROLES = {"hidden": NORMS.spectral_norm("scion", **EXACT), "head": NORMS.sign_norm()}
DROPPING = {
    "drop_muon": lambda layers, of: dm.drop_muon(0.1, layers, **EXACT, **of),
    "drop_scion": lambda layers, of: dm.drop_scion(
        0.1, layers, {"hidden": 3.0, "head": 2.0}, norms=EXACT_ROLES, **of
    ),
    "drop_gluon": lambda layers, of: dm.drop_gluon(
        0.1, layers, dict.fromkeys(EXACT_ROLES, RADIUS), norms=EXACT_ROLES, **of
    ),
}


@pytest.mark.parametrize("make", DROPPING)
def test_parts_are_dropped_with_their_layer_in_stacks_too(make):
    stack = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 12)), jnp.float32)
    apart, join = of_parts(stack, 2, PARTS)
    rest = {"y": jnp.ones((4, 2))}
    layers = {"x": dm.stacked("x"), "y": "y"}.values()
    whole = {"x": stack} | rest, {"x": apart} | rest

    def steps(params, numbers):
        of = OF_LAYERS | {"dimension_numbers": numbers}
        made = dm.layers_by_path(params, list(layers))
        tx = DROPPING[make](made, of)
        for depth in (1, 3):
            state = tx.init(params)
            _, state = tx.update(params, state, params, depth=0)
            yield tx.update(params, state, params, depth=depth)[0]["x"]

    found, expected = (
        jax.jit(lambda params, numbers=numbers: list(steps(params, numbers)))(params)
        for params, numbers in zip(whole, ({"x": PARTS}, {"x/*": "in_out"}), strict=True)
    )
    for depth, of_depth, of_apart in zip((1, 3), found, expected, strict=True):
        np.testing.assert_allclose(of_depth, join(of_apart), rtol=2e-5, atol=2e-5)
        assert not of_depth[:depth].any()
        assert bool(of_depth[depth:].all())


@pytest.mark.parametrize("case", ["queries in groups", "group by group", "experts"])
def test_smoothness_and_first_parameters_are_those_of_each_part(case):
    shape, parts = CASES[case]
    leaf = np.random.default_rng(2).normal(size=shape).astype("f")
    apart, _ = of_parts(leaf, parts.axis % len(shape), parts)
    numbers = {"x": parts}, {"x": parts.of or "in_out"}
    norm = NORMS.spectral_norm("muon", **EXACT)
    samples = []
    for x, of in zip((leaf, apart), numbers, strict=True):
        tx = dm.planning.track_smoothness(norm, dimension_numbers=of)

        @jax.jit
        def sample(x, tx=tx):
            _, state = tx.update(x, tx.init(x), x)
            moved = jax.tree.map(jnp.cos, x)
            return tx.update(moved, state, jax.tree.map(jnp.sin, moved))[1].sample

        samples.append(sample({"x": x}))
    for found, expected in zip(*samples, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    of = {"roles": dm.Roles({"x": "hidden"}, has_head=False), "dimension_numbers": {"x": parts}}
    lmo = dm.norm_lmo(EXACT_ROLES["hidden"], 3.0, dimension_numbers={"x": parts})

    @jax.jit
    def draw(key):
        drawn = dm.optimizers.scion_init(key, {"x": leaf}, {"hidden": 3.0}, **of)
        return drawn["x"], two_steps(lmo, drawn, later=lambda x: x)

    np.testing.assert_allclose(*draw(jax.random.key(0)), atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (Parts(1, (8, 4)), "'x' of shape (6, 16) has size 16, and its parts 8 + 4 are 12"),
        (Parts(-1, (2, 1), groups=4), "has size 16, and its parts 4 × (2 + 1) are 12"),
        (Parts(2, (8, 8)), "'x' of shape (6, 16) has 2 axes, and its dm.layers.Parts cut axis 2"),
        (Parts(1, 16), "sizes must be a tuple of integers, got 16"),
        (Parts(1, (8, 8.0)), "sizes must be a Python integer, got 8.0"),
        (Parts(1, (16, 0)), "sizes must be at least 1, got 0"),
        (Parts(1, (8, 8), "out-in"), "of must be one of … Did you mean 'out_in'?"),
        (Parts(1, (8, 8), Parts(0, (3, 3))), "of must be a layout … name all sizes"),
        (Parts(1.0, (8, 8)), "axis must be a Python integer, got 1.0"),
    ],
)
def test_parts_that_do_not_fit_are_one_error_from_everywhere(numbers, words):
    params, of = {"x": jnp.ones((6, 16))}, {"x": numbers}
    roles = dm.Roles(has_head=False)
    for call in (
        lambda: dm.matrix_labels(params, of),
        lambda: roles.table(params, of),
        lambda: dm.muon(0.1, dimension_numbers=of).init(params),
        lambda: dm.scion(0.1, {"hidden": 1.0}, roles=roles, dimension_numbers=of).init(params),
        lambda: dm.newton_schulz_lmo(dimension_numbers=of).init(params),
        lambda: dm.sharding.plan_layouts(params, AbstractMesh((2,), ("x",)), dimension_numbers=of),
    ):
        pattern = ".*".join(map(re.escape, words.split(" … ")))
        with pytest.raises((ValueError, TypeError), match=pattern):
            call()


def test_the_axis_of_a_batch_has_no_parts_and_a_layout_in_doubt_is_still_asked_for():
    experts = {"x": jnp.ones((4, 3, 5))}
    tx = dm.newton_schulz_lmo(dimension_numbers={"x": Parts(0, (2, 2), Axes(1, 2))})
    with pytest.raises(ValueError, match=r"Axis 0 of leaf 'x'.*is neither fan-in nor fan-out"):
        tx.init(experts)
    params = {"qkv": {"weight": jnp.ones((12, 6))}}
    with pytest.raises(ValueError, match=r"Parts say it as of=….*'out_in'"):
        dm.matrix_labels(params, {"qkv": Parts(0, (6, 3, 3))})
    numbers = {"qkv": Parts(0, (6, 3, 3), "out_in")}
    table = dm.Roles(has_head=False).table(params, numbers)
    assert "qkv/weight  12×6   hidden  parts 6 + 3 + 3" in table
    with pytest.raises(ValueError, match=r"a batch of matrices.*parts one by one"):
        NORMS.spectral_norm().norm(params["qkv"]["weight"], numbers["qkv"])


def test_a_plan_counts_the_parts_and_knows_how_they_are_sharded():
    parts, mesh = Parts(1, (64, 32, 32)), AbstractMesh((4, 2), ("fsdp", "tensor"))
    leaf = jnp.zeros((64, 128))
    apart, _ = of_parts(leaf, 1, parts)

    def plan(x, numbers, spec):
        sharding = None if spec is None else NamedSharding(mesh, PartitionSpec(*spec))
        shardings = None if spec is None else {"x": jax.tree.map(lambda _: sharding, x)}
        of = {"shardings": shardings, "dimension_numbers": numbers}
        return dm.sharding.plan_layouts({"x": x}, mesh, **of)

    for spec in (("fsdp",), (("fsdp", "tensor"),), None):
        found = plan(leaf, {"x": parts}, spec)
        assert found == plan(apart, {"x/*": "in_out"}, spec)
        assert [(of.shape, of.num_matrices) for of in found] == [((64, 64), 1), ((32, 64), 2)]
    # Where the axis of the parts is sharded they lie anywhere.
    unknown = plan(leaf, {"x": parts}, None)
    assert (
        plan(leaf, {"x": parts}, ("tensor", "fsdp"))
        == unknown
        != plan(leaf, {"x": parts}, ("fsdp",))
    )
