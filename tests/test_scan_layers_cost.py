"""What a scan down to a depth computes, keeps and compiles; counted, not timed."""

import functools

import jax
import jax.numpy as jnp
import pytest

import dropmuon_jax as dm

NUM_LAYERS = 4


@pytest.mark.parametrize("depth", range(NUM_LAYERS + 1))
def test_the_backward_pass_visits_active_layers_only(depth):
    visits = []

    @jax.custom_vjp
    def observed(x):
        return x

    def backward(_, ct):
        jax.debug.callback(lambda: visits.append("backward"))
        return (ct,)

    observed.defvjp(lambda x: (x, None), backward)

    def f(carry, w):
        return observed(jnp.tanh(carry * w)), None

    def loss(stack, depth):
        return dm.scan_layers(f, 0.5, stack, depth=depth)[0]

    stack = jnp.linspace(0.5, 1.5, NUM_LAYERS)
    for static, given in (((), jnp.int32(depth)), (1, depth)):
        visits.clear()
        jax.block_until_ready(jax.jit(jax.grad(loss), static_argnums=static)(stack, given))
        jax.effects_barrier()
        assert len(visits) == NUM_LAYERS - depth


def network_loss(scan, stack, x):
    def f(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w) @ w.T), None

    return jnp.mean(scan(f, x, stack)[0] ** 2)


def compile_gradient(scan, num_layers):
    stack = jnp.ones((num_layers, 32, 64)) / 32
    grad = jax.grad(functools.partial(network_loss, scan))
    return jax.jit(grad).lower(stack, jnp.ones((16, 32))).compile()


def compile_to_depth(num_layers):
    def grad(stack, x, depth):
        scan = functools.partial(dm.scan_layers, depth=depth)
        return jax.grad(functools.partial(network_loss, scan))(stack, x)

    arguments = jnp.ones((num_layers, 32, 64)), jnp.ones((16, 32)), jnp.int32(0)
    return jax.jit(grad).lower(*arguments).compile()


def test_the_program_does_not_grow_with_the_layers():
    few, many = (len(compile_to_depth(n).as_text().splitlines()) for n in (4, 48))
    assert many == pytest.approx(few, rel=0.01)


def test_memory_is_that_of_a_rematerialized_scan():
    def rematerialized(f, init, xs):
        return jax.lax.scan(jax.checkpoint(f, prevent_cse=False), init, xs)

    ours = compile_to_depth(24).memory_analysis().temp_size_in_bytes
    theirs = compile_gradient(rematerialized, 24).memory_analysis().temp_size_in_bytes
    plain = compile_gradient(jax.lax.scan, 24).memory_analysis().temp_size_in_bytes
    assert ours <= 1.02 * theirs < plain


def test_nothing_is_differentiated_that_nobody_asks_for():
    """A closed-over matrix and the rows of a frozen stack cost no product in the backward pass."""
    w, frozen = jnp.ones((NUM_LAYERS, 8, 8)), jnp.ones((NUM_LAYERS, 8, 8))
    shared = jnp.ones((8, 8))

    def products(differentiates_all):
        def loss(w, frozen, shared, depth):
            def f(x, row):
                return jnp.tanh(x @ row[0]) @ row[1] @ shared, None

            return jnp.sum(dm.scan_layers(f, jnp.ones((2, 8)), (w, frozen), depth=depth)[0])

        argnums = (0, 1, 2) if differentiates_all else 0
        grad = jax.jit(jax.grad(loss, argnums))
        hlo = grad.lower(w, frozen, shared, jnp.int32(0)).compile().as_text()
        return hlo.count(" dot(")

    # Their gradients, and the input of `shared`, which only its gradient needs again.
    assert products(differentiates_all=False) == products(differentiates_all=True) - 3
