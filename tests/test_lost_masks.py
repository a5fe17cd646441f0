"""A part that looks at the layer mask gets it, or it is an error: wherever it is put."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

NAMES = ("stem", "mid", "head")
PARAMS = {name: jnp.linspace(-1.0, 1.0, 12).reshape(3, 4) + i for i, name in enumerate(NAMES)}
GRADS = jax.tree.map(jnp.cos, PARAMS)
LAYERS = dm.layers_by_path(PARAMS, NAMES)
SAMPLER = dm.DepthSampler(LAYERS, dm.fixed_depth([0.0, 1.0, 0.0]), seed=0)
ADAPTIVE = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=0)
MASK = LAYERS.mask(1)  # the stem is inactive


def takes_no_extra_arguments(tx: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(tx.init, tx.update)


def micro_batches(tx: Any) -> optax.GradientTransformation:
    return optax.MultiSteps(tx, 1).gradient_transformation()


def middle_of_a_chain(tx: Any) -> optax.GradientTransformation:
    return optax.chain(optax.identity(), takes_no_extra_arguments(optax.named_chain(("x", tx))))


LOSING = [takes_no_extra_arguments, micro_batches, middle_of_a_chain]
PARTS = {
    "momentum": dm.momentum(0.9),
    "mars_momentum": dm.transforms.mars_momentum(0.9),
    "mvr_momentum": dm.mvr_momentum(0.9),
    "keep_prev_params": dm.transforms.keep_prev_params(),
    "lmo": dm.newton_schulz_lmo(num_steps=1),
    "chain": optax.chain(dm.momentum(0.9), dm.norm_lmo(dm.norms.sign_norm())),
    "subtrees": dm.chain_subtrees({"all": dm.momentum(0.9)}, "all"),
    "per_layer": dm.per_layer(optax.scale_by_adam(), LAYERS),
    "injected": optax.inject_hyperparams(dm.momentum)(decay=0.9),
}
RADII = {"hidden": 1.0, "head": 1.0}
# What is given a mask, and hands it on to its parts.
AROUND = {
    "chain_subtrees": lambda part: dm.chain_subtrees({"all": part}, "all"),
    "on_mesh": dm.on_mesh,
    "record_gains": lambda part: dm.record_gains(part, ADAPTIVE),
    "per_layer": lambda part: dm.per_layer(
        optax.chain(optax.identity(), part), LAYERS, takes_mask=True
    ),
    "drop_muon": lambda part: dm.drop_muon(0.1, LAYERS, momentum=part),
    "drop_scion": lambda part: dm.drop_scion(0.1, LAYERS, RADII, momentum=part),
    "drop_gluon": lambda part: dm.drop_gluon(0.1, LAYERS, RADII, momentum=part),
    "both": lambda part: dm.on_mesh(
        optax.chain(optax.identity(), dm.chain_subtrees({"all": optax.chain(part)}, "all"))
    ),
}

# record_gains refuses optax.MultiSteps.
PAIRS = [
    (name, losing)
    for name in AROUND
    for losing in LOSING
    if not (name == "record_gains" and losing is micro_batches)
]


def step(tx: Any, **extra_args: Any) -> tuple[Any, Any, Any]:
    state = tx.init(PARAMS)
    return state, *tx.update(GRADS, state, PARAMS, **extra_args)


def of_the_stem(tree: Any) -> list[Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [np.asarray(x) for path, x in leaves if "stem" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("around", "losing"), PAIRS)
def test_a_mask_that_is_lost_on_the_way_is_an_error(around, part, losing):
    tx = AROUND[around](losing(PARTS[part]))
    with pytest.raises(TypeError, match=r"does not get it, for '.*ExtraArgs\(w.init.*per_layer"):
        jax.eval_shape(lambda: step(tx, layer_mask=MASK))


@pytest.mark.parametrize("part", PARTS)
def test_a_mask_that_train_step_gives_is_not_lost_either(part):
    tx = optax.chain(takes_no_extra_arguments(PARTS[part]), optax.scale(-0.1))
    step_fn = dm.train_step(lambda params: sum(map(jnp.sum, params.values())), tx, SAMPLER)
    with pytest.raises(TypeError, match="does not get it"):
        step_fn(0, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(("around", "losing"), [pair for pair in PAIRS if pair[0] != "per_layer"])
def test_inside_per_layer_an_inactive_layer_is_frozen_whatever_the_wrapper_loses(around, losing):
    tx = AROUND[around](dm.per_layer(losing(PARTS["momentum"]), LAYERS))
    before, updates, after = step(tx, layer_mask=MASK)
    assert not any(x.any() for x in of_the_stem(updates))
    for old, new in zip(of_the_stem(before), of_the_stem(after), strict=True):
        np.testing.assert_array_equal(old, new)


# Ten times our own momentum of decay 0.9, or less in the first steps: the same to an LMO.
OF_OPTAX = {
    "trace": optax.trace(0.9),
    "ema": optax.ema(0.9),
    "chain": optax.chain(optax.scale(3.0), optax.trace(0.9)),
    "injected": optax.inject_hyperparams(optax.trace)(decay=0.9),
    "supported": optax.with_extra_args_support(optax.trace(0.9)),
    "behind ours": optax.chain(optax.trace(0.9), dm.momentum(0.0)),
}
OPTIMIZERS = {
    "drop_muon": lambda layers, m: dm.drop_muon(0.1, layers, momentum=m),
    "drop_scion": lambda layers, m: dm.drop_scion(0.1, layers, RADII, momentum=m),
    "drop_gluon": lambda layers, m: dm.drop_gluon(0.1, layers, RADII, momentum=m),
}
STACK = {"blocks": jnp.stack([PARAMS["stem"], PARAMS["mid"]]), "head": PARAMS["head"]}


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        pytest.param(
            o,
            n,
            marks=[] if o == "drop_muon" or (o, n) == ("drop_scion", "trace") else pytest.mark.deep,
        )
        for o in OPTIMIZERS
        for n in OF_OPTAX
    ],
)
@pytest.mark.parametrize("is_stacked", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_momentum_that_knows_no_masks_is_frozen_and_steps_as_ours_does(
    optimizer, name, is_stacked
):
    params = STACK if is_stacked else PARAMS
    layers = dm.layers_by_path(params, [dm.stacked("blocks"), "head"]) if is_stacked else LAYERS
    theirs, ours = (OPTIMIZERS[optimizer](layers, m) for m in (OF_OPTAX[name], 0.9))
    dm.check_optimizer(theirs, params, layers)
    of_theirs, of_ours = (jax.jit(tx.update, static_argnames="depth") for tx in (theirs, ours))
    state, expected_state = theirs.init(params), ours.init(params)
    for step, depth in enumerate((1, 2, 0, 1, 0)):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params)
        updates, state = of_theirs(grads, state, params, depth=depth)
        expected, expected_state = of_ours(grads, expected_state, params, depth=depth)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), updates, expected)


OTHER_SHAPES = {  # numbers, rows and columns, lists of them, memories of several steps
    "novograd": optax.scale_by_novograd(),
    "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "sm3": optax.scale_by_sm3(),
    "lbfgs": optax.scale_by_lbfgs(2),
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_what_a_momentum_keeps_of_an_inactive_leaf_is_frozen_in_any_shape(name):
    momentum = optax.apply_if_finite(optax.chain(OTHER_SHAPES[name], optax.trace(0.9)), 3)
    ends = []
    pair = PARAMS["stem"], PARAMS["head"]
    for params in (dict(zip("01", pair, strict=True)), pair):  # as are the states of the chain
        layers = dm.layers_by_path(params, [*"01"])
        roles = dict.fromkeys("01", "hidden")
        tx = dm.drop_scion(
            0.1, layers, RADII, momentum=momentum, roles=dm.Roles(roles, has_head=False)
        )
        old = state = tx.init(params)
        for depth in (0, 0, 1):
            old, (_, state) = state, tx.update(params, state, params, depth=depth)
        ends.append((old, state))
    (before, after), of_pairs = ends[0], ends[1][1]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (after, of_pairs)))
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    changed = [jax.tree_util.keystr(path) for (path, x), y in leaves if (x != y).any()]
    assert any("['1']" in path for path in changed)
    assert not any("['0']" in path for path in changed)
    freeze = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
    if name != "sm3":  # whose lists are not looked into
        with pytest.raises(ValueError, match=r"The state .* of leaf .* changes"):
            dm.check_optimizer(optax.chain(momentum, optax.scale(-1.0), freeze), PARAMS, LAYERS)


@pytest.mark.parametrize("around", AROUND)
def test_a_wrapper_that_takes_extra_arguments_hands_the_mask_on(around):
    steps = optax.MultiSteps(PARTS["momentum"], 1)
    if around == "record_gains":
        steps: Any = optax.apply_if_finite(PARTS["momentum"], 3)
    tx = AROUND[around](optax.GradientTransformationExtraArgs(steps.init, steps.update))
    _, updates, after = step(tx, layer_mask=MASK)
    assert not any(x.any() for x in of_the_stem((updates, after)))


@pytest.mark.parametrize("around", ["chain_subtrees", "on_mesh", "record_gains", "both"])
def test_without_a_mask_nothing_is_lost(around):
    _, updates, _ = step(AROUND[around](takes_no_extra_arguments(PARTS["momentum"])))
    _, expected, _ = step(PARTS["momentum"])
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize("name", ["muon", "scion"])
def test_an_optimizer_of_all_layers_does_not_hide_behind_a_wrapper(name):
    tx = {"muon": dm.muon(0.1), "scion": dm.scion(0.1, RADII)}[name]
    with pytest.raises(TypeError, match=f"use drop_{name}"):
        step(dm.on_mesh(takes_no_extra_arguments(tx)), layer_mask=MASK)
