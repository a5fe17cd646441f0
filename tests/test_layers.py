"""Layers by path and by trace: grouping, order, masks, groups and the printed table."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dropmuon_jax as dm


class Affine(NamedTuple):
    weight: jax.Array
    value: jax.Array


def dense(n, m):
    return {"kernel": jnp.zeros((n, m)), "bias": jnp.zeros(m)}


def active_paths(mask):
    flat = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in flat if on}


def test_a_depth_activates_the_layers_from_there_to_the_output():
    params = {"b": dense(2, 3), "a": dense(3, 4), "c": dense(4, 1)}
    layers = dm.layers_by_path(params, ["b", "a", "c"])
    assert active_paths(layers.mask(0)) == active_paths(jax.tree.map(lambda _: True, params))
    assert active_paths(layers.mask(1)) == {"a/kernel", "a/bias", "c/kernel", "c/bias"}
    assert active_paths(layers.mask(2)) == {"c/kernel", "c/bias"}


def test_a_subset_activates_just_its_layers():
    layers = dm.layers_by_path([jnp.zeros(1)] * 3, ["0", "1", "2"])
    assert layers.subset([True, False, True]) == [True, False, True]
    assert layers.subset((False, False, False)) == [False, False, False]


@pytest.mark.parametrize(
    ("params", "patterns"),
    [
        ({"params": {"Conv_0": dense(2, 2), "Dense_0": dense(2, 1)}}, ["Conv_0", "Dense_0"]),
        ({"x": [dense(2, 2), dense(2, 2)], "y": dense(2, 1)}, ["x/0", "x/1", "y"]),
        ({"q": Affine(jnp.zeros(2), jnp.zeros(2))}, ["q/weight", "q/value"]),
        ({"enc": {"l_0": dense(2, 2), "l_1": dense(2, 2)}, "out": dense(2, 1)}, ["l_*", "out"]),
        ({"B_0": {"D_0": dense(2, 2)}, "D_0": dense(2, 1)}, ["B_0", "/D_0"]),
        ({"mlp/~/linear_0": dense(2, 2), "mlp/~/linear_1": dense(2, 2)}, ["linear_0", "linear_1"]),
        ({"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}, [("c", "a"), "b"]),
    ],
)
def test_patterns_match_whole_components_in_any_container(params, patterns):
    layers = dm.layers_by_path(params, patterns)
    assert layers.num_layers == len(patterns)
    assert jax.tree.structure(layers.mask(0)) == jax.tree.structure(params)
    assert 0 < len(active_paths(layers.mask(1))) < len(active_paths(layers.mask(0)))


def test_a_star_stays_inside_its_component():
    params = {"a": {"b": {"c": jnp.zeros(1)}}, "c": jnp.zeros(1)}
    assert dm.layers_by_path(params, ["a/*/c", "/c"]).layer_sizes == (1, 1)
    with pytest.raises(ValueError, match=r"'a\*c' matches no leaf"):
        dm.layers_by_path(params, ["a*c", "/c"])


def test_layers_are_hashable_and_equal_by_value():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    one, two = dm.layers_by_path(params, ["b", "a"]), dm.layers_by_path(params, ["b", "a"])
    assert one == two
    assert hash(one) == hash(two)
    assert one != dm.layers_by_path(params, ["a", "b"])


def owners(layers):
    """The layer of each leaf."""
    return [leaf.layers[0] for leaf in layers.leaves]


def test_groups_are_contiguous_and_of_similar_cost():
    params = [jnp.zeros(n) for n in (1, 1, 1, 9, 3, 3, 3, 9)]
    layers = dm.layers_by_path(params, [str(i) for i in range(8)])
    grouped = layers.group(3)
    assert owners(grouped) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert grouped.layer_sizes == (12, 9, 9)
    assert layers.group(8).names == layers.names
    assert layers.group(1).num_layers == 1


def test_every_grouping_is_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.integers(1, 20, size=6).tolist()
        layers = dm.layers_by_path([jnp.zeros(1)] * 6, [str(i) for i in range(6)])
        owner = np.array(owners(layers.group(3, layer_costs=costs)))
        ours = sum(np.sum(np.array(costs)[owner == g]) ** 2 for g in range(3))
        best = min(
            sum(costs[:i]) ** 2 + sum(costs[i:j]) ** 2 + sum(costs[j:]) ** 2
            for i in range(1, 5)
            for j in range(i + 1, 6)
        )
        assert ours == best


def test_tracing_reports_a_tied_head_and_gives_it_to_the_shallowest_depth():
    params = {"tok": jnp.zeros((7, 4)), "body": jnp.zeros((4, 4))}

    def loss_fn(params, tokens):
        return jnp.sum(jnp.tanh(params["tok"][tokens] @ params["body"]) @ params["tok"].T)

    layers = dm.trace_layers(loss_fn, params, jnp.zeros(3, jnp.int32))
    assert layers.names == ("tok", "body")
    assert "'tok' is used at depths 0, 1; it belongs to the shallowest, 0." in str(layers)
    assert "used at depths" not in str(layers.group(1))


def test_a_penalty_on_all_parameters_is_no_shared_use():
    params = {"b": jnp.zeros((3, 4)), "a": jnp.zeros((4, 4)), "c": jnp.zeros((4, 1))}

    def loss_fn(params, x):
        penalty = sum(jnp.sum(leaf**2) for leaf in params.values())
        for name in ("b", "a", "c"):
            x = jnp.tanh(x @ params[name])
        return jnp.sum(x) + penalty

    layers = dm.trace_layers(loss_fn, params, jnp.zeros((2, 3)))
    assert layers.names == ("b", "a", "c")
    assert not any(x.depths for x in layers.leaves)


def test_a_leaf_beside_containers_is_a_layer_of_its_own():
    params = {"params": {"pos": jnp.zeros((5, 4)), "z": dense(4, 4), "scale": jnp.zeros(4)}}

    def loss_fn(params, x):
        pos, scale, z = (params["params"][name] for name in ("pos", "scale", "z"))
        return jnp.sum((x + pos) @ z["kernel"] + z["bias"] * scale)

    layers = dm.trace_layers(loss_fn, params, jnp.zeros((5, 4)))
    assert layers.names == ("params/pos", "params/z", "params/scale")


def test_tracing_hands_keyword_arguments_over_untraced():
    def loss_fn(params, x, *, train):
        return jnp.sum(x * params["w"]) if train else jnp.sum(x)

    params = {"w": jnp.ones(3)}
    assert dm.trace_layers(loss_fn, params, jnp.ones(3), train=True).names == ("w",)
    with pytest.raises(ValueError, match=r"does not depend on the leaves \['w'\].*layers_by_path"):
        dm.trace_layers(loss_fn, params, jnp.ones(3), train=False)


# --- One layer for each module at a level ---------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Tower(nnx.Module):
    def __init__(self, rngs):
        self.z_embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([Block(4, rngs) for _ in range(3)])
        self.gain = nnx.Param(jnp.ones(4))
        self.a_head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, tokens):
        x = self.z_embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.a_head(x * self.gain)


def tower_layers(**options):
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: Tower(nnx.Rngs(0))), nnx.Param, ...)

    def loss_fn(params, rest, tokens):
        return nnx.merge(graphdef, params, rest, copy=True)(tokens).sum()

    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    return params, dm.trace_layers(loss_fn, params, rest, tokens, **options)


def test_a_level_gives_one_layer_for_each_block():
    params, layers = tower_layers(level=2)
    blocks = ("blocks/0", "blocks/1", "blocks/2")
    # What lies less deep than the level has the layers it has without one.
    assert layers.names == ("z_embed", *blocks, "gain", "a_head")
    assert layers == dm.layers_by_path(params, layers.names)
    assert jax.tree.structure(layers.mask(2)) == jax.tree.structure(params)
    # The norm of the next block is in the mask of the next block alone.
    assert "blocks/0/down/kernel" not in " ".join(active_paths(layers.mask(2)))


def test_levels_go_from_children_of_the_root_to_innermost_containers():
    params, whole = tower_layers(level=1)
    assert whole.names == ("z_embed", "blocks", "gain", "a_head")
    _, innermost = tower_layers()
    assert innermost.num_layers == 3 + 3 * 7  # query, key, value and out are layers of their own
    assert innermost.names[1:3] == ("blocks/0/norm", "blocks/0/attention/query")
    for level in (4, 99):
        assert tower_layers(level=level)[1] == innermost
    assert dm.layers_by_path(params, whole.names) == whole


def test_a_level_keeps_the_order_and_the_reports_of_first_uses():
    # A block begins where the first of its leaves is used, be it the last by name.
    params = {"b": {"z": {"w": jnp.ones((3, 4))}, "a": {"w": jnp.ones((4, 3))}}, "a": jnp.ones(3)}

    def loss_fn(params, x):
        x = jnp.tanh(x @ params["b"]["z"]["w"])
        return jnp.sum((x @ params["b"]["a"]["w"]) * params["a"] @ params["b"]["z"]["w"])

    layers = dm.trace_layers(loss_fn, params, jnp.ones((2, 3)), level=1)
    assert layers.names == ("b", "a")
    assert "'b/z/w' is used at depths 0, 1; it belongs to the shallowest, 0." in str(layers)
