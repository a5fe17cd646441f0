"""A state that does not fit is refused by every optimizer, and by `check_state` before a run."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_leaves_with_path

import dropmuon_jax as dm
from test_contract import ADAPTIVE, ALL, CASES, LAYERS, SHAPES, drop_muon, random_tree

PARAMS = random_tree(0)
STEPS: Any = optax.MultiSteps(drop_muon(LAYERS), 2)
MULTI = optax.GradientTransformationExtraArgs(STEPS.init, STEPS.update)
# Optimizers of one tree, each given a mask if it takes one.
MASK = {"layer_mask": LAYERS.subset(ALL)}
PAIRED = {
    "muon": (dm.muon(0.1), {}),
    "muon_with_decay": (dm.muon(0.1, weight_decay=0.1), {}),
    "drop_muon": (drop_muon(LAYERS), MASK),
    "other_roles": (drop_muon(LAYERS, roles={"mid/kernel": "embedding"}), MASK),
    "other_layers": (drop_muon(dm.layers_by_path(PARAMS, ["head", "mid", "stem"])), MASK),
    "other_auxiliary": (drop_muon(LAYERS, auxiliary=optax.trace(0.9)), MASK),
    "mars": (drop_muon(LAYERS, momentum=dm.transforms.mars_momentum(0.9)), MASK),
    "scion": (CASES["drop_scion"].tx, MASK),
    "record_gains": (dm.record_gains(drop_muon(LAYERS), ADAPTIVE), MASK),
    "subtrees": (dm.chain_subtrees({"all": optax.adam(0.1)}, "all"), {}),
    "on_mesh": (dm.on_mesh(optax.adamw(0.1)), {}),
    "momentum": (dm.momentum(0.9), MASK),
    "mvr": (dm.mvr_momentum(0.9), MASK | {"prev_params_grads": PARAMS}),
    "mvr_2": (dm.mvr_momentum(0.9, variant=2), MASK | {"prev_params_grads": PARAMS}),
}
FOREIGN = {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, 0.9), "multi": MULTI}
REFUSED = r"opt_state is not the state of this optimizer.*optimizer\.init\(params\)"


def update(tx: Any, state: Any, extra_args: Any, grads: Any = PARAMS, params: Any = PARAMS) -> Any:
    return jax.eval_shape(lambda: tx.update(grads, state, params, **extra_args))


def signature(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype.kind) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("of", [*PAIRED, *FOREIGN])
@pytest.mark.parametrize("name", PAIRED)
def test_the_state_of_another_optimizer_is_refused_unless_it_is_the_same(name, of):
    tx, extra_args = PAIRED[name]
    state = (PAIRED[of][0] if of in PAIRED else FOREIGN[of]).init(PARAMS)
    if signature(state) == signature(tx.init(PARAMS)):
        update(tx, state, extra_args)
        dm.check_state(tx, PARAMS, state, LAYERS if extra_args and name != "other_layers" else None)
        return
    for refuse in (
        lambda: update(tx, state, extra_args),
        lambda: dm.check_state(tx, PARAMS, state),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            refuse()


def spoil(leaf: Any, how: str) -> Any:
    if how == "a hole":
        return None
    if how == "of another shape":
        return leaf[:1] if leaf.ndim and leaf.shape[0] > 1 else leaf[None]
    return leaf.astype(jnp.float32 if leaf.dtype.kind == "i" else jnp.int32)


HOW = {"a hole": "is None, a hole", "of another shape": r"is \(.* in place of \("}
HOW["of another kind"] = "in place of (integer|floating|bool)"


FIELDS = ("count", "weight_of_zero", "gains", "step", "started", "prob", "drawn_by", "settings")


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(CASES)), how=st.sampled_from(sorted(HOW)), data=st.data())
def test_a_leaf_that_does_not_fit_is_named(name, how, data):
    case = CASES[name]
    tx, params = case.tx, case.tree(0)
    state = tx.init(params)
    leaves, structure = jax.tree.flatten(state)
    if not leaves:
        return
    i = data.draw(st.integers(0, len(leaves) - 1))
    if how == "of another kind" and leaves[i].dtype.kind not in "if":
        return
    path = tree_leaves_with_path(state)[i][0]
    spoilt = structure.unflatten([*leaves[:i], spoil(leaves[i], how), *leaves[i + 1 :]])
    key = keystr(path)
    leaf = next((f"'{n}/{f}'" for n in SHAPES for f in SHAPES[n] if f"['{n}']['{f}']" in key), None)
    named = leaf or next(k for k in FIELDS if k in key)
    for refuse in (
        lambda: update(tx, spoilt, case.mask(ALL), params, params),
        lambda: dm.check_state(tx, params, spoilt),
    ):
        with pytest.raises(ValueError, match=f"{named}.*{HOW[how]}.*"):
            refuse()


def test_a_checkpoint_of_other_roles_is_refused_by_orbax_or_here(tmp_path):
    saved, onto = (PAIRED[name][0] for name in ("drop_muon", "other_roles"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved.init(PARAMS))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, onto.init(PARAMS))
        with pytest.raises(ValueError, match=r"inner_states\[1\].mu.mid.kernel"):
            checkpointer.restore(tmp_path / "state", like)
        whole = checkpointer.restore(tmp_path / "state")  # dicts and lists
    holed = jax.tree.map_with_path(
        lambda path, x: None if "mu['mid']['kernel']" in jax.tree_util.keystr(path) else x,
        onto.init(PARAMS),
    )
    for state in (holed, whole):
        with pytest.raises(ValueError, match=f"{REFUSED}.*of the optimizer that has saved it"):
            update(onto, state, MASK)
    with pytest.raises(ValueError, match=r"mu of 'mid/kernel' is None, a hole.*other roles"):
        dm.check_state(onto, PARAMS, holed)
    with pytest.raises(ValueError, match=r"has dict where tuple belongs.*restored without"):
        dm.check_state(saved, PARAMS, dict(enumerate(saved.init(PARAMS))))


@pytest.mark.parametrize("num_saved", [1, 2, 4])
def test_a_stack_of_another_number_of_layers_is_refused(num_saved):
    params, old = ({"blocks": {"kernel": jnp.ones((n, 4, 5))}} for n in (3, num_saved))
    layers, saved = (dm.layers_by_path(tree, [dm.stacked("blocks")]) for tree in (params, old))
    tx = dm.drop_muon(0.1, layers)
    with pytest.raises(ValueError, match=r"'blocks/kernel' is .* had other shapes"):
        update(tx, dm.drop_muon(0.1, saved).init(old), {"depth": 0}, params, params)


def gradients_without(name: str) -> Any:
    return {**PARAMS, name: {**PARAMS[name], "bias": None}}


@pytest.mark.parametrize("name", ["muon", "drop_muon", "scion", "record_gains", "on_mesh"])
def test_gradients_that_are_not_of_the_parameters_are_named(name):
    tx, extra_args = PAIRED[name]
    state = tx.init(PARAMS)
    ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim), PARAMS)
    for grads, params, match in (
        (gradients_without("mid"), PARAMS, "no leaf 'mid/bias'.*eqx.partition"),
        (ones, PARAMS, r"updates has shape \(1,\) at 'head/bias'"),
        (PARAMS, {**PARAMS, "act": jax.nn.relu}, "leaf 'act' is a .*eqx.filter"),
        (PARAMS, {**PARAMS, "tail": jnp.ones(2)}, "no leaf 'tail'"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            tx.update(grads, state, params, **extra_args)


def test_what_has_no_gradient_is_named_where_it_is_active():
    params = {"count": jnp.arange(3), "w": jnp.ones(3)}
    gradient: Any = dm.masked_value_and_grad(lambda p: jnp.sum(p["w"] * p["count"]))
    with pytest.raises(TypeError, match="leaf 'count' is an array of int32"):
        gradient(params, layer_mask=None)
    _, grads = gradient(params, layer_mask={"count": False, "w": True})
    np.testing.assert_array_equal(grads["w"], params["count"])


def test_what_has_passed_is_not_asked_again_and_is_not_in_the_program():
    def counted(params):
        asked.append(params)
        return inner.init(params)

    asked, inner = [], optax.adam(0.1)
    for wrap in (dm.on_mesh, lambda tx: dm.chain_subtrees({"all": tx}, "all")):
        tx = wrap(optax.GradientTransformation(counted, inner.update))
        state = tx.init(PARAMS)
        restored, again = (jax.tree.map(jnp.copy, state) for _ in range(2))
        asked.clear()
        for of in (state, restored, again):
            tx.update(PARAMS, of, PARAMS)
        assert not asked
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
        for _ in range(3):
            tx.update(half, state, PARAMS)
        assert len(asked) == 1
    alone, checked = (
        jax.jit(tx.update).lower(PARAMS, inner.init(PARAMS), PARAMS).as_text()
        for tx in (inner, dm.on_mesh(inner))
    )
    assert checked == alone


def test_check_state_tells_of_other_dtypes_other_layers_and_negative_counts():
    tx, other = drop_muon(LAYERS), dm.layers_by_path(PARAMS, ["stem", ("mid", "head")])
    state = tx.init(PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dm.check_state(tx, jax.tree.map(ocp.utils.to_shape_dtype_struct, PARAMS), state, LAYERS)
        for of, _ in PAIRED.values():
            dm.check_state(of, PARAMS, jax.eval_shape(of.init, PARAMS))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 2 else x, state)
    with pytest.warns(UserWarning, match="'head/kernel' is bfloat16 in place of float32"):
        dm.check_state(tx, PARAMS, half)
    update(tx, half, MASK)
    with pytest.raises(ValueError, match="other layers: it keeps 'head/bias' in its layer 2"):
        dm.check_state(tx, PARAMS, state, other)
    negative = jax.tree.map(lambda x: x - 1 if x.dtype == jnp.int32 else x, state)
    with pytest.raises(ValueError, match="negative count"):
        dm.check_state(tx, PARAMS, negative)
    with pytest.raises(ValueError, match=REFUSED):
        dm.check_state(MULTI, PARAMS, MULTI.init(PARAMS)[:2])


def test_a_path_that_ends_like_another_is_of_its_own_layer():
    params = {"block": {"norm": {"scale": jnp.ones(2)}, "w": jnp.eye(2)}, "norm": jnp.ones(2)}
    params["norm"] = {"scale": params["norm"]}
    layers = dm.layers_by_path(params, ["block", "/norm"])
    tx = dm.per_layer(optax.scale_by_adam(), layers)
    dm.check_state(tx, params, tx.init(params), layers)
    with pytest.raises(ValueError, match="made for other layers"):
        dm.check_state(tx, params, tx.init(params), dm.layers_by_path(params, ["/norm", "block"]))
