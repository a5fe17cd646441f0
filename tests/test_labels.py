"""Which leaf is what: the rules one by one, on networks as Flax names them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm


def leaves_by_role(params, roles=None, **options):
    found = {}
    labels = dm.role_labels(params, roles, **options)
    for path, role in jax.tree_util.tree_leaves_with_path(labels):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.setdefault(role, []).append(name)
    return found


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, 8, name="tok_embeddings")(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="multi_head_attention")(
            nn.LayerNorm()(x)
        )
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(40, name="lm_head")(x)


def test_a_transformer_of_linen():
    params = jax.eval_shape(
        lambda: Transformer().init(jax.random.key(0), jnp.zeros((1, 5), int))["params"]
    )
    found = leaves_by_role(params)
    assert found["embedding"] == ["tok_embeddings/embedding"]
    assert found["head"] == ["lm_head/kernel"]
    assert found["hidden"] == [
        "down/kernel",
        "multi_head_attention/key/kernel",
        "multi_head_attention/out/kernel",
        "multi_head_attention/query/kernel",
        "multi_head_attention/value/kernel",
        "up/kernel",
    ]
    # The biases of attention heads are stacked vectors.
    assert "multi_head_attention/query/bias" in found["bias"]
    assert "LayerNorm_0/scale" in found["bias"]


def test_a_network_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    labels = dm.role_labels(params)
    assert jax.tree.leaves(labels) == ["bias", "head", "bias", "hidden"]
    assert "stem/kernel  3×3×3×8  hidden  window 3×3" in dm.role_table(params)


@pytest.mark.parametrize(
    ("path", "shape", "role"),
    [
        ("pos_embedding", (1, 17, 32), "embedding"),
        ("cls", (1, 1, 32), "embedding"),
        ("relative_position_bias_table", (49, 3), "embedding"),
        ("lookup", (4, 512), "hidden"),  # one side 128 times the other
        # Of a module that is called after a table, kernels are matrices all the same.
        ("cls/predictions/transform/dense/kernel", (8, 8), "hidden"),
        ("embedding/kernel", (4, 4, 3, 32), "hidden"),
        ("time_emb/Dense_0/kernel", (8, 32), "hidden"),
        ("Dense_0/kernel", (3136, 16), "hidden"),  # behind a flattened image
        ("conv_init/kernel", (7, 5, 3, 64), "hidden"),
        ("value_head/kernel", (8, 1), "head"),
        ("multi_head/query/kernel", (8, 8), "hidden"),
        ("norm/scale", (6, 8), "bias"),
    ],
)
def test_leaves_as_they_are_called_in_public_networks(path, shape, role):
    assert dm.role_labels({path: jnp.zeros(shape)}, has_head=False) == {path: role}


def test_a_pattern_comes_before_every_rule():
    params = {"head": jnp.ones((4, 2)), "wte": jnp.ones((9, 4)), "bias": jnp.ones((3, 4))}
    roles = {"head": "hidden", "wte": "tied_head", "bias": "gate"}
    assert dm.role_labels(params, roles) == roles


def test_a_pattern_that_names_a_leaf_called_bias_decides():
    params = {"mixer": {"bias": jnp.ones((4, 8))}}
    assert dm.role_labels(params, {"mixer/bias": "hidden"}, has_head=False) == {
        "mixer": {"bias": "hidden"}
    }


def test_the_bias_of_a_head_is_a_bias():
    params = {"Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
    labels = dm.role_labels(params, {"Dense_0": "head"})
    assert labels == {"Dense_0": {"kernel": "head", "bias": "bias"}}


def test_labels_go_into_chain_subtrees():
    params = {"Dense_0": jnp.eye(3), "head": jnp.eye(3), "bias": jnp.ones(3)}
    tx = dm.chain_subtrees(
        {"hidden": optax.scale(1.0), "head": optax.scale(2.0), "bias": optax.scale(3.0)},
        dm.role_labels,
    )
    updates, _ = tx.update(params, tx.init(params))
    assert [float(leaf.max()) for leaf in jax.tree.leaves(updates)] == [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("params", "roles", "words"),
    [
        ({"Dense_0": jnp.eye(3), "Dense_1": jnp.eye(3)}, None, ["No leaf is the head", "Dense_1"]),
        (
            {"Conv_0": jnp.ones((3, 3, 1, 8)), "head": jnp.eye(3)},
            None,
            ["'Conv_0'", "depthwise", "grey images", "roles={'Conv_0': 'hidden'}"],
        ),
        (
            {"lookup": jnp.ones((4, 516)), "head": jnp.eye(3)},
            None,
            ["'lookup'", "(4, 516)", "looks like a table", "roles={'lookup': 'embedding'}"],
        ),
        (
            {"blocks": {"query": {"kernel": jnp.ones((3, 16, 2, 8))}}, "head": jnp.eye(3)},
            None,
            ["'blocks/query/kernel'", "window of 3×16", "stack of attention", "dimension_numbers"],
        ),
        (
            {"conv1d": jnp.ones((4, 1, 32)), "head": jnp.eye(3)},
            None,
            ["'conv1d'", "depthwise"],
        ),
        (
            {"Dense_0": jnp.eye(3), "head": jnp.eye(3)},
            {"Dense_O": "hidden"},
            ["pattern 'Dense_O' matches no leaf", "Did you mean 'Dense_0'"],
        ),
        (
            {"block": {"kernel": jnp.eye(3)}, "head": jnp.eye(3)},
            {"block": "hidden", "kernel": "head"},
            ["leaf 'block/kernel' matches both 'block' and 'kernel'"],
        ),
    ],
    ids=["no_head", "one_channel", "table", "stack", "depthwise_1d", "no_match", "two_roles"],
)
def test_what_is_ambiguous_is_an_error_that_says_the_way_out(params, roles, words):
    for make in (dm.role_labels, dm.role_table):
        with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words))):
            make(params, roles)


def test_a_network_may_have_no_head():
    assert dm.role_labels({"w": jnp.eye(3)}, has_head=False) == {"w": "hidden"}


def scion(*args, **options):
    params = {"Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "head": jnp.eye(3)}
    return dm.scion(*args, **options).init(params)


RADII = {"hidden": 1.0, "head": 2.0, "bias": 1.0}


@pytest.mark.parametrize(
    ("function", "exception", "words"),
    [
        (lambda: scion(0.1, {"hiden": 1.0}), ValueError, ["'hiden'", "Did you mean 'hidden'"]),
        (lambda: scion(0.1, 50.0), TypeError, ["radii must be a mapping", "50.0"]),
        (lambda: scion(1.5, RADII), ValueError, ["learning_rate", "at most 1", "1.5"]),
        (lambda: scion(-1.0, RADII), ValueError, ["learning_rate must be at least 0"]),
        (
            lambda: scion(0.1, {**RADII, "head": -2.0}),
            ValueError,
            ["radii['head'] must be positive"],
        ),
        (
            lambda: scion(0.1, {"hidden": 1.0, "head": 2.0}),
            ValueError,
            ["Leaf 'Dense_0/bias' is 'bias'", "neither radii nor lmos"],
        ),
        (
            lambda: scion(0.1, RADII, lmos={"bias": optax.adam(0.1)}),
            ValueError,
            ["lmos['bias'] must keep the gradient's sign"],
        ),
        (
            lambda: scion(0.1, RADII, momentum=0.9),
            TypeError,
            ["momentum must be an optax.GradientTransformation"],
        ),
        (
            lambda: dm.gluon(1.0, {"/Dense_0/bias": 1.0}),
            ValueError,
            ["'/Dense_0/bias' is a path", "dict.fromkeys(dm.ROLES"],
        ),
        (
            lambda: dm.scion(
                0.1,
                {"tied_head": 1.0},
                roles={"wte": "tied_head"},
                dimension_numbers={"wte": optax.contrib.MuonDimensionNumbers(1, 0)},
            ).init({"wte": jnp.eye(2)}),
            ValueError,
            ["dimension_numbers: 'wte' matches 'wte', which is 'tied_head'", "take none"],
        ),
        (
            lambda: dm.scion_init(
                jax.random.key(0), {"head": jnp.eye(3)}, {"head": optax.constant_schedule(1.0)}
            ),
            TypeError,
            ["radii['head'] must be a number", "give the first value"],
        ),
        (
            lambda: scion(0.1, {**RADII, "head": dm.adaptive_radius(1.0)}),
            ValueError,
            ["radii['head'] is adaptive", "constrained=False"],
        ),
        (
            lambda: scion(optax.constant_schedule(2.0), RADII),
            ValueError,
            ["learning_rate", "at most 1", "2.0"],
        ),
        (lambda: scion(dm.gluon_radius, RADII), TypeError, ["dm.gluon_radius itself: call it"]),
        (
            lambda: scion(0.1, RADII, lmos={"hiden": dm.svd_lmo(1.0)}),
            ValueError,
            ["lmos names the role 'hiden'", "Did you mean 'hidden'"],
        ),
        (
            lambda: scion(0.1, RADII, lmos={"hidden": dm.spectral_norm()}),
            TypeError,
            ["lmos['hidden']", "dm.norm_lmo"],
        ),
        (lambda: scion(0.1, RADII, roles=["head"]), TypeError, ["roles must be a mapping"]),
        (lambda: scion(0.1, RADII, lmos=[dm.svd_lmo()]), TypeError, ["lmos must be a mapping"]),
        (
            lambda: scion(0.1, RADII, roles={"Dense_0": "hiden"}),
            ValueError,
            ["roles gives 'Dense_0' the role 'hiden'", "Did you mean 'hidden'"],
        ),
        (
            lambda: dm.scion(0.1, {"head": 1.0}).update(
                {"head": jnp.eye(2)}, dm.scion(0.1, {"head": 1.0}).init({"head": jnp.eye(2)})
            ),
            ValueError,
            ["constrained step", "pass them to update"],
        ),
        (
            lambda: dm.drop_scion(
                0.1,
                dm.layers_by_path({"head": jnp.eye(2)}, ["head"]),
                dm.uniform_depth(),
                RADII,
                seed=0,
                momentum=optax.trace(0.9),
            ),
            ValueError,
            ["momentum changes its state", "dm.per_layer"],
        ),
        (
            lambda: dm.drop_muon(
                0.1,
                dm.layers_by_path({"head": jnp.eye(2)}, ["head"]),
                dm.uniform_depth(),
                seed=0,
                momentum=optax.trace(0.9),
            ),
            ValueError,
            ["momentum changes its state", "dm.per_layer"],
        ),
        (
            lambda: dm.scion_init(jax.random.key(0), {"head": jnp.eye(3)}, {"hidden": 1.0}),
            ValueError,
            ["Leaf 'head' is 'head'", "radii has only ['hidden']"],
        ),
        (
            lambda: dm.scion(0.1, RADII).update({}, {}, {}, layer_mask={}),
            TypeError,
            ["scion updates every layer", "use drop_scion"],
        ),
        (
            lambda: dm.gluon(0.1).update({}, {}, {}, layer_mask={}),
            TypeError,
            ["gluon updates every layer", "use drop_gluon"],
        ),
    ],
    ids=range(25),
)
def test_bad_arguments_of_scion_and_gluon_are_named(function, exception, words):
    with pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, words))):
        function()
