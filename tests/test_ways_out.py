"""Every way out that a message names is run, in the case of the message: it leads out.

`ways_out.txt` has the words of each message, where … stands for anything, and then a call that
raises it and, behind →, what the message says to do, as a user would write it with the names below.
"""

import ast
import functools  # noqa: F401 (in the table)
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np  # noqa: F401 (in the table)
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState  # noqa: F401 (in the table)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers as Numbers  # noqa: F401 (in the table)

import dropmuon_jax as dm
from dropmuon_jax._counterparts import COUNTERPARTS, names_counterparts

NAMES, ONES = ("stem", "mid", "head"), jnp.ones
X, Y = ONES((8, 3)), ONES((8, 16))
PARAMS = {name: {"kernel": jnp.eye(3), "bias": ONES(3)} for name in NAMES}
KERNELS = {name: {"kernel": jnp.eye(3)} for name in NAMES}
STACK = {"embed": ONES((16, 4)), "blocks": {"w": 0.1 * ONES((5, 4, 4)), "b": ONES((5, 4))}}
GREY = {"Conv_0/kernel": ONES((3, 3, 3, 8)), "Conv_1/kernel": ONES((3, 3, 1, 8))}
TURNED = jax.tree.map(lambda x: jnp.transpose(x, (3, 2, 0, 1)), GREY)
THREE = {"x": ONES((2, 3, 4))}
layers, stacked_layers, three_layers = (
    dm.layers_by_path(PARAMS, NAMES),
    dm.layers_by_path(STACK, ["embed", dm.stacked("blocks")]),
    dm.layers_by_path(THREE, [dm.stacked("x")]),
)
UNIFORM, SUBSETS = dm.uniform_depth(), dm.sampling.fixed_size_subsets(2)
TIMED = dm.time_aware_depth([3.0, 2.0, 1.0])
RADII, RADIUS = dict.fromkeys(dm.layers.ROLES, 1.0), dm.schedules.adaptive_radius(1.0, 1.0)
sampler = dm.DepthSampler(layers, UNIFORM, seed=0)
pairs = dm.DepthSampler(layers, UNIFORM, seed=0, steps_per_draw=2)
timed = dm.DepthSampler(layers, TIMED, seed=0)
link = dm.layer_mask_sampler(layers, UNIFORM, seed=0)
newton_schulz, spectral_norm = dm.orthogonalize.newton_schulz, dm.norms.spectral_norm
NORM, LMO, MVR = dm.norms.sign_norm(), dm.newton_schulz_lmo(), dm.mvr_momentum()
keep, per_layer, muon = dm.transforms.keep_prev_params(), dm.per_layer, dm.muon(0.1)
sgd, scion, track = optax.sgd(0.1), dm.scion(0.1, RADII), dm.planning.track_smoothness(NORM)
NET, LINEAR = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(0))
MODEL = eqx.nn.MLP(3, 3, 3, 1, key=jax.random.key(0))
arrays = lambda tree: eqx.filter(tree, eqx.is_inexact_array)  # noqa: E731
KEYS = jax.random.split(jax.random.key(0), 5)
HEADS = arrays(eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))(KEYS))
WEIGHT = {"a/weight": ONES((4, 3))}
MESH = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
SHARDINGS = jax.tree.map(lambda _: NamedSharding(MESH, PartitionSpec()), PARAMS)
PLACED = jax.device_put(PARAMS, SHARDINGS)


def norm_of_equinox() -> Any:
    return eqx.nn.BatchNorm(3, "batch", mode="batch")


def after(tx: Any, params: Any = PARAMS, state: Any = None, **extra: Any) -> Any:
    tx = optax.with_extra_args_support(tx)
    return tx.update(params, tx.init(params) if state is None else state, params, **extra)[1]


def step(*args: Any, **extra: Any) -> Any:
    """The same as a program, which is not compiled: what leads out of a message has no values."""
    return jax.eval_shape(lambda: after(*args, **extra))


def loss(params: Any, *args: Any) -> Any:
    return sum((jnp.sum(x**2) for x in jax.tree.leaves(params)), jnp.zeros(()))


def deep_loss(params: Any, names: Any = NAMES) -> Any:
    x = X
    for name in names:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.sum(x)


def scan(depth: Any, params: Any = STACK) -> Any:
    f = lambda h, row: (jnp.tanh(h @ row["w"] + row["b"]), None)  # noqa: E731
    return jnp.sum(dm.scan_layers(f, Y @ params["embed"], params["blocks"], depth=depth)[0])


def scanned_loss(params: Any, depth: Any) -> Any:
    return scan(stacked_layers.stack_depth(depth), params)


def lmo(shape: Any, numbers: Any = None, path: str = "net/kernel") -> Any:
    tx = dm.newton_schulz_lmo(dimension_numbers=numbers)
    return step(tx, {path: ONES(shape)})


def train(
    tx: Any, sampler: Any = sampler, at: int = 0, state: Any = None, f: Any = loss, of: Any = PARAMS
) -> Any:
    run = dm.train_step(f, tx, sampler, donate=False)
    return run(at, of, tx.init(of) if state is None else state)


def again(keep: Any = lambda params: params, **options: Any) -> None:
    """Two steps from the same parameters, of which the first is given what `keep` makes of them."""
    run, params = dm.train_step(loss, sgd, sampler, **options), jax.tree.map(jnp.copy, PARAMS)
    for make in (keep, lambda params: params):
        run(0, make(params), sgd.init(params))


def flagged(params: Any, train: bool) -> Any:
    return loss(params) if train else jnp.zeros(())


def masked_step(layer_mask: Any = None, depth: int | None = None) -> Any:
    return after(dm.momentum(), layer_mask=layers.mask(depth) if depth is not None else layer_mask)


def inject(make: Any, static_args: Any = (), **options: Any) -> Any:
    return optax.inject_hyperparams(make, static_args=static_args)(**options).init(KERNELS)


def parts(tx: Any, **options: Any) -> Any:
    labels = {"stem": "x", "mid": "x", "head": "y"}
    return optax.partition({"x": tx, "y": sgd}, labels, **options)


def check(tx: Any, of: Any = layers) -> None:
    dm.check_optimizer(tx, PARAMS, of)


def depths(f: Any, of: Any = layers, params: Any = PARAMS) -> Any:
    draws = dm.DepthSampler(of, UNIFORM, seed=0)
    tx = dm.drop_muon(0.1, of, roles=dm.Roles(has_head=False))
    return dm.check_depths(dm.train_step(f, tx, draws), of, params, tx.init(params))


def plain_step(params: Any, depth: int, grads_of: Any = None) -> Any:
    keep_or_step = lambda on, p, g: p - g if on else p  # noqa: E731
    return jax.tree.map(
        keep_or_step, layers.mask(depth), params, (grads_of or jax.grad(deep_loss))(params)
    )


def clipped(grads_of: Any, is_masked: bool = False) -> Any:
    """A step that clips all gradients together."""

    def step(params: Any, depth: int) -> Any:
        mask = {"layer_mask": layers.mask(depth)} if is_masked else {}
        clip = optax.clip_by_global_norm(1.0)
        return plain_step(params, depth, lambda p: clip.update(grads_of(p, **mask), None)[0])

    return jax.jit(step, static_argnames="depth")


LOOKUP = {"embed": ONES((9, 4)), "mid": jnp.eye(4), "head": jnp.eye(4)}
LOOKUP_LAYERS = dm.layers_by_path(LOOKUP, ["embed", "mid", "head"])
lookup_loss = lambda params: jnp.sum(  # noqa: E731
    jnp.tanh(params["embed"][jnp.arange(5)] @ params["mid"]) @ params["head"]
)
MANY = dm.layers_by_path({str(i): ONES(2) for i in range(20)}, [str(i) for i in range(20)])
INFINITE = jax.tree.map(lambda x: x * jnp.inf, PARAMS)
grads_of = dm.masked_value_and_grad(loss)
draws = lambda distribution: dm.DepthSampler(layers, distribution, seed=0)  # noqa: E731
tracker = lambda every: dm.planning.track_smoothness(NORM, every=every)  # noqa: E731
linked = lambda seed, steps_per_draw: dm.layer_mask_sampler(  # noqa: E731
    layers, UNIFORM, seed=seed, steps_per_draw=steps_per_draw
)
steps, wrapper = optax.MultiSteps(sgd, 2), optax.MultiSteps(dm.momentum(), 1)
lossy = wrapper.gradient_transformation()
wrapper_of_two = optax.GradientTransformationExtraArgs(steps.init, steps.update)
recorded, gathering = dm.record_gains(sgd, timed), dm.accumulate(sgd, pairs)
schedule = lambda count: 0.5 / (count + 1)  # noqa: E731
ball = dm.contrib.broximal.broximal_point(1.0, NORM, num_steps=1)
pruned, with_gradient = dm.contrib.pruning.keep_pruned(sgd, {}), jax.value_and_grad(loss)
stacked = lambda state: jax.tree.map(lambda x: jnp.stack([x, x]), state)  # noqa: E731


Parts, COMPLEX = dm.layers.Parts, {"a": ONES((3, 3)) + 1j}
UNEVEN = {"a": ONES((2, 4)), "b": ONES((4, 3))}
TURNED_STACK = {"blocks": {"w": 0.1 * ONES((4, 3, 4)), "shift": ONES((4, 3))}}
turned_layers = lambda axis: dm.layers_by_path(  # noqa: E731
    TURNED_STACK, [dm.stacked("blocks", axis=axis)]
)
cheaper = dm.DepthSampler(layers, dm.time_aware_depth([5.0, 2.0, 1.0]), seed=0)
reseeded = dm.DepthSampler(layers, TIMED, seed=1)


def turned_loss(axis: int) -> Any:
    f = lambda h, row: (jnp.tanh(h @ row["w"] + row["shift"]), None)  # noqa: E731

    def loss(params: Any, depth: Any) -> Any:
        depth = turned_layers(axis).stack_depth(depth)
        return jnp.sum(dm.scan_layers(f, Y[:, :4], params["blocks"], depth=depth, axis=1)[0])

    return loss


def joined(tx: Any, **extra: Any) -> Any:
    """A step of complex parameters by their parts."""
    params = dm.layers.split_complex(COMPLEX)
    grads = jax.grad(lambda p: jnp.sum(jnp.abs(dm.layers.join_complex(p)["a"]) ** 2))(params)
    return tx.update(grads, tx.init(params), params, **extra)


ef21, RankK, TOP = dm.compression.ef21, dm.compression.RankK, dm.compression.TopK(1)
ONE_WORKER = jax.tree.map(lambda x: x[None], PARAMS)
beside = lambda count: dm.compression.on_workers(ef21(TOP), count)  # noqa: E731
on_one = lambda tx: step_of_one(dm.compression.on_workers(tx, 1))  # noqa: E731
left_out = lambda grads, state, params: (jax.tree.map(jnp.zeros_like, params), state)  # noqa: E731
step_of_one = lambda tx: tx.update(ONE_WORKER, tx.init(PARAMS), PARAMS)  # noqa: E731
send = lambda compressor, params: ef21(compressor, axis=None).init(params)  # noqa: E731
of_server = lambda of, **options: dm.compression.server_model(sgd, of, **options)  # noqa: E731


def in_shard_map(is_cast: bool) -> Any:
    """A worker's step on the mesh of one device, whose axis is "x"."""
    tx = ef21(TOP, axis="x")
    specs = dm.compression.worker_specs(tx.init(PARAMS), "x")

    def step(params: Any, state: Any) -> Any:
        of_worker = jax.lax.pcast(params, "x", to="varying") if is_cast else params
        state = jax.tree.map(lambda x, spec: x[0] if len(spec) else x, state, specs)
        return tx.update(jax.grad(loss)(of_worker), state, params)[0]

    state = dm.compression.on_workers(tx, 1, axis="x").init(PARAMS)
    mapped = jax.shard_map(
        step, mesh=MESH, in_specs=(PartitionSpec(), specs), out_specs=PartitionSpec()
    )
    return jax.jit(mapped)(PARAMS, state)


def send_rows(depth: Any) -> Any:
    tx = dm.compression.drop_ef21_muon(0.1, stacked_layers, TOP, axis=None)
    return step(tx, STACK, depth=depth)


# Raised by several processes alone, whose way out tests/pods/process.py takes.
ON_PODS = "out_shardings=dm.state_shardings(tx, params) for the optimizer state"
TABLE = Path(__file__).with_suffix("").with_name("ways_out.txt").read_text().splitlines()
CASES, MESSAGES = [], [ON_PODS]
for line in TABLE:
    if line.startswith("    "):
        bad, goods = line.strip().split(" → ")
        words = MESSAGES[-1]
        CASES.append(pytest.param(words, bad, goods.split(" ; "), id=f"{words}-{bad}"))
    elif line and not line.startswith("# "):
        MESSAGES.append(line)


def parts_of(words: str) -> str:
    return ".*".join(map(re.escape, re.split(" ?… ?", words)))


@pytest.mark.parametrize(("words", "bad", "goods"), CASES)
def test_the_way_out_of_a_message_leads_out(words, bad, goods):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            eval(bad, globals())
        except (TypeError, ValueError, RuntimeError) as error:
            told = [error]
    told += [note for of in told for note in getattr(of, "__notes__", [])]
    assert re.search(f"(?s){parts_of(words)}", "\n".join(map(str, told)))
    for good in goods:
        eval(good, globals())


# What a function needs besides, as in a user's call.
NEEDED: dict[str, Any] = {
    "learning_rate": 0.1,
    "layers": layers,
    "radii": RADII,
    "norm": NORM,
    "transforms": {"all": sgd},
    "labels": "all",
    "optimizer": sgd,
    "sampler": sampler,
    "loss_fn": loss,
    "depth_distribution": UNIFORM,
    "seed": 0,
}


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_what_says_the_same_as_the_argument_of_another_optimizer_runs(name):
    places = (dm, dm.transforms, dm.orthogonalize, dm.norms)
    function = next(getattr(place, name) for place in places if hasattr(place, name))
    known = inspect.signature(function).parameters.values()
    given = {of.name: NEEDED[of.name] for of in known if of.default is of.empty}
    for argument, says in COUNTERPARTS[name].items():
        assert argument not in inspect.signature(function).parameters
        with pytest.raises(TypeError, match=re.escape(f"no argument '{argument}': say {says}.")):
            function(**given, **{argument: None})
        code = says.split(";")[0]
        if re.match(r"\w+=", code):
            function(**given | eval(f"dict({code})", globals()))
        else:
            eval(code, globals())


def strings(path: Path) -> Any:
    """The strings of a module that are no docstrings, … in the place of what is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    inside = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    inside |= {id(x) for node in nodes if isinstance(node, ast.JoinedStr) for x in node.values}
    for node in nodes:
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(x.value if isinstance(x, ast.Constant) else "…" for x in node.values)


def test_every_message_that_names_code_has_its_way_out_run():
    code = re.compile(r"\b(dm|optax|jax|jnp|nnx|eqx|layers|sampler|tx|optimizer)\.\w")
    files = {*Path(dm.__file__).parent.rglob("*.py")} - {Path(inspect.getfile(names_counterparts))}
    messages = {text for path in files for text in strings(path) if code.search(text)}
    patterns = [re.compile(f"(?s){parts_of(words)}") for words in MESSAGES]
    missing = [text for text in messages if not any(of.search(text) for of in patterns)]
    assert not missing
    stale = [of.pattern for of in patterns if not any(map(of.search, messages))]
    assert not stale
