"""Pruning: what is recorded, scored, masked and exchanged, and what stays at zero."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm
from gpt import GPT

pruning = dm.contrib.pruning
SIZES = 6, 4  # fan-in, fan-out
SCORES = {
    "magnitude": pruning.magnitude,
    "wanda": pruning.wanda,
    "owanda": pruning.owanda,
    "symwanda": pruning.symwanda,
    "ria": pruning.ria,
    "stochastic_ria": lambda *args: pruning.stochastic_ria(*args, key=jax.random.key(0)),
}


def draw(seed, *shape):
    """Asymmetric, with a mean that is not zero."""
    drawn = np.random.default_rng(seed).normal(size=shape)
    return np.asarray(drawn + 0.3 * np.arange(shape[-1]) - 0.2, np.float32)


def problem(seed=0, sizes=SIZES, rows=20):
    w, x = draw(seed, *sizes), draw(seed + 100, rows, sizes[0])
    params = {"w": jnp.asarray(w)}
    return params, record(lambda p, x: x @ p["w"], params, x), w, x


def record(function, params, *batches):
    return pruning.record_kernels(function, params, batches)


# What is recorded.


def assert_moments(of, rows, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    assert of.num_rows == len(rows)
    np.testing.assert_allclose(of.mean.ravel(), rows.mean(0), **tolerance)
    np.testing.assert_allclose(of.variance.ravel(), rows.var(0), **tolerance)
    np.testing.assert_allclose(of.rms.ravel(), np.sqrt((rows**2).mean(0)), **tolerance)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_moments_are_those_of_all_rows_however_they_come_in_batches(sizes):
    w, x = draw(0, *SIZES), 100 + draw(1, sum(sizes), SIZES[0])
    batches = np.split(x, np.cumsum(sizes)[:-1])
    of = record(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, *batches)["w"]
    assert_moments(of.inputs, x, atol=1e-3)
    assert_moments(of.outputs, x @ w, atol=0.1, rtol=1e-3)


def dense_of_linen(x):
    model = nn.Dense(4)
    params = model.init(jax.random.key(0), x)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, "kernel", lambda w: w


def dense_of_nnx(x):
    graph, params = nnx.split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), params, "kernel", lambda w: w


def dense_of_equinox(x):
    model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, "weight", lambda w: w.T


def dense_of_einsum(x):
    """By heads, cast, checkpointed and within jit."""
    params = {"w": jnp.asarray(draw(0, 2, 6, 2))}

    @jax.jit
    @jax.checkpoint
    def apply(p, x):
        return jnp.einsum("ri,hid->hrd", x, p["w"].astype(jnp.bfloat16).astype(jnp.float32))

    return apply, params, "w", lambda w: w.transpose(1, 0, 2).reshape(6, 4)


def dense_of_custom_derivatives(x):
    @jax.custom_vjp
    def product(x, w):
        return x @ w.T

    product.defvjp(lambda x, w: (x @ w.T, None), lambda _, g: (g, g))
    return lambda p, x: product(x, p["w"]), {"w": jnp.asarray(draw(0, 4, 6))}, "w", lambda w: w.T


@pytest.mark.parametrize(
    "make",
    [
        dense_of_linen,
        dense_of_nnx,
        dense_of_equinox,
        dense_of_einsum,
        dense_of_custom_derivatives,
    ],
)
def test_a_kernel_is_found_in_every_library_and_layout(make):
    x = draw(1, 5, 6)
    function, params, path, to_matrix = make(x)
    ((found, of),) = record(function, params, x).items()
    assert found == path
    leaf = jnp.asarray(next(x for x in jax.tree.leaves(params) if x.ndim > 1))
    matrix = np.asarray(to_matrix(leaf))
    assert_moments(of.inputs, x)
    assert_moments(of.outputs, x @ matrix, rtol=0.02, atol=0.03)  # bfloat16 in one
    np.testing.assert_array_equal(of.matrices(leaf)[0].reshape(-1, 6, 4).shape[1:], (6, 4))
    for mean, axes in ((of.inputs.mean, of.fan_in), (of.outputs.mean, of.fan_out)):
        assert all(mean.shape[axis] == leaf.shape[axis] for axis in axes)
        assert jnp.broadcast_shapes(mean.shape, leaf.shape) == leaf.shape


def test_stacked_layers_have_the_moments_that_they_have_one_by_one():
    gpt = GPT(vocabulary=7, width=4, num_heads=2, num_blocks=3, max_length=5)
    tokens = np.random.default_rng(0).integers(7, size=(2, 5))
    params = jax.jit(gpt.init)(jax.random.key(1), tokens)["params"]
    kernels = record(lambda p, x: gpt.apply({"params": p}, x), params, tokens)
    up = kernels["blocks/feed_forward/up/kernel"]
    assert up.fan_in == (1,)
    assert up.inputs.mean.shape == (3, 4, 1)
    # What the blocks get is normalised: mean square 1 of each row, and so on average of them.
    np.testing.assert_allclose((up.inputs.rms**2).mean((1, 2)), 1, rtol=1e-3)
    assert kernels["head/kernel"].inputs.num_rows == 10

    def unrolled(p, x):
        for w in p["each"]:
            x = jnp.tanh(x @ w)
        return x

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, p["turned"])[0]

    w, x = draw(0, 3, 4, 4), draw(1, 8, 4)
    one_by_one = record(unrolled, {"each": list(w)}, x, x + 1)
    stacked = record(scanned, {"turned": w.swapaxes(1, 2)}, x, x + 1)["turned"]
    for i, of in enumerate(one_by_one.values()):
        np.testing.assert_allclose(stacked.inputs.mean[i], of.inputs.mean.T, atol=1e-6)
        np.testing.assert_allclose(stacked.outputs.rms[i], of.outputs.rms.T, atol=1e-6)
        assert of.inputs.num_rows == stacked.inputs.num_rows


def test_a_kernel_that_is_used_again_has_the_rows_of_all_uses():
    params, x = {"w": jnp.asarray(draw(0, 3, 3))}, draw(1, 4, 3)
    again = lambda p, x: (x @ p["w"]) @ p["w"]  # noqa: E731
    in_a_loop = lambda p, x: jax.lax.scan(lambda x, _: (x @ p["w"], None), x, length=2)[0]  # noqa: E731
    for function in (again, in_a_loop):
        of = record(function, params, x)["w"]
        assert_moments(of.inputs, np.concatenate([x, x @ np.asarray(params["w"])]))


# Scores.


def lost(w, x, j, k):
    """‖X(W̃ - W)‖_F over √rows, without one weight."""
    without = w.copy()
    without[j, k] = 0
    return np.linalg.norm(x @ (without - w)) / np.sqrt(len(x))


def test_scores_are_what_their_objectives_lose_without_one_weight():
    params, kernels, w, x = problem()
    found = {name: score(params, kernels)["w"] for name, score in SCORES.items()}
    squared = pruning.symwanda(params, kernels, squared=True)["w"]
    y = x @ w
    for j, k in itertools.product(*map(range, w.shape)):
        of_x, of_y = lost(w, x, j, k), lost(w.T, y, k, j)
        expected = {"wanda": of_x, "owanda": of_y, "symwanda": of_x + of_y}
        for name, loss in expected.items():
            assert found[name][j, k] == pytest.approx(loss, rel=1e-4)
        assert squared[j, k] == pytest.approx(np.hypot(of_x, of_y), rel=1e-4)
        assert found["magnitude"][j, k] == abs(w[j, k])


@pytest.mark.parametrize("order", [1.0, 2.0, np.inf])
def test_relative_importance_is_shared_out_and_does_not_see_scales(order):
    params, kernels, w, x = problem()
    plain = pruning.ria(params, kernels, power=0.0, order=order)["w"]
    norms = np.linalg.norm(w, order, 1, keepdims=True), np.linalg.norm(w, order, 0, keepdims=True)
    np.testing.assert_allclose(plain, sum(np.abs(w) / norm for norm in norms), rtol=1e-5)
    of_scaled = pruning.ria({"w": -7 * params["w"]}, kernels, power=0.0, order=order)["w"]
    np.testing.assert_allclose(of_scaled, plain, rtol=1e-5)
    with_power = pruning.ria(params, kernels, power=2.0, order=order)["w"]
    np.testing.assert_allclose(with_power, plain * (x**2).mean(0)[:, None], rtol=1e-4)


def test_stochastic_sums_are_of_all_weights_at_one_and_right_on_average():
    params, kernels, w, _ = problem(sizes=(30, 20))

    @jax.jit
    def draws_of(keys):
        score = functools.partial(pruning.stochastic_ria, params, kernels, fraction=0.3)
        return jax.lax.map(lambda key: score(key=key)["w"], keys)

    draws = np.asarray(draws_of(jax.random.split(jax.random.key(0), 40)))
    whole = pruning.ria(params, kernels, power=0.0)["w"]
    all_of_it = pruning.stochastic_ria(params, kernels, key=jax.random.key(0), fraction=1.0)["w"]
    np.testing.assert_allclose(all_of_it, whole, rtol=1e-5)
    size = np.abs(w)
    # Each is |w| / a + |w| / b, with sums a of a row and b of a column, of which the inverse of
    # the harmonic mean is known: 1/E[1/a] is the sum, but for its spread.
    ratio = np.mean(draws, 0) / (size / size.sum(0) + size / size.sum(1, keepdims=True))
    assert 0.98 < ratio.mean() < 1.1
    assert np.std(draws, 0).min() > 0
    assert len({tuple(np.argsort(d.ravel())[:50].tolist()) for d in draws}) == len(draws)


def test_dead_rows_and_columns_score_zero():
    w = draw(0, *SIZES)
    w[2] = 0
    w[:, 1] = 0
    x = draw(1, 8, SIZES[0])
    x[:, 3] = 0
    params = {"w": jnp.asarray(w)}
    kernels = record(lambda p, x: x @ p["w"], params, x)
    for name, score in SCORES.items():
        found = score(params, kernels)["w"]
        assert np.isfinite(found).all()
        assert not found[2].any()
        assert not found[:, 1].any()
        assert found[3].any() == (name not in ("wanda", "ria"))


@pytest.mark.parametrize("name", SCORES)
def test_layouts_change_nothing_but_the_layout(name):
    w, x = draw(0, 2, 8, 4), draw(1, 2, 9, 8)
    flat, turned = {"w": jnp.asarray(w)}, {"w": jnp.asarray(w).transpose(2, 0, 1)}
    of_flat = record(lambda p, x: jnp.einsum("bri,bio->bro", x, p["w"]), flat, x)
    of_turned = record(lambda p, x: jnp.einsum("bri,obi->bro", x, p["w"]), turned, x)
    if name == "stochastic_ria":
        score = lambda *args: pruning.stochastic_ria(*args, key=jax.random.key(0), fraction=1.0)  # noqa: E731
    else:
        score = SCORES[name]
    scores = score(flat, of_flat), score(turned, of_turned)
    np.testing.assert_allclose(scores[1]["w"].transpose(1, 2, 0), scores[0]["w"], rtol=1e-5)
    for per in ("output", "kernel", "all"):
        here = pruning.make_masks(scores[0], of_flat, 0.5, per=per)
        there = pruning.make_masks(scores[1], of_turned, 0.5, per=per)
        np.testing.assert_array_equal(there["w"].transpose(1, 2, 0), here["w"])
        if per == "output":
            here = pruning.dsnot(flat, of_flat, here)
            there = pruning.dsnot(turned, of_turned, there)
            np.testing.assert_array_equal(there["w"].transpose(1, 2, 0), here["w"])


# Masks.


def network_of_two(p, x):
    return jnp.einsum("ri,bio->ro", x, p["a"]) @ p["b"]


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0, 0.99),
    st.sampled_from(["output", "kernel", "all"]),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_lowest_of_each_group_are_pruned_and_as_many_as_said(sparsity, per, seed, has_ties):
    params = {"a": draw(seed, 2, 6, 4), "b": draw(seed + 1, 4, 3)}
    if has_ties:
        params = jax.tree.map(np.round, params)
    kernels = record(network_of_two, params, draw(2, 3, 6))
    scores = pruning.magnitude(params, kernels)
    masks = pruning.make_masks(scores, kernels, sparsity, per=per)
    matrices = {path: kernels[path].matrices for path in scores}
    pairs = [(matrices[p](scores[p])[0], matrices[p](masks[p])[0]) for p in scores]
    if per == "all":
        groups = [tuple(np.concatenate([np.ravel(x[i]) for x in pairs]) for i in (0, 1))]
    elif per == "kernel":
        groups = [(s.ravel(), m.ravel()) for pair in pairs for s, m in zip(*pair, strict=True)]
    else:
        groups = [
            (s[:, k], m[:, k])
            for pair in pairs
            for s, m in zip(*pair, strict=True)
            for k in range(s.shape[1])
        ]
    for score, mask in groups:
        score, mask = np.asarray(score), np.asarray(mask)
        assert (~mask).sum() == round(sparsity * mask.size)
        first = np.argsort(score, stable=True)[: (~mask).sum()]
        np.testing.assert_array_equal(np.flatnonzero(~mask), np.sort(first))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (3, 3)])
def test_n_of_m_keeps_the_highest_of_each_group_of_inputs(n, m):
    params, kernels, w, _ = problem(sizes=(24, 3))
    mask = pruning.n_of_m_masks(pruning.magnitude(params, kernels), kernels, n, m)["w"]
    groups, kept = (np.asarray(x).T.reshape(3, -1, m) for x in (np.abs(w), mask))
    assert (kept.sum(-1) == n).all()
    lowest_kept = np.where(kept, groups, np.inf).min(-1)
    assert (np.where(kept, -np.inf, groups).max(-1) < lowest_kept).all()


def test_masks_leave_other_leaves_as_they_are():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    mask = jnp.array([[True, False], [False, True]])
    pruned = pruning.apply_masks(params, {"w": mask})
    np.testing.assert_array_equal(pruned["w"], np.eye(2))
    assert pruned["b"] is params["b"]


# The exchange.


def exchanged_by_hand(w, x, mask, score, num_cycles, threshold, *, keeps_sign=False, m=None):
    """One output after the other, as the authors' code does it, with sorted candidates."""
    mask, mean, variance = mask.copy(), x.mean(0), x.var(0)
    for k in range(w.shape[1]):
        change = w[:, k] * mean
        error = start = change[~mask[:, k]].sum()
        back, away = list(np.flatnonzero(~mask[:, k])), list(np.flatnonzero(mask[:, k]))
        back.sort(key=lambda i: change[i] / variance[i])
        away.sort(key=lambda j: score[j, k])
        for _ in range(num_cycles):
            sign = 1 if error > 0 else -1
            grow = [i for i in back if sign * change[i] > 0]
            if not grow or abs(error) <= threshold:
                break
            i = grow[-1] if sign > 0 else grow[0]
            prune = [j for j in away if (sign * change[j] < 0 if m is None else j // m == i // m)]
            if not prune:
                break
            j = prune[0]
            after = error + change[j] - change[i]
            if (keeps_sign or m) and np.sign(after) != np.sign(start):
                break
            mask[i, k], mask[j, k], error = True, False, after
            back.remove(i)
            away.remove(j)
    return mask


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("keeps_sign", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_exchange_is_that_of_the_authors_by_hand(seed, keeps_sign, m):
    params, kernels, w, x = problem(seed, (32, 12))
    scores = pruning.wanda(params, kernels)
    masks = (
        pruning.make_masks(scores, kernels, 0.5)
        if m is None
        else pruning.n_of_m_masks(scores, kernels, 2, m)
    )
    options = {"num_cycles": 6, "threshold": 0.2, "keeps_sign": keeps_sign, "m": m}
    new = pruning.dsnot(params, kernels, masks, **options)["w"]
    by_hand = exchanged_by_hand(w, x, np.asarray(masks["w"]), np.asarray(scores["w"]), **options)
    np.testing.assert_array_equal(new, by_hand)
    assert (new != masks["w"]).any()
    np.testing.assert_array_equal(new.sum(0), masks["w"].sum(0))
    if m:
        assert (np.asarray(new).T.reshape(12, -1, m).sum(-1) == 2).all()


def test_with_the_sign_kept_every_exchange_brings_the_mean_of_an_output_nearer():
    generator = np.random.default_rng(0)
    w, x = (
        generator.normal(size=(64, 10)),
        generator.normal(generator.normal(size=64), size=(20, 64)),
    )
    params = {"w": jnp.asarray(w, jnp.float32)}
    kernels = record(lambda p, x: x @ p["w"], params, x.astype(np.float32))
    masks = pruning.make_masks(pruning.wanda(params, kernels), kernels, 0.6)

    def error(masks):
        return np.abs(x.mean(0) @ (w * ~np.asarray(masks["w"])))

    errors = [error(masks)]
    for num_cycles in (1, 2, 5, 50):
        options = {"num_cycles": num_cycles, "keeps_sign": True}
        errors.append(error(pruning.dsnot(params, kernels, masks, **options)))
    assert (np.diff(errors, axis=0) <= 1e-5).all()
    assert np.median(errors[-1]) < 0.5 * np.median(errors[0])
    left = pruning.dsnot(params, kernels, masks, threshold=errors[0].max())
    np.testing.assert_array_equal(left["w"], masks["w"])


def test_r2_dsnot_is_the_exchange_by_other_scores():
    params, kernels, w, _ = problem(1, (32, 12))
    masks = pruning.make_masks(pruning.wanda(params, kernels), kernels, 0.5)
    relative = pruning.ria(params, kernels, power=0.0)
    root = {"w": np.abs(w) * np.sqrt(kernels["w"].inputs.rms)}
    norm = 9.0 * np.linalg.norm(w, axis=1, keepdims=True)
    ria = pruning.ria(params, kernels)
    found = []
    for options, scores, grow in (
        ({}, ria, None),
        ({"relative": "grow"}, root, relative),
        ({"relative": "both"}, ria, relative),
        ({"regularizer": 9.0}, {"w": ria["w"] + norm}, None),
        ({"keeps_sign": True}, ria, None),
    ):
        new = pruning.r2_dsnot(params, kernels, masks, **options)["w"]
        given = {"scores": scores, "grow_weights": grow, "keeps_sign": "keeps_sign" in options}
        same = pruning.dsnot(params, kernels, masks, **given)["w"]
        np.testing.assert_array_equal(new, same)
        found.append(np.asarray(new).tobytes())
    assert len(set(found)) == len(found)


# What stays at zero.

PARAMS = {
    "stem": {"kernel": jnp.asarray(draw(0, 3, 5)), "bias": jnp.ones(5)},
    "mid": {"kernel": jnp.asarray(draw(1, 5, 5)), "bias": jnp.ones(5)},
    "head": {"kernel": jnp.asarray(draw(2, 5, 2)), "bias": jnp.ones(2)},
}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "mid", "head"])
MASKS = {
    f"{name}/kernel": jnp.asarray(draw(9, *PARAMS[name]["kernel"].shape) > 0.4) for name in PARAMS
}
RADII = {"hidden": 1.0, "head": 1.0, "bias": 1.0}
OPTIMIZERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.3),
    "sgd with momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "muon": dm.muon(0.1, weight_decay=0.3),
    "muon with MVR": dm.muon(0.1, momentum=dm.mvr_momentum()),
    "drop_muon": dm.drop_muon(0.1, LAYERS),
    "drop_scion": dm.drop_scion(0.1, LAYERS, RADII),
    "Optax's muon": optax.contrib.muon(0.1),
}


def loss(params, x):
    for name in ("stem", "mid", "head"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.sum(x**2)


gradient = jax.jit(jax.grad(loss))


def steps(tx, params, num_steps=3, of_step=lambda i: {}):
    state = tx.init(params)
    for i in range(num_steps):
        grads = gradient(params, draw(i, 4, 3))
        extra = of_step(i) | {"prev_params_grads": grads}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_and_their_momenta_are_zero_bit_for_bit(name):
    tx = pruning.keep_pruned(OPTIMIZERS[name], MASKS)
    is_dropped = name.startswith("drop")
    params, state = steps(
        tx,
        pruning.apply_masks(PARAMS, MASKS),
        of_step=lambda i: {"depth": i % 2} if is_dropped else {},
    )
    shapes = {mask.shape: mask for mask in MASKS.values()}
    of_kernels = [x for x in jax.tree.leaves(state.inner) if jnp.shape(x) in shapes]
    assert of_kernels
    for x in [of["kernel"] for of in params.values()] + of_kernels:
        pruned = np.asarray(x)[~np.asarray(shapes[x.shape])]
        assert pruned.tobytes() == bytes(pruned.nbytes)  # no -0.0 either
    for of in params.values():
        assert (of["bias"] != 1).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_anything_pruned_the_optimizer_is_as_it_was(name):
    everything = jax.tree.map(lambda mask: jnp.ones_like(mask), MASKS)
    of_step = (lambda i: {"depth": i % 2}) if name.startswith("drop") else (lambda i: {})
    plain, _ = steps(OPTIMIZERS[name], PARAMS, of_step=of_step)
    kept, _ = steps(pruning.keep_pruned(OPTIMIZERS[name], everything), PARAMS, of_step=of_step)
    jax.tree.map(np.testing.assert_array_equal, kept, plain)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_become_zero_to_the_last_bit_where_gradients_are_of_another_dtype(dtypes):
    of_grads, of_params = dtypes
    params = {"w": jnp.array([1.2345678, 2.3456789], of_params)}
    tx = pruning.keep_pruned(optax.sgd(0.1), {"w": jnp.array([True, False])})
    updates, _ = tx.update({"w": jnp.ones(2, of_grads)}, tx.init(params), params)
    assert optax.apply_updates(params, updates)["w"][1] == 0


@pytest.mark.parametrize("name", ["first", "last"])
def test_a_part_of_the_parameters_keeps_its_masks_inside_of_optax_partition(name):
    """Whether what is left out comes before or behind it."""
    params = {"first": jnp.ones((2, 2)), "last": jnp.ones((2, 2)), "mid": jnp.ones((2, 2))}
    mask = jnp.array([[True, False], [False, True]])
    kept = pruning.keep_pruned(dm.muon(0.1), {"mid": mask})
    labels = dict.fromkeys(params, "kept") | {name: "other"}
    tx = optax.partition({"kept": kept, "other": optax.sgd(0.1)}, labels)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["mid"] != 0, mask)


def test_weights_that_are_not_zero_yet_become_zero_and_their_gradients_are_not_seen():
    tx = pruning.keep_pruned(optax.sgd(0.1), {"w": jnp.array([False, True])})
    params = {"w": jnp.array([3.7, 1.0])}
    updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], [0.0, 0.9])


def test_a_training_step_of_dropped_layers_keeps_masks_and_their_owner():
    masks = {path: mask.copy() for path, mask in MASKS.items()}
    tx = pruning.keep_pruned(dm.drop_muon(0.1, LAYERS), masks)
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0)
    step = dm.train_step(loss, tx, sampler)
    params = jax.tree.map(jnp.copy, pruning.apply_masks(PARAMS, masks))
    state = tx.init(params)
    for i in range(4):
        params, state, _ = step(i, params, state, draw(i, 4, 3))
    for name, of in params.items():
        assert not of["kernel"][~masks[f"{name}/kernel"]].any()  # which are not deleted


# What is refused.


def of_errors():
    params, kernels, _, _ = problem()
    scores = pruning.magnitude(params, kernels)
    masks = pruning.make_masks(scores, kernels, 0.5)
    key = jax.random.key(0)
    tied = lambda p, x: x @ p["w"] @ p["w"].T  # noqa: E731
    wide = {"w": jnp.ones((4, 6), bool)}
    return {
        "No kernel was found": lambda: record(lambda p, x: x, params, jnp.ones(3)),
        "'w' is multiplied along axes": lambda: record(tied, params, jnp.ones((2, 6))),
        "kernels must be what record_kernels": lambda: pruning.wanda(params, {"w": 3}),
        "kernels have 'w', which params do not": lambda: pruning.wanda({"v": 1.0}, kernels),
        "power must be at least 0": lambda: pruning.ria(params, kernels, power=-1.0),
        "order must be a number of at least 1": lambda: pruning.ria(params, kernels, order=0.5),
        "fraction must be at most 1": lambda: pruning.stochastic_ria(
            params, kernels, key=key, fraction=2.0
        ),
        "sparsity must be a number in": lambda: pruning.make_masks(scores, kernels, 1.0),
        "per must be one of": lambda: pruning.make_masks(scores, kernels, 0.5, per="row"),
        "scores have 'w', which kernels do not": lambda: pruning.make_masks(scores, {}, 0.5),
        r"scores\['w'\] has shape": lambda: pruning.make_masks({"w": key}, kernels, 0.5),
        "n must be at most m": lambda: pruning.n_of_m_masks(scores, kernels, 4, 2),
        "m is 4, which does not divide the fan-in 6 of 'w'": lambda: pruning.n_of_m_masks(
            scores, kernels, 2, 4
        ),
        "m is 5, which does not divide": lambda: pruning.dsnot(params, kernels, masks, m=5),
        r"The mask of 'w' is bool\[4, 6\]; it must be bool\[6, 4\]": lambda: pruning.apply_masks(
            params, wide
        ),
        "masks have 'v', which params do not": lambda: pruning.keep_pruned(
            optax.sgd(0.1), {"v": wide["w"]}
        ).init(params),
        "relative must be one of": lambda: pruning.r2_dsnot(params, kernels, masks, relative="all"),
        "pass the parameters to update": lambda: pruning.keep_pruned(optax.sgd(0.1), masks).update(
            params, pruning.keep_pruned(optax.sgd(0.1), masks).init(params)
        ),
        "What 'w' makes of the batches is not finite": lambda: record(
            lambda p, x: x @ p["w"], params, jnp.ones((0, 6))
        ),
        r"'w' has shape \(4, 6\) in params": lambda: pruning.wanda({"w": params["w"].T}, kernels),
        "scores must be a mapping from paths": lambda: pruning.make_masks(
            [scores["w"]], kernels, 0.5
        ),
        "masks must be a mapping from paths": lambda: pruning.apply_masks(params, {"w": [True]}),
        "masks must be a mapping": lambda: pruning.keep_pruned(optax.sgd(0.1), None),
        "masks have 'w', which kernels do not": lambda: pruning.dsnot(params, {}, masks),
        "scores lacks it": lambda: pruning.dsnot(params, kernels, masks, scores={}),
        r"grow_weights has shape \(2,\)": lambda: pruning.dsnot(
            params, kernels, masks, grow_weights={"w": jnp.ones(2)}
        ),
        "optimizer must be an optax.GradientTransformation": lambda: pruning.keep_pruned(
            0.1, masks
        ),
    }


@pytest.mark.parametrize("message", of_errors())
def test_what_makes_no_sense_is_refused_by_name(message):
    with pytest.raises((TypeError, ValueError), match=message):
        of_errors()[message]()
