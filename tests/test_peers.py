"""The page on other Muons: its code takes the steps that they took, as `tests/peers` recorded."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dropmuon_jax as dm
from peers import problem

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from_another_muon.md").read_text()
(_, COMMON), *SECTIONS = re.findall(r"^##+ (.+?)\n.*?^```python\n(.+?)^```", PAGE, re.M | re.S)
# By the title of a recipe the runs that it follows to rounding, and those that round to bfloat16.
RUNS = {
    "optax.contrib.muon": ("optax", None),
    "optax.contrib.muon with dimension numbers": ("optax_moonlight", None),
    "keras.optimizers.Muon": ("keras", None),
    "torch.optim.Muon": ("torch_float32", "torch"),
    "torch.optim.Muon with match_rms_adamw": ("torch_match_rms_float32", "torch_match_rms"),
    'timm, opt="muon"': ("timm_float32", "timm"),
    'timm, opt="nmuon"': ("timm_nmuon_float32", "timm_nmuon"),
    "pytorch_optimizer.Muon": ("pytorch_optimizer_float32", "pytorch_optimizer"),
    "muon-optimizer": ("muon_optimizer_float32", "muon_optimizer"),
    "heavyball.Muon": ("heavyball_float64", "heavyball"),
    "heavyball.MuonAdamW": ("heavyball_adamw_float64", None),
    "Dion's Muon": ("dion_float32", "dion"),
    "Moonlight's Muon": ("moonlight_float32", "moonlight"),
}
# What the page says of leaves that an Adam steps, where it is not 1e-5; None where they differ.
VECTORS = ("attn/query/bias", "wide/bias")
ADAMW = (5e-5, ("embed/embedding", "conv/kernel", *VECTORS))
OF_ADAM = {
    "keras": (4e-4, (*ADAMW[1], "attn/query/kernel", "attn/out/kernel")),
    "torch": ADAMW,
    "torch_match_rms": ADAMW,
    "timm_nmuon": (None, VECTORS),
}
OF_MATRICES = {"dion_float32": 2e-5}
# Of the first step, and of the way of ten.
ROUNDING = {"dion": (0.17, 0.04)}
OF_BFLOAT16 = (0.08, 0.025)
DEEP = pytest.mark.deep
QUICK = ("optax.contrib.muon", "torch.optim.Muon")


def test_every_recipe_is_followed_and_every_record_is_used():
    assert [title for title, code in SECTIONS if "optimizer =" in code] == list(RUNS)
    assert PAGE.count("```python") == len(SECTIONS) + 1
    recorded = {path.stem for path in problem.TRAJECTORIES.glob("*.json")}
    assert recorded == {name for names in RUNS.values() for name in names if name}


@functools.cache
def trajectory(title):
    """The parameters after each step with the optimizer of a recipe, by path."""
    namespace, code = {}, COMMON
    for of, block in SECTIONS[: list(RUNS).index(title) + 1]:
        code += block if of == title or "def " in block else ""  # a later one may use a function
    exec(compile(code, f"coming_from_another_muon.md, {title}", "exec"), namespace)
    tx = namespace["optimizer"]

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    grads = map(problem.gradients, range(problem.NUM_STEPS))
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(problem.nested, grads))
    params = problem.nested(jax.tree.map(jnp.asarray, problem.params()))
    _, found = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), grads))(params)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def each_recipe(*, run):
    return pytest.mark.parametrize(
        ("title", "name"),
        [
            pytest.param(title, names[run], id=title, marks=() if title in QUICK else DEEP)
            for title, names in RUNS.items()
            if names[run]
        ],
    )


@each_recipe(run=0)
def test_a_recipe_takes_the_steps_that_were_recorded(title, name):
    found, recorded = trajectory(title), problem.load(name)["params"]
    of_adam, adams = OF_ADAM.get(name.removesuffix("_float32"), (1e-5, ()))
    for step, params in recorded.items():
        for path, x in params.items():
            atol = of_adam if path in adams else OF_MATRICES.get(name, 1e-5)
            if atol is None:  # matrices alone
                assert abs(found[path][step - 1] - x).max() > 0.1
                continue
            np.testing.assert_allclose(found[path][step - 1], x, rtol=0, atol=atol, err_msg=path)


@each_recipe(run=1)
def test_a_recipe_stays_as_near_as_bfloat16_lets_it(title, name):
    found, recorded = trajectory(title), problem.load(name)["params"]
    _, adams = OF_ADAM.get(name, (1e-5, ()))
    for step, allowed in zip((1, problem.NUM_STEPS), ROUNDING.get(name, OF_BFLOAT16), strict=True):
        for path, x in recorded[step].items():
            if name == "timm_nmuon" and path in adams:
                continue
            way = np.linalg.norm(x - problem.params()[path])
            assert np.linalg.norm(found[path][step - 1] - x) <= allowed * way, path


@given(exponent=st.integers(-100, 60), nesterov=st.booleans())
@settings(deadline=None, max_examples=20)
def test_a_first_step_does_not_see_the_size_of_the_gradient(exponent, nesterov):
    tx = dm.muon(1.0, momentum=dm.momentum(0.9, nesterov=nesterov, bias_correction=True))
    params = {"kernel": jnp.asarray(problem.params()["square/kernel"])}
    grads = {"kernel": jnp.asarray(problem.gradients(0)["square/kernel"])}
    small = jax.tree.map(lambda g: jnp.ldexp(g, exponent), grads)
    (step, _), (of_small, _) = (tx.update(g, tx.init(params)) for g in (grads, small))
    np.testing.assert_allclose(of_small["kernel"], step["kernel"], rtol=0, atol=2e-6)


def test_the_page_says_what_is_left_of_a_first_step_at_tiny_gradients():
    for title, names in RUNS.items():
        name = names[1] or names[0]
        share = problem.load(name)["share_at_1e-12"]["square/kernel"]
        (said,) = re.findall(rf"^\| {re.escape(title)} \|.*\| ([\d.e-]+) \|$", PAGE, re.M)
        assert float(said) == share, title
