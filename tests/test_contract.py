"""One contract that every public transformation passes.

The parameters are three layers of asymmetric, non-square matrices, with biases where the
transformation takes vectors; their names sort from deep to shallow, so alphabetical order is wrong.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import dropmuon_jax as dm
from dropmuon_jax.layers import trees

NAMES = ("stem", "mid", "head")
SHAPES = {
    "stem": {"kernel": (6, 5), "bias": (5,)},
    "mid": {"kernel": (5, 7), "bias": (7,)},
    "head": {"kernel": (7, 3), "bias": (3,)},
}
MATRICES = {name: {"kernel": shapes["kernel"]} for name, shapes in SHAPES.items()}
STACKS = SHAPES | {"mid": {"kernel": (2, 5, 5), "bias": (2, 5)}, "head": {"kernel": (5, 3)}}
# A suffix, which is a depth, and two sets that are none.
SUBSETS = {
    "mid_and_head": (False, True, True),
    "mid_only": (False, True, False),
    "stem_and_head": (True, False, True),
}
ALL, NOTHING = (True, True, True), (False, False, False)


def random_tree(seed: int, shapes: Any = SHAPES, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


LAYERS, MATRIX_LAYERS = (dm.layers_by_path(random_tree(0, of), NAMES) for of in (SHAPES, MATRICES))
STACK_LAYERS = dm.layers_by_path(random_tree(0, STACKS), ["stem", dm.stacked("mid"), "head"])
SHAPES_OF = {LAYERS: SHAPES, MATRIX_LAYERS: MATRICES, STACK_LAYERS: STACKS}
# Two steps of the iteration instead of five: the contract does not ask for accuracy.
KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
LMO = dm.newton_schulz_lmo(0.3, shape_factor="muon", num_steps=2)
RADII = {"hidden": 0.3, "head": 2.0, "bias": 0.5}  # of Scion and Gluon
NORMS = {"hidden": dm.norms.spectral_norm("scion", orthogonalize=KERNEL)}
ADAPTIVE = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=1)


def schedule(count):
    return 0.1 / (1.0 + count)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A public transformation, and what the contract must know of it."""

    make: Callable[[], optax.GradientTransformation]
    layers: dm.Layers = LAYERS
    takes_mask: bool = True
    requires_mask: bool = False
    has_memory: bool = True  # state for each leaf, not only a count
    promotes: bool = False  # a part from Optax gives float32 for bfloat16 gradients
    descends: bool = False  # its updates are steps; otherwise they have the gradient's sign
    keeps_minus_zero: bool = True  # of parameters that are frozen
    extra_args: tuple[str, ...] = ()  # what `update` needs besides a mask

    @property
    def tx(self) -> Any:
        return optax.with_extra_args_support(self.make())

    @property
    def optimizer(self) -> Any:
        """The transformation with a learning rate behind it, if it has none."""
        if self.descends:
            return self.tx
        return optax.chain(self.tx, optax.scale_by_learning_rate(0.1))

    def tree(self, seed: int, dtype: Any = jnp.float32) -> Any:
        return random_tree(seed, SHAPES_OF[self.layers], dtype)

    def mask(self, active: tuple[bool, ...]) -> dict[str, Any]:
        """The extra arguments of a step in which these layers are active; no mask for Muon."""
        mask = {"layer_mask": self.layers.subset(active)} if self.takes_mask else {}
        return mask | {name: self.tree(20) for name in self.extra_args}


CASES = {
    "momentum": Case(lambda: dm.momentum(0.8)),
    "momentum_of_every_kind": Case(
        lambda: dm.momentum(dm.schedules.gluon_decay(), nesterov=True, dtype=jnp.bfloat16)
    ),
    "corrected_momentum": Case(
        lambda: dm.momentum(0.8, nesterov=True, bias_correction=True, dtype=jnp.bfloat16)
    ),
    "mvr_momentum": Case(
        lambda: dm.mvr_momentum(0.8, variant=3), extra_args=("prev_params_grads",)
    ),
    "mars_momentum": Case(lambda: dm.transforms.mars_momentum(0.8)),
    "keep_prev_params": Case(dm.transforms.keep_prev_params),
    "newton_schulz_lmo": Case(lambda: LMO, layers=MATRIX_LAYERS, has_memory=False),
    "norm_sharp": Case(
        lambda: dm.transforms.norm_sharp(dm.norms.spectral_norm(orthogonalize=KERNEL), 0.3),
        layers=MATRIX_LAYERS,
        has_memory=False,
    ),
    "norm_lmo": Case(
        lambda: dm.norm_lmo(
            dm.norms.rms_norm(),
            {"stem": dm.schedules.adaptive_radius(2.0, 0.5), "mid": 0.3, "head": schedule},
        ),
        has_memory=False,
    ),
    "layer_mask_sampler": Case(
        lambda: dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=1),
        requires_mask=True,
        has_memory=False,
        keeps_minus_zero=False,  # with a negative learning rate behind it
    ),
    "per_layer": Case(
        lambda: dm.per_layer(optax.adamw(0.1, weight_decay=0.2), LAYERS),
        promotes=True,
        descends=True,
        keeps_minus_zero=False,  # with its learning rate inside
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
    "ef21": Case(lambda: dm.compression.ef21(dm.compression.Damping(0.5), momentum=0.8, axis=None)),
    "drop_muon": Case(
        lambda: drop_muon(LAYERS, momentum=dm.momentum(0.8, nesterov=True)),
        requires_mask=True,
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
        lambda: dm.drop_scion(0.1, LAYERS, RADII, norms=NORMS),
        requires_mask=True,
        promotes=True,
        descends=True,
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
REMEMBERING = {name: case for name, case in MASKED.items() if case.has_memory}


def over(cases: dict[str, Any], argument: str = "case"):
    return pytest.mark.parametrize(
        argument, [pytest.param(value, id=name) for name, value in cases.items()]
    )


def leaves_by_path(tree: Any) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def stacked(*runs: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


def pairs(actual: Any, expected: Any) -> Any:
    """The leaves of two trees of one structure and the same dtypes, with their paths."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        leaves_by_path(actual).items(), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.dtype == other.dtype, path
        yield path, np.asarray(leaf), np.asarray(other)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for path, leaf, other in pairs(actual, expected):
        assert leaf.tobytes() == other.tobytes(), path


def assert_close(actual: Any, expected: Any) -> None:
    # Measured between programs of the same mathematics: at most 2e-6 of entries of order one.
    for path, leaf, other in pairs(actual, expected):
        rtol = 2e-2 if leaf.dtype == jnp.bfloat16 else 1e-4
        leaf, other = leaf.astype(np.float64), other.astype(np.float64)
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=1e-5, err_msg=path)


def layer_of_path(path: str) -> int | None:
    """The layer that a leaf of a state belongs to; none for the counts of all layers."""
    if found := re.search(r"\.inner_states\[(\d+)\]", path):
        return int(found[1])
    path = re.sub(r"\.inner_states\['\w+'\]", "", path)  # Scion's role "head" is no layer's name
    return next((i for i, name in enumerate(NAMES) if f"['{name}']" in path), None)


def of_layers(tree: Any, active: tuple[bool, ...], flag: bool) -> dict[str, jax.Array]:
    """The leaves of a tree that belong to the layers whose entry in `active` is `flag`."""
    places = {path: layer_of_path(path) for path in leaves_by_path(tree)}
    found = {path for path, x in places.items() if x is not None and active[x] is flag}
    return {path: leaf for path, leaf in leaves_by_path(tree).items() if path in found}


@functools.cache
def warm(case: Case) -> tuple[Any, Any, Any]:
    """The optimizer after two full steps, so that no momentum is zero; the parameters have -0.0."""
    tx, params = case.optimizer, case.tree(0)
    state = tx.init(params)
    for seed in (1, 2):
        updates, state = tx.update(case.tree(seed), state, params, **case.mask(ALL))
        params = optax.apply_updates(params, updates)
    return tx, jax.tree.map(lambda leaf: leaf.at[0].set(-0.0), params), state


@functools.cache
def step_of(case: Case, active: tuple[bool, ...]) -> tuple[Any, Any]:
    """Updates and state of a step from there. The gradients of inactive layers are NaN."""
    tx, params, state = warm(case)
    grads = jax.tree.map(
        lambda on, g: g if on else jnp.full_like(g, np.nan),
        case.layers.subset(active),
        case.tree(3),
    )
    return tx.update(grads, state, params, **case.mask(active))


# --- Inactive layers ------------------------------------------------------------------------------


@over(SUBSETS, "active")
@over(MASKED)
def test_an_inactive_layer_does_not_move_whatever_its_gradient(case, active):
    _, params, _ = warm(case)
    updates, _ = step_of(case, active)
    frozen = of_layers(updates, active, False)
    assert frozen
    assert all(not leaf.any() for leaf in frozen.values())
    moved, expected = optax.apply_updates(params, updates), params
    if not case.keeps_minus_zero:  # -0.0 + 0.0 is +0.0
        moved, expected = jax.tree.map(jnp.abs, (moved, expected))
    assert_same_bits(of_layers(moved, active, False), of_layers(expected, active, False))


@over(SUBSETS, "active")
@over(MASKED)
def test_an_active_layer_moves_as_in_a_full_step(case, active):
    partial, full = (of_layers(step_of(case, of), active, True) for of in (active, ALL))
    assert_same_bits(partial, full)
    assert all(leaf.any() for leaf in of_layers(step_of(case, active)[0], active, True).values())


@over(SUBSETS, "active")
@over(REMEMBERING)
def test_an_inactive_layer_keeps_every_bit_of_its_state(case, active):
    _, _, state = warm(case)
    before = of_layers(state, active, False)
    assert before
    assert all(leaf.any() for leaf in before.values())
    assert_same_bits(of_layers(step_of(case, active)[1], active, False), before)


@over(MASKED)
def test_with_nothing_active_only_the_counts_of_all_steps_change(case):
    _, _, state = warm(case)
    updates, new_state = step_of(case, NOTHING)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    before, after = map(leaves_by_path, (state, new_state))
    changed = {path for path, x in after.items() if not np.array_equal(x, before[path])}
    scalars = {path: x for path, x in before.items() if x.ndim == 0 and layer_of_path(path) is None}
    counts = {path for path, x in scalars.items() if np.issubdtype(x.dtype, np.integer)}
    assert changed == counts


# --- Compiled -------------------------------------------------------------------------------------


@over(CASES)
def test_scanned_steps_of_several_runs_with_donated_buffers_are_those_of_a_loop(case):
    active = SUBSETS["stem_and_head"]
    tx, params, state = warm(case)
    grads = [[case.tree(10 * run + k) for k in (3, 4)] for run in (0, 1)]
    starts = [(params, state), (jax.tree.map(lambda leaf: leaf / 2, params), state)]

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **case.mask(active))
        return (optax.apply_updates(params, updates), state), None

    scan = jax.vmap(functools.partial(jax.lax.scan, step))
    donated = stacked(*starts)
    ends, _ = jax.jit(scan, donate_argnums=0)(donated, stacked(*(stacked(*of) for of in grads)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    for run, (start, of_run) in enumerate(zip(starts, grads, strict=True)):
        end = jax.tree.map(lambda leaf, run=run: leaf[run], ends)
        looped = start
        for g in of_run:
            looped, _ = step(looped, g)
        assert_close(end, looped)
        if case.takes_mask:
            assert_same_bits(*(of_layers(of[1], active, False) for of in (end, start)))
        if case.takes_mask and case.keeps_minus_zero:
            assert_same_bits(end[0]["mid"], start[0]["mid"])


@over(CASES)
def test_parameters_and_state_share_no_buffer_so_that_both_can_be_donated(case):
    tx, params, _ = warm(case)
    for state in (tx.init(params), step_of(case, ALL)[1]):
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
        assert len(set(buffers)) == len(buffers)


# --- Wrappers of Optax ----------------------------------------------------------------------------


@over(CASES)
def test_micro_batches_make_a_step_of_their_mean_unless_one_is_not_finite(case):
    active = SUBSETS["stem_and_head"]
    tx, params, state = warm(case)
    multi = optax.MultiSteps(optax.apply_if_finite(tx, 3), every_k_schedule=2)
    update = jax.jit(functools.partial(multi.update, **case.mask(active)))
    start: Any = multi.init(params)
    start = start._replace(inner_opt_state=start.inner_opt_state._replace(inner_state=state))
    first, second = case.tree(3), case.tree(4)

    def assert_unchanged(updates, multi_state):
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        assert_same_bits(multi_state.inner_opt_state.inner_state, state)

    updates, half = update(first, start, params)
    assert_unchanged(updates, half)

    updates, end = update(second, half, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, expected_state = tx.update(mean, state, params, **case.mask(active))
    new_state = end.inner_opt_state.inner_state
    assert_close(updates, expected)
    assert_close(new_state, expected_state)
    if case.takes_mask:
        assert_same_bits(*(of_layers(of, active, False) for of in (new_state, state)))
        assert not any(leaf.any() for leaf in of_layers(updates, active, False).values())

    bad = second | {"head": jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), second["head"])}
    assert_unchanged(*update(bad, half, params))


@over(CASES)
def test_partition_hands_over_a_part_of_the_tree_and_of_the_mask(case):
    tx, params, grads = case.tx, case.tree(0), case.tree(1)
    labels = {
        name: dict.fromkeys(params[name], "sgd" if name == "mid" else "ours") for name in NAMES
    }
    parted: Any = optax.partition(
        {"ours": tx, "sgd": optax.sgd(0.5)}, labels, mask_compatible_extra_args=True
    )
    mask = case.mask(SUBSETS["mid_and_head"])
    updates, _ = parted.update(grads, parted.init(params), params, **mask)
    alone, _ = tx.update(grads, tx.init(params), params, **mask)
    assert_close(updates | {"mid": alone["mid"]}, alone)
    assert_close(updates["mid"], jax.tree.map(lambda g: -0.5 * g, grads["mid"]))


# Each case has the arguments that are static: a dtype and a kernel are callable, and Optax takes
# callables for schedules.
INJECTED = {
    "momentum": (dm.momentum, {"decay": 0.8, "dtype": jnp.bfloat16}, "dtype"),
    "mvr_momentum": (dm.mvr_momentum, {"decay": schedule, "variant": 2, "q": 0.3}, "variant"),
    "mars_momentum": (dm.transforms.mars_momentum, {"decay": 0.8, "gamma": 0.1}),
    "newton_schulz_lmo": (
        dm.newton_schulz_lmo,
        {"radius": 0.3, "coefficients": ((2.0, -1.5, 0.5),)},
    ),
    "drop_muon": (
        dm.drop_muon,
        {
            "learning_rate": schedule,
            "layers": LAYERS,
            "momentum": 0.8,
            "weight_decay": schedule,
            "orthogonalize": KERNEL,
            "roles": {"mid/kernel": "embedding"},
        },
        "orthogonalize",
        "roles",
    ),
    "drop_scion": (
        dm.drop_scion,
        {"learning_rate": schedule, "layers": LAYERS, "radii": RADII, "norms": NORMS},
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_equal_plain_ones(name):
    case, (factory, arguments, *static) = CASES[name], INJECTED[name]
    plain = optax.with_extra_args_support(factory(**arguments))
    dynamic = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    params, mask = case.tree(0), case.mask(SUBSETS["mid_and_head"])
    plain_state, dynamic_state = plain.init(params), dynamic.init(params)
    jax.eval_shape(functools.partial(dynamic.update, **mask), params, dynamic_state, params)
    for seed in (1, 2):
        grads = case.tree(seed)
        expected, plain_state = plain.update(grads, plain_state, params, **mask)
        updates, dynamic_state = dynamic.update(grads, dynamic_state, params, **mask)
        assert_close(updates, expected)


# inject_hyperparams gives a number the dtype of the parameters.
@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("name", ["momentum", "newton_schulz_lmo"])
def test_injected_hyperparameters_work_for_bfloat16_parameters(name):
    factory, arguments, *static = INJECTED[name]
    params = CASES[name].tree(0, jnp.bfloat16)
    tx = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert types(updates) == types(params)


# Arrays of a state with an entry for each leaf, layer or depth.
NO_PARAMETERS = (
    *(".last_step", ".started", ".weight_of_zero"),
    *(".gains", ".num_active_steps", ".probabilities", ".next_probabilities"),
    *(".layer_costs", ".settings", ".plans"),
)


@over(CASES)
def test_map_params_reaches_exactly_the_state_of_the_parameters(case):
    tx, _, state = warm(case)
    mapped = optax.tree.map_params(tx, lambda leaf: jnp.full_like(leaf, 7), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for path, leaf in leaves_by_path(mapped).items():
        if leaf.ndim and not path.endswith(NO_PARAMETERS):
            assert (leaf == 7).all(), path
        else:
            assert_same_bits(leaf, leaves_by_path(state)[path])


def test_a_checkpoint_brings_back_every_bit_of_every_state(tmp_path):
    saved = {name: warm(case)[1:] for name, case in CASES.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved
        )
        restored = checkpointer.restore(tmp_path / "step", abstract)
    assert_same_bits(restored, saved)


# --- Extra arguments ------------------------------------------------------------------------------


@over(CASES)
def test_a_misspelt_extra_argument_is_an_error_that_names_the_right_one(case):
    tx, params = case.tx, case.tree(0)
    state = tx.init(params)
    for misspelt in ("layer_masks", "layermask", "LayerMask"):
        with pytest.raises(TypeError, match=f"{misspelt}.*Did you mean 'layer_mask'"):
            tx.update(params, state, params, **{misspelt: case.layers.mask(0)})


def link_with_an_argument_called_mask() -> optax.GradientTransformationExtraArgs:
    """Another library's link of a chain, which multiplies by a tree of its own."""

    def update_fn(updates, state, params=None, *, mask, **extra_args):
        return jax.tree.map(jnp.multiply, mask, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


@over(CASES)
def test_extra_arguments_of_other_links_pass_also_one_called_mask(case):
    tx, params, state = warm(case)
    chained, grads = optax.chain(tx, link_with_an_argument_called_mask()), case.tree(3)
    keep = jax.tree.map(lambda leaf: jnp.asarray(leaf > 0, leaf.dtype), case.tree(5))
    extra_args = case.mask(ALL) | {
        "mask": keep,
        "value": jnp.array(1.0),
        "grad": grads,
        "layers": 3,
    }
    updates, _ = chained.update(grads, (state, optax.EmptyState()), params, **extra_args)
    assert_same_bits(updates, jax.tree.map(jnp.multiply, keep, step_of(case, ALL)[0]))


@over({name: case for name, case in MASKED.items() if not case.requires_mask})
def test_without_a_mask_every_layer_is_active(case):
    tx, params, state = warm(case)
    extra_args = {name: case.tree(20) for name in case.extra_args}
    assert_same_bits(tx.update(case.tree(3), state, params, **extra_args), step_of(case, ALL))


def test_per_layer_cuts_tree_shaped_extra_arguments_to_the_layer():
    def update_fn(updates, state, params=None, *, factor, scales, **extra_args):
        return jax.tree.map(lambda u, s: factor * s * u, updates, scales), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    params, scales, mask = random_tree(0), random_tree(1), LAYERS.mask(1)
    tx = dm.per_layer(scaled, LAYERS)
    updates, _ = tx.update(params, tx.init(params), layer_mask=mask, scales=scales, factor=2.0)
    for name, on in zip(NAMES, (0.0, 1.0, 1.0), strict=True):
        expected = jax.tree.map(lambda u, s, on=on: on * 2.0 * s * u, params[name], scales[name])
        assert_close(updates[name], expected)


CONTAINERS = {
    "dict": dict,
    "frozen": flax.core.freeze,
    "state": nnx.State,
    "default": lambda tree: collections.defaultdict(dict, tree),
    "list": lambda tree: [*tree.values()],
    "dataclass": lambda tree: chex.dataclass(dataclasses.make_dataclass("P", tree))(**tree),
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_a_state_by_layer_has_few_nodes_for_each_parameter(contain):
    """Each call of a program takes it apart and puts it together: not the square of the layers."""

    def nodes_of_a_parameter(num_layers):
        params = contain(
            {f"b{i:02}": {k: jnp.ones(3) for k in "abcdef"} for i in range(num_layers)}
        )
        names = [f"b{i:02}" for i in range(num_layers)]
        names = [*map(str, range(num_layers))] if isinstance(params, list) else names
        layers = dm.layers_by_path(params, names)
        # Inside there are all leaves, for what is given as a tree for all.
        decay = optax.add_decayed_weights(0.1, jax.tree.map(lambda _: True, params))
        tx = dm.per_layer(optax.chain(optax.scale_by_adam(), decay), layers)
        state = tx.init(params)
        updates, after = tx.update(params, state, params, layer_mask=layers.mask(1))
        assert types(after) == types(state)
        assert types(updates) == types(params)
        return jax.tree.structure(state).num_nodes / jax.tree.structure(params).num_leaves

    few, many = nodes_of_a_parameter(4), nodes_of_a_parameter(40)
    assert many < (1.1 if contain in (dict, flax.core.freeze, nnx.State) else 4) * few


# --- Shapes, dtypes, structure --------------------------------------------------------------------


def types(tree: Any, *, weak: bool = True) -> Any:
    """Shape, dtype and whether the type is weak, of arrays or of what `jax.eval_shape` gives."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype.name, weak and leaf.weak_type) for leaf in leaves]


DTYPES = {
    "bf16_gradients": (jnp.float32, jnp.bfloat16),
    "bf16_parameters": (jnp.bfloat16, jnp.float32),
}


@over(DTYPES, "dtypes")
@over(CASES)
def test_updates_have_the_types_of_the_gradients_and_the_state_keeps_its_own(case, dtypes):
    tx, params, grads = case.tx, case.tree(0, dtypes[0]), case.tree(1, dtypes[1])
    state = tx.init(params)
    expected = None if case.promotes and dtypes[0] != dtypes[1] else types(grads, weak=False)
    for active in (ALL, SUBSETS["stem_and_head"], NOTHING):
        update = functools.partial(tx.update, **case.mask(active))
        updates, new_state = jax.eval_shape(update, grads, state, params)
        found = types(updates, weak=False)
        expected = found if expected is None else expected  # the same for every mask at least
        assert found == expected
        assert [shape for shape, *_ in found[1]] == [leaf.shape for leaf in jax.tree.leaves(grads)]
        assert types(new_state, weak=False) == types(state, weak=False)


@pytest.mark.parametrize("pattern", ["blocks", dm.stacked("blocks")])
def test_per_layer_keeps_the_dtypes_of_a_state_that_its_inner_would_change(pattern):
    params = {"blocks": jnp.ones((3, 2))}
    inner = optax.GradientTransformation(
        lambda params: jnp.float32(0),
        lambda updates, state, params=None: (updates, (state + 1).astype(jnp.bfloat16)),
    )
    tx = dm.per_layer(inner, dm.layers_by_path(params, [pattern]))
    state = tx.init(params)
    _, new_state = tx.update(params, state)
    assert types(new_state) == types(state)
    assert (np.asarray(new_state.inner_states[0]) == 1).all()


# --- Ready-made optimizers ------------------------------------------------------------------------


def drop_muon(layers, learning_rate=0.1, **options):
    return dm.drop_muon(learning_rate, layers, orthogonalize=KERNEL, weight_decay=0.2, **options)


def drop_scion(layers):
    return dm.drop_scion(schedule, layers, RADII, norms=NORMS)


DROPPING = {
    "drop_muon": CASES["drop_muon"],
    "drop_gluon": Case(lambda: dm.drop_gluon(dm.schedules.gluon_radius(0.1), LAYERS, norms=NORMS)),
    "drop_muon_with_a_stack": Case(lambda: drop_muon(STACK_LAYERS), STACK_LAYERS),
    "drop_scion_with_a_stack": Case(lambda: drop_scion(STACK_LAYERS), STACK_LAYERS),
}
READY_MADE = {
    "muon": CASES["muon"],
    "scion": Case(lambda: dm.scion(schedule, RADII, norms=NORMS), takes_mask=False),
    **DROPPING,
}
# What holds its parts to the types of their states: Optax's own promote.
HOLDING = {
    "chain_subtrees": Case(
        lambda: dm.chain_subtrees({"x": optax.adamw(0.1)}, "x"), takes_mask=False
    ),
    "on_mesh": Case(lambda: dm.on_mesh(optax.adam(0.1)), takes_mask=False),
    "record_gains": Case(
        lambda: dm.record_gains(optax.chain(optax.adam(0.1), optax.ema(0.9)), ADAPTIVE),
        takes_mask=False,
    ),
    "all_of_them": Case(
        lambda: dm.on_mesh(dm.chain_subtrees({"x": dm.on_mesh(optax.lion(0.1))}, "x")),
        takes_mask=False,
    ),
}
FLOATS = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
PAIRS = {f"{p}_{g}": (FLOATS[p], FLOATS[g]) for p in FLOATS for g in FLOATS}


def assert_a_step_keeps_types(case: Case, params: Any, grads: Any) -> None:
    """So a jitted step compiles once, and a scan can carry parameters and state."""
    tx, state = case.tx, case.tx.init(params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    for depth in range(case.layers.num_layers):
        update = functools.partial(tx.update, **({"depth": depth} if case.takes_mask else {}))
        updates, new_state = jax.eval_shape(update, grads, state, params)
        assert types(new_state) == types(state)
        new_params = jax.eval_shape(optax.apply_updates, params, updates)
        assert types(new_params, weak=False) == types(params, weak=False)


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param(pair, id=name, marks=[] if name == "bf16_f32" else pytest.mark.deep)
        for name, pair in PAIRS.items()
    ],
)
@over(READY_MADE | HOLDING)
def test_a_step_keeps_all_types_of_parameters_and_state(case, dtypes):
    assert_a_step_keeps_types(case, *(case.tree(i, dtype) for i, dtype in enumerate(dtypes)))


@over(READY_MADE | HOLDING)
def test_weakly_typed_parameters_get_a_state_of_strong_types_that_stay(case):
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), case.tree(0))
    assert all(leaf.weak_type for leaf in jax.tree.leaves(params))
    assert_a_step_keeps_types(case, params, params)


@over(DROPPING)
def test_a_depth_says_as_much_as_the_mask_that_is_made_of_it(case):
    tx, layers, params = case.tx, case.layers, case.tree(0)
    given = case.tree(1), tx.init(params), params

    def program(**static: Any) -> str:
        """What is run: two steps with one text have the same bits."""
        return str(jax.make_jaxpr(functools.partial(tx.update, **static))(*given))

    programs = []
    for depth in range(layers.num_layers):
        programs.append(program(depth=depth))
        assert programs[-1] == program(layer_mask=layers.mask(depth))
    assert len(set(programs)) == layers.num_layers
    if layers.stacks:
        depth = jnp.int32(2)
        by_depth = tx.update(*given, depth=depth)
        assert_same_bits(by_depth, tx.update(*given, layer_mask=layers.mask(depth)))


def test_a_depth_of_the_whole_network_holds_in_a_part_of_it():
    labels = {"stem": "ours", "mid": "others", "head": "ours"}
    others = dm.drop_muon(0.3, LAYERS, orthogonalize=KERNEL)
    tx = dm.chain_subtrees({"ours": drop_muon(LAYERS), "others": others}, labels)
    params, grads = random_tree(0), random_tree(1)
    state = tx.init(params)
    for depth in range(3):
        by_mask = tx.update(grads, state, params, layer_mask=LAYERS.mask(depth))
        assert_same_bits(tx.update(grads, state, params, depth=depth), by_mask)


# --- Masks are validated where they enter ---------------------------------------------------------

ADAPTIVE_OF_STACK = dm.DepthSampler(STACK_LAYERS, dm.time_aware_depth([4.0, 3.0, 2.0, 1.0]), seed=0)
TRACED = {
    "drop_muon": drop_muon(STACK_LAYERS),
    "drop_scion": drop_scion(STACK_LAYERS),
    "record_gains": dm.record_gains(drop_muon(STACK_LAYERS), ADAPTIVE_OF_STACK),
    "chain_subtrees": dm.chain_subtrees(
        {"all": dm.per_layer(optax.adam(1.0), STACK_LAYERS)}, "all"
    ),
}


@over(TRACED, "tx")
def test_a_traced_step_validates_its_mask_twice_at_most(tx, monkeypatch):
    def sum_of_squares(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def step(params, state, depth):
        mask = STACK_LAYERS.mask(depth)
        _, grads = dm.masked_value_and_grad(sum_of_squares)(params, layer_mask=mask)
        return tx.update(grads, state, params, layer_mask=mask)

    def with_structure(layer_mask, tree):
        validated.append(jax.tree.structure(tree))
        return original(layer_mask, tree)

    validated, original = [], trees._with_structure
    monkeypatch.setattr(trees, "_with_structure", with_structure)
    params = random_tree(0, STACKS)
    jax.eval_shape(step, params, tx.init(params), jnp.int32(2))
    assert 1 <= len(validated) <= 2


# --- What counts what -----------------------------------------------------------------------------


def test_schedules_momentum_and_sampler_count_all_steps_and_adam_those_of_its_layer():
    params = random_tree(0)

    def first_step_of_the_stem(tx, *masks_before):
        state = tx.init(params)
        for mask in masks_before:
            _, state = tx.update(random_tree(1), state, params, layer_mask=mask)
        return tx.update(random_tree(2), state, params, layer_mask=LAYERS.mask(0))

    def optimizer(rate, auxiliary_rate):
        return drop_muon(LAYERS, learning_rate=rate, auxiliary_learning_rate=auxiliary_rate)

    sampler = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
    scheduled = optax.chain(optimizer(schedule, lambda count: 2 * schedule(count)), sampler)
    updates, state = first_step_of_the_stem(scheduled, *[LAYERS.mask(2)] * 2)
    third_rate = float(schedule(2))
    expected, _ = first_step_of_the_stem(optimizer(third_rate, 2 * third_rate))
    assert_close(updates["stem"], expected["stem"])
    # The bias correction of a first step makes every entry ± its rate, and biases do not decay.
    step = np.abs(np.asarray(updates["stem"]["bias"]))
    np.testing.assert_allclose(step, 2 * third_rate, rtol=1e-5)
    for name in ("LayerMaskSamplerState", "MomentumState"):  # the step to resume from
        assert int(optax.tree.get(state, name).count) == 3
    counts = [
        int(leaf)
        for path, leaf in leaves_by_path(state).items()
        if layer_of_path(path) is not None and path.endswith(".count")
    ]
    assert counts == [1, 1, 3]
