"""A scan over stacked layers, differentiated from the last one down to a depth."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_LAYERS, BATCH, WIDTH = 3, 3, 5
POLICIES = {
    "inputs": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
}
KEYS = jax.random.split(jax.random.key(0), 3)
POSITIONS = jnp.arange(NUM_LAYERS)
DROPOUT_KEYS = jax.random.split(jax.random.key(7), NUM_LAYERS)


def make_inputs(dtype=jnp.float32):
    """What is differentiated: the stack, the first carry, and what all layers share."""
    stack = {
        "up": jax.random.normal(KEYS[0], (NUM_LAYERS, WIDTH, 7), dtype) / 2,
        "down": jax.random.normal(KEYS[1], (NUM_LAYERS, 7, WIDTH), dtype) / 2,
    }
    return stack, jax.random.normal(KEYS[2], (BATCH, WIDTH), dtype), jnp.ones(WIDTH, dtype) * 0.9


def layer(shared, carry, row):
    """With all that a layer may have: dropout, positions, a loss carried, a count, outputs."""
    x, penalty, count = carry
    params, key, position = row
    kept = jax.random.bernoulli(key, 0.8, (BATCH, 7))
    hidden = jnp.where(kept, jnp.tanh(x @ params["up"]), 0)
    x = x + hidden @ params["down"] * shared + (0.01 * position).astype(x.dtype)
    return (x, penalty + jnp.sum(hidden**2), count + 1), (jnp.mean(hidden), count)


def loss_of(scan, stack, x, shared):
    init = (x, jnp.zeros((), x.dtype), 0)
    rows = (stack, DROPOUT_KEYS, POSITIONS)
    (x, penalty, count), (means, counts) = scan(functools.partial(layer, shared), init, rows)
    weights = jnp.arange(1.0, NUM_LAYERS + 1, dtype=x.dtype)
    return jnp.sum(jnp.sin(x)) + 0.1 * penalty + means @ weights + 0 * (count + counts.sum())


def loss_to(depth, *inputs, policy=None):
    return loss_of(functools.partial(dm.scan_layers, depth=depth, policy=policy), *inputs)


def unrolled_loss(depth, *inputs):
    """The definition: what comes before the depth is a constant."""

    def scan(f, carry, rows):
        outputs = []
        for i in range(NUM_LAYERS):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            carry, y = jax.lax.stop_gradient(f(carry, row)) if i < depth else f(carry, row)
            outputs.append(y)
        return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)

    return loss_of(scan, *inputs)


def gradients(function, *inputs):
    return jax.value_and_grad(function, argnums=tuple(range(len(inputs))))(*inputs)


@functools.cache
def expected_gradients(depth, scale=1.0):
    stack, x, shared = make_inputs()
    unrolled = jax.jit(functools.partial(gradients, functools.partial(unrolled_loss, depth)))
    return unrolled(stack, scale * x, shared)


@pytest.mark.parametrize(
    ("policy", "is_traced"), [("inputs", True), ("products", True), ("inputs", False)]
)
def test_gradients_are_those_of_layers_whose_predecessors_are_constants(policy, is_traced):
    inputs = make_inputs()

    def of_depth(depth, *inputs):
        loss = functools.partial(loss_to, depth, policy=POLICIES[policy])
        return gradients(loss, *inputs)

    of_depth = jax.jit(of_depth, static_argnums=() if is_traced else 0)
    for depth in range(NUM_LAYERS + 1):
        given = jnp.int32(depth) if is_traced else depth
        actual = of_depth(given, *inputs)
        chex.assert_trees_all_close(actual, expected_gradients(depth), rtol=2e-5, atol=2e-6)


def test_active_rows_have_the_gradient_of_a_plain_scan_and_the_others_zero():
    inputs = make_inputs()
    of_depth = jax.jit(lambda depth: jax.grad(functools.partial(loss_to, depth))(*inputs))
    plain = jax.jit(jax.grad(functools.partial(loss_of, jax.lax.scan)))(*inputs)
    for depth in range(NUM_LAYERS + 1):
        for name, grad in of_depth(jnp.int32(depth)).items():
            np.testing.assert_allclose(grad[depth:], plain[name][depth:], rtol=2e-5, atol=2e-6)
            assert not grad[:depth].any()
    assert of_depth._cache_size() == 1


def test_outputs_are_those_of_a_plain_scan():
    inputs = make_inputs()
    rows = (inputs[0], DROPOUT_KEYS, POSITIONS)
    init = (inputs[1], 0.0, 0)
    f = functools.partial(layer, inputs[2])
    expected = jax.jit(functools.partial(jax.lax.scan, f))(init, rows)
    for depth in (0, 2, NUM_LAYERS, jnp.int32(2), jnp.int32(99)):
        actual = jax.jit(functools.partial(dm.scan_layers, f, depth=depth))(init, rows)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_a_traced_depth_is_clipped():
    inputs = make_inputs()
    grad = jax.jit(lambda depth: jax.grad(functools.partial(loss_to, depth))(*inputs))
    chex.assert_trees_all_equal(grad(jnp.int32(-3)), grad(jnp.int32(0)))
    assert not any(g.any() for g in grad(jnp.int32(NUM_LAYERS + 3)).values())


@pytest.mark.parametrize("policy", ["inputs", "everything"])
def test_it_can_be_mapped_over_examples_and_over_depths(policy):
    stack, x, shared = make_inputs()
    scale = jnp.array([1.0, -2.0])

    def grad(scale, depth):
        loss = functools.partial(loss_to, depth, policy=POLICIES[policy])
        return gradients(loss, stack, scale * x, shared)

    mapped = jax.jit(jax.vmap(grad, (0, None)))(scale, jnp.int32(1))
    over_depths = jax.jit(jax.vmap(grad, (None, 0)))(1.0, jnp.arange(3))
    for i in range(2):
        for actual, expected in (
            (mapped, expected_gradients(1, float(scale[i]))),
            (over_depths, expected_gradients(i)),
        ):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], actual)
            chex.assert_trees_all_close(row, expected, rtol=2e-5, atol=5e-6)


def test_it_can_be_rematerialized_as_a_whole():
    inputs = make_inputs()

    def grad(depth):
        return gradients(jax.checkpoint(functools.partial(loss_to, depth)), *inputs)

    actual = jax.jit(grad)(jnp.int32(2))
    chex.assert_trees_all_close(actual, expected_gradients(2), rtol=2e-5, atol=2e-6)


def test_half_precision_keeps_its_dtypes_and_the_values_of_a_plain_scan():
    inputs = make_inputs(jnp.bfloat16)
    plain = jax.jit(lambda *inputs: gradients(functools.partial(loss_of, jax.lax.scan), *inputs))
    ours = jax.jit(lambda depth, *inputs: gradients(functools.partial(loss_to, depth), *inputs))
    value, expected = plain(*inputs)
    for depth in (0, 2):
        actual_value, actual = ours(jnp.int32(depth), *inputs)
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        assert float(actual_value) == pytest.approx(float(value), rel=0.02)
        for name, grad in actual[0].items():
            rows = np.asarray(grad[depth:], np.float32), np.asarray(expected[0][name][depth:])
            np.testing.assert_allclose(rows[0], rows[1].astype(np.float32), rtol=0.1, atol=0.05)
            assert not grad[:depth].any()


def test_integers_and_strongly_typed_numbers_pass_through_the_carry_as_in_lax_scan():
    def f(carry, w):
        total, count = carry
        return (total + w, count + 1), None

    for scan in (jax.lax.scan, dm.scan_layers):
        (total, count), _ = scan(f, (0, 0), jnp.array([0.5, 0.25]))
        assert (float(total), int(count)) == (0.75, 2)


def test_a_static_depth_can_be_differentiated_twice_and_forwards():
    stack = jnp.array([2.0, 3.0, 5.0])

    def loss(stack):
        return dm.scan_layers(lambda c, w: (c * w, None), 1.0, stack, depth=1)[0]

    np.testing.assert_allclose(jax.hessian(loss)(stack), [[0, 0, 0], [0, 0, 2], [0, 2, 0]])
    _, tangent = jax.jvp(loss, (stack,), (jnp.ones(3),))
    assert tangent == 2 * 5 + 2 * 3


def test_a_second_derivative_outside_of_jit_is_that_of_a_static_depth():
    stack = jnp.array([2.0, 3.0, 5.0])

    def hessian_vector_product(depth):
        def loss(stack):
            return dm.scan_layers(lambda c, w: (c * w, None), 1.0, stack, depth=depth)[0] ** 2

        return jax.grad(lambda stack: jax.grad(loss)(stack) @ jnp.arange(1.0, 4.0))(stack)

    for depth in range(4):
        traced = hessian_vector_product(jnp.int32(depth))
        np.testing.assert_allclose(traced, hessian_vector_product(depth), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_any_integer_is_a_depth(dtype):
    stack = jnp.ones((200, 1))
    layers = dm.layers_by_path({"w": stack}, [dm.stacked("w")])

    def active_rows(depth):
        def loss(stack):
            f = lambda c, w: (c + w.sum(), None)  # noqa: E731
            return dm.scan_layers(f, 0.0, stack, depth=layers.stack_depth(depth))[0]

        return jax.grad(loss)(stack).sum(), layers.mask(depth)["w"].sum()

    assert jax.jit(active_rows)(jnp.asarray(100, dtype)) == (100, 100)


def test_it_runs_on_a_mesh_with_explicit_axes_and_in_shard_map():
    """On one device: that the types of loops fit."""
    stack, x = jnp.ones((NUM_LAYERS, 3, 3)) / 3, jnp.ones((2, 3))

    def loss(stack, x, depth):
        def f(x, w):
            return jnp.tanh(x @ w), x.sum()

        x, sums = dm.scan_layers(f, x, stack, depth=depth)
        return (x**2).sum() + sums.sum()

    spec = jax.sharding.PartitionSpec
    expected = jax.grad(loss)(stack, x, 1)
    auto = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda stack, x, depth: jax.grad(lambda stack: jax.lax.psum(loss(stack, x, depth), "data"))(
            stack
        ),
        mesh=auto,
        in_specs=(spec(), spec("data"), spec()),
        out_specs=spec(),
    )
    np.testing.assert_allclose(jax.jit(mapped)(stack, x, jnp.int32(1)), expected, rtol=1e-6)
    explicit = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        sharding = jax.sharding.NamedSharding(explicit, spec("data"))
        grad = jax.jit(jax.grad(loss))(stack, jax.device_put(x, sharding), jnp.int32(1))
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
