"""Trees given beside parameters: labels and masks of decays, in any containers, as prefixes."""

from typing import Any

import equinox as eqx
import flax
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings

import dropmuon_jax as dm


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.head = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)


STATE = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
PURE = jax.tree.map(jnp.asarray, nnx.to_pure_dict(STATE))
MLP = eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(0))
MODEL = eqx.filter(MLP, eqx.is_inexact_array)  # which can be called
TREES = {
    "dict": PURE,
    "frozen": flax.core.freeze(PURE),
    "state": STATE,
    "model": MODEL,
    "list": [{"kernel": jnp.ones((3, 4))}, ({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},)],
    "masked": PURE | {"stem": optax.MaskedNode()},
    "one": jnp.ones((3, 4)),
}


def forms(params: Any, value_of: Any) -> list[Any]:
    """The tree of values, as a function, and in every container that has the same paths."""
    values = jax.tree.map(value_of, params)
    functions = [lambda _: values, jax.tree_util.Partial(lambda _, x: values, 0.5)]
    if params is MODEL:
        return [values, *functions, jax.tree.map(value_of, MLP)]  # with what the filter took out
    if all(params is not TREES[name] for name in ("dict", "frozen", "state", "masked")):
        return [values, *functions]
    plain = jax.tree.map(value_of, PURE)
    return [values, *functions, plain, flax.core.freeze(plain), nnx.State(plain)]


def is_matrix(x: Any) -> bool:
    return getattr(x, "ndim", 0) == 2


TX = {"matrix": optax.scale(2.0), "vector": optax.scale(3.0)}


@pytest.mark.parametrize("name", TREES)
def test_labels_are_found_by_path_whatever_contains_them(name):
    params = TREES[name]
    expected = jax.tree.map(lambda x: x * (2.0 if is_matrix(x) else 3.0), params)
    for form in forms(params, lambda x: "matrix" if is_matrix(x) else "vector"):
        for tx in (dm.chain_subtrees(TX, form), optax.masked(dm.chain_subtrees(TX, form), True)):
            updates, _ = jax.jit(tx.update)(params, tx.init(params))
            jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("is_injected", [False, True])
def test_the_mask_of_a_decay_is_found_by_path_whatever_contains_it(name, is_injected):
    params, static = TREES[name], ("dimension_numbers", "weight_decay_mask")
    decays = lambda x: np.shape(x)[:1] == (3,) if eqx.is_array(x) else True  # noqa: E731

    def step(mask: Any) -> Any:
        make = optax.inject_hyperparams(dm.muon, static_args=static) if is_injected else dm.muon
        tx = make(0.1, dimension_numbers="in_out", weight_decay=0.5, weight_decay_mask=mask)
        return tx.update(params, tx.init(params), params)[0]

    expected = jax.tree.map(
        lambda x, u: u - 0.05 * x if decays(x) and is_matrix(x) else u, params, step(False)
    )
    for form in forms(params, decays):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), step(form), expected)


LEAVES = st.builds(lambda: jnp.ones(2))
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=9,
)


@settings(max_examples=40, deadline=None)
@given(tree=NESTED, data=st.data())
def test_a_prefix_says_what_the_tree_says_that_it_stands_for(tree, data):
    """A node is cut where it is drawn so; misspelt or left out, a key is an error with its leaf."""
    draw = lambda: data.draw(st.sampled_from(["matrix", "vector"]))  # noqa: E731
    prefix = jax.tree.map(lambda _: draw(), tree, is_leaf=lambda _: data.draw(st.booleans()))
    labels = jax.tree.broadcast(prefix, tree)
    expected = jax.tree.map(lambda label, x: x * (2.0 if label == "matrix" else 3.0), labels, tree)
    updates, _ = (tx := dm.chain_subtrees(TX, prefix)).update(tree, tx.init(tree))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    wrong = {"root": prefix} if not isinstance(prefix, dict) else prefix | {"z": "matrix"}
    with pytest.raises(ValueError, match=r"labels must have the leaves.* '.*' is "):
        dm.chain_subtrees(TX, wrong).init(tree)


MATRICES = {"a": jnp.ones((3, 3)), "b": {"w": jnp.ones((3, 4)), "v": jnp.ones(3)}}
BAD_MASKS = {
    "misspelt": ({"aa": True, "b": True}, ValueError, "'a' is missing from .*'aa' is only in"),
    "half": ({"a": True, "b": {"w": True}}, ValueError, "'b/v' is missing from weight_decay_mask"),
    "none": ({"a": None, "b": True}, ValueError, "'a' is missing from weight_decay_mask"),
    "deeper": ({"a": {"w": True}, "b": True}, ValueError, "'a/w' is only in weight_decay_mask"),
    "list": ([True, True], ValueError, "'0' is only in weight_decay_mask"),
    "strings": ({"a": "no", "b": True}, TypeError, "must have Python booleans.*'no' at 'a'"),
    "numbers": ({"a": 1, "b": True}, TypeError, "got 1 at 'a'"),
    "arrays": (jnp.array(True), TypeError, "got a ArrayImpl at 'a'"),
    "parameters": (MATRICES, TypeError, "at 'a'"),
}


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_of_a_decay_that_fits_badly_is_one_error_with_its_leaf(name, as_function):
    mask, exception, message = BAD_MASKS[name]
    tx = dm.muon(0.1, weight_decay=0.1, weight_decay_mask=(lambda _: mask) if as_function else mask)
    with pytest.raises(exception, match=message):
        tx.init(MATRICES)


@pytest.mark.parametrize("label", [lambda state: jax.tree.map(lambda _: "all", state), "prefix"])
def test_an_nnx_optimizer_takes_labels_of_its_state_and_a_prefix(label):
    model = Net(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    labels = {"stem": "all", "head": "all"} if label == "prefix" else label(state)
    tx = dm.chain_subtrees({"all": optax.sgd(1.0)}, labels)
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, state)
    assert not any(x.any() for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
