"""The shortest way in: a user's own gradient in one jit, with the depth given to `update` alone.

Counted in FLOPs of the compiled step, beside those of `train_step`.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm

NAMES = ["stem", "mid", "head"]
KEYS = jax.random.split(jax.random.key(0), 8)
PARAMS = {
    name: {"kernel": jax.random.normal(key, (16, 16)) / 4, "bias": jnp.zeros(16)}
    for name, key in zip(NAMES, KEYS, strict=False)
}
X = jax.random.normal(KEYS[7], (32, 16))
# One step of the iteration, of which each is a larger program to compile.
KERNEL = dm.orthogonalize.newton_schulz(num_steps=1)


def dense(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


@jax.custom_vjp
def product(kernel, x):
    return x @ kernel


product.defvjp(
    lambda kernel, x: (x @ kernel, (kernel, x)), lambda kept, ct: (kept[1].T @ ct, ct @ kept[0].T)
)
# What a network may have between its layers: each is cut off where JAX's own is.
BLOCKS = {
    "stem": jax.checkpoint(dense),
    "mid": lambda params, x: jnp.tanh(product(params["kernel"], x) + params["bias"]),
    "head": dense,
}


def mlp(params, x):
    for name in NAMES:
        x = BLOCKS[name](params[name], x)
    return jnp.mean((x - 1) ** 2)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8 * 8 * 8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1)))


def flops(traced):
    return traced.lower().compile().cost_analysis()["flops"]


def plain_step(loss_fn, optimizer, returns_grads=False):
    """A user's own step: a static depth and one argument of `update` are all that is new."""

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params, state, *args, depth):
        value, grads = jax.value_and_grad(loss_fn)(params, *args)
        updates, state = optimizer.update(grads, state, params, depth=depth)
        value = (value, grads) if returns_grads else value
        return optax.apply_updates(params, updates), state, value

    return step


def setup(params=PARAMS, patterns=NAMES, wrap=lambda tx: tx):
    """Layers, their optimizer, its state, and the draws of layers."""
    layers = dm.layers_by_path(params, patterns)
    optimizer = wrap(dm.drop_muon(0.05, layers, orthogonalize=KERNEL))
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    return layers, optimizer, jax.eval_shape(optimizer.init, params), sampler


def test_a_step_with_two_more_lines_has_the_flops_of_train_step_at_every_depth(recwarn):
    """Whose gradients are masked, so that nothing below the depth is differentiated."""
    layers, optimizer, state, sampler = setup()
    plain, whole = plain_step(mlp, optimizer), dm.train_step(mlp, optimizer, sampler)
    counts = [flops(whole.trace_depth(depth, PARAMS, state, X)) for depth in range(3)]
    assert counts == [flops(plain.trace(PARAMS, state, X, depth=depth)) for depth in range(3)]
    assert counts[2] < 0.75 * counts[1] < 0.75 * 0.9 * counts[0]
    report = dm.check_depths(plain, layers, PARAMS, state, X)
    assert (report.wasted, list(recwarn)) == ((), [])
    assert "Every depth saves." in str(report)


@pytest.mark.deep
def test_an_nnx_step_with_two_more_lines_has_the_flops_of_train_step():
    module, images = Net(nnx.Rngs(0)), jax.random.normal(KEYS[6], (8, 8, 8, 3))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    _, optimizer, state, sampler = setup(params, [("conv", "norm"), "head"])

    def loss_fn(model):
        return jnp.mean(model(images) ** 2)

    @functools.partial(jax.jit, static_argnames="depth")
    def plain(params, state, rest, depth):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        params, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
        updates, state = optimizer.update(grads, state, params, depth=depth)
        return optax.apply_updates(params, updates), state, (loss, rest)

    whole = dm.train_step(loss_fn, optimizer, sampler)
    for depth in range(2):
        count = flops(plain.trace(params, state, rest, depth=depth))
        assert flops(whole.trace_depth(depth, module, state)) == pytest.approx(count, abs=4)


# --- Where it does not hold, and who sees it ------------------------------------------------------


clip = functools.partial(optax.chain, optax.clip_by_global_norm(1.0))
WITH_TABLE = {"embed": jnp.ones((9, 16)), **PARAMS}


def of_tokens(params, x):
    return mlp(params, params["embed"][jnp.arange(32) % 9] + x)


WASTES = {
    "reads the gradients of all layers": (mlp, {"wrap": clip}, False),
    "or they leave the jit": (mlp, {}, True),
    "from the input to the output": (mlp, {"patterns": NAMES[::-1]}, False),
    "Depth 1 saves hardly anything: without layer 'embed'": (
        of_tokens,
        {"params": WITH_TABLE, "patterns": ["embed", *NAMES]},
        False,
    ),
}


@pytest.mark.parametrize("words", WASTES)
def test_a_step_that_wastes_depths_is_seen(words):
    loss_fn, arguments, returns_grads = WASTES[words]
    layers, optimizer, state, sampler = setup(**arguments)
    params = arguments.get("params", PARAMS)
    step = plain_step(loss_fn, optimizer, returns_grads)
    with pytest.warns(dm.planning.DepthWarning, match=words):
        report = dm.check_depths(step, layers, params, state, X)
    assert report.wasted == (1,) or loss_fn is mlp
    if "wrap" in arguments:  # a step whose gradients are masked before
        step = dm.train_step(loss_fn, optimizer, sampler)
        assert dm.check_depths(step, layers, params, state, X).wasted == ()


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("of", ["a tree", "a module"])
def test_train_step_has_its_layers_in_order_or_it_is_seen(of, is_right, recwarn):
    """By the paths of its parameters, whatever stands beside them, as a module's dropout does."""
    module, images = Net(nnx.Rngs(0)), jax.random.normal(KEYS[6], (8, 8, 8, 3))
    model, params, patterns, loss_fn = {
        "a tree": (PARAMS, PARAMS, NAMES, lambda params: mlp(params, X)),
        "a module": (
            module,
            nnx.state(module, nnx.Param),
            [("conv", "norm"), "head"],
            lambda model: jnp.mean(model(images) ** 2),
        ),
    }[of]
    layers, optimizer, state, sampler = setup(params, patterns if is_right else patterns[::-1])
    dm.check_depths(dm.train_step(loss_fn, optimizer, sampler), layers, model, state)
    said = [str(warning.message) for warning in recwarn]
    assert not said if is_right else "Give the patterns from the input to the output" in said[0]
    assert len(said) < 2  # no other cause is given for what comes from the order


def test_depths_of_other_layers_than_the_step_draws_are_refused():
    _, optimizer, state, sampler = setup()
    step = dm.train_step(mlp, optimizer, sampler)
    with pytest.raises(ValueError, match="among 3 layers, stem, mid, head"):
        dm.check_depths(step, sampler.layers.group(2), PARAMS, state, X)


STACK = {"blocks": jax.random.normal(KEYS[1], (4, 16, 16)) / 4, "head": jnp.ones((16, 2))}


@pytest.mark.parametrize("is_own_scan", [True, False])
def test_a_scan_of_the_model_itself_over_a_stack_is_seen(is_own_scan, recwarn):
    layers, optimizer, state, sampler = setup(STACK, [dm.stacked("blocks"), "head"])

    def loss_fn(params, depth):
        def block(x, kernel):
            return x + jnp.tanh((x * kernel[0]) @ kernel), None  # by a scale first, as a norm has

        if is_own_scan:
            x, _ = jax.lax.scan(block, X, params["blocks"])
        else:
            x, _ = dm.scan_layers(block, X, params["blocks"], depth=layers.stack_depth(depth))
        return jnp.mean((x @ params["head"]) ** 2)

    step = dm.train_step(loss_fn, optimizer, sampler)
    if is_own_scan:
        with pytest.warns(dm.planning.DepthWarning, match="a scan of its own") as said:
            dm.check_depths(step, layers, STACK, state)
        assert len(said) == 1  # and not that rows are in the wrong order
    else:
        assert dm.check_depths(step, layers, STACK, state).wasted == ()
        assert not recwarn


def test_a_head_that_is_tied_to_an_embedding_before_the_stack_is_seen_in_another_layer():
    """There scan_layers would leave its gradient without what the lookup adds."""
    params = {"embed": jnp.ones((9, 16)), "blocks": STACK["blocks"]}
    patterns = [dm.stacked("blocks"), "embed"]
    layers, optimizer, state, sampler = setup(params, patterns)

    def loss_fn(params, tokens, depth, layers=layers):
        block = lambda x, kernel: (x + jnp.tanh(x @ kernel), None)  # noqa: E731
        x, rows = params["embed"][tokens], layers.stack_depth(depth)
        x, _ = dm.scan_layers(block, x, params["blocks"], depth=rows)
        return jnp.mean((x @ params["embed"].T) ** 2)

    step, tokens = dm.train_step(loss_fn, optimizer, sampler), jnp.arange(8) % 9
    with pytest.warns(dm.planning.DepthWarning, match="that of 'embed' without a part"):
        dm.check_depths(step, layers, params, state, tokens)
