"""Smoothness along a run: the samples are the equation, the fit is the optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"stem": (6, 5), "mid": (5, 7), "head": (7, 3)}


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


LAYERS = dm.layers_by_path(random_tree(0), list(SHAPES))


def run(tx, points, depths=None):
    """The record of a run through given parameters and gradients."""

    @functools.partial(jax.jit, static_argnums=3)
    def update(grads, state, params, depth):
        mask = {} if depth is None else {"layer_mask": LAYERS.mask(depth)}
        return tx.update(grads, state, params, **mask)[1]

    state, record = tx.init(points[0][0]), dm.planning.SmoothnessRecord()
    for step, (params, grads) in enumerate(points):
        state = update(grads, state, params, None if depths is None else depths[step])
        record.append(state)
    return record.samples()


def random_points(num_steps, seed=0):
    return [(random_tree(seed + 2 * k), random_tree(seed + 2 * k + 1)) for k in range(num_steps)]


# --- The samples ----------------------------------------------------------------------------------


def test_samples_of_a_quadratic_are_the_ratio_and_at_most_its_smoothness():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    hessian = factor @ factor.T
    tx = dm.planning.track_smoothness(dm.norms.euclidean_norm())
    x = rng.normal(size=(4, 3))
    points, expected = [], []
    for _ in range(12):
        points.append(({"x": jnp.asarray(x)}, {"x": jnp.asarray(hessian @ x)}))
        new = x - 0.05 * hessian @ x + 0.1 * rng.normal(size=x.shape)
        change = np.linalg.norm(hessian @ (new - x)) / np.linalg.norm(new - x)
        expected.append((np.linalg.norm(hessian @ new), change))
        x = new
    samples = run(tx, points)["x"]
    np.testing.assert_array_equal(samples.steps, range(1, 12))
    measured = np.stack([samples.dual_norms, samples.smoothness], axis=1)
    np.testing.assert_allclose(measured, expected[:-1], rtol=1e-4)
    assert samples.smoothness.max() <= np.linalg.eigvalsh(hessian)[-1] * (1 + 1e-4)


def nuclear(x):
    return np.linalg.svd(x, compute_uv=False).sum()


def as_matrix(x):
    return x.reshape(-1, x.shape[-1])


# For each norm its leaf, ‖X‖ and ‖G‖*, of Flax kernels (…, in, out).
NORMS = {
    "spectral": (
        dm.norms.spectral_norm("rms_to_rms"),
        (6, 5),
        lambda x: np.linalg.norm(x, 2) * (6 / 5) ** 0.5,
        lambda g: nuclear(g) * (5 / 6) ** 0.5,
    ),
    "convolution": (
        dm.norms.spectral_norm("scion"),
        (3, 3, 2, 5),
        lambda x: np.linalg.norm(as_matrix(x), 2) * 9 * (2 / 5) ** 0.5,
        lambda g: nuclear(as_matrix(g)) / 9 * (5 / 2) ** 0.5,
    ),
    "sign": (dm.norms.sign_norm(), (6, 5), lambda x: 6 * abs(x).max(), lambda g: abs(g).sum() / 6),
    "row": (
        dm.norms.row_norm(),
        (6, 5),
        lambda x: 6**0.5 * np.linalg.norm(x, axis=0).max(),
        lambda g: np.linalg.norm(g, axis=0).sum() / 6**0.5,
    ),
    "bias": (
        dm.norms.rms_norm(),
        (7,),
        lambda x: np.linalg.norm(x) / 7**0.5,
        lambda g: np.linalg.norm(g) * 7**0.5,
    ),
    "scalar": (dm.norms.rms_norm(), (), abs, abs),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_samples_are_in_the_norm_of_the_leaf(case):
    norm, shape, length, dual = case
    rng = np.random.default_rng(1)
    (x, g), (new_x, new_g) = rng.normal(size=(2, 2, *shape)).astype(np.float32)
    samples = run(
        dm.planning.track_smoothness(norm), [(jnp.array(x), jnp.array(g)), (new_x, new_g)]
    )[""]
    np.testing.assert_allclose(samples.dual_norms, [dual(new_g)], rtol=1e-4)
    np.testing.assert_allclose(samples.smoothness, [dual(new_g - g) / length(new_x - x)], rtol=1e-4)


def test_a_norm_with_an_iteration_needs_no_svd_and_is_as_accurate_as_it():
    norm = dm.norms.spectral_norm("scion", orthogonalize=dm.orthogonalize.newton_schulz())
    points = random_points(4)
    fast, exact = (
        run(dm.planning.track_smoothness(norm), points)
        for norm in (norm, dm.norms.spectral_norm("scion"))
    )
    for name in SHAPES:
        np.testing.assert_allclose(fast[name].smoothness, exact[name].smoothness, rtol=0.14)
    tx = dm.planning.track_smoothness(norm)
    program = jax.make_jaxpr(tx.update)(points[0][1], tx.init(points[0][0]), points[0][0])
    assert " svd" not in str(program)


def test_leaves_of_one_shape_do_not_mix():
    rng = np.random.default_rng(2)
    points = [
        (
            {n: jnp.asarray(rng.normal(size=(3, 4))) for n in "abc"},
            jnp.asarray(rng.normal(size=(3, 3, 4))),
        )
        for _ in range(3)
    ]
    points = [(params, dict(zip("abc", grads, strict=True))) for params, grads in points]
    together = run(dm.planning.track_smoothness(dm.norms.spectral_norm()), points)
    for name in "abc":
        alone = [({name: params[name]}, {name: grads[name]}) for params, grads in points]
        expected = run(dm.planning.track_smoothness(dm.norms.spectral_norm()), alone)[name]
        np.testing.assert_allclose(together[name].smoothness, expected.smoothness, rtol=1e-5)
        np.testing.assert_allclose(together[name].dual_norms, expected.dual_norms, rtol=1e-5)


def test_each_matrix_of_a_batch_has_samples_of_its_own():
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=0)
    rng = np.random.default_rng(3)
    points = [tuple(jnp.asarray(rng.normal(size=(5, 2, 6))) for _ in range(2)) for _ in range(3)]
    tx = dm.planning.track_smoothness(dm.norms.spectral_norm(), dimension_numbers=axes)
    batch = run(tx, [({"w": x, "v": x}, {"w": g, "v": g}) for x, g in points])["w"]
    np.testing.assert_array_equal(batch.steps, [1, 1, 2, 2])
    for j in range(2):
        alone = run(
            dm.planning.track_smoothness(dm.norms.spectral_norm()),
            [({"w": x[:, j].T}, {"w": g[:, j].T}) for x, g in points],
        )["w"]
        np.testing.assert_allclose(batch.smoothness[j::2], alone.smoothness, rtol=1e-5)


def test_gradients_of_the_same_batch_take_the_place_of_the_remembered():
    (x, g), (new_x, new_g) = random_points(2)
    same_batch = random_tree(9)
    tx = dm.planning.track_smoothness(dm.norms.euclidean_norm())
    update = jax.jit(tx.update)
    _, state = update(g, tx.init(x), x)
    _, state = update(new_g, state, new_x, prev_params_grads=same_batch)
    for i, name in enumerate(sorted(SHAPES)):
        change = np.linalg.norm(new_g[name] - same_batch[name])
        expected = change / np.linalg.norm(new_x[name] - x[name])
        assert float(state.sample.smoothness[i]) == pytest.approx(float(expected), rel=1e-5)


# --- Which steps and leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_a_sample_compares_a_step_with_the_one_before_it(every):
    points = random_points(9)
    all_steps = run(dm.planning.track_smoothness(dm.norms.euclidean_norm()), points)
    some = run(dm.planning.track_smoothness(dm.norms.euclidean_norm(), every=every), points)
    for name in SHAPES:
        np.testing.assert_array_equal(some[name].steps, range(1, 9, every))
        kept = np.isin(all_steps[name].steps, some[name].steps)
        for field in ("smoothness", "dual_norms"):
            expected = getattr(all_steps[name], field)[kept]
            np.testing.assert_allclose(getattr(some[name], field), expected, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_a_leaf_has_a_sample_only_if_it_was_active_in_both_steps(every):
    depths = [0, 1, 0, 0, 2, 0, 1, 1, 0]
    points = random_points(len(depths))
    awake = run(dm.planning.track_smoothness(dm.norms.euclidean_norm(), every=every), points)
    samples = run(
        dm.planning.track_smoothness(dm.norms.euclidean_norm(), every=every), points, depths
    )
    for depth, name in enumerate(SHAPES):
        expected = [
            k for k in range(1, len(depths), every) if depths[k - 1] <= depth and depths[k] <= depth
        ]
        np.testing.assert_array_equal(samples[name].steps, expected)
        kept = np.isin(awake[name].steps, expected)
        np.testing.assert_allclose(
            samples[name].smoothness, awake[name].smoothness[kept], rtol=1e-5
        )
    assert len(samples["stem"].steps) < len(samples["head"].steps)


def test_a_sleeping_leaf_keeps_what_is_remembered_of_it():
    tx = dm.planning.track_smoothness(dm.norms.euclidean_norm())
    (x, g), (new_x, new_g) = random_points(2)
    _, before = jax.jit(tx.update)(g, tx.init(x), x)
    update = jax.jit(functools.partial(tx.update, layer_mask=LAYERS.mask(2)))
    _, after = update(new_g, before, new_x)
    for tree in ("params", "gradients"):
        for name in ("stem", "mid"):
            old, new = (getattr(state.remembered, tree)[name] for state in (before, after))
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    np.testing.assert_array_equal(after.remembered.active, [True, False, False])


def test_a_leaf_that_did_not_move_has_no_sample():
    (x, g), (new_x, new_g) = random_points(2)
    samples = run(
        dm.planning.track_smoothness(dm.norms.spectral_norm()),
        [(x, g), ({**new_x, "mid": x["mid"]}, new_g)],
    )
    assert [len(samples[name].steps) for name in SHAPES] == [1, 0, 1]


def test_the_state_of_a_healthy_run_holds_no_nan():
    with jax.debug_nans(True):
        samples = run(
            dm.planning.track_smoothness(dm.norms.spectral_norm()), random_points(3), [2, 0, 0]
        )
    assert [len(samples[name].steps) for name in SHAPES] == [1, 1, 2]


def test_a_gradient_that_is_not_finite_gives_no_sample():
    points = random_points(4)
    points[1][1]["mid"] = points[1][1]["mid"].at[0, 0].set(jnp.nan)
    samples = run(dm.planning.track_smoothness(dm.norms.euclidean_norm()), points)
    np.testing.assert_array_equal(samples["mid"].steps, [3])
    np.testing.assert_array_equal(samples["head"].steps, [1, 2, 3])


# --- As a transformation --------------------------------------------------------------------------


def test_gradients_pass_bit_for_bit():
    grads = {"w": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45])}
    tx = dm.planning.track_smoothness(dm.norms.rms_norm(), every=2)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    assert np.asarray(updates["w"]).tobytes() == np.asarray(grads["w"]).tobytes()


def test_an_inactive_leaf_has_update_zero_and_the_others_keep_theirs():
    tx, (params, grads) = dm.planning.track_smoothness(dm.norms.rms_norm()), random_points(1)[0]
    updates, _ = tx.update(grads, tx.init(params), params, layer_mask=LAYERS.mask(2))
    assert not updates["stem"].any()
    assert not updates["mid"].any()
    np.testing.assert_array_equal(updates["head"], grads["head"])


def test_what_is_remembered_has_the_structure_of_the_parameters_and_samples_have_not():
    tx, params = dm.planning.track_smoothness(dm.norms.rms_norm()), random_tree(0)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 7, state)
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(mapped.remembered[:2]))
    np.testing.assert_array_equal(mapped.sample.smoothness, state.sample.smoothness)
    np.testing.assert_array_equal(mapped.leaf_of_matrix, [0, 1, 2])


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_keeps_structure_and_dtypes_without_silent_promotion(
    every, dtype, strict_promotion
):
    norm = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz(num_steps=1))
    tx, params = dm.planning.track_smoothness(norm, every=every), random_tree(0, dtype)
    state = tx.init(params)
    for gradients in (params, random_tree(1, jnp.float32)):
        for depth in (0, 2):
            update = functools.partial(tx.update, layer_mask=LAYERS.mask(depth))
            _, new = jax.eval_shape(update, gradients, state, params)
            expected = jax.eval_shape(lambda: state)
            assert jax.tree.structure(new) == jax.tree.structure(expected)
            assert jax.tree.leaves(new) == jax.tree.leaves(expected)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.remembered.gradients)}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_steps_of_bfloat16_parameters_are_those_after_rounding():
    x, new_x = jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.0, 2.015625], jnp.bfloat16)
    g, new_g = jnp.array([1.0, 1.0]), jnp.array([1.0, 1.5])
    samples = run(
        dm.planning.track_smoothness(dm.norms.euclidean_norm()), [(x, g), (new_x, new_g)]
    )[""]
    np.testing.assert_allclose(samples.smoothness, [0.5 / 0.015625], rtol=1e-6)


def test_a_donating_jit_and_a_scan_give_the_samples_of_a_loop():
    points = random_points(7)
    tx = dm.planning.track_smoothness(dm.norms.spectral_norm(), every=3)
    expected = run(tx, points)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads, new_params):
        _, state = tx.update(grads, state, params)
        return new_params, state

    params, state = jax.tree.map(jnp.array, (points[0][0], tx.init(points[0][0])))
    record = dm.planning.SmoothnessRecord()
    for (_, grads), (new_params, _) in zip(points, points[1:] + points[:1], strict=True):
        params, state = step(params, state, grads, new_params)
        record.append(state)

    def scan_step(state, point):
        _, state = tx.update(point[1], state, point[0])
        return state, state.sample

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    _, scanned = jax.jit(lambda state: jax.lax.scan(scan_step, state, stacked))(
        tx.init(points[0][0])
    )
    for i, name in enumerate(sorted(SHAPES)):
        np.testing.assert_allclose(
            record.samples()[name].smoothness, expected[name].smoothness, rtol=1e-5
        )
        np.testing.assert_allclose(
            scanned.smoothness[1::3, i], expected[name].smoothness, rtol=1e-5
        )


def test_steps_without_a_sample_pay_for_nothing_but_the_test():
    tx = dm.planning.track_smoothness(dm.norms.spectral_norm(), every=10)
    params, grads = random_points(1)[0]
    state = tx.init(params)
    program = jax.make_jaxpr(tx.update)(grads, state, params)
    outside = [eqn for eqn in program.eqns if eqn.primitive.name != "cond"]
    assert len(program.eqns) - len(outside) == 2
    assert all(var.aval.shape == () for eqn in outside for var in eqn.outvars)
    # What is passed through a conditional is passed on in its buffer.
    compiled = jax.jit(lambda state, params: tx.update(grads, state, params)[1], donate_argnums=0)
    analysis = compiled.lower(state, params).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_parameters_and_state_can_be_donated_together_after_an_update_outside_of_jit():
    params, grads = random_points(1)[0]
    params = jax.tree.map(jnp.array, params)
    tx = dm.planning.track_smoothness(dm.norms.rms_norm())
    _, state = tx.update(grads, tx.init(params), params)
    step = jax.jit(lambda params, state: tx.update(grads, state, params), donate_argnums=(0, 1))
    _, state = step(params, state)
    assert int(state.count) == 2


def test_the_tracker_works_in_subtrees_under_accumulation_and_beside_an_lmo():
    params = {"kernel": random_tree(0)["stem"], "bias": jnp.ones(5)}
    tracker = dm.chain_subtrees(
        {
            "matrix": dm.planning.track_smoothness(dm.norms.spectral_norm()),
            "other": dm.planning.track_smoothness(dm.norms.rms_norm(), every=2),
        },
        dm.matrix_labels,
    )
    tx = optax.MultiSteps(optax.chain(tracker, optax.sgd(0.1)), 2)
    state, record = tx.init(params), dm.planning.SmoothnessRecord()
    gradients = jax.grad(lambda p: jnp.sum(p["kernel"] ** 4) + jnp.sum(p["bias"] ** 2))
    update = jax.jit(tx.update)
    for _ in range(8):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
        record.append(state)
    samples = record.samples()
    np.testing.assert_array_equal(samples["kernel"].steps, [1, 2, 3])
    np.testing.assert_array_equal(samples["bias"].steps, [1, 3])
    # ∇ is 2x: of the root mean square's dual norm 2 √d ‖Δx‖₂ over ‖Δx‖₂ / √d.
    np.testing.assert_allclose(samples["bias"].smoothness, 2 * 5, rtol=1e-5)


def test_drop_muon_tracks_its_matrices_in_front_of_the_momentum():
    params = {
        "stem": {"kernel": random_tree(0)["stem"], "bias": jnp.ones(5)},
        "head": random_tree(0)["head"],
    }
    layers = dm.layers_by_path(params, ["stem", "head"])
    tracker = dm.planning.track_smoothness(dm.norms.spectral_norm("muon"))
    momentum = optax.chain(tracker, dm.momentum(0.9))
    tx = dm.drop_muon(0.1, layers, momentum=momentum)

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, state, depth):
        grads = jax.tree.map(jnp.square, params)
        updates, state = tx.update(grads, state, params, layer_mask=layers.mask(depth))
        return optax.apply_updates(params, updates), state

    state, record = tx.init(params), dm.planning.SmoothnessRecord()
    for depth in (0, 0, 1, 0):
        params, state = step(params, state, depth)
        record.append(state)
    samples = record.samples()
    assert set(samples) == {"stem/kernel", "head"}
    np.testing.assert_array_equal(samples["stem/kernel"].steps, [1])
    np.testing.assert_array_equal(samples["head"].steps, [1, 2, 3])


# --- The record -----------------------------------------------------------------------------------


def test_a_record_takes_each_sample_once_however_often_it_is_shown():
    tx = dm.planning.track_smoothness(dm.norms.euclidean_norm(), every=4)
    record, state, update = (
        dm.planning.SmoothnessRecord(),
        tx.init(random_tree(0)),
        jax.jit(tx.update),
    )
    for params, grads in random_points(40):
        _, state = update(grads, state, params)
        record.append(state)
        record.append(state)
        if int(state.count) == 20:
            record.samples()
    np.testing.assert_array_equal(record.samples()["mid"].steps, range(1, 40, 4))


def test_a_record_lists_leaves_in_the_order_in_which_people_count():
    params = {f"layer_{i}": jnp.ones(2) for i in (10, 2, 1)}
    tracker = dm.planning.track_smoothness(dm.norms.rms_norm())
    record = dm.planning.SmoothnessRecord()
    record.append(tracker.init(params))
    samples = record.samples()
    assert list(samples) == ["layer_1", "layer_2", "layer_10"]
    assert all(len(column) == 0 for of_leaf in samples.values() for column in of_leaf)


def test_a_record_refuses_what_it_cannot_read():
    tx, params = dm.planning.track_smoothness(dm.norms.euclidean_norm()), random_tree(0)
    state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"no SmoothnessState .* dm\.planning\.track_smoothness first"
    ):
        dm.planning.SmoothnessRecord().append(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="'head' is tracked twice"):
        dm.planning.SmoothnessRecord().append((state, state))
    with pytest.raises(ValueError, match="a stack of 2: append one at a time"):
        dm.planning.SmoothnessRecord().append(
            jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
        )
    with pytest.raises(TypeError, match=r"append outside of jax\.jit"):
        jax.jit(dm.planning.SmoothnessRecord().append)(state)


# --- The fit --------------------------------------------------------------------------------------


def leaf_samples(x, y):
    return dm.planning.SmoothnessSamples(np.arange(len(x)), np.asarray(x), np.asarray(y))


def objective(x, y, l0, l1, hinge):
    r = y - (l0 + l1 * x)
    return (r**2).sum() + hinge * (np.maximum(r, 0) ** 2).sum()


def noisy_line(seed, l0, l1):
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=60)
    return x, (l0 + l1 * x) * rng.lognormal(sigma=0.4, size=60)


@pytest.mark.parametrize("hinge", [0.0, 5.0])
@pytest.mark.parametrize(
    ("l0", "l1"), [(2.0, 3.0), (0.0, 70.0), (4.0, 0.0), (1e-7, 1e5), (3e8, 1.0)]
)
def test_the_fit_of_a_line_is_the_line(l0, l1, hinge):
    x = np.linspace(0.5, 2.0, 7)
    fit = dm.planning.fit_smoothness({"w": leaf_samples(x, l0 + l1 * x)}, hinge=hinge).leaves["w"]
    size = l0 + l1
    np.testing.assert_allclose([fit.l0, fit.l1], [l0, l1], atol=1e-9 * size)
    assert fit.underestimated == 0
    assert fit.relative_error < 1e-9
    assert fit.radius == pytest.approx(1.25 / (l0 + 1.25 * l1))


LINES = {"both": (2.0, 3.0), "only_l1": (0.0, 3.0), "only_l0": (2.0, 0.0), "falling": (9.0, -1.0)}


@pytest.mark.parametrize("hinge", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_the_fit_of_noise_satisfies_the_conditions_of_the_optimum(line, hinge):
    for seed in range(5):
        x, y = noisy_line(seed, *line)
        y = np.abs(y)
        fit = dm.planning.fit_smoothness({"w": leaf_samples(x, y)}, hinge=hinge).leaves["w"]
        r = y - (fit.l0 + fit.l1 * x)
        weighted = np.where(r > 0, 1 + hinge, 1) * r
        scale = (1 + hinge) * np.array([y.sum(), x @ y])
        slopes = np.array([weighted.sum(), weighted @ x]) / scale  # minus half the gradient
        for constant, slope in zip((fit.l0, fit.l1), slopes, strict=True):
            assert constant >= 0
            assert abs(slope) < 1e-10 if constant > 0 else slope < 1e-10
        assert fit.underestimated == np.mean(r > 0)


def test_no_line_of_a_fine_grid_is_better_than_the_fit():
    x, y = noisy_line(7, 2.0, 3.0)
    fit = dm.planning.fit_smoothness({"w": leaf_samples(x, y)}).leaves["w"]
    best = objective(x, y, fit.l0, fit.l1, 5.0)
    for l0 in np.linspace(0, 2 * fit.l0, 81):
        for l1 in np.linspace(0, 2 * fit.l1, 81):
            assert objective(x, y, l0, l1, 5.0) >= best * (1 - 1e-12)


def test_the_hinge_moves_the_line_above_the_samples():
    x, y = noisy_line(3, 2.0, 3.0)
    shares = [
        dm.planning.fit_smoothness({"w": leaf_samples(x, y)}, hinge=hinge)
        .leaves["w"]
        .underestimated
        for hinge in (0.0, 5.0, 1e6)
    ]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] <= 2 / 60  # a line is held by two points


def test_the_fit_does_not_depend_on_the_units():
    x, y = noisy_line(4, 2.0, 3.0)
    plain = dm.planning.fit_smoothness({"w": leaf_samples(x, y)}).leaves["w"]
    scaled = dm.planning.fit_smoothness({"w": leaf_samples(1e-12 * x, 1e15 * y)}).leaves["w"]
    assert scaled.l0 == pytest.approx(1e15 * plain.l0)
    assert scaled.l1 == pytest.approx(1e27 * plain.l1)
    assert scaled.radius == pytest.approx(1e-27 * 1e15 * 1e-12 / 1e-12 * plain.radius)


def test_the_fit_prints_a_table_and_gives_the_radii_of_an_lmo():
    x = np.array([1.0, 2.0, 4.0])
    fit = dm.planning.fit_smoothness(
        {"a/w": leaf_samples(x, 2 + 3 * x), "w": leaf_samples(x, np.array([4.0, 4.0, 4.0]))}
    )
    assert str(fit).splitlines() == [
        "leaf  samples  L⁰  L¹  above  error  radius",
        "a/w         3   2   3     0%     0%    0.25",
        "w           3   4   0     0%     0%     0.5",
    ]
    grads = {"a": {"w": jnp.array([3.0, 4.0])}, "w": jnp.array([0.0, 2.0])}
    tx = dm.norm_lmo(dm.norms.euclidean_norm(), fit.radii())  # 'w' alone would match both leaves
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"]["w"], 5 / (2 + 3 * 5) * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], [0.0, 0.5], rtol=1e-6)


def test_a_quadratic_is_solved_in_one_step_of_the_radius_that_was_fitted():
    norm = dm.norms.euclidean_norm()
    gradient = jax.grad(lambda params: jnp.sum((params["x"] - 3.0) ** 2))
    points = [({"x": jnp.full(4, x)}, gradient({"x": jnp.full(4, x)})) for x in (0.0, 0.5, 0.7)]
    fit = dm.planning.fit_smoothness(run(dm.planning.track_smoothness(norm), points))
    tx = optax.chain(dm.norm_lmo(norm, fit.radii()), optax.scale_by_learning_rate(1.0))
    params, grads = points[0]
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["x"], 3.0, rtol=1e-5)


# --- Errors ---------------------------------------------------------------------------------------


def test_bad_arguments_of_the_tracker_are_named():
    with pytest.raises(
        TypeError, match=r"norm must be a dm\.norms\.Norm, got a function\. Call it"
    ):
        dm.planning.track_smoothness(dm.norms.spectral_norm)
    with pytest.raises(
        TypeError, match=r"got a dict\. Give leaves with other norms .*chain_subtrees"
    ):
        dm.planning.track_smoothness({"w": dm.norms.spectral_norm()})
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        dm.planning.track_smoothness(dm.norms.rms_norm(), every=0)
    with pytest.raises(
        TypeError, match=r"every must be a Python integer, got an array.*static_args"
    ):
        dm.planning.track_smoothness(dm.norms.rms_norm(), every=jnp.array(3))


def test_leaves_that_a_norm_cannot_take_are_named_at_init():
    with pytest.raises(ValueError, match="leaf 'bias' has shape"):
        dm.planning.track_smoothness(dm.norms.spectral_norm()).init({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="floating-point"):
        dm.planning.track_smoothness(dm.norms.rms_norm()).init({"table": jnp.ones(3, int)})


def test_a_missing_argument_of_update_is_named():
    tx, params = dm.planning.track_smoothness(dm.norms.rms_norm()), random_tree(0)
    with pytest.raises(
        ValueError, match=r"pass them to update, tx\.update\(grads, opt_state, params\)"
    ):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="Did you mean 'layer_mask'"):
        tx.update(params, tx.init(params), params, layer_masks=params)
    with pytest.raises(ValueError, match=r"prev_params_grads .* 'mid' is missing"):
        tx.update(params, tx.init(params), params, prev_params_grads={**params, "mid": None})


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "samples is empty"),
        ({"w": leaf_samples([1.0], [2.0])}, "Leaf 'w' has 1 samples, .* at least 2"),
        ({"w": leaf_samples([1.0, 2.0], [2.0])}, "'w' must be two vectors of one length"),
        ({"w": leaf_samples([1.0, 2.0], [2.0, np.nan])}, "smoothness of leaf 'w' must be finite"),
        (
            {"w": leaf_samples([1.0, -2.0], [2.0, 1.0])},
            "dual_norms of leaf 'w' must be finite and not",
        ),
    ],
)
def test_samples_that_cannot_be_fitted_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        dm.planning.fit_smoothness(samples)


def test_a_negative_hinge_and_an_infinite_radius_are_refused():
    with pytest.raises(ValueError, match="hinge must be at least 0"):
        dm.planning.fit_smoothness({"w": leaf_samples([1.0, 2.0], [1.0, 2.0])}, hinge=-1.0)
    flat = dm.planning.fit_smoothness({"w": leaf_samples([1.0, 2.0], [0.0, 0.0])})
    assert flat.leaves["w"].radius == float("inf")
    with pytest.raises(ValueError, match="'w' never changed"):
        flat.radii()
