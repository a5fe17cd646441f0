"""Forward order from the traced program. Names are chosen so that alphabetical order is wrong."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dropmuon_jax.layers.by_trace import leaf_uses

STEM, BODY, HEAD = "z_stem", "m_body", "a_head"
MLP = {STEM: jnp.ones((5, 7)), BODY: jnp.ones((7, 3)), HEAD: jnp.ones((3, 2))}
W = jnp.ones((5, 5))
SQUARE = {STEM: jnp.ones((5, 7)), BODY: jnp.ones((4, 7, 7)), HEAD: jnp.ones((7, 2))}
X = jnp.ones((6, 5))


def all_uses(loss_fn, params, *args) -> dict[str, tuple[int, ...] | None]:
    """What `leaf_uses` finds, under the paths of the leaves: positions, the first one first."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    found = leaf_uses(jax.make_jaxpr(loss_fn)(params, *args), len(paths))
    return dict(zip(paths, found, strict=True))


def uses_by_path(loss_fn, params, *args) -> dict[str, tuple[int, ...]]:
    """The leaves that are used, in the order of their first uses."""
    uses = {path: use for path, use in all_uses(loss_fn, params, *args).items() if use is not None}
    return dict(sorted(uses.items(), key=lambda item: item[1][0]))


def unused(loss_fn, params, *args) -> list[str]:
    """Paths of the leaves that are never used."""
    return [path for path, use in all_uses(loss_fn, params, *args).items() if use is None]


def order(loss_fn, params, *args) -> list[str]:
    """Names of the leaves (last component of the path) in the order of their first uses."""
    assert unused(loss_fn, params, *args) == []
    uses = uses_by_path(loss_fn, params, *args)
    assert len({use[0] for use in uses.values()}) == len(uses), f"ties: {uses}"
    return [path.split("/")[-1] for path in uses]


def mlp(params, x):
    x = jnp.tanh(x @ params[STEM])
    x = jax.nn.gelu(x @ params[BODY])
    return jnp.mean((x @ params[HEAD]) ** 2)


def prepared(params, function):
    """All leaves before the network runs, in an order that is not the forward one."""
    return {name: function(params[name]) for name in sorted(params)}


SCALE = jnp.asarray(0.5)

# Losses of a tree of parameters whose leaves are listed in the order in which a network uses them.
# Each function is a test, and its name what the test shows.
PROGRAMS = []


def program(*args, params=MLP):
    """A loss of `params`, whose leaves are written in their order, and of `args`."""

    def register(loss_fn):
        PROGRAMS.append(pytest.param(loss_fn, params, args, id=loss_fn.__name__))
        return loss_fn

    return register


# --- Plain programs -------------------------------------------------------------------------------

program(X)(mlp)


@program(X, params={"w": jnp.ones((5, 7)), "a_bias": jnp.ones(7), "b": jnp.ones(2)})
def a_bias_comes_directly_after_its_kernel(params, x):
    return jnp.sum(jax.nn.relu(x @ params["w"] + params["a_bias"])[:, :2] + params["b"])


@program(X)
def a_closed_over_scalar_is_no_data(params, x):
    return mlp(prepared(params, lambda w: SCALE * w), x)


@program(jax.random.key(0))
def a_random_key_is_data(params, key):
    return mlp(params, jax.random.normal(key, (6, 5)))


@program()
def normalizing_up_front_does_not_count_without_data_either(params):
    return mlp(prepared(params, lambda w: 3.0 * w.T.T / jnp.linalg.norm(w)), jnp.ones((6, 5)))


@program(X)
def vmap_over_examples_changes_nothing(params, xs):
    return jnp.mean(jax.vmap(mlp, in_axes=(None, 0))(params, xs))


@program(X)
def a_gradient_inside_the_loss_leaves_first_uses_in_forward_order(params, x):
    return jnp.sum(jax.grad(mlp, argnums=1)(params, x) ** 2)


@program(X)
def a_barrier_over_parameters_and_data_together_does_not_count(params, x):
    return mlp(*jax.lax.optimization_barrier((params, x)))


@program(X)
def a_power_iteration_on_the_parameters_up_front_does_not_count(params, x):
    def normalized(w):
        def step(_, v):
            v = w.T @ (w @ v)
            return v / jnp.linalg.norm(v)

        return w / jnp.linalg.norm(w @ jax.lax.fori_loop(0, 3, step, w[0]))

    return mlp(prepared(params, normalized), x)


@program(X, True)
def data_that_choose_between_two_weights_do_not_use_them(params, x, flag):
    chosen = jax.lax.cond(flag, lambda: params[HEAD], lambda: 2.0 * params[HEAD])
    return mlp({**params, HEAD: chosen}, x)


# --- Loops ----------------------------------------------------------------------------------------


@program(X, params=SQUARE)
def stacked_layers_in_a_scan_lie_between_the_embedding_and_the_head(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params[STEM], params[BODY])
    return jnp.sum(x @ params[HEAD])


@program(
    X,
    params={"d_const": W, "c_state": X, "b_slices": W[:4], "a_outputs": jnp.ones((4, 6, 5))},
)
def a_scan_separates_its_constants_its_carry_and_its_slices(params, x):
    def step(carry, slices):
        h, state, count = carry
        h = jnp.tanh(h @ params["d_const"])
        h = h + state
        return (h + slices, 2 * state, count + 1), h

    _, outputs = jax.lax.scan(step, (x, params["c_state"], 0), params["b_slices"])
    return jnp.sum(outputs * params["a_outputs"])


@program(X)
def a_reverse_scan_over_outputs_only_is_followed(params, x):
    _, hs = jax.lax.scan(lambda c, row: (c, row @ params[STEM]), 0, x, reverse=True)
    return jnp.sum(jnp.tanh(hs @ params[BODY]) @ params[HEAD])


@program(X, params={STEM: W, "m_bound": jnp.ones(5), "k_body": W, HEAD: W})
def a_while_loop_uses_the_leaves_of_its_body_and_of_its_condition(params, x):
    x = jax.lax.while_loop(
        lambda x: jnp.any(x < params["m_bound"]),
        lambda x: jnp.tanh(x @ params["k_body"]),
        x @ params[STEM],
    )
    return jnp.sum(x @ params[HEAD])


@program(X, params={STEM: W, BODY: W, HEAD: W})
def the_first_value_of_a_while_loop_counts_although_the_body_replaces_it(params, x):
    _, y = jax.lax.while_loop(
        lambda carry: jnp.sum(carry[0]) < 9.0,
        lambda carry: (carry[0] + x, x @ params[BODY]),
        (x, x @ params[STEM]),
    )
    return jnp.sum(y @ params[HEAD])


@program(3)
def the_result_of_a_loop_that_only_counts_up_to_the_data_is_data(params, limit):
    count = jax.lax.while_loop(lambda i: i < limit, lambda i: i + 1, 0)
    return mlp(params, count * jnp.ones((6, 5)))


# --- Choices --------------------------------------------------------------------------------------


@program(X, True, params={STEM: W, "k_other": W, BODY: W, HEAD: W})
def a_conditional_uses_the_leaves_of_every_branch(params, x, flag):
    x = x @ params[STEM]
    x = jax.lax.cond(flag, lambda: jnp.tanh(x) @ params[BODY], lambda: x @ params["k_other"])
    return jnp.sum(x @ params[HEAD])


@program(X, True, params={STEM: W, "k_default": X, BODY: W, HEAD: W})
def a_leaf_that_one_branch_returns_as_it_is_is_used_with_the_result_of_the_others(params, x, flag):
    x = jax.lax.cond(flag, lambda: x @ params[STEM], lambda: params["k_default"])
    return jnp.sum((jnp.tanh(x) @ params[BODY]) @ params[HEAD])


@program(X, params={STEM: W, "y_gate": jnp.ones(5), BODY: W, HEAD: W})
def a_switch_uses_the_predicate_of_a_learned_gate(params, x):
    x = x @ params[STEM]
    branch = jnp.argmax(jnp.mean(x, 0) * params["y_gate"])
    x = jax.lax.switch(branch, [lambda: x, lambda: jnp.tanh(x), lambda: -x])
    return jnp.sum((x @ params[BODY]) @ params[HEAD])


@program(X, params={"z_gate": jnp.ones(5), **MLP})
def a_gate_that_chooses_between_two_weights_is_used(params, x):
    gate = jnp.sum(x @ params["z_gate"]) > 0
    body = jax.lax.cond(gate, lambda: params[BODY], lambda: -params[BODY])
    return mlp({**params, BODY: body}, x)


# --- Operations with programs of another form -----------------------------------------------------


@program(X, params={STEM: W, HEAD: W})
def a_linear_solve_uses_all_its_operands_together(params, x):
    y = jax.lax.custom_linear_solve(
        lambda v: params[STEM] @ v, x[0], lambda _, b: b / 2, symmetric=True
    )
    return jnp.sum(y @ params[HEAD])


@program(X, jnp.arange(6), params={STEM: W, "y_column": jnp.ones(9), BODY: W, HEAD: W})
def a_scatter_which_carries_a_program_is_one_operation(params, x, rows):
    x = jnp.zeros((9, 5)).at[rows].add(x @ params[STEM])
    return jnp.sum((x.at[:, 0].mul(params["y_column"]) @ params[BODY]) @ params[HEAD])


@program(X)
def values_written_to_a_ref_are_followed(params, x):
    ref = jax.new_ref(jnp.zeros((6, 7)))
    ref[...] = x @ params[STEM]
    return jnp.sum((jnp.tanh(ref[...]) @ params[BODY]) @ params[HEAD])


@program(X, params=SQUARE)
def values_written_to_a_ref_inside_a_scan_are_followed(params, x):
    ref = jax.new_ref(x @ params[STEM])

    def step(carry, w):
        ref[...] = jnp.tanh(ref[...] @ w)
        return carry, None

    jax.lax.scan(step, None, params[BODY])
    return jnp.sum(ref[...] @ params[HEAD])


@program(X)
def values_that_reach_a_later_iteration_through_a_ref_are_followed(params, x):
    ref = jax.new_ref(jnp.zeros(5))

    def step(carry, row):
        carry = carry + ref[...] @ params[STEM]
        ref[...] = row
        return carry, None

    y, _ = jax.lax.scan(step, jnp.zeros(7), x)
    return jnp.sum(jnp.tanh(y @ params[BODY])) + jnp.sum(x[:, :3] @ params[HEAD])


@pytest.mark.parametrize(("loss_fn", "params", "args"), PROGRAMS)
def test_leaves_are_in_forward_order_whatever_their_names(loss_fn, params, args):
    assert order(loss_fn, params, *args) == list(params)


# --- Preparations and wrappers --------------------------------------------------------------------

PREPARATIONS = {
    "cast": lambda w: w.astype(jnp.bfloat16),
    "norm": lambda w: w / jnp.linalg.norm(w, axis=0),
    "scalar": lambda w: w * jnp.sqrt(0.5),
    "gather": lambda w: jnp.take(w, jnp.arange(2), 0),
}


@pytest.mark.parametrize(
    "prepare",
    [
        *(lambda params, f=f: prepared(params, f) for f in PREPARATIONS.values()),
        jax.lax.optimization_barrier,
        jax.device_put,
    ],
    ids=[*PREPARATIONS, "barrier", "device_put"],
)
def test_preparing_the_parameters_up_front_does_not_count(prepare):
    params = {name: jnp.ones((2, 2)) for name in (STEM, BODY, HEAD)}
    assert order(lambda params, x: mlp(prepare(params), x), params, X[:, :2]) == list(params)


def with_jvp(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: (fn(*primals), jnp.zeros(())))
    return wrapped


def with_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), args), lambda args, g: args)
    return wrapped


def on_a_mesh(fn):
    specs = PartitionSpec(), PartitionSpec("batch")
    mesh = Mesh(np.array(jax.devices()[:1]), ("batch",))
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


@pytest.mark.parametrize(
    "wrap",
    [lambda fn: jax.jit(jax.checkpoint(jax.jit(fn))), on_a_mesh, with_jvp, with_vjp],
    ids=["jit_and_checkpoint", "shard_map", "custom_jvp", "custom_vjp"],
)
def test_order_is_found_inside(wrap):
    assert order(wrap(mlp), MLP, X) == [STEM, BODY, HEAD]


# --- Where, and how often -------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit])
def test_a_closed_over_batch_is_data(wrap):
    params, batch = {**MLP, "b_gain": jnp.ones(())}, np.ones((6, 5), np.float32)

    def loss_fn(params):
        # The gain meets every weight up front, which is a use only where there are no data.
        scaled = {name: params["b_gain"] * params[name] for name in (HEAD, BODY, STEM)}
        return mlp(scaled, jnp.asarray(batch))

    uses = uses_by_path(wrap(loss_fn), params)
    assert uses["b_gain"] == tuple(uses[name][0] for name in (STEM, BODY, HEAD))


def test_both_factors_of_a_low_rank_product_are_used_where_the_product_meets_the_data():
    def loss_fn(params, x):
        update = params["a_left"] @ params["c_right"]
        return jnp.sum(jnp.tanh(x @ params["b_base"]) + x @ update)

    uses = uses_by_path(loss_fn, dict.fromkeys(("b_base", "a_left", "c_right"), W), X)
    assert uses["a_left"] == uses["c_right"] > uses["b_base"]


def test_a_recurrent_weight_applied_to_a_learned_initial_state_is_used_in_the_loop():
    params = {"c_input": W, "z_recurrent": W, "b_state": W[0], "a_head": W}

    def loss_fn(params, xs):
        def step(h, x):
            return jnp.tanh(x @ params["c_input"] + h @ params["z_recurrent"]), None

        h, _ = jax.lax.scan(step, params["b_state"], xs)
        return jnp.sum(h @ params["a_head"])

    uses = uses_by_path(loss_fn, params, X)
    head = uses.pop("a_head")
    assert all(use[-1] < head[0] for use in uses.values())


WITH_PROBE = {**MLP, "b_probe": W}


def is_dead_code(params, x):
    intermediates = [x @ params[STEM].astype(jnp.bfloat16), jnp.ones((6, 3)) @ params[HEAD]]
    del intermediates
    _dead = jnp.sum(x @ params["b_probe"])
    return mlp(params, x)


def is_a_slot_of_a_loop_that_reaches_no_output(params, x):
    def step(carry, _):
        x, _ = carry
        return (jnp.tanh(x), x @ params["b_probe"]), None

    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros((6, 5))), length=3)
    return mlp(params, x)


def is_debug_printing(params, x):
    jax.debug.print("{} {}", params["b_probe"], x)
    return mlp(params, x)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
@pytest.mark.parametrize(
    "loss_fn",
    [
        is_dead_code,
        is_a_slot_of_a_loop_that_reaches_no_output,
        is_debug_printing,
    ],
)
def test_nothing_is_used_by_what(loss_fn, wrap):
    assert unused(wrap(loss_fn), WITH_PROBE, X) == ["b_probe"]
    assert all(len(use) == 1 for use in uses_by_path(wrap(loss_fn), WITH_PROBE, X).values())


def test_auxiliary_outputs_count():
    def loss_fn(params, x):
        return mlp(params, x), x @ params["b_probe"]

    assert order(loss_fn, WITH_PROBE, X) == [STEM, BODY, HEAD, "b_probe"]


def test_a_regularizer_does_not_hide_the_first_use_and_is_one_place():
    def loss_fn(params, x):
        penalty = sum(jnp.sum(params[name] ** 2) for name in sorted(params))
        return mlp(params, x) + 0.1 * penalty

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]
    uses = uses_by_path(loss_fn, MLP, X).values()
    assert {len(use) for use in uses} == {2}
    assert len({use[-1] for use in uses}) == 1


def test_without_data_leaves_are_used_once_where_they_meet_arrays_and_each_other():
    def loss_fn(params):
        return mlp(params, jnp.linspace(0.0, 1.0, 30).reshape(6, 5))

    assert order(loss_fn, MLP) == [STEM, BODY, HEAD]
    assert {len(use) for use in uses_by_path(loss_fn, MLP).values()} == {1}


def test_a_leaf_alone_in_a_program_without_data_is_used_at_its_end():
    def loss_fn(params):
        return mlp(params, jnp.ones((6, 5))), jnp.sum(params["b_alone"] ** 2)

    *others, alone = uses_by_path(loss_fn, {**MLP, "b_alone": jnp.ones(3)}).items()
    assert alone[0] == "b_alone"
    # Larger than the others, by no more than the loss takes after the last matrix product.
    assert 1 <= alone[1][0] - others[-1][1][0] < 9


def test_a_leaf_that_meets_the_data_is_not_used_where_it_reaches_an_output_without_them():
    def loss_fn(params, x):
        return mlp(params, x), sum(jnp.sum(leaf**2) for leaf in params.values())

    assert {len(use) for use in uses_by_path(loss_fn, MLP, X).values()} == {1}


def test_a_program_without_parameters_has_no_uses():
    assert leaf_uses(jax.make_jaxpr(jnp.sum)(X), 0) == []


# --- Networks -------------------------------------------------------------------------------------


def test_a_linen_network_that_sows():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, name in [(4, "conv_z"), (6, "conv_a"), (8, "conv_m")]:
                x = nn.relu(nn.Conv(features, (3, 3), name=name)(x))
                self.sow("intermediates", f"after_{name}", x)
            return nn.Dense(3, name="b_dense")(jnp.mean(x, axis=(1, 2)))

    def loss_fn(params, images):
        logits, _ = model.apply({"params": params}, images, mutable=["intermediates"])
        return jnp.mean(logits**2)

    images, model = jnp.ones((2, 8, 8, 3)), CNN()
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    layers = ("conv_z", "conv_a", "conv_m", "b_dense")
    expected = [f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")]
    assert list(uses_by_path(loss_fn, params, images)) == expected


@pytest.mark.parametrize("has_data", [True, False])
def test_sixty_layers_are_in_forward_order(has_data):
    names = [f"{60 - i:02d}" for i in range(60)]
    params = {name: {"w": jnp.ones((3, 3)), "b": jnp.ones(3)} for name in names}

    def loss_fn(params, *data):
        x = data[0] if has_data else jnp.ones((2, 3))
        for name in names:
            x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
        return jnp.sum(x) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    found = uses_by_path(loss_fn, params, *([jnp.ones((2, 3))] if has_data else []))
    assert [path for path in found if path.endswith("w")] == [f"{name}/w" for name in names]
