"""Models of Equinox, Haiku and Keras: the size of a first step, a run, and ways out of mistakes."""

import functools
import math
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 0.05
EXACT = {"orthogonalize": dm.orthogonalize.svd_polar_factor}
IMAGES = jax.random.normal(jax.random.key(0), (64, 6, 6, 3))  # as Haiku and Keras take them
TARGETS = jnp.sin(3 * IMAGES[:, :3, :3].mean((1, 2, 3)) + IMAGES[:, 0, 0, 0])[:, None]


def paths(tree: Any) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def take_first_step(loss_fn, params, layers, *args, **options) -> dict[str, np.ndarray]:
    """How far each leaf moves in a step of all layers, in units of the learning rate."""
    has_aux = options.pop("has_aux", False)
    sampler = dm.DepthSampler(layers, dm.full_depth(), seed=0)
    optimizer = dm.drop_muon(RATE, layers, **EXACT, **options)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, has_aux=has_aux, donate=False)
    new, *_ = step_fn(0, params, optimizer.init(params), *args)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64) / RATE, new, params)
    return paths(moved)


def check_first_step(moved, layout, due):
    """Every kernel moves by an orthogonal matrix times (fan-out / fan-in)^½, but at least 1.

    `due` has the Frobenius norm of the step, counted by hand from the shape of the layer.
    """
    for path, size in due.items():
        step = moved[path]
        matrix = step.reshape(len(step), -1).T if layout == "out_in" else step
        matrix = matrix.reshape(-1, matrix.shape[-1])
        fan_in, fan_out = matrix.shape
        singular_values = np.linalg.svd(matrix, compute_uv=False)
        factor = math.sqrt(max(1, fan_out / fan_in))
        np.testing.assert_allclose(singular_values, np.full(min(matrix.shape), factor), rtol=2e-3)
        assert np.linalg.norm(step) == pytest.approx(size, rel=2e-3), path
    for path in moved.keys() - due.keys():  # Adam's first step is of size 1 in every entry
        np.testing.assert_allclose(np.abs(moved[path]), 1, rtol=0.02, err_msg=path)


def check_run(loss_fn, params, layers, *args, num_steps=40, **options):
    """A run with uniform depths learns, and freezes what is not drawn."""
    layers = layers.group(2)  # fewer executables to compile
    sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=1)
    optimizer = dm.drop_muon(RATE, layers, **options)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, donate=False)
    state, losses, depths = optimizer.init(params), [], set()
    for step in range(num_steps):
        before = params
        params, state, loss = step_fn(step, params, state, *args)
        losses.append(float(loss))
        depths.add(depth := sampler.depth(step))
        moves = jax.tree.map(lambda a, b: bool((a != b).any()), params, before)
        assert moves == layers.mask(depth), step
    assert depths == set(range(layers.num_layers))
    assert losses[-1] < 0.5 * losses[0]


# --- Equinox: kernels are (out, in, *window) ------------------------------------------------------


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    squeeze: eqx.nn.Linear
    expand: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Any

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(3, 16, 3, key=keys[0])
        self.norm = eqx.nn.LayerNorm(16)
        self.squeeze = eqx.nn.Linear(16, 8, key=keys[1])
        self.expand = eqx.nn.Linear(8, 256, key=keys[2])
        self.head = eqx.nn.Linear(256, 1, key=keys[3])
        self.activation = jnp.tanh

    def __call__(self, image):
        x = self.norm(self.activation(self.conv(image)).mean((1, 2)))
        x = self.activation(self.expand(self.activation(self.squeeze(x))))
        return self.head(x)


@functools.cache
def equinox_network():
    model = EquinoxNet(jax.random.key(3))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, images, targets):
        outputs = jax.vmap(eqx.combine(params, static))(jnp.moveaxis(images, -1, 1))
        return jnp.mean((outputs - targets) ** 2)

    layers = dm.layers_by_path(params, [("conv", "norm"), "squeeze", "expand", "head"])
    return model, loss_fn, params, layers


def test_the_first_step_of_an_equinox_model_is_of_the_due_size():
    _, loss_fn, params, layers = equinox_network()
    args = (loss_fn, params, layers, IMAGES, TARGETS)
    moved = take_first_step(*args, dimension_numbers="out_in")
    due = {
        "conv/weight": 4,  # 27 → 16: √16
        "squeeze/weight": math.sqrt(8),  # 16 → 8
        "expand/weight": math.sqrt(256 / 8) * math.sqrt(8),
        "head/weight": 1,  # 256 → 1, of which (in, out) would have made √256
    }
    check_first_step(moved, "out_in", due)


def test_an_equinox_model_learns():
    _, loss_fn, params, layers = equinox_network()
    check_run(loss_fn, params, layers, IMAGES, TARGETS, dimension_numbers="out_in")


def test_an_equinox_model_without_its_layout_or_its_filter_is_an_error():
    model, _, params, layers = equinox_network()
    with pytest.raises(ValueError, match=r"'conv/weight' .*Equinox.*='out_in' or 'in_out'"):
        dm.drop_muon(0.1, layers).init(params)
    with pytest.raises(TypeError, match=r"eqx\.filter\(model, eqx\.is_inexact_array\)"):
        dm.layers_by_path(model, ["conv", "norm", "squeeze", "expand", "head"])
    with pytest.raises(TypeError, match=r"eqx\.filter\(model, eqx\.is_inexact_array\)"):
        dm.muon(0.1, dimension_numbers="out_in").init(model)


def test_the_layers_of_an_equinox_model_are_found_by_tracing():
    _, loss_fn, params, _ = equinox_network()
    layers = dm.trace_layers(loss_fn, params, IMAGES, TARGETS)
    assert layers.names == ("conv", "norm", "squeeze", "expand", "head")


RADII = dict.fromkeys(dm.layers.ROLES, 2.0)


@pytest.mark.parametrize("optimizer", ["muon", "scion", "gluon"])
def test_a_tree_of_kernels_out_in_steps_as_its_transpose_in_out(optimizer):
    _, _, params, _ = equinox_network()
    grads = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params
    )
    make = {
        "muon": lambda layout: dm.muon(1.0, dimension_numbers=layout, **EXACT),
        "scion": lambda layout: dm.scion(0.5, RADII, dimension_numbers=layout),
        "gluon": lambda layout: dm.gluon(1.0, RADII, dimension_numbers=layout),
    }[optimizer]

    def step(layout, params, grads):
        tx = make(layout)
        return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)

    def transposed(tree):  # (out, in, height, width) → (height, width, in, out)
        return jax.tree.map(
            lambda x: x.transpose(*range(2, x.ndim), 1, 0) if x.ndim > 1 else x, tree
        )

    def of_bias(tree):  # a bias of Equinox's convolution is (out, 1, 1)
        return eqx.tree_at(lambda m: m.conv.bias, tree, replace_fn=jnp.ravel)

    expected = transposed(of_bias(step("out_in", params, grads)))
    found = step("in_out", transposed(of_bias(params)), transposed(of_bias(grads)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected)


def test_stacked_layers_of_equinox_step_as_the_layers_alone():
    width, count = 6, 3
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(width, 2 * width, key=key))
    stack = {"blocks": make(jax.random.split(jax.random.key(0), count))}
    layers = dm.layers_by_path(stack, [dm.stacked("blocks")])
    options: dict[str, Any] = {"dimension_numbers": "out_in", **EXACT}
    tx = dm.drop_muon(0.1, layers, **options)
    updates, _ = jax.jit(tx.update, static_argnames="depth")(stack, tx.init(stack), stack, depth=1)
    alone = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(count)]
    single = dm.muon(0.1, **options)
    for i, row in enumerate(alone):
        expected, _ = jax.jit(single.update)(row, single.init(row), row)
        on = 0.0 if i == 0 else 1.0
        jax.tree.map(
            lambda x, y, i=i, on=on: np.testing.assert_allclose(x[i], on * y, atol=1e-6),
            updates,
            expected,
        )


# --- Haiku: kernels are called w and are (*window, in, out) ---------------------------------------


@functools.cache
def haiku_network():
    def forward(images, is_training):
        x = hk.Conv2D(16, 3, padding="VALID", name="stem")(images)
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)
        x = jnp.tanh(x).mean((1, 2))
        x = jnp.tanh(hk.nets.MLP([8, 256], activation=jnp.tanh, name="mlp")(x))
        return hk.Linear(1, name="head")(x)

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    params, statistics = network.init(jax.random.key(3), IMAGES, True)

    def loss_fn(params, statistics, images, targets):
        outputs, statistics = network.apply(params, statistics, images, True)
        return jnp.mean((outputs - targets) ** 2), statistics

    layers = dm.layers_by_path(params, [("stem", "norm"), "linear_0", "linear_1", "head"])
    return loss_fn, params, statistics, layers


def test_the_first_step_of_a_haiku_model_is_of_the_due_size():
    loss_fn, params, statistics, layers = haiku_network()
    args = (loss_fn, params, layers, statistics, IMAGES, TARGETS)
    moved = take_first_step(*args, has_aux=True)
    due = {
        "stem/w": 4,
        "mlp/~/linear_0/w": math.sqrt(8),
        "mlp/~/linear_1/w": math.sqrt(256 / 8) * math.sqrt(8),
        "head/w": 1,
    }
    # A bias in front of a norm has no gradient.
    np.testing.assert_array_less(np.abs(moved.pop("stem/b")), 1.02)
    # (1, 1, 1, 16), which is no matrix: the scale and the offset of the norm are Adam's.
    assert moved["norm/offset"].shape == moved["norm/scale"].shape == (1, 1, 1, 16)
    check_first_step(moved, "in_out", due)


def test_a_haiku_model_learns_and_its_statistics_advance():
    loss_fn, params, statistics, layers = haiku_network()
    sampler = dm.DepthSampler(layers := layers.group(2), dm.uniform_depth(), seed=1)
    optimizer = dm.drop_muon(RATE, layers)
    step_fn = dm.train_step(loss_fn, optimizer, sampler, has_aux=True)
    state, losses, first = optimizer.init(params), [], statistics
    for step in range(40):
        out = step_fn(step, params, state, statistics, IMAGES, TARGETS)
        params, state, (loss, statistics) = out
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    counters = [tree["norm/~/mean_ema"]["counter"] for tree in (first, statistics)]
    assert counters[1] - counters[0] == 40
    with pytest.raises(TypeError, match=r"'norm/~/mean_ema/counter' is an array of int32"):
        dm.layers_by_path(statistics, ["norm"])


# --- Keras on JAX: variables by their paths -------------------------------------------------------


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras")


@functools.cache
def keras_network(keras):
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
    order = [v.path for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]

    def loss_fn(params, images, targets):
        outputs, _ = model.stateless_call([params[path] for path in order], others, images)
        return jnp.mean((outputs - targets) ** 2)

    layers = dm.layers_by_path(params, [("stem", "norm"), "squeeze", "expand", "head"])
    return loss_fn, params, layers


def test_the_first_step_of_a_keras_model_is_of_the_due_size(keras):
    loss_fn, params, layers = keras_network(keras)
    moved = take_first_step(loss_fn, params, layers, IMAGES, TARGETS)
    due = {
        "net/stem/kernel": 4,
        "net/squeeze/kernel": math.sqrt(8),
        "net/expand/kernel": math.sqrt(256 / 8) * math.sqrt(8),
        "net/head/kernel": 1,
    }
    check_first_step(moved, "in_out", due)


def test_a_keras_model_learns(keras):
    loss_fn, params, layers = keras_network(keras)
    check_run(loss_fn, params, layers, IMAGES, TARGETS)


def test_keras_variables_by_path_have_the_roles_of_their_layers(keras):
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(7, 4, name="embedding")(inputs)
    x = keras.layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = keras.layers.GRU(4, name="gru")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    params = {v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables}
    labels = dm.matrix_labels(params)
    assert {path for path, of in labels.items() if of == "matrix"} == {
        "attention/query/kernel",
        "attention/key/kernel",
        "attention/value/kernel",
        "attention/attention_output/kernel",
        "gru/gru_cell/kernel",
        "gru/gru_cell/recurrent_kernel",
        "head/kernel",
    }
    with pytest.raises(ValueError, match=r"leaf 'attention/.*/kernel', of shape .*, are fan-in"):
        dm.muon(0.1).init(params)
    numbers = {
        **dict.fromkeys(("query", "key", "value"), MuonDimensionNumbers((0,), (1, 2))),
        "attention_output": MuonDimensionNumbers((0, 1), (2,)),
    }
    numbers = {f"{name}/kernel": of for name, of in numbers.items()}
    dm.muon(0.1, dimension_numbers=numbers).init(params)
