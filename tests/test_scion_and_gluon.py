"""Scion and Gluon: trajectories of the published formulas, balls not left, dropped layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
import reference

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {
    "embed": (6, 4),
    "conv": (3, 2, 4, 5),
    "dense": (5, 7),
    "bias": (7,),
    "head": (7, 3),
}
ROLES = {
    "embed": "embedding",
    "conv": "hidden",
    "dense": "hidden",
    "bias": "bias",
    "head": "head",
}
RADII = {"embedding": 2.0, "hidden": 3.0, "bias": 0.5, "head": 40.0}
EXACT = {"hidden": dm.norms.spectral_norm("scion")}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


def target_gradient(params, step):
    """Of a quadratic whose minimum moves, so that every step has another gradient."""
    target = random_tree(100 + step)
    return {name: jnp.asarray(params[name]) - target[name] for name in params}


def assert_trajectories_agree(tx, theirs, hyperparameters, params):
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(10):
        grads = target_gradient(theirs.flax_params(), k)
        lr, momentum = hyperparameters(k)
        theirs.step(grads, lr=lr, momentum=momentum)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, expected in theirs.flax_params().items():
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("constrained", [True, False])
def test_ten_steps_of_scion_equal_the_published_formulas(constrained):
    with jax.enable_x64(True):
        params = random_tree(0, 0.1)
        tx = dm.scion(
            lambda count: 0.2 / (1 + count),
            RADII,
            constrained=constrained,
            momentum=0.7,
            norms=EXACT,
        )
        theirs = reference.Scion(params, ROLES, RADII, constrained=constrained)
        assert_trajectories_agree(tx, theirs, lambda k: (0.2 / (1 + k), 0.3), params)


def test_ten_steps_of_gluon_equal_the_published_formulas():
    with jax.enable_x64(True):
        params = random_tree(0, 0.1)
        tx = dm.gluon(dm.schedules.gluon_radius(0.1), RADII, norms=EXACT)
        theirs = reference.Scion(params, ROLES, RADII, constrained=False)

        def schedules(k):
            return 0.1 * (k + 1) ** -0.75, (k + 1) ** -0.5

        assert_trajectories_agree(tx, theirs, schedules, params)


def test_ten_steps_of_deterministic_gluon_have_the_radii_of_its_theorem():
    l0, l1 = 3.0, 0.5
    with jax.enable_x64(True):
        params = random_tree(0, 0.1)
        radius = dm.schedules.adaptive_radius(l0, l1)
        radii = dict.fromkeys(RADII, radius)
        tx = dm.gluon(1.0, radii, momentum=0.0, norms=EXACT)
        state, update = tx.init(params), jax.jit(tx.update)
        for k in range(10):
            grads = target_gradient(params, k)
            updates, state = update(grads, state, params)
            for name, role in ROLES.items():
                g = reference.Scion._layout(role, grads[name])
                direction = reference.scion_lmo(role, g)
                dual_norm = np.sum(g * direction)
                expected = -dual_norm / (l0 + l1 * dual_norm) * direction
                actual = reference.Scion._layout(role, updates[name])
                np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10, err_msg=name)
            params = optax.apply_updates(params, updates)


def norms_over_radii(params):
    return {
        name: float(dm.optimizers.ROLE_NORMS[role].norm(params[name])) / RADII[role]
        for name, role in ROLES.items()
    }


@pytest.mark.parametrize(
    ("num_steps", "headroom"), [(8, 1e-4), (5, 0.14)], ids=["eight_steps", "default"]
)
def test_constrained_iterates_stay_in_the_ball_over_1000_steps_of_noise(num_steps, headroom):
    kernel = dm.orthogonalize.newton_schulz(num_steps=num_steps)
    hidden = dm.norms.spectral_norm("scion", orthogonalize=kernel)
    tx = dm.scion(0.1, RADII, norms={"hidden": hidden})
    params = jax.tree.map(lambda x: x.astype(jnp.float32), random_tree(0))
    params = dm.optimizers.scion_init(jax.random.key(1), params, RADII)
    params["bias"] = jnp.zeros(SHAPES["bias"])

    def step(carry, key):
        params, state = carry
        keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
        # Heavy tails, and now and then nothing at all.
        grads = jax.tree.map(lambda x, k: jax.random.cauchy(k, x.shape), params, keys)
        grads = jax.tree.map(lambda g: jnp.where(key[0] % 10 == 0, 0, g), grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norms = {
            n: dm.optimizers.ROLE_NORMS[r].norm(params[n]) / RADII[r] for n, r in ROLES.items()
        }
        return (params, state), norms

    keys = jax.random.split(jax.random.PRNGKey(2), 1000)
    _, norms = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()
    for name, values in norms.items():
        largest = float(values.max())
        bound = 1 + (headroom if ROLES[name] == "hidden" else 1e-5)
        assert 0.3 < largest <= bound, (name, largest)  # and it is no ball that nobody touches


def test_unconstrained_iterates_leave_the_ball():
    tx = dm.scion(0.1, RADII, constrained=False, norms=EXACT)
    params = jax.tree.map(jnp.zeros_like, random_tree(0))
    state, grads, update = tx.init(params), random_tree(3), jax.jit(tx.update)
    for _ in range(30):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert min(norms_over_radii(params).values()) > 2.5


def test_scion_init_is_on_the_boundary_and_leaves_biases_alone():
    params = random_tree(0)
    drawn = dm.optimizers.scion_init(jax.random.key(0), params, RADII)
    for name, ratio in norms_over_radii(drawn).items():
        if name == "bias":
            np.testing.assert_array_equal(drawn[name], params[name])
        else:
            assert ratio == pytest.approx(1, abs=1e-5), name
    again = dm.optimizers.scion_init(jax.random.key(1), params, RADII)
    assert not any((drawn[name] == again[name]).all() for name in ("embed", "conv", "dense"))


def test_a_tied_table_is_a_head_whose_fan_in_is_its_features():
    grads = {"wte": jnp.array([[3.0, -1.0], [0.5, 2.0], [-1.0, 4.0]])}  # three tokens, two features
    tx = dm.scion(0.5, {"tied_head": 8.0}, constrained=False, roles={"wte": "tied_head"})
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["wte"], -0.5 * 8.0 * jnp.sign(grads["wte"]) / 2)
    drawn = dm.optimizers.scion_init(
        jax.random.key(0), grads, {"tied_head": 8.0}, roles={"wte": "tied_head"}
    )
    np.testing.assert_allclose(jnp.abs(drawn["wte"]), 8.0 / 2)


def test_scion_init_takes_radii_by_path_and_leaves_roles_of_its_user_alone():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "gate": jnp.ones((4, 4))}
    drawn = dm.optimizers.scion_init(
        jax.random.key(0),
        params,
        {"hidden": {"a": 1.0, "b": 2.0}},
        roles=dm.Roles({"gate": "mine"}, has_head=False),
    )
    norm = dm.optimizers.ROLE_NORMS["hidden"].norm
    assert [float(norm(drawn[name])) for name in "ab"] == pytest.approx([1.0, 2.0], rel=1e-5)
    np.testing.assert_array_equal(drawn["gate"], params["gate"])


def test_leaves_of_one_shape_start_from_different_draws():
    params = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
    drawn = dm.optimizers.scion_init(
        jax.random.key(0), params, {"hidden": 1.0}, roles=dm.Roles(has_head=False)
    )
    assert not jnp.allclose(drawn["a"], drawn["b"])


def test_the_default_momentum_is_that_of_the_gpt_recipe():
    # https://github.com/LIONS-EPFL/scion: momentum 0.1, of the new gradient, in train_gpt_scion.py.
    params, grads = {"head": jnp.zeros((2, 1))}, {"head": jnp.array([[1.0], [1.0]])}
    tx = dm.scion(1.0, {"head": 1.0})
    updates, state = tx.update(grads, tx.init(params), params)
    # 0.9 · 0.1 - 0.1 · g changes sign at g = 0.9.
    for g, sign in ((0.8, 1), (1.0, -1)):
        updates, _ = tx.update({"head": jnp.array([[-g], [1.0]])}, state, params)
        assert float(jnp.sign(-updates["head"][0, 0])) == sign


def test_the_recipes_have_the_radii_of_the_paper():
    # `scale` and `last_scale` of Scion's train_gpt_scion.py; the CNN of its README: 8 and 8 · 16.
    assert dict(dm.optimizers.SCION_GPT_RADII) == {
        "hidden": 50.0,
        "head": 3000.0,
        "tied_head": 3000.0,
    }
    assert dict(dm.optimizers.SCION_CNN_RADII) == {"hidden": 8.0, "head": 128.0, "bias": 8.0}


LAYERS = dm.layers_by_path(random_tree(0), ["embed", "conv", ("dense", "bias"), "head"])


@pytest.mark.parametrize("name", ["scion", "gluon"])
def test_with_full_sampling_the_dropping_one_equals_the_whole_one(name):
    make, make_drop = getattr(dm, name), getattr(dm, f"drop_{name}")
    whole = make(0.1, RADII)
    drop = make_drop(0.1, LAYERS, RADII)
    params = other_params = random_tree(0)
    state, other_state = whole.init(params), drop.init(params)
    update = jax.jit(whole.update)
    other_update = jax.jit(functools.partial(drop.update, layer_mask=LAYERS.mask(0)))
    for k in range(4):
        grads = random_tree(k + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, other_state = other_update(grads, other_state, other_params)
        other_params = optax.apply_updates(other_params, updates)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("constrained", [True, False])
def test_a_dropped_layer_is_not_pulled_towards_zero(constrained):
    tx = dm.drop_scion(0.1, LAYERS, RADII, constrained=constrained)
    params = random_tree(0)
    updates, _ = tx.update(random_tree(1), tx.init(params), params, layer_mask=LAYERS.mask(2))
    moved = {name: bool(update.any()) for name, update in updates.items()}
    assert moved == {"embed": False, "conv": False, "dense": True, "bias": True, "head": True}


@pytest.mark.parametrize("name", ["drop_scion", "drop_gluon"])
def test_attention_kernels_are_taken_with_their_dimension_numbers(name):
    numbers = optax.contrib.MuonDimensionNumbers(0, (1, 2))
    params = {"query": jnp.ones((6, 2, 3)), "head": jnp.ones((6, 2))}
    layers = dm.layers_by_path(params, ["query", "head"])
    radii = {"hidden": 2.0, "head": 3.0}
    tx = getattr(dm, name)(1.0, layers, radii, dimension_numbers={"query": numbers})
    grads = {"query": jax.random.normal(jax.random.key(0), (6, 2, 3)), "head": params["head"]}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(zeros), zeros, layer_mask=layers.mask(0))
    values = jnp.linalg.svd(updates["query"].reshape(6, 6), compute_uv=False)
    assert (jnp.abs(values / 2 - 1) < 0.14).all()
    drawn = dm.optimizers.scion_init(
        jax.random.key(0), params, radii, dimension_numbers={"query": numbers}
    )
    values = jnp.linalg.svd(drawn["query"].reshape(6, 6), compute_uv=False)
    np.testing.assert_allclose(values, 2.0, rtol=1e-5)
