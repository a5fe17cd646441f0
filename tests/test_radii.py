"""Radii: fixed, scheduled, by path, and those that follow the dual norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("strict_promotion")


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


GRADS = {"stem": {"kernel": random(4, 3), "bias": random(3)}, "head": {"kernel": random(3, 2)}}
ALL, NOTHING = (jax.tree.map(lambda _, flag=flag: flag, GRADS) for flag in (True, False))
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
        name, entries = jax.tree_util.keystr(path, simple=True, separator="/"), np.abs(leaf)
        np.testing.assert_allclose(entries, entries.max(), rtol=1e-6)
        found[name] = float(entries.max())
    return found


def all_of_size(size: float) -> Any:
    return pytest.approx({"stem/kernel": size, "stem/bias": size, "head/kernel": size}, rel=1e-6)


def table(*values: float) -> optax.Schedule:
    """A schedule with these values."""
    return lambda count: jnp.asarray(values, jnp.float32)[count]


# --- Numbers and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.3, np.float64(0.3), np.float32(0.3)])
def test_a_number_is_the_radius_of_every_leaf(radius):
    assert sizes(steps(sign_lmo(radius))) == all_of_size(0.3)


def test_a_schedule_counts_all_steps_whatever_is_active():
    tx = sign_lmo(table(1.0, 0.5, 0.25, 0.125))
    state = tx.init(GRADS)
    stem_only = {"stem": ALL["stem"], "head": NOTHING["head"]}
    for mask, expected in ((ALL, 1.0), (stem_only, 0.5), (NOTHING, 0.25), (ALL, 0.125)):
        updates, state = tx.update(GRADS, state, layer_mask=mask)
        found = sizes(updates)
        for name, active in sizes(jax.tree.map(np.asarray, mask)).items():
            assert found[name] == pytest.approx(active * expected, rel=1e-6)


@pytest.mark.parametrize("make", [sign_lmo, sign_sharp])
def test_there_is_a_state_only_with_a_schedule(make):
    for radius in (0.3, jnp.array(0.3), {"stem": 0.3, "head": 1.0}):
        assert make(radius).init(GRADS) == optax.EmptyState()
    for radius in (table(1.0), {"stem": 0.3, "head": table(1.0)}):
        assert make(radius).init(GRADS) == dm.transforms.RadiusState(jnp.zeros((), jnp.int32))


# --- By path --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sign_lmo, sign_sharp])
def test_a_mapping_gives_each_leaf_its_own_radius(make):
    found = sizes(steps(make({"stem/kernel": 0.3, "bias": 2.0, "/head": jnp.array(0.5)})))
    plain = sizes(steps(make(1.0)))
    expected = {"stem/kernel": 0.3, "stem/bias": 2.0, "head/kernel": 0.5}
    assert found == pytest.approx({name: r * plain[name] for name, r in expected.items()}, rel=1e-6)


def test_a_mapping_may_hold_schedules_and_adaptive_radii():
    radius = {"kernel": table(1.0, 0.5), "bias": dm.schedules.adaptive_radius(2.0, 1.0)}
    tx = sign_lmo(radius)
    _, state = tx.update(GRADS, tx.init(GRADS))
    updates, _ = tx.update(GRADS, state)
    dual = float(np.abs(GRADS["stem"]["bias"]).sum())
    expected = {"stem/kernel": 0.5, "head/kernel": 0.5, "stem/bias": dual / (2 + dual)}
    assert sizes(updates) == pytest.approx(expected, rel=1e-6)


def test_a_mapping_may_name_leaves_of_another_chain_and_of_no_other():
    radius = {"stem/kernel": 0.3, "head": 0.5, "bias": 2.0}
    chains = {"matrix": sign_lmo(radius), "other": sign_lmo(radius)}
    expected = {"stem/kernel": 0.3, "head/kernel": 0.5, "stem/bias": 2.0}
    updates = steps(dm.chain_subtrees(chains, dm.matrix_labels))
    assert sizes(updates) == pytest.approx(expected, rel=1e-6)
    lmo = sign_lmo({"stem": 0.3, "head": 0.5, "tail": 1.0})
    tx = dm.chain_subtrees({"matrix": lmo, "other": optax.identity()}, dm.matrix_labels)
    with pytest.raises(ValueError, match="radius: pattern 'tail' matches no leaf"):
        tx.init(GRADS)


# --- Adaptive -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [dm.norms.spectral_norm(), dm.norms.sign_norm(), dm.norms.rms_norm()], ids=repr
)
def test_an_adaptive_radius_is_gluons_and_may_be_an_argument_of_a_step(norm):
    """‖M‖* / (L⁰ + L¹ ‖M‖*), with the norm of the layer; compiled once for all constants."""
    grad = random(4, 3)
    step = jax.jit(lambda radius: steps(dm.norm_lmo(norm, radius), {"w": grad})["w"])
    dual = norm.dual_norm(grad)
    for l0, l1 in ((2.0, 0.5), (0.0, 4.0), (3.0, 0.0)):
        expected = dual / (l0 + l1 * dual) * norm.direction(grad)
        update = step(dm.schedules.adaptive_radius(l0, l1))
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert step._cache_size() == 1


def test_each_matrix_of_a_batch_has_its_own_adaptive_radius():
    stack = random(2, 4, 3) * jnp.array([[[0.1]], [[10.0]]])
    numbers, radius = MuonDimensionNumbers(1, 2), dm.schedules.adaptive_radius(2.0, 0.5)
    batch = steps(dm.norm_lmo(SIGN, radius, dimension_numbers=numbers), {"w": stack})["w"]
    duals = np.abs(stack).sum(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(batch, duals / (2 + duals / 2) * np.sign(stack), rtol=1e-6)


# At the ends L¹ ‖M‖* is no normal number, and the radius 1/L¹ is.
@pytest.mark.parametrize(("value", "l1"), [(1e-30, 4.0), (1e30, 4.0), (1e-37, 1e-2), (1e37, 1e2)])
def test_without_l0_the_radius_is_constant_for_numbers_of_any_size(value, l1):
    updates = steps(sign_lmo(dm.schedules.adaptive_radius(0.0, l1)), {"w": jnp.full((1, 2), value)})
    np.testing.assert_allclose(updates["w"], np.full((1, 2), 1 / l1), rtol=1e-5)


@pytest.mark.parametrize(("l0", "l1"), [(2.0, 0.5), (0.0, 4.0), (3.0, 0.0)])
def test_a_zero_gradient_gives_a_zero_step_and_a_nan_is_not_lost(l0, l1):
    tx = sign_lmo(dm.schedules.adaptive_radius(l0, l1))
    grads = {"zero": jnp.zeros((4, 3)), "nan": random(4, 3).at[1, 2].set(jnp.nan)}
    updates = steps(tx, grads)
    np.testing.assert_array_equal(updates["zero"], grads["zero"])
    assert jnp.isnan(updates["nan"]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_adaptive_step_is_rounded_once_to_the_dtype_of_the_gradient(dtype):
    gradient = random(4, 3).astype(dtype)
    tx = sign_lmo(dm.schedules.adaptive_radius(2.0, 0.5))
    update, exact = (steps(tx, {"w": gradient.astype(of)})["w"] for of in (dtype, jnp.float32))
    np.testing.assert_array_equal(update, exact.astype(dtype), strict=True)


@pytest.mark.parametrize("convert", [int, np.int32, jnp.int32])
def test_gluons_radius_falls_as_the_three_quarter_power_and_its_decay_grows_as_the_root(convert):
    for step in (0, 1, 15, 10**6):
        radius = dm.schedules.gluon_radius(0.3)(convert(step))
        decay = dm.schedules.gluon_decay()(convert(step))
        assert float(radius) == pytest.approx(0.3 * (step + 1) ** (-3 / 4), rel=1e-6)
        assert float(decay) == pytest.approx(1 - (step + 1) ** (-1 / 2), rel=1e-6)
        assert radius.dtype == decay.dtype == jnp.float32


@pytest.mark.parametrize("is_mapping", [False, True])
def test_mappings_and_adaptive_radii_pass_through_injection(is_mapping):
    radius = dm.schedules.adaptive_radius(2.0, 1.0)
    radius = {"stem": 0.3, "head": radius} if is_mapping else radius
    injected = optax.inject_hyperparams(dm.norm_lmo)(SIGN, radius=radius)
    jax.tree.map(np.testing.assert_array_equal, steps(injected), steps(sign_lmo(radius)))
