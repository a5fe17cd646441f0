"""A whole training step: equal to its parts, compiled once a depth, and frozen bit for bit."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ["stem", "mid", "head"]
X = jax.random.normal(jax.random.key(1), (16, 8))
Y = jnp.sin(X.sum(axis=1, keepdims=True))


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            self.count += 1


COMPILATIONS = Compilations()


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(8, 16), (16, 16), (16, 1)]
    return {
        name: {
            "kernel": jax.random.normal(key, shape) / shape[0] ** 0.5,
            "bias": jnp.full(shape[1], -0.0),
        }
        for name, key, shape in zip(NAMES, keys, shapes, strict=True)
    }


def loss_fn(params, x, y):
    for name in NAMES[:2]:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)


def make_optimizer(layers, momentum=0.9):
    rate = optax.linear_schedule(0.05, 0.0, 60)
    return dm.drop_muon(rate, layers, momentum=momentum, orthogonalize=KERNEL)


DISTRIBUTIONS = {
    "uniform_depth": dm.uniform_depth,
    "fixed_size_subsets": lambda: dm.sampling.fixed_size_subsets(2),
}


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def by_hand(loss_fn, optimizer, layers):
    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, *args, active):
        mask = layers.subset(active)
        loss, grads = dm.masked_value_and_grad(loss_fn)(params, *args, layer_mask=mask)
        updates, state = optimizer.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state, loss

    return step


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_it_is_the_parts_bit_for_bit(distribution):
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    distribution = DISTRIBUTIONS[distribution]()
    sampler = dm.DepthSampler(layers, distribution, seed=3)
    optimizer = make_optimizer(layers)
    step_fn, parts = dm.train_step(loss_fn, optimizer, sampler), by_hand(loss_fn, optimizer, layers)
    state = optimizer.init(params)
    ours, theirs = (copy(params), copy(state)), (params, state)
    for step in range(12):
        before = copy(ours[0])
        *ours, loss = step_fn(step, *ours, X, y=Y)
        active = sampler.active(step)
        *theirs, expected = parts(*theirs, X, Y, active=active)
        assert loss == expected
        chex.assert_trees_all_equal(tuple(ours), tuple(theirs))
        for name, on in zip(NAMES, active, strict=True):
            if not on:
                for old, new in zip(
                    jax.tree.leaves(before[name]), jax.tree.leaves(ours[0][name]), strict=True
                ):
                    assert old.tobytes() == new.tobytes()
    assert step_fn._jitted._cache_size() <= len(sampler.subsets)


def counted_run(step_fn, params, state, *args, steps=30, **kwargs):
    before = COMPILATIONS.count
    for step in range(steps):
        params, state, _ = step_fn(step, params, state, *args, **kwargs)
    jax.block_until_ready(params)
    return COMPILATIONS.count - before


@pytest.mark.parametrize("kind", ["arrays", "abstract", "numpy", "committed", "committed batch"])
@pytest.mark.parametrize("first_compiles", [True, False])
def test_each_depth_is_compiled_once(kind, first_compiles):
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)
    for step in range(30):
        sampler.depth(step)
    optimizer = make_optimizer(layers)
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    state = optimizer.init(params)
    x, y = X, Y
    if kind == "numpy":
        params, x, y = jax.tree.map(np.asarray, (params, x, y))
    if kind == "committed":
        params, state, x, y = jax.device_put((params, state, x, y), jax.devices()[0])
    if kind == "committed batch":
        x, y = jax.device_put((x, y), jax.devices()[0])
    step_of = {sampler.depth(step): step for step in range(30)}
    assert set(step_of) == {0, 1, 2}
    if first_compiles:
        given = params, state, x, y
        if kind == "abstract":
            given = jax.eval_shape(lambda: given)
        seen = []
        before = COMPILATIONS.count
        step_fn.compile(*given, progress=lambda *p: seen.append(p))
        assert COMPILATIONS.count - before <= 5
        assert seen == [(1, 3), (2, 3), (3, 3)]
        assert counted_run(step_fn, params, state, x, y) == 0
    else:
        assert counted_run(step_fn, params, state, x, y) == 3


def test_weak_types_and_wider_gradients_cost_no_second_compilation():
    params = {"a": jnp.asarray(1.0), "b": jnp.ones((3, 3), jnp.bfloat16)}
    layers = dm.layers_by_path(params, ["a", "b"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)
    [sampler.depth(step) for step in range(30)]

    def loss_fn(params, x):
        return jnp.sum((params["a"] * x @ params["b"].astype(jnp.float32)) ** 2)

    widen = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.float32), g))
    optimizer = optax.chain(
        widen,
        optax.scale_by_adam(),
        optax.scale(-0.01),
        dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0),
    )
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    state = optimizer.init(params)
    dtypes = jax.tree.map(lambda x: x.dtype, (params, state))
    step_fn.compile(*jax.eval_shape(lambda: (params, state)), X[:, :3])
    strong = counted_run(step_fn, params, state, X[:, :3])
    assert strong <= 2  # of making the scalars strong
    params = {"a": jnp.asarray(1.0), "b": jnp.ones((3, 3), jnp.bfloat16)}
    params, state, _ = step_fn(0, params, optimizer.init(params), X[:, :3])
    assert jax.tree.map(lambda x: x.dtype, (params, state)) == dtypes


def test_only_possible_depths_are_compiled():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    optimizer = make_optimizer(layers)
    for distribution, count in (
        (dm.full_depth(), 1),
        (dm.fixed_depth([0.5, 0.0, 0.5]), 2),
        (dm.epoch_shift_depth(10), 3),
        (dm.sampling.fixed_size_subsets(2), 3),
        (dm.time_aware_depth([3.0, 2.0, 1.0]), 3),
    ):
        sampler = dm.DepthSampler(layers, distribution, seed=0)
        seen = []
        is_fixed = isinstance(distribution, dm.LayerDistribution)
        of = optimizer if is_fixed else dm.record_gains(optimizer, sampler)
        step_fn = dm.train_step(loss_fn, of, sampler)
        step_fn.compile(
            params,
            jax.eval_shape(of.init, params),
            X,
            Y,
            progress=lambda *p, seen=seen: seen.append(p),
            max_workers=1,
        )
        assert seen[-1] == (count, count), distribution


def test_adaptive_draws_follow_the_state():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(
        layers, dm.time_aware_depth([3.0, 2.0, 1.0], steps_per_plan=4), seed=3
    )
    optimizer = dm.record_gains(make_optimizer(layers), sampler)
    step_fn, parts = dm.train_step(loss_fn, optimizer, sampler), by_hand(loss_fn, optimizer, layers)
    state = optimizer.init(params)
    ours, theirs = (copy(params), copy(state)), (params, state)
    for step in range(20):
        *ours, loss = step_fn(step, *ours, X, Y)
        *theirs, expected = parts(*theirs, X, Y, active=sampler.active(step, theirs[1]))
        assert loss == expected
    chex.assert_trees_all_equal(tuple(ours), tuple(theirs))
    assert step_fn._jitted._cache_size() == 3


def test_the_second_gradient_is_taken_where_the_state_keeps_parameters():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)
    optimizer = make_optimizer(layers, dm.mvr_momentum(0.9))

    @functools.partial(jax.jit, static_argnames="depth")
    def parts(params, state, x, y, depth):
        mask = layers.mask(depth)
        loss, (grads, second) = dm.masked_value_and_grad_pair(loss_fn)(
            params, dm.prev_params(state, params), x, y, layer_mask=mask
        )
        updates, state = optimizer.update(
            grads, state, params, layer_mask=mask, prev_params_grads=second
        )
        return optax.apply_updates(params, updates), state, loss

    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    state = optimizer.init(params)
    ours, theirs = (copy(params), copy(state)), (params, state)
    for step in range(8):
        x = jax.random.normal(jax.random.key(step), X.shape)
        *ours, loss = step_fn(step, *ours, x, Y)
        *theirs, expected = parts(*theirs, x, Y, depth=sampler.depth(step))
        assert loss == expected
    chex.assert_trees_all_equal(tuple(ours), tuple(theirs))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.stem(x)))))


def test_an_nnx_module_is_trained_in_place():
    def loss_fn(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    module = Net(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    layers = dm.layers_by_path(params, [("stem", "norm"), "head"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)
    optimizer = make_optimizer(layers)
    state = optimizer.init(nnx.state(module, nnx.Param))
    other = optimizer.init(params)

    def with_rest(params, rest, x, y):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(model, x, y), nnx.state(model, nnx.Not(nnx.Param))

    parts = dm.train_step(with_rest, optimizer, sampler, has_aux=True)
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    [sampler.depth(step) for step in range(10)]
    before = COMPILATIONS.count
    step_fn.compile(module, state, X, Y)
    assert COMPILATIONS.count - before == 2
    before = COMPILATIONS.count
    losses = []
    for step in range(10):
        returned, state, loss = step_fn(step, module, state, X, Y)
        assert returned is module
        losses.append(loss)
    jax.block_until_ready(losses)
    assert COMPILATIONS.count == before
    expected = []
    for step in range(10):
        params, other, (loss, rest) = parts(step, params, other, rest, X, Y)
        expected.append(loss)
    np.testing.assert_array_equal(losses, expected)
    chex.assert_trees_all_equal(
        jax.tree.leaves(nnx.state(module, nnx.Param)), jax.tree.leaves(params)
    )
    assert module.dropout.rngs.count[...] == 10
    assert module.norm.mean[...].any()
    module.eval()
    assert jnp.isfinite(module(X)).all()
    # By structure alone, before there are arrays.
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    traced = step_fn.trace_depth(
        1, abstract, jax.eval_shape(optimizer.init, nnx.state(abstract, nnx.Param)), X, Y
    )
    assert traced.lower().compile().cost_analysis()["flops"] > 0


def test_a_pure_nnx_state_is_a_tree():
    graphdef, params = nnx.split(nnx.Linear(8, 1, rngs=nnx.Rngs(0)), nnx.Param)
    layers = dm.layers_by_path(params, [("kernel", "bias")])
    optimizer = make_optimizer(layers)
    step_fn = dm.train_step(
        lambda params, x, y: jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2),
        optimizer,
        dm.DepthSampler(layers, dm.full_depth(), seed=0),
    )
    state, losses = optimizer.init(params), []
    for step in range(20):
        params, state, loss = step_fn(step, params, state, X, Y)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_linen_batch_statistics_are_an_argument_and_auxiliary():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(16)(x)))
            return nn.Dense(1)(x)

    model = Model()
    variables = model.init(jax.random.key(0), X)
    params, stats = variables["params"], variables["batch_stats"]
    layers = dm.layers_by_path(params, [("Dense_0", "BatchNorm_0"), "Dense_1"])

    def loss_fn(params, stats, x, y):
        out, new = model.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    optimizer = make_optimizer(layers)
    step_fn = dm.train_step(
        loss_fn, optimizer, dm.DepthSampler(layers, dm.uniform_depth(), seed=0), has_aux=True
    )
    state = optimizer.init(params)
    for step in range(10):
        params, state, (loss, stats) = step_fn(step, params, state, stats, X, Y)
    assert jnp.isfinite(loss)
    assert jax.tree.leaves(stats)[0].any()
    assert step_fn._jitted._cache_size() == 2


STACKED = {"embed": (8, 8), "blocks": (4, 8, 8), "head": (8, 1)}


def stacked_params():
    keys = dict(zip(STACKED, jax.random.split(jax.random.key(0), 3), strict=True))
    return {k: jax.random.normal(keys[k], s) / s[-2] ** 0.5 for k, s in STACKED.items()}


def stacked_layers():
    return dm.layers_by_path(stacked_params(), ["embed", dm.stacked("blocks"), "head"])


def stacked_loss(params, x, y, depth):
    layers = stacked_layers()
    x, _ = dm.scan_layers(
        lambda x, w: (x + jnp.tanh(x @ w), None),
        x @ params["embed"],
        params["blocks"],
        depth=layers.stack_depth(depth),
    )
    return jnp.mean((x @ params["head"] - y) ** 2)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_stacks_need_one_executable(distribution):
    params, layers = stacked_params(), stacked_layers()
    distribution = DISTRIBUTIONS[distribution]()
    sampler = dm.DepthSampler(layers, distribution, seed=3)
    [sampler.active(step) for step in range(12)]
    optimizer = dm.drop_muon(0.05, layers, orthogonalize=KERNEL)
    step_fn = dm.train_step(stacked_loss, optimizer, sampler)
    state = optimizer.init(params)
    seen = []
    step_fn.compile(params, state, X, Y, progress=lambda *p: seen.append(p))
    assert seen == [(1, 1)]

    @functools.partial(jax.jit, static_argnames="active")
    def parts(params, state, *args, active):
        mask = layers.subset(active)
        _, grads = dm.masked_value_and_grad(stacked_loss)(
            params, *args, active.index(True), layer_mask=mask
        )
        updates, state = optimizer.update(grads, state, params, layer_mask=mask)
        return optax.apply_updates(params, updates), state

    ours, theirs = (copy(params), copy(state)), (params, state)
    for step in range(12):
        was = copy(ours[0])
        *ours, _ = step_fn(step, *ours, X, Y)
        for i, on in enumerate(sampler.active(step)[1:5]):
            assert on or ours[0]["blocks"][i].tobytes() == was["blocks"][i].tobytes()
    for step in range(12):
        theirs = parts(*theirs, X, Y, active=sampler.active(step))
    chex.assert_trees_all_close(tuple(ours), tuple(theirs), rtol=1e-3, atol=1e-3)
    assert step_fn._jitted._cache_size() == 1


def test_a_loss_of_unstacked_layers_gets_the_python_depth():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    seen = set()

    def of_depth(params, x, y, *, depth):
        seen.add(depth)
        return loss_fn(params, x, y)

    optimizer = make_optimizer(layers)
    step_fn = dm.train_step(
        of_depth, optimizer, dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    )
    step_fn.compile(params, optimizer.init(params), X, Y)
    assert seen == {0, 1, 2}


def test_errors_name_the_argument_and_the_way_out():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
    optimizer = make_optimizer(layers)
    link = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
    state = optimizer.init(params)
    make = functools.partial(dm.train_step, loss_fn, optimizer)
    with pytest.raises(
        TypeError,
        match=r"must be a DepthSampler, got a LayerMaskSampler. Give its attribute, sampler.draws",
    ):
        make(link)
    with pytest.raises(TypeError, match=r"sampler must be a DepthSampler, got a Layers. Make one"):
        make(layers)
    with pytest.raises(
        TypeError, match=r"GradientTransformationExtraArgs\(steps.init, steps.update\)"
    ):
        dm.train_step(loss_fn, optax.MultiSteps(optimizer, 2), sampler)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        dm.train_step(3, optimizer, sampler)
    with pytest.raises(TypeError, match="out_shardings must be a pair"):
        make(sampler, out_shardings=jax.devices()[0])
    step_fn = make(sampler)
    with pytest.raises(TypeError, match="step must be the number of the step"):
        step_fn(params, state, X, Y)
    with pytest.raises(TypeError, match="step must be a Python integer, got an array"):
        step_fn(jnp.int32(0), params, state, X, Y)
    with pytest.raises(
        ValueError,
        match=r"is not the state of this optimizer.*Make it with optimizer.init\(params\)",
    ):
        step_fn(0, params, optax.adam(1e-3).init(params), X, Y)
    with pytest.raises(
        TypeError, match="loss_fn must return a scalar with has_aux=False, got a tuple"
    ):
        dm.train_step(lambda *a: (loss_fn(*a), 0), optimizer, sampler)(0, params, state, X, Y)
    with pytest.raises(
        TypeError, match=r"loss_fn must return \(loss, aux\) with has_aux=True, got"
    ):
        dm.train_step(loss_fn, optimizer, sampler, has_aux=True)(0, params, state, X, Y)
    with pytest.raises(TypeError, match="must take the keyword argument `depth`"):
        dm.train_step(
            loss_fn, optimizer, dm.DepthSampler(stacked_layers(), dm.uniform_depth(), seed=0)
        )
    with pytest.raises(TypeError, match="The sampler draws the depth"):
        dm.train_step(lambda p, x, y, depth: loss_fn(p, x, y), optimizer, sampler)(
            0, params, state, X, Y, depth=1
        )
    with pytest.raises(ValueError, match="in no layer"):
        step_fn(0, {"a": jnp.ones(3)}, optimizer.init(params), X, Y)
    module = Net(nnx.Rngs(0))
    of_module = dm.layers_by_path(nnx.state(module, nnx.Param), [("stem", "norm"), "head"])
    step_fn = dm.train_step(
        lambda m, x, y: jnp.mean((m(x) - y) ** 2),
        make_optimizer(of_module),
        dm.DepthSampler(of_module, dm.uniform_depth(), seed=0),
    )
    with pytest.raises(ValueError, match=r"nnx.state\(module, nnx.Param\)"):
        step_fn(0, module, state, X, Y)

    class Sows(Net):
        def __call__(self, x):
            self.seen = nnx.BatchStat(x)
            return super().__call__(x)

    module = Sows(nnx.Rngs(0))
    optimizer = make_optimizer(of_module)
    with pytest.raises(TypeError, match="loss_fn has added variables"):
        step_fn(0, module, optimizer.init(nnx.state(module, nnx.Param)), X, Y)


def test_a_plain_optimizer_moves_no_inactive_parameter():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.fixed_depth([0.0, 0.0, 1.0]), seed=0)
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, donate=False)
    new, _, _ = step_fn(0, params, optimizer.init(params), X, Y)
    chex.assert_trees_all_equal(new["stem"], params["stem"])
    assert (new["head"]["kernel"] != params["head"]["kernel"]).all()
    assert not params["stem"]["kernel"].is_deleted()


def test_micro_batches_of_a_step_share_a_depth():
    params = make_params()
    layers = dm.layers_by_path(params, NAMES)
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0, steps_per_draw=2)
    steps = optax.MultiSteps(make_optimizer(layers), 2)
    optimizer = optax.GradientTransformationExtraArgs(steps.init, steps.update)
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    state, losses = optimizer.init(params), []
    for step in range(40):
        before = copy(params)
        params, state, loss = step_fn(step, params, state, X, Y)
        losses.append(float(loss))
        if step % 2 == 0:
            chex.assert_trees_all_equal(before, params)
    assert losses[-1] < losses[0]
    assert step_fn._jitted._cache_size() == 3
