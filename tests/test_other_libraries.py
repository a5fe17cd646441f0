"""Models of Equinox, Haiku and Keras: the size of a first step, a run, and ways out of mistakes."""

import functools
import math
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

RATE = 0.05
EXACT = {"orthogonalize": dm.orthogonalize.svd_polar_factor}
IMAGES = jax.random.normal(jax.random.key(0), (64, 6, 6, 3))  # as Haiku and Keras take them
TARGETS = jnp.sin(3 * IMAGES[:, :3, :3].mean((1, 2, 3)) + IMAGES[:, 0, 0, 0])[:, None]
# The Frobenius norm of a first step over the rate, counted by hand from the shapes of the layers.
DUE = {
    "stem": 4,  # 27 → 16: √16
    "squeeze": math.sqrt(8),  # 16 → 8
    "expand": math.sqrt(256 / 8) * math.sqrt(8),
    "head": 1,  # 256 → 1, of which the wrong layout would make √256
}


def by_path(tree: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in flat
    }


def check_first_step(moves: dict[str, np.ndarray], kernel: str, layout: str) -> None:
    """Every kernel moves by an orthogonal matrix times (fan-out / fan-in)^½, but at least 1."""
    due = dict(DUE)
    for path, step in moves.items():
        layer = next((name for name in DUE if path.endswith(f"{name}/{kernel}")), None)
        if layer is None:  # Adam's first step is of size 1 in every entry
            np.testing.assert_allclose(np.abs(step), 1, rtol=0.02, err_msg=path)
            continue
        matrix = step.reshape(len(step), -1).T if layout == "out_in" else step
        matrix = matrix.reshape(-1, matrix.shape[-1])
        fan_in, fan_out = matrix.shape
        singular_values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(singular_values, max(1, fan_out / fan_in) ** 0.5, rtol=2e-3)
        assert np.linalg.norm(step) == pytest.approx(due.pop(layer), rel=2e-3), path
    assert not due


def check_run(
    loss_fn: Any,
    params: Any,
    layers: dm.Layers,
    *data: Any,
    kernel: str,
    layout: str = "in_out",
    statistics: Any = None,
    has_no_gradient: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """A run whose first step is of the due size; it freezes what is not drawn, and it learns."""
    layers = layers.group(2)  # fewer executables to compile
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=1)
    assert sampler.depth(0) == 0
    optimizer = dm.drop_muon(RATE, layers, **EXACT, **options)
    has_aux = statistics is not None
    step_fn = dm.train_step(loss_fn, optimizer, sampler, has_aux=has_aux, donate=False)
    state, losses = optimizer.init(params), []
    for step in range(40):
        before = by_path(params)
        args = (statistics, *data) if has_aux else data
        params, state, loss = step_fn(step, params, state, *args)
        loss, statistics = loss if has_aux else (loss, None)
        losses.append(float(loss))
        moves = {path: (before[path] - leaf) / RATE for path, leaf in by_path(params).items()}
        if step == 0:
            of_bias = [np.abs(moves.pop(path)).max() for path in has_no_gradient]
            assert all(size < 1.02 for size in of_bias)
            check_first_step(moves, kernel, layout)
        for path, is_active in by_path(layers.mask(sampler.depth(step))).items():
            assert is_active or not moves[path].any()
    assert {sampler.depth(step) for step in range(40)} == {0, 1}
    assert losses[-1] < 0.5 * losses[0]
    return statistics


# --- Equinox: kernels are (out, in, *window) ------------------------------------------------------


class EquinoxNet(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    squeeze: eqx.nn.Linear
    expand: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Any = jnp.tanh

    def __call__(self, image):
        x = self.norm(self.activation(self.stem(image)).mean((1, 2)))
        x = self.activation(self.expand(self.activation(self.squeeze(x))))
        return self.head(x)


def test_an_equinox_model_learns_in_steps_of_the_due_size():
    keys = jax.random.split(jax.random.key(3), 4)
    model = EquinoxNet(
        stem=eqx.nn.Conv2d(3, 16, 3, key=keys[0]),
        norm=eqx.nn.LayerNorm(16),
        squeeze=eqx.nn.Linear(16, 8, key=keys[1]),
        expand=eqx.nn.Linear(8, 256, key=keys[2]),
        head=eqx.nn.Linear(256, 1, key=keys[3]),
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, images, targets):
        outputs = jax.vmap(eqx.combine(params, static))(jnp.moveaxis(images, -1, 1))
        return jnp.mean((outputs - targets) ** 2)

    traced = dm.trace_layers(loss_fn, params, IMAGES, TARGETS)
    assert traced.names == ("stem", "norm", "squeeze", "expand", "head")
    layers = dm.layers_by_path(params, [("stem", "norm"), "squeeze", "expand", "head"])
    # The modules say how they keep their weights; in a tree without them somebody has to.
    check_run(loss_fn, params, layers, IMAGES, TARGETS, kernel="weight", layout="out_in")
    with pytest.raises(ValueError, match=r"'stem/weight' .*Equinox.*='out_in' or 'in_out'"):
        dm.muon(0.1).init({"stem/weight": params.stem.weight})
    for call in (
        lambda: dm.layers_by_path(model, traced.names),
        lambda: dm.muon(0.1, dimension_numbers="out_in").init(model),
    ):
        with pytest.raises(TypeError, match=r"eqx\.filter\(model, eqx\.is_inexact_array\)"):
            call()


KEY = jax.random.key(0)
# What each leaf of a layer is, and of a matrix the groups and the shape (fan-in, fan-out) of one.
EQUINOX: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (eqx.nn.Linear(8, 32, key=KEY), {"weight": (1, 8, 32)}),
    "one": (eqx.nn.Linear(8, "scalar", key=KEY), {"weight": (1, 8, 1)}),
    "conv1d": (eqx.nn.Conv1d(3, 16, 5, key=KEY), {"weight": (1, 15, 16)}),
    "conv2d": (eqx.nn.Conv2d(3, 16, (7, 2), key=KEY), {"weight": (1, 42, 16)}),
    "conv3d": (eqx.nn.Conv3d(3, 16, 2, key=KEY), {"weight": (1, 24, 16)}),
    "grey": (eqx.nn.Conv2d(1, 16, 3, key=KEY), {"weight": (1, 9, 16)}),
    "transposed": (eqx.nn.ConvTranspose2d(3, 16, 3, key=KEY), {"weight": (1, 27, 16)}),
    "depthwise": (eqx.nn.Conv2d(6, 12, 3, groups=6, key=KEY), {"weight": (6, 9, 2)}),
    "grouped": (eqx.nn.ConvTranspose1d(6, 8, 3, groups=2, key=KEY), {"weight": (2, 9, 4)}),
    "lstm": (eqx.nn.LSTMCell(4, 8, key=KEY), {"weight_ih": (1, 4, 32), "weight_hh": (1, 8, 32)}),
    "gru": (eqx.nn.GRUCell(4, 8, key=KEY), {"weight_ih": (1, 4, 24), "weight_hh": (1, 8, 24)}),
    "attention": (eqx.nn.MultiheadAttention(2, 8, key=KEY), {"query_proj/weight": (1, 8, 8)}),
    "tok": (eqx.nn.Embedding(20, 8, key=KEY), {}),
    "norm": (eqx.nn.LayerNorm((5, 8)), {}),
    "prelu": (eqx.nn.PReLU(jnp.ones((8, 4))), {}),
    "weight_norm": (eqx.nn.WeightNorm(eqx.nn.Linear(8, 5, key=KEY)), {"layer/weight": (1, 8, 5)}),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_every_layer_of_equinox_steps_by_its_own_matrices(name):
    layer, matrices = EQUINOX[name]
    params = {name: eqx.filter(layer, eqx.is_inexact_array)}
    labels = by_path(jax.tree.map(lambda x: x == "matrix", dm.matrix_labels(params)))
    tables = (dm.Roles(has_head=False).table(params, of) for of in (None, "out_in", "in_out"))
    assert len({*tables}) == 1
    others = {path for path, is_matrix in labels.items() if not is_matrix}
    due = {f"{name}/{path}": shape for path, shape in matrices.items()}
    assert not others & set(due)
    assert {path.rpartition("/")[2] for path in set(labels) - others - set(due)} <= {"weight"}
    grads = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), params)
    # The layout of a whole tree is for leaves of which no module says it.
    tx = dm.muon(1.0, dimension_numbers="in_out", **EXACT)
    steps = by_path(jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])(grads))
    for path, (groups, fan_in, fan_out) in due.items():
        for part in np.split(steps[path], groups):  # each (out, in, *window)
            values = np.linalg.svd(part.reshape(fan_out, fan_in), compute_uv=False)
            np.testing.assert_allclose(values, max(1, fan_out / fan_in) ** 0.5, rtol=1e-4)


def test_several_layers_of_equinox_in_one_are_no_window():
    make = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 4, 3, key=key))
    params = {"net": make(jax.random.split(KEY, 3))}
    for numbers in (None, "out_in"):
        with pytest.raises(
            ValueError, match=r"'net/weight' .* than the weight of one Conv2d.*dm\.st"
        ):
            dm.muon(0.1, dimension_numbers=numbers).init(params)
    axes = MuonDimensionNumbers((2, 3, 4), 1)
    dm.muon(0.1, dimension_numbers={"net/weight": axes}).init(params)
    dm.drop_muon(0.1, dm.layers_by_path(params, [dm.stacked("net")])).init(params)


@pytest.mark.parametrize("name", ["scion", "gluon"])
def test_a_tree_of_kernels_out_in_steps_as_its_transpose_in_out(name):
    rng = np.random.default_rng(0)
    shapes = {"conv": (4, 3, 2, 2), "hidden": (6, 4), "head": (1, 6), "bias": (4,)}
    grads = {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}
    radii = dict.fromkeys(dm.layers.ROLES, 2.0)

    def step(layout, grads):
        tx = getattr(dm, name)(0.5, radii, dimension_numbers=layout)
        return jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads)[0])(grads)

    def transposed(x):  # (out, in, height, width) → (height, width, in, out)
        return x.transpose(*range(2, x.ndim), 1, 0) if x.ndim > 1 else x

    found = step("in_out", jax.tree.map(transposed, grads))
    expected = jax.tree.map(transposed, step("out_in", grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_stacked_layers_of_equinox_step_as_the_layers_alone():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 12, key=key))
    stack = {"blocks": make(jax.random.split(jax.random.key(0), 3))}
    layers = dm.layers_by_path(stack, [dm.stacked("blocks")])
    options: dict[str, Any] = {"dimension_numbers": "out_in", **EXACT}
    tx, single = dm.drop_muon(0.1, layers, **options), dm.muon(0.1, **options)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, depth=1))(stack)
    of_one = jax.jit(lambda p: single.update(p, single.init(p), p))
    for i in range(3):
        row, of_row = (
            jax.tree.map(lambda x, i=i: np.asarray(x)[i], tree) for tree in (stack, updates)
        )
        alone, _ = of_one(row)
        due = jax.tree.map(lambda x, i=i: x if i >= 1 else 0 * x, alone)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), of_row, due)


# --- Haiku: kernels are called w and are (*window, in, out) ---------------------------------------


def test_a_haiku_model_learns_in_steps_of_the_due_size_and_its_statistics_advance():
    def forward(images, is_training):
        x = hk.Conv2D(16, 3, padding="VALID", name="stem")(images)
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)
        x = jnp.tanh(hk.Linear(8, name="squeeze")(jnp.tanh(x).mean((1, 2))))
        return hk.Linear(1, name="head")(jnp.tanh(hk.Linear(256, name="expand")(x)))

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, first = network.init(jax.random.key(3), IMAGES, True)
    assert params["norm"]["scale"].shape == (1, 1, 1, 16)  # which is no matrix

    def loss_fn(params, statistics, images, targets):
        outputs, statistics = network.apply(params, statistics, images, True)
        return jnp.mean((outputs - targets) ** 2), statistics

    layers = dm.layers_by_path(params, [("stem", "norm"), "squeeze", "expand", "head"])
    options = {"statistics": first, "has_no_gradient": ("stem/b",)}  # in front of a norm
    last = check_run(loss_fn, params, layers, IMAGES, TARGETS, kernel="w", **options)
    counters = [tree["norm/~/mean_ema"]["counter"] for tree in (first, last)]
    assert counters[1] - counters[0] == 40
    with pytest.raises(TypeError, match=r"'norm/~/mean_ema/counter' is an array of int32"):
        dm.layers_by_path(last, ["norm"])


TURNED = functools.partial(nn.ConvTranspose, transpose_kernel=True)
# What a layer of Haiku or Flax is called, what makes it, the leaf in doubt, and what it is.
CONVOLUTIONS: dict[str, tuple[Any, Any]] = {
    "haiku": (lambda x: hk.Conv2D(8, 3)(x), None),
    "haiku_transpose": (lambda x: hk.Conv2DTranspose(8, 3)(x), "transposed"),
    "haiku_transpose_square": (lambda x: hk.Conv2DTranspose(4, 3)(x), "transposed"),
    "haiku_no_bias": (lambda x: hk.Conv2DTranspose(8, 3, with_bias=False)(x), "transposed"),
    "haiku_depthwise": (lambda x: hk.DepthwiseConv2D(1, 3)(x), "depthwise"),
    "haiku_multiplier": (lambda x: hk.DepthwiseConv2D(2, 3)(x), dm.layers.Grouped(4)),
    "flax": (nn.Conv(8, (3, 3)), None),
    "flax_in": (nn.ConvTranspose(8, (3, 3)), None),
    "flax_in_square": (nn.ConvTranspose(4, (3, 3)), "in_out"),
    "flax_in_no_bias": (nn.ConvTranspose(8, (3, 3), use_bias=False), "in_out"),
    "flax_out": (TURNED(8, (3, 3)), "transposed"),
    "flax_out_square": (TURNED(4, (3, 3)), "transposed"),
    "flax_out_no_bias": (TURNED(8, (3, 3), use_bias=False), "transposed"),
    "flax_out_pointwise": (TURNED(2, (1, 1), use_bias=False), "transposed"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_other_layouts_are_refused_until_one_argument_says_which(name):
    layer, layout = CONVOLUTIONS[name]
    init = layer.init if isinstance(layer, nn.Module) else hk.transform(layer).init
    params = jax.jit(init)(KEY, np.ones((1, 8, 8, 4), "f"))
    params = {"ConvTranspose_0": params["params"]} if "params" in params else params
    if layout is None:
        dm.muon(0.1).init(params)
        return
    (leaf,) = (path for path, x in by_path(params).items() if x.ndim == 4)
    with pytest.raises(ValueError, match=rf"'{leaf}' .*may be a .*convolution.*'transposed'"):
        dm.muon(0.1).init(params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), params)
    tx = dm.muon(1.0, dimension_numbers={leaf: layout}, **EXACT)
    step = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])(grads)
    step = by_path(step)[leaf]
    if layout == "transposed":  # fan-in 9 · 4
        step = step.swapaxes(-1, -2)
    parts = np.split(step, 1 if layout in ("transposed", "in_out") else 4, axis=-1)
    for matrix in (part.reshape(-1, part.shape[-1]) for part in parts):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix.T)), atol=1e-4)


# --- Keras on JAX: variables by their paths -------------------------------------------------------


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras")


def test_a_keras_model_learns_in_steps_of_the_due_size(keras):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.layers.Input((6, 6, 3)),
            keras.layers.Conv2D(16, 3, activation="tanh", name="stem"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(8, activation="tanh", name="squeeze"),
            keras.layers.Dense(256, activation="tanh", name="expand"),
            keras.layers.Dense(1, name="head"),
        ],
        name="net",
    )
    params = {v.path: v.value for v in model.trainable_variables}
    order, others = [*params], [v.value for v in model.non_trainable_variables]

    def loss_fn(params, images, targets):
        outputs, _ = model.stateless_call([params[path] for path in order], others, images)
        return jnp.mean((outputs - targets) ** 2)

    layers = dm.layers_by_path(params, [("stem", "norm"), "squeeze", "expand", "head"])
    check_run(loss_fn, params, layers, IMAGES, TARGETS, kernel="kernel")


def test_keras_variables_by_path_have_the_roles_of_their_layers(keras):
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(7, 4, name="embedding")(inputs)
    x = keras.layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = keras.layers.GRU(4, name="gru")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    params = {v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables}
    labels = dm.matrix_labels(params)
    assert {path for path, of in labels.items() if of == "matrix"} == {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")),
        *(f"gru/gru_cell/{name}" for name in ("kernel", "recurrent_kernel")),
        "head/kernel",
    }
    with pytest.raises(ValueError, match=r"leaf 'attention/.*/kernel', of shape .*, are fan-in"):
        dm.muon(0.1).init(params)
    numbers = {
        **dict.fromkeys(("query", "key", "value"), MuonDimensionNumbers((0,), (1, 2))),
        "attention_output": MuonDimensionNumbers((0, 1), (2,)),
    }
    dm.newton_schulz_lmo(dimension_numbers={f"{k}/kernel": v for k, v in numbers.items()}).init(
        {path: x for path, x in params.items() if labels[path] == "matrix"}
    )
