"""What is found before a long run: optimizers that climb, layers that move, wrong parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {"stem": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
KERNEL = dm.orthogonalize.newton_schulz(num_steps=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dm.muon(0.1, orthogonalize=KERNEL, weight_decay=10.0),
        lambda: dm.muon(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9), orthogonalize=KERNEL),
        lambda: dm.gluon(dm.schedules.gluon_radius(0.1)),
        lambda: dm.scion(0.5, {"hidden": 0.1, "head": 0.1, "bias": 0.1}),  # far outside its balls
        lambda: optax.adamw(0.1, weight_decay=1.0),
    ],
)
def test_a_sound_optimizer_passes_whatever_it_decays_to_and_however_it_warms_up(make):
    for seed in range(3):
        dm.check_optimizer(make(), PARAMS, seed=seed)


def test_a_part_that_climbs_is_found_behind_a_warm_up_too():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9)
    tx = dm.muon(rate, orthogonalize=KERNEL, auxiliary=optax.adamw(1.0))
    with pytest.raises(ValueError, match="'stem/bias' moves along its gradient"):
        dm.check_optimizer(tx, PARAMS)


def test_paths_that_end_alike_are_told_apart():
    params = {"kernel": jnp.eye(2), "head": {"kernel": jnp.eye(2)}}
    layers = dm.layers_by_path(params, ["/kernel", "head"])
    dm.check_optimizer(dm.drop_muon(0.1, layers, orthogonalize=KERNEL), params, layers)
    unaware = optax.chain(optax.trace(0.9), optax.scale(-0.1))
    sampler = dm.layer_mask_sampler(layers, dm.uniform_depth(), seed=0)
    with pytest.raises(ValueError, match=r"state .* of leaf 'kernel' changes"):
        dm.check_optimizer(optax.chain(unaware, sampler), params, layers)


def test_a_link_behind_the_sampler_moves_what_is_frozen():
    sampler = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
    tx = optax.chain(dm.momentum(0.9), sampler, optax.add_decayed_weights(0.1), optax.scale(-0.1))
    with pytest.raises(ValueError, match=r"'stem/bias' moves in a step .* not active"):
        dm.check_optimizer(tx, PARAMS, LAYERS)


def test_the_variables_of_linen_are_more_than_its_parameters():
    variables = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(3)}}
    for call in (
        lambda: dm.layers_by_path(variables, [("params", "batch_stats")]),
        lambda: dm.muon(0.1).init(variables),
    ):
        with pytest.raises(
            TypeError, match=r"'batch_stats' beside 'params'.*variables\['params'\]"
        ):
            call()


def test_a_mask_that_splits_a_group_of_stacked_layers_is_refused():
    params = {"blocks": jnp.ones((4, 2, 2))}
    layers = dm.layers_by_path(params, [dm.stacked("blocks")])
    grouped = layers.group(2)
    tx = dm.drop_muon(0.1, grouped, orthogonalize=KERNEL)
    state = tx.init(params)
    with pytest.raises(ValueError, match="splits a layer at 'blocks'"):
        tx.update(params, state, params, layer_mask=layers.mask(1))
    tx.update(params, state, params, layer_mask=grouped.mask(1))


def test_one_layout_of_a_whole_tree_means_the_same_in_every_optimizer():
    params = {"hidden": jnp.ones((4, 6)), "head": jnp.ones((1, 8))}
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    radii = {"hidden": 1.0, "head": 1.0}
    steps = [
        dm.gluon(1.0, radii, dimension_numbers=given).update(
            params, dm.gluon(1.0, radii, dimension_numbers=given).init(params), params
        )[0]["head"]
        for given in ("out_in", numbers)
    ]
    np.testing.assert_allclose(steps[0], -jnp.ones((1, 8)) / 8)
    np.testing.assert_array_equal(steps[0], steps[1])


def test_a_step_moves_no_array_from_where_it_was_put():
    params = {"stem": jnp.eye(3), "head": jnp.ones((3, 2))}
    layers = dm.layers_by_path(params, ["stem", "head"])
    sampler = dm.DepthSampler(layers, dm.full_depth(), seed=0)
    optimizer = dm.drop_muon(0.1, layers, orthogonalize=KERNEL)
    step_fn = dm.train_step(
        lambda p, x: jnp.mean((x @ p["stem"] @ p["head"]) ** 2), optimizer, sampler
    )
    device = jax.devices()[-1]
    x = jax.device_put(jnp.eye(3), device)
    new, state, _ = step_fn(0, params, optimizer.init(params), x)
    assert {leaf.device for leaf in jax.tree.leaves((new, state))} == {device}
