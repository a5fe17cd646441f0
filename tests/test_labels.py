"""Which leaf is what: the rules one by one, on networks as Flax names them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dropmuon_jax as dm

WITHOUT_HEAD = dm.Roles(has_head=False)


def test_a_network_of_nnx_and_the_table_of_its_roles():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

    params = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    assert jax.tree.leaves(dm.Roles().labels(params)) == ["bias", "head", "bias", "hidden"]
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
        ("lm_head/kernel", (8, 40), "head"),
        ("tok_embeddings/embedding", (40, 8), "embedding"),
        ("multi_head/query/kernel", (8, 8), "hidden"),
        ("multi_head_attention/query/kernel", (8, 2, 4), "hidden"),
        ("multi_head_attention/query/bias", (2, 4), "bias"),  # stacked vectors
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


def test_a_pattern_comes_before_every_rule_but_leaves_the_vectors_of_a_module_alone():
    params = {"head": jnp.ones((4, 2)), "wte": jnp.ones((9, 4)), "bias": jnp.ones((3, 4))}
    roles = {"head": "hidden", "wte": "tied_head", "bias": "gate"}
    assert dm.Roles(roles).labels(params) == roles
    mixer = {"mixer": {"bias": jnp.ones((4, 8))}}
    labels = dm.Roles({"mixer/bias": "hidden"}, has_head=False).labels(mixer)
    assert labels == {"mixer": {"bias": "hidden"}}
    dense = {"Dense_0": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
    labels = dm.Roles({"Dense_0": "head"}).labels(dense)
    assert labels == {"Dense_0": {"kernel": "head", "bias": "bias"}}


def test_roles_are_values():
    one, two = dm.Roles({"b": "head", "a": "gate"}), dm.Roles({"a": "gate", "b": "head"})
    assert one == two
    assert hash(one) == hash(two)
    assert one != dm.Roles({"a": "gate"})
    assert one != dm.Roles(one.patterns, has_head=False)


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
    # … also for Muon, which must not mix the channels of a depthwise one either.
    for labels in (dm.Roles().labels, dm.matrix_labels):
        with pytest.raises(ValueError, match=r"'conv_0' .* may be a depthwise convolution"):
            labels(several, numbers)
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
    # A weight beside others in a module called after a table is ambiguous without its role.
    params = {"embedder": {"mlp": {"weight": jnp.ones((8, 4))}}}
    labels = dm.matrix_labels(params, "out_in", {"embedder/mlp": "hidden"})
    assert labels == {"embedder": {"mlp": {"weight": "matrix"}}}


def test_a_norm_of_a_role_of_your_own_steps_its_leaves():
    params = {"gate": jnp.array([[3.0, -4.0]]), "head": jnp.eye(2)}
    norms = {"gate": dm.norms.sign_norm(normalized=False)}
    radii = {"head": 2.0, "gate": 0.5}
    tx = dm.scion(1.0, radii, constrained=False, norms=norms, roles={"gate": "gate"})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["gate"].tolist() == [[-0.5, 0.5]]
