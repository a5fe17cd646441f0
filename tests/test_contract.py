"""One contract that every public transformation passes.

The parameters are three layers of asymmetric, non-square matrices, with biases where the
transformation takes vectors; their names sort from deep to shallow, so alphabetical order is wrong.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import dropmuon_jax as dm
from dropmuon_jax.layers import trees

# Compiling is most of the time. XLA rewrites and fuses as ever: only LLVM optimizes less.
pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("stem", "mid", "head")
SHAPES = {"stem": (6, 5), "mid": (5, 7), "head": (7, 3)}
DEPTHS = range(len(NAMES))
# A suffix, which is a depth, and two sets that are none.
SUBSETS = {
    "mid_and_head": (False, True, True),
    "mid_only": (False, True, False),
    "stem_and_head": (True, False, True),
}
ALL, NOTHING = (True, True, True), (False, False, False)


def random_tree(seed: int, *, biases: bool, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        tree[name] = {"kernel": jnp.asarray(rng.normal(size=shape), dtype)}
        if biases:
            tree[name]["bias"] = jnp.asarray(rng.normal(size=shape[1:]), dtype)
    return tree


LAYERS = dm.layers_by_path(random_tree(0, biases=True), NAMES)
MATRIX_LAYERS = dm.layers_by_path(random_tree(0, biases=False), NAMES)


# Two steps of the iteration instead of five: the contract does not ask for accuracy, and compiling
# is most of its time.
KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
LMO = dm.newton_schulz_lmo(0.3, shape_factor="muon", num_steps=2)
RADII = {"hidden": 0.3, "head": 2.0, "bias": 0.5}  # of Scion and Gluon
NORMS = {"hidden": dm.norms.spectral_norm("scion", orthogonalize=KERNEL)}
ADAPTIVE = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A public transformation, and what the contract must know of it."""

    make: Callable[[], optax.GradientTransformation]
    biases: bool = True
    takes_mask: bool = True
    has_memory: bool = True  # state for each leaf, not only a count
    promotes: bool = False  # a part from Optax gives float32 for bfloat16 gradients
    descends: bool = False  # its updates are steps; otherwise they have the gradient's sign
    takes_two_gradients: bool = False

    @property
    def tx(self) -> Any:
        return optax.with_extra_args_support(self.make())

    @property
    def optimizer(self) -> Any:
        """The transformation with a learning rate behind it, if it has none."""
        if self.descends:
            return self.tx
        return optax.chain(self.tx, optax.scale_by_learning_rate(0.1))

    @property
    def layers(self) -> dm.Layers:
        return LAYERS if self.biases else MATRIX_LAYERS

    def tree(self, seed: int, dtype: Any = jnp.float32) -> Any:
        return random_tree(seed, biases=self.biases, dtype=dtype)

    @property
    def extra_args(self) -> dict[str, Any]:
        """What `update` needs besides a mask."""
        return {"prev_params_grads": self.tree(20)} if self.takes_two_gradients else {}

    def mask(self, active: tuple[bool, ...]) -> dict[str, Any]:
        """The extra arguments of a step in which these layers are active; no mask for Muon."""
        mask = {"layer_mask": self.layers.subset(active)} if self.takes_mask else {}
        return mask | self.extra_args


CASES = {
    "momentum": Case(lambda: dm.momentum(0.8)),
    "momentum_nesterov": Case(lambda: dm.momentum(0.8, nesterov=True)),
    "momentum_bfloat16": Case(lambda: dm.momentum(0.8, dtype=jnp.bfloat16)),
    "momentum_scheduled": Case(lambda: dm.momentum(dm.schedules.gluon_decay())),
    "mvr_momentum": Case(lambda: dm.mvr_momentum(0.8, variant=3), takes_two_gradients=True),
    "mars_momentum": Case(lambda: dm.transforms.mars_momentum(0.8)),
    "keep_prev_params": Case(dm.transforms.keep_prev_params),
    "newton_schulz_lmo": Case(lambda: LMO, biases=False, has_memory=False),
    "norm_sharp": Case(
        lambda: dm.transforms.norm_sharp(dm.norms.spectral_norm(orthogonalize=KERNEL), 0.3),
        biases=False,
        has_memory=False,
    ),
    "norm_lmo_scheduled": Case(
        lambda: dm.norm_lmo(dm.norms.sign_norm(), schedule), has_memory=False
    ),
    "norm_lmo_by_path": Case(
        lambda: dm.norm_lmo(
            dm.norms.rms_norm(),
            {"stem": dm.schedules.adaptive_radius(2.0, 0.5), "mid": 0.3, "head": 1.0},
        ),
        has_memory=False,
    ),
    "layer_mask_sampler": Case(
        lambda: dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=1), has_memory=False
    ),
    "per_layer": Case(
        lambda: dm.per_layer(optax.adamw(0.1, weight_decay=0.2), LAYERS),
        promotes=True,
        descends=True,
    ),
    # With a tree of labels; drop_muon and muon use a function.
    "chain_subtrees": Case(
        lambda: dm.chain_subtrees(
            {
                "matrix": optax.chain(dm.momentum(0.8), LMO),
                "vector": dm.per_layer(optax.scale_by_adam(), LAYERS),
            },
            {name: {"kernel": "matrix", "bias": "vector"} for name in NAMES},
        ),
        promotes=True,
    ),
    "drop_muon": Case(
        lambda: dm.drop_muon(
            0.1,
            LAYERS,
            momentum=dm.momentum(0.8, nesterov=True),
            orthogonalize=KERNEL,
            weight_decay=0.2,
        ),
        promotes=True,
        descends=True,
    ),
    "muon": Case(
        lambda: dm.muon(0.1, orthogonalize=KERNEL, weight_decay=0.2),
        takes_mask=False,
        promotes=True,
        descends=True,
    ),
    "drop_scion": Case(
        lambda: dm.drop_scion(0.1, LAYERS, RADII, norms=NORMS), promotes=True, descends=True
    ),
    "gluon": Case(
        lambda: dm.gluon(dm.schedules.gluon_radius(0.1), RADII, norms=NORMS),
        takes_mask=False,
        descends=True,
    ),
    "record_gains": Case(
        lambda: dm.record_gains(
            optax.chain(dm.momentum(0.8), optax.scale_by_learning_rate(0.1)), ADAPTIVE
        ),
        descends=True,
    ),
}
MASKED = {name: case for name, case in CASES.items() if case.takes_mask}
REQUIRING_A_MASK = ("layer_mask_sampler", "drop_muon", "drop_scion")
REMEMBERING = {name: case for name, case in MASKED.items() if case.has_memory}


def over(cases: dict[str, Any], argument: str = "case"):
    return pytest.mark.parametrize(
        argument, [pytest.param(value, id=name) for name, value in cases.items()]
    )


def leaves_by_path(tree: Any) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def copied(tree: Any) -> Any:
    """A copy on the host, which donation cannot take away."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    others = leaves_by_path(expected)
    for path, leaf in leaves_by_path(actual).items():
        other = others[path]
        assert leaf.dtype == other.dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path


def assert_close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    # Measured between programs of the same mathematics: at most 2e-6 of entries of order one.
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    others = leaves_by_path(expected)
    for path, leaf in leaves_by_path(actual).items():
        other = others[path]
        assert leaf.dtype == other.dtype, path
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64),
            np.asarray(other, np.float64),
            rtol=2e-2 if leaf.dtype == jnp.bfloat16 else rtol,
            atol=atol,
            err_msg=path,
        )


def layer_of_path(path: str) -> int | None:
    """The layer that a leaf of a state belongs to; none for the counts of all layers."""
    if found := re.search(r"\.inner_states\[(\d+)\]", path):
        return int(found[1])
    path = re.sub(r"\.inner_states\['\w+'\]", "", path)  # Scion's role "head" is no layer's name
    return next((i for i, name in enumerate(NAMES) if f"['{name}']" in path), None)


def of_layers(tree: Any, active: tuple[bool, ...], flag: bool) -> dict[str, jax.Array]:
    """The leaves of a tree that belong to the layers whose entry in `active` is `flag`."""
    by_layer = [(layer_of_path(path), path, leaf) for path, leaf in leaves_by_path(tree).items()]
    return {
        path: leaf for layer, path, leaf in by_layer if layer is not None and active[layer] is flag
    }


def applied(params: Any, updates: Any) -> Any:
    return optax.apply_updates(params, updates)


@functools.cache
def warm(case: Case) -> tuple[Any, Any, Any]:
    """The optimizer after two full steps, so that no momentum is zero any more."""
    tx, params = case.optimizer, case.tree(0)
    state = tx.init(params)
    for seed in (1, 2):
        updates, state = tx.update(case.tree(seed), state, params, **case.mask(ALL))
        params = applied(params, updates)
    return tx, params, state


# --- The programs of JAX --------------------------------------------------------------------------


@over(CASES)
def test_jit_equals_eager(case):
    tx, params, grads = case.tx, case.tree(0), case.tree(1)
    state = tx.init(params)
    update = functools.partial(tx.update, **case.mask(SUBSETS["stem_and_head"]))
    assert_close(jax.jit(update)(grads, state, params), update(grads, state, params))


@over(CASES)
def test_scan_over_steps_equals_a_loop(case):
    tx, params = case.optimizer, case.tree(0)
    mask = case.mask(SUBSETS["mid_and_head"])

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **mask)
        return (applied(params, updates), state), updates

    grads = [case.tree(seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scanned, _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    looped = (params, tx.init(params))
    for grad in grads:
        looped, _ = step(looped, grad)
    assert_close(scanned, looped)


@over(CASES)
def test_vmap_over_seeds_equals_a_loop(case):
    tx, mask = case.optimizer, case.mask(SUBSETS["mid_and_head"])

    def run(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params, **mask)
            params = applied(params, updates)
        return params, state

    runs = [(case.tree(seed), case.tree(10 + seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    vmapped = jax.jit(jax.vmap(run))(*stacked)
    for i, (params, grads) in enumerate(runs):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], vmapped), run(params, grads))


@pytest.mark.parametrize("make", [dm.layer_mask_sampler, dm.DepthSampler])
def test_vmap_over_the_seed_of_the_draws_equals_a_loop(make):
    def draws(seed):
        sampler = make(LAYERS, dm.uniform_depth(), seed=seed)
        return jax.vmap(sampler.sample)(jnp.arange(16))

    vmapped = jax.vmap(draws)(jnp.arange(2))
    for seed in range(2):
        sampler = make(LAYERS, dm.uniform_depth(), seed=seed)
        assert vmapped[seed].tolist() == [sampler.depth(step) for step in range(16)]
    assert len({tuple(row) for row in vmapped.tolist()}) == 2


# --- Shapes, dtypes, structure --------------------------------------------------------------------

DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16_gradients": (jnp.float32, jnp.bfloat16),
    "bf16": (jnp.bfloat16, jnp.bfloat16),
    "bf16_parameters": (jnp.bfloat16, jnp.float32),
}


def shapes_and_dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)


@functools.cache
def traced_update(case: Case, dtypes: tuple[Any, Any], active: tuple[bool, ...]) -> Any:
    """The updates, the state before and the state after, of which only shapes are looked at."""
    tx, params, grads = case.tx, case.tree(0, dtypes[0]), case.tree(1, dtypes[1])
    state = tx.init(params)
    update = functools.partial(tx.update, **case.mask(active))
    updates, new_state = jax.eval_shape(update, grads, state, params)
    return updates, state, new_state


@over(DTYPES, "dtypes")
@over(CASES)
def test_updates_have_the_shapes_and_dtypes_of_the_gradients(case, dtypes):
    grads = case.tree(1, dtypes[1])
    updates, _, _ = traced_update(case, dtypes, ALL)
    if case.promotes and dtypes[0] != dtypes[1]:
        grads = jax.tree.map(lambda g, u: g.astype(u.dtype), grads, updates)
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(grads)


@over(DTYPES, "dtypes")
@over(MASKED)
def test_updates_have_the_same_shapes_and_dtypes_for_every_mask(case, dtypes):
    def updates(active):
        return shapes_and_dtypes(traced_update(case, dtypes, active)[0])

    for active in (*SUBSETS.values(), NOTHING):
        assert updates(active) == updates(ALL)


@over(DTYPES, "dtypes")
@over(CASES)
def test_the_state_keeps_structure_shapes_and_dtypes(case, dtypes):
    for active in (ALL, *SUBSETS.values(), NOTHING):
        _, before, after = traced_update(case, dtypes, active)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert shapes_and_dtypes(after) == shapes_and_dtypes(before)


@pytest.mark.parametrize("stacked", [False, True])
def test_per_layer_keeps_the_dtypes_of_a_state_that_its_inner_would_change(stacked):
    params = {"blocks": jnp.ones((3, 2))}
    layers = dm.layers_by_path(params, [dm.stacked("blocks") if stacked else "blocks"])
    inner = optax.GradientTransformation(
        lambda params: jnp.float32(0),
        lambda updates, state, params=None: (updates, (state + 1).astype(jnp.bfloat16)),
    )
    tx = dm.per_layer(inner, layers)
    state = tx.init(params)
    _, new_state = jax.jit(tx.update)(params, state)
    assert shapes_and_dtypes(new_state) == shapes_and_dtypes(state)
    assert (np.asarray(new_state.inner_states[0]) == 1).all()


# --- Inactive layers ------------------------------------------------------------------------------


@over(SUBSETS, "active")
@over(MASKED)
def test_an_inactive_leaf_has_update_zero_whatever_its_gradient(case, active):
    tx, params, state = warm(case)
    for value in (0.0, 3.0, np.nan):
        grads = jax.tree.map(
            lambda on, g, value=value: g if on else jnp.full_like(g, value),
            case.layers.subset(active),
            case.tree(3),
        )
        updates, _ = tx.update(grads, state, params, **case.mask(active))
        frozen = of_layers(updates, active, False)
        assert frozen
        assert all(not leaf.any() for leaf in frozen.values())


@over(SUBSETS, "active")
@over(MASKED)
def test_an_active_leaf_is_updated_as_in_a_full_step(case, active):
    tx, params, state = warm(case)
    grads = case.tree(3)
    updates, new_state = tx.update(grads, state, params, **case.mask(active))
    full_updates, full_state = tx.update(grads, state, params, **case.mask(ALL))
    for partial, full in ((updates, full_updates), (new_state, full_state)):
        assert_same_bits(of_layers(partial, active, True), of_layers(full, active, True))
    assert all(leaf.any() for leaf in of_layers(updates, active, True).values())


@over(SUBSETS, "active")
@over(REMEMBERING)
def test_an_inactive_leaf_keeps_every_bit_of_its_state_over_several_steps(case, active):
    tx, params, state = warm(case)
    before = copied(of_layers(state, active, False))
    assert before
    assert all(leaf.any() for leaf in before.values())
    for seed in (3, 4, 5):
        updates, state = tx.update(case.tree(seed), state, params, **case.mask(active))
        params = applied(params, updates)
    assert_same_bits(of_layers(state, active, False), before)


# In these two sets every layer is active once and inactive once; each is a program to compile.
@over({name: SUBSETS[name] for name in ("mid_only", "stem_and_head")}, "active")
@over(MASKED)
def test_an_inactive_leaf_keeps_every_bit_through_donated_buffers(case, active):
    tx, params, state = warm(case)
    params = jax.tree.map(lambda leaf: leaf.at[0].set(-0.0), params)
    state = jax.tree.map(jnp.copy, state)

    @functools.partial(jax.jit, static_argnames="active", donate_argnames=("params", "state"))
    def step(params, state, grads, active):
        updates, state = tx.update(grads, state, params, **case.mask(active))
        return applied(params, updates), state

    before = copied((of_layers(params, active, False), of_layers(state, active, False)))
    moving = copied(of_layers(params, active, True))
    for seed in (3, 4, 5):
        donated = jax.tree.leaves(params)
        params, state = step(params, state, case.tree(seed), active=active)
        assert all(leaf.is_deleted() for leaf in donated)
    after = of_layers(params, active, False), of_layers(state, active, False)
    assert_same_bits(after, before)
    for path, leaf in of_layers(params, active, True).items():
        assert (np.asarray(leaf) != moving[path]).all()


# -0.0 + 0.0 = +0.0 outside jit, so the last zero must be -0.0: that of the sampler at the end of a
# chain, and every other one behind `scale_by_learning_rate`. This per_layer has neither.
@over(SUBSETS, "active")
@over({name: c for name, c in MASKED.items() if name not in ("per_layer", "layer_mask_sampler")})
def test_an_inactive_parameter_of_minus_zero_stays_minus_zero(case, active):
    tx, params, state = warm(case)
    params = jax.tree.map(lambda leaf: leaf.at[0].set(-0.0), params)
    before = copied(of_layers(params, active, False))
    updates, _ = tx.update(case.tree(3), state, params, **case.mask(active))
    params = applied(params, updates)
    assert_same_bits(of_layers(params, active, False), before)


# A scheduled decay has gone on meanwhile.
@over({name: case for name, case in REMEMBERING.items() if name != "momentum_scheduled"})
def test_a_frozen_layer_continues_where_it_stopped(case):
    active = SUBSETS["stem_and_head"]
    tx, params, state = warm(case)
    straight, _ = tx.update(case.tree(5), state, params, **case.mask(ALL))
    frozen = params["mid"]
    for seed in (3, 4):
        updates, state = tx.update(case.tree(seed), state, params, **case.mask(active))
        params = applied(params, updates)
    assert_same_bits(params["mid"], frozen)
    resumed, _ = tx.update(case.tree(5), state, params, **case.mask(ALL))
    assert_same_bits(resumed["mid"], straight["mid"])


@pytest.mark.parametrize("name", ["chain_subtrees", "drop_muon"])
def test_a_zero_gradient_alone_does_not_freeze(name):
    """The old momentum is orthogonalized again: why masks are needed."""
    case = CASES[name]
    tx, params, state = warm(case)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, state, params, **case.mask(ALL))
    for name in NAMES:
        kernel = np.asarray(updates[name]["kernel"])
        # The step keeps its length, 0.1 or 0.1 · radius of the spectral norm, however small M is.
        assert np.linalg.norm(kernel, 2) > 0.02


@over(MASKED)
def test_with_nothing_active_only_the_counts_of_all_steps_change(case):
    tx, params, state = warm(case)
    updates, new_state = tx.update(case.tree(3), state, params, **case.mask(NOTHING))
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    changed = {
        path
        for path, leaf in leaves_by_path(new_state).items()
        if np.asarray(leaf).tobytes() != np.asarray(leaves_by_path(state)[path]).tobytes()
    }
    counts = {
        path
        for path, leaf in leaves_by_path(state).items()
        if leaf.ndim == 0 and layer_of_path(path) is None
    }
    assert changed == counts


# --- Wrappers of Optax ----------------------------------------------------------------------------


@over(CASES)
def test_partition_hands_over_a_part_of_the_tree_and_of_the_mask(case):
    tx, params, grads = case.tx, case.tree(0), case.tree(1)
    labels = {
        name: jax.tree.map(lambda _, name=name: "sgd" if name == "mid" else "ours", params[name])
        for name in NAMES
    }
    parted: Any = optax.partition(
        {"ours": tx, "sgd": optax.sgd(0.5)}, labels, mask_compatible_extra_args=True
    )
    mask = case.mask(SUBSETS["mid_and_head"])
    updates, _ = parted.update(grads, parted.init(params), params, **mask)
    alone, _ = tx.update(grads, tx.init(params), params, **mask)
    assert_close(updates | {"mid": alone["mid"]}, alone)
    assert_close(updates["mid"], jax.tree.map(lambda g: -0.5 * g, grads["mid"]))


@functools.cache
def multisteps(case: Case, active: tuple[bool, ...]) -> tuple[Any, Callable[..., Any]]:
    """Two micro-steps to a step: the state of a warm optimizer, and the compiled update."""
    tx, params, state = warm(case)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    update = jax.jit(functools.partial(multi.update, **case.mask(active)))
    return multi.init(params)._replace(inner_opt_state=state), update


@over(CASES)
def test_multisteps_equals_one_step_on_the_mean_gradient(case):
    active = SUBSETS["stem_and_head"]
    tx, params, state = warm(case)
    multi_state, update = multisteps(case, active)
    first, second = case.tree(3), case.tree(4)
    _, multi_state = update(first, multi_state, params)
    updates, multi_state = update(second, multi_state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, expected_state = tx.update(mean, state, params, **case.mask(active))
    assert_close(updates, expected)
    assert_close(multi_state.inner_opt_state, expected_state)


@over(CASES)
def test_a_micro_step_of_multisteps_changes_neither_parameters_nor_inner_state(case):
    _, params, state = warm(case)
    multi_state, update = multisteps(case, SUBSETS["stem_and_head"])
    updates, multi_state = update(case.tree(3), multi_state, params)
    assert_same_bits(applied(params, updates), params)
    assert_same_bits(multi_state.inner_opt_state, state)


@over(MASKED)
def test_multisteps_keeps_an_inactive_leaf_frozen(case):
    active = SUBSETS["stem_and_head"]
    _, params, state = warm(case)
    multi_state, update = multisteps(case, active)
    before = copied(params["mid"]), copied(of_layers(state, active, False))
    for seed in (3, 4, 5, 6):
        updates, multi_state = update(case.tree(seed), multi_state, params)
        params = applied(params, updates)
    after = params["mid"], of_layers(multi_state.inner_opt_state, active, False)
    assert_same_bits(after, before)


@over(CASES)
def test_apply_if_finite_skips_a_step_with_nan_and_takes_the_next(case):
    tx, params, state = warm(case)
    guarded: Any = optax.apply_if_finite(tx, max_consecutive_errors=3)
    guarded_state = guarded.init(params)._replace(inner_state=state)
    mask = case.mask(SUBSETS["mid_and_head"])
    update = jax.jit(functools.partial(guarded.update, **mask))
    good = case.tree(3)
    bad = good | {"head": good["head"] | {"kernel": good["head"]["kernel"].at[1, 2].set(jnp.nan)}}

    updates, guarded_state = update(bad, guarded_state, params)
    assert_same_bits(applied(params, updates), params)
    assert_same_bits(guarded_state.inner_state, state)

    updates, guarded_state = update(good, guarded_state, params)
    expected, expected_state = tx.update(good, state, params, **mask)
    assert_close(updates, expected)
    assert_close(guarded_state.inner_state, expected_state)


def schedule(count):
    return 0.1 / (1.0 + count)


INJECTED = {
    "momentum": (CASES["momentum"], dm.momentum, {"decay": 0.8}, ()),
    "momentum_static_dtype": (
        CASES["momentum"],
        dm.momentum,
        # A dtype is callable, and Optax takes callables for schedules.
        {"decay": 0.8, "dtype": jnp.bfloat16},
        ("dtype",),
    ),
    "mvr_momentum_static_variant": (
        CASES["mvr_momentum"],
        dm.mvr_momentum,
        {"decay": schedule, "variant": 2, "q": 0.3},
        ("variant",),
    ),
    "mars_momentum": (
        CASES["mars_momentum"],
        dm.transforms.mars_momentum,
        {"decay": 0.8, "gamma": 0.1},
        (),
    ),
    "newton_schulz_lmo": (
        CASES["newton_schulz_lmo"],
        dm.newton_schulz_lmo,
        {"radius": 0.3, "coefficients": ((2.0, -1.5, 0.5),)},
        (),
    ),
    "newton_schulz_lmo_static_num_steps": (
        CASES["newton_schulz_lmo"],
        dm.newton_schulz_lmo,
        {"radius": 0.3, "num_steps": 3},
        ("num_steps",),
    ),
    "norm_sharp": (
        CASES["norm_sharp"],
        dm.transforms.norm_sharp,
        {"step_size": schedule, "norm": dm.norms.spectral_norm(orthogonalize=KERNEL)},
        (),
    ),
    "norm_lmo": (
        CASES["norm_lmo_scheduled"],
        dm.norm_lmo,
        {"radius": schedule, "norm": dm.norms.sign_norm(normalized=False)},
        (),
    ),
    "layer_mask_sampler": (
        CASES["layer_mask_sampler"],
        dm.layer_mask_sampler,
        {"layers": LAYERS, "depth_distribution": dm.uniform_depth(), "seed": 1},
        ("steps_per_draw",),
    ),
    "drop_muon": (
        CASES["drop_muon"],
        dm.drop_muon,
        {"learning_rate": schedule, "layers": LAYERS, "momentum": 0.8, "weight_decay": 0.2},
        (),
    ),
    # A kernel is callable too.
    "drop_muon_static_kernel_and_roles": (
        CASES["drop_muon"],
        dm.drop_muon,
        {
            "learning_rate": schedule,
            "layers": LAYERS,
            "orthogonalize": KERNEL,
            "roles": {"mid/kernel": "embedding"},
        },
        ("orthogonalize", "roles"),
    ),
    "muon": (
        CASES["muon"],
        dm.muon,
        {"learning_rate": schedule, "orthogonalize": KERNEL, "weight_decay": 0.2},
        ("orthogonalize",),
    ),
    "drop_scion": (
        CASES["drop_scion"],
        dm.drop_scion,
        {"learning_rate": schedule, "layers": LAYERS, "radii": RADII, "norms": NORMS},
        (),
    ),
}


@over(INJECTED, "injected")
def test_injected_hyperparameters_equal_plain_ones(injected):
    case, factory, arguments, static = injected
    plain = optax.with_extra_args_support(factory(**arguments))
    dynamic = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    params = case.tree(0)
    plain_state, dynamic_state = plain.init(params), dynamic.init(params)
    mask = case.mask(SUBSETS["mid_and_head"])
    update = jax.jit(functools.partial(dynamic.update, **mask))
    for seed in (1, 2):
        grads = case.tree(seed)
        expected, plain_state = plain.update(grads, plain_state, params, **mask)
        updates, dynamic_state = update(grads, dynamic_state, params)
        assert_close(updates, expected)


def test_an_injected_decay_follows_its_schedule():
    params = CASES["momentum"].tree(0)
    tx = optax.inject_hyperparams(dm.momentum)(decay=lambda count: jnp.array([0.5, 0.75])[count])
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(updates))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all((leaf == 0.75 * 0.5 + 0.25).all() for leaf in jax.tree.leaves(updates))


# inject_hyperparams gives a number the dtype of the parameters.
@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", ["momentum", "newton_schulz_lmo"])
def test_injected_hyperparameters_work_for_bfloat16_parameters(name):
    case, factory, arguments, static = INJECTED[name]
    params, grads = case.tree(0, jnp.bfloat16), case.tree(1, jnp.bfloat16)
    tx = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    updates, _ = tx.update(grads, tx.init(params), params)
    plain = factory(**arguments)
    expected, _ = plain.update(grads, plain.init(params), params)
    assert_close(updates, expected)


# Arrays of a state with an entry for each leaf, layer or depth.
NO_PARAMETERS = (
    *(".last_step", ".started"),
    *(".gains", ".num_active_steps", ".probabilities", ".next_probabilities"),
)


@over(CASES)
def test_map_params_reaches_exactly_the_state_of_the_parameters(case):
    _, _, state = warm(case)
    tx = case.optimizer
    mapped = optax.tree.map_params(tx, lambda leaf: jnp.full_like(leaf, 7), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for path, leaf in leaves_by_path(mapped).items():
        if leaf.ndim and not path.endswith(NO_PARAMETERS):
            assert (leaf == 7).all(), path
        else:
            assert_same_bits(leaf, leaves_by_path(state)[path])


@over(CASES)
def test_a_checkpoint_brings_back_every_bit(case, tmp_path):
    _, params, state = warm(case)
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved
        )
        restored = checkpointer.restore(tmp_path / "step", abstract)
    assert_same_bits(restored, saved)


# --- Extra arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize("misspelt", ["layer_masks", "layermask", "LayerMask"])
@over(CASES)
def test_a_misspelt_extra_argument_is_an_error_that_names_the_right_one(case, misspelt):
    tx, params = case.tx, case.tree(0)
    with pytest.raises(TypeError, match=f"{misspelt}.*Did you mean 'layer_mask'"):
        tx.update(params, tx.init(params), params, **{misspelt: case.layers.mask(0)})


@over(CASES)
def test_unrelated_extra_arguments_pass(case):
    tx, params, grads = case.tx, case.tree(0), case.tree(1)
    state, mask = tx.init(params), case.mask(ALL)
    result = tx.update(grads, state, params, value=jnp.array(1.0), grad=grads, **mask)
    assert_same_bits(result, tx.update(grads, state, params, **mask))


@over({name: case for name, case in MASKED.items() if name not in REQUIRING_A_MASK})
def test_without_a_mask_every_layer_is_active(case):
    tx, params, grads = case.tx, case.tree(0), case.tree(1)
    state = tx.init(params)
    assert_same_bits(
        tx.update(grads, state, params, **case.extra_args),
        tx.update(grads, state, params, **case.mask(ALL)),
    )


def link_with_an_argument_called_mask() -> optax.GradientTransformationExtraArgs:
    """Another library's link of a chain, which multiplies by a tree of its own."""

    def update_fn(updates, state, params=None, *, mask, **extra_args):
        return jax.tree.map(lambda u, keep: keep * u, updates, mask), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


@over(CASES)
def test_an_extra_argument_called_mask_is_for_another_link_and_passes(case):
    params, grads = case.tree(0), case.tree(1)
    tx = optax.chain(case.tx, link_with_an_argument_called_mask())
    keep = jax.tree.map(lambda leaf: jnp.asarray(leaf > 0, leaf.dtype), case.tree(5))
    extra_args = case.mask(SUBSETS["mid_and_head"])
    updates, _ = tx.update(grads, tx.init(params), params, mask=keep, **extra_args)
    expected, _ = case.tx.update(grads, case.tx.init(params), params, **extra_args)
    assert_same_bits(updates, jax.tree.map(jnp.multiply, keep, expected))


def test_per_layer_cuts_tree_shaped_extra_arguments_to_the_layer():
    def update_fn(updates, state, params=None, **extra_args):
        del params
        factor, scales = extra_args["factor"], extra_args["scales"]
        return jax.tree.map(lambda u, s: factor * s * u, updates, scales), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    params, scales = random_tree(0, biases=True), random_tree(1, biases=True)
    tx = dm.per_layer(scaled, LAYERS)
    updates, _ = tx.update(
        params, tx.init(params), layer_mask=LAYERS.mask(1), scales=scales, factor=2.0
    )
    expected = jax.tree.map(
        lambda on, u, s: 2.0 * s * u if on else jnp.zeros_like(u), LAYERS.mask(1), params, scales
    )
    assert_same_bits(updates, expected)


# --- Ready-made optimizers ------------------------------------------------------------------------

STACKS = {
    "stem": {"kernel": (6, 5), "bias": (5,)},
    "blocks": {"kernel": (2, 5, 5), "bias": (2, 5)},
    "head": {"kernel": (5, 3), "bias": (3,)},
}


def stacked_tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        STACKS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


STACK_LAYERS = dm.layers_by_path(stacked_tree(0), ["stem", dm.stacked("blocks"), "head"])


@dataclasses.dataclass(frozen=True)
class ReadyMade:
    """A ready-made optimizer: of all layers, or of the active ones of `layers`."""

    make: Callable[..., Any]
    layers: dm.Layers | None = None

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        return self.make() if self.layers is None else self.make(self.layers)

    def tree(self, seed: int, dtype: Any = jnp.float32) -> Any:
        is_stacked = self.layers is not None and bool(self.layers.stacks)
        make = stacked_tree if is_stacked else functools.partial(random_tree, biases=True)
        return make(seed, dtype=dtype)

    def extra_args(self, depth: Any) -> dict[str, Any]:
        return {} if self.layers is None else {"depth": depth}


def drop_muon(layers):
    return dm.drop_muon(0.1, layers, orthogonalize=KERNEL, weight_decay=0.2)


def drop_scion(layers):
    return dm.drop_scion(schedule, layers, RADII, norms=NORMS)


def drop_gluon(layers):
    return dm.drop_gluon(dm.schedules.gluon_radius(0.1), layers, norms=NORMS)


DROPPING = {
    f"{name}{suffix}": ReadyMade(make, layers)
    for suffix, layers in (("", LAYERS), ("_with_a_stack", STACK_LAYERS))
    for name, make in (
        ("drop_muon", drop_muon),
        ("drop_scion", drop_scion),
        ("drop_gluon", drop_gluon),
    )
}
READY_MADE = {
    "muon": ReadyMade(lambda: dm.muon(0.1, orthogonalize=KERNEL, weight_decay=0.2)),
    "scion": ReadyMade(lambda: dm.scion(schedule, RADII, norms=NORMS)),
    "gluon": ReadyMade(lambda: dm.gluon(dm.schedules.gluon_radius(0.1), norms=NORMS)),
    **DROPPING,
}
FLOATS = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def types(tree: Any) -> Any:
    """Shape, dtype and whether the type is weak, of arrays or of what `jax.eval_shape` gives."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype.name, leaf.weak_type) for leaf in leaves]


@over(FLOATS, "grads_dtype")
@over(FLOATS, "params_dtype")
@over(READY_MADE, "optimizer")
def test_a_ready_made_optimizer_keeps_the_types_of_its_state(optimizer, params_dtype, grads_dtype):
    tx, params, grads = optimizer.tx, optimizer.tree(0, params_dtype), optimizer.tree(1)
    grads = jax.tree.map(lambda leaf: leaf.astype(grads_dtype), grads)
    state = jax.eval_shape(tx.init, params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    for depth in range(1 if optimizer.layers is None else optimizer.layers.num_layers):
        update = functools.partial(tx.update, **optimizer.extra_args(depth))
        updates, new_state = jax.eval_shape(update, grads, state, params)
        assert types(new_state) == types(state)
        assert types(jax.eval_shape(applied, params, updates)) == types(params)

    # A scan is an error unless its carry keeps its types.
    def step(carry, grads):
        updates, state = tx.update(grads, carry[1], carry[0], **optimizer.extra_args(0))
        return (applied(carry[0], updates), state), None

    steps = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), grads)
    jax.eval_shape(lambda *carry: jax.lax.scan(step, carry, steps), params, state)


@over(READY_MADE, "optimizer")
def test_weakly_typed_parameters_get_a_state_of_strong_types_that_stay(optimizer):
    tx, grads = optimizer.tx, optimizer.tree(1)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), grads)
    assert all(leaf.weak_type for leaf in jax.tree.leaves(params))
    state = tx.init(params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    update = functools.partial(tx.update, **optimizer.extra_args(1))
    for given in (grads, params):
        _, new_state = jax.eval_shape(update, given, state, params)
        assert types(new_state) == types(state)


@over(READY_MADE, "optimizer")
def test_a_jitted_step_compiles_once_and_scans_whatever_dtype_the_gradients_have(optimizer):
    tx, params = optimizer.tx, optimizer.tree(0, jnp.bfloat16)  # gradients are float32

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **optimizer.extra_args(1))
        return applied(params, updates), state

    looped = params, tx.init(params)
    all_grads = [optimizer.tree(seed) for seed in (1, 2, 3)]
    for grads in all_grads:
        looped = step(*looped, grads)
    assert step._cache_size() == 1
    scanned, _ = jax.lax.scan(
        lambda carry, grads: (step(*carry, grads), None),
        (params, tx.init(params)),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_grads),
    )
    assert_close(scanned, looped)


def program(update: Callable[..., Any], *args: Any, **static: Any) -> str:
    """What is compiled: two steps with one text have the same bits."""
    return jax.jit(functools.partial(update, **static)).lower(*args).as_text()


@over(DROPPING, "optimizer")
def test_a_depth_says_as_much_as_the_mask_that_is_made_of_it(optimizer):
    tx, layers, params, grads = optimizer.tx, optimizer.layers, optimizer.tree(0), optimizer.tree(1)
    given = grads, tx.init(params), params
    programs = []
    for depth in range(layers.num_layers):
        programs.append(program(tx.update, *given, depth=depth))
        assert programs[-1] == program(tx.update, *given, layer_mask=layers.mask(depth))
    assert len(set(programs)) == layers.num_layers
    by_depth = jax.jit(lambda *given, depth: tx.update(*given, depth=depth))
    by_mask = jax.jit(lambda *given, depth: tx.update(*given, layer_mask=layers.mask(depth)))
    if layers.stacks:
        depth = jnp.int32(2)
    else:
        depth, by_depth, by_mask = 1, by_depth.__wrapped__, by_mask.__wrapped__
    assert_same_bits(by_depth(*given, depth=depth), by_mask(*given, depth=depth))


def test_a_depth_of_the_whole_network_holds_in_a_part_of_it():
    labels = {"stem": "ours", "mid": "others", "head": "ours"}
    others = dm.drop_muon(0.3, LAYERS, orthogonalize=KERNEL)
    tx = dm.chain_subtrees({"ours": drop_muon(LAYERS), "others": others}, labels)
    params, grads = random_tree(0, biases=True), random_tree(1, biases=True)
    state = tx.init(params)
    for depth in DEPTHS:
        by_mask = tx.update(grads, state, params, layer_mask=LAYERS.mask(depth))
        assert_same_bits(tx.update(grads, state, params, depth=depth), by_mask)


@over(DROPPING, "optimizer")
def test_an_update_takes_either_a_mask_or_a_depth(optimizer):
    tx, params = optimizer.tx, optimizer.tree(0)
    state, mask = tx.init(params), optimizer.layers.mask(1)
    with pytest.raises(TypeError, match="takes layer_mask or depth, and got both"):
        tx.update(params, state, params, layer_mask=mask, depth=1)
    with pytest.raises(
        TypeError, match=r"missing .* 'layer_mask'.*layers.mask\(depth\), or depth="
    ):
        tx.update(params, state, params)


@over({name: READY_MADE[name] for name in ("muon", "scion", "gluon")}, "optimizer")
def test_an_optimizer_of_all_layers_takes_neither_a_mask_nor_a_depth(optimizer):
    tx, params = optimizer.tx, optimizer.tree(0)
    for extra_args in ({"depth": 0}, {"layer_mask": LAYERS.mask(0)}):
        with pytest.raises(TypeError, match="takes no layer_mask or depth; use drop_"):
            tx.update(params, tx.init(params), params, **extra_args)


# --- Draws, which no wrapper can lose -------------------------------------------------------------


def multisteps_as_a_transformation(tx: Any) -> optax.GradientTransformationExtraArgs:
    steps = optax.MultiSteps(tx, every_k_schedule=2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def matmul_loss(params: Any, x: jax.Array) -> jax.Array:
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean(x**2)


WRAPPERS = {
    "nothing": (lambda tx: tx, 1),
    "chain": (lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx), 1),
    "chain_subtrees": (lambda tx: dm.chain_subtrees({"all": tx}, lambda params: "all"), 1),
    "multisteps": (multisteps_as_a_transformation, 2),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3), 1),
    "inject_hyperparams": (
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx, optax.scale(scale)))(0.5),
        1,
    ),
}


@over(WRAPPERS, "wrapper")
def test_a_wrapped_optimizer_takes_the_draws_of_the_sampler(wrapper):
    wrap, steps_per_draw = wrapper
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=4, steps_per_draw=steps_per_draw)
    tx = wrap(dm.drop_muon(0.1, LAYERS, orthogonalize=KERNEL))
    params = random_tree(0, biases=True)
    state, step_fn = tx.init(params), dm.train_step(matmul_loss, tx, sampler, donate=False)
    assert step_fn.sampler is sampler
    x, depths = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32), []
    for draw in range(6):
        before = params
        for micro_step in range(steps_per_draw):
            step = draw * steps_per_draw + micro_step
            params, state, _ = step_fn(step, params, state, x)
        moved = [bool((params[n]["kernel"] != before[n]["kernel"]).any()) for n in NAMES]
        depths.append(sampler.depth(step))
        assert moved == [layer >= depths[-1] for layer in DEPTHS]
    assert len(set(depths)) == 3
    plain = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=4)
    assert depths == [plain.depth(step) for step in range(6)]


# --- Masks are validated where they enter ---------------------------------------------------------


def stacked_loss(params: Any, x: jax.Array, depth: Any) -> jax.Array:
    x = jnp.tanh(x @ params["stem"]["kernel"] + params["stem"]["bias"])

    def layer(x, row):
        return jnp.tanh(x @ row["kernel"] + row["bias"]), None

    depth = STACK_LAYERS.stack_depth(depth)
    x, _ = dm.scan_layers(layer, x, params["blocks"], depth=depth)
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"]) ** 2)


def trace_train_step(tx: Any, depth: Any) -> None:
    params = stacked_tree(0)
    sampler = dm.DepthSampler(STACK_LAYERS, dm.uniform_depth(), seed=0)
    step_fn = dm.train_step(stacked_loss, tx, sampler)
    if isinstance(depth, int):
        step_fn.trace_depth(depth, params, tx.init(params), jnp.ones((4, 6)))
    else:  # one program for all of them
        step_fn.compile(params, tx.init(params), jnp.ones((4, 6)))


def trace_hand_written_step(tx: Any, depth: Any) -> None:
    def step(params, state, x, depth):
        mask = STACK_LAYERS.mask(depth)
        loss_and_grad = dm.masked_value_and_grad(stacked_loss)
        loss, grads = loss_and_grad(params, x, depth, layer_mask=mask)
        updates, state = tx.update(grads, state, params, layer_mask=mask)
        return applied(params, updates), state, loss

    params = stacked_tree(0)
    static = {"static_argnums": 3} if isinstance(depth, int) else {}
    jax.jit(step, **static).trace(params, tx.init(params), jnp.ones((4, 6)), depth)


VALIDATED = {
    "drop_muon": lambda: drop_muon(STACK_LAYERS),
    "drop_scion": lambda: drop_scion(STACK_LAYERS),
    "record_gains": lambda: dm.record_gains(
        drop_muon(STACK_LAYERS),
        dm.DepthSampler(STACK_LAYERS, dm.time_aware_depth([4.0, 3.0, 2.0, 1.0]), seed=0),
    ),
    "chain_subtrees": lambda: dm.chain_subtrees(
        {
            "kernel": dm.per_layer(
                optax.chain(dm.momentum(), LMO, optax.scale(-0.1)), STACK_LAYERS, takes_mask=True
            ),
            "bias": dm.per_layer(optax.adam(0.1), STACK_LAYERS),
        },
        {name: {"kernel": "kernel", "bias": "bias"} for name in STACKS},
    ),
}


@over(VALIDATED, "make")
@pytest.mark.parametrize("trace", [trace_train_step, trace_hand_written_step])
@pytest.mark.parametrize("depth", [2, jnp.int32(2)], ids=["static", "traced"])
def test_a_traced_step_validates_its_mask_twice_at_most(depth, trace, make, monkeypatch):
    validated = []

    def with_structure(layer_mask, tree):
        validated.append(jax.tree.structure(tree))
        return original(layer_mask, tree)

    original = trees._with_structure
    monkeypatch.setattr(trees, "_with_structure", with_structure)
    trace(make(), depth)
    assert 1 <= len(validated) <= 2


# --- What counts what -----------------------------------------------------------------------------


def scheduled_run(tx: Any) -> tuple[Any, Any]:
    """The updates and the state of the stem's first step, after two steps of the head alone."""
    params = random_tree(0, biases=True)
    state = tx.init(params)
    for depth in (2, 2):
        _, state = tx.update(random_tree(1, biases=True), state, layer_mask=LAYERS.mask(depth))
    return tx.update(random_tree(2, biases=True), state, layer_mask=LAYERS.mask(0))


def test_a_learning_rate_schedule_counts_all_steps():
    updates, _ = scheduled_run(dm.drop_muon(schedule, LAYERS))
    constant = dm.drop_muon(float(schedule(2)), LAYERS)
    params = random_tree(0, biases=True)
    expected: Any = constant.update(
        random_tree(2, biases=True), constant.init(params), layer_mask=LAYERS.mask(0)
    )
    assert_close(updates["stem"], expected[0]["stem"])


def test_adam_in_per_layer_counts_the_steps_of_its_own_layer():
    updates, state = scheduled_run(dm.drop_muon(schedule, LAYERS))
    counts = [
        int(leaf)
        for path, leaf in leaves_by_path(state).items()
        if layer_of_path(path) is not None and path.endswith(".count")
    ]
    assert counts == [1, 1, 3]
    # The bias correction of a first step makes every entry ±learning rate.
    np.testing.assert_allclose(
        np.abs(np.asarray(updates["stem"]["bias"])), float(schedule(2)), rtol=1e-5
    )


def test_the_sampler_and_the_momentum_count_all_steps():
    sampler = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
    _, state = scheduled_run(optax.chain(dm.momentum(), sampler))
    assert int(optax.tree.get(state, "LayerMaskSamplerState").count) == 3
    assert int(optax.tree.get(state, "MomentumState").count) == 3
    _, state = scheduled_run(dm.drop_muon(0.1, LAYERS))  # the step to resume from
    assert int(optax.tree.get(state, "MomentumState").count) == 3
