"""Forward order from the traced program. Names are chosen so that alphabetical order is wrong."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dropmuon_jax.layers.by_trace import leaf_uses

STEM, BODY, HEAD = "z_stem", "m_body", "a_head"
MLP = {STEM: jnp.ones((5, 7)), BODY: jnp.ones((7, 3)), HEAD: jnp.ones((3, 2))}
SQUARE = {STEM: jnp.ones((5, 7)), BODY: jnp.ones((4, 7, 7)), HEAD: jnp.ones((7, 2))}
X = jnp.ones((6, 5))


def all_uses(loss_fn, params, *args) -> dict[str, tuple[int, ...] | None]:
    """What `leaf_uses` finds, under the paths of the leaves: positions, the first one first."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
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
    return [path.split("'")[-2] for path in uses]


def mlp(params, x):
    x = jnp.tanh(x @ params[STEM])
    x = jax.nn.gelu(x @ params[BODY])
    return jnp.mean((x @ params[HEAD]) ** 2)


def in_alphabetical_order(fn):
    """A preparation of all leaves before the network runs, in an order that is not the forward."""
    return lambda params: {name: fn(params[name]) for name in sorted(params)}


# Plain programs.


def test_leaves_are_in_forward_order_whatever_their_names():
    assert order(mlp, MLP, X) == [STEM, BODY, HEAD]


def test_bias_comes_directly_after_its_kernel():
    params = {
        "layer_b": {"kernel": jnp.ones((5, 7)), "a_bias": jnp.ones(7)},
        "layer_a": {"w": jnp.ones((7, 2)), "b": jnp.ones(2)},
    }

    def loss_fn(params, x):
        x = jax.nn.relu(x @ params["layer_b"]["kernel"] + params["layer_b"]["a_bias"])
        return jnp.sum(x @ params["layer_a"]["w"] + params["layer_a"]["b"])

    assert order(loss_fn, params, X) == ["kernel", "a_bias", "w", "b"]


def test_shapes_without_arrays_are_enough():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (MLP, X))
    assert order(mlp, *shapes) == [STEM, BODY, HEAD]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit])
def test_closed_over_batch_is_data(wrap):
    params, batch = {**MLP, "b_gain": jnp.ones(())}, np.ones((6, 5), np.float32)

    def loss_fn(params):
        # The gain meets every weight up front, which is a use only where there are no data.
        scaled = {name: params["b_gain"] * params[name] for name in (HEAD, BODY, STEM)}
        return mlp(scaled, jnp.asarray(batch))

    uses = uses_by_path(wrap(loss_fn), params)
    assert uses["['b_gain']"] == tuple(uses[f"['{name}']"][0] for name in (STEM, BODY, HEAD))


def test_closed_over_scalar_is_no_data():
    scale = jnp.asarray(0.5)
    prepare = in_alphabetical_order(lambda w: scale * w)
    assert order(lambda params, x: mlp(prepare(params), x), MLP, X) == [STEM, BODY, HEAD]


def test_random_key_is_data():
    def loss_fn(params, key):
        return mlp(params, jax.random.normal(key, (6, 5)))

    assert order(loss_fn, MLP, jax.random.key(0)) == [STEM, BODY, HEAD]


def test_order_is_the_same_under_vmap_over_examples():
    def loss_fn(params, xs):
        return jnp.mean(jax.vmap(mlp, in_axes=(None, 0))(params, xs))

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


def test_gradient_inside_the_loss_leaves_the_first_uses_in_forward_order():
    def loss_fn(params, x):
        return jnp.sum(jax.grad(mlp, argnums=1)(params, x) ** 2)

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


# Preparation of the parameters before they meet the data.


@pytest.mark.parametrize(
    "prepare",
    [
        pytest.param(in_alphabetical_order(lambda w: w.astype(jnp.bfloat16)), id="cast"),
        pytest.param(in_alphabetical_order(lambda w: w.T.reshape(-1).reshape(w.shape)), id="shape"),
        pytest.param(in_alphabetical_order(lambda w: w / jnp.linalg.norm(w, axis=0)), id="norm"),
        pytest.param(in_alphabetical_order(lambda w: w * jnp.sqrt(0.5)), id="scalar"),
        pytest.param(in_alphabetical_order(lambda w: jnp.take(w, jnp.arange(2), 0)), id="gather"),
        pytest.param(lambda params: jax.lax.optimization_barrier(params), id="barrier"),
        pytest.param(lambda params: jax.device_put(params), id="device_put"),
    ],
)
def test_preparing_the_parameters_up_front_does_not_count(prepare):
    shapes = {STEM: (2, 2), BODY: (2, 2), HEAD: (2, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert order(lambda params, x: mlp(prepare(params), x), params, X[:, :2]) == [STEM, BODY, HEAD]


def test_barrier_over_parameters_and_data_together_does_not_count():
    def loss_fn(params, x):
        return mlp(*jax.lax.optimization_barrier((params, x)))

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


def test_power_iteration_on_the_parameters_up_front_does_not_count():
    def spectral_norm(w):
        def step(_, v):
            v = w.T @ (w @ v)
            return v / jnp.linalg.norm(v)

        return jnp.linalg.norm(w @ jax.lax.fori_loop(0, 3, step, w[0]))

    normalise = in_alphabetical_order(lambda w: w / spectral_norm(w))
    assert order(lambda params, x: mlp(normalise(params), x), MLP, X) == [STEM, BODY, HEAD]


def test_both_factors_of_a_low_rank_product_are_used_where_the_product_meets_the_data():
    params = {"b_base": jnp.ones((5, 7)), "a_left": jnp.ones((5, 2)), "c_right": jnp.ones((2, 7))}

    def loss_fn(params, x):
        update = params["a_left"] @ params["c_right"]
        return jnp.sum(jnp.tanh(x @ params["b_base"]) + x @ update)

    uses = uses_by_path(loss_fn, params, X)
    assert uses["['a_left']"] == uses["['c_right']"]
    assert uses["['a_left']"][0] > uses["['b_base']"][0]


def test_data_that_choose_between_two_weights_do_not_use_them():
    def loss_fn(params, x, flag):
        chosen = jax.lax.cond(flag, lambda: params[HEAD], lambda: 2.0 * params[HEAD])
        return mlp({**params, HEAD: chosen}, x)

    assert order(loss_fn, MLP, X, True) == [STEM, BODY, HEAD]


# Nested programs.


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(jax.jit, id="jit"),
        pytest.param(jax.checkpoint, id="checkpoint"),
        pytest.param(lambda fn: jax.jit(jax.checkpoint(jax.jit(fn))), id="nested"),
        pytest.param(
            lambda fn: jax.shard_map(
                fn,
                mesh=Mesh(np.array(jax.devices()[:1]), ("batch",)),
                in_specs=(PartitionSpec(), PartitionSpec("batch")),
                out_specs=PartitionSpec(),
                check_vma=False,
            ),
            id="shard_map",
        ),
    ],
)
def test_order_is_found_inside(wrap):
    assert order(wrap(mlp), MLP, X) == [STEM, BODY, HEAD]


def test_order_is_found_inside_custom_jvp():
    wrapped = jax.custom_jvp(mlp)
    wrapped.defjvp(lambda primals, tangents: (mlp(*primals), jnp.zeros(())))
    assert order(wrapped, MLP, X) == [STEM, BODY, HEAD]


def test_order_is_found_inside_custom_vjp():
    wrapped = jax.custom_vjp(mlp)
    wrapped.defvjp(lambda *args: (mlp(*args), args), lambda args, g: args)
    assert order(wrapped, MLP, X) == [STEM, BODY, HEAD]


def test_activations_with_custom_rules_pass_the_data_on():
    def loss_fn(params, x):
        return jnp.sum(jax.nn.silu(jax.nn.relu(x @ params[STEM]) @ params[BODY]) @ params[HEAD])

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


def test_stacked_layers_in_a_scan_lie_between_the_embedding_and_the_head():
    def loss_fn(params, x):
        x = x @ params[STEM]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params[BODY])
        return jnp.sum(x @ params[HEAD])

    assert order(loss_fn, SQUARE, X) == [STEM, BODY, HEAD]


def test_scan_separates_its_constants_its_carry_and_its_slices():
    params = {
        "d_const": jnp.ones((7, 7)),
        "c_state": jnp.ones((6, 7)),
        "b_slices": jnp.ones((4, 7)),
        "a_outputs": jnp.ones((4, 6, 7)),
    }

    def loss_fn(params, x):
        def step(carry, slices):
            h, state, count = carry
            h = jnp.tanh(h @ params["d_const"])
            h = h + state
            return (h + slices, 2 * state, count + 1), h

        carry = (jnp.pad(x, ((0, 0), (0, 2))), params["c_state"], 0)
        _, outputs = jax.lax.scan(step, carry, params["b_slices"])
        return jnp.sum(outputs * params["a_outputs"])

    assert order(loss_fn, params, X) == ["d_const", "c_state", "b_slices", "a_outputs"]


def test_recurrent_weight_applied_to_a_learned_initial_state_is_used_in_the_loop():
    params = {"c_input": jnp.ones((5, 7)), "b_state": jnp.ones(7), "a_head": jnp.ones((7, 2))}
    params["z_recurrent"] = jnp.ones((7, 7))

    def loss_fn(params, xs):
        def step(h, x):
            return jnp.tanh(x @ params["c_input"] + h @ params["z_recurrent"]), None

        h, _ = jax.lax.scan(step, params["b_state"], xs)
        return jnp.sum(h @ params["a_head"])

    uses = uses_by_path(loss_fn, params, X)
    head = uses.pop("['a_head']")
    assert all(use[-1] < head[0] for use in uses.values())


def test_reverse_scan_over_outputs_only_is_followed():
    def loss_fn(params, x):
        _, hs = jax.lax.scan(lambda c, row: (c, row @ params[STEM]), 0, x, reverse=True)
        return jnp.sum(jnp.tanh(hs @ params[BODY]) @ params[HEAD])

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


def test_while_loop_uses_the_leaves_of_its_body_and_of_its_condition():
    params = {STEM: jnp.ones((5, 7)), "m_bound": jnp.ones(7), "k_body": jnp.ones((7, 7))}
    params[HEAD] = jnp.ones((7, 2))

    def loss_fn(params, x):
        x = jax.lax.while_loop(
            lambda x: jnp.any(x < params["m_bound"]),
            lambda x: jnp.tanh(x @ params["k_body"]),
            x @ params[STEM],
        )
        return jnp.sum(x @ params[HEAD])

    assert order(loss_fn, params, X) == [STEM, "m_bound", "k_body", HEAD]


def test_first_value_of_a_while_loop_counts_although_the_body_replaces_it():
    def loss_fn(params, x):
        _, y = jax.lax.while_loop(
            lambda carry: jnp.sum(carry[0]) < 9.0,
            lambda carry: (carry[0] + x, x @ params[BODY]),
            (x, x @ params[STEM]),
        )
        return jnp.sum(y @ params[HEAD])

    params = {STEM: jnp.ones((5, 7)), BODY: jnp.ones((5, 7)), HEAD: jnp.ones((7, 2))}
    assert order(loss_fn, params, X) == [STEM, BODY, HEAD]


def test_result_of_a_loop_that_only_counts_up_to_the_data_is_data():
    def loss_fn(params, limit):
        count = jax.lax.while_loop(lambda i: i < limit, lambda i: i + 1, 0)
        return mlp(params, count * jnp.ones((6, 5)))

    assert order(loss_fn, MLP, 3) == [STEM, BODY, HEAD]


def test_cond_uses_the_leaves_of_every_branch():
    params = {**MLP, "k_other": jnp.ones((7, 3))}

    def loss_fn(params, x, flag):
        x = x @ params[STEM]
        x = jax.lax.cond(flag, lambda: x @ params["k_other"], lambda: jnp.tanh(x) @ params[BODY])
        return jnp.sum(x @ params[HEAD])

    found = order(loss_fn, params, X, True)
    assert (found[0], set(found[1:3]), found[3]) == (STEM, {"k_other", BODY}, HEAD)


def test_leaf_that_one_branch_returns_as_it_is_is_used_with_the_result_of_the_others():
    params = {**MLP, "k_default": jnp.ones((6, 7))}

    def loss_fn(params, x, flag):
        x = jax.lax.cond(flag, lambda: x @ params[STEM], lambda: params["k_default"])
        return jnp.sum((jnp.tanh(x) @ params[BODY]) @ params[HEAD])

    assert order(loss_fn, params, X, True) == [STEM, "k_default", BODY, HEAD]


def test_switch_uses_the_predicate_of_a_learned_gate():
    params = {**MLP, "y_gate": jnp.ones(7)}

    def loss_fn(params, x):
        x = x @ params[STEM]
        branch = jnp.argmax(jnp.mean(x, 0) * params["y_gate"])
        x = jax.lax.switch(branch, [lambda: x, lambda: jnp.tanh(x), lambda: -x])
        return jnp.sum((x @ params[BODY]) @ params[HEAD])

    assert order(loss_fn, params, X) == [STEM, "y_gate", BODY, HEAD]


def test_leaf_of_a_gate_that_chooses_between_two_weights_is_used():
    params = {**MLP, "z_gate": jnp.ones(5)}

    def loss_fn(params, x):
        gate = jnp.sum(x @ params["z_gate"]) > 0
        body = jax.lax.cond(gate, lambda: params[BODY], lambda: -params[BODY])
        return mlp({**params, BODY: body}, x)

    assert order(loss_fn, params, X) == ["z_gate", STEM, BODY, HEAD]


def test_linear_solve_uses_all_its_operands_together():
    params = {STEM: jnp.eye(5, 5), HEAD: jnp.ones((5, 2))}

    def loss_fn(params, x):
        matvec = lambda v: params[STEM] @ v  # noqa: E731
        solve = lambda _, b: b / 2  # noqa: E731
        y = jax.lax.custom_linear_solve(matvec, x[0], solve, symmetric=True)
        return jnp.sum(y @ params[HEAD])

    assert order(loss_fn, params, X) == [STEM, HEAD]


def test_scatter_which_carries_a_program_of_another_form_is_one_operation():
    def loss_fn(params, x, rows):
        x = jnp.zeros((9, 7)).at[rows].add(x @ params[STEM])
        return jnp.sum((x.at[:, 0].mul(params["y_column"]) @ params[BODY]) @ params[HEAD])

    params = {**MLP, "y_column": jnp.ones(9)}
    assert order(loss_fn, params, X, jnp.arange(6)) == [STEM, "y_column", BODY, HEAD]


def test_values_written_to_a_ref_are_followed():
    def loss_fn(params, x):
        ref = jax.new_ref(jnp.zeros((6, 7)))
        ref[...] = x @ params[STEM]
        return jnp.sum((jnp.tanh(ref[...]) @ params[BODY]) @ params[HEAD])

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


def test_values_written_to_a_ref_inside_a_scan_are_followed():
    def loss_fn(params, x):
        ref = jax.new_ref(x @ params[STEM])

        def step(carry, w):
            ref[...] = jnp.tanh(ref[...] @ w)
            return carry, None

        jax.lax.scan(step, None, params[BODY])
        return jnp.sum(ref[...] @ params[HEAD])

    assert order(loss_fn, SQUARE, X) == [STEM, BODY, HEAD]


def test_values_that_reach_a_later_iteration_through_a_ref_are_followed():
    def loss_fn(params, x):
        ref = jax.new_ref(jnp.zeros(5))

        def step(carry, row):
            carry = carry + ref[...] @ params[STEM]
            ref[...] = row
            return carry, None

        y, _ = jax.lax.scan(step, jnp.zeros(7), x)
        return jnp.sum(jnp.tanh(y @ params[BODY])) + jnp.sum(x[:, :3] @ params[HEAD])

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]


# Several uses, no use, no data.


def test_tied_embedding_is_used_first_and_last():
    params = {"b_embedding": jnp.ones((11, 5)), "a_body": jnp.ones((5, 5))}

    def loss_fn(params, tokens):
        x = jnp.take(params["b_embedding"], tokens, axis=0)
        x = jnp.tanh(x @ params["a_body"])
        return jnp.sum(x @ params["b_embedding"].T)

    uses = uses_by_path(loss_fn, params, jnp.arange(6))
    embedding, body = uses["['b_embedding']"], uses["['a_body']"]
    assert embedding[0] < body[0] == body[-1] < embedding[-1]
    assert embedding == (embedding[0], embedding[-1])


def test_leaf_that_is_never_used_has_no_uses():
    assert unused(mlp, {**MLP, "b_unused": jnp.ones(3)}, X) == ["['b_unused']"]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint])
def test_dead_code_uses_nothing(wrap):
    def loss_fn(params, x):
        intermediates = [x @ params[STEM].astype(jnp.bfloat16), jnp.ones((6, 3)) @ params[HEAD]]
        del intermediates
        _dead = jnp.sum(x @ params["b_probe"])
        return mlp(params, x)

    params = {**MLP, "b_probe": jnp.ones((5, 5))}
    assert unused(wrap(loss_fn), params, X) == ["['b_probe']"]
    uses = uses_by_path(wrap(loss_fn), params, X)
    assert all(len(use) == 1 for use in uses.values())


def test_slot_of_a_loop_that_reaches_no_output_uses_nothing():
    params = {**SQUARE, "b_probe": jnp.ones((7, 3))}

    def loss_fn(params, x):
        def step(carry, w):
            x, _ = carry
            x = jnp.tanh(x @ w)
            return (x, x @ params["b_probe"]), None

        (x, _), _ = jax.lax.scan(step, (x @ params[STEM], jnp.zeros((6, 3))), params[BODY])
        return jnp.sum(x @ params[HEAD])

    assert unused(loss_fn, params, X) == ["['b_probe']"]


def test_debug_printing_uses_nothing():
    def loss_fn(params, x):
        jax.debug.print("{} {}", params["b_probe"], x)
        return mlp(params, x)

    assert unused(loss_fn, {**MLP, "b_probe": jnp.ones(3)}, X) == ["['b_probe']"]


def test_auxiliary_outputs_count():
    def loss_fn(params, x):
        return mlp(params, x), x @ params["b_probe"]

    assert order(loss_fn, {**MLP, "b_probe": jnp.ones((5, 5))}, X)[-1] == "b_probe"


def test_regulariser_does_not_hide_the_first_use():
    def loss_fn(params, x):
        penalty = sum(jnp.sum(params[name] ** 2) for name in sorted(params))
        return mlp(params, x) + 0.1 * penalty

    assert order(loss_fn, MLP, X) == [STEM, BODY, HEAD]
    uses = uses_by_path(loss_fn, MLP, X).values()
    assert {len(use) for use in uses} == {2}
    assert len({use[-1] for use in uses}) == 1


def test_without_data_the_order_is_that_in_which_leaves_meet_arrays_and_each_other():
    def loss_fn(params):
        return mlp(params, jnp.linspace(0.0, 1.0, 30).reshape(6, 5))

    uses = uses_by_path(loss_fn, MLP)
    assert order(loss_fn, MLP) == [STEM, BODY, HEAD]
    assert all(use == (use[0],) for use in uses.values())


def test_without_data_normalising_the_parameters_up_front_does_not_count():
    normalise = in_alphabetical_order(lambda w: 3.0 * w.T.T / jnp.linalg.norm(w))
    assert order(lambda params: mlp(normalise(params), jnp.ones((6, 5))), MLP) == [STEM, BODY, HEAD]


def test_leaf_alone_in_a_program_without_data_is_used_at_its_end():
    def loss_fn(params):
        return mlp(params, jnp.ones((6, 5))), jnp.sum(params["b_alone"] ** 2)

    *others, alone = uses_by_path(loss_fn, {**MLP, "b_alone": jnp.ones(3)}).items()
    assert alone[0] == "['b_alone']"
    # Larger than the others, by no more than the loss takes after the last matrix product.
    assert 1 <= alone[1][0] - others[-1][1][0] < 9


def test_leaf_that_meets_the_data_is_not_used_where_it_reaches_an_output_without_them():
    def loss_fn(params, x):
        return mlp(params, x), sum(jnp.sum(leaf**2) for leaf in params.values())

    assert {len(use) for use in uses_by_path(loss_fn, MLP, X).values()} == {1}


def test_program_without_parameters_has_no_uses():
    assert leaf_uses(jax.make_jaxpr(jnp.sum)(X), 0) == []


# Flax.


def sum_of_outputs(model):
    def loss_fn(params, x):
        outputs: Any = model.apply({"params": params}, x)
        return jnp.sum(outputs)

    return loss_fn


def test_linen_cnn():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, name in [(4, "conv_z"), (6, "conv_a"), (8, "conv_m")]:
                x = nn.relu(nn.Conv(features, (3, 3), name=name)(x))
                self.sow("intermediates", f"after_{name}", x)
            return nn.Dense(3, name="b_dense")(jnp.mean(x, axis=(1, 2)))

    images, model = jnp.ones((2, 8, 8, 3)), CNN()
    params = model.init(jax.random.key(0), images)["params"]

    def loss_fn(params, images):
        logits, _ = model.apply({"params": params}, images, mutable=["intermediates"])
        return jnp.mean(logits**2)

    uses = uses_by_path(loss_fn, params, images)
    names = [
        f"['{layer}']['{leaf}']"
        for layer in ("conv_z", "conv_a", "conv_m", "b_dense")
        for leaf in ("kernel", "bias")
    ]
    assert list(uses) == names


def test_linen_attention_block():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="z_attention")(
                nn.LayerNorm(name="z_norm")(x)
            )
            return x + nn.Dense(8, name="a_mlp")(nn.LayerNorm(name="b_norm")(x))

    x, model = jnp.ones((2, 5, 8)), Block()
    params = model.init(jax.random.key(0), x)["params"]
    uses = uses_by_path(sum_of_outputs(model), params, x)
    layers = [path.split("'")[1] for path in uses]
    kernels = [path.split("'")[-4] for path in uses if "kernel" in path]
    assert set(kernels[:3]) == {"query", "key", "value"}
    assert kernels[3:] == ["out", "a_mlp"]
    assert layers == ["z_norm"] * 2 + ["z_attention"] * 8 + ["b_norm"] * 2 + ["a_mlp"] * 2


def test_linen_layers_stacked_by_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(7, name="dense")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(7, use_bias=False, name=STEM)(x)
            stack = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
            )
            x, _ = stack(name=BODY)(x, None)
            return nn.Dense(2, use_bias=False, name=HEAD)(x)

    model = Model()
    params = model.init(jax.random.key(0), X)["params"]
    uses = uses_by_path(sum_of_outputs(model), params, X)
    assert [path.split("'")[1] for path in uses] == [STEM, BODY, BODY, HEAD]


def test_nnx_model_split_and_merged():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.z_stem = nnx.Linear(5, 7, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(7, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.a_head = nnx.Linear(7, 2, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.a_head(self.dropout(nnx.relu(self.norm(self.z_stem(x)))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, rest, x):
        return jnp.mean(nnx.merge(graph, params, rest)(x) ** 2)

    uses = uses_by_path(loss_fn, params, rest, X)
    assert [path.split("'")[1] for path in uses] == ["z_stem", "norm", "norm", "a_head"]


# Large programs.


@pytest.mark.parametrize("data", [True, False])
def test_two_hundred_layers_are_in_forward_order(data):
    names = [f"{200 - i:03d}" for i in range(200)]
    params = {name: {"w": jnp.ones((3, 3)), "b": jnp.ones(3)} for name in names}

    def loss_fn(params, x):
        for name in names:
            x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
        return jnp.sum(x) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    x = jnp.ones((2, 3))
    found = (
        uses_by_path(loss_fn, params, x)
        if data
        else uses_by_path(lambda params: loss_fn(params, jnp.ones((2, 3))), params)
    )
    weights = [path for path in found if "'w'" in path]
    assert weights == [f"['{name}']['w']" for name in names]
