"""Which leaf is what: the rules one by one, on networks as Flax names them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import dropmuon_jax as dm

WITHOUT_HEAD = dm.Roles(has_head=False)


def leaves_by_role(params, roles=()):
    found = {}
    labels = dm.Roles(roles).labels(params)
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
    labels = dm.Roles().labels(params)
    assert jax.tree.leaves(labels) == ["bias", "head", "bias", "hidden"]
    assert "stem/kernel  3×3×3×8  hidden  window 3×3" in dm.Roles().table(params)


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
        # As Haiku and Keras call what is a vector, of however many axes.
        ("batch_norm/offset", (1, 1, 1, 8), "bias"),
        ("layer_normalization/gamma", (5, 8), "bias"),
        ("layer_normalization/beta", (5, 8), "bias"),
        ("wte/weight", (9, 4), "embedding"),
    ],
)
def test_leaves_as_they_are_called_in_public_networks(path, shape, role):
    assert WITHOUT_HEAD.labels({path: jnp.zeros(shape)}) == {path: role}


def test_a_pattern_comes_before_every_rule():
    params = {"head": jnp.ones((4, 2)), "wte": jnp.ones((9, 4)), "bias": jnp.ones((3, 4))}
    roles = {"head": "hidden", "wte": "tied_head", "bias": "gate"}
    assert dm.Roles(roles).labels(params) == roles


def test_a_pattern_that_names_a_leaf_called_bias_decides():
    params = {"mixer": {"bias": jnp.ones((4, 8))}}
    roles = dm.Roles({"mixer/bias": "hidden"}, has_head=False)
    assert roles.labels(params) == {"mixer": {"bias": "hidden"}}


def test_the_bias_of_a_head_is_a_bias():
    params = {"Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
    labels = dm.Roles({"Dense_0": "head"}).labels(params)
    assert labels == {"Dense_0": {"kernel": "head", "bias": "bias"}}


def test_labels_go_into_chain_subtrees():
    params = {"Dense_0": jnp.eye(3), "head": jnp.eye(3), "bias": jnp.ones(3)}
    tx = dm.chain_subtrees(
        {"hidden": optax.scale(1.0), "head": optax.scale(2.0), "bias": optax.scale(3.0)},
        dm.Roles().labels,
    )
    updates, _ = tx.update(params, tx.init(params))
    assert [float(leaf.max()) for leaf in jax.tree.leaves(updates)] == [1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("params", "roles", "words"),
    [
        ({"Dense_0": jnp.eye(3), "Dense_1": jnp.eye(3)}, None, ["No leaf is the head", "Dense_1"]),
        (
            {"Conv_0": jnp.ones((3, 3, 1, 8)), "Conv_1": jnp.ones((3, 3, 1, 8))},
            None,
            ["'Conv_0'", "depthwise", "grey images", "roles={'Conv_0': 'hidden'}"],
        ),
        (
            {"depthwise_conv": {"kernel": jnp.ones((3, 3, 8, 1))}, "head": jnp.eye(3)},
            None,
            [
                "'depthwise_conv/kernel'",
                "depthwise convolution",
                "'depthwise'",
                "dm.norms.row_norm",
            ],
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
            {"conv1d": jnp.ones((4, 1, 32)), "conv2d": jnp.ones((3, 3, 1, 8))},
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
    ids=[
        "no_head",
        "one_channel",
        "called_depthwise",
        "table",
        "stack",
        "depthwise_1d",
        "no_match",
        "two_roles",
    ],
)
def test_what_is_ambiguous_is_an_error_that_says_the_way_out(params, roles, words):
    for method in (dm.Roles.labels, dm.Roles.table):
        with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words))):
            method(dm.Roles(roles or {}), params)


def test_a_network_may_have_no_head():
    assert WITHOUT_HEAD.labels({"w": jnp.eye(3)}) == {"w": "hidden"}


def test_roles_are_values():
    one, two = dm.Roles({"b": "head", "a": "gate"}), dm.Roles({"a": "gate", "b": "head"})
    assert one == two
    assert hash(one) == hash(two)
    assert one != dm.Roles({"a": "gate"})
    assert one != dm.Roles(one.patterns, has_head=False)
    with pytest.raises(TypeError, match="roles must be a mapping from path patterns to roles"):
        dm.Roles(["head"])
    with pytest.raises(TypeError, match="maps path patterns to role names, got 'a': 3"):
        dm.Roles({"a": 3})


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((3, 3, 1, 8), None),
        ((3, 3, 1, 8), "in_out"),
        ((8, 1, 3, 3), "out_in"),
        ((8, 1, 3, 3), {"conv_*": "out_in"}),
    ],
)
def test_a_single_convolution_of_one_channel_is_the_first_of_grey_images(shape, numbers):
    params = {"conv_0": jnp.ones(shape), "head": jnp.eye(3)}
    assert dm.Roles().labels(params, numbers) == {"conv_0": "hidden", "head": "head"}
    several = {**params, "conv_1": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"'conv_0' .* may be a depthwise convolution"):
        dm.Roles().labels(several, numbers)
    # … also for Muon, which must not mix its channels either.
    with pytest.raises(ValueError, match=r"'conv_0' .* may be a depthwise convolution"):
        dm.matrix_labels(several, numbers)
    roles = {"conv_0": "hidden", "conv_1": "depthwise"}
    expected = {"conv_0": "matrix", "conv_1": "other", "head": "matrix"}
    assert dm.matrix_labels(several, numbers, roles) == expected


# Of each network the roles in the order of its paths, and the layouts that its library has.
NETWORKS = {
    "flax": (
        {
            "Conv_0/kernel": (3, 3, 3, 16),
            "Embed_0/embedding": (100, 16),
            "LayerNorm_0/scale": (16,),
            "head/kernel": (16, 1),
            "patch_embed/kernel": (4, 4, 3, 16),
            "t_embedder/mlp/kernel": (16, 64),
        },
        ("in_out", None),
        ["hidden", "embedding", "bias", "head", "hidden", "hidden"],
    ),
    "equinox": (
        {
            "conv/weight": (16, 3, 3, 3),
            "conv1d/weight": (16, 3, 5),
            "conv3d/weight": (16, 3, 3, 3, 3),
            "embedding/weight": (100, 16),
            "head/weight": (1, 256),
            "mlp/layers/0/bias": (64,),
            "mlp/layers/0/weight": (64, 16),
        },
        ("out_in",),
        ["hidden", "hidden", "hidden", "embedding", "head", "bias", "hidden"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_rule_decides_for_roles_and_for_matrix_labels(name):
    shapes, layouts, expected = NETWORKS[name]
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    for numbers in layouts:
        roles = jax.tree.leaves(dm.Roles().labels(params, numbers))
        assert roles == expected
        matrices = jax.tree.leaves(dm.matrix_labels(params, numbers))
        assert matrices == ["matrix" if r in ("hidden", "head") else "other" for r in roles]


def test_matrix_labels_need_no_head_and_take_roles():
    params = {"Dense_0": jnp.eye(3), "Dense_1": jnp.eye(3), "wte": jnp.ones((9, 3))}
    assert dm.matrix_labels(params) == {"Dense_0": "matrix", "Dense_1": "matrix", "wte": "other"}
    roles = {"Dense_1": "gate", "wte": "tied_head"}
    expected = {"Dense_0": "matrix", "Dense_1": "other", "wte": "other"}
    assert dm.matrix_labels(params, roles=roles) == expected
    assert dm.matrix_labels(params, roles=dm.Roles(roles)) == expected


@pytest.mark.parametrize("optimizer", ["muon", "drop_muon", "scion", "drop_scion"])
def test_muon_and_scion_ask_the_same_rule(optimizer):
    ambiguous = {"lookup": jnp.ones((4, 516)), "head": jnp.eye(3)}
    layers = dm.layers_by_path(ambiguous, ["lookup", "head"])
    tx = {
        "muon": lambda: dm.muon(0.1),
        "drop_muon": lambda: dm.drop_muon(0.1, layers),
        "scion": lambda: dm.scion(0.1, RADII),
        "drop_scion": lambda: dm.drop_scion(0.1, layers, RADII),
    }[optimizer]()
    with pytest.raises(ValueError, match=r"'lookup' of shape .* looks like a table of embeddings"):
        tx.init(ambiguous)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda p: WITHOUT_HEAD.labels(p),
            ["'0/weight' of shape (8, 4)", "(out, in, *window)", "'out_in' or 'in_out'"],
        ),
        (lambda p: dm.matrix_labels(p), ["'0/weight'", "'out_in' or 'in_out'"]),
        (lambda p: dm.muon(0.1).init(p), ["'0/weight'", "'out_in' or 'in_out'"]),
        (lambda p: dm.newton_schulz_lmo().init(p), ["'0/weight'", "'out_in' or 'in_out'"]),
        (
            lambda p: dm.Roles().labels(p, "out_int"),
            ["dimension_numbers must be one of", "Did you mean 'out_in'"],
        ),
        (
            lambda p: dm.muon(0.1, dimension_numbers={"weigth": "out_in"}).init(p),
            ["pattern 'weigth' matches no leaf", "Did you mean 'weight'"],
        ),
    ],
)
def test_a_weight_of_unknown_layout_is_an_error_that_says_the_way_out(call, words):
    params = [{"weight": jnp.ones((8, 4))}, {"weight": jnp.ones((2, 8))}]
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, words))):
        call(params)


def test_a_weight_beside_others_in_a_module_called_after_a_table_is_ambiguous():
    params = {"embedder": {"mlp": {"weight": jnp.ones((8, 4))}}}
    with pytest.raises(ValueError, match=r"'embedder/mlp/weight' .* 'embedding'}, or 'hidden'"):
        WITHOUT_HEAD.labels(params, "out_in")
    labels = dm.matrix_labels(params, "out_in", {"embedder/mlp": "hidden"})
    assert labels == {"embedder": {"mlp": {"weight": "matrix"}}}


def scion(*args, **options):
    params = {"Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "head": jnp.eye(3)}
    return dm.scion(*args, **options).init(params)


RADII = {"hidden": 1.0, "head": 2.0, "bias": 1.0}
HEAD = {"head": jnp.eye(2)}
HEAD_LAYERS = dm.layers_by_path(HEAD, ["head"])


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
            ["Leaf 'Dense_0/bias' is 'bias'", "radii has no such role", "['head', 'hidden']"],
        ),
        (
            lambda: scion(0.1, RADII, norms={"bias": optax.adam(0.1)}),
            TypeError,
            ["norms['bias'] must be a norm", "dm.norms.sign_norm()"],
        ),
        (
            lambda: scion(0.1, RADII, momentum=[0.9]),
            TypeError,
            ["momentum must be an optax.GradientTransformation", "a list"],
        ),
        (
            lambda: scion(0.1, RADII, momentum=1.5),
            ValueError,
            ["decay is the weight of the past", "1.5"],
        ),
        (
            lambda: dm.gluon(1.0, {"/Dense_0/bias": 1.0}),
            ValueError,
            ["'/Dense_0/bias' is a path", "dict.fromkeys(dm.layers.ROLES"],
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
            lambda: dm.optimizers.scion_init(
                jax.random.key(0), {"head": jnp.eye(3)}, {"head": optax.constant_schedule(1.0)}
            ),
            TypeError,
            ["radii['head'] must be a number", "give the first value"],
        ),
        (
            lambda: scion(0.1, {**RADII, "head": dm.schedules.adaptive_radius(1.0)}),
            ValueError,
            ["radii['head'] is adaptive", "constrained=False"],
        ),
        (
            lambda: scion(optax.constant_schedule(2.0), RADII),
            ValueError,
            ["learning_rate", "at most 1", "2.0"],
        ),
        (
            lambda: scion(dm.schedules.gluon_radius, RADII),
            TypeError,
            ["dm.schedules.gluon_radius itself: call it"],
        ),
        (
            lambda: scion(0.1, RADII, norms={"hiden": dm.norms.spectral_norm()}),
            ValueError,
            ["norms names the role 'hiden'", "Did you mean 'hidden'"],
        ),
        (
            lambda: scion(0.1, RADII, norms={"hidden": dm.norms.spectral_norm}),
            TypeError,
            ["norms['hidden'] must be a norm", "got a function"],
        ),
        (lambda: scion(0.1, RADII, roles=["head"]), TypeError, ["roles must be a mapping"]),
        (
            lambda: scion(0.1, RADII, norms=[dm.norms.sign_norm()]),
            TypeError,
            ["norms must be a mapping"],
        ),
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
            lambda: dm.drop_scion(0.1, HEAD_LAYERS, dm.uniform_depth()),
            TypeError,
            ["radii must be a mapping", "got a LayerDistribution"],
        ),
        (
            lambda: dm.drop_muon(0.1, HEAD_LAYERS, seed=0),
            TypeError,
            ["no argument 'seed'", "dm.DepthSampler(layers, distribution, seed=…)"],
        ),
        (
            lambda: dm.optimizers.scion_init(
                jax.random.key(0), {"head": jnp.eye(3)}, {"hidden": 1.0}
            ),
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
)
def test_bad_arguments_of_scion_and_gluon_are_named(function, exception, words):
    with pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, words))):
        function()


@pytest.mark.parametrize("name", ["drop_muon", "drop_scion"])
def test_a_momentum_that_does_not_look_at_the_mask_is_found_by_the_check(name):
    params = {"Dense_0": jnp.eye(3), "head": jnp.eye(3)}
    layers = dm.layers_by_path(params, ["Dense_0", "head"])
    radii = [RADII] if name == "drop_scion" else []
    make = getattr(dm, name)
    tx = make(0.1, layers, *radii, momentum=optax.trace(0.9))
    with pytest.raises(ValueError, match=r"of leaf 'Dense_0' changes .* dm\.per_layer"):
        dm.check_optimizer(tx, params, layers)
    frozen = dm.per_layer(optax.trace(0.9), layers)
    dm.check_optimizer(make(0.1, layers, *radii, momentum=frozen), params, layers)


def test_a_leaf_of_a_role_without_radius_is_named():
    with pytest.raises(ValueError, match="'Dense_0/kernel' is 'gate', and radii has no such role"):
        scion(0.1, RADII, roles={"Dense_0/kernel": "gate"})


def test_a_norm_of_a_role_of_your_own_needs_its_radius():
    params = {"gate": jnp.array([[3.0, -4.0]]), "head": jnp.eye(2)}
    roles, norms = {"gate": "gate"}, {"gate": dm.norms.sign_norm(normalized=False)}
    radii = {**RADII, "gate": 0.5}
    tx = dm.scion(1.0, radii, constrained=False, norms=norms, roles=roles)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["gate"].tolist() == [[-0.5, 0.5]]
    with pytest.raises(ValueError, match=r"radii names the role 'gate'.*goes into norms"):
        dm.scion(1.0, radii, roles=roles)
