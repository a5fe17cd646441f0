"""α-NormEC by NumPy, its invariant, and what dp-accounting says of its noise."""

import functools
import math
import zlib

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import dropmuon_jax as dm
import reference
from dropmuon_jax.compression.exchange import mean_of_arrays
from dropmuon_jax.privacy import PrivacyPlan, bounded_mean, clip21, norm_ec, safe_step

NUM_CLIENTS, SIZE, SEED = 3, 6, 7


class LoudPlan(PrivacyPlan):
    """Noise of standard deviation 1/2, whatever ε."""

    noise_multiplier = 0.5  # pyright: ignore[reportAssignmentType]


def problem():
    rng = np.random.default_rng(4)
    maps, goals = rng.normal(size=(NUM_CLIENTS, SIZE, SIZE)), rng.normal(size=(NUM_CLIENTS, SIZE))
    return rng.normal(size=SIZE), lambda i, x: maps[i] @ maps[i].T @ x - goals[i]


def noise(step, client):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), step), client)
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(b"w")))
    return 0.5 * np.asarray(jax.random.normal(key, (SIZE,), np.float64))


@pytest.mark.parametrize("plan", [None, LoudPlan(8.0, 1e-5, rounds=10)], ids=["", "private"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ten_rounds_are_those_of_numpy(plan, normalize):
    """g_i, ĝ and x in float64; ĝ is the mean of all g_i, but for noise."""
    start, gradient = problem()
    with jax.enable_x64(True):
        tx = norm_ec(0.5, 0.3, plan=plan, server_normalization=normalize, seed=SEED)
        tx = dm.compression.on_workers(
            optax.chain(tx, optax.scale_by_learning_rate(0.1)), NUM_CLIENTS
        )
        none = {} if plan is None else {"noise": noise}
        model = reference.NormEC(
            start, NUM_CLIENTS, alpha=0.5, beta=0.3, gamma=0.1, normalize=normalize, **none
        )
        params = {"w": jnp.asarray(start)}
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(10):
            grads = [gradient(i, np.asarray(params["w"])) for i in range(NUM_CLIENTS)]
            updates, state = update({"w": jnp.stack(grads)}, state, params)
            params = optax.apply_updates(params, updates)
            model.step(step, [functools.partial(gradient, i) for i in range(NUM_CLIENTS)])
            np.testing.assert_allclose(params["w"], model.x, atol=1e-10)
            own = state[0].worker.estimate["w"]
            np.testing.assert_allclose(own, np.stack(model.g), atol=1e-10)
            np.testing.assert_allclose(state[0].estimate["w"], model.estimate, atol=1e-10)
        if plan is None:
            np.testing.assert_allclose(np.mean(own, 0), state[0].estimate["w"], atol=1e-12)


def test_means_are_added_in_the_order_of_clients_whatever_the_shape_of_an_array():
    """Each of four clients adds up a part of an array, whose entries need not be 4, 8, 12, …"""
    rng, mean = np.random.default_rng(5), functools.partial(mean_of_arrays, axis="workers")
    shapes = ((), (0, 3), (1,), (4,), (5, 2), (3, 7))
    sent = [rng.normal(size=(4, *shape)).astype(np.float32) for shape in shapes]
    found = jax.jit(jax.vmap(mean, axis_name="workers", out_axes=None))(sent)
    for x, of_all in zip(found, sent, strict=True):
        np.testing.assert_array_equal(x, functools.reduce(np.add, of_all) / np.float32(4))


# Of a client with f(x) = L x² / 2, whose error is e before a message: φ(e), then the step's part.
def error_after(error, alpha, beta, moved):
    tx = norm_ec(alpha, beta, axis=None)
    params = {"w": jnp.zeros(1)}
    grads = {"w": jnp.array([error], jnp.float32)}
    _, state = tx.update(grads, tx.init(params))
    return abs(float(error - state.worker.estimate["w"][0] - moved))


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.01, 2),
    st.floats(0.01, 2),
    st.floats(0.1, 2),
    st.floats(0, 1),
    st.sampled_from([1, -1]),
)
def test_an_error_stays_in_its_radius_with_the_safe_step(alpha, beta, radius, part, sign):
    try:
        step = safe_step(alpha, beta, radius, smoothness=3.0)
    except ValueError:
        assume(False)
    assert error_after(part * radius, alpha, beta, sign * 3.0 * step) <= radius * (1 + 1e-5)


def test_an_error_leaves_its_radius_with_the_step_of_the_literature():
    alpha, beta, radius, smoothness = 0.01, 0.9, 1.0, 3.0
    assert beta / (alpha + radius) < 1
    worst = math.sqrt(alpha * beta) - alpha
    remembered = beta * radius / ((alpha + radius) * smoothness)
    assert error_after(worst, alpha, beta, smoothness * remembered) > 1.5 * radius
    safe = safe_step(alpha, beta, radius, smoothness)
    assert error_after(worst, alpha, beta, smoothness * safe) == pytest.approx(radius, rel=1e-4)
    assert safe < remembered / 3


def test_no_step_is_safe_where_a_message_overshoots():
    with pytest.raises(ValueError, match="Take a smaller beta"):
        safe_step(0.01, 3.0, radius=1.0, smoothness=1.0)


@pytest.mark.parametrize(
    ("tx", "length"),
    [
        (bounded_mean(alpha=0.1, axis=None), 1.0),
        (bounded_mean(clip_norm=0.3, axis=None), 0.3),
        (clip21(0.3, axis=None), 0.3),
        (norm_ec(0.1, 1.0, server_normalization=False, axis=None), 1.0),
    ],
    ids=["normalized", "clipped", "clip21", "norm_ec"],
)
@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5))
def test_no_message_is_longer_than_what_noise_is_made_for(tx, length, numbers):
    """Of bfloat16 gradients too, whose lengths are taken in float32."""
    for dtype in (jnp.float32, jnp.bfloat16):
        grads = {"a": jnp.array(numbers[:3], dtype), "b": jnp.array(numbers[3:], dtype)}
        _, state = tx.update(grads, tx.init(grads))
        assert float(optax.tree.norm(state.estimate)) <= length * (1 + 1e-6)


def test_a_length_is_exact_where_squares_underflow_and_overflow():
    tx = bounded_mean(alpha=0.0, axis=None)
    for size in (1e-37, 1e-20, 1e30):
        grads = {"w": jnp.full(10_000, size, jnp.float32).at[0].set(1.1 * size)}
        updates, _ = tx.update(grads, tx.init(grads))
        assert float(optax.tree.norm(updates)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_client_with_nan_sends_noise_alone_and_keeps_what_it_has(bad):
    """A message that is no number is not bounded, and would be in everybody's estimate forever."""
    plan = LoudPlan(8.0, 1e-5, rounds=5)
    tx = dm.compression.on_workers(norm_ec(0.1, 0.5, plan=plan, seed=SEED), 2)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    fine = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    _, state = tx.update(fine, tx.init(params), params)
    broken = {"a": fine["a"].at[1, 0].set(bad), "b": fine["b"]}
    kept = {k: x.at[1].set(state.worker.estimate[k][1]) for k, x in fine.items()}  # no error
    for one, other in zip(
        *(jax.tree.leaves(tx.update(g, state, params)) for g in (broken, kept)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_client_is_normalised_by_leaf_and_in_any_norm():
    grads = {"a": 3.0 * jnp.eye(2), "b": jnp.full((2, 2), 2.0)}
    options = {"server_normalization": False, "axis": None, "by": "leaf"}
    tx = norm_ec(1.0, 1.0, norm=dm.norms.spectral_norm(), **options)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], 0.75 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], 2.0 / 5 * np.ones((2, 2)), rtol=1e-6)
    tx = norm_ec(1.0, 1.0, **options)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["b"], 2.0 / 5 * np.ones((2, 2)), rtol=1e-6)


def test_a_mean_is_over_all_clients_whatever_their_data():
    """A client without data sends its message too: nobody's number of examples is told."""
    tx = dm.compression.on_workers(bounded_mean(alpha=0.0), 4)
    grads = {"w": jnp.zeros((4, 2)).at[0].set(5.0)}
    params = {"w": jnp.zeros(2)}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], np.full(2, 0.25 / np.sqrt(2)), rtol=1e-6)


# --- Accounting -----------------------------------------------------------------------------------


def exact_noise(rounds, epsilon, delta, length=1.0):
    """σ of Gaussian releases, which together are one: Balle and Wang, 2018, Theorem 8."""

    def excess(sigma):
        mu = length * math.sqrt(rounds) / sigma
        low, high = stats.norm.cdf(-epsilon / mu + mu / 2), stats.norm.cdf(-epsilon / mu - mu / 2)
        return low - math.exp(epsilon) * high - delta

    return optimize.brentq(excess, 0.1, 1000)


@pytest.mark.deep
@pytest.mark.parametrize("relation", ["add_or_remove", "replace"])
def test_the_noise_is_that_of_the_exact_law_of_gaussian_releases(relation):
    plan = PrivacyPlan(8.0, 1e-5, rounds=300, relation=relation)
    length = 1.0 if relation == "add_or_remove" else 2.0
    assert plan.noise_multiplier == pytest.approx(exact_noise(300, 8.0, 1e-5, length), rel=1e-3)
    assert plan.epsilon_after(300) <= 8.0


# What dp-accounting 0.6.0, Opacus and jax-privacy say of 300 rounds at ε = 8 and δ = 1e-5.
@pytest.mark.parametrize(
    ("options", "sigma"),
    [
        pytest.param({}, 10.396, marks=pytest.mark.deep),
        ({"accountant": "rdp"}, 11.045),
        pytest.param({"sampling_probability": 0.1}, 1.286, marks=pytest.mark.deep),
        ({"sampling_probability": 0.1, "accountant": "rdp"}, 1.361),
    ],
    ids=["pld", "rdp", "pld, sampled", "rdp, sampled"],
)
def test_the_noise_is_the_accountants(options, sigma):
    plan = PrivacyPlan(8.0, 1e-5, rounds=300, **options)
    assert plan.noise_multiplier == pytest.approx(sigma, rel=1e-3)


def test_what_is_spent_is_what_an_accountant_of_ones_own_says():
    plan = PrivacyPlan(8.0, 1e-5, rounds=20)
    tx, params = norm_ec(1.0, 0.1, plan=plan, axis=None, seed=SEED), {"w": jnp.zeros(3)}
    state = tx.init(params)
    for _ in range(5):
        _, state = tx.update(params, state)
    accountant = PLDAccountant()
    event = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, 5))
    assert plan.spent(state) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert plan.spent(tx.init(params)) == 0
    with pytest.raises(ValueError, match="ask the plan that the optimizer was made with"):
        PrivacyPlan(9.0, 1e-5, rounds=20, accountant="rdp").spent(state)
    without = norm_ec(1.0, 0.1, axis=None)  # nothing of it is private
    with pytest.raises(ValueError, match="has noise of multiplier 0, and"):
        plan.spent(without.init(params))


def test_after_the_last_round_nothing_is_sent_and_the_host_says_so():
    plan = LoudPlan(8.0, 1e-5, rounds=2)
    tx, params = norm_ec(1.0, 0.1, plan=plan, axis=None, seed=SEED), {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state)
    with pytest.raises(ValueError, match="3 rounds are more than the 2 that are accounted for"):
        tx.update(params, state)
    updates, after = jax.jit(tx.update)(params, state)  # where a count is no number yet
    assert not updates["w"].any()
    np.testing.assert_array_equal(after.estimate["w"], state.estimate["w"])
    with pytest.raises(ValueError, match="more than the 2"):
        plan.spent(after)


def first_update(tx):
    params = {"w": jnp.ones(1)}
    return tx.update(params, tx.init(params))


ERRORS = {
    "epsilon": (lambda: PrivacyPlan(0.0, 1e-5, rounds=1), "epsilon must be positive"),
    "delta": (lambda: PrivacyPlan(8.0, 1.0, rounds=1), r"delta must lie in \(0, 1\)"),
    "no delta": (lambda: PrivacyPlan(8.0, 0.0, rounds=1), r"delta must lie in \(0, 1\)"),
    "rounds": (lambda: PrivacyPlan(8.0, 1e-5, rounds=0), "rounds must be at least 1"),
    "sampling": (
        lambda: PrivacyPlan(8.0, 1e-5, rounds=1, sampling_probability=0.0),
        "sampling_probability must lie in",
    ),
    "rdp": (
        lambda: PrivacyPlan(8.0, 1e-5, rounds=1, relation="replace", accountant="rdp"),
        "take accountant='pld' for relation='replace'",
    ),
    "sampled clients": (
        lambda: norm_ec(1.0, 1.0, plan=PrivacyPlan(8.0, 1e-5, rounds=1, sampling_probability=0.1)),
        "all of them take part",
    ),
    "by leaf": (
        lambda: norm_ec(1.0, 1.0, plan=LoudPlan(8.0, 1e-5, rounds=1), by="leaf", seed=1),
        "at most 1 long in the Euclidean norm of the whole tree",
    ),
    "no seed": (
        lambda: clip21(1.0, plan=LoudPlan(8.0, 1e-5, rounds=1)),
        "give one that nobody can guess, such as secrets",
    ),
    "long seed": (lambda: norm_ec(1.0, 1.0, seed=1 << 40), r"seed must be below 2\*\*32"),
    "norm of a tree": (lambda: norm_ec(1.0, 1.0, norm=dm.norms.sign_norm()), "say by='leaf'"),
    "alpha": (lambda: norm_ec(-1.0, 1.0), "alpha must be at least 0"),
    "beta": (lambda: norm_ec(1.0, 0.0), "beta must be positive"),
    "both": (lambda: bounded_mean(alpha=1.0, clip_norm=1.0), "Give one of alpha and clip_norm"),
    "axis": (lambda: first_update(norm_ec(1.0, 1.0)), "outside of the axis 'workers'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    function, words = ERRORS[case]
    with pytest.raises(ValueError, match=words):
        function()


def test_what_is_no_norm_and_no_number_is_an_error_when_it_is_given():
    with pytest.raises(TypeError, match=r"norm must be a dm\.norms\.Norm, got"):
        norm_ec(1.0, 1.0, by="leaf", norm="spectral")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="delta must be a Python number, got '1e-5'"):
        PrivacyPlan(8.0, "1e-5", rounds=1)  # pyright: ignore[reportArgumentType]


def test_a_mask_that_freezes_is_refused():
    tx, params = norm_ec(1.0, 1.0, axis=None), {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(TypeError, match="A message is bounded as a whole"):
        tx.update(params, tx.init(params), layer_mask={"a": True, "b": False})
