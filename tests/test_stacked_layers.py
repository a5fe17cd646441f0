"""Layers stacked on a leading axis step as the same layers side by side do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_ROWS, WIDTH = 3, 4
KEYS = jax.random.split(jax.random.key(3), 6)
X = jax.random.normal(KEYS[4], (8, 3))
DEPTHS = (2, 0, 2, 0, 2)


def make_stacked(dtype=jnp.float32):
    return {
        "embed": jax.random.normal(KEYS[0], (3, WIDTH), dtype),
        "blocks": {
            "kernel": jax.random.normal(KEYS[1], (NUM_ROWS, WIDTH, 6), dtype),
            "out": jax.random.normal(KEYS[2], (NUM_ROWS, 6, WIDTH), dtype),
            "bias": 0.1 * jax.random.normal(KEYS[3], (NUM_ROWS, 6), dtype),
        },
        "head": jax.random.normal(KEYS[5], (WIDTH, 2), dtype),
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


def stacked_loss(params, x, depth):
    x, _ = dm.scan_layers(block, x @ params["embed"], params["blocks"], depth=depth)
    return jnp.mean((x @ params["head"] - 1) ** 2)


def separate_loss(params, x):
    x = x @ params["embed"]
    for row in params["blocks"]:
        x, _ = block(x, row)
    return jnp.mean((x @ params["head"] - 1) ** 2)


RADII = {"hidden": 2.0, "head": 3.0, "bias": 0.5, "embedding": 1.5}
# Few steps of the iteration, of which each is a larger program to compile.
KERNEL = dm.orthogonalize.newton_schulz(num_steps=2)
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
    ),
    "drop_muon_with_mars": lambda layers: dm.drop_muon(
        0.05,
        layers,
        momentum=dm.transforms.mars_momentum(0.8, max_norm=0.1),
        orthogonalize=KERNEL,
    ),
    "drop_scion": lambda layers: dm.drop_scion(
        0.1,
        layers,
        RADII,
        norms={"hidden": dm.norms.spectral_norm("muon", orthogonalize=KERNEL)},
    ),
    "drop_gluon": lambda layers: dm.drop_gluon(
        dm.schedules.gluon_radius(0.1), layers, dict.fromkeys(dm.layers.ROLES, 1.0)
    ),
}


def take_step(tx, loss_fn, params, opt_state, mask, *args):
    if optax.tree.get_all_with_path(opt_state, "PrevParamsState"):
        _, (grads, prev_grads) = dm.masked_value_and_grad_pair(loss_fn)(
            params, dm.prev_params(opt_state, params), *args, layer_mask=mask
        )
        extra_args = {"prev_params_grads": prev_grads}
    else:
        _, grads = dm.masked_value_and_grad(loss_fn)(params, *args, layer_mask=mask)
        extra_args = {}
    updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def stacked_step(tx, params, opt_state, depth):
    mask = LAYERS.mask(depth)
    return take_step(tx, stacked_loss, params, opt_state, mask, X, LAYERS.stack_depth(depth))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_traced_depth_trains_as_static_depths_of_separate_layers_do(name):
    with jax.enable_x64(True):
        tx, separate_tx = OPTIMIZERS[name](LAYERS), OPTIMIZERS[name](SEPARATE)
        step = jax.jit(functools.partial(stacked_step, tx))

        @functools.partial(jax.jit, static_argnums=2)
        def separate_step(params, opt_state, depth):
            mask = SEPARATE.mask(depth)
            return take_step(separate_tx, separate_loss, params, opt_state, mask, X)

        params = make_stacked(jnp.float64)
        separate = unstack(params)
        opt_state, separate_state = tx.init(params), separate_tx.init(separate)
        for depth in DEPTHS:
            params, opt_state = step(params, opt_state, jnp.int32(depth))
            separate, separate_state = separate_step(separate, separate_state, depth)
            chex.assert_trees_all_close(params, stack(separate), rtol=1e-9, atol=1e-9)
        assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["drop_muon", "drop_scion"])
def test_a_static_depth_trains_as_a_traced_one_does(name):
    tx = OPTIMIZERS[name](LAYERS)
    traced = jax.jit(functools.partial(stacked_step, tx))
    static = jax.jit(functools.partial(stacked_step, tx), static_argnums=2)
    params = make_stacked()
    opt_state = tx.init(params)
    for depth in (2, 3):
        expected = static(params, opt_state, depth)
        params, opt_state = traced(params, opt_state, jnp.int32(depth))
        chex.assert_trees_all_close((params, opt_state), expected, rtol=1e-4, atol=1e-5)


def leaves_of_rows(tree, rows):
    """The bytes of rows of the leaves of float arrays that have NUM_ROWS of them."""
    return [
        np.asarray(leaf)[rows].tobytes()
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim > 1 and len(leaf) == NUM_ROWS and leaf.dtype == jnp.float32
    ]


@pytest.mark.parametrize(
    ("name", "is_traced"),
    [
        ("drop_muon", True),
        ("drop_muon", False),
        ("drop_muon_with_mvr", True),
        ("drop_muon_with_mars", True),
        ("drop_scion", True),
    ],
)
def test_inactive_rows_keep_every_bit_of_parameters_and_state(name, is_traced):
    tx = OPTIMIZERS[name](LAYERS)
    params = make_stacked() | {"embed": jnp.full((3, WIDTH), -0.0)}
    opt_state = tx.init(params)
    grads = jax.tree.map(jnp.sin, params)  # not zero anywhere: the mask alone freezes
    kwargs = {"prev_params_grads": grads} if "mvr" in name else {}

    def step(params, opt_state, depth):
        mask = LAYERS.mask(depth)
        updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask, **kwargs)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, static_argnums=() if is_traced else 2)
    depth = 3  # one row of three is active, the embedding is not
    params, opt_state = step(params, opt_state, jnp.int32(0) if is_traced else 0)
    new, new_state = step(params, opt_state, jnp.int32(depth) if is_traced else depth)
    for before, after in ((params, new), (opt_state, new_state)):
        assert leaves_of_rows(before, slice(0, 2)) == leaves_of_rows(after, slice(0, 2))
    assert leaves_of_rows(params, slice(2, 3)) != leaves_of_rows(new, slice(2, 3))
    assert np.asarray(params["embed"]).tobytes() == np.asarray(new["embed"]).tobytes()


@pytest.mark.parametrize("depth", range(NUM_ROWS + 2))
@pytest.mark.parametrize("is_traced", [True, False])
def test_only_active_rows_are_orthogonalized(depth, is_traced):
    shapes = []

    def observed(stack):
        jax.debug.callback(lambda: shapes.append(stack.shape))
        return stack

    tx = optax.chain(
        dm.per_layer(
            optax.chain(dm.momentum(), dm.norm_lmo(dm.norms.spectral_norm(orthogonalize=observed))),
            KERNEL_LAYERS,
            takes_mask=True,
        ),
        dm.layer_mask_sampler(KERNEL_LAYERS, dm.uniform_depth(), seed=0),
    )
    opt_state = tx.init(KERNELS)

    def update(depth):
        return tx.update(KERNELS, opt_state, layer_mask=KERNEL_LAYERS.mask(depth))

    if is_traced:
        update, depth_given = jax.jit(update), jnp.int32(depth)
    else:
        update, depth_given = jax.jit(update, static_argnums=0), depth
    jax.block_until_ready(update(depth_given))
    jax.effects_barrier()
    active_rows = min(NUM_ROWS, NUM_ROWS + 1 - depth)
    is_embed_active = depth == 0
    # The two kernels of a row have one shape, transposed, and pass together.
    assert sorted(shapes) == sorted(
        [(2, WIDTH, 6)] * active_rows + [(1, 2, WIDTH)] + [(1, 3, WIDTH)] * is_embed_active
    )


KERNELS = make_stacked()
KERNELS = KERNELS | {"blocks": {name: KERNELS["blocks"][name] for name in ("kernel", "out")}}
KERNEL_LAYERS = dm.layers_by_path(KERNELS, ["embed", dm.stacked("blocks"), "head"])


def test_a_subset_of_rows_steps_alone():
    """With a distribution over subsets, drawn on the device."""
    sampler = dm.layer_mask_sampler(LAYERS, dm.sampling.fixed_size_subsets(2), seed=1)
    inner = dm.per_layer(optax.scale_by_adam(), LAYERS)
    tx = optax.chain(inner, optax.scale(-0.1), sampler)
    params = make_stacked()

    @jax.jit
    def update(count):
        active = jnp.asarray(sampler.draws.subsets)[sampler.sample(count)]
        updates, _ = tx.update(params, tx.init(params), layer_mask=LAYERS.subset(active))
        return active, updates

    for step in range(4):
        active, updates = update(step)
        assert tuple(active.tolist()) == sampler.active(step)
        moved = [
            bool(updates["embed"].any()),
            *(bool(row.any()) for row in updates["blocks"]["kernel"]),
            bool(updates["head"].any()),
        ]
        assert moved == active.tolist()


def test_adam_counts_the_own_steps_of_each_row():
    tx = dm.per_layer(optax.scale_by_adam(), LAYERS)
    params = make_stacked()
    state = tx.init(params)
    update = jax.jit(lambda state, depth: tx.update(params, state, layer_mask=LAYERS.mask(depth)))
    for depth in (0, 2, 3, 4):
        _, state = update(state, jnp.int32(depth))
    embed, blocks, head = (inner.count.tolist() for inner in state.inner_states)
    assert (embed, blocks, head) == (1, [1, 2, 3], 4)


def test_a_whole_run_is_one_program_and_learns():
    """Steps in a `lax.scan`, each with a depth drawn on the device."""
    tx = dm.drop_muon(0.05, LAYERS)
    sampler = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0)

    def step(carry, count):
        params, opt_state = carry
        depth = sampler.sample(count)
        carry = stacked_step(tx, params, opt_state, depth)
        return carry, (stacked_loss(params, X, 0), depth)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(40)))
    params = make_stacked()
    _, (losses, depths) = run(params)
    assert losses[-1] < 0.3 * losses[0]
    assert depths.tolist() == [sampler.depth(step) for step in range(40)]
    assert run._cache_size() == 1

    host = jax.jit(functools.partial(stacked_step, tx))
    opt_state = tx.init(params)
    for count in range(3):
        np.testing.assert_allclose(stacked_loss(params, X, 0), losses[count], rtol=1e-4)
        params, opt_state = host(params, opt_state, jnp.int32(sampler.depth(count)))
    assert host._cache_size() == 1


def test_the_program_of_the_optimizer_does_not_grow_with_the_layers():
    def num_lines(num_rows):
        params = {"blocks": {"kernel": jnp.ones((num_rows, 8, 8)), "bias": jnp.ones((num_rows, 8))}}
        layers = dm.layers_by_path(params, [dm.stacked("blocks")])
        tx = dm.drop_muon(0.1, layers)

        def update(state, depth):
            return tx.update(params, state, params, layer_mask=layers.mask(depth))

        lowered = jax.jit(update).lower(tx.init(params), jnp.int32(0))
        return len(lowered.as_text().splitlines())

    assert num_lines(4) == pytest.approx(num_lines(40), abs=2)


@pytest.mark.parametrize("depth", range(NUM_ROWS + 2))
def test_masks_of_stacks_say_which_rows_are_active(depth):
    rows = [row + 1 >= depth for row in range(NUM_ROWS)]
    static, traced = LAYERS.mask(depth), LAYERS.mask(jnp.int32(depth))
    assert static["embed"] is (depth == 0)
    assert static["head"] is traced["head"] is True
    assert bool(traced["embed"]) is (depth == 0)
    kernel = static["blocks"]["kernel"]
    assert kernel is rows[0] if len(set(rows)) == 1 else kernel.tolist() == rows
    assert traced["blocks"]["kernel"].tolist() == rows
    assert LAYERS.stack_depth(depth) == int(LAYERS.stack_depth(jnp.int32(depth)))
    assert LAYERS.stack_depth(depth) == NUM_ROWS - sum(rows)


def test_layers_know_their_stacks():
    assert LAYERS.names == ("embed", "blocks[0]", "blocks[1]", "blocks[2]", "head")
    row = WIDTH * 6 * 2 + 6
    assert LAYERS.layer_sizes == (3 * WIDTH, row, row, row, WIDTH * 2)
    assert hash(LAYERS) == hash(
        dm.layers_by_path(make_stacked(), ["embed", dm.stacked("blocks"), "head"])
    )
    shapes = LAYERS.row_shapes(make_stacked())
    assert shapes["blocks"]["kernel"].shape == (WIDTH, 6)
    assert shapes["embed"].shape == (3, WIDTH)


def test_grouped_stacks_are_masked_by_group():
    grouped = LAYERS.group(2, layer_costs=[1, 1, 1, 1, 2])
    assert grouped.names == ("embed … blocks[1]", "blocks[2] … head")
    mask = grouped.mask(1)
    assert mask["embed"] is False
    assert mask["head"] is True
    assert mask["blocks"]["bias"].tolist() == [False, False, True]
    assert grouped.stack_depth(1) == 2
    assert grouped.stack_depth(jnp.int32(1)) == 2


def test_several_stacks_stand_in_one_order():
    params = {
        "encoder": {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4))},
        "decoder": jnp.ones((3, 5)),
    }
    layers = dm.layers_by_path(
        params, [dm.stacked("encoder/a", "encoder/b"), dm.stacked("decoder")]
    )
    assert layers.num_layers == 5
    assert [layers.stack_depth(depth, "decoder") for depth in range(5)] == [0, 0, 0, 1, 2]
    assert [layers.stack_depth(d, "encoder/a + encoder/b") for d in range(5)] == [0, 1, 2, 2, 2]


def test_scion_starts_each_row_on_its_own_ball():
    drawn = dm.optimizers.scion_init(jax.random.key(0), make_stacked(), RADII, layers=LAYERS)
    for row in drawn["blocks"]["out"]:
        factor = dm.optimizers.ROLE_NORMS["hidden"].norm(row)
        np.testing.assert_allclose(factor, RADII["hidden"], rtol=1e-4)
    assert not jnp.allclose(drawn["blocks"]["out"][0], drawn["blocks"]["out"][1])


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
