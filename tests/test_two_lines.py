"""The shortest way in: a user's own gradient in one jit, with the depth given to `update` alone.

Counted in FLOPs of the compiled step, beside `masked_value_and_grad` and `train_step`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def mlp(params, x, layer=dense):
    for name in NAMES:
        x = layer(params[name], x)
    return jnp.mean((x - 1) ** 2)


@jax.custom_vjp
def product(kernel, x):
    return x @ kernel


product.defvjp(
    lambda kernel, x: (x @ kernel, (kernel, x)), lambda kept, ct: (kept[1].T @ ct, ct @ kept[0].T)
)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 8):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(features, (3, 3))(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv_0, self.norm_0 = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.conv_1, self.norm_1 = nnx.Conv(4, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in ((self.conv_0, self.norm_0), (self.conv_1, self.norm_1)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(self.dropout(x.reshape(len(x), -1)))


IMAGES, LABELS = jax.random.normal(KEYS[6], (8, 8, 8, 3)), jnp.arange(8) % 3


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def linen_case():
    model = CNN()
    variables = model.init(KEYS[0], IMAGES)

    def loss_fn(params, stats):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, IMAGES, mutable="batch_stats"
        )
        return cross_entropy(logits), new["batch_stats"]

    patterns = [("Conv_0", "BatchNorm_0"), ("Conv_1", "BatchNorm_1"), "Dense_0"]
    return loss_fn, variables["params"], patterns, (variables["batch_stats"],), True


CASES = {
    "mlp": lambda: (mlp, PARAMS, NAMES, (X,), False),
    "checkpoint": lambda: (
        functools.partial(mlp, layer=jax.checkpoint(dense)),
        *(PARAMS, NAMES, (X,), False),
    ),
    "custom_vjp": lambda: (
        functools.partial(mlp, layer=lambda p, x: jnp.tanh(product(p["kernel"], x) + p["bias"])),
        *(PARAMS, NAMES, (X,), False),
    ),
    "linen_batch_norm": linen_case,
}


def flops(traced):
    return traced.lower().compile().cost_analysis()["flops"]


def masked_step(loss_fn, optimizer, layers, has_aux=False):
    """A step as one would write it with this package's gradient."""

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params, state, *args, depth):
        mask = layers.mask(depth)
        value, grads = dm.masked_value_and_grad(loss_fn, has_aux)(params, *args, layer_mask=mask)
        updates, state = optimizer.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state, value

    return step


def plain_step(loss_fn, optimizer, has_aux=False):
    """A user's own step: a static depth and one argument of `update` are all that is new."""

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params, state, *args, depth):
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *args)
        updates, state = optimizer.update(grads, state, params, depth=depth)
        return optax.apply_updates(params, updates), state, value

    return step


@pytest.mark.parametrize("name", CASES)
def test_a_step_with_two_more_lines_has_the_flops_of_the_masked_gradient_at_every_depth(name):
    loss_fn, params, patterns, args, has_aux = CASES[name]()
    layers = dm.layers_by_path(params, patterns)
    optimizer = dm.drop_muon(0.05, layers, orthogonalize=KERNEL)
    state = jax.eval_shape(optimizer.init, params)
    masked = masked_step(loss_fn, optimizer, layers, has_aux)
    plain = plain_step(loss_fn, optimizer, has_aux)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    whole = dm.train_step(loss_fn, optimizer, sampler, has_aux=has_aux)
    counts = []
    for depth in range(layers.num_layers):
        counts.append(flops(masked.trace(params, state, *args, depth=depth)))
        assert flops(plain.trace(params, state, *args, depth=depth)) == counts[-1]
        assert flops(whole.trace_depth(depth, params, state, *args)) == counts[-1]
    assert counts[2] < 0.75 * counts[1] < 0.75 * 0.9 * counts[0]


def test_an_nnx_step_with_two_more_lines_has_the_flops_of_the_masked_gradient():
    module = NnxCNN(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    layers = dm.layers_by_path(params, [("conv_0", "norm_0"), ("conv_1", "norm_1"), "head"])
    optimizer = dm.drop_muon(0.05, layers, orthogonalize=KERNEL)
    state = jax.eval_shape(optimizer.init, params)

    def loss_fn(model):
        return cross_entropy(model(IMAGES))

    def of_params(params, rest):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(model), nnx.state(model, nnx.Not(nnx.Param))

    @functools.partial(jax.jit, static_argnames="depth")
    def plain(params, state, rest, depth):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        params = nnx.state(model, nnx.Param)
        updates, state = optimizer.update(grads, state, params, depth=depth)
        rest = nnx.state(model, nnx.Not(nnx.Param))
        return optax.apply_updates(params, updates), state, (loss, rest)

    masked = masked_step(of_params, optimizer, layers, has_aux=True)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    whole = dm.train_step(loss_fn, optimizer, sampler)
    for depth in range(3):
        count = flops(masked.trace(params, state, rest, depth=depth))
        assert flops(plain.trace(params, state, rest, depth=depth)) == count
        assert flops(whole.trace_depth(depth, module, state)) == pytest.approx(count, abs=4)


# --- Where it does not hold, and who sees it ------------------------------------------------------


def setup(params=PARAMS, patterns=NAMES, wrap=lambda tx: tx):
    layers = dm.layers_by_path(params, patterns)
    optimizer = wrap(dm.drop_muon(0.05, layers, orthogonalize=KERNEL))
    return layers, optimizer, jax.eval_shape(optimizer.init, params)


def test_every_depth_of_a_sound_step_saves_something(recwarn):
    layers, optimizer, state = setup()
    report = dm.check_depths(plain_step(mlp, optimizer), layers, PARAMS, state, X)
    assert report.wasted == ()
    assert "Every depth saves." in str(report)
    assert not recwarn


def test_a_clip_by_all_gradients_keeps_the_whole_backward_pass_and_is_seen():
    def clipped(tx):
        return optax.chain(optax.clip_by_global_norm(1.0), tx)

    layers, optimizer, state = setup(wrap=clipped)
    with pytest.warns(dm.planning.DepthWarning, match="reads the gradients of all layers"):
        dm.check_depths(plain_step(mlp, optimizer), layers, PARAMS, state, X)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    whole = dm.train_step(mlp, optimizer, sampler)  # whose gradients are masked before
    assert dm.check_depths(whole, layers, PARAMS, state, X).wasted == ()


def test_gradients_that_leave_the_jit_are_seen():
    layers, optimizer, state = setup()

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params, state, x, depth):
        loss, grads = jax.value_and_grad(mlp)(params, x)
        updates, state = optimizer.update(grads, state, params, depth=depth)
        return optax.apply_updates(params, updates), state, loss, grads

    with pytest.warns(dm.planning.DepthWarning, match="or they leave the jit"):
        dm.check_depths(step, layers, PARAMS, state, X)


def test_layers_from_deep_to_shallow_are_seen():
    layers, optimizer, state = setup(patterns=NAMES[::-1])
    with pytest.warns(dm.planning.DepthWarning, match="from the input to the output"):
        dm.check_depths(plain_step(mlp, optimizer), layers, PARAMS, state, X)


def test_an_embedding_alone_at_the_bottom_is_seen():
    params = {"embed": jnp.ones((9, 16)), **PARAMS}
    layers, optimizer, state = setup(params, ["embed", *NAMES])
    tokens = jnp.arange(32) % 9

    def loss_fn(params):
        return mlp(params, params["embed"][tokens])

    with pytest.warns(dm.planning.DepthWarning, match=r"Depth 1 saves hardly anything.*embed"):
        report = dm.check_depths(plain_step(loss_fn, optimizer), layers, params, state)
    assert report.wasted == (1,)


STACK = {"blocks": jax.random.normal(KEYS[1], (4, 16, 16)) / 4, "head": jnp.ones((16, 2))}


@pytest.mark.parametrize("is_own_scan", [True, False])
def test_a_scan_of_the_model_itself_over_a_stack_is_seen(is_own_scan, recwarn):
    layers = dm.layers_by_path(STACK, [dm.stacked("blocks"), "head"])
    optimizer = dm.drop_muon(0.05, layers, orthogonalize=KERNEL)
    state = jax.eval_shape(optimizer.init, STACK)

    def loss_fn(params, depth):
        def block(x, kernel):
            return x + jnp.tanh(x @ kernel), None

        if is_own_scan:
            x, _ = jax.lax.scan(block, X, params["blocks"])
        else:
            x, _ = dm.scan_layers(block, X, params["blocks"], depth=layers.stack_depth(depth))
        return jnp.mean((x @ params["head"]) ** 2)

    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    step = dm.train_step(loss_fn, optimizer, sampler)
    if is_own_scan:
        with pytest.warns(dm.planning.DepthWarning, match="a scan of its own"):
            dm.check_depths(step, layers, STACK, state)
    else:
        assert dm.check_depths(step, layers, STACK, state).wasted == ()
        assert not recwarn
