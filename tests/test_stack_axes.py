"""Layers that are stacked along any axis step as they do along the first."""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

import dropmuon_jax as dm
from meshes import COMPILED_STEPS, graded, normal
from test_stacked_layers import KERNEL, OPTIMIZERS, RADII, block

X = normal((8, 2))


def make_params(num_rows: int, width: int, hidden: int) -> Any:
    """Parameters with layers along the first axis, whose sizes may agree by chance."""
    up, down = (num_rows, width, hidden), (num_rows, hidden, width)
    blocks = {"kernel": up, "out": down, "bias": (num_rows, hidden)}
    params = normal({"embed": (2, width), "blocks": blocks, "head": (width, 2)})
    return jax.tree.map(jnp.asarray, params)


def along(axis: int, tree: Any, params: Any) -> Any:
    """The tree with another axis of layers in all that has path and shape of a leaf of blocks."""
    blocks = tree_leaves_with_path({"blocks": params["blocks"]})

    def move(path: Any, x: Any) -> Any:
        is_like = (keystr(path).endswith(keystr(of)) and x.shape == y.shape for of, y in blocks)
        return jnp.moveaxis(x, 0, axis) if any(is_like) else x

    return tree_map_with_path(move, tree)


def layers_along(axis: int, params: Any) -> dm.Layers:
    patterns = ["embed", dm.stacked("blocks", axis=axis), "head"]
    return dm.layers_by_path(along(axis, params, params), patterns)


def loss_of(layers: dm.Layers, axis: int, params: Any, depth: Any) -> Any:
    rows = layers.stack_depth(depth)
    start = X @ params["embed"]
    x, _ = dm.scan_layers(block, start, params["blocks"], depth=rows, axis=axis)
    return jnp.mean((x @ params["head"] - 1) ** 2)


def chain_in_per_layer(layers: dm.Layers) -> Any:
    """Momenta beside a state of no parameter's path, in which each layer is clipped by itself."""
    link = optax.chain(dm.transforms.mars_momentum(0.9), dm.newton_schulz_lmo(num_steps=1))
    subtrees = dm.chain_subtrees({"matrix": link, "other": dm.momentum(0.9)}, dm.matrix_labels)
    clip = optax.clip_by_global_norm(0.1)
    return dm.per_layer(optax.chain(clip, subtrees, optax.scale(-0.1)), layers, takes_mask=True)


MORE: dict[str, Any] = {
    "drop_gluon": lambda of: dm.drop_gluon(0.1, of, norms={"hidden": dm.norms.sign_norm()}),
    "a chain in per_layer": chain_in_per_layer,
    "adamw in per_layer": lambda of: dm.per_layer(optax.adamw(0.1), of),
    "adam": lambda of: optax.adam(0.1),
    "subsets": OPTIMIZERS["drop_muon"],
    "record_gains": OPTIMIZERS["drop_muon"],
    "accumulate": OPTIMIZERS["drop_scion"],
}
# Rows, width and hidden width; seeds and depths differ with them.
RUNS = {
    f"{name}, {axis}": (name, axis, sizes)
    for name, axis, sizes in zip(
        [*OPTIMIZERS, *MORE],
        (1, -1) * 5,
        ((3, 4, 6), (3, 3, 3), (2, 5, 2), (4, 3, 4), (2, 2, 5)) * 2,
        strict=True,
    )
}


def optimizer_and_sampler(name: str, layers: dm.Layers) -> tuple[Any, dm.DepthSampler]:
    tx, distribution = (OPTIMIZERS | MORE)[name](layers), dm.uniform_depth()
    if name == "subsets":
        distribution = dm.sampling.fixed_size_subsets(2)
    if name == "record_gains":
        distribution = dm.time_aware_depth([*np.arange(layers.num_layers, 0.0, -1.0).tolist()])
    micro_batches = 2 if name == "accumulate" else 1
    sampler = dm.DepthSampler(layers, distribution, seed=4, steps_per_draw=micro_batches)
    wrap = {"record_gains": dm.record_gains, "accumulate": dm.accumulate}.get(name)
    return wrap(tx, sampler) if wrap else tx, sampler


@pytest.mark.parametrize(
    ("name", "axis", "sizes"), graded(RUNS, "drop_muon_with_mvr, -1", "record_gains, 1")
)
def test_a_run_has_the_parameters_states_and_gains_of_the_first_axis(name, axis, sizes):
    front = make_params(*sizes)

    def run(axis: int) -> Any:
        layers = layers_along(axis, front)
        tx, sampler = optimizer_and_sampler(name, layers)
        loss = functools.partial(loss_of, layers, axis)
        step_fn = dm.train_step(loss, tx, sampler, donate=False)
        params = along(axis, front, front)
        state, losses, before = tx.init(params), [], len(COMPILED_STEPS)
        for step in range(6):
            params, state, value = step_fn(step, params, state)
            losses.append(value)
        assert len(COMPILED_STEPS) - before == 1
        return params, state, losses

    result, expected = run(axis), along(axis, run(0), front)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


def test_no_stack_is_transposed_and_no_turn_of_the_loop_copies_one():
    params = {"blocks": {"kernel": jnp.ones((8, 7, 9)), "bias": jnp.ones((9, 7))}}
    layers = dm.layers_by_path(params, [dm.stacked("blocks", axis=1)])
    tx = dm.drop_muon(0.1, layers, orthogonalize=KERNEL)

    def update(state: Any, depth: Any) -> Any:
        return tx.update(params, state, params, layer_mask=layers.mask(depth))

    lowered = jax.jit(update, donate_argnums=0).lower(tx.init(params), jnp.int32(0))
    bodies = lowered.compile().as_text().split("\n}\n")
    loops = [part for part in bodies if "dynamic-update-slice" in part and "ENTRY" not in part]
    assert loops
    assert not any("f32[8,7,9]{2,1,0} copy(" in part for part in loops)
    transposed = [line for line in lowered.as_text().splitlines() if "transpose" in line]
    assert not any("8x7x9" in line or "7x8x9" in line for line in transposed)


# --- Any tree, axis and mask ----------------------------------------------------------------------


@st.composite
def stacks(draw: Any) -> tuple[Any, Any, int]:
    """A stack along its first axis, an axis that all of its leaves can have, and active layers."""
    axis, num_rows = draw(st.integers(-3, 2)), draw(st.integers(1, 4))
    least = axis if axis >= 0 else -axis - 1
    shapes = st.lists(st.integers(1, 4), min_size=least, max_size=3)
    rows = draw(st.lists(shapes, min_size=1, max_size=3))
    tree = {f"w{i}": (num_rows, *row) for i, row in enumerate(rows)}
    active = draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows))
    return normal(tree), active, axis


@settings(max_examples=20, deadline=None)
@given(stacks(), st.booleans())
def test_active_rows_step_and_inactive_ones_keep_every_bit(drawn, is_traced):
    front, active, axis = drawn
    tree = jax.tree.map(lambda x: np.moveaxis(x, 0, axis), front)
    layers, first = (
        dm.layers_by_path(of, [dm.stacked("*", axis=to)]) for of, to in ((tree, axis), (front, 0))
    )
    assert f"is {len(active)} layers along axis {axis} of" in str(layers)
    assert layers.row_shapes(tree) == first.row_shapes(front)
    tx = dm.per_layer(optax.trace(0.9), layers)

    @jax.jit
    def two_steps(tree: Any, flags: Any) -> Any:
        state = tx.update(tree, tx.init(tree))[1]
        mask = layers.subset(flags if is_traced else active)
        return tx.update(jax.tree.map(jnp.sin, tree), state, layer_mask=mask)

    updates, new = two_steps(tree, np.array(active))
    for leaves in zip(*map(jax.tree.leaves, (tree, new, updates)), strict=True):
        rows = (np.moveaxis(np.asarray(leaf), axis, 0) for leaf in leaves)
        for x, momentum, update, is_active in zip(*rows, active, strict=True):
            expected = np.sin(x) + 0.9 * x if is_active else x
            np.testing.assert_allclose(
                momentum, expected, rtol=1e-5 * is_active, atol=1e-6 * is_active
            )
            np.testing.assert_array_equal(update, momentum if is_active else np.zeros_like(x))


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_a_depth_is_its_mask_for_leaves_of_any_number_of_axes(axis):
    front = make_params(3, 4, 5)
    layers, params = layers_along(axis, front), along(axis, front, front)
    tx = dm.drop_scion(0.1, layers, RADII)

    def steps(depth: Any) -> Any:
        said = {"depth": depth}, {"layer_mask": layers.mask(depth)}
        return [tx.update(params, tx.init(params), params, **one) for one in said]

    for of_depth, of_mask in (jax.jit(lambda: steps(2))(), jax.jit(steps)(2)):
        chex.assert_trees_all_equal(of_depth, of_mask)


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize("axis", [1, -1, {"kernel": 1, "out": -1, "bias": 0}])
def test_a_scan_along_any_axes_is_that_along_the_first(axis, is_traced):
    front = make_params(4, 3, 2)["blocks"]
    axes = jax.tree.broadcast(axis, front)
    tree = jax.tree.map(lambda x, to: jnp.moveaxis(x, 0, to), front, axes)

    def f(x: Any, rows: Any) -> Any:
        x, _ = block(x, rows[0])
        return x, rows[1] * x.sum()

    def gradient(tree: Any, depth: Any, axis: Any) -> Any:
        def loss(tree: Any) -> Any:
            xs, start = (tree, jnp.arange(4.0)), jnp.ones((2, 3))
            x, ys = dm.scan_layers(f, start, xs, depth=depth, axis=axis)
            return jnp.sum(jnp.sin(x)) + jnp.sum(ys**2)

        return jax.grad(loss)(tree)

    @functools.partial(jax.jit, static_argnums=() if is_traced else 0)
    def gradients(depth: Any) -> Any:
        return gradient(tree, depth, (axis, 0)), gradient(front, depth, 0)

    for depth in (0, 2, 4):
        result, expected = gradients(depth)
        moved = jax.tree.map(lambda x, to: jnp.moveaxis(x, 0, to), expected, axes)
        chex.assert_trees_all_close(result, moved, rtol=1e-5)


# --- What else knows of stacks --------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
def test_masks_checks_shardings_plans_and_first_parameters_are_those_of_the_first_axis(axis):
    front = make_params(3, 4, 5)
    layers, first = layers_along(axis, front), layers_along(0, front)
    params, tx = along(axis, front, front), dm.drop_scion(0.1, layers, RADII)
    flags, of_first = layers.mask(2)["blocks"]["out"], first.mask(2)["blocks"]["out"]
    assert flags.tolist() == np.expand_dims(of_first, [*range(axis % 3)]).tolist()
    dm.check_optimizer(tx, params, layers)
    dm.check_state(tx, params, jax.tree.map(np.asarray, tx.init(params)), layers)
    with pytest.raises(ValueError, match="'blocks/"):
        dm.check_optimizer(optax.adam(0.1), params, layers)
    with pytest.raises(ValueError, match="momentum of 'blocks/"):
        dm.check_state(tx, params, dm.drop_scion(0.1, first, RADII).init(front))

    @jax.jit
    def init() -> Any:
        draw = functools.partial(dm.optimizers.scion_init, jax.random.key(0), radii=RADII)
        drawn = draw(params=params, layers=layers)
        return drawn, along(axis, draw(params=front, layers=first), front)

    chex.assert_trees_all_close(*init())

    mesh = AbstractMesh((2, 2), ("x", "y"))
    specs = {3: PartitionSpec(None, "x", "y"), 2: PartitionSpec("y")}

    def placed(axis: int, of: Any) -> Any:
        def place(path: Any, x: Any) -> Any:
            entries = [*specs[x.ndim], *(None,) * (x.ndim - len(specs[x.ndim]))]
            if "blocks" in keystr(path):
                entries.insert(axis % x.ndim, entries.pop(0))
            return NamedSharding(mesh, PartitionSpec(*entries))

        return tree_map_with_path(place, of)

    plan = dm.sharding.plan_layouts
    ours = plan(params, shardings=placed(axis, params), layers=layers, layer_mask=layers.mask(2))
    theirs = plan(front, shardings=placed(0, front), layers=first, layer_mask=first.mask(2))
    assert ours == theirs
    of_state = dm.state_shardings(tx, params, placed(axis, params))
    kept = {
        keystr(path[-2:]): x.spec
        for path, x in tree_leaves_with_path(of_state)
        if keystr(path[-2:]).startswith("['blocks']")
    }
    of_params = tree_leaves_with_path({"blocks": placed(axis, params)["blocks"]})
    assert kept == {keystr(path): x.spec for path, x in of_params}


def test_linen_scans_along_another_axis():
    """Parameters, gradients and steps of a model that keeps its layers as MaxText does."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return x + nn.Dense(3)(nn.gelu(nn.Dense(4)(nn.LayerNorm()(x)))), None

    scan = nn.scan(Block, {"params": 1}, split_rngs={"params": True}, length=3)
    model = scan()
    x = jnp.asarray(normal((5, 3)))
    params = jax.jit(model.init)(jax.random.key(0), x, None)["params"]
    layers = dm.layers_by_path(params, [dm.stacked("*", axis=1)])
    assert layers.num_layers == 3

    def ours(params: Any, depth: Any) -> Any:
        f = lambda x, row: Block(parent=None).apply({"params": row}, x, None)  # noqa: E731
        rows = layers.stack_depth(depth)
        return jnp.sum(dm.scan_layers(f, x, params, depth=rows, axis=1)[0] ** 2)

    theirs = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x, None)[0] ** 2))
    expected = jax.tree.map(lambda grad: grad.at[:, :1].set(0), jax.jit(theirs)(params))
    of_depth = functools.partial(dm.masked_value_and_grad(ours), layer_mask=layers.mask(1))
    grads = jax.jit(of_depth)(params, 1)[1]
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", [0, 1])
def test_check_depths_says_that_the_scan_has_another_number_of_layers(told):
    params = along(1, front := make_params(3, 4, 4), front)
    layers = dm.layers_by_path(params, ["embed", dm.stacked("blocks", axis=told), "head"])
    loss = functools.partial(loss_of, layers_along(1, front), 1)

    @functools.partial(jax.jit, static_argnames="depth")
    def step(params: Any, depth: int) -> Any:
        mask, of_loss = layers.mask(depth), min(depth, 4)
        return dm.masked_value_and_grad(loss)(params, of_loss, layer_mask=mask)[1]

    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        dm.check_depths(step, layers, params)
    words = "takes 3 turns over the stack 'blocks', which is 4 layers along axis 0"
    assert any(words in str(warning.message) for warning in told_of) is (told == 0)
    assert told == 0 or not told_of
