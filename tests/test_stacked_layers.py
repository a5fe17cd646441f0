"""Layers stacked on a leading axis step as the same layers side by side do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm
from meshes import COMPILED_STEPS, graded

NUM_ROWS, WIDTH = 3, 4
KEYS = jax.random.split(jax.random.key(3), 6)
X = jax.random.normal(KEYS[4], (8, 3))


def make_stacked(num_rows=NUM_ROWS):
    """In the widest floating-point numbers."""
    return {
        "embed": jax.random.normal(KEYS[0], (3, WIDTH)),
        "blocks": {
            "kernel": jax.random.normal(KEYS[1], (num_rows, WIDTH, 6)),
            "out": jax.random.normal(KEYS[2], (num_rows, 6, WIDTH)),
            "bias": 0.1 * jax.random.normal(KEYS[3], (num_rows, 6)),
        },
        "head": jax.random.normal(KEYS[5], (WIDTH, 2)),
    }


def unstack(params):
    rows = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(NUM_ROWS)]
    return params | {"blocks": rows}


def stack(params):
    return params | {"blocks": jax.tree.map(lambda *rows: jnp.stack(rows), *params["blocks"])}


LAYERS = dm.layers_by_path(make_stacked(), ["embed", dm.stacked("blocks"), "head"])
SEPARATE = dm.layers_by_path(
    unstack(make_stacked()), ["embed", *(f"blocks/{i}" for i in range(NUM_ROWS)), "head"]
)


def block(x, row):
    return x + jnp.tanh(x @ row["kernel"] + row["bias"]) @ row["out"], None


def stacked_loss(params, x, depth, layers=LAYERS):
    depth = layers.stack_depth(depth)
    x, _ = dm.scan_layers(block, x @ params["embed"], params["blocks"], depth=depth)
    return jnp.mean((x @ params["head"] - 1) ** 2)


def separate_loss(params, x):
    x = x @ params["embed"]
    for row in params["blocks"]:
        x, _ = block(x, row)
    return jnp.mean((x @ params["head"] - 1) ** 2)


RADII = {"hidden": 2.0, "head": 3.0, "bias": 0.5, "embedding": 1.5}
# Few steps of the iteration, of which each is a larger program to compile.
KERNEL = dm.orthogonalize.newton_schulz(num_steps=1)
OPTIMIZERS = {
    "drop_muon": lambda layers: dm.drop_muon(
        optax.linear_schedule(0.1, 0.01, 8),
        layers,
        momentum=dm.momentum(optax.linear_schedule(0.0, 0.9, 6), nesterov=True),
        orthogonalize=KERNEL,
        weight_decay=0.1,
        auxiliary_learning_rate=0.01,
    ),
    "drop_muon_with_mvr": lambda layers: dm.drop_muon(
        0.05,
        layers,
        momentum=dm.mvr_momentum(0.7, variant=2, on_reactivate="decay"),
        orthogonalize=KERNEL,
        weight_decay=0.1,
    ),
    "drop_scion": lambda layers: dm.drop_scion(
        0.1,
        layers,
        RADII,
        norms={"hidden": dm.norms.spectral_norm("muon", orthogonalize=KERNEL)},
    ),
}


# With seeds of which layers step again after they were frozen.
DEPTHS, PAIRS = dm.fixed_depth([0.5, 0, 0.5, 0, 0]), dm.sampling.fixed_size_subsets(2)
RUNS = {name: (make, DEPTHS, 9) for name, make in OPTIMIZERS.items()} | {
    "drop_muon, pairs of layers": (OPTIMIZERS["drop_muon"], PAIRS, 7)
}


@pytest.mark.parametrize(
    ("make", "distribution", "seed"),
    graded(RUNS, "drop_muon_with_mvr", "drop_muon, pairs of layers"),
)
def test_a_stack_trains_in_one_program_as_separate_layers_do(make, distribution, seed):
    def run(loss_fn, layers, params):
        """The parameters after each step."""
        tx, sampler = make(layers), dm.DepthSampler(layers, distribution, seed=seed)
        step_fn, seen = dm.train_step(loss_fn, tx, sampler, donate=False), []
        opt_state = tx.init(params)
        if layers.stacks:
            step_fn.compile(params, opt_state, X, progress=lambda *p: seen.append(p))
            assert seen == [(1, 1)]
        for step in range(5):
            num_compiled = len(COMPILED_STEPS)
            params, opt_state, _ = step_fn(step, params, opt_state, X)
            assert len(COMPILED_STEPS) == num_compiled or not layers.stacks
            yield params

    with jax.enable_x64(True):
        params = make_stacked()
        stacked = run(stacked_loss, LAYERS, params)
        separate = run(separate_loss, SEPARATE, unstack(params))
        for ours, theirs in zip(stacked, separate, strict=True):
            chex.assert_trees_all_close(ours, stack(theirs), rtol=1e-9, atol=1e-9)


def bytes_of_rows(tree, rows):
    """Of the leaves of arrays that have NUM_ROWS of them."""
    return [
        np.asarray(leaf)[rows].tobytes()
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim > 1 and len(leaf) == NUM_ROWS and leaf.dtype == jnp.float32
    ]


@pytest.mark.parametrize("make", graded(OPTIMIZERS, "drop_muon_with_mvr"))
@pytest.mark.parametrize("is_traced", [True, False])
def test_inactive_rows_keep_every_bit_of_parameters_and_state(make, is_traced):
    tx, params = make(LAYERS), make_stacked() | {"embed": jnp.full((3, WIDTH), -0.0)}
    grads = jax.tree.map(jnp.sin, params)  # not zero anywhere: the mask alone freezes
    kwargs = {"prev_params_grads": grads}

    def step(params, opt_state, depth):
        mask = LAYERS.mask(depth)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask, **kwargs)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, static_argnums=() if is_traced else 2)
    first, depth = (jnp.int32(0), jnp.int32(3)) if is_traced else (0, 3)
    params, opt_state = step(params, tx.init(params), first)
    new, new_state = step(params, opt_state, depth)  # one row of three, not the embedding
    for before, after in ((params, new), (opt_state, new_state)):
        assert bytes_of_rows(before, slice(0, 2)) == bytes_of_rows(after, slice(0, 2))
    assert bytes_of_rows(params, slice(2, 3)) != bytes_of_rows(new, slice(2, 3))
    assert params["embed"].tobytes() == new["embed"].tobytes()


@pytest.mark.parametrize("is_traced", [True, False])
def test_inactive_rows_of_a_plain_scan_have_no_gradient(is_traced):
    def loss_fn(params):
        return jnp.sum(jax.lax.scan(block, X @ params["embed"], params["blocks"])[0] ** 2)

    def gradient(depth):
        mask = LAYERS.mask(depth)
        return dm.masked_value_and_grad(loss_fn)(make_stacked(), layer_mask=mask)[1]["blocks"]

    plain = jax.grad(loss_fn)(make_stacked())["blocks"]
    masked = jax.jit(gradient, static_argnums=() if is_traced else 0)(3)
    for name, grad in masked.items():
        assert not grad[:2].any()
        np.testing.assert_allclose(grad[2], plain[name][2], rtol=1e-5)


def test_a_plain_optimizer_moves_no_inactive_row():
    tx, params = optax.adamw(0.1, weight_decay=0.1), make_stacked()
    sampler = dm.DepthSampler(LAYERS, dm.fixed_depth([0, 0, 0, 1, 0]), seed=0)
    step_fn = dm.train_step(stacked_loss, tx, sampler, donate=False)
    new, _, _ = step_fn(0, params, tx.init(params), X)
    assert bytes_of_rows(new, slice(0, 2)) == bytes_of_rows(params, slice(0, 2))
    assert (new["blocks"]["out"][2] != params["blocks"]["out"][2]).all()


@pytest.mark.parametrize("is_traced", [True, False])
def test_only_active_rows_are_orthogonalized(is_traced):
    params = make_stacked()
    params["blocks"].pop("bias")
    layers = dm.layers_by_path(params, ["embed", dm.stacked("blocks"), "head"])
    shapes = []

    def observed(stack):
        jax.debug.callback(lambda: shapes.append(stack.shape))
        return stack

    lmo = dm.norm_lmo(dm.norms.spectral_norm(orthogonalize=observed))
    tx = dm.per_layer(optax.chain(dm.momentum(), lmo), layers, takes_mask=True)
    opt_state = tx.init(params)
    update = jax.jit(
        lambda depth: tx.update(params, opt_state, layer_mask=layers.mask(depth)),
        static_argnums=() if is_traced else 0,
    )
    for depth in range(NUM_ROWS + 2):
        shapes.clear()
        jax.block_until_ready(update(jnp.int32(depth) if is_traced else depth))
        jax.effects_barrier()
        # The two kernels of a row have one shape, transposed, and pass together.
        of_rows = [(2, WIDTH, 6)] * min(NUM_ROWS, NUM_ROWS + 1 - depth)
        assert sorted(shapes) == sorted([*of_rows, (1, 2, WIDTH)] + [(1, 3, WIDTH)] * (depth == 0))


def test_adam_counts_the_own_steps_of_each_row():
    tx, params = dm.per_layer(optax.scale_by_adam(), LAYERS), make_stacked()
    state = tx.init(params)
    update = jax.jit(lambda state, depth: tx.update(params, state, layer_mask=LAYERS.mask(depth)))
    for depth in (0, 2, 3, 4):
        _, state = update(state, jnp.int32(depth))
    embed, blocks, head = (inner.count.tolist() for inner in state.inner_states)
    assert (embed, blocks, head) == (1, [1, 2, 3], 4)


def test_the_program_of_a_step_does_not_grow_with_the_layers():
    def num_lines(num_rows):
        params = make_stacked(num_rows)
        layers = dm.layers_by_path(params, ["embed", dm.stacked("blocks"), "head"])
        tx = OPTIMIZERS["drop_muon"](layers)

        def step(params, opt_state, depth):
            mask = layers.mask(depth)
            gradient = dm.masked_value_and_grad(functools.partial(stacked_loss, layers=layers))
            _, grads = gradient(params, X, depth, layer_mask=mask)
            return tx.update(grads, opt_state, params, layer_mask=mask)

        lowered = jax.jit(step).lower(params, tx.init(params), jnp.int32(0))
        return len(lowered.as_text().splitlines())

    assert num_lines(4) == pytest.approx(num_lines(40), abs=2)


def test_no_turn_of_the_loop_copies_the_whole_stack():
    params = {"blocks": {"kernel": jnp.ones((7, 8, 8)), "bias": jnp.ones((7, 8, 2))}}
    layers = dm.layers_by_path(params, [dm.stacked("blocks")])
    tx = dm.drop_muon(0.1, layers, orthogonalize=KERNEL)

    def update(state, depth):
        return tx.update(params, state, params, layer_mask=layers.mask(depth))

    step = jax.jit(update, donate_argnums=0)
    hlo = step.lower(tx.init(params), jnp.int32(0)).compile().as_text()
    bodies = [part for part in hlo.split("\n}\n") if "dynamic-update-slice" in part]
    loops = [part for part in bodies if "ENTRY" not in part and "%param" in part]
    assert loops
    for body in loops:
        assert "f32[7,8,8]{2,1,0} copy(" not in body
        assert "f32[7,8,2]{2,1,0} copy(" not in body


# --- What layers know of their stacks -------------------------------------------------------------


def test_masks_of_stacks_say_which_rows_are_active():
    for depth in range(NUM_ROWS + 2):
        rows = [row + 1 >= depth for row in range(NUM_ROWS)]
        static, traced = LAYERS.mask(depth), LAYERS.mask(jnp.int32(depth))
        assert static["embed"] is (depth == 0)
        assert static["head"] is traced["head"] is True
        assert bool(traced["embed"]) is (depth == 0)
        kernel = static["blocks"]["kernel"]
        assert kernel is rows[0] if len(set(rows)) == 1 else kernel.tolist() == rows
        assert traced["blocks"]["kernel"].tolist() == rows
        num_inactive = NUM_ROWS - sum(rows)
        assert LAYERS.stack_depth(depth) == LAYERS.stack_depth(jnp.int32(depth)) == num_inactive


def test_layers_know_their_stacks():
    assert LAYERS.names == ("embed", "blocks[0]", "blocks[1]", "blocks[2]", "head")
    row = WIDTH * 6 * 2 + 6
    assert LAYERS.layer_sizes == (3 * WIDTH, row, row, row, WIDTH * 2)
    again = dm.layers_by_path(make_stacked(), ["embed", dm.stacked("blocks"), "head"])
    assert hash(LAYERS) == hash(again)
    shapes = LAYERS.row_shapes(make_stacked())
    assert shapes["blocks"]["kernel"].shape == (WIDTH, 6)
    assert shapes["embed"].shape == (3, WIDTH)


def test_grouped_stacks_are_masked_by_group():
    grouped = LAYERS.group(2, layer_costs=[1, 1, 1, 1, 2])
    assert grouped.names == ("embed … blocks[1]", "blocks[2] … head")
    mask = grouped.mask(1)
    assert (mask["embed"], mask["head"]) == (False, True)
    assert mask["blocks"]["bias"].tolist() == [False, False, True]
    assert grouped.stack_depth(1) == grouped.stack_depth(jnp.int32(1)) == 2


def test_several_stacks_stand_in_one_order():
    a, b, decoder = (jnp.ones((num_rows, 3)) for num_rows in (2, 2, 3))
    params = {"encoder": {"a": a, "b": b}, "decoder": decoder}
    stacks = [dm.stacked("encoder/a", "encoder/b"), dm.stacked("decoder")]
    layers = dm.layers_by_path(params, stacks)
    assert layers.num_layers == 5
    assert [layers.stack_depth(depth, "decoder") for depth in range(5)] == [0, 0, 0, 1, 2]
    assert [layers.stack_depth(d, "encoder/a + encoder/b") for d in range(5)] == [0, 1, 2, 2, 2]


def test_scion_starts_each_row_on_its_own_ball():
    init = functools.partial(dm.optimizers.scion_init, radii=RADII, layers=LAYERS)
    rows = jax.jit(init)(jax.random.key(0), make_stacked())["blocks"]["out"]
    norms = jax.jit(jax.vmap(dm.optimizers.ROLE_NORMS["hidden"].norm))(rows)
    np.testing.assert_allclose(norms, RADII["hidden"], rtol=1e-4)
    assert not jnp.allclose(rows[0], rows[1])
