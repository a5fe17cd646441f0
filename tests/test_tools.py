"""The page on working with other tools: what it says of each is so, and its code runs."""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dropmuon_jax as dm

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "working_with_other_tools.md").read_text()
NAMES = ("stem", "mid", "head")
PARAMS = {
    name: {"kernel": jnp.cos(jnp.arange(9.0).reshape(3, 3) + i), "bias": jnp.ones(3) * (i + 1)}
    for i, name in enumerate(NAMES)
}
LAYERS = dm.layers_by_path(PARAMS, NAMES)
MASK, LABELS = LAYERS.mask(1), {"stem": "frozen", "mid": "train", "head": "train"}
TX, SGD = dm.drop_muon(0.1, LAYERS), optax.sgd(0.1)
FREEZE = dm.layer_mask_sampler(LAYERS, dm.uniform_depth(), seed=0)
SAMPLER = dm.DepthSampler(LAYERS, dm.uniform_depth(), seed=0, steps_per_draw=2)
SETTLED = {"train": TX, "frozen": optax.set_to_zero()}
NO_MASK = "unexpected keyword argument 'layer_mask'"
contrib, transforms = optax.contrib, optax.transforms


def loss_fn(params: Any) -> jax.Array:
    return sum((jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params)), jnp.zeros(()))


def moves(tx: Any, params: Any = PARAMS, by: str = "layer_mask", **extra: Any) -> dict[str, bool]:
    """Which layers move in steps of depth 1, behind two steps of all layers."""
    tx = optax.with_extra_args_support(tx)
    state, before = tx.init(params), params
    for depth in (0, 0, 1, 1, 1):
        which = {"depth": depth} if by == "depth" else {"layer_mask": LAYERS.mask(depth)}
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, **which, **extra)
        params = optax.apply_updates(params, updates)
        before = before if depth else params
    return {
        name: any(
            not np.array_equal(x, y)
            for x, y in zip(*map(jax.tree.leaves, (before[name], params[name])), strict=True)
        )
        for name in NAMES
    }


def freezes(tx: Any, **kwargs: Any) -> None:
    assert moves(tx, **kwargs) == {"stem": False, "mid": True, "head": True}


def unfreezes(tx: Any, **kwargs: Any) -> None:
    assert moves(tx, **kwargs)["stem"]


def refuses(words: str, call: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        call(*args, **kwargs)


def updated(tx: Any, grads: Any = PARAMS, params: Any = PARAMS, **extra: Any) -> Any:
    return optax.with_extra_args_support(tx).update(grads, tx.init(params), params, **extra)


def train_state() -> None:
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=TX)
    refuses("TrainState", state.apply_gradients, grads=PARAMS, layer_mask=MASK)


def multi_steps() -> None:
    steps = optax.MultiSteps(TX, 2)
    refuses("missing", updated, steps.gradient_transformation(), layer_mask=MASK)
    freezes(passing := optax.GradientTransformationExtraArgs(steps.init, steps.update))
    refuses("two depths", dm.check_optimizer, passing, PARAMS, LAYERS)
    step = dm.train_step(loss_fn, passing, SAMPLER)
    refuses("two depths", step, 0, PARAMS, passing.init(PARAMS))
    freezes(dm.accumulate(TX, SAMPLER))


def lookahead() -> None:
    tx, params = optax.lookahead(SGD, 2, 0.5), optax.LookaheadParams.init_synced(PARAMS)
    refuses(NO_MASK, tx.update, PARAMS, tx.init(params), params, layer_mask=MASK)


def sam() -> None:
    for opaque in (False, True):
        tx = contrib.sam(TX, SGD, opaque_mode=opaque)
        refuses(NO_MASK, tx.update, PARAMS, tx.init(PARAMS), PARAMS, layer_mask=MASK)


def complex_leaves() -> None:
    refuses("missing", updated, contrib.split_real_and_imaginary(TX), layer_mask=MASK)
    params = {"w": jnp.eye(3) + 1j}
    updated(contrib.split_real_and_imaginary(dm.muon(0.1)), params, params)
    updated(dm.muon(0.1), parts := {"re": params["w"].real, "im": params["w"].imag}, parts)


def line_search() -> None:
    tx, loss = optax.chain(TX, optax.scale_by_backtracking_linesearch(5)), loss_fn(PARAMS)
    known = {"value": loss, "grad": PARAMS}
    refuses("not consumed", moves, tx, value_fn=loss_fn, **known)
    freezes(tx, value_fn=lambda params, layer_mask: loss_fn(params), **known)


def subtrees() -> None:
    for split in (optax.partition, optax.multi_transform):
        refuses("chain_subtrees", moves, split(SETTLED, LABELS))
        freezes(split(SETTLED, LABELS), by="depth")
    freezes(optax.partition(SETTLED, LABELS, mask_compatible_extra_args=True))
    freezes(dm.chain_subtrees(SETTLED, LABELS))


def selective() -> None:
    flags = {name: name == "stem" for name in NAMES}
    refuses("chain_subtrees", moves, tx := transforms.selective_transform(TX, freeze_mask=flags))
    freezes(tx, by="depth")


def injected() -> None:
    freezes(optax.inject_hyperparams(dm.drop_muon)(0.1, LAYERS))
    matrices = lambda params: jax.tree.map(lambda x: jnp.ndim(x) == 2, params)  # noqa: E731
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "weight_decay_mask": matrices}
    called = optax.inject_hyperparams(dm.muon)(**options)  # with the step, which is no matrix
    named = optax.inject_hyperparams(dm.muon, static_args="weight_decay_mask")(**options)
    without, decayed = (updated(tx)[0]["mid"]["kernel"] for tx in (called, named))
    np.testing.assert_allclose(without - decayed, 0.05 * PARAMS["mid"]["kernel"], atol=1e-6)


def finite() -> None:
    freezes(optax.apply_if_finite(TX, 3))
    freezes(dm.drop_muon(0.1, LAYERS, momentum=optax.apply_if_finite(dm.momentum(), 3)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for tx in (dm.muon(0.1), optax.adam(0.1)):
        refuses("equal output types", updated, optax.apply_if_finite(tx, 3), half)


def remembering() -> None:
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    for link in (optax.trace(0.9), optax.ema(0.9), noise, optax.add_decayed_weights(-0.1)):
        unfreezes(optax.chain(TX, link))
        freezes(optax.chain(TX, link, FREEZE))


def schedule_free() -> None:
    free = contrib.schedule_free
    unfreezes(free(TX, 0.1, b1=0.9))
    freezes(tx := optax.chain(free(TX, 0.1, b1=0.9), FREEZE))
    contrib.schedule_free_eval_params(tx.init(PARAMS)[0], PARAMS)
    freezes(dm.per_layer(free(dm.muon(0.1), 0.1, b1=0.9), LAYERS))


def conditional() -> None:
    early = lambda step, **extra: step < 2  # noqa: E731
    unfreezes(optax.conditionally_transform(TX, early))
    assert not any(moves(optax.conditionally_mask(TX, early)).values())


def masked() -> None:
    for by in ("depth", "layer_mask"):
        unfreezes(
            optax.masked(TX, {n: n != "stem" for n in NAMES}, mask_compatible_extra_args=True),
            by=by,
        )
    freezes(dm.chain_subtrees(SETTLED, LABELS))


def lora() -> None:
    model = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    tx = dm.drop_muon(0.1, dm.layers_by_path(nnx.state(model, nnx.LoRAParam), ["lora"]))
    loss = lambda model: jnp.sum(model(jnp.ones((2, 3))) ** 2)  # noqa: E731
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    nnx.Optimizer(model, tx, wrt=nnx.LoRAParam).update(model, grads, depth=0)
    after = nnx.to_pure_dict(nnx.state(model))
    assert np.array_equal(before["kernel"], after["kernel"])
    assert not np.array_equal(before["lora"]["lora_b"], after["lora"]["lora_b"])
    step = dm.train_step(loss, tx, SAMPLER)  # of every nnx.Param
    refuses("in no layer", step, 0, model, tx.init(nnx.state(model, nnx.LoRAParam)))


def average() -> None:
    params = jax.tree.map(jnp.copy, PARAMS)
    ema, copied = params, jax.tree.map(jnp.copy, params)
    params, _, _ = dm.train_step(loss_fn, TX, SAMPLER)(0, params, TX.init(params))
    refuses("deleted", optax.incremental_update, params, ema, 0.01)
    optax.incremental_update(params, copied, 0.01)


def frozen() -> None:
    freezes(dm.chain_subtrees(SETTLED, LABELS))
    trained, _ = eqx.partition(PARAMS, {"stem": False, "mid": True, "head": True})
    tx = dm.drop_muon(0.1, dm.layers_by_path(trained, ["mid", "head"]))
    updated(tx, trained, trained, depth=1)


# By the first words of a row; where other tests show it, their names.
ROWS: dict[str, Any] = {
    "`optax.chain`": lambda: freezes(optax.named_chain(("x", optax.chain(optax.clip(1.0), TX)))),
    "`optax.inject_hyperparams`": injected,
    "`optax.apply_if_finite`": finite,
    "`optax.conditionally_mask`": conditional,
    "`optax.contrib.reduce_on_plateau`": lambda: freezes(
        optax.chain(TX, contrib.reduce_on_plateau()), value=1.0
    ),
    "`nnx.Optimizer`": ("test_an_nnx_optimizer_takes_the_steps_of_optax_on_the_pure_state",),
    "`optax.transforms.freeze`": lambda: freezes(
        optax.chain(TX, transforms.freeze({n: n == "stem" for n in NAMES}))
    ),
    "`TrainState`": train_state,
    "`optax.MultiSteps`": multi_steps,
    "`optax.lookahead`": lookahead,
    "`optax.contrib.sam`": sam,
    "`optax.contrib.split_real_and_imaginary`": complex_leaves,
    "`optax.flatten`": lambda: refuses("is in no layer", moves, optax.flatten(TX)),
    "`optax.scale_by_backtracking_linesearch`": line_search,
    "`optax.partition`": subtrees,
    "`optax.transforms.selective_transform`": selective,
    "`optax.trace`": remembering,
    "`optax.contrib.schedule_free`": schedule_free,
    "`optax.contrib.mechanize`": lambda: (
        unfreezes(contrib.mechanize(TX)),
        freezes(optax.chain(contrib.mechanize(TX), FREEZE)),
    ),
    "`optax.conditionally_transform`": conditional,
    "`optax.masked`": masked,
    "frozen parameters": frozen,
    "LoRA": lora,
    "an average of the parameters": average,
    "Orbax": (
        "test_a_checkpoint_of_other_roles_is_refused_by_orbax_or_here",
        "test_a_checkpoint_brings_back_every_bit_of_every_state",
    ),
    "Equinox": (
        "test_an_equinox_model_learns_in_steps_of_the_due_size",
        "test_labels_are_found_by_path_whatever_contains_them",
    ),
    "Haiku": ("test_a_haiku_model_learns_in_steps_of_the_due_size_and_its_statistics_advance",),
    "Keras": ("test_keras_variables_by_path_have_the_roles_of_their_layers",),
}


def test_every_row_of_the_page_has_its_test():
    tables = re.findall(r"^\| ([^|]+?) \|", PAGE, re.M)
    rows = [row.split(", ")[0] for row in tables if row != "tool"]
    assert rows == list(ROWS)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = [name for row in ROWS.values() if isinstance(row, tuple) for name in row]
    assert all(f"\ndef {name}(" in tests for name in names)


@pytest.mark.parametrize("row", [row for row, check in ROWS.items() if callable(check)])
def test_what_the_page_says_of_a_tool_is_so(row):
    ROWS[row]()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.+?)^```", PAGE, re.M | re.S))
def test_the_code_of_the_page_runs_and_freezes(code):
    names = {"jax": jax, "optax": optax, "dm": dm, "layers": LAYERS, "tx": TX, "loss_fn": loss_fn}
    exec(code, names := names | {"params": PARAMS})
    before, after = PARAMS["stem"], names["params"]["stem"]
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert loss_fn(names["params"]) < loss_fn(PARAMS)
