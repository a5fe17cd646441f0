"""A scan over stacked layers, differentiated from the last one down to a depth.

What it computes, keeps and visits is counted, not timed.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dropmuon_jax as dm

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


def gradients_to(depth, *inputs, policy="inputs"):
    return gradients(functools.partial(loss_to, depth, policy=POLICIES[policy]), *inputs)


@pytest.mark.parametrize("policy", ["inputs", pytest.param("products", marks=pytest.mark.deep)])
@pytest.mark.parametrize("is_traced", [True, False])
def test_gradients_are_those_of_layers_whose_predecessors_are_constants(policy, is_traced):
    of_depth = functools.partial(gradients_to, policy=policy)
    of_depth = jax.jit(of_depth, static_argnums=() if is_traced else 0)
    # A traced depth is clipped.
    for depth in (-3, 0, 1, 2, 3, 99) if is_traced else range(NUM_LAYERS + 1):
        actual = of_depth(jnp.int32(depth) if is_traced else depth, *make_inputs())
        expected = expected_gradients(min(max(depth, 0), NUM_LAYERS))
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-6)


def test_outputs_are_those_of_a_plain_scan():
    stack, x, shared = make_inputs()
    f, inputs = functools.partial(layer, shared), ((x, 0.0, 0), (stack, DROPOUT_KEYS, POSITIONS))
    expected = jax.jit(functools.partial(jax.lax.scan, f))(*inputs)
    for depth in (2, jnp.int32(2)):
        actual = jax.jit(functools.partial(dm.scan_layers, f, depth=depth))(*inputs)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("policy", [pytest.param("inputs", marks=pytest.mark.deep), "everything"])
def test_it_can_be_mapped_over_examples_and_over_depths(policy):
    stack, x, shared = make_inputs()
    scales, depths = jnp.array([1.0, -2.0]), jnp.arange(2)

    def of_both(scale, depth):
        return gradients_to(depth, stack, scale * x, shared, policy=policy)

    mapped = jax.jit(jax.vmap(jax.vmap(of_both, (0, None)), (None, 0)))(scales, depths)
    for depth, scale in itertools.product(range(2), range(2)):
        actual = jax.tree.map(lambda leaf, at=(depth, scale): leaf[at], mapped)
        expected = expected_gradients(depth, float(scales[scale]))
        chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.deep
def test_it_can_be_rematerialized_as_a_whole():
    loss = jax.checkpoint(functools.partial(loss_to, jnp.int32(2)))
    actual = jax.jit(functools.partial(gradients, loss))(*make_inputs())
    chex.assert_trees_all_close(actual, expected_gradients(2), rtol=2e-5, atol=2e-6)


@pytest.mark.deep
def test_half_precision_keeps_its_dtypes_and_the_values_of_a_plain_scan():
    inputs = make_inputs(jnp.bfloat16)
    plain = jax.jit(functools.partial(gradients, functools.partial(loss_of, jax.lax.scan)))
    value, expected = plain(*inputs)
    actual_value, actual = jax.jit(gradients_to)(jnp.int32(2), *inputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    assert float(actual_value) == pytest.approx(float(value), rel=0.02)
    for name, grad in actual[0].items():
        active, of_plain = grad[2:].astype(float), expected[0][name][2:].astype(float)
        np.testing.assert_allclose(active, of_plain, rtol=0.1, atol=0.05)
        assert not grad[:2].any()


def test_integers_and_strongly_typed_numbers_pass_through_the_carry_as_in_lax_scan():
    def f(carry, w):
        total, count = carry
        return (total + w, count + 1), None

    for scan in (jax.lax.scan, dm.scan_layers):
        (total, count), _ = scan(f, (0, 0), jnp.array([0.5, 0.25]))
        assert (float(total), int(count)) == (0.75, 2)


@pytest.mark.parametrize("depth", [1, pytest.param(jnp.int32(1), id="array")])
def test_a_depth_that_is_known_can_be_differentiated_twice(depth):
    """Outside of jit an array is known too; a static depth has derivatives forwards as well."""
    stack = jnp.array([2.0, 3.0, 5.0])

    def loss(stack):
        return dm.scan_layers(lambda c, w: (c * w, None), 1.0, stack, depth=depth)[0]

    hessian = jax.jacrev(jax.grad(loss))(stack)
    np.testing.assert_allclose(hessian, [[0, 0, 0], [0, 0, 2], [0, 2, 0]])
    if isinstance(depth, int):
        _, tangent = jax.jvp(loss, (stack,), (jnp.ones(3),))
        assert tangent == 2 * 5 + 2 * 3


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32])
def test_any_integer_is_a_depth(dtype):
    stack = jnp.ones((200, 1))
    layers = dm.layers_by_path({"w": stack}, [dm.stacked("w")])

    def active_rows(depth):
        def loss(stack):
            f = lambda c, w: (c + w.sum(), None)  # noqa: E731
            return dm.scan_layers(f, 0.0, stack, depth=layers.stack_depth(depth))[0]

        return jax.grad(loss)(stack).sum(), layers.mask(depth)["w"].sum()

    assert jax.jit(active_rows)(jnp.asarray(100, dtype)) == (100, 100)


# --- What is computed and kept --------------------------------------------------------------------


@pytest.mark.parametrize("is_traced", [True, False])
def test_the_backward_pass_visits_active_layers_only(is_traced):
    visits = []

    @jax.custom_vjp
    def observed(x):
        return x

    def backward(_, ct):
        jax.debug.callback(lambda: visits.append("backward"))
        return (ct,)

    observed.defvjp(lambda x: (x, None), backward)

    def loss(stack, depth):
        f = lambda carry, w: (observed(jnp.tanh(carry * w)), None)  # noqa: E731
        return dm.scan_layers(f, 0.5, stack, depth=depth)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=() if is_traced else 1)
    for depth in range(NUM_LAYERS + 1):
        visits.clear()
        stack = jnp.linspace(0.5, 1.5, NUM_LAYERS)
        jax.block_until_ready(gradient(stack, jnp.int32(depth) if is_traced else depth))
        jax.effects_barrier()
        assert len(visits) == NUM_LAYERS - depth


def test_memory_is_that_of_a_rematerialized_scan():
    def f(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w) @ w.T), None

    def temporary_bytes(scan):
        def gradient(stack, x, depth):
            return jax.grad(lambda stack: jnp.mean(scan(f, x, stack, depth)[0] ** 2))(stack)

        arguments = jnp.ones((24, 32, 64)), jnp.ones((16, 32)), jnp.int32(0)
        compiled = jax.jit(gradient).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes(lambda *args: dm.scan_layers(*args[:3], depth=args[3]))
    plain = temporary_bytes(lambda f, *args: jax.lax.scan(f, *args[:2]))
    rematerialized = temporary_bytes(
        lambda f, *args: jax.lax.scan(jax.checkpoint(f, prevent_cse=False), *args[:2])
    )
    assert ours <= 1.02 * rematerialized < plain


def test_nothing_is_differentiated_that_nobody_asks_for():
    """A closed-over matrix and the rows of a frozen stack cost no product in the backward pass."""
    w, frozen, shared = jnp.ones((4, 8, 8)), jnp.ones((4, 8, 8)), jnp.ones((8, 8))

    def loss(w, frozen, shared, depth):
        def f(x, row):
            return jnp.tanh(x @ row[0]) @ row[1] @ shared, None

        return jnp.sum(dm.scan_layers(f, jnp.ones((2, 8)), (w, frozen), depth=depth)[0])

    def products(argnums):
        compiled = jax.jit(jax.grad(loss, argnums)).lower(w, frozen, shared, jnp.int32(0)).compile()
        return compiled.as_text().count(" dot(")

    # Their gradients, and the input of `shared`, which only its gradient needs again.
    assert products(0) == products((0, 1, 2)) - 3
