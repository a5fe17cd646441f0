"""Which leaf is what: the rules one by one, on networks as Flax names them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

EXACT = {"orthogonalize": dm.orthogonalize.svd_polar_factor}
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
        ("conv_init/kernel", (7, 7, 3, 64), "hidden"),
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
        # Words begin with capitals as well.
        ("TokenEmbedding/w", (9, 4), "embedding"),
        ("PosEmb_0/w", (9, 4), "embedding"),
        ("embed_tokens/embedding", (9, 4), "embedding"),
        ("LMHead/kernel", (4, 9), "head"),
        ("ClassifierHead_0/kernel", (4, 9), "head"),
        ("head_0/w", (4, 9), "head"),
        ("cls_head/kernel", (4, 9), "head"),
        ("MultiHeadDotProductAttention_0/query/kernel", (4, 8), "hidden"),
        # Vectors of two axes and more, and what is added in place of looked up.
        ("gru/b", (1, 8), "bias"),
        ("weight_norm/g", (5, 1), "bias"),
        ("prelu_shared/alpha", (1, 1, 8), "bias"),
        ("prelu/negative_slope", (8, 4), "bias"),
        ("layer_scale_1", (3, 8), "bias"),
        ("logit_scale", (1, 1), "bias"),
        ("ln_1/w", (5, 8), "bias"),
        ("pos_embs", (1, 16, 8), "embedding"),
        ("rel_pos_h", (27, 8), "embedding"),
        ("register_tokens", (1, 4, 8), "embedding"),
        ("layers/0/kernel", (3, 3, 16, 32), "hidden"),
        ("Decoder_0/ConvTranspose_1/kernel", (1, 1, 8, 8), "hidden"),
        ("out_conv/bias", (1,), "bias"),
        ("lora_b", (2, 8), "hidden"),
    ],
)
def test_leaves_as_they_are_called_in_public_networks(path, shape, role):
    for name in (path, path.replace("/", ".")):  # as in the dict of a model of PyTorch
        assert WITHOUT_HEAD.labels({name: jnp.zeros(shape)}) == {name: role}


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


@pytest.mark.parametrize(
    ("numbers", "roles", "words"),
    [
        (None, {"w": "matrix"}, "the role 'hidden' or 'head'"),
        (None, {"w": "muon"}, "the role 'hidden' or 'head'"),
        ({"w": None}, {}, "roles={…: 'bias'}"),
        (None, {"w": "head"}, "'c_fc.weight' of shape (3, 3) may be kept as (out, in"),
    ],
)
def test_what_other_libraries_call_a_matrix_or_none_is_refused_or_asked_for(numbers, roles, words):
    params = {"w": jnp.eye(3), "c_fc.weight": jnp.eye(3)}
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        dm.muon(0.1, dimension_numbers=numbers, roles=roles).init(params)


def test_roles_are_values():
    one, two = dm.Roles({"b": "head", "a": "gate"}), dm.Roles({"a": "gate", "b": "head"})
    assert one == two
    assert hash(one) == hash(two)
    assert one != dm.Roles({"a": "gate"})
    assert one != dm.Roles(one.patterns, has_head=False)


# What each of them makes of a tree, with dimension numbers: all of them, or none, take it.
RADII = dict.fromkeys(dm.layers.ROLES, 1.0)
ENTRANCES = {
    "labels": lambda p, n, r: dm.matrix_labels(p, n, r),
    "roles": lambda p, n, r: dm.Roles(r, has_head=False).labels(p, n),
    "table": lambda p, n, r: dm.Roles(r, has_head=False).table(p, n),
    "lmo": lambda p, n, r: dm.newton_schulz_lmo(dimension_numbers=n).init(p),
    "norm": lambda p, n, r: dm.norm_lmo(dm.norms.row_norm(), dimension_numbers=n).init(p),
    "muon": lambda p, n, r: dm.muon(0.1, dimension_numbers=n, roles=r).init(p),
    "scion": lambda p, n, r: dm.scion(
        0.1, RADII, dimension_numbers=n, roles=dm.Roles(r, has_head=False)
    ).init(p),
    "drop_muon": lambda p, n, r: dm.drop_muon(
        0.1, dm.layers_by_path(p, ["*"]), dimension_numbers=n, roles=r
    ).init(p),
    "smoothness": lambda p, n, r: dm.planning.track_smoothness(
        dm.norms.row_norm(), dimension_numbers=n
    ).init(p),
    "plan": lambda p, n, r: dm.sharding.plan_layouts(
        p, AbstractMesh((1,), ("x",)), dimension_numbers=n, roles=r
    ),
}


def refusals(params, numbers=None, roles=(), of=ENTRANCES):
    """The messages of all entrances, None of one that takes the tree."""

    def call(entrance):
        try:
            entrance(params, numbers, dict(roles))
        except ValueError as error:
            return str(error)

    return {name: call(ENTRANCES[name]) for name in of}


SIZES = st.integers(17, 40)
WINDOWS = st.integers(2, 16)
# Words that hold or stand beside the one that says what is a convolution, and leave it unsaid.
UNSAID = st.sampled_from(["unconvinced", "moe", "experts", "attn", "query", "Mixer_0", "converter"])
NAMES = st.sampled_from(["experts", "kernel", "w", "wi"])


@settings(max_examples=10, deadline=None)
@given(data=st.data(), module=UNSAID, name=NAMES, rows=SIZES, cols=SIZES)
def test_four_axes_in_doubt_are_refused_everywhere_and_their_axes_are_the_way_out(
    data, module, name, rows, cols
):
    if data.draw(st.booleans()):  # as wide as long, and not called a convolution
        window = (data.draw(WINDOWS),) * 2
    else:  # called one, and of no window that one has
        module = data.draw(st.sampled_from([module, "Conv_0", "conv", "stem"]))
        window = data.draw(st.lists(WINDOWS, min_size=2, max_size=2, unique=True))
    path = f"{module}/{name}"
    params = {path: jax.ShapeDtypeStruct((*window, rows, cols), jnp.float32)}
    roles = data.draw(st.sampled_from([{}, {path: "hidden"}]))  # which do not say the axes
    found = refusals(params, data.draw(st.sampled_from([None, "in_out"])), roles)
    assert all(message and f"'{path}'" in message for message in found.values()), found
    ways_out = [MuonDimensionNumbers(2, 3), MuonDimensionNumbers((0, 1, 2), 3), "in_out"]
    found = refusals(params, {path: data.draw(st.sampled_from(ways_out))}, roles)
    assert not any(found.values()), found


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(
        st.sampled_from("tok pos lm out dense embedding emb head mlp cls".split()),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(["w", "kernel", "scale", "pos"]),
)
def test_camel_case_is_words(words, name):
    camel = "".join(map(str.capitalize, words))
    paths = [
        "_".join(words),
        camel,
        camel[0].lower() + camel[1:],
        f"{camel}_0",
        "_".join(words) + "1",
    ]

    def role(path):
        try:
            return WITHOUT_HEAD.labels({path: jnp.ones((4, 8))})[path]
        except ValueError:
            return "in doubt"

    assert len({role(f"{path}/{name}") for path in paths}) == 1


@pytest.mark.parametrize(
    "path",
    "cls_head/w emb/head/w decoder_embed_head/w TokenEmbed/head_1/w emb_proj/w table_tennis/w "
    "time_emb/linear/w tokenEmbed/kernel attn/head_0/kernel blocks/b attn/b_q".split(),
)
def test_a_path_of_two_readings_is_doubt(path):
    labels = ("labels", "roles", "table", "muon", "scion", "drop_muon", "plan")
    found = refusals({path: jnp.ones((4, 8))}, of=labels)
    assert all(message and f"'{path}'" in message for message in found.values()), found
    (way_out,) = {re.search(r"roles=({.*?})", message)[1] for message in found.values()}
    assert not any(refusals({path: jnp.ones((4, 8))}, None, eval(way_out), of=labels).values())


@given(
    shape=st.lists(st.just(1), max_size=3),
    size=st.integers(1, 9),
    place=st.integers(0, 3),
    name=st.sampled_from(["g", "x", "mix/s", "gate_values", "b", "shift"]),
    numbers=st.sampled_from([None, "in_out", "out_in"]),
)
def test_an_axis_of_length_one_makes_no_matrix(shape, size, place, name, numbers):
    shape.insert(place, size)
    params = {name: jnp.ones(shape)}
    assert dm.matrix_labels(params, numbers) == {name: "other"}
    assert ("an axis of length 1" in WITHOUT_HEAD.table(params, numbers)) == (len(shape) > 1)
    # But what a role or numbers of its own name, and a head.
    if len(shape) == 2:
        assert dm.matrix_labels(params, roles={name: "hidden"}) == {name: "matrix"}
        assert dm.matrix_labels(params, {name: "in_out"}) == {name: "matrix"}
        assert dm.matrix_labels({"head": jnp.ones(shape)}) == {"head": "matrix"}


def test_a_bias_beside_its_kernel_is_a_vector_and_the_second_of_a_count_none():
    stack = {"w": jnp.ones((3, 4, 6)), "b": jnp.ones((3, 6))}
    labels = dm.matrix_labels({"blocks": stack}, {"w": MuonDimensionNumbers(1, 2)})
    assert labels == {"blocks": {"w": "matrix", "b": "other"}}
    lora = {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}
    assert dm.matrix_labels({"lora": lora}) == {"lora": {"a": "matrix", "b": "matrix"}}


@pytest.mark.parametrize("make", [list, tuple, lambda x: dict(enumerate(x)), lambda x: [x, [x]]])
def test_leaves_without_names_say_so(make):
    params = make([jnp.ones((10, 4)), jnp.ones((2, 4)), jnp.ones(4)])
    of = ("labels", "roles", "table", "muon", "scion", "plan")
    found = refusals(params, of=of)
    assert all("no names" in (message or "") for message in found.values()), found
    flat = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key, x in flat if x.ndim > 1]
    roles = dict.fromkeys((f"/{path}" for path in paths), "embedding")
    assert not any(refusals(params, None, roles, of).values())
    assert dm.matrix_labels(jnp.eye(3)) == "matrix"  # one array needs none


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("window", [(5,), (3, 2)])
def test_convolutions_of_every_kind_step_as_their_matrices(layout, window):
    """Each is what it says by name: a transpose, channels or groups one by one."""

    def step(leaf, numbers):
        tx = dm.norm_lmo(dm.norms.spectral_norm(**EXACT), dimension_numbers={"x": numbers})
        return tx.update({"x": leaf}, tx.init({"x": leaf}))[0]["x"]

    def kept(leaf):  # (*window, in, out) in the layout
        return jnp.moveaxis(leaf, (-1, -2), (0, 1)) if layout == "out_in" else leaf

    def one_by_one(leaf, count, axis):
        parts = [step(part, "in_out") for part in jnp.split(leaf, count, axis)]
        return jnp.concatenate(parts, axis)

    @jax.jit
    def pairs(leaf):
        plain, single = step(leaf, "in_out"), leaf[..., :1, :]
        return [
            (step(kept(leaf), layout), kept(plain)),
            (step(leaf.swapaxes(-1, -2), "transposed"), plain.swapaxes(-1, -2)),
            (step(kept(leaf), dm.layers.Grouped(3, layout)), kept(one_by_one(leaf, 3, -1))),
            # As Keras keeps it: each channel has a matrix (window, multiplier).
            (step(leaf, "depthwise"), one_by_one(leaf, 4, -2)),
            (step(single, "depthwise"), one_by_one(single, 6, -1)),
            (step(kept(single), dm.layers.Grouped(6, layout)), kept(one_by_one(single, 6, -1))),
        ]

    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(*window, 4, 6)), jnp.float32)
    for found, expected in pairs(leaf):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "doubt"),
    [
        ({"stem/kernel": (3, 3, 3, 8), "dw/kernel": (3, 3, 1, 8)}, "dw/kernel"),
        ({"Conv_0/kernel": (3, 3, 4, 4), "Conv_1/kernel": (3, 3, 1, 4)}, "Conv_1/kernel"),
        ({"depthwise_conv/kernel": (3, 3, 1, 8)}, "depthwise_conv/kernel"),
        ({"conv/depthwise_kernel": (3, 3, 8, 1)}, "conv/depthwise_kernel"),
        ({"conv/kernel": (3, 3, 8, 1), "conv/bias": (8,)}, "conv/kernel"),
        ({"conv/kernel": (3, 3, 8, 1)}, "conv/kernel"),
        ({"up_conv/kernel": (3, 3, 8, 4), "up_conv/bias": (8,)}, "up_conv/kernel"),
        ({"conv2d_transpose/kernel": (3, 3, 8, 8), "conv2d_transpose/bias": (8,)}, "conv2d_tr"),
        ({"conv2_d_transpose/w": (3, 3, 8, 4)}, "conv2_d_transpose/w"),
        ({"grouped_conv/kernel": (3, 3, 2, 8)}, "grouped_conv/kernel"),
        ({"conv_local/kernel": (6, 6, 36, 8), "conv_local/bias": (6, 6, 8)}, "conv_local"),
    ],
)
def test_a_convolution_that_may_be_of_another_kind_is_refused_until_its_layout_is_said(
    shapes, doubt
):
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    of = ("labels", "roles", "table", "muon", "scion", "plan")
    found = refusals(params, of=of)
    assert all(f"'{doubt}" in (message or "") for message in found.values()), found
    (path,) = (path for path in params if path.startswith(doubt) and "bias" not in path)
    for numbers in ("transposed", "depthwise", dm.layers.Grouped(1)):
        assert not any(refusals(params, {path: numbers}, of=of).values())


@pytest.mark.parametrize(("kernel", "bias"), [("kernel", "bias"), ("w", "b")])
@pytest.mark.parametrize("layout", [None, "in_out", "out_in"])
def test_a_kernel_beside_a_bias_as_long_as_its_fan_in_is_asked_for_its_layout(kernel, bias, layout):
    """Transformers' Conv1D keeps kernels (out, in) in Flax, and tutorials keep w so."""
    shape = (4, 9) if layout == "out_in" else (9, 4)
    params = {"c_fc": {kernel: jnp.ones(shape), bias: jnp.ones(9)}}
    of = ("labels", "roles", "table", "muon", "scion", "drop_muon", "plan")
    found = refusals(params, layout, of=of)
    words = f"'c_fc/{kernel}'", "length 9"
    assert all(word in str(x) for x in found.values() for word in words), found
    for numbers in ({f"c_fc/{kernel}": "out_in"}, {"c_fc": "in_out"}, MuonDimensionNumbers(1, 0)):
        assert not any(refusals(params, numbers, of=of).values())
    assert not any(refusals(params, "in_out" if layout == "out_in" else "out_in", of=of).values())


def test_a_kernel_of_one_channel_out_beside_its_bias_is_an_ordinary_one():
    for path, shape in {"out_conv": (3, 3, 8, 1), "conv_transpose": (3, 3, 8, 4)}.items():
        params = {path: {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1:])}}
        assert not any(refusals(params, of=("labels", "muon", "scion", "plan")).values())


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
