"""Compressors by their laws, error feedback by NumPy, and the cost table of the paper."""

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm
import reference
from dropmuon_jax.compression import (
    ColumnTopK,
    Damping,
    Identity,
    Natural,
    RandomDropout,
    RankK,
    ScaledSign,
    TopK,
)
from dropmuon_jax.compression.compressors import NORMS
from dropmuon_jax.compression.selections import largest
from meshes import graded
from test_contract import assert_same_bits

NEAREST = Natural(nearest=True)
COMPRESSORS = {
    "identity": Identity(),
    "top_k": TopK(0.3),
    "top_k of natural": TopK(0.3, Natural()),
    "column_top_k": ColumnTopK(2),
    "rank_k exact": RankK(2, method="exact"),
    "rank_k random": RankK(2),
    "rank_k warm": RankK(2, method="warm"),
    "rank_k of natural": RankK(2, Natural()),
    "natural": Natural(),
    "natural of 8 bits": Natural(8),
    "natural, nearest": NEAREST,
    "scaled_sign": ScaledSign(),
    "damping": Damping(0.5),
    "random_dropout": RandomDropout(0.5),
    "random_dropout of rank_k": RandomDropout(0.5, RankK(2, method="exact")),
}
over_compressors = pytest.mark.parametrize("name", COMPRESSORS)
KEYS = jax.random.split(jax.random.key(3), 256)


def length(x, norm):
    """A norm of matrices, in float64."""
    x = np.asarray(x, np.float64)
    rows = np.linalg.norm(x, axis=-1)
    return {
        "frobenius": lambda: np.sqrt((x**2).sum((-2, -1))),
        "spectral": lambda: np.linalg.norm(x, 2, axis=(-2, -1)),
        "nuclear": lambda: np.linalg.norm(x, "nuc", axis=(-2, -1)),
        "max": lambda: np.abs(x).max((-2, -1)),
        "sum": lambda: np.abs(x).sum((-2, -1)),
        "columns": lambda: rows.sum(-1),
        "longest_column": lambda: rows.max(-1),
    }[norm]()


@functools.cache
def arrival(compressor, shape):
    """C(X) for 256 keys, or once if it draws nothing."""

    def once(x, key):
        payload = compressor.compress(x, key, compressor.init(shape, x.dtype))
        arrived, sent = compressor.decompress(payload, x), compressor.is_sent(key)
        return arrived if sent is None else jnp.where(sent, arrived, 0)

    keys = KEYS if compressor.is_random else KEYS[:1]
    return jax.jit(lambda x: jax.vmap(once, (None, 0))(x, keys))


SHAPE = (6, 5)
entries = st.floats(-4, 4, width=32, allow_subnormal=False)
MATRICES = {
    "equal singular values": np.linalg.qr(np.random.default_rng(0).normal(size=SHAPE))[0],
    "equal entries": np.ones(SHAPE),
    "one entry": np.eye(*SHAPE) * (np.arange(SHAPE[1]) == 0),
    "zero": np.zeros(SHAPE),
    "halfway": 1.5 * np.ones(SHAPE),
    "ill-conditioned": np.random.default_rng(1).normal(size=SHAPE) * 10.0 ** -np.arange(5),
}


def assert_contracts(compressor, x):
    """‖C(X) - X‖² ≤ (1 - α)‖X‖², in the mean over 256 draws if it draws."""
    x = np.asarray(x, np.float32)
    lost = np.asarray(arrival(compressor, SHAPE)(x), np.float64) - x
    for norm in NORMS:
        alpha = compressor.contraction(norm, SHAPE)
        if alpha == 0:
            continue
        squares, bound = length(lost, norm) ** 2, (1 - alpha) * length(x, norm) ** 2
        spread = squares.std() / np.sqrt(len(squares)) if compressor.is_random else 0
        assert squares.mean() <= bound * (1 + 1e-5) + 5 * spread + 1e-12, norm


@over_compressors
@pytest.mark.parametrize("which", MATRICES)
def test_what_is_lost_is_at_most_what_the_contraction_says(name, which):
    assert_contracts(COMPRESSORS[name], MATRICES[which])


@pytest.mark.parametrize("name", [n for n, of in COMPRESSORS.items() if not of.is_random])
@settings(max_examples=40, deadline=None)
@given(st.lists(entries, min_size=30, max_size=30))
def test_deterministic_compressors_contract_every_matrix(name, numbers):
    assert_contracts(COMPRESSORS[name], np.reshape(numbers, SHAPE))


@pytest.mark.parametrize(
    ("compressor", "norm", "x"),
    [
        (RankK(2, method="exact"), "nuclear", MATRICES["equal singular values"]),
        (RankK(2, method="exact"), "frobenius", MATRICES["equal singular values"]),
        (TopK(0.3), "frobenius", MATRICES["equal entries"]),
        (TopK(0.3), "sum", MATRICES["equal entries"]),
        (ColumnTopK(2), "columns", MATRICES["equal entries"]),
        (NEAREST, "max", MATRICES["halfway"]),
        (Damping(0.5), "spectral", MATRICES["ill-conditioned"]),
        (RandomDropout(0.5), "nuclear", MATRICES["ill-conditioned"]),
    ],
    ids=str,
)
def test_a_contraction_is_tight_for_some_matrix(compressor, norm, x):
    lost = np.asarray(arrival(compressor, SHAPE)(np.float32(x)), np.float64) - x
    of_x = length(x, norm) ** 2
    tolerance = 5 * 0.5 * of_x / 16 if compressor.is_random else 1e-5 * of_x
    bound = (1 - compressor.contraction(norm, SHAPE)) * of_x
    assert (length(lost, norm) ** 2).mean() == pytest.approx(bound, abs=tolerance)


def test_what_rank_k_leaves_of_equal_singular_values_is_as_long_as_the_whole_in_muons_norm():
    x = MATRICES["equal singular values"]
    lost = np.asarray(arrival(RankK(2, method="exact"), SHAPE)(np.float32(x)))[0] - x
    assert length(lost, "spectral") == pytest.approx(length(x, "spectral"), rel=1e-5)
    assert not any(RankK(0.9, method=of).is_contractive("spectral") for of in ("exact", "random"))


def test_natural_rounding_is_right_on_average_and_of_two_powers():
    x = np.float32([[3.0, -1.25, 0.7, 1.0, 0.0, 1e-20]])
    for compressor in (Natural(), Natural(8)):
        drawn = np.asarray(arrival(compressor, x.shape)(x), np.float64)
        error = drawn.std(0) / 16
        assert (np.abs(drawn.mean(0) - x) <= 5 * error + 1e-12).all()
        mantissa, _ = np.frexp(drawn[drawn != 0])
        assert (np.abs(mantissa) == 0.5).all()
    assert np.isposinf(arrival(Natural(), (1, 1))(np.float32([[np.inf]]))[0])


def test_powers_of_two_far_below_the_largest_are_lost_with_8_bits_only():
    x = np.float32([[2.0**60, 2.0**-60, 2.0**-80]])
    assert (np.asarray(arrival(NEAREST, x.shape)(x)) == x).all()
    assert (np.asarray(arrival(Natural(8, nearest=True), x.shape)(x)) == x * [1, 1, 0]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.integers(1, 12))
def test_the_largest_are_those_of_a_stable_sort(numbers, k):
    x = np.float32(numbers) / 3
    expected = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
    assert (np.asarray(jax.jit(largest, static_argnums=1)(np.abs(x), k)) == expected).all()


@over_compressors
def test_a_stack_is_compressed_matrix_by_matrix_with_a_payload_of_its_bits(name):
    compressor, x = COMPRESSORS[name], np.random.default_rng(2).normal(size=(2, 3, *SHAPE))
    x = np.float32(x)

    @jax.jit
    def send(x):
        payload = compressor.compress(x, KEYS[0], compressor.init(x.shape, x.dtype))
        return payload, compressor.decompress(payload, x)

    payload, arrived = send(x)
    sizes = sum(8 * leaf.nbytes for leaf in jax.tree.leaves(payload))
    assert sizes == compressor.bits(x.shape) == 6 * compressor.bits(SHAPE)
    assert arrived.shape == x.shape
    if not compressor.is_random:
        one = arrival(compressor, SHAPE)(x[1, 2])[0]
        np.testing.assert_allclose(arrived[1, 2], one, rtol=1e-5, atol=1e-6)


# --- The cost table of EF21-Muon, as it is remembered ---------------------------------------------

BLOCK = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
GPT2 = {"table": (50304, 768)} | {f"{i}/{j}": s for i in range(12) for j, s in enumerate(BLOCK)}
TABLE = {
    Identity(): 1.0,
    Natural(): 0.5,
    RankK(0.20): 0.2687,
    RankK(0.15): 0.2019,
    RankK(0.15, Natural()): 0.1010,
    RankK(0.10): 0.1335,
    RankK(0.10, Natural()): 0.0667,
    RankK(0.05): 0.0667,
    TopK(0.20): 0.3625,
    TopK(0.15): 0.2718,
    TopK(0.15, Natural()): 0.1969,
    TopK(0.10): 0.1812,
    TopK(0.10, Natural()): 0.1312,
    TopK(0.05): 0.0906,
}


@pytest.mark.parametrize(("compressor", "cost"), TABLE.items(), ids=str)
def test_the_cost_table_of_the_paper_for_gpt_2(compressor, cost):
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in GPT2.items()}
    numbers = "in_out" if compressor.of_matrices else None
    bits = dm.compression.payload_bits(
        compressor,
        shapes,
        dimension_numbers=numbers,
        index_bits=26,  # of any entry of the table
    )
    assert bits / (32 * sum(map(np.prod, GPT2.values()))) == pytest.approx(cost, abs=1e-3)


# --- Error feedback -------------------------------------------------------------------------------

SHAPES = {"stem": (5, 4), "mid": (4, 6), "head": (6, 4)}
LAYERS = dm.layers_by_path({n: np.ones(s, np.float32) for n, s in SHAPES.items()}, [*SHAPES])
NUM_WORKERS, SEED = 3, 11


def problem():
    """Parameters, and of each worker a gradient that is a function of them."""
    rng = np.random.default_rng(5)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    maps = {name: rng.normal(size=(NUM_WORKERS, s[0], s[0])) for name, s in SHAPES.items()}
    goals = {name: rng.normal(size=(NUM_WORKERS, *s)) for name, s in SHAPES.items()}

    def gradient(j, params):
        return {n: maps[n][j] @ maps[n][j].T @ params[n] - goals[n][j] for n in SHAPES}

    return params, gradient


def keys_of(name, step, worker):
    """What the docstring says: of seed, step, path and worker."""
    key = jax.random.fold_in(jax.random.key(SEED), step)
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
    return key, jax.random.fold_in(key, 1 + worker)


def uniform(key, shape):
    return np.asarray(jax.random.bits(key, shape, jnp.uint32) & 0x7FFFFF, np.float64) / 2**23


class InNumPy:
    """C_j of a compressor, with draws by the same keys."""

    def __init__(self, which):
        self.which, self.memory = which, {}

    def __call__(self, name, x, step, worker):
        shared, key = keys_of(name, step, worker)
        keys, batch = jax.random.split(key, 3), (1, 1)
        count = max(1, int(0.3 * x.size))

        def gaussian(columns):
            return np.asarray(jax.random.normal(keys[2], (*batch, x.shape[1], columns)))[0, 0]

        def random_rank():
            return reference.project_on_drawn_span(x, gaussian(2))

        def warm():
            start = np.asarray(jax.random.normal(jax.random.key(0), (x.shape[1], 2)))
            known = self.memory.get((name, worker), start)
            omega = np.concatenate([known[:, :1], gaussian(1)], axis=1)
            p, _ = np.linalg.qr(x @ omega)
            self.memory[name, worker] = (p.T @ x).T
            return p @ (p.T @ x)

        def rank_of_natural():
            p, _ = np.linalg.qr(x @ gaussian(2))
            left, right = (
                reference.to_power_of_two(f, uniform(k, (*batch, *f.shape))[0, 0])
                for f, k in zip((p, p.T @ x), keys, strict=False)
            )
            return left @ right

        def top_of_natural():
            kept = reference.keep_largest(x, count)
            at = np.flatnonzero(kept)
            values = kept.reshape(-1)[at]
            rounded = uniform(key, (*batch, count, 1)).reshape(-1)
            kept.reshape(-1)[at] = reference.to_power_of_two(values, rounded)
            return kept

        def natural():
            # Of what is no matrix compressor, a leaf is one vector.
            return reference.to_power_of_two(x, uniform(key, (*batch, 1, x.size)).reshape(x.shape))

        def exact_rank():
            return reference.keep_largest_singular_values(x, 2)

        def dropout(inner):
            return inner() if bool(jax.random.bernoulli(shared, 0.5)) else 0 * x

        return {
            "identity": lambda: x,
            "top_k": lambda: reference.keep_largest(x, count),
            "top_k of natural": top_of_natural,
            "column_top_k": lambda: reference.keep_longest_rows(x, 2),
            "rank_k exact": exact_rank,
            "rank_k random": random_rank,
            "rank_k warm": warm,
            "rank_k of natural": rank_of_natural,
            "natural": natural,
            "natural of 8 bits": natural,
            "natural, nearest": lambda: reference.to_power_of_two(x, 0.5),
            "scaled_sign": lambda: reference.scaled_signs(x),
            "damping": lambda: 0.5 * x,
            "random_dropout": lambda: dropout(lambda: x),
            "random_dropout of rank_k": lambda: dropout(exact_rank),
        }[self.which]()


def direction(matrix):
    """UVᵀ over the singular values that are not zero to rounding."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u * (s > s[0] * 6 * np.finfo(float).eps)) @ vt


@pytest.mark.parametrize("name", graded({n: n for n in COMPRESSORS}, "top_k", "rank_k of natural"))
def test_ten_steps_with_dropped_layers_are_those_of_numpy(name):
    """M_j, G_j, G, X and W in float64; and G is the mean of all G_j after every step."""
    compressor, params, gradient = COMPRESSORS[name], *problem()
    model = reference.EF21Muon(
        params, NUM_WORKERS, InNumPy(name), lambda name, x, step: 0.5 * x, direction=direction
    )
    with jax.enable_x64(True):
        of_workers = dm.compression.ef21(compressor, momentum=0.8, seed=SEED)
        lmo = dm.norm_lmo(dm.norms.spectral_norm())
        tx = optax.chain(of_workers, lmo, optax.scale_by_learning_rate(0.1))
        tx = dm.compression.server_model(tx, Damping(0.5), layers=LAYERS)
        tx = dm.compression.on_workers(tx, NUM_WORKERS)
        w = jax.tree.map(jnp.asarray, params)
        state = tx.init(w)
        update = jax.jit(tx.update, static_argnames="depth")
        for step, depth in enumerate([0, 1, 0, 2, 2, 1, 0, 2, 0, 0]):
            grads = [gradient(j, jax.tree.map(np.asarray, w)) for j in range(NUM_WORKERS)]
            grads = jax.tree.map(lambda *of: jnp.stack(of), *grads)
            updates, state = update(grads, state, w, depth=depth)
            w = optax.apply_updates(w, updates)
            model.step(
                step,
                [*SHAPES][depth:],
                [functools.partial(gradient, j) for j in range(NUM_WORKERS)],
                radius=0.1,
                decay=0.8,
            )
            ef21 = state.inner_state[0]
            x = dm.compression.server_params(state, w)
            for leaf in SHAPES:
                for j in range(NUM_WORKERS):
                    momentum = ef21.worker.inner_state.momentum[leaf][j]
                    np.testing.assert_allclose(momentum, model.m[j][leaf], atol=1e-8)
                    own = ef21.worker.estimate[leaf][j]
                    np.testing.assert_allclose(own, model.g[j][leaf], atol=1e-8)
                mean = np.mean(ef21.worker.estimate[leaf], axis=0)
                np.testing.assert_allclose(ef21.estimate[leaf], mean, atol=1e-12)
                np.testing.assert_allclose(x[leaf], model.x[leaf], atol=1e-8)
                np.testing.assert_allclose(w[leaf], model.w[leaf], atol=1e-8)


def tree(seed, shapes=SHAPES, *leading):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=(*leading, *s)), "f") for name, s in shapes.items()}


def steps_of(tx, masks, params, grads_of):
    state = tx.init(params)
    for step, mask in enumerate(masks):
        updates, state = tx.update(grads_of(step), state, params, **mask)
        params = optax.apply_updates(params, updates)
    return params


RADII = {"radii": {"hidden": 2.0, "head": 3.0}}
METHODS = {
    "muon": (dm.muon, dm.drop_muon, {}),
    "scion": (dm.scion, dm.drop_scion, RADII),
    "gluon": (dm.gluon, dm.drop_gluon, RADII),
}


@pytest.mark.parametrize(
    "drops", graded({"all layers": False, "dropped layers": True}, "all layers")
)
@pytest.mark.parametrize("method", graded({name: name for name in METHODS}, "muon", "scion"))
def test_without_compression_it_is_the_method_itself_bit_for_bit(method, drops):
    """Of one worker; through the server's side too, with the server's model sent as it is."""
    whole, drop, options = METHODS[method]
    identity, momentum = Identity(), dm.momentum(0.8, nesterov=True)
    make = functools.partial(drop, 0.1, LAYERS) if drops else functools.partial(whole, 0.1)
    masks = [{"layer_mask": LAYERS.mask(depth)} if drops else {} for depth in (0, 2, 1)]
    expected = make(momentum=momentum, **options)
    none = optax.with_extra_args_support(optax.identity())
    ef21 = dm.compression.ef21(identity, momentum=momentum, axis=None)
    composed = optax.chain(ef21, make(momentum=none, **options))
    composed = dm.compression.server_model(composed, identity)
    results = [steps_of(tx, masks, tree(0), tree) for tx in (expected, composed)]
    assert_same_bits(*results)
    if method == "muon":
        of = dm.compression
        ready = (
            of.drop_ef21_muon(0.1, LAYERS, identity, momentum=momentum, axis=None)
            if drops
            else of.ef21_muon(0.1, identity, momentum=momentum, axis=None)
        )
        assert_same_bits(steps_of(ready, masks, tree(0), tree), results[0])


def test_workers_with_equal_gradients_are_one_worker():
    tx = dm.compression.ef21_muon(0.1, Identity())
    four = dm.compression.on_workers(tx, 4)

    def repeated(seed):
        return jax.tree.map(lambda g: np.stack([g] * 4), tree(seed))

    expected = steps_of(dm.muon(0.1), [{}, {}], tree(0), tree)
    assert_same_bits(steps_of(four, [{}, {}], tree(0), repeated), expected)


STACKED = {"stem": (4, 6), "blocks": (6, 3, 6), "bias": (4,), "conv": (3, 3, 2, 4)}
STACK_LAYERS = dm.layers_by_path(
    {n: np.ones(s, np.float32) for n, s in STACKED.items()},
    ["stem", dm.stacked("blocks", axis=1), ("conv", "bias")],
)


@pytest.mark.parametrize(
    "name", graded({n: n for n in ("rank_k warm", "top_k of natural")}, "rank_k warm")
)
def test_rows_of_a_stack_are_sent_as_layers_of_their_own_and_frozen_ones_keep_every_bit(name):
    """Also along the second axis, beside convolutions; a vector goes by another compressor."""
    compressor = COMPRESSORS[name]
    tx = dm.compression.drop_ef21_muon(
        0.1, STACK_LAYERS, compressor, dimension_numbers={"conv": "in_out"}
    )
    tx, params = dm.compression.on_workers(tx, 2), tree(0, STACKED)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update, static_argnames="depth")
    _, state = update(tree(1, STACKED, 2), state, params, depth=0)
    updates, after = update(tree(2, STACKED, 2), state, params, depth=2)
    assert not updates["stem"].any()
    assert not updates["blocks"][:, 0].any()
    assert updates["blocks"][:, 1:].any()
    before, after = state[0].inner_states["matrix"], after[0].inner_states["matrix"]
    old, new = before.inner_state, after.inner_state
    for of_old, of_new in ((old.worker.estimate, new.worker.estimate),):
        assert_same_bits(of_old["stem"], of_new["stem"])
        assert_same_bits(of_old["blocks"][:, :, 0], of_new["blocks"][:, :, 0])
    assert_same_bits(old.estimate["blocks"][:, 0], new.estimate["blocks"][:, 0])
    # A row compressed by itself, as a matrix of that shape would be.
    if name == "rank_k warm":
        ranks = np.linalg.matrix_rank(np.moveaxis(new.worker.estimate["blocks"][0], 1, 0), tol=1e-4)
        assert (ranks <= [2, 4, 4]).all()
    bits = [
        dm.compression.payload_bits(
            Natural(), params, STACK_LAYERS.mask(depth), layers=STACK_LAYERS
        )
        for depth in range(5)
    ]
    assert bits == [16 * n for n in (24 + 108 + 76, 108 + 76, 72 + 76, 36 + 76, 76)]


def test_estimates_of_bfloat16_are_kept_in_float32_so_that_no_small_step_is_lost():
    tx = dm.compression.ef21(TopK(1), momentum=0.0, axis=None)
    grads = {"w": jnp.asarray([1.0, 2.0**-7], jnp.bfloat16)}
    updates, state = tx.update(grads, tx.init(grads))
    assert updates["w"].dtype == jnp.bfloat16
    assert state.estimate["w"].dtype == state.worker.estimate["w"].dtype == jnp.float32


def test_a_payload_depends_on_seed_step_path_and_worker_alone():
    params = {"a": np.full((4, 4), 1.3, "f"), "b": np.full((4, 4), 1.3, "f")}

    def estimates(seed, params):
        tx = dm.compression.on_workers(dm.compression.ef21(Natural(), momentum=0.0, seed=seed), 2)
        grads = jax.tree.map(lambda x: np.stack([x, x]), params)
        return jax.jit(tx.update)(grads, tx.init(params), params)[1].worker.estimate

    first = estimates(0, params)
    assert_same_bits(first, estimates(0, params))
    assert_same_bits(first["b"], estimates(0, {"b": params["b"]})["b"])
    assert not np.array_equal(first["a"][0], first["a"][1])
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], estimates(1, params)["a"])


@pytest.mark.parametrize("drops", [False, True], ids=["all layers", "dropped layers"])
def test_hyperparameters_that_are_injected_are_the_plain_ones_until_they_are_changed(drops):
    """Optax makes arrays of all numbers, of a default seed too, and names what it passes on."""
    of = dm.compression
    make = functools.partial(of.drop_ef21_muon, layers=LAYERS) if drops else of.ef21_muon
    mask = {"depth": 1} if drops else {}
    rest = {"compressor": RankK(2), "server_compressor": RandomDropout(0.5), "weight_decay": 0.5}
    injected = of.on_workers(optax.inject_hyperparams(make)(learning_rate=0.1, **rest), 2)
    params, state, of_plain = tree(0), injected.init(tree(0)), None
    for step, learning_rate in enumerate((0.1, 0.1, 0.3)):
        plain = of.on_workers(make(learning_rate=learning_rate, seed=0, **rest), 2)
        of_plain = plain.init(params) if of_plain is None else of_plain
        state.hyperparams["learning_rate"] = jnp.float32(learning_rate)
        grads = tree(step + 1, SHAPES, 2)
        expected, of_plain = plain.update(grads, of_plain, params, **mask)
        updates, state = injected.update(grads, state, params, **mask)
        assert_same_bits(updates, expected)
    assert_same_bits(state.inner_state, of_plain)


def test_what_gathers_or_leaves_out_steps_goes_behind_the_exchange_or_around_the_whole_update():
    """Behind it all workers decide the same; around it `jax.lax.cond` decides for all of them."""
    ef21 = dm.compression.ef21(TopK(3), momentum=0.5)
    steps = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    behind = optax.chain(ef21, optax.apply_if_finite(steps, 3))
    alone, tx = (dm.compression.on_workers(of, 2) for of in (ef21, behind))
    params, state, estimates = tree(0), tx.init(tree(0)), alone.init(tree(0))
    gathered = []
    for seed in (1, 2):
        grads = tree(seed, SHAPES, 2)
        updates, state = tx.update(grads, state, params)
        estimate, estimates = alone.update(grads, estimates, params)
        gathered.append(estimate)
    for name, of in updates.items():
        expected = -0.1 * np.mean([estimate[name] for estimate in gathered], axis=0)
        np.testing.assert_allclose(of, expected, rtol=1e-5)

    @jax.jit
    def update(grads, state, params):
        is_finite, leave_out = jnp.isfinite(optax.tree.sum(grads)), optax.tree.zeros_like(params)
        return jax.lax.cond(
            is_finite, tx.update, lambda *given: (leave_out, given[1]), grads, state, params
        )

    grads["head"][1, 0, 0] = np.nan  # of the second worker only
    updates, after = update(grads, state, params)
    assert_same_bits(after, state)
    assert not any(map(np.any, jax.tree.leaves(updates)))
    grads["head"][1, 0, 0] = 0.0
    assert_same_bits(update(grads, state, params), jax.jit(tx.update)(grads, state, params))


def test_the_model_of_workers_comes_to_that_of_the_server_where_gradients_vanish():
    tx = dm.compression.server_model(optax.sgd(1.0), TopK(1), norm="frobenius")
    w = {"w": jnp.zeros(3)}
    state = tx.init(w)
    for grads in ([3.0, -2.0, 1.0], [0.0] * 3, [0.0] * 3):
        updates, state = tx.update({"w": jnp.array(grads)}, state, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w["w"], dm.compression.server_params(state, w)["w"])


def test_the_first_step_from_first_gradients_finds_nothing_new():
    tx = dm.compression.ef21_muon(0.1, TopK(1))
    tx, params, grads = dm.compression.on_workers(tx, 2), tree(0), tree(1, SHAPES, 2)
    state = dm.compression.start_from_gradients(tx.init(params), grads)
    _, after = jax.jit(tx.update)(grads, state, params)
    before, after = (of[0].inner_states["matrix"].inner_state for of in (state, after))
    for leaf in SHAPES:
        np.testing.assert_allclose(before.estimate[leaf], grads[leaf].mean(0), rtol=1e-6)
        np.testing.assert_allclose(after.estimate[leaf], before.estimate[leaf], atol=1e-6)


# --- Errors ---------------------------------------------------------------------------------------


def first_update(compressor=TopK(1), params=None, **extra):  # noqa: B008
    params = tree(0) if params is None else params
    tx = dm.compression.ef21(compressor, **extra)
    return tx.update(params, tx.init(params))


def update_rows(depth):
    tx, params = dm.compression.ef21(TopK(1), layers=STACK_LAYERS, axis=None), tree(0, STACKED)
    return tx.update(params, tx.init(params), layer_mask=STACK_LAYERS.mask(depth))


def differing(tx, workers):
    """A step that would leave each worker with other parameters or states than the rest."""
    tx = dm.compression.on_workers(tx, workers)
    params = {"w": jnp.ones(2)}
    grads = jnp.ones((2 if workers == 2 else 1, 2))
    return tx.update({"w": grads}, tx.init(params), params)


class Foreign(NamedTuple):
    """The state of an optimizer that knows no workers."""

    settings: jax.Array


PAIRS = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0, steps_per_draw=2)


def wrapped(wrapper):
    """The state of workers that exchange within a wrapper, which stands between other parts."""
    tx = optax.chain(optax.identity(), wrapper(optax.chain(dm.compression.ef21(TopK(1)))))
    return dm.compression.on_workers(tx, 2).init(tree(0))


ERRORS = {
    "k of a leaf": (lambda: first_update(TopK(31)), ValueError, "k is 31, and leaf 'head' has 24"),
    "rank of a leaf": (lambda: first_update(RankK(5)), ValueError, "leaf 'head' has 4 singular"),
    "k": (lambda: TopK(0), ValueError, r"k must be an integer of at least 1, or a share in"),
    "share": (lambda: RankK(1.5), ValueError, "share in"),
    "k of another type": (lambda: TopK("all"), TypeError, "k must be a Python integer"),
    "vector": (
        lambda: first_update(RankK(1), {"bias": jnp.ones(3)}),
        ValueError,
        "is of matrices, and leaf 'bias' is a vector of 3",
    ),
    "server": (
        lambda: dm.compression.ef21_muon(0.1, TopK(1), server_compressor=RankK(0.5)),
        ValueError,
        "server compressor=RankK.* is not contractive in the spectral norm.*'frobenius'",
    ),
    "worker": (
        lambda: dm.compression.ef21(TopK(0.5), norm="nuclear"),
        ValueError,
        "not contractive in the nuclear norm",
    ),
    "norm": (lambda: TopK(1).contraction("l2", (2, 2)), ValueError, "norm must be one of"),
    "axis": (first_update, ValueError, "outside of the axis 'workers'"),
    "mesh": (
        lambda: dm.compression.on_workers(
            dm.compression.ef21(TopK(1)), jax.make_mesh((1,), ("data",))
        ),
        ValueError,
        r"axis is 'workers', and the mesh has the axes \['data'\]",
    ),
    "number of workers": (
        lambda: dm.compression.on_workers(dm.compression.ef21(TopK(1)), 2).update(
            tree(0), None, tree(0)
        ),
        ValueError,
        "needs a leading axis of 2 workers",
    ),
    "nothing exchanged": (
        lambda: differing(optax.sgd(1.0), 2),
        ValueError,
        "would differ between workers. Exchange gradients first",
    ),
    "nothing exchanged on a mesh": (
        lambda: differing(optax.sgd(1.0), jax.make_mesh((1,), ("workers",))),
        ValueError,
        "would differ between workers",
    ),
    "a state before the exchange": (
        lambda: differing(
            optax.chain(optax.trace(0.9), dm.compression.ef21(TopK(1))),
            jax.make_mesh((1,), ("workers",)),
        ),
        ValueError,
        "would differ between workers",
    ),
    "accumulated inside": (
        lambda: wrapped(lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()),
        TypeError,
        "accumulates, by optax.MultiSteps .* give update the means over the micro-batches",
    ),
    "accumulated by layers inside": (
        lambda: wrapped(lambda tx: dm.accumulate(tx, PAIRS)),
        TypeError,
        "accumulates, by .* dm.accumulate",
    ),
    "finite ones inside": (
        lambda: wrapped(lambda tx: optax.apply_if_finite(tx, 3)),
        TypeError,
        "apply_if_finite .* each would decide by its own gradient alone .* jax.lax.cond",
    ),
    "accumulated around": (
        lambda: (
            optax.MultiSteps(dm.compression.on_workers(dm.compression.ef21(TopK(1)), 2), 2)
            .gradient_transformation()
            .update(tree(1, SHAPES, 2), optax.MultiSteps(optax.sgd(0.1), 2).init(tree(0)), tree(0))
        ),
        ValueError,
        "No optax.MultiSteps goes around",
    ),
    "no compressor": (lambda: dm.compression.ef21(optax.sgd(1)), TypeError, "must be a compressor"),
    "traced": (
        lambda: jax.jit(update_rows)(jnp.int32(1)),
        TypeError,
        "layer_mask is an array at .* active layers must be known",
    ),
    "damping": (lambda: Damping(2.0), ValueError, r"factor must lie in \(0, 2\)"),
    "settings of something else": (
        lambda: dm.compression.check_processes(Foreign(jnp.zeros(2, jnp.uint32))),
        ValueError,
        "has no part that sends anything: a Foreign",
    ),
    "nothing sent": (
        lambda: dm.compression.check_processes(optax.sgd(1.0).init(tree(0))),
        ValueError,
        "has no part that sends anything",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    function, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words):
        function()
