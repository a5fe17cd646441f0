"""Scion and Gluon: trajectories of the published formulas, balls not left, dropped layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

SHAPES = {"embed": (6, 4), "conv": (3, 3, 4, 5), "dense": (5, 7), "bias": (7,), "head": (7, 3)}
ROLES = {"embed": "embedding", "conv": "hidden", "dense": "hidden", "bias": "bias", "head": "head"}
RADII = {"embedding": 2.0, "hidden": 3.0, "bias": 0.5, "head": 40.0}


def random_tree(seed, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: dtype(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


# --- Trajectories ---------------------------------------------------------------------------------

# The papers' norms of the roles, whose formulas are in test_norms.py.
ROLE_NORMS = {
    "embedding": dm.norms.column_norm(),
    "hidden": dm.norms.spectral_norm("scion"),
    "bias": dm.norms.rms_norm(),
    "head": dm.norms.sign_norm(),
}
EXACT = {"hidden": ROLE_NORMS["hidden"]}
# The arguments, and γ and α in step k; α is the weight of the new gradient.
PUBLISHED = {
    "scion": (
        lambda **rest: dm.scion(lambda k: 0.2 / (1 + k), RADII, momentum=0.7, **rest),
        lambda k: (0.2 / (1 + k), 0.3),
    ),
    "gluon": (
        lambda constrained, **rest: dm.gluon(dm.schedules.gluon_radius(0.1), RADII, **rest),
        lambda k: (0.1 * (k + 1) ** -0.75, (k + 1) ** -0.5),
    ),
}


@pytest.mark.parametrize(
    ("name", "constrained"), [("scion", True), ("scion", False), ("gluon", False)]
)
def test_ten_steps_equal_the_published_formulas(name, constrained):
    """M ← (1 - α)M + αG and X ← X - γ radius D(M), of (1 - γ)X if constrained.

    Algorithms 1 and 2 of Scion (arXiv:2502.07529); Gluon (arXiv:2505.13416) is the unconstrained
    one with α and γ that change from step to step.
    """
    make, hyperparameters = PUBLISHED[name]
    with jax.enable_x64(True):
        params = theirs = random_tree(0, 0.1)
        tx, m = make(constrained=constrained, norms=EXACT), jax.tree.map(np.zeros_like, params)
        state, update = tx.init(params), jax.jit(tx.update)
        for k in range(10):
            # Of a quadratic whose minimum moves, so that every step has another gradient.
            grads = jax.tree.map(np.subtract, theirs, random_tree(100 + k))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            gamma, alpha = hyperparameters(k)
            m = jax.tree.map(lambda m, g, a=alpha: (1 - a) * m + a * g, m, grads)
            for leaf, role in ROLES.items():
                step = RADII[role] * ROLE_NORMS[role].direction(m[leaf])
                kept = 1 - gamma if constrained else 1
                theirs = theirs | {leaf: np.asarray(kept * theirs[leaf] - gamma * step)}
                np.testing.assert_allclose(params[leaf], theirs[leaf], rtol=0, atol=1e-10)


def test_the_default_momentum_is_that_of_the_gpt_recipe():
    # https://github.com/LIONS-EPFL/scion: momentum 0.1, of the new gradient, in train_gpt_scion.py.
    params, grads = {"head": np.zeros((2, 1), np.float32)}, {"head": np.float32([[1.0], [1.0]])}
    tx = dm.scion(1.0, {"head": 1.0})
    updates, state = tx.update(grads, tx.init(params), params)
    # 0.9 · 0.1 - 0.1 · g changes sign at g = 0.9.
    for g, sign in ((0.8, 1), (1.0, -1)):
        updates, _ = tx.update({"head": np.float32([[-g], [1.0]])}, state, params)
        assert np.sign(-updates["head"][0, 0]) == sign


def test_the_recipes_have_the_radii_of_the_paper():
    # `scale` and `last_scale` of Scion's train_gpt_scion.py; the CNN of its README: 8 and 8 · 16.
    assert dict(dm.optimizers.SCION_GPT_RADII) == {
        "hidden": 50.0,
        "head": 3000.0,
        "tied_head": 3000.0,
    }
    assert dict(dm.optimizers.SCION_CNN_RADII) == {"hidden": 8.0, "head": 128.0, "bias": 8.0}


# --- The ball -------------------------------------------------------------------------------------


def norms_over_radii(params):
    return {name: ROLE_NORMS[role].norm(params[name]) / RADII[role] for name, role in ROLES.items()}


def test_constrained_iterates_stay_in_the_ball_over_many_steps_of_noise():
    tx, params = dm.scion(0.1, RADII), random_tree(0, dtype=np.float32)
    params = dm.optimizers.scion_init(jax.random.key(1), params, RADII)
    params["bias"] = jnp.zeros(SHAPES["bias"])

    def step(carry, key):
        params, state = carry
        # Heavy tails, and now and then nothing at all.
        size = jax.random.bernoulli(key, 0.9).astype(jnp.float32)
        grads = {name: size * jax.random.cauchy(key, shape) for name, shape in SHAPES.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), norms_over_radii(params)

    keys = jax.random.split(jax.random.key(2), 1000)
    _, norms = jax.jit(lambda *carry: jax.lax.scan(step, carry, keys))(params, tx.init(params))
    for name, values in norms.items():
        bound = 1 + (0.14 if ROLES[name] == "hidden" else 1e-5)  # the band of five steps
        assert 0.3 < values.max() <= bound, name  # and it is no ball that nobody touches


def test_scion_init_is_on_the_boundary_and_leaves_biases_alone():
    params = random_tree(0, dtype=np.float32)
    draw = jax.jit(lambda key: dm.optimizers.scion_init(key, params, RADII))
    drawn, again = draw(jax.random.key(0)), draw(jax.random.key(1))
    for name, ratio in norms_over_radii(drawn).items():
        if name == "bias":
            np.testing.assert_array_equal(drawn[name], params[name])
        else:
            assert ratio == pytest.approx(1, abs=1e-5), name
            assert (drawn[name] != again[name]).any()


def test_a_tied_table_is_a_head_whose_fan_in_is_its_features():
    grads = {"wte": np.float32([[3.0, -1.0], [0.5, 2.0], [-1.0, 4.0]])}  # tokens, features
    tx = dm.scion(0.5, {"tied_head": 8.0}, constrained=False, roles={"wte": "tied_head"})
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["wte"], -0.5 * 8.0 * np.sign(grads["wte"]) / 2)
    drawn = dm.optimizers.scion_init(
        jax.random.key(0), grads, {"tied_head": 8.0}, roles={"wte": "tied_head"}
    )
    np.testing.assert_allclose(np.abs(drawn["wte"]), 8.0 / 2)


def test_scion_init_takes_radii_by_path_draws_each_leaf_anew_and_leaves_other_roles_alone():
    params = {name: np.ones((4, 4), np.float32) for name in ("a", "b", "gate")}
    drawn = dm.optimizers.scion_init(
        jax.random.key(0),
        params,
        {"hidden": {"a": 1.0, "b": 2.0}},
        roles=dm.Roles({"gate": "mine"}, has_head=False),
    )
    norms = [np.linalg.norm(drawn[name], 2) for name in "ab"]
    assert norms == pytest.approx([1.0, 2.0], rel=1e-5)
    assert not np.allclose(2 * drawn["a"], drawn["b"])
    np.testing.assert_array_equal(drawn["gate"], params["gate"])


# --- Dropped layers -------------------------------------------------------------------------------

LAYERS = dm.layers_by_path(random_tree(0), ["embed", "conv", ("dense", "bias"), "head"])


@pytest.mark.parametrize("name", ["scion", "gluon", "muon"])
def test_with_full_sampling_the_dropping_one_equals_the_whole_one(name):
    radii = () if name == "muon" else (RADII,)
    options = {"weight_decay": 0.1} if name == "muon" else {}
    rate = optax.linear_schedule(0.1, 0.0, 10)

    def run(tx, **mask):
        params = random_tree(0, dtype=np.float32)
        state, update = tx.init(params), jax.jit(functools.partial(tx.update, **mask))
        for k in range(4):
            updates, state = update(random_tree(k + 1, dtype=np.float32), state, params)
            params = optax.apply_updates(params, updates)
        return params

    whole = run(getattr(dm, name)(rate, *radii, **options))
    drop = getattr(dm, f"drop_{name}")(rate, LAYERS, *radii, **options)
    drop = run(drop, layer_mask=LAYERS.mask(0))
    for leaf, expected in whole.items():
        np.testing.assert_allclose(drop[leaf], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constrained", [True, False])
def test_a_dropped_layer_is_not_pulled_towards_zero(constrained):
    norms = {"hidden": dm.norms.sign_norm()}
    tx = dm.drop_scion(0.1, LAYERS, RADII, constrained=constrained, norms=norms)
    params, grads = random_tree(0, dtype=np.float32), random_tree(1, dtype=np.float32)
    updates, _ = tx.update(grads, tx.init(params), params, layer_mask=LAYERS.mask(2))
    moved = {name: bool(update.any()) for name, update in updates.items()}
    assert moved == {"embed": False, "conv": False, "dense": True, "bias": True, "head": True}


@pytest.mark.parametrize("name", ["drop_scion", "drop_gluon"])
def test_attention_kernels_are_taken_with_their_dimension_numbers(name):
    numbers = {"query": optax.contrib.MuonDimensionNumbers(0, (1, 2))}
    rng = np.random.default_rng(0)
    grads = {"query": np.float32(rng.normal(size=(6, 2, 3))), "head": np.ones((6, 2), np.float32)}
    layers, radii = dm.layers_by_path(grads, ["query", "head"]), {"hidden": 2.0, "head": 3.0}
    tx = getattr(dm, name)(1.0, layers, radii, dimension_numbers=numbers, norms=EXACT)
    zeros = jax.tree.map(np.zeros_like, grads)
    updates, _ = tx.update(grads, tx.init(zeros), zeros, layer_mask=layers.mask(0))
    drawn = dm.optimizers.scion_init(jax.random.key(0), grads, radii, dimension_numbers=numbers)
    for query in (updates["query"], drawn["query"]):
        values = np.linalg.svd(np.reshape(query, (6, 6)), compute_uv=False)
        np.testing.assert_allclose(values, 2.0, rtol=1e-5)
