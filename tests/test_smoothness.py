"""Smoothness along a run: the samples are the equation, the fit is the optimum."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
from dropmuon_jax.planning import SmoothnessRecord, SmoothnessSamples, fit_smoothness

SHAPES = {"stem": (6, 5), "mid": (5, 7), "head": (7, 3)}
EUCLIDEAN = dm.norms.euclidean_norm()


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


LAYERS = dm.layers_by_path(random_tree(0), list(SHAPES))


@functools.cache
def compiled(norm=EUCLIDEAN, every=1, numbers=None):
    """The tracker, and its update, compiled for each depth."""
    tx = dm.planning.track_smoothness(norm, every=every, dimension_numbers=numbers)

    @functools.partial(jax.jit, static_argnames="depth")
    def update(grads, state, params, depth=None, **second):
        mask = {} if depth is None else {"layer_mask": LAYERS.mask(depth)}
        return tx.update(grads, state, params, **mask, **second)

    return tx, update


def run(points, *tracker, depths=None, **options):
    """The samples of a run through given parameters and gradients."""
    tx, update = compiled(*tracker, **options)
    state, record = tx.init(points[0][0]), SmoothnessRecord()
    for step, (params, grads) in enumerate(points):
        _, state = update(grads, state, params, depth=depths and depths[step])
        record.append(state)
    return record.samples()


def random_points(num_steps, seed=0):
    return [(random_tree(seed + 2 * k), random_tree(seed + 2 * k + 1)) for k in range(num_steps)]


def changes(points, name, norm=EUCLIDEAN):
    """What is measured of a leaf in each step but the first: ‖g‖* and L̂."""
    found = []
    for (x, g), (new_x, new_g) in itertools.pairwise(points):
        step, change = (np.asarray(new[name] - old[name]) for new, old in ((new_x, x), (new_g, g)))
        found.append((norm.dual_norm(new_g[name]), norm.dual_norm(change) / norm.norm(step)))
    return np.array(found)


def assert_samples(samples, expected, rtol=1e-4):
    """That the samples of a leaf are those steps' of all that might be."""
    measured = np.stack([samples.dual_norms, samples.smoothness], axis=1)
    np.testing.assert_allclose(measured, expected[samples.steps - 1], rtol=rtol)


# --- The samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (dm.norms.spectral_norm("scion"), (3, 3, 2, 5)),
        (dm.norms.rms_norm(), (7,)),
        (dm.norms.rms_norm(), ()),
    ],
    ids=["convolution", "bias", "scalar"],
)
def test_samples_are_in_the_norm_of_the_leaf(norm, shape):
    numbers = np.random.default_rng(1).normal(size=(2, 2, *shape)).astype(np.float32)
    points = [({"conv": np.array(x)}, {"conv": np.array(g)}) for x, g in numbers]
    assert_samples(run(points, norm)["conv"], changes(points, "conv", norm))


def test_a_norm_with_an_iteration_needs_no_svd_and_is_as_accurate_as_it():
    norm = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz())
    points = random_points(3)
    for name, samples in run(points, norm).items():
        exact = changes(points, name, dm.norms.spectral_norm())
        assert_samples(samples, exact, rtol=0.14)
    tx, _ = compiled(norm)
    program = jax.make_jaxpr(tx.update)(points[0][1], tx.init(points[0][0]), points[0][0])
    assert " svd" not in str(program)


def test_leaves_of_one_shape_and_matrices_of_a_batch_do_not_mix():
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=0)
    numbers = np.random.default_rng(3).normal(size=(3, 2, 2, 5, 2, 6)).astype(np.float32)
    points = [tuple(dict(zip("vw", tree, strict=True)) for tree in point) for point in numbers]
    batches = run(points, dm.norms.spectral_norm(), numbers=axes)
    for name, samples in batches.items():
        np.testing.assert_array_equal(samples.steps, [1, 1, 2, 2])
        for j in range(2):
            alone = [tuple({"w": tree[name][:, j].T} for tree in point) for point in points]
            of_matrix = SmoothnessSamples(*(column[j::2] for column in samples))
            assert_samples(of_matrix, changes(alone, "w", dm.norms.spectral_norm()))


# --- Which steps and leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("depths", [None, [0, 1, 0, 0, 2, 0, 1, 1, 0]])
@pytest.mark.parametrize("every", [1, 3])
def test_a_sample_compares_a_step_with_the_one_before_it_if_the_leaf_was_active_in_both(
    every, depths
):
    points = random_points(9)
    samples = run(points, every=every, depths=depths)
    for layer, name in enumerate(SHAPES):
        active = [depth <= layer for depth in depths or [0] * 9]
        expected = [k for k in range(1, 9, every) if active[k - 1] and active[k]]
        np.testing.assert_array_equal(samples[name].steps, expected)
        assert_samples(samples[name], changes(points, name))


def test_a_sleeping_leaf_has_update_zero_and_keeps_what_is_remembered_of_it():
    (x, g), (new_x, new_g) = random_points(2)
    tx, update = compiled()
    _, before = update(g, tx.init(x), x)
    updates, after = update(new_g, before, new_x, depth=2)
    for tree in ("params", "gradients"):
        old, new = (getattr(state.remembered, tree) for state in (before, after))
        for name in ("stem", "mid"):
            assert np.asarray(old[name]).tobytes() == np.asarray(new[name]).tobytes()
            assert not updates[name].any()
    np.testing.assert_array_equal(after.remembered.active, [True, False, False])
    np.testing.assert_array_equal(updates["head"], new_g["head"])


def test_a_leaf_that_did_not_move_or_whose_gradient_is_not_finite_has_no_sample():
    points = random_points(4)
    points[1][0]["stem"] = points[0][0]["stem"]
    points[1][1]["mid"][0, 0] = np.nan
    samples = run(points)
    assert [list(samples[name].steps) for name in SHAPES] == [[2, 3], [3], [1, 2, 3]]
    with jax.debug_nans(True):  # of which a healthy run holds none
        run(random_points(3), depths=[2, 0, 0])


# --- As a transformation --------------------------------------------------------------------------


def test_gradients_pass_bit_for_bit():
    grads = {"w": np.float32([-0.0, np.nan, np.inf, 1e-45])}
    tx, update = compiled(every=3)
    updates, _ = update(grads, tx.init(grads), grads)
    assert np.asarray(updates["w"]).tobytes() == grads["w"].tobytes()


def test_what_is_remembered_has_the_structure_of_the_parameters_and_samples_have_not():
    tx, _ = compiled()
    state = tx.init(random_tree(0))
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 7, state)
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(mapped.remembered[:2]))
    np.testing.assert_array_equal(mapped.sample.smoothness, state.sample.smoothness)
    np.testing.assert_array_equal(mapped.leaf_of_matrix, [0, 1, 2])


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_keeps_structure_and_dtypes_without_silent_promotion(every, dtype):
    norm = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz(num_steps=1))
    tx, _ = compiled(norm, every)
    params = jax.tree.map(lambda p: p.astype(dtype), random_tree(0))
    expected, state = jax.eval_shape(tx.init, params), tx.init(params)
    for gradients in (params, random_tree(1)):
        for depth in (0, 2):
            update = functools.partial(tx.update, layer_mask=LAYERS.mask(depth))
            _, new = jax.eval_shape(update, gradients, state, params)
            assert jax.tree.structure(new) == jax.tree.structure(expected)
            assert jax.tree.leaves(new) == jax.tree.leaves(expected)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.remembered.gradients)}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_steps_of_bfloat16_parameters_are_those_after_rounding():
    x, new_x = jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.0, 2.015625], jnp.bfloat16)
    g, new_g = np.float32([1.0, 1.0]), np.float32([1.0, 1.5])
    samples = run([({"w": x}, {"w": g}), ({"w": new_x}, {"w": new_g})])["w"]
    np.testing.assert_allclose(samples.smoothness, [0.5 / 0.015625], rtol=1e-6)


def test_parameters_and_state_can_be_donated_together_and_the_record_survives_it():
    tx, update = compiled()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        _, state = update(grads, state, params)
        return jax.tree.map(jnp.subtract, params, grads), state

    params, record, points = jax.tree.map(jnp.array, random_tree(0)), SmoothnessRecord(), []
    _, state = tx.update(random_tree(1), tx.init(params), params)  # outside of jit, and no move
    for seed in range(2, 7):
        points.append((jax.tree.map(np.array, params), random_tree(seed)))
        params, state = step(params, state, points[-1][1])
        record.append(state)
    samples = record.samples()["mid"]
    assert_samples(samples._replace(steps=samples.steps - 1), changes(points, "mid"))


def test_steps_without_a_sample_pay_for_nothing_but_the_test():
    tx = dm.planning.track_smoothness(dm.norms.spectral_norm(), every=10)
    params, grads = random_points(1)[0]
    state = tx.init(params)
    program = jax.make_jaxpr(tx.update)(grads, state, params)
    outside = [eqn for eqn in program.eqns if eqn.primitive.name != "cond"]
    assert len(program.eqns) - len(outside) == 2
    assert all(var.aval.shape == () for eqn in outside for var in eqn.outvars)
    # What is passed through a conditional is passed on in its buffer.
    step = jax.jit(lambda state, params: tx.update(grads, state, params)[1], donate_argnums=0)
    analysis = step.lower(state, params).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_the_tracker_works_in_subtrees_and_under_accumulation():
    trackers = {
        "matrix": dm.planning.track_smoothness(dm.norms.row_norm()),
        "other": dm.planning.track_smoothness(dm.norms.rms_norm(), every=2),
    }
    tx = optax.MultiSteps(dm.chain_subtrees(trackers, dm.matrix_labels), 2)
    start = {"kernel": random_tree(0)["stem"], "bias": np.ones(5, np.float32)}
    state, record, update = tx.init(start), SmoothnessRecord(), jax.jit(tx.update)
    for step in range(8):
        params = jax.tree.map(lambda x, moved=step // 2: x + np.float32(moved), start)
        _, state = update(jax.tree.map(lambda x: 2 * x, params), state, params)
        record.append(state)
    samples = record.samples()
    np.testing.assert_array_equal(samples["kernel"].steps, [1, 2, 3])
    np.testing.assert_array_equal(samples["bias"].steps, [1, 3])
    # Of the root mean square's dual norm 2 √d ‖Δx‖₂ over ‖Δx‖₂ / √d.
    np.testing.assert_allclose(samples["bias"].smoothness, 2 * 5, rtol=1e-5)


# --- The record -----------------------------------------------------------------------------------


def test_a_record_takes_each_sample_once_however_often_it_is_shown():
    tx, update = compiled(every=3)
    record, state = SmoothnessRecord(), tx.init(random_tree(0))
    for params, grads in random_points(40):
        _, state = update(grads, state, params)
        record.append(state)
        record.append(state)
        if int(state.count) == 20:
            record.samples()
    np.testing.assert_array_equal(record.samples()["mid"].steps, range(1, 40, 3))


def test_a_record_lists_leaves_in_the_order_in_which_people_count():
    record = SmoothnessRecord()
    record.append(compiled()[0].init({f"layer_{i}": np.ones(2, np.float32) for i in (10, 2, 1)}))
    samples = record.samples()
    assert list(samples) == ["layer_1", "layer_2", "layer_10"]
    assert all(len(column) == 0 for of_leaf in samples.values() for column in of_leaf)


# --- The fit --------------------------------------------------------------------------------------


def fit_of(x, y, **options):
    samples = SmoothnessSamples(np.arange(len(x)), np.asarray(x), np.asarray(y))
    return fit_smoothness({"w": samples}, **options).leaves["w"]


@pytest.mark.parametrize("hinge", [0.0, 5.0])
@pytest.mark.parametrize(
    ("l0", "l1"), [(2.0, 3.0), (0.0, 70.0), (4.0, 0.0), (1e-7, 1e5), (3e8, 1.0)]
)
def test_the_fit_of_a_line_is_the_line(l0, l1, hinge):
    x = np.linspace(0.5, 2.0, 7)
    fit = fit_of(x, l0 + l1 * x, hinge=hinge)
    np.testing.assert_allclose([fit.l0, fit.l1], [l0, l1], atol=1e-9 * (l0 + l1))
    assert fit.underestimated == 0
    assert fit.relative_error < 1e-9
    assert fit.radius == pytest.approx(1.25 / (l0 + 1.25 * l1))


@pytest.mark.parametrize("hinge", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("line", [(2.0, 3.0), (0.0, 3.0), (2.0, 0.0), (9.0, -1.0)])
def test_the_fit_of_noise_satisfies_the_conditions_of_the_optimum(line, hinge):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.gamma(2.0, size=60)
        y = np.abs((line[0] + line[1] * x) * rng.lognormal(sigma=0.4, size=60))
        fit = fit_of(x, y, hinge=hinge)
        r = y - (fit.l0 + fit.l1 * x)
        weighted = np.where(r > 0, 1 + hinge, 1) * r
        scale = (1 + hinge) * np.array([y.sum(), x @ y])
        slopes = np.array([weighted.sum(), weighted @ x]) / scale  # minus half the gradient
        for constant, slope in zip((fit.l0, fit.l1), slopes, strict=True):
            assert constant >= 0
            assert abs(slope) < 1e-10 if constant > 0 else slope < 1e-10
        assert fit.underestimated == np.mean(r > 0)


def test_the_fit_prints_a_table_and_gives_the_radii_of_an_lmo():
    x = np.array([1.0, 2.0, 4.0])
    samples = {"a/w": (x, 2 + 3 * x), "w": (x, np.full(3, 4.0))}
    fit = fit_smoothness({name: SmoothnessSamples(x, *of) for name, of in samples.items()})
    assert str(fit).splitlines() == [
        "leaf  samples  L⁰  L¹  above  error  radius",
        "a/w         3   2   3     0%     0%    0.25",
        "w           3   4   0     0%     0%     0.5",
    ]
    grads = {"a": {"w": jnp.array([3.0, 4.0])}, "w": jnp.array([0.0, 2.0])}
    tx = dm.norm_lmo(EUCLIDEAN, fit.radii())  # 'w' alone would match both leaves
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"]["w"], 5 / (2 + 3 * 5) * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], [0.0, 0.5], rtol=1e-6)


# --- Errors ---------------------------------------------------------------------------------------

TRACKER = dm.planning.track_smoothness(dm.norms.row_norm())
STATE = TRACKER.init(random_tree(0))
STACKED = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), STATE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dm.planning.track_smoothness(dm.norms.row_norm), r"norm must be .* Call it"),
        (lambda: dm.planning.track_smoothness({"w": EUCLIDEAN}), "got a dict.*chain_subtrees"),
        (lambda: TRACKER.init({"bias": np.ones(3, np.float32)}), "leaf 'bias' has shape"),
        (lambda: TRACKER.update(random_tree(0), STATE), "pass them to update"),
        (lambda: SmoothnessRecord().append(optax.EmptyState()), "no SmoothnessState"),
        (lambda: SmoothnessRecord().append((STATE, STATE)), "'head' is tracked twice"),
        (lambda: SmoothnessRecord().append(STACKED), "a stack of 2: append one at a time"),
        (lambda: jax.jit(SmoothnessRecord().append)(STATE), r"append outside of jax\.jit"),
        (lambda: fit_smoothness({}), "samples is empty"),
        (lambda: fit_of([1.0], [2.0]), "Leaf 'w' has 1 samples, .* at least 2"),
        (lambda: fit_of([1.0, 2.0], [2.0]), "'w' must be two vectors of one length"),
        (lambda: fit_of([1.0, 2.0], [2.0, np.nan]), "smoothness of leaf 'w' must be finite"),
        (lambda: fit_of([1.0, -2.0], [2.0, 1.0]), "dual_norms of leaf 'w' must be finite and not"),
    ],
)
def test_what_cannot_be_tracked_or_fitted_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_leaf_whose_gradient_never_changed_has_no_radius():
    flat = SmoothnessSamples(np.arange(2), np.array([1.0, 2.0]), np.zeros(2))
    fit = fit_smoothness({"w": flat})
    assert fit.leaves["w"].radius == float("inf")
    with pytest.raises(ValueError, match="'w' never changed"):
        fit.radii()
