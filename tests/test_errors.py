"""Bad input: every message names the leaf or the argument, and says the way out."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Numbers

import dropmuon_jax as dm

PARAMS = {
    "stem": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "mid": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)},
    "head": {"kernel": jnp.ones((5, 2)), "bias": jnp.ones(2)},
}
KERNELS = {name: {"kernel": layer["kernel"]} for name, layer in PARAMS.items()}
WITH_TAIL = PARAMS | {"tail": jnp.ones(2)}
X = jnp.ones((1, 2))
ROWS = np.arange(5) > 1
ADAPTIVE = dm.schedules.adaptive_radius(1.0)
LONGER = jax.tree.map(lambda leaf: leaf[None], PARAMS)
NAMES = ["stem", "mid", "head"]
LAYERS = dm.layers_by_path(PARAMS, NAMES)
STACK = {"embed": jnp.ones((3, 4)), "blocks": {"w": jnp.ones((5, 4, 4)), "b": jnp.ones((5, 4))}}
STACK_LAYERS = dm.layers_by_path(STACK, ["embed", dm.stacked("blocks")])
UNIFORM = dm.uniform_depth()
SAMPLER = dm.DepthSampler(LAYERS, UNIFORM, seed=0)
ADAPTIVE_SAMPLER = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=0)
LINK = dm.layer_mask_sampler(LAYERS, UNIFORM, seed=0)
RADII = dict.fromkeys(dm.layers.ROLES, 1.0)
LMO, MVR = dm.newton_schulz_lmo(), dm.mvr_momentum()
MUON_MVR = dm.muon(0.1, momentum=MVR)
newton_schulz, newton_schulz_lmo = dm.orthogonalize.newton_schulz, dm.newton_schulz_lmo
polar_express = dm.orthogonalize.polar_express_coefficients
norms, schedules, mars_momentum = dm.norms, dm.schedules, dm.transforms.mars_momentum
MARS, KEEPER = mars_momentum(), dm.transforms.keep_prev_params()
rms_lmo = functools.partial(dm.norm_lmo, norms.rms_norm())
sharp = functools.partial(dm.transforms.norm_sharp, norms.rms_norm())


def loss_fn(params: Any) -> jax.Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def by_path(*patterns: Any, params: Any = PARAMS) -> dm.Layers:
    return dm.layers_by_path(params, patterns)


def stack_of(*shapes: tuple[int, ...], axis: Any = 0) -> dm.Layers:
    params = {name: jnp.ones(shape) for name, shape in zip("ab", shapes, strict=False)}
    return dm.layers_by_path(params, [dm.stacked("*", axis=axis)])


def sampler(distribution: Any = UNIFORM, **kwargs: Any) -> Any:
    return dm.DepthSampler(LAYERS, distribution, **{"seed": 0, **kwargs})


def sampler_of(probabilities: Any, subsets: Any = dm.sampling.depth_subsets) -> Any:
    return sampler(dm.LayerDistribution(subsets, probabilities))


def drop_muon(learning_rate: Any = 0.1, **kwargs: Any) -> Any:
    return dm.drop_muon(learning_rate, LAYERS, **kwargs)


def scion(learning_rate: Any = 0.1, radii: Any = RADII, **kwargs: Any) -> Any:
    return dm.scion(learning_rate, radii, **kwargs).init(KERNELS)


def scion_init(radii: Any) -> Any:
    return dm.optimizers.scion_init(jax.random.key(0), {"head": jnp.eye(3)}, radii)


def orthogonalized(kernel: Any) -> Any:
    return updated(dm.norm_lmo(norms.spectral_norm(orthogonalize=kernel)), KERNELS)


def updated(tx: optax.GradientTransformation, params: Any = PARAMS, **extra_args: Any) -> Any:
    tx = optax.with_extra_args_support(tx)
    return tx.update(params, tx.init(params), params, **extra_args)


def updated_from(state_of: Any, tx: Any = MVR, params: Any = PARAMS) -> Any:
    """An update with the state of another transformation, or other parameters."""
    return tx.update(PARAMS, state_of.init(PARAMS), params, prev_params_grads=PARAMS)


def step_without_params() -> Any:
    tx = dm.scion(0.1, RADII)
    return tx.update(KERNELS, tx.init(KERNELS))


def injected(factory: Any, **arguments: Any) -> Any:
    return optax.inject_hyperparams(factory)(**arguments).init(KERNELS)


def gradients(**kwargs: Any) -> Any:
    return dm.masked_value_and_grad(loss_fn)(PARAMS, **kwargs)


def pair(prev_params: Any = PARAMS, **kwargs: Any) -> Any:
    return dm.masked_value_and_grad_pair(loss_fn)(PARAMS, prev_params, **kwargs)


def axes(shape: tuple[int, ...], numbers: Any = None, name: str = "kernel") -> Any:
    return newton_schulz_lmo(dimension_numbers=numbers).init({"net": {name: jnp.ones(shape)}})


def labels(numbers: Any = None, **shapes: tuple[int, ...]) -> Any:
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    return dm.Roles().labels(params, numbers)


def step_of_stack(layer_mask: Any, layers: dm.Layers = STACK_LAYERS) -> Any:
    return updated(dm.per_layer(optax.sgd(0.1), layers), STACK, layer_mask=layer_mask)


def stack_mask(w: Any, b: Any, embed: Any = True) -> Any:
    return {"embed": embed, "blocks": {"w": w, "b": b}}


def check(optimizer: Any, layers: Any = None, params: Any = PARAMS) -> None:
    dm.check_optimizer(optimizer, params, layers)


def scan(
    xs: Any = STACK["blocks"], f: Any = None, init: Any = None, depth: Any = 0, axis: Any = 0
) -> Any:
    def layer(carry, row):
        return carry @ row["w"], None

    init = jnp.ones(4) if init is None else init
    return dm.scan_layers(f or layer, init, xs, depth=depth, axis=axis)


# --- Hyper-parameters -----------------------------------------------------------------------------

# From the name in the message to what takes the value.
POSITIVE = {
    "radius": (
        *(newton_schulz_lmo, rms_lmo, schedules.gluon_radius, schedules.mvr_radius),
        norms.sign_norm().initializer,
    ),
    "radius['head']": (lambda value: rms_lmo({"stem": 1.0, "head": value}),),
    "step_size": (sharp,),
    "max_norm": (lambda value: mars_momentum(max_norm=value),),
    "ease": (lambda value: polar_express(5, ease=value),),
    "radii['head']": (lambda value: scion(radii=RADII | {"head": value}),),
    "flops_per_byte": (lambda value: dm.on_mesh(LMO, flops_per_byte=value),),
}
NOT_NEGATIVE = {
    "learning_rate": (drop_muon, dm.muon, dm.gluon, scion),
    "auxiliary_learning_rate": (lambda value: drop_muon(auxiliary_learning_rate=value),),
    "weight_decay": (lambda value: drop_muon(weight_decay=value),),
    "gamma": (lambda value: mars_momentum(gamma=value),),
    "alpha": (lambda value: dm.epoch_shift_depth(10, alpha=value),),
    "l0": (schedules.adaptive_radius,),
    "l1": (lambda value: schedules.adaptive_radius(1.0, value),),
}
DECAYS = {"decay": (dm.momentum, dm.mvr_momentum, mars_momentum)}
KINDS = {
    "must be positive and finite": (POSITIVE, (0.0, -1.0, np.inf, np.nan)),
    "must be at least 0 and finite": (NOT_NEGATIVE, (-1.0, np.inf, np.nan)),
    "is the weight of the past and must lie in [0, 1)": (DECAYS, (1.0, -0.1, np.nan)),
}


def assert_raises(exception: type[Exception], message: str, call: Any, *args: Any) -> None:
    """The words of the message, where … stands for anything between them."""
    words = ".*".join(map(re.escape, message.split(" … ")))
    with pytest.raises(exception, match=f"(?s){words}"):
        call(*args)


@pytest.mark.parametrize(
    ("name", "takers", "kind", "bad_values"),
    [
        pytest.param(name, takers, kind, values, id=name)
        for kind, (table, values) in KINDS.items()
        for name, takers in table.items()
    ],
)
def test_a_number_out_of_its_range_and_what_is_no_number_are_named(name, takers, kind, bad_values):
    for take in takers:
        for value in bad_values:
            assert_raises(ValueError, f"{name} {kind}, got {value}", take, value)
        for value in ("0.1", True):
            assert_raises(TypeError, f"{name} must be a number … got {value!r}", take, value)
        assert_raises(ValueError, f"{name} must be one number, got an array", take, jnp.ones(2))


# The smallest value of each, and what takes it.
INTEGERS = {
    "num_steps": (1, newton_schulz_lmo, newton_schulz, dm.epoch_shift_depth, polar_express),
    "memory_limit": (1, newton_schulz_lmo, rms_lmo),
    "variant": (1, dm.mvr_momentum),
    "steps_per_draw": (1, sampler),
    "size": (1, dm.sampling.fixed_size_subsets),
    "num_groups": (1, LAYERS.group),
    "level": (1, functools.partial(dm.trace_layers, loss_fn, PARAMS)),
    "depth": (0, LAYERS.mask, STACK_LAYERS.stack_depth, functools.partial(updated, drop_muon())),
    "step": (0, SAMPLER.depth),
    "seed": (0, sampler),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_what_must_be_a_python_integer_is_named(name):
    minimum, *takers = INTEGERS[name]
    for take in takers:
        bad = functools.partial(lambda take, value: take(**{name: value}), take)
        below = minimum - 1
        assert_raises(ValueError, f"{name} must be at least {minimum}, got {below}", bad, below)
        assert_raises(TypeError, f"{name} must be a Python integer, got a truth value", bad, True)
        assert_raises(TypeError, f"{name} must be a Python integer, got 1.5", bad, 1.5)
        if name not in ("depth", "seed"):  # which stacks and sampler.sample take
            array = jnp.int32(2)
            assert_raises(TypeError, f"{name} must be a Python integer, got an array", bad, array)


# From the argument to a word that is nearly one of those known, and what takes it.
CHOICES = {
    "shape_factor": ("moonligth", "moonlight", newton_schulz_lmo, norms.spectral_norm, drop_muon),
    "coefficients": ("polar_expres", "polar_express", newton_schulz_lmo, newton_schulz),
    "preconditioning": ("schaten", "schatten", newton_schulz_lmo, newton_schulz),
    "precision": ("hihgest", "highest", newton_schulz_lmo, newton_schulz),
    "dimension_numbers": ("in-out", "in_out", newton_schulz_lmo, rms_lmo, scion),
    "start": ("zeros", "zero", dm.mvr_momentum),
    "on_reactivate": ("correkt", "correct", dm.mvr_momentum),
    "layout": ("owners", "owner", functools.partial(dm.on_mesh, LMO)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_misspelt_choice_is_told_the_right_one(name):
    word, meant, *takers = CHOICES[name]
    for take in takers:
        with pytest.raises(ValueError, match=rf"{name} must be one of .* Did you mean '{meant}'"):
            take(**{name: word})


def test_an_argument_of_optax_muon_names_what_says_the_same_here():
    ours, theirs = map(inspect.signature, (dm.muon, optax.contrib.muon))
    for name in theirs.parameters.keys() - ours.parameters.keys():
        for muon in (functools.partial(dm.muon, 0.1), drop_muon):
            with pytest.raises(TypeError, match=f"muon.. has no argument '{name}': say .*"):
                muon(**{name: None})


# --- One by one -----------------------------------------------------------------------------------

ERRORS: list[Any] = []


def bad(exception: type[Exception], message: str, call: Any, *args: Any, **kwargs: Any) -> None:
    """Notes a call that must raise an exception, and the words of its message."""
    call = functools.partial(call, *args, **kwargs)
    ERRORS.append(pytest.param(exception, message, call, id=message))


bad_value, bad_type = functools.partial(bad, ValueError), functools.partial(bad, TypeError)

# What is of the wrong kind.
for name, take, schedule in (
    ("radius", rms_lmo, schedules.gluon_radius),
    ("radius", newton_schulz_lmo, schedules.adaptive_radius),
    ("decay", dm.momentum, schedules.gluon_decay),
    ("decay", dm.mvr_momentum, schedules.mvr_decay),
    ("q", functools.partial(dm.mvr_momentum, variant=2), schedules.mvr_q),
    ("learning_rate", dm.muon, schedules.star_convex_rate),
    ("learning_rate", dm.gluon, schedules.mvr_radius),
    ("learning_rate", scion, schedules.gluon_radius),
):
    message = f"{name} is dm.schedules.{schedule.__name__} itself: call it"
    bad_type(message, take, **{name: schedule})
# One rate is for all: several would be rates along the axes of the leaves that they fit.
for name in ("learning_rate", "auxiliary_learning_rate", "weight_decay"):
    tx = dm.muon(**{"learning_rate": 0.1, name: lambda count: jnp.ones(5) / (count + 1)})
    bad_value(f"{name}, a schedule, must be one number, got an array of shape (5,)", updated, tx)
for take in (dm.momentum, dm.mvr_momentum, mars_momentum, dm.transforms.keep_prev_params):
    bad_type("dtype must be of a floating-point dtype, got int32", take, dtype=jnp.int32)
bad_type("prev_params_dtype … got int8", dm.mvr_momentum, prev_params_dtype=jnp.int8)
bad_type("dtype must be a dtype, such as jnp.bfloat16, got 'bf16'", dm.momentum, dtype="bf16")
bad_type("dtype must be a dtype, got an array … static_args", dm.momentum, dtype=jnp.ones(()))
NO_LAYERS = "layers must be made by layers_by_path or trace_layers, got a list"
bad_type(NO_LAYERS, dm.DepthSampler, NAMES, UNIFORM, seed=0)
bad_type(NO_LAYERS, dm.layer_mask_sampler, NAMES, UNIFORM, seed=0)
bad_type(NO_LAYERS, dm.per_layer, optax.adam(0.1), NAMES)
for take in (dm.drop_muon, dm.drop_gluon, functools.partial(dm.drop_scion, radii=RADII)):
    bad_type(NO_LAYERS, take, 0.1, NAMES)
bad_type(
    "inner must be an optax.GradientTransformation, got a Layers", dm.per_layer, LAYERS, LAYERS
)
bad_type("inner must be an optax.Gradient", dm.record_gains, 0.1, ADAPTIVE_SAMPLER)
bad_type("transforms['all'] must be an optax.Gradient", dm.chain_subtrees, {"all": 0.1}, "all")
bad_type("spectral_norm(orthogonalize=…)", dm.chain_subtrees, {"all": newton_schulz()}, "all")
bad_type("momentum must be an optax.GradientTransformation, got a list", drop_muon, momentum=[])
bad_type("momentum must be an optax.GradientTransformation, got a list", scion, momentum=[0.9])
bad_type("auxiliary must be an optax.GradientTransformation", drop_muon, auxiliary=0.1)
bad_type("optimizer must be an optax.GradientTransformation", check, 0.1)
bad_type("transformation must be an optax.GradientTransformation", dm.on_mesh, 0.1)
bad_type("transformation must be an optax.Gradient", dm.state_shardings, 0.1, KERNELS)
STEPS = optax.MultiSteps(drop_muon(), 2)
bad_type("got a MultiSteps … (steps.init, steps.update)", dm.train_step, loss_fn, STEPS, SAMPLER)

# Layers by path and by trace.
bad_value("'mit' matches no leaf … 'mid'? … stem/kernel", by_path, "stem", "mit", "head")
bad_value("'mid/krnel' … Did you mean 'mid/kernel'?", by_path, "stem", "mid/krnel", "head")
bad_value("Did you mean 'mid/kernel'?", by_path, "stem", "mid.kernel", "head")
bad_value("Did you mean 'mid/kernel'?", by_path, "stem", "['mid']['kernel']", "head")
bad_value("No pattern … add a pattern … mid/bias … mid/kernel", by_path, "stem", "head")
bad_value("'head/bias' matches both 'head' and '*/bias' … Write more", by_path, *NAMES, "*/bias")
bad_value("patterns is empty; give one pattern for each layer", by_path)
bad_type("patterns must be a sequence … got 'stem'", dm.layers_by_path, PARAMS, "stem")
bad_type("patterns must be a sequence", dm.layers_by_path, STACK, dm.stacked("blocks"))
bad_type("patterns must be a sequence … got 3", dm.layers_by_path, PARAMS, 3)
bad_type("patterns must be a sequence", dm.layers_by_path, PARAMS, {"stem": 0, "head": 1})
bad_type("one or more nonempty string patterns, got (3,)", by_path, "stem", "mid", 3)
bad_type("one or more nonempty string patterns, got (4,)", by_path, "stem", "mid", (4,))
bad_type("nonempty string patterns, got ()", dm.stacked)
bad_type("dm.stacked(…) is an entry of its own", by_path, ("embed", dm.stacked("blocks")))
bad_value(
    "the leaves ['b'] … dm.layers_by_path", dm.trace_layers, lambda p: p["a"], {"a": X, "b": X}
)
bad_type("level … functools.partial", dm.trace_layers, loss_fn, PARAMS, level=True)
bad_value("depth must be at most 2, with 3 layers, got 3", LAYERS.mask, 3)
bad_value("depth must be at most 2, with 3 layers, got 3", updated, drop_muon(), depth=3)
bad_value("active must have 3 entries … stem, mid, head; got 2", LAYERS.subset, [True, False])
bad_type("active must hold Python booleans, got 1", LAYERS.subset, [1, 0, 1])
bad_value("num_groups must be at most 3, the number of layers, got 4", LAYERS.group, 4)
bad_value("layer_costs must be 3 … got [1.0, 2.0]", LAYERS.group, 2, layer_costs=[1.0, 2.0])
bad_value("layer_costs must be 3 nonnegative … -2", LAYERS.group, 2, layer_costs=[1, -2, 1])
for tx in (dm.per_layer(optax.sgd(0.1), LAYERS), drop_muon(), LINK):
    bad_value("'tail' is in no layer … 'head/bias' … Make the layers from", tx.init, WITH_TAIL)
bad_value(
    "'0' is in no layer … a list from a dict", dm.layers_by_path([X], ["0"]).rows_of, {"0": X}
)

# Stacked layers.
bad_value("stack '*' … 'a' has shape (3, 2), and 'b' (4, 2)", stack_of, (3, 2), (4, 2))
bad_value("'b' (). A leaf that is not stacked belongs to a layer of its own", stack_of, (3, 2), ())
bad_value("an axis 0 of one size, an entry for each layer", stack_of, (0, 2))
bad_value(
    "an axis 1 … 'a' has shape (2, 3), and 'b' (3,) … axis=axis", stack_of, (2, 3), (3,), axis=1
)
bad_value("an axis -2 … 'a' has shape (2, 3), and 'b' (3, 3)", stack_of, (2, 3), (3, 3), axis=-2)
bad_value("an axis -3 … 'a' has shape (2, 3)", stack_of, (2, 3), axis=-3)
for axis in (0.5, True, (0, 1), jnp.int32(1)):
    bad_type("axis must be a Python integer … from -1 for the last", stack_of, (2, 3), axis=axis)
bad_value("stack must be … 'block'. Did you mean 'blocks'?", STACK_LAYERS.stack_depth, 1, "block")
TWO_STACKS = dm.layers_by_path({"a": X, "b": X}, [dm.stacked("a"), dm.stacked("b")])
bad_value("several stacks, ['a', 'b']: say which, stack='a'", TWO_STACKS.stack_depth, 1)
bad_value("stack_depth needs stacked layers, and there are none", LAYERS.stack_depth, 1)
bad_value("depth must be at most 5, with 6 layers, got 6", STACK_LAYERS.stack_depth, 6)
bad_type("depth must be one integer, got an array of float32[]", STACK_LAYERS.mask, jnp.ones(()))
bad_type("must be one integer, got an array of int32[2]", jax.jit(STACK_LAYERS.mask), jnp.arange(2))
bad_value("(4,) at 'blocks/b', and the leaf (5, 4)", step_of_stack, stack_mask(ROWS[:4], ROWS[:4]))
bad_value("at 'blocks/w' … another leaf of layer", step_of_stack, stack_mask(ROWS, ~ROWS))
bad_value("along axis 0 of 'embed', which is not", step_of_stack, stack_mask(ROWS, ROWS, ROWS[:3]))
bad_value("splits a layer at 'blocks/", step_of_stack, STACK_LAYERS.mask(2), STACK_LAYERS.group(2))
bad_value(
    "axis 1 of 'blocks/b', which is not stacked so", step_of_stack, stack_mask(ROWS, ROWS[None, :4])
)
bad_type("Python booleans … 'blocks/b'", step_of_stack, stack_mask(np.ones(5), np.ones(5)))
bad_type(
    "tells the layers of the stack 'blocks/b' apart … dm.per_layer(…, layers, takes_mask=True)",
    *(step_of_stack, STACK_LAYERS.mask(3), by_path("embed", "blocks", params=STACK)),
)
for tx in (dm.momentum(), MVR, MARS, KEEPER, newton_schulz_lmo(dimension_numbers=Numbers(1, 2))):
    bad_type(
        "tells the layers of the stack 'w' apart … dm.per_layer(…, layers, takes_mask=True)",
        *(updated, tx, {"w": jnp.ones((3, 2, 2))}),
        layer_mask={"w": np.arange(3) > 1},
    )
bad_value(
    "'blocks/w' has shape (4, 4), and the stack 'blocks' 5 layers … another dm.per_layer",
    dm.drop_muon(0.1, STACK_LAYERS, momentum=dm.per_layer(optax.trace(0.9), STACK_LAYERS)).init,
    STACK,
)
bad_type("leave takes_mask out", dm.per_layer, optax.scale_by_adam(), STACK_LAYERS, takes_mask=True)

# Scans over them.
bad_value("xs has no leaves: give the stacked parameters", scan, {})
bad_value("'key' has shape (4,), and 'w' (5, 4)", scan, {"w": jnp.ones((5, 4)), "key": jnp.ones(4)})
bad_value(
    "'t' of xs has shape (), and no axis 0 … f can close", scan, {"w": jnp.ones((5, 4)), "t": 1.0}
)
bad_value("'b' of xs has shape (5, 4), and no axis 2 … axis=(1, 0) for a pair", scan, axis=2)
bad_value("a tree of integers with the structure of xs or a prefix of it", scan, axis=(1, 0))
bad_value("'b' has shape (5, 4), and 'w' (5, 4, 4), of which it is 0", scan, axis={"w": 0, "b": 1})
bad_type("axis must be a Python integer, got 0.5", scan, axis=0.5)
bad_value("depth must be at least 0, got -1", scan, depth=-1)
bad_value("depth must be at most 5 … got 6 … layers.stack_depth", scan, depth=6)
bad_type("depth must be a Python integer, got 0.5", scan, depth=0.5)
bad_type("depth must be one integer, got an array of float32[]", scan, depth=jnp.ones(()))
bad_type("a pair … got one array … return carry, None", scan, f=lambda carry, row: carry)
bad_type("PyTreeDef(*) … PyTreeDef((*, *))", scan, f=lambda carry, row: ((carry, carry), None))
bad_type(
    "float32[4] and becomes bfloat16[4]", scan, f=lambda c, row: (c.astype(jnp.bfloat16), None)
)
bad_type(
    "'0' of the carry is float32[4] and becomes",
    scan,
    f=lambda c, row: ([c[0][:2]], None),
    init=[jnp.ones(4)],
)

# Masks and depths.
bad_type("'layer_mask' is missing … layer_mask=None for all layers", gradients)
bad_type("'layer_mask' is missing … layer_mask=None for all layers", pair)
bad_type("missing the keyword argument 'layer_mask' … layers.mask(depth).", updated, LINK)
bad_type("missing the keyword argument 'layer_mask' … or depth=depth", updated, drop_muon())
bad_type("depth= is for drop_muon and its siblings", updated, LINK, depth=1)
bad_type("drop_muon and its siblings … layers.mask(depth)", updated, dm.momentum(), depth=1)
bad_type("got both", updated, drop_muon(), layer_mask=LAYERS.mask(1), depth=1)
bad_type("takes no layer_mask or depth; use drop_muon", updated, dm.muon(0.1), depth=0)
bad_type("use drop_muon", updated, dm.muon(0.1), layer_mask=LAYERS.mask(1))
bad_type("use drop_scion", updated, dm.scion(0.1, RADII), layer_mask=LAYERS.mask(1))
bad_type("use drop_gluon", updated, dm.gluon(0.1), depth=0)
bad_type("got an array … static_argnames='depth' … dm.switch_depth", jax.jit(LAYERS.mask), 1)
bad_type("='depth'", jax.jit(lambda depth: updated(drop_muon(), depth=depth)[0]), 1)
bad_value(
    "layer_mask is True at 'mid/kernel' and False at another leaf of layer mid … layers.subset",
    *(updated, dm.per_layer(optax.sgd(0.1), LAYERS)),
    layer_mask=LAYERS.mask(0) | {"mid": {"kernel": True, "bias": False}},
)
bad_value(
    "layer_mask has another structure … dm.chain_subtrees … mask_compatible_extra_args=True",
    *(updated, optax.masked(dm.momentum(), LAYERS.mask(1))),
    layer_mask=LAYERS.mask(0),
)

# Distributions and samplers.
bad_value("must not be negative, got [0.5, -0.25, 0.75]", dm.fixed_depth, [0.5, -0.25, 0.75])
bad_value("must not be negative, got [0.5, nan, 0.5]", dm.fixed_depth, [0.5, np.nan, 0.5])
bad_value("probabilities must sum to 1, got 1.25", dm.fixed_depth, [0.5, 0.25, 0.5])
bad_value("probabilities must be a sequence of numbers", dm.fixed_depth, [])
bad_value("probabilities must be a sequence of numbers", dm.sampling.independent_layers, [])
bad_value("must lie in [0, 1], got [0.5, 1.5]", dm.sampling.independent_layers, [0.5, 1.5])
bad_value("has 8192 subsets … layers.group(k)", dm.sampling.independent_layers, [0.5] * 13)
bad_value("has 12870 subsets … layers.group(k)", dm.sampling.fixed_size_subsets(8).subsets, 16)
bad_value("size must be at most 3, the … got 4", sampler, dm.sampling.fixed_size_subsets(4))
bad_value("2 probabilities … need 3: stem, mid, head", sampler, dm.fixed_depth([0.5, 0.5]))
bad_value("of shape (4, 2), and there are 3", sampler, dm.sampling.independent_layers([0.5, 0.5]))
bad_value("negative … at step 0", sampler_of, lambda step, b: jnp.array([1.5, -0.5, 0.0]))
bad_value("must sum to 1, got 1.5 at step 0", sampler_of, lambda step, b: jnp.full(b, 0.5))
bad_value("at step 1", sampler_of(lambda step, b: jnp.eye(b)[0] - 0.01 * step).depth, 7)
bad_type("jnp.where(step < n", sampler_of, lambda step, b: jnp.eye(b)[0 if step < 9 else 1])
bad_type("must be booleans, got float64", sampler_of, lambda step, b: jnp.full(b, 1 / b), np.eye)
bad_type("LayerDistribution such as dm.uniform_depth()", sampler, dm.uniform_depth)
bad_type("'seed'", dm.DepthSampler, LAYERS, UNIFORM)
bad_type("'seed'", dm.layer_mask_sampler, LAYERS, UNIFORM)
bad_value("seed must be below 2^64", sampler, seed=2**64)
bad_type("got an array … jax.random.key(0)", sampler, seed=jax.random.split(jax.random.key(0)))
bad_type("seed must be a Python integer, got an array", sampler, seed=jnp.float32(1))
bad_value("seed must be at least 0, got -1", sampler, seed=jnp.int32(-1))
bad_value("step must be at most", SAMPLER.depth, 2**31)
bad_type("got an array … or use sampler.sample", SAMPLER.depth, jnp.array(3))
bad_type("step must be a Python integer, got an array", SAMPLER.check_processes, jnp.array(3))
PAIRS = sampler(dm.sampling.fixed_size_subsets(2))
bad_type("subsets, not depths … sampler.active(step) … layers.subset(active)", PAIRS.depth, 0)
bad_type("got a Layers … dm.DepthSampler(layers,", dm.switch_depth, gradients, LAYERS)
bad_type("got a LayerMaskSampler … sampler.draws", dm.switch_depth, gradients, LINK)
bad_type("with a LayerDistribution. Other … no record", dm.record_gains, drop_muon(), SAMPLER)

# The axes of matrices, and the iteration.
for tx in (LMO, dm.norm_lmo(norms.column_norm()), drop_muon(roles={"bias": "hidden"})):
    bad_value("needs matrices, and leaf 'head/bias' has … dm.chain_subtrees", tx.init, PARAMS)
bad_value("leaf 'net/kernel' has shape ()", axes, ())
bad_value("of shape (2, 3, 4) … ={'net/kernel' … batch axes … with 'in_out'", axes, (2, 3, 4))
bad_value("leaf 'net/kernel', of shape (2, 3, 4, 5, 6)", axes, (2, 3, 4, 5, 6))
bad_value("'net/weight' … (out, in, *window) … 'out_in' or 'in_out'", axes, (3, 4), name="weight")
bad_value("'weight' of shape … ='out_in' or 'in_out'", labels, weight=(3, 4))
bad_value("name an axis of (3,), but leaf 'net/kernel' has 3", axes, (2, 3, 4), Numbers(1, 3))
bad_value("reduction_axis=(0, 1), output_axis=(1,)", axes, (2, 3, 4), Numbers((0, 1), -2))
bad_value("at least one axis each for fan-in and fan-out", axes, (2, 3, 4), Numbers((), 2))
bad_value("'kernels' matches no leaf … 'kernel'?", axes, (2, 3), {"kernels": "in_out"})
bad_value("matches both", axes, (2, 3, 4), {"net": Numbers(1, 2), "kernel": Numbers(1, 2)})
bad_type("MuonDimensionNumbers, 'in_out', 'out_in', or a … (1, 2)", axes, (2, 3), (1, 2))
bad_type("of leaf 'net/kernel' must be an optax.contrib.Muon", axes, (2, 3), {"net": (0, 1)})
bad_type("dimension_numbers is by path patterns … got 0", axes, (2, 3), {0: "in_out"})
bad_value("of leaf 'net/kernel' must be one of … 'out-in'", axes, (2, 3), {"net": "out-in"})
bad_value("of whole leaves … leave out", rms_lmo(dimension_numbers="in_out").init, KERNELS)
bad_value(
    "'wte' matches 'wte', which is 'tied_head' … they take none",
    dm.gluon(0.1, roles={"wte": "tied_head"}, dimension_numbers={"wte": Numbers(1, 0)}).init,
    {"wte": jnp.eye(2)},
)
for name in ("num_steps", "memory_limit"):
    bad_type(f"{name} … got an array … static_args", injected, newton_schulz_lmo, **{name: 5})
bad_value("num_steps is 5 … is 1 … leave num_steps", newton_schulz, [(2, -1, 1)], num_steps=5)
bad_value("tuples of finite numbers … ('a', 'b', 'c')", newton_schulz, [("a", "b", "c")])
bad_value("got (1.5, -0.5, 0.0) … [(a, b, c)] * num_steps", newton_schulz, (1.5, -0.5, 0.0))
bad_value("tuples of finite numbers … got []", newton_schulz, [])
bad_value("tuples of finite numbers", newton_schulz, [(1.5, -0.5, np.inf)])
bad_value("tuples of finite numbers … another degree", newton_schulz, [(1.0,), (1.0,) * 6])
bad_value("degree must be 5 or 9, got 7", dm.orthogonalize.polar_express_coefficients, 3, degree=7)
bad_type("are static … dm.orthogonalize.newton_schulz()(x)", newton_schulz, jnp.eye(3))
bad_type("an array, got a dict … newton_schulz_lmo", newton_schulz(), {"w": jnp.eye(3)})
bad_type("orthogonalize must be of a floating-point", newton_schulz(), jnp.ones((2, 3), int))
bad_value("(*batch, rows, cols), got (3,)", newton_schulz(), jnp.ones(3))
bad_value("['float32', 'bfloat16', 'float16'], got 'int8'", newton_schulz, dtype=jnp.int8)
bad_type("['float32', 'bfloat16', 'float16'], got 'bf16'", newton_schulz, dtype="bf16")
bad_value("overflows in float16 … bfloat16", newton_schulz, [(30, 0, 0)] * 4, dtype=jnp.float16)
bad_value('="aol" divides … another', newton_schulz, "turbo_muon", dtype=jnp.float16)
bad_type("It is in bytes", newton_schulz_lmo, memory_limit=1e9)
SMALL = newton_schulz_lmo(memory_limit=1000)
bad_value("1,000 bytes … 'big', 64×32, needs 36,864", SMALL.init, {"big": jnp.ones((64, 32))})
bad_type("newton_schulz() with its parentheses", drop_muon, orthogonalize=newton_schulz)
bad_type("orthogonalize must be a function … got 'svd'", norms.spectral_norm, orthogonalize="svd")
bad_type("an array of the shape it is given … returned None", orthogonalized, lambda x: None)
bad_value("was given float32[ … shape and dtype must stay", orthogonalized, lambda x: x @ x.mT)
bad_value("dtype must stay", orthogonalized, lambda x: x.astype(jnp.bfloat16))
bad_value("smallest must lie in (0, 1), got 0.0", polar_express, 5, smallest=0.0)
bad_value("cushion must lie in [0, 1), got 1.0", polar_express, 5, cushion=1.0)
bad_value("ease must be at least 1, got 0.99", polar_express, 5, ease=0.99)

# Norms and radii.
bad_type("norm must be a dm.norms.Norm, got a function. Call it", dm.norm_lmo, norms.sign_norm)
bad_type("norm must be a dm.norms.Norm, got 'sign'", dm.transforms.norm_sharp, "sign")
bad_type("one array, got a dict … jax.tree.map", norms.sign_norm().argmin, KERNELS)
bad_type("the array must be of a floating-point", norms.rms_norm().direction, jnp.ones(3, int))
bad_type("got int32", norms.sign_norm().init, jax.random.key(0), (3, 2), jnp.int32)
bad_value("is of matrices (in, out) … shape (3,)", norms.column_norm().dual_norm, jnp.ones(3))
bad_value("of matrices (in, out) … (3,)", norms.spectral_norm().init, jax.random.key(0), (3,))
BATCH = jnp.ones((2, 3, 4)), Numbers(1, 2)
bad_value("is a batch of matrices: take jax.vmap", norms.spectral_norm().norm, *BATCH)
bad_value("one of … 'one' … got 'none'", norms.Norm, "mine", norms.sign_norm().geometry, "none")
bad_value("radius is an empty mapping; give a number, or a pattern for each", rms_lmo, {})
bad_value("radius: pattern 'mit' matches no leaf … 'mid'?", rms_lmo({"mit": 1.0}).init, PARAMS)
TWICE = {"stem": 1.0, "mid": 1.0, "head": 1.0, "mid/bias": 2.0}
bad_value("leaf 'mid/bias' matches both 'mid' and 'mid/bias'", rms_lmo(TWICE).init, PARAMS)
for name, take in (("radius", rms_lmo), ("step_size", sharp)):
    tx = take({"stem": 1.0, "head": 1.0})
    bad_value(f"{name} has … ['mid/bias', 'mid/kernel'] … ['stem', 'head']", tx.init, PARAMS)
bad_type("radius['stem'] is a mapping again; write one", rms_lmo, {"stem": {"kernel": 1.0}})
bad_type("radius is by path patterns, which are strings, got 0", rms_lmo, {0: 1.0})
bad_type("adaptive_radius(l0, l1)", sharp, ADAPTIVE)
bad_type("multiplies the dual norm already", sharp, {"stem": ADAPTIVE})
bad_value("l0 and l1 are both 0", schedules.adaptive_radius, 0, 0.0)
bad_value("one of radius returned shape (3,)", updated, rms_lmo(lambda count: jnp.ones(3)), KERNELS)

# Momenta.
bad_type("makes a transformation: call it", drop_muon, momentum=dm.momentum)
bad_value("[0, 1), got 1.0", drop_muon, momentum=1.0)
bad_value("[0, 1), got 1.0 … Drop-Muon's β … 1 - decay", dm.mvr_momentum, schedules.mvr_q())
bad_value("variant must be 1, 2 or 3, got 4", dm.mvr_momentum, variant=4)
bad_type("variant … got an array … static_args", dm.mvr_momentum, variant=jnp.array(2))
bad_value("variant 1 has no q: leave it out, or take variant=2 or 3", dm.mvr_momentum, q=0.5)
for q in (0.0, 1.5, schedules.mvr_decay()):
    bad_value("q is the weight of the new gradient, in (0, 1]", dm.mvr_momentum, variant=2, q=q)
bad_type("needs … 'prev_params_grads' … dm.masked_value_and_grad_pair", updated, MVR)
bad_type("needs the extra argument 'prev_params_grads'", updated, MUON_MVR)
for name in ("prev_grads", "last_gradient", "grads_prev", "old_step_grads", "g_prev"):
    bad_type(f"'{name}' … another batch … mars_momentum", updated, MVR, **{name: PARAMS})
bad_type("Did you mean 'prev_params_grads'?", updated, MVR, prev_param_grads=PARAMS)
for tx in (MVR, dm.per_layer(optax.sgd(1.0), LAYERS)):
    bad_value("gradients: 'head/bias' is missing", updated, tx, prev_params_grads=KERNELS)
bad_value("'tail' is only in prev_params_grads", updated, MUON_MVR, prev_params_grads=WITH_TAIL)
bad_value("(1, 2) at 'head/bias' … gradients have (2,)", updated, MVR, prev_params_grads=LONGER)
MASKED_MVR = optax.masked(MVR, LAYERS.mask(1))
bad_value("mask_compatible_extra_args=True", updated, MASKED_MVR, prev_params_grads=PARAMS)
bad_value("the containers differ", updated, MVR, [X], prev_params_grads={"0": X})
bad_value("mvr_momentum keeps the parameters: pass them to update", updated_from, MVR, MVR, None)
bad_value("keep_prev_params keeps the parameters: pass", updated_from, KEEPER, KEEPER, None)
bad_value("params has shape (1, 2) at 'head/bias'", updated_from, MVR, MVR, LONGER)
bad_value("leave per_layer out", dm.per_layer(MVR, LAYERS).init, PARAMS)
bad_value("'head/bias'. Is there a dm.mvr", dm.prev_params, dm.momentum().init(PARAMS), PARAMS)
bad_value("of 'head/bias'. … keep_prev_params()", dm.prev_params, MVR.init(KERNELS), PARAMS)
bad_value("(2,) at 'head/bias' … (1, 2)", dm.prev_params, MVR.init(PARAMS), LONGER)
bad_value("'head/bias' twice", dm.prev_params, optax.chain(KEEPER, MVR).init(PARAMS), PARAMS)
bad_value("average both grad", dm.prev_params, optax.MultiSteps(MVR, 2).init(PARAMS), PARAMS)
bad_value("prev_params must have … 'head/bias' is missing", pair, KERNELS, layer_mask=None)

# Chains and optimizers.
SUBTREES = dict.fromkeys(("matrix", 0), LMO)
MISSPELT = {"stem": "matrix", "mid": {"kernel": "matrices", "bias": "matrix"}, "head": "matrix"}
bad_value(
    "Leaf 'mid/kernel' has the label 'matrices' … ['0', 'matrix']. Did you mean 'matrix'?",
    *(dm.chain_subtrees(SUBTREES, MISSPELT).init, PARAMS),
)
bad_value("transforms is empty; give one", dm.chain_subtrees, {}, {})
bad_value("the γ of (1 - γ)X + γ lmo, at most 1, got 1.5", scion, 1.5)
bad_value("at most 1, got 1.5", scion, optax.constant_schedule(1.5))
bad_value("at most 1, got 1.5", dm.drop_scion, 1.5, LAYERS, RADII)
bad_type("radii must be a mapping from role to radius … got 50.0", scion, 0.1, 50.0)
bad_type("got a LayerDistribution", dm.drop_scion, 0.1, LAYERS, UNIFORM)
bad_value("radii names the role 'hiden' … Did you mean 'hidden'?", scion, 0.1, {"hiden": 1.0})
bad_value("the role 'gate' … goes into norms", scion, 0.1, RADII | {"gate": 1.0})
bad_value("'/b' is a path … dict.fromkeys(dm.layers.ROLES", dm.gluon, 1.0, {"/b": 1.0})
bad_value("radii['bias'] is adaptive … constrained=False", scion, 0.1, RADII | {"bias": ADAPTIVE})
bad_value("norms names the role 'hiden' … 'hidden'?", scion, norms={"hiden": norms.sign_norm()})
bad_type("norms['head'] must be a norm … got a function", scion, norms={"head": norms.sign_norm})
bad_type("norms must be a mapping from role to norm", scion, norms=[norms.sign_norm()])
bad_value("'mid' the role 'hiden'. Did you mean 'hidden'?", scion, roles={"mid": "hiden"})
bad_value("'mid/kernel' is 'gate', and radii has no such", scion, roles={"mid/kernel": "gate"})
bad_value("pattern 'mit' matches no leaf … Did you mean 'mid'?", scion, roles={"mit": "head"})
bad_type("roles must be a mapping from path patterns to roles", scion, roles=["head"])
bad_type("roles maps path patterns to role names, got 'a': 3", dm.Roles, {"a": 3})
bad_value("A constrained step … pass them to update", step_without_params)
bad_value("'head' is 'head', and radii has only ['hidden']", scion_init, {"hidden": 1.0})
bad_type("radii['head'] must be a number … first value", scion_init, {"head": lambda count: 1.0})

# The roles of leaves.
bad_value("No leaf is the head … ['a', 'b'] … has_head=False", labels, a=(3, 3), b=(3, 3))
TWO = "'a' … depthwise … grey … ={'a': 'depthwise'} … Grouped(1)"
bad_value(TWO, labels, a=(3, 3, 1, 8), b=(3, 3, 1, 8))
bad_value("'b' … depthwise convolution", labels, a=(4, 1, 32), b=(3, 3, 1, 8))
bad_value("'depthwise' … no matrix … ={'depthwise': 'in_out'}", labels, depthwise=(3, 3, 8, 1))
bad_value("'a' of shape (4, 516) looks like a table … ={'a': 'embedding'}", labels, a=(4, 516))
for tx in (dm.muon(0.1), dm.gluon(0.1)):
    bad_value("'a' of shape (4, 516) looks like a table", tx.init, {"a": jnp.ones((4, 516))})
bad_value("window of 3×16 … stack of … dimension_numbers", labels, query=(3, 16, 2, 8))
bad_value("'emb/mlp/weight' … or 'hidden'", labels, "out_in", **{"emb/mlp/weight": (8, 4)})

# The check of an optimizer.
ONE_STEP = {"orthogonalize": newton_schulz(num_steps=1)}
CLIMBING = drop_muon(auxiliary=optax.adamw(1e-3), **ONE_STEP)
bad_value("'head/bias' moves along … optax.scale_by_adam() in place of", check, CLIMBING, LAYERS)
bad_value("'head/kernel' moves along", check, dm.muon(0.1, momentum=optax.sgd(0.1), **ONE_STEP))
bad_value("end a chain of your own with optax.scale_by_learning_rate", check, dm.momentum())
DECAY = optax.chain(LINK, optax.add_decayed_weights(0.1), optax.scale(-0.1))
bad_value("moves … not active … or before dm.layer_mask_sampler", check, DECAY, LAYERS)
MOVING = optax.chain(optax.sgd(0.1, 0.9), LINK)
bad_value("state … of leaf 'mid/bias' changes … dm.per_layer(…, layers)", check, MOVING, LAYERS)
bad_value(
    "The state … of leaf 'embed' changes in a step in which its layer is not active",
    check,
    dm.per_layer(optax.chain(optax.sgd(0.1, 0.9)), STACK_LAYERS, takes_mask=True),
    *(STACK_LAYERS, STACK),
)

# Meshes.
MESH, OTHER_MESH = (
    jax.make_mesh((1,), (name,), axis_types=(AxisType.Auto,)) for name in ("fsdp", "tensor")
)
FLAT = {"stem": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}


def placed(**specs: P) -> dict[str, NamedSharding]:
    return {name: NamedSharding(MESH, spec) for name, spec in specs.items()}


PLACED, PART, TOO_DEEP = (
    placed(stem=P(), head=P()),
    placed(stem=P()),
    placed(stem=P(None, None, "fsdp"), head=P()),
)
state_shardings = functools.partial(dm.state_shardings, dm.momentum())
on_mesh = functools.partial(dm.on_mesh, LMO)
plan_layouts = dm.sharding.plan_layouts

bad_type("mesh must be a jax.sharding.Mesh, got 'fsdp' … shardings=", on_mesh, "fsdp")
bad_type("mesh must be a jax.sharding.Mesh, got a dict … shardings=", on_mesh, PLACED)
bad_type("mesh must be a jax.sharding.Mesh, got a dict … shardings=", plan_layouts, FLAT, PLACED)
bad_type("mesh must be a jax.sharding.Mesh, got None: give mesh or", plan_layouts, FLAT)
bad_value("{'tensor': 1}, and 'head' is on {'fsdp': 1}", on_mesh, OTHER_MESH, shardings=PLACED)
TWO_MESHES = PLACED | {"tail": NamedSharding(OTHER_MESH, P())}
bad_value("one mesh, {'fsdp': 1}, and 'tail' is on {'tensor': 1}", on_mesh, shardings=TWO_MESHES)
bad_type("a tree of jax.sharding.NamedSharding … at 'head'", on_mesh, shardings={"head": P()})
bad_type("a tree of jax.sharding.NamedSharding, got no leaf", on_mesh, shardings={})
bad_value("leaf 'head': it knows stem … x.sharding", on_mesh(shardings=PART).init, FLAT)
bad_value("for 'head', and the … no such", on_mesh(shardings=PLACED).init, {"stem": X})
bad_value("'fsdp' … 'stem', of shape (4, 3)", on_mesh(shardings=TOO_DEEP).init, FLAT)
bad_value("has 1 leaves and the parameters 2 … ['head']", state_shardings, FLAT, PART)
bad_value("they differ in ['head']. Give", state_shardings, FLAT, PLACED | {"head": None})
bad_value("'stem' has shape (4, 3), and its sharding", state_shardings, FLAT, TOO_DEEP)
for tree in (FLAT, jax.eval_shape(lambda: FLAT)):
    bad_type("'head' must be a NamedSharding … jax.device_put(params,", state_shardings, tree)
bad_value("'blocks', of shape (3, 4, 4)", plan_layouts, {"blocks": jnp.ones((3, 4, 4))}, MESH)
bad_value("'head' is missing", plan_layouts, FLAT, MESH, layer_mask={"stem": True})


@pytest.mark.parametrize(("exception", "message", "call"), ERRORS)
def test_bad_input_is_named_with_the_way_out(exception, message, call):
    assert_raises(exception, message, call)


# --- Bad masks, for everything that takes one -----------------------------------------------------


def arrays(layer_mask: Any) -> Any:
    return jax.tree.map(jnp.asarray, layer_mask)


MASK = LAYERS.mask(1)
IS_ARRAY = "layer_mask is an array at 'head/bias' … layers.mask(depth) … ='depth' … dm.switch_depth"
BAD_MASKS = [
    (ValueError, "'mid/bias' is missing … the same tree", MASK | {"mid": {"kernel": True}}),
    (ValueError, "has another structure … 'tail' is only in the mask", MASK | {"tail": True}),
    (ValueError, "has another structure", tuple(MASK.values())),
    (TypeError, "layer_mask must be a tree of booleans, got True", True),
    (TypeError, IS_ARRAY, arrays(MASK)),
    (TypeError, "got 1 at 'head/bias' … layers.mask(depth)", jax.tree.map(int, MASK)),
    (TypeError, "Python booleans as leaves … 'head/bias'", jax.tree.map(np.asarray, MASK)),
]
TAKES_A_MASK = {
    "masked_value_and_grad": lambda mask: gradients(layer_mask=mask),
    "masked_value_and_grad_pair": lambda mask: pair(layer_mask=mask),
} | {
    name: lambda mask, tx=tx: updated(tx, layer_mask=mask)[0]
    for name, tx in {
        "layer_mask_sampler": LINK,
        "momentum": dm.momentum(),
        "per_layer": dm.per_layer(optax.sgd(1.0), LAYERS),
        "chain_subtrees": dm.chain_subtrees({"all": dm.momentum()}, "all"),
        "drop_muon": drop_muon(),
        "drop_scion": dm.drop_scion(0.1, LAYERS, RADII),
        "record_gains": dm.record_gains(optax.sgd(0.1), ADAPTIVE_SAMPLER),
    }.items()
}


@pytest.mark.parametrize("call", TAKES_A_MASK.values(), ids=TAKES_A_MASK)
def test_a_bad_mask_is_named_with_the_way_out(call):
    for exception, message, layer_mask in BAD_MASKS:
        assert_raises(exception, message, call, layer_mask)
    assert_raises(TypeError, IS_ARRAY, jax.jit(call), arrays(MASK))  # traced
