"""The broximal operator and its method: what theory says of them, in every norm and in Euclid's."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import dropmuon_jax as dm

broximal = dm.contrib.broximal
EUCLIDEAN, LARGEST = dm.norms.euclidean_norm(), dm.norms.sign_norm(normalized=False)
NORMS = {
    "euclidean": EUCLIDEAN,
    "rms": dm.norms.rms_norm(),
    "sign": LARGEST,
    "columns": dm.norms.column_norm(),
    "rows": dm.norms.row_norm(),
    "spectral": dm.norms.spectral_norm("muon"),
    "nuclear": dm.norms.nuclear_norm(),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


A = draw(0, 4, 4) + 2 * jnp.eye(4)
BEST = draw(1, 4, 3)
COSTS = {
    "quadratic": lambda z: 0.5 * jnp.sum((A @ (z - BEST)) ** 2),
    "softly absolute": lambda z: jnp.sum(jnp.sqrt(1 + (A @ (z - BEST)) ** 2) - 1),
}


@jax.jit
def quadratic_step(hessian, slope, x, radius):
    return broximal.brox_quadratic(hessian, slope, x, radius)


def path_of(cost, norm, radius, num_steps, x):
    """The points, by the solver."""
    step = jax.jit(lambda x: broximal.brox(COSTS[cost], x, radius, NORMS[norm], tolerance=1e-5))
    points = [x]
    for _ in range(num_steps):
        found = step(points[-1])
        assert found.gap <= 1e-5 or found.num_steps == 1000
        points.append(found.point)
    return points


# In every norm.


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_with_a_minimizer_in_it_leads_there_at_once(norm):
    @jax.jit
    def lowest():
        radius = 1.01 * NORMS[norm].norm(BEST)
        return broximal.brox(COSTS["quadratic"], jnp.zeros_like(BEST), radius, NORMS[norm]).value

    assert lowest() < 1e-4


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_dual_gradients_fall_as_they_must_in_every_norm(norm, cost):
    of, f = NORMS[norm], COSTS[cost]
    start = jnp.zeros_like(BEST)
    radius = 0.3 * float(of.norm(BEST - start))
    points = path_of(cost, norm, radius, 4, start)
    values = [float(f(x)) for x in points]
    duals = [float(of.dual_norm(jax.grad(f)(x))) for x in points]
    for k in range(1, len(points)):
        distance = float(of.norm(points[k] - BEST))
        bound = values[k - 1] / (1 + radius / distance) if distance > 0 else 0.0
        assert values[k] <= bound + 1e-4
        assert duals[k] <= duals[k - 1] + 1e-3
        assert of.norm(points[k] - points[k - 1]) <= radius * (1 + 1e-5)
    assert radius * sum(duals[1:]) <= values[0] + 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_ball_is_lower_than_the_gap_allows(norm):
    """However early the solver stops."""
    of, f, x = NORMS[norm], COSTS["quadratic"], jnp.zeros_like(BEST)
    radius = 0.3 * float(of.norm(BEST))
    best = broximal.brox(f, x, radius, of, tolerance=1e-5).value
    gaps = []
    for max_steps in (1, 2, 4):
        found = broximal.brox(f, x, radius, of, max_steps=max_steps, tolerance=0.0)
        assert found.num_steps <= max_steps
        assert -1e-4 <= found.value - best <= found.gap + 1e-4
        gaps.append(float(found.gap))
    assert gaps[-1] < gaps[0] or gaps[0] < 1e-3


def test_projections_are_the_nearest_points():
    """⟨v - P(v), w - P(v)⟩ ≤ 0 for every w of the ball, here its most distant one."""
    for name, norm in NORMS.items():
        v, radius = draw(7, 4, 3), 0.4
        found = broximal.brox(lambda z, v=v: 0.5 * jnp.sum((z - v) ** 2), 0 * v, radius, norm)
        assert found.num_steps < 50, name
        assert norm.norm(found.point) == pytest.approx(radius, rel=1e-4), name
        away = v - found.point
        assert jnp.vdot(away, found.point) == pytest.approx(
            radius * float(norm.dual_norm(away)), rel=1e-3
        ), name


def test_the_ball_of_a_norm_of_ones_own_is_searched_by_linear_minimizers():
    def largest_entry(g):
        flat = g.reshape(len(g), -1)
        first = jax.nn.one_hot(jnp.abs(flat).argmax(-1), flat.shape[-1])  # of equal ones
        return (jnp.sign(flat) * first).reshape(g.shape)

    geometry = dm.norms.Geometry(
        lambda x: jnp.abs(x).sum((-2, -1)),
        lambda g: jnp.abs(g).max((-2, -1)),
        largest_entry,
        lambda key, shape, dtype: jnp.zeros(shape, dtype),
    )
    norm = dm.norms.Norm("l1", geometry)
    v = jnp.array([[3.0, 1.0]])
    found = broximal.brox(
        lambda z: jnp.sum((z - v) ** 2), 0 * v, 3.0, norm, tolerance=1e-2, max_steps=2000
    )
    np.testing.assert_allclose(found.point, [[2.5, 0.5]], atol=0.05)
    assert found.gap <= 1e-2


def test_the_gap_bounds_the_value_of_what_has_kinks():
    """Of ‖Az - b‖₁ in the largest-entry norm, whose minimum linear programming finds."""
    a, b, x, radius = np.asarray(draw(3, 5, 3)), np.asarray(draw(4, 5)), np.zeros(3), 0.2
    found = broximal.brox(
        lambda z: jnp.abs(a @ z - b).sum(), jnp.zeros(3), radius, LARGEST, max_steps=50
    )
    upper = np.block([[a, -np.eye(5)], [-a, -np.eye(5)]])
    exact = scipy.optimize.linprog(
        np.r_[np.zeros(3), np.ones(5)],
        upper,
        np.r_[b, -b],
        bounds=[(c - radius, c + radius) for c in x] + [(0, None)] * 5,
    )
    assert exact.fun - 1e-4 <= found.value <= exact.fun + found.gap + 1e-4
    assert found.value < 0.5 * (np.abs(b).sum() + exact.fun)


def test_the_distance_may_grow_in_another_norm():
    hessian, x = jnp.array([[1.0, -2.5], [-2.5, 10.0]]), jnp.ones(2)
    f = lambda z: 0.5 * z @ hessian @ z  # noqa: E731
    points, values, duals, sizes = [], [], [], []
    for _ in range(5):
        x = broximal.brox(f, x, 0.4, LARGEST).point
        points.append(x)
        values.append(f(x))
        duals.append(jnp.abs(hessian @ x).sum())
        sizes.append(jnp.abs(x).max())
    expected = [[1.4, 0.6], [1.0, 0.25], [0.6, 0.15], [0.2, 0.05], [0, 0]]
    np.testing.assert_allclose(points, expected, atol=1e-4)
    np.testing.assert_allclose(values, [0.68, 0.1875, 0.0675, 0.0075, 0], atol=1e-4)
    np.testing.assert_allclose(duals, [2.6, 0.375, 0.225, 0.075, 0], atol=1e-3)
    assert sizes[0] == pytest.approx(1.4)  # where it was 1
    assert values[0] <= 3.0 / (1 + 0.4 / 1.4)


# In Euclid's.

CURVED = jnp.diag(jnp.array([0.5, 3.0, 20.0]))
TURN = jnp.linalg.qr(draw(5, 3, 3))[0]
HESSIAN = TURN @ CURVED @ TURN.T
MINIMUM = jnp.array([1.0, -2.0, 0.5])


def euclidean_path(radius):
    x, points, multipliers = jnp.array([4.0, 3.0, -3.0]), [], []
    points.append(x)
    while len(points) < 200 and float(value_of(x)) > 1e-6:
        found, c = quadratic_step(HESSIAN, HESSIAN @ MINIMUM, x, radius)
        x = found.point
        points.append(x)
        multipliers.append(float(c))
    return points, multipliers


def value_of(x):
    return 0.5 * (x - MINIMUM) @ HESSIAN @ (x - MINIMUM)


def gradient_of(x):
    return HESSIAN @ (x - MINIMUM)


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.5])
def test_euclidean_steps_are_implicit_normalised_gradient_steps_and_end(radius):
    points, multipliers = euclidean_path(radius)
    distances = [float(jnp.linalg.norm(x - MINIMUM)) for x in points]
    for k, (x, z) in enumerate(itertools.pairwise(points)):
        if distances[k] <= radius:
            np.testing.assert_allclose(z, MINIMUM, atol=1e-3)
            continue
        gradient = gradient_of(z)
        assert jnp.linalg.norm(z - x) == pytest.approx(radius, rel=1e-4)
        np.testing.assert_allclose(multipliers[k] * (x - z), gradient, rtol=1e-2, atol=1e-3)
        implicit = x - radius * gradient / jnp.linalg.norm(gradient)
        np.testing.assert_allclose(z, implicit, atol=1e-3)
        assert multipliers[k] > 0
        assert distances[k + 1] ** 2 <= distances[k] ** 2 - radius**2 + 1e-3
        assert jnp.linalg.norm(gradient) <= jnp.linalg.norm(gradient_of(x)) + 1e-4
    assert len(points) - 1 <= math.ceil(distances[0] ** 2 / radius**2)


def test_a_step_of_the_proximal_point_method_is_one_in_the_ball_of_its_length():
    x = jnp.array([4.0, 3.0, -3.0])
    for weight in (0.05, 0.4, 3.0):
        prox = jnp.linalg.solve(jnp.eye(3) + weight * HESSIAN, x + weight * HESSIAN @ MINIMUM)
        radius = float(jnp.linalg.norm(prox - x))
        found, c = quadratic_step(HESSIAN, HESSIAN @ MINIMUM, x, radius)
        np.testing.assert_allclose(found.point, prox, atol=1e-3)
        assert c == pytest.approx(1 / weight, rel=1e-2)


def test_quadratics_that_are_flat_in_a_direction():
    flat = jnp.diag(jnp.array([1.0, 0.0]))
    found, c = broximal.brox_quadratic(flat, jnp.zeros(2), jnp.array([0.5, 7.0]), 1.0)
    np.testing.assert_allclose(found.point, [0, 7], atol=1e-5)  # the nearest minimizer
    assert c == 0
    found, c = broximal.brox_quadratic(flat, jnp.array([0.0, 1.0]), jnp.array([0.5, 7.0]), 1.0)
    assert jnp.linalg.norm(found.point - jnp.array([0.5, 7.0])) == pytest.approx(1, rel=1e-4)
    same = broximal.brox(
        lambda z: 0.5 * z[0] ** 2 - z[1], jnp.array([0.5, 7.0]), 1.0, EUCLIDEAN, tolerance=1e-6
    )
    np.testing.assert_allclose(found.point, same.point, atol=1e-2)
    assert found.value == pytest.approx(float(same.value), abs=1e-5)


def test_absolute_values_shrink_by_the_radius():
    x = jnp.array([3.0, -0.5, 0.0, -2.0])
    np.testing.assert_allclose(broximal.brox_absolute(x, 1.0).point, [2, 0, 0, -1])
    for k in range(1, 5):
        x = broximal.brox_absolute(x, 1.0).point
        assert jnp.abs(x).max() == max(3 - k, 0)  # and never cycles


def test_the_envelope_is_convex_and_smallest_on_the_minimizers_and_a_ball():
    radius = 0.7
    envelope = jax.jit(
        lambda x: broximal.ball_envelope(COSTS["quadratic"], x, radius, EUCLIDEAN, tolerance=0.0)
    )
    x, y = draw(8, 4, 3), draw(9, 4, 3) + 1
    assert envelope((x + y) / 2) <= (envelope(x) + envelope(y)) / 2
    unit = (x - BEST) / jnp.linalg.norm(x - BEST)
    assert envelope(BEST + 0.99 * radius * unit) < 1e-4 < envelope(BEST + 1.5 * radius * unit)
    step = 1e-2 * unit
    slope = jax.grad(envelope)(x)
    difference = (envelope(x + step) - envelope(x - step)) / 2
    assert jnp.vdot(slope, step) == pytest.approx(float(difference), rel=2e-3)
    z = broximal.brox(COSTS["quadratic"], x, radius, EUCLIDEAN, tolerance=0.0).point
    # BPM is gradient descent on the envelope with the step t / ‖∇N‖.
    np.testing.assert_allclose(x - radius * slope / jnp.linalg.norm(slope), z, atol=2e-3)


@pytest.mark.parametrize("norm", ["sign", "spectral"])
def test_the_gradient_of_the_envelope_is_that_at_the_minimizer_in_other_norms(norm):
    envelope = jax.jit(
        lambda x: broximal.ball_envelope(COSTS["quadratic"], x, 0.1, NORMS[norm], tolerance=0.0)
    )
    x, step = draw(8, 4, 3), 1e-2 * draw(10, 4, 3)
    difference = (envelope(x + step) - envelope(x - step)) / 2
    assert jnp.vdot(jax.grad(envelope)(x), step) == pytest.approx(float(difference), rel=1e-2)


# The method.

PARAMS = {"stem": draw(0, 3, 4), "head": draw(1, 4, 2)}
X, Y = draw(2, 16, 3), draw(3, 16, 2)


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["stem"]) @ params["head"] - Y) ** 2)


VALUE_AND_GRAD = jax.jit(jax.value_and_grad(loss))


def step(tx, params=PARAMS, state=None, **extra):
    state = tx.init(params) if state is None else state
    grads = VALUE_AND_GRAD(params)[1]
    updates, state = tx.update(grads, state, params, value_and_grad_fn=VALUE_AND_GRAD, **extra)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("norm", NORMS)
def test_one_inner_step_is_the_linear_minimizer(norm):
    """Normalised gradient descent, Muon, signSGD."""
    tx = broximal.broximal_point(0.1, NORMS[norm], num_steps=1)
    lmo = optax.chain(dm.norm_lmo(NORMS[norm]), optax.scale_by_learning_rate(0.1))
    polar = dm.orthogonalize.newton_schulz(num_steps=9)
    muon = dm.muon(0.1, momentum=0.0, orthogonalize=polar, roles={"head": "hidden"})
    grads = VALUE_AND_GRAD(PARAMS)[1]

    @jax.jit
    def steps(grads):
        of_arrays = {
            path: broximal.brox_linear(grads[path], x, 0.1, NORMS[norm]).point
            for path, x in PARAMS.items()
        }
        of_muon = muon.update(grads, muon.init(PARAMS), PARAMS)[0] if norm == "spectral" else None
        return step(tx)[0], lmo.update(grads, lmo.init(PARAMS))[0], of_arrays, of_muon

    moved, expected, of_arrays, of_muon = jax.tree.map(np.asarray, steps(grads))
    for path, update in expected.items():
        np.testing.assert_allclose(moved[path] - PARAMS[path], update, atol=1e-6)
        np.testing.assert_allclose(of_arrays[path], moved[path], atol=1e-6)
        if norm == "spectral":
            np.testing.assert_allclose(moved[path] - PARAMS[path], of_muon[path], atol=2e-3)


def test_further_inner_steps_reach_lower_within_the_ball():
    reached = []
    for num_steps in (1, 3, 30):
        tx = broximal.broximal_point(0.5, NORMS["spectral"], num_steps=num_steps)
        moved, state = jax.jit(lambda tx=tx: step(tx))()
        reached.append(float(loss(moved)))
        assert state.value == pytest.approx(reached[-1], rel=1e-4)
        for path in PARAMS:
            assert NORMS["spectral"].norm(moved[path] - PARAMS[path]) <= 0.5 * (1 + 1e-4)
    assert reached[2] < reached[1] < reached[0] < loss(PARAMS)


def test_layers_have_norms_and_radii_of_their_own_and_dropped_ones_stay():
    norms = {"stem": NORMS["spectral"], "head": EUCLIDEAN}
    radii = {"stem": lambda count: 0.2 / (count + 1), "head": 0.5}
    tx = broximal.broximal_point(radii, norms, num_steps=20)
    layers = dm.layers_by_path(PARAMS, ["stem", "head"])
    first, state = step(tx)
    second, _ = step(tx, first, state)
    for path, norm, radius in (("stem", NORMS["spectral"], 0.1), ("head", EUCLIDEAN, 0.5)):
        assert norm.norm(second[path] - first[path]) <= radius * (1 + 1e-4)
    assert NORMS["spectral"].norm(first["stem"] - PARAMS["stem"]) > 0.1
    dropped, _ = step(tx, layer_mask=layers.mask(1))
    np.testing.assert_array_equal(dropped["stem"], PARAMS["stem"])
    alone = broximal.brox(
        lambda head: loss(PARAMS | {"head": head}), PARAMS["head"], 0.5, EUCLIDEAN
    )
    np.testing.assert_allclose(dropped["head"], alone.point, atol=1e-3)


def test_parameters_of_half_width_are_stepped_in_full():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = broximal.broximal_point(0.2, EUCLIDEAN, num_steps=5)
    value_and_grad_fn = jax.value_and_grad(loss)
    value, grads = value_and_grad_fn(half)
    updates, state = tx.update(grads, tx.init(half), half, value_and_grad_fn=value_and_grad_fn)
    assert updates["stem"].dtype == jnp.bfloat16
    assert state.value < value


def update_without(**given):
    tx = broximal.broximal_point(0.2, EUCLIDEAN, num_steps=2)
    return tx.update(PARAMS, tx.init(PARAMS), **given)


def exact(hessian, size=2):
    return broximal.brox_quadratic(jnp.array(hessian), jnp.zeros(size), jnp.ones(size), 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_value_that_is_none_ends_the_search_and_nothing_is_certified(norm):
    """Though the derivative of the logarithm is a number there."""
    outside = -jnp.abs(draw(3, 4, 3)) - 1.0
    found = broximal.brox(lambda z: jnp.sum(jnp.log(z)), outside, 0.1, NORMS[norm], max_steps=50)
    assert found.num_steps == 1
    assert jnp.isnan(found.value)
    assert jnp.isnan(found.gap)


def test_the_search_turns_back_from_values_that_are_none():
    weights = jnp.array([1.0, 9.0])

    def loss(z):
        return jnp.where(z[0] < 1.2, jnp.nan, 0.5 * jnp.sum(weights * z**2))

    found = broximal.brox(loss, jnp.array([3.0, 1.0]), 2.5, EUCLIDEAN, max_steps=50)
    np.testing.assert_allclose(found.point, [1.2, 0.0], atol=0.1)
    assert found.value < 0.78  # and 0.72 at the border
    assert found.gap > 0.1


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("norm", ["euclidean", "own"])
@pytest.mark.parametrize("of_value", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_leaves_and_values_of_several_dtypes_are_searched_as_those_of_one(of_value, norm):
    """The second norm has no projection."""
    own = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz(num_steps=9))
    norm = EUCLIDEAN if norm == "euclidean" else own
    with jax.enable_x64(True):
        best = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3)))

        def loss(z):
            sizes = (jnp.sum((x - best.astype(x.dtype)) ** 2) for x in jax.tree.leaves(z))
            return sum((size.astype(of_value) for size in sizes), jnp.zeros((), of_value))

        def found(second):
            x = {"a": jnp.zeros((2, 3), jnp.float32), "b": jnp.zeros((2, 3), second)}
            given = {"a": 0.3, "b": 9.0}, {"a": norm, "b": norm}
            return broximal.brox(loss, x, *given, max_steps=20, tolerance=np.float32(1e-3))

        mixed, one = found(jnp.float64), found(jnp.float32)
        assert (mixed.point["a"].dtype, mixed.point["b"].dtype) == (jnp.float32, jnp.float64)
        assert one.value.dtype == of_value
        assert mixed.value.dtype == mixed.gap.dtype == jnp.float64
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), mixed, one
        )


def test_quadratics_of_half_width_are_solved_in_full():
    half = jnp.array([3.0, 4.0], jnp.bfloat16)
    found, c = broximal.brox_quadratic(jnp.eye(2, dtype=half.dtype), 0 * half, half, 2.0)
    assert found.point.dtype == half.dtype
    np.testing.assert_allclose(found.point.astype(float), [1.8, 2.4], rtol=5e-3)
    np.testing.assert_allclose(c, 1.5, rtol=1e-5)


ERRORS = {
    "hessian must be symmetric": lambda: exact([[1.0, 2.0], [0.0, 1.0]]),
    "hessian has the eigenvalue -1, and must be": lambda: exact([[1.0, 0.0], [0.0, -1.0]]),
    "hessian, slope and x must be of shapes": lambda: exact(np.ones((2, 3), np.float32)),
    "x has no arrays": lambda: broximal.brox(lambda z: 0.0, {}, 1.0, EUCLIDEAN),
    "tolerance must be at least 0 and finite, got -0.5": lambda: broximal.broximal_point(
        1.0, EUCLIDEAN, num_steps=1, tolerance=-0.5
    ),
    "radius must be positive": lambda: broximal.brox(loss, PARAMS, -1.0, EUCLIDEAN),
    "radius must be a number or a mapping": lambda: broximal.brox(
        loss, PARAMS, lambda count: 1.0, EUCLIDEAN
    ),
    "an adaptive one is of an LMO": lambda: broximal.broximal_point(
        dm.schedules.adaptive_radius(1.0), EUCLIDEAN, num_steps=1
    ),
    "Call it: it makes one": lambda: broximal.brox(loss, PARAMS, 1.0, dm.norms.euclidean_norm),
    "norm must be a dm.norms.Norm, got 'sign'": lambda: broximal.brox_linear(
        BEST, BEST, 1.0, norm="sign"
    ),
    "norm must be a dm.norms.Norm, got a function. Call it": lambda: broximal.brox_linear(
        BEST, BEST, 1.0, dm.norms.sign_norm
    ),
    "norm has no pattern for": lambda: broximal.brox(loss, PARAMS, 1.0, {"stem": EUCLIDEAN}),
    "tolerance must be at least 0": lambda: broximal.brox(
        loss, PARAMS, 1.0, EUCLIDEAN, tolerance=-1.0
    ),
    "max_steps must be at least 1": lambda: broximal.brox(
        loss, PARAMS, 1.0, EUCLIDEAN, max_steps=0
    ),
    "num_steps must be at least 1": lambda: broximal.broximal_point(1.0, EUCLIDEAN, num_steps=0),
    "needs value_and_grad_fn": lambda: update_without(params=PARAMS),
    "pass them to update": lambda: update_without(value_and_grad_fn=VALUE_AND_GRAD),
    "x must be trainable floating-point arrays": lambda: broximal.brox(
        loss, {"w": jnp.arange(3)}, 1.0, EUCLIDEAN
    ),
    "An LMO of matrices needs matrices": lambda: broximal.broximal_point(
        1.0, NORMS["nuclear"], num_steps=1
    ).init({"b": jnp.ones(3)}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_makes_no_sense_is_refused_by_name(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message]()
