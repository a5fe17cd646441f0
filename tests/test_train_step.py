"""A whole training step: equal to its parts, compiled once a depth, and frozen bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import dropmuon_jax as dm
from meshes import COMPILED_STEPS, Network, graded

NETWORK = Network(is_stacked=False)
LAYERS, NAMES, loss_fn = NETWORK.layers, list(NETWORK.specs), NETWORK.loss
X = jnp.asarray(NETWORK.batch())
KERNEL = dm.orthogonalize.newton_schulz(num_steps=1)
UNIFORM = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=3)


def make_params():
    """New ones, which a step may overwrite; the sign of a zero is a bit too."""
    return {
        name: {"kernel": jnp.asarray(of["kernel"]), "bias": jnp.full(len(of["bias"]), -0.0)}
        for name, of in NETWORK.params.items()
    }


def make_optimizer(layers=LAYERS, momentum=0.9):
    rate = optax.linear_schedule(0.05, 0.0, 60)
    return dm.drop_muon(rate, layers, momentum=momentum, orthogonalize=KERNEL)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def by_hand(optimizer):
    """The step of the documentation, of a static tuple of active layers."""

    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, *args, active):
        mask, second = LAYERS.subset(active), {}
        if optax.tree.get_all_with_path(state, "PrevParamsState"):
            loss, (grads, second["prev_params_grads"]) = dm.masked_value_and_grad_pair(loss_fn)(
                params, dm.prev_params(state, params), *args, layer_mask=mask
            )
        else:
            loss, grads = dm.masked_value_and_grad(loss_fn)(params, *args, layer_mask=mask)
        updates, state = optimizer.update(grads, state, params, layer_mask=mask, **second)
        return optax.apply_updates(params, updates), state, loss

    return step


COSTS = [30.0, 6.0, 1.0]
TIME_AWARE = dm.DepthSampler(LAYERS, dm.time_aware_depth(COSTS, rate=0.25), seed=3)
PAIRS = dm.DepthSampler(LAYERS, dm.sampling.fixed_size_subsets(2), seed=3)
RUNS = {
    "depths": (UNIFORM, make_optimizer()),
    "subsets": (PAIRS, make_optimizer()),
    "two gradients": (UNIFORM, make_optimizer(momentum=dm.mvr_momentum(0.9))),
    "draws that follow the state": (TIME_AWARE, dm.record_gains(make_optimizer(), TIME_AWARE)),
}


@pytest.mark.parametrize(("sampler", "optimizer"), RUNS.values(), ids=RUNS)
def test_it_is_the_parts_bit_for_bit(sampler, optimizer):
    loss_of_any_depth = lambda params, batch: loss_fn(params, batch)  # noqa: E731
    step_fn, parts = dm.train_step(loss_of_any_depth, optimizer, sampler), by_hand(optimizer)
    ours, theirs = ((make_params(), optimizer.init(make_params())) for _ in range(2))
    num_compiled = len(COMPILED_STEPS)
    step_fn.compile(*ours, batch=NETWORK.batch(0))  # of all layers first: others share its trace
    for step in range(20):
        before, batch = copy(ours[0]), NETWORK.batch(step)
        active = sampler.active(step, theirs[1])
        *ours, loss = step_fn(step, *ours, batch=batch)
        *theirs, expected = parts(*theirs, batch, active=active)
        assert loss == expected
        chex.assert_trees_all_equal(tuple(ours), tuple(theirs))
        for name in (name for name, on in zip(NAMES, active, strict=True) if not on):
            assert before[name]["bias"].tobytes() == ours[0][name]["bias"].tobytes()
    assert len(COMPILED_STEPS) - num_compiled == 3


def test_frozen_arrays_are_handed_on_and_never_pass_through_the_executable():
    last = dm.DepthSampler(LAYERS, dm.fixed_depth([0.0, 0.0, 1.0]), seed=0)
    optimizer, params = make_optimizer(), jax.device_put(make_params(), jax.devices()[0])
    step_fn = dm.train_step(loss_fn, optimizer, last)
    params, state, _ = step_fn(0, params, optimizer.init(params), X)
    before = jax.tree.leaves((params, state))
    num_results = len(jax.tree.leaves(step_fn.trace_depth(2, params, state, X).out_info)) - 1
    params, state, _ = step_fn(1, params, state, X)
    same = [old is new for old, new in zip(before, jax.tree.leaves((params, state)), strict=True)]
    assert [old.is_deleted() for old in before] == [not is_same for is_same in same]
    assert same.count(False) == num_results
    is_frozen = [not on for on in jax.tree.leaves(LAYERS.mask(2))]
    assert same[: len(is_frozen)] == is_frozen
    assert sum(same) > 2 * sum(is_frozen)  # their momentum and moments as well


def count_compilations(step_fn, params, state, *args):
    before = len(COMPILED_STEPS)
    for step in range(30):
        params, state, _ = step_fn(step, params, state, *args)
    jax.block_until_ready(params)
    return len(COMPILED_STEPS) - before


KINDS = {
    "arrays": lambda params, state, *batch: (params, state, *batch),
    "of the host": lambda *inputs: jax.tree.map(np.asarray, inputs),
    "committed": lambda *inputs: jax.device_put(inputs, jax.devices()[0]),
    "a committed batch": lambda *inputs: (
        *inputs[:2],
        *jax.device_put(inputs[2:], jax.devices()[0]),
    ),
}


@pytest.mark.parametrize("kind", graded(KINDS, "arrays", "a committed batch"))
@pytest.mark.parametrize("compiles_before", [True, False])
def test_each_depth_is_compiled_once(kind, compiles_before):
    optimizer, params = make_optimizer(), make_params()
    assert {UNIFORM.depth(step) for step in range(30)} == {0, 1, 2}
    step_fn = dm.train_step(loss_fn, optimizer, UNIFORM)
    given = kind(params, optimizer.init(params), X)
    if compiles_before:
        seen, before = [], len(COMPILED_STEPS)
        step_fn.compile(*given, progress=lambda *p: seen.append(p))
        assert len(COMPILED_STEPS) - before == 3
        assert seen == [(1, 3), (2, 3), (3, 3)]
    assert count_compilations(step_fn, *given) == (0 if compiles_before else 3)


def test_weak_types_and_wider_gradients_cost_no_second_compilation():
    params = {"a": jnp.asarray(1.0), "b": jnp.ones((3, 3), jnp.bfloat16)}
    layers = dm.layers_by_path(params, ["a", "b"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)

    def loss_fn(params, x):
        return jnp.sum((params["a"] * x @ params["b"].astype(jnp.float32)) ** 2)

    widen = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.float32), g))
    link = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
    optimizer = optax.chain(widen, optax.scale_by_adam(), optax.scale(-0.01), link)
    step_fn = dm.train_step(loss_fn, optimizer, sampler)
    state, x = optimizer.init(params), X[:, :3]
    dtypes = jax.tree.map(lambda x: x.dtype, (params, state))
    step_fn.compile(*jax.eval_shape(lambda: (params, state)), x)
    assert count_compilations(step_fn, *copy((params, state)), x) == 0
    params, state, _ = step_fn(0, params, state, x)
    assert jax.tree.map(lambda x: x.dtype, (params, state)) == dtypes


POSSIBLE = {
    "one depth": (dm.full_depth(), 1),
    "two": (dm.fixed_depth([0.5, 0.0, 0.5]), 2),
    "all in time": (dm.epoch_shift_depth(10), 3),
    "subsets": (dm.sampling.fixed_size_subsets(2), 3),
    "all in the end": (dm.time_aware_depth([3.0, 2.0, 1.0]), 3),
}


@pytest.mark.parametrize(("distribution", "count"), POSSIBLE.values(), ids=POSSIBLE)
def test_only_possible_depths_are_compiled(distribution, count):
    params = {name: jnp.ones(()) for name in NAMES}
    layers = dm.layers_by_path(params, NAMES)
    sampler, seen = dm.DepthSampler(layers, distribution, seed=0), []
    link = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
    optimizer = optax.chain(optax.sgd(0.1), link)
    if not isinstance(distribution, dm.sampling.LayerDistribution):
        optimizer = dm.record_gains(optimizer, sampler)
    step_fn = dm.train_step(lambda p: p["stem"] * p["mid"] * p["head"], optimizer, sampler)
    state = jax.eval_shape(optimizer.init, params)
    step_fn.compile(params, state, progress=lambda *p: seen.append(p), max_workers=1)
    assert seen[-1] == (count, count)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.stem(x)))))


def module_loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def make_module(module_type=Net):
    """A module, the draws of its layers, and an optimizer."""
    module = module_type(nnx.Rngs(0))
    layers = dm.layers_by_path(nnx.state(module, nnx.Param), [("stem", "norm"), "head"])
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=3)
    return module, sampler, make_optimizer(layers)


def test_an_nnx_module_is_trained_in_place_as_its_state_is():
    """The state is a tree of parameters; what else there is, an argument and auxiliary data."""
    module, sampler, optimizer = make_module()
    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def with_rest(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return module_loss(model, x), nnx.state(model, nnx.Not(nnx.Param))

    step_fn = dm.train_step(module_loss, optimizer, sampler)
    parts = dm.train_step(with_rest, optimizer, sampler, has_aux=True)
    state, other = optimizer.init(nnx.state(module, nnx.Param)), optimizer.init(params)
    before = len(COMPILED_STEPS)
    step_fn.compile(module, state, X)
    assert len(COMPILED_STEPS) - before == 2
    for step in range(10):
        before = len(COMPILED_STEPS)
        returned, state, loss = step_fn(step, module, state, X)
        assert (returned is module, len(COMPILED_STEPS)) == (True, before)
        params, other, (expected, rest) = parts(step, params, other, rest, X)
        assert loss == expected
    chex.assert_trees_all_equal(
        jax.tree.leaves(nnx.state(module, nnx.Param)), jax.tree.leaves(params)
    )
    assert module.dropout.rngs.count[...] == 10
    assert module.norm.mean[...].any()
    # By structure alone, before there are arrays.
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    state = jax.eval_shape(optimizer.init, nnx.state(abstract, nnx.Param))
    assert "dot_general" in str(step_fn.trace_depth(1, abstract, state, X).jaxpr)


def test_a_module_is_stopped_and_resumed_with_its_statistics_and_dropout(tmp_path):
    """As docs/checkpoints.md has it."""

    def fresh():
        module, sampler, optimizer = make_module()
        state = optimizer.init(nnx.state(module, nnx.Param))
        step_fn = dm.train_step(module_loss, optimizer, sampler)
        return module, {"model": nnx.state(module), "opt_state": state}, step_fn

    def train(steps, saved=None):
        module, run, step_fn = fresh()
        if saved is not None:
            with ocp.StandardCheckpointer() as checkpointer:
                run = checkpointer.restore(saved, run)
            nnx.update(module, run["model"])
        state = run["opt_state"]
        for step in steps:
            module, state, _ = step_fn(step, module, state, X)
        return {"model": nnx.state(module), "opt_state": state}

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", train(range(3)))
        checkpointer.wait_until_finished()
    whole, resumed = train(range(6)), train(range(3, 6), tmp_path / "run")
    chex.assert_trees_all_equal(resumed, whole)


def test_a_loss_of_unstacked_layers_gets_the_python_depth():
    optimizer, params, seen = make_optimizer(), make_params(), []
    loss = lambda params, x, *, depth: seen.append(depth) or loss_fn(params, x)  # noqa: E731
    step_fn = dm.train_step(loss, optimizer, UNIFORM)
    step_fn.trace_depth(2, params, optimizer.init(params), X)
    assert seen == [2]


@pytest.mark.parametrize(("depths", "num_traces"), [((0, 2, 1, 0), 1), ((2, 1, 2, 0), 3)])
def test_a_gradient_is_traced_where_none_of_more_layers_is(depths, num_traces):
    optimizer, params, seen = make_optimizer(), make_params(), []
    loss = lambda params, x: seen.append(1) or loss_fn(params, x)  # noqa: E731
    step_fn, state = dm.train_step(loss, optimizer, UNIFORM), optimizer.init(params)
    found = [step_fn.trace_depth(depth, params, state, X).lower() for depth in depths]
    assert len(seen) == num_traces
    for depth, lowered in zip(depths, found, strict=True):
        alone = dm.train_step(loss_fn, optimizer, UNIFORM)
        alone = alone.trace_depth(depth, params, state, X).lower()
        flops = [of.compile().cost_analysis()["flops"] for of in (lowered, alone)]
        assert flops[0] == flops[1]


def test_a_gradient_of_fewer_layers_does_without_one_of_more_that_fails():
    def loss(params, x):
        repeated = lambda _, x: jnp.tanh(x @ params["stem"]["kernel"])  # noqa: E731
        x = jax.lax.fori_loop(0, jnp.int32(x[0, 0]), repeated, x)  # a loop without a gradient
        return jnp.mean(x @ params["head"]["kernel"])

    shapes = {"stem": (4, 4), "head": (4, 2)}
    params = {name: {"kernel": jnp.ones(of)} for name, of in shapes.items()}
    layers = dm.layers_by_path(params, ["stem", "head"])
    optimizer = dm.drop_muon(0.1, layers)
    step_fn = dm.train_step(loss, optimizer, dm.DepthSampler(layers, dm.uniform_depth(), seed=0))
    inputs = params, optimizer.init(params), jnp.ones((3, 4))
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        step_fn.trace_depth(0, *inputs)
    step_fn.trace_depth(1, *inputs)


def test_effects_of_a_backward_pass_are_those_of_active_layers():
    params, seen = make_params(), []

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def watched(kernel, name):
        return kernel

    def gradient(name, _, g):
        jax.debug.callback(lambda: seen.append(name))
        return (g,)

    watched.defvjp(lambda kernel, name: (kernel, None), gradient)

    def loss(params, x):
        kernels = {name: watched(of["kernel"], name) for name, of in params.items()}
        return loss_fn({name: of | {"kernel": kernels[name]} for name, of in params.items()}, x)

    optimizer = make_optimizer()
    step_fn, state = dm.train_step(loss, optimizer, UNIFORM), optimizer.init(params)
    for depth in (0, 2):
        step_fn.trace_depth(depth, params, state, X).lower()
    step = next(step for step in range(30) if UNIFORM.depth(step) == 2)
    jax.block_until_ready(step_fn(step, params, state, X))
    jax.effects_barrier()
    assert seen == ["head"]


def test_a_plain_optimizer_moves_no_inactive_parameter():
    optimizer, params = optax.adamw(0.1, weight_decay=0.1), make_params()
    sampler = dm.DepthSampler(LAYERS, dm.fixed_depth([0.0, 0.0, 1.0]), seed=0)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, donate=False)
    new, _, _ = step_fn(0, params, optimizer.init(params), X)
    chex.assert_trees_all_equal(new["stem"], params["stem"])
    assert (new["head"]["kernel"] != params["head"]["kernel"]).all()
    assert not params["stem"]["kernel"].is_deleted()


# --- Errors name the argument and the way out -----------------------------------------------------


class Sows(Net):
    def __call__(self, x):
        self.seen = nnx.BatchStat(x)
        return super().__call__(x)


def step_of(loss=loss_fn, step=0, state=None, sampler=UNIFORM, kwargs=None, params=None, **options):
    """A step that something is wrong with."""
    optimizer = make_optimizer()
    state = optimizer.init(make_params()) if state is None else state
    params = make_params() if params is None else params
    step_fn = dm.train_step(loss, optimizer, sampler, **options)
    return step_fn(step, params, state, X, **(kwargs or {}))


def steps_of_the_same_arrays():
    params = make_params()
    for _ in range(2):
        step_of(params=params)


def step_of_module(module_type, state=None):
    module, sampler, optimizer = make_module(module_type)
    state = optimizer.init(nnx.state(module, nnx.Param)) if state is None else state
    return dm.train_step(module_loss, optimizer, sampler)(0, module, state, X)


LINK = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
STACK = dm.layers_by_path({"w": jnp.ones((2, 3, 3))}, [dm.stacked("w")])
OF_STACK = dm.DepthSampler(STACK, dm.uniform_depth(), seed=0)
ERRORS = {
    "sampler must be a DepthSampler, got a Layers. Make one": lambda: step_of(sampler=LAYERS),
    "got a LayerMaskSampler. Give its attribute, sampler.draws": lambda: step_of(sampler=LINK),
    "must take the keyword argument `depth`": lambda: step_of(lambda p, x: 0.0, sampler=OF_STACK),
    "loss_fn must be a function": lambda: step_of(3),
    "out_shardings must be a pair": lambda: step_of(out_shardings=jax.devices()[0]),
    "step must be the number of the step": lambda: step_of(step=make_params()),
    "step must be a Python integer, got an array": lambda: step_of(step=jnp.int32(0)),
    "must return a scalar with has_aux=False, got a": lambda: step_of(lambda *_: (0.0, 0)),
    r"must return \(loss, aux\) with has_aux=True, got": lambda: step_of(has_aux=True),
    "The sampler draws the depth": (lambda: step_of(lambda p, x, depth: 0.0, kwargs={"depth": 1})),
    r"not the state of this optimizer.*optimizer.init\(params\)": (
        lambda: step_of(state=jax.tree.map(jnp.atleast_3d, make_optimizer().init(make_params())))
    ),
    r"nnx.state\(module, nnx.Param\)": lambda: step_of_module(Net, optax.EmptyState()),
    "not inside jax.jit": lambda: jax.jit(lambda params: step_of(params=params))(make_params()),
    "not inside jax.jit, jax.lax.scan": (
        lambda: jax.lax.scan(lambda _, step: step_of(step=step), None, jnp.arange(2))
    ),
    "params must be .* leaf 'act' is a function": (
        lambda: step_of(params=make_params() | {"act": jnp.tanh.__wrapped__})
    ),
    r"(?s)deleted.*keep copies, jax.tree.map\(jnp.copy, params\)": steps_of_the_same_arrays,
    r"(?s)train.*bound to its loss: dm.train_step\(functools.partial": (
        lambda: step_of(
            lambda p, x, train: loss_fn(p, x) * (3 if train else 1), kwargs={"train": True}
        )
    ),
    "(?s)mode.*bound to its loss": (
        lambda: step_of(lambda p, x, mode: loss_fn(p, x), kwargs={"mode": "train"})
    ),
    "loss_fn has an argument `depth`, 4 by default": (
        lambda: step_of(functools.partial(lambda params, x, depth: 0.0, depth=4))
    ),
    "The number of a step is for a step alone": (
        lambda: dm.check_depths(dm.train_step(loss_fn, make_optimizer(), UNIFORM), LAYERS, 0, X, X)
    ),
    "loss_fn has added variables": lambda: step_of_module(Sows),
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_name_the_argument_and_the_way_out(words):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        ERRORS[words]()
