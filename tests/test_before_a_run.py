"""What is found before a long run: optimizers that climb, and layers that move."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

PARAMS = {"stem": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "head"])
KERNEL = dm.orthogonalize.newton_schulz(num_steps=1)
WARM_UP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 9)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: dm.muon(0.1, orthogonalize=KERNEL, weight_decay=10.0), None),
        (lambda: dm.muon(WARM_UP, orthogonalize=KERNEL), None),
        (lambda: dm.gluon(dm.schedules.gluon_radius(0.1)), None),
        (lambda: dm.scion(0.5, dict.fromkeys(dm.layers.ROLES, 0.1)), None),  # far outside its balls
        (lambda: optax.adamw(0.1, weight_decay=1.0), None),
        (
            lambda: dm.drop_muon(
                *(0.1, LAYERS),
                momentum=dm.per_layer(optax.trace(0.9), LAYERS),
                orthogonalize=KERNEL,
            ),
            LAYERS,
        ),
    ],
)
def test_a_sound_optimizer_passes_whatever_it_decays_to_and_however_it_warms_up(make, layers):
    for seed in range(2):
        dm.check_optimizer(make(), PARAMS, layers, seed=seed)


def test_a_part_that_climbs_is_found_behind_a_warm_up_too():
    tx = dm.muon(WARM_UP, orthogonalize=KERNEL, auxiliary=optax.adamw(1.0))
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


def test_one_layout_of_a_whole_tree_means_the_same_by_name_and_by_numbers():
    params = {"hidden": jnp.ones((4, 6)), "head": jnp.ones((1, 8))}
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    for given in ("out_in", numbers):
        tx = dm.gluon(1.0, dimension_numbers=given)
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(updates["head"], -jnp.ones((1, 8)) / 8)
