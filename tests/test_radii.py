"""Radii: fixed, scheduled, by path, and those that follow the dual norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

strict = pytest.mark.usefixtures("strict_promotion")


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


GRADS = {"stem": {"kernel": random(4, 3), "bias": random(3)}, "head": {"kernel": random(3, 2)}}


SIGN = dm.norms.sign_norm(normalized=False)


def sign_lmo(radius: Any) -> Any:
    """Steps of ±radius, which show it at once."""
    return dm.norm_lmo(SIGN, radius)


def sign_sharp(step_size: Any) -> Any:
    return dm.transforms.norm_sharp(SIGN, step_size)


def steps(tx: Any, tree: Any = GRADS) -> Any:
    return tx.update(tree, tx.init(tree))[0]


def sizes(updates: Any) -> dict[str, float]:
    """The size of the entries of each leaf, which are all of one size."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        smallest, largest = float(jnp.abs(leaf).min()), float(jnp.abs(leaf).max())
        assert smallest == pytest.approx(largest, rel=1e-6)
        found[name] = largest
    return found


def all_of_size(size: float) -> Any:
    return pytest.approx({"stem/kernel": size, "stem/bias": size, "head/kernel": size}, rel=1e-6)


def table(*values: float) -> optax.Schedule:
    """A schedule with these values."""
    return lambda count: jnp.asarray(values, jnp.float32)[count]


# --- Numbers and schedules ------------------------------------------------------------------------


@strict
@pytest.mark.parametrize("radius", [0.3, np.float64(0.3), np.float32(0.3)])
def test_a_number_is_the_radius_of_every_leaf(radius):
    assert sizes(steps(sign_lmo(radius))) == all_of_size(0.3)


@strict
def test_a_radius_may_be_traced():
    def step(radius):
        return steps(sign_lmo(radius))["head"]["kernel"]

    radii = jnp.array([0.3, 2.0])
    expected = jnp.stack([radius * jnp.sign(GRADS["head"]["kernel"]) for radius in radii])
    np.testing.assert_allclose(jax.jit(jax.vmap(step))(radii), expected, rtol=1e-6)


@strict
def test_a_schedule_is_followed_step_by_step():
    tx = sign_lmo(table(1.0, 0.5, 0.25))
    state = tx.init(GRADS)
    for expected in (1.0, 0.5, 0.25):
        updates, state = tx.update(GRADS, state)
        assert sizes(updates) == all_of_size(expected)


@strict
def test_a_scheduled_step_size_multiplies_the_dual_norm():
    tx = sign_sharp(table(1.0, 0.5))
    first, state = tx.update(GRADS, tx.init(GRADS))
    second, _ = tx.update(GRADS, state)
    plain = steps(sign_sharp(1.0))
    jax.tree.map(np.testing.assert_array_equal, first, plain)
    jax.tree.map(lambda s, p: np.testing.assert_allclose(s, p / 2, rtol=1e-6), second, plain)


@strict
def test_a_schedule_counts_the_steps_of_inactive_leaves_too():
    tx = sign_lmo(table(1.0, 0.5, 0.25))
    state = tx.init(GRADS)
    inactive = {"stem": {"kernel": False, "bias": False}, "head": {"kernel": True}}
    for _ in range(2):
        _, state = tx.update(GRADS, state, layer_mask=inactive)
    updates, _ = tx.update(GRADS, state)
    assert sizes(updates) == all_of_size(0.25)


@strict
def test_a_schedule_counts_the_steps_in_which_nothing_is_active():
    tx = sign_lmo(table(1.0, 0.5))
    nothing = jax.tree.map(lambda _: False, GRADS)
    _, state = tx.update(GRADS, tx.init(GRADS), layer_mask=nothing)
    updates, _ = tx.update(GRADS, state)
    assert sizes(updates) == all_of_size(0.5)


@strict
@pytest.mark.parametrize("make", [sign_lmo, sign_sharp])
@pytest.mark.parametrize(
    ("radius", "scheduled"),
    [
        (0.3, False),
        (jnp.array(0.3), False),
        ({"stem": 0.3, "head": 1.0}, False),
        (table(1.0), True),
        ({"stem": 0.3, "head": table(1.0)}, True),
    ],
    ids=["number", "array", "mapping", "schedule", "mapping_with_a_schedule"],
)
def test_there_is_a_state_only_with_a_schedule(radius, scheduled, make):
    tx = make(radius)
    state = tx.init(GRADS)
    if scheduled:
        assert state == dm.transforms.RadiusState(jnp.zeros((), jnp.int32))
        assert tx.update(GRADS, state)[1] == dm.transforms.RadiusState(jnp.ones((), jnp.int32))
    else:
        assert state == tx.update(GRADS, state)[1] == optax.EmptyState()


@strict
def test_an_adaptive_radius_has_no_state():
    assert sign_lmo(dm.schedules.adaptive_radius(1.0)).init(GRADS) == optax.EmptyState()


# --- By path --------------------------------------------------------------------------------------


@strict
@pytest.mark.parametrize("make", [sign_lmo, sign_sharp])
def test_a_mapping_gives_each_leaf_its_own_radius(make):
    radius = {"stem/kernel": 0.3, "bias": 2.0, "/head": jnp.array(0.5)}
    updates, plain = steps(make(radius)), steps(make(1.0))
    for path, size in (("stem", 0.3), ("head", 0.5)):
        expected = size * plain[path]["kernel"]
        np.testing.assert_allclose(updates[path]["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(updates["stem"]["bias"], 2 * plain["stem"]["bias"], rtol=1e-6)


@strict
def test_a_mapping_may_hold_schedules_and_adaptive_radii():
    radius = {"kernel": table(1.0, 0.5), "bias": dm.schedules.adaptive_radius(2.0, 1.0)}
    tx = sign_lmo(radius)
    _, state = tx.update(GRADS, tx.init(GRADS))
    updates, _ = tx.update(GRADS, state)
    dual = float(jnp.abs(GRADS["stem"]["bias"]).sum())
    expected = {"stem/kernel": 0.5, "head/kernel": 0.5, "stem/bias": dual / (2 + dual)}
    assert sizes(updates) == pytest.approx(expected, rel=1e-6)


@strict
def test_a_mapping_may_name_leaves_of_another_chain():
    radius = {"stem/kernel": 0.3, "head": 0.5, "bias": 2.0}
    tx = dm.chain_subtrees(
        {"matrix": sign_lmo(radius), "other": sign_lmo(radius)},
        dm.matrix_labels,
    )
    expected = {"stem/kernel": 0.3, "head/kernel": 0.5, "stem/bias": 2.0}
    assert sizes(steps(tx)) == pytest.approx(expected, rel=1e-6)


@strict
def test_a_pattern_that_no_chain_has_is_still_an_error():
    lmo = sign_lmo({"stem": 0.3, "head": 0.5, "tail": 1.0})
    tx = dm.chain_subtrees({"matrix": lmo, "other": optax.identity()}, dm.matrix_labels)
    with pytest.raises(ValueError, match="radius: pattern 'tail' matches no leaf"):
        tx.init(GRADS)


@strict
def test_a_mapping_reaches_each_layer_of_per_layer():
    layers = dm.layers_by_path(GRADS, ["stem", "head"])
    tx = dm.per_layer(sign_lmo({"stem": 0.3, "head": 0.5}), layers)
    expected = {"stem/kernel": 0.3, "stem/bias": 0.3, "head/kernel": 0.5}
    assert sizes(steps(tx)) == pytest.approx(expected, rel=1e-6)


# --- Adaptive -------------------------------------------------------------------------------------

# The dual norm and the direction of a Flax kernel (in, out), in NumPy.
ADAPTIVE: dict[str, tuple[Any, Any, Any]] = {
    "svd": (
        dm.norms.spectral_norm("spectral"),
        lambda g: np.linalg.svd(g, compute_uv=False).sum(),
        lambda g: np.matmul(*np.linalg.svd(g, full_matrices=False)[::2]),
    ),
    "sign": (
        dm.norms.sign_norm(),
        lambda g: np.abs(g).sum() / g.shape[0],
        lambda g: np.sign(g) / g.shape[0],
    ),
    "column": (
        dm.norms.column_norm(),
        lambda g: np.sqrt(g.shape[1]) * np.linalg.norm(g, axis=1).sum(),
        lambda g: np.sqrt(g.shape[1]) * g / np.linalg.norm(g, axis=1, keepdims=True),
    ),
    "rms": (
        dm.norms.rms_norm(),
        lambda g: np.sqrt(g.size) * np.linalg.norm(g),
        lambda g: np.sqrt(g.size) * g / np.linalg.norm(g),
    ),
}


@strict
@pytest.mark.parametrize(("l0", "l1"), [(2.0, 0.5), (0.0, 4.0), (3.0, 0.0)])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_radius_is_gluons(name, l0, l1):
    """‖M‖* / (L⁰ + L¹ ‖M‖*), with the norm of the layer."""
    norm, dual_norm, direction = ADAPTIVE[name]
    gradient = random(4, 3)
    updates = steps(dm.norm_lmo(norm, dm.schedules.adaptive_radius(l0, l1)), {"w": gradient})
    g = np.asarray(gradient, np.float64)
    radius = dual_norm(g) / (l0 + l1 * dual_norm(g))
    np.testing.assert_allclose(updates["w"], radius * direction(g), rtol=1e-5)


@strict
def test_an_adaptive_radius_minimises_the_bound_of_its_smoothness():
    l0, l1, gradient = 2.0, 0.5, random(4, 3)
    dual = float(jnp.abs(gradient).sum())
    radius = float(
        jnp.abs(steps(sign_lmo(dm.schedules.adaptive_radius(l0, l1)), {"w": gradient})["w"]).max()
    )

    def bound(t):
        return -t * dual + t**2 / 2 * (l0 + l1 * dual)

    ts = np.linspace(0, 2 * radius, 2001)
    assert ts[np.argmin(bound(ts))] == pytest.approx(radius, abs=1e-3)


@strict
def test_each_matrix_of_a_batch_has_its_own_adaptive_radius():
    stack = random(2, 4, 3) * jnp.array([[[0.1]], [[10.0]]])
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    radius = dm.schedules.adaptive_radius(2.0, 0.5)
    norm = dm.norms.sign_norm()
    batch = steps(dm.norm_lmo(norm, radius, dimension_numbers=numbers), {"w": stack})["w"]
    alone = [steps(dm.norm_lmo(norm, radius), {"w": matrix})["w"] for matrix in stack]
    np.testing.assert_allclose(batch, jnp.stack(alone), rtol=1e-6)


@strict
def test_without_l1_it_is_the_sharp_form():
    lmo, sharp = sign_lmo(dm.schedules.adaptive_radius(4.0)), sign_sharp(1 / 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), steps(lmo), steps(sharp))


@strict
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_without_l0_the_radius_is_constant(scale):
    grads = jax.tree.map(lambda g: jnp.float32(scale) * g, GRADS)
    assert sizes(steps(sign_lmo(dm.schedules.adaptive_radius(0.0, 4.0)), grads)) == all_of_size(
        0.25
    )


# L¹ ‖M‖* is no normal number here, and the radius 1/L¹ is.
@strict
@pytest.mark.parametrize(("value", "l1"), [(1e-37, 1e-2), (1e37, 1e2)])
def test_an_adaptive_radius_is_right_at_the_ends_of_the_numbers(value, l1):
    updates = steps(sign_lmo(dm.schedules.adaptive_radius(0.0, l1)), {"w": jnp.full((1, 2), value)})
    np.testing.assert_allclose(updates["w"], np.full((1, 2), 1 / l1), rtol=1e-5)


@strict
@pytest.mark.parametrize(("l0", "l1"), [(2.0, 0.5), (0.0, 4.0), (3.0, 0.0)])
def test_a_zero_gradient_gives_a_zero_step(l0, l1):
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    updates = steps(sign_lmo(dm.schedules.adaptive_radius(l0, l1)), zero)
    jax.tree.map(np.testing.assert_array_equal, updates, zero)


@strict
def test_a_nan_in_the_gradient_is_not_lost_in_its_radius():
    bad = {"w": random(4, 3).at[1, 2].set(jnp.nan)}
    assert jnp.isnan(steps(sign_lmo(dm.schedules.adaptive_radius(0.0, 1.0)), bad)["w"]).all()


@strict
def test_the_constants_of_an_adaptive_radius_may_be_traced():
    def step(l0, l1):
        return steps(sign_lmo(dm.schedules.adaptive_radius(l0, l1)), {"w": random(4, 3)})["w"]

    traced = jax.jit(step)(jnp.array(2.0), jnp.array(0.5))
    np.testing.assert_allclose(traced, step(2.0, 0.5), rtol=1e-6)


@strict
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_adaptive_step_has_the_dtype_of_the_gradient(dtype):
    gradient = random(4, 3).astype(dtype)
    update = steps(sign_lmo(dm.schedules.adaptive_radius(2.0, 0.5)), {"w": gradient})["w"]
    assert update.dtype == dtype
    # Rounded once.
    exact = steps(
        sign_lmo(dm.schedules.adaptive_radius(2.0, 0.5)), {"w": gradient.astype(jnp.float32)}
    )["w"]
    np.testing.assert_array_equal(update, exact.astype(dtype))


# --- Gluon's schedules ----------------------------------------------------------------------------

STEPS = [0, 1, 2, 15, 99, 10**6]


@pytest.mark.parametrize("convert", [int, np.int32, jnp.int32])
@pytest.mark.parametrize("step", STEPS)
def test_gluons_radius_falls_as_the_three_quarter_power(step, convert):
    radius = float(dm.schedules.gluon_radius(0.3)(convert(step)))
    assert radius == pytest.approx(0.3 * (step + 1) ** (-3 / 4), rel=1e-6)


@pytest.mark.parametrize("convert", [int, np.int32, jnp.int32])
@pytest.mark.parametrize("step", STEPS)
def test_gluons_decay_grows_to_one_as_the_square_root(step, convert):
    decay = float(dm.schedules.gluon_decay()(convert(step)))
    assert decay == pytest.approx(1 - (step + 1) ** (-1 / 2), rel=1e-6)


@strict
@pytest.mark.parametrize(
    "schedule",
    [dm.schedules.gluon_radius(0.3), dm.schedules.gluon_decay()],
    ids=["radius", "decay"],
)
def test_gluons_schedules_promote_nothing_silently(schedule):
    assert schedule(jnp.array(3, jnp.int32)).dtype == jnp.float32


def test_gluons_radius_shrinks_the_steps_of_an_lmo():
    tx = sign_lmo(dm.schedules.gluon_radius(0.3))
    state = tx.init(GRADS)
    for step in range(3):
        updates, state = tx.update(GRADS, state)
        assert sizes(updates) == all_of_size(0.3 * (step + 1) ** -0.75)


def test_a_momentum_with_gluons_decay_is_the_papers_over_five_steps():
    """With a layer that is inactive in two of them, and goes on with the decay of all steps."""
    rng = np.random.default_rng(0)
    history = [{name: rng.normal(size=(3, 2)) for name in ("stem", "head")} for _ in range(5)]
    tx = dm.momentum(dm.schedules.gluon_decay())
    state = tx.init(jax.tree.map(jnp.asarray, history[0]))
    expected = {name: np.zeros((3, 2)) for name in ("stem", "head")}
    for step, grads in enumerate(history):
        mask = {"stem": step not in (1, 3), "head": True}
        decay = 1 - (step + 1) ** -0.5
        for name in expected:
            if mask[name]:
                expected[name] = decay * expected[name] + (1 - decay) * grads[name]
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, layer_mask=mask)
        for name in expected:
            np.testing.assert_allclose(state.momentum[name], expected[name], atol=1e-6)
            np.testing.assert_allclose(updates[name], mask[name] * expected[name], atol=1e-6)
    assert state.count == 5


# --- inject_hyperparams ---------------------------------------------------------------------------


def test_an_injected_radius_can_be_set_between_steps():
    tx = optax.inject_hyperparams(dm.norm_lmo)(SIGN, radius=0.3)
    state = tx.init(GRADS)
    updates, state = tx.update(GRADS, state)
    assert sizes(updates) == all_of_size(0.3)
    state.hyperparams["radius"] = jnp.array(0.5)
    updates, _ = tx.update(GRADS, state)
    assert sizes(updates) == all_of_size(0.5)


def test_an_injected_schedule_is_the_schedule():
    tx = optax.inject_hyperparams(dm.norm_lmo)(SIGN, radius=table(1.0, 0.5))
    state = tx.init(GRADS)
    for expected in (1.0, 0.5):
        updates, state = tx.update(GRADS, state)
        assert sizes(updates) == all_of_size(expected)


@pytest.mark.parametrize(
    "radius",
    [
        {"stem": 0.3, "head": dm.schedules.adaptive_radius(2.0, 1.0)},
        dm.schedules.adaptive_radius(2.0, 1.0),
    ],
    ids=["mapping", "adaptive"],
)
def test_mappings_and_adaptive_radii_pass_through_injection(radius):
    injected = optax.inject_hyperparams(dm.norm_lmo)(SIGN, radius=radius)
    jax.tree.map(np.testing.assert_array_equal, steps(injected), steps(sign_lmo(radius)))


def test_an_adaptive_radius_is_a_tree_of_its_constants():
    # So that a step may take it as an argument, with no compilation for each fit.
    @jax.jit
    def step(radius, grads):
        tx = sign_lmo(radius)
        return tx.update(grads, tx.init(grads))[0]

    grads = {"w": jnp.array([5.0, -1.0])}
    for l0, length in ((2.0, 0.75), (6.0, 0.5)):
        updates = step(dm.schedules.adaptive_radius(l0, 1.0), grads)
        np.testing.assert_allclose(updates["w"], [length, -length], rtol=1e-6)
    assert step._cache_size() == 1
