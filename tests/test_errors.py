"""Bad input: every message names the leaf or the argument, and says the way out."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

PARAMS = {
    "stem": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "mid": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)},
    "head": {"kernel": jnp.ones((5, 2)), "bias": jnp.ones(2)},
}
LAYERS = dm.layers_by_path(PARAMS, ["stem", "mid", "head"])
UNIFORM = dm.uniform_depth()
SAMPLER = dm.DepthSampler(LAYERS, UNIFORM, seed=0)
SUBSET_SAMPLER = dm.DepthSampler(LAYERS, dm.sampling.fixed_size_subsets(2), seed=0)
ADAPTIVE_SAMPLER = dm.DepthSampler(LAYERS, dm.time_aware_depth([3.0, 2.0, 1.0]), seed=0)
LINK = dm.layer_mask_sampler(LAYERS, UNIFORM, seed=0)
KERNELS = {name: {"kernel": layer["kernel"]} for name, layer in PARAMS.items()}


def loss_fn(params: Any) -> jax.Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def sampler(distribution: Any, **kwargs: Any) -> Any:
    return dm.DepthSampler(LAYERS, distribution, **kwargs)


def drop_muon(learning_rate: Any = 0.1, **kwargs: Any) -> Any:
    return dm.drop_muon(learning_rate, LAYERS, **kwargs)


def lmo(norm: Any, radius: Any = 1.0, **kwargs: Any) -> Any:
    return dm.norm_lmo(norm, radius, **kwargs)


def sharp(norm: Any, step_size: Any = 1.0, **kwargs: Any) -> Any:
    return dm.transforms.norm_sharp(norm, step_size, **kwargs)


def updated(tx: optax.GradientTransformation, params: Any = PARAMS, **extra_args: Any) -> Any:
    tx = optax.with_extra_args_support(tx)
    return tx.update(params, tx.init(params), params, **extra_args)


def gradients(**kwargs: Any) -> Any:
    return dm.masked_value_and_grad(loss_fn)(PARAMS, **kwargs)


def traced(function: Any, value: Any) -> Any:
    return jax.jit(function)(value)


def spec(reduction_axis: Any, output_axis: Any) -> MuonDimensionNumbers:
    return MuonDimensionNumbers(reduction_axis, output_axis)


def init_lmo(shape: tuple[int, ...], dimension_numbers: Any = None) -> Any:
    params = {"blocks": [{"kernel": jnp.ones(shape)}]}
    return dm.newton_schulz_lmo(dimension_numbers=dimension_numbers).init(params)


def mask_that_splits(layer: str) -> Any:
    mask = LAYERS.mask(0)
    return mask | {layer: {"kernel": True, "bias": False}}


def error(identifier: str, function: Any, exception: type[Exception], *words: str) -> Any:
    """A bad call, and the words that its message must hold, in this order."""
    return pytest.param(function, exception, words, id=identifier)


LAYER_ERRORS = [
    error(
        "pattern_without_match",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mit", "head"]),
        ValueError,
        "Pattern 'mit' matches no leaf",
        "Did you mean 'mid'?",
        "stem/kernel",
    ),
    error(
        "pattern_of_two_components_without_match",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mid/kernels", "mid/bias", "head"]),
        ValueError,
        "Pattern 'mid/kernels' matches no leaf",
        "Did you mean 'mid/kernel'?",
    ),
    error(
        "leaf_without_pattern",
        lambda: dm.layers_by_path(PARAMS, ["stem", "head"]),
        ValueError,
        "No pattern matches these leaves",
        "add a pattern",
        "mid/bias",
        "mid/kernel",
    ),
    error(
        "leaf_that_matches_twice",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mid", "head", "*/bias"]),
        ValueError,
        "Leaf 'head/bias' matches both 'head' and '*/bias'",
        "Write more components",
    ),
    error(
        "the_same_pattern_twice",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mid", "head", "stem"]),
        ValueError,
        "Leaf 'stem/bias' matches both 'stem' and 'stem'",
    ),
    error(
        "patterns_are_a_string",
        lambda: dm.layers_by_path(PARAMS, "stem"),
        TypeError,
        "patterns must be a sequence with a pattern for each layer",
        "'stem'",
    ),
    error(
        "patterns_are_no_strings",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mid", 3]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "Each layer needs one or more nonempty string patterns, got",
        "3",
    ),
    error(
        "patterns_hold_no_strings",
        lambda: dm.layers_by_path(PARAMS, ["stem", "mid", (3,)]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "Each layer needs one or more nonempty string patterns, got (3,)",
    ),
    error("no_patterns", lambda: dm.layers_by_path(PARAMS, []), ValueError, "patterns is empty"),
    error(
        "trace_of_an_unused_leaf",
        lambda: dm.trace_layers(lambda p: jnp.sum(p["stem"]["kernel"]), PARAMS),
        ValueError,
        "does not depend on the leaves",
        "mid/kernel",
        "dm.layers_by_path",
    ),
    error(
        "depth_negative", lambda: LAYERS.mask(-1), ValueError, "depth must be at least 0", "got -1"
    ),
    error(
        "depth_too_large",
        lambda: LAYERS.mask(3),
        ValueError,
        "depth must be at most 2, with 3 layers",
        "got 3",
    ),
    error(
        "depth_traced",
        lambda: traced(lambda depth: gradients(layer_mask=LAYERS.mask(depth)), jnp.array(1)),
        TypeError,
        "depth must be a Python integer, got an array",
        "static_argnames='depth'",
        "sampler.depth(step)",
        "dm.switch_depth",
    ),
    error("depth_boolean", lambda: LAYERS.mask(True), TypeError, "depth", "got a truth value"),
    error(
        "depth_not_whole",
        lambda: LAYERS.mask(1.0),  # pyright: ignore[reportArgumentType]
        TypeError,
        "depth must be a Python integer, got 1.0",
    ),
    error(
        "subset_of_wrong_length",
        lambda: LAYERS.subset([True, False]),
        ValueError,
        "active must have 3 entries",
        "stem, mid, head",
        "got 2",
    ),
    error(
        "subset_not_boolean",
        lambda: LAYERS.subset([1, 0, 1]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "active must hold Python booleans, got 1",
    ),
    error("group_none", lambda: LAYERS.group(0), ValueError, "num_groups must be at least 1"),
    error(
        "group_of_too_many",
        lambda: LAYERS.group(4),
        ValueError,
        "num_groups must be at most 3, the number of layers",
        "got 4",
    ),
    error(
        "group_costs_of_wrong_length",
        lambda: LAYERS.group(2, layer_costs=[1.0, 2.0]),
        ValueError,
        "layer_costs must be 3 nonnegative numbers, one for each layer",
    ),
    error(
        "group_costs_negative",
        lambda: LAYERS.group(2, layer_costs=[1.0, -2.0, 1.0]),
        ValueError,
        "layer_costs must be 3 nonnegative numbers",
        "-2.0",
    ),
]

MASK_ERRORS = [
    error(
        "mask_missing_in_masked_value_and_grad",
        lambda: gradients(),
        TypeError,
        "layer_mask",
    ),
    error(
        "mask_missing_in_the_sampler",
        lambda: updated(LINK),
        TypeError,
        "missing the keyword argument 'layer_mask'",
        "layer_mask=layers.mask(depth)",
    ),
    error(
        "mask_missing_in_drop_muon",
        lambda: updated(drop_muon()),
        TypeError,
        "missing the keyword argument 'layer_mask'",
        "layer_mask=layers.mask(depth), or depth=depth in its place",
    ),
    error(
        "mask_and_depth",
        lambda: updated(drop_muon(), layer_mask=LAYERS.mask(1), depth=1),
        TypeError,
        "update() takes layer_mask or depth, and got both",
    ),
    error(
        "depth_too_large_in_update",
        lambda: updated(drop_muon(), depth=3),
        ValueError,
        "depth must be at most 2, with 3 layers",
    ),
    error(
        "depth_traced_in_update",
        lambda: traced(lambda depth: updated(drop_muon(), depth=depth)[0], jnp.array(1)),
        TypeError,
        "depth must be a Python integer, got an array",
        "static_argnames='depth'",
    ),
    *(
        error(
            f"{name}_given_to_muon",
            lambda extra_args=extra_args: updated(dm.muon(0.1), **extra_args),
            TypeError,
            "muon updates every layer and takes no layer_mask or depth",
            "use drop_muon",
        )
        for name, extra_args in (("mask", {"layer_mask": LAYERS.mask(1)}), ("depth", {"depth": 0}))
    ),
]
# Each of these masks is bad for everything that takes one.
BAD_MASKS = [
    error(
        "without_a_leaf",
        lambda call: call(LAYERS.mask(0) | {"mid": {"kernel": True}}),
        ValueError,
        "layer_mask has another structure",
        "'mid/bias' is missing from the mask",
        "layers made from the same tree",
    ),
    error(
        "with_a_leaf_too_many",
        lambda call: call(LAYERS.mask(0) | {"tail": True}),
        ValueError,
        "layer_mask has another structure",
        "'tail' is only in the mask",
    ),
    error(
        "of_other_containers",
        lambda call: call(tuple(LAYERS.mask(0).values())),
        ValueError,
        "layer_mask has another structure",
    ),
    error(
        "of_one_boolean", lambda call: call(True), TypeError, "layer_mask must be a tree", "True"
    ),
    error(
        "traced",
        lambda call: traced(call, jax.tree.map(jnp.asarray, LAYERS.mask(1))),
        TypeError,
        "layer_mask is an array at 'head/bias'",
        "layers.mask(depth)",
        "static_argnames='depth'",
        "dm.switch_depth",
    ),
    error(
        "on_the_device",
        lambda call: call(jax.tree.map(jnp.asarray, LAYERS.mask(1))),
        TypeError,
        "layer_mask is an array at 'head/bias'",
    ),
    error(
        "of_integers",
        lambda call: call(jax.tree.map(int, LAYERS.mask(1))),
        TypeError,
        "layer_mask must have Python booleans as leaves, got 1 at 'head/bias'",
        "layers.mask(depth)",
    ),
    error(
        "of_numpy_arrays",
        lambda call: call(jax.tree.map(np.asarray, LAYERS.mask(1))),
        TypeError,
        "layer_mask must have Python booleans as leaves",
        "'head/bias'",
    ),
]
TAKES_A_MASK = {
    "masked_value_and_grad": lambda mask: gradients(layer_mask=mask),
    "masked_value_and_grad_pair": lambda mask: dm.masked_value_and_grad_pair(loss_fn)(
        PARAMS, PARAMS, layer_mask=mask
    ),
    "sampler": lambda mask: updated(LINK, layer_mask=mask)[0],
    "momentum": lambda mask: updated(dm.momentum(), layer_mask=mask)[0],
    "per_layer": lambda mask: updated(dm.per_layer(optax.sgd(1.0), LAYERS), layer_mask=mask)[0],
    "chain_subtrees": lambda mask: updated(
        dm.chain_subtrees({"all": dm.momentum()}, "all"), layer_mask=mask
    )[0],
    "drop_muon": lambda mask: updated(drop_muon(), layer_mask=mask)[0],
    "drop_scion": lambda mask: updated(
        dm.drop_scion(0.1, LAYERS, dict.fromkeys(dm.layers.ROLES, 1.0)), layer_mask=mask
    )[0],
    "record_gains": lambda mask: updated(
        dm.record_gains(drop_muon(), ADAPTIVE_SAMPLER), layer_mask=mask
    )[0],
}

SAMPLING_ERRORS = [
    error(
        "probabilities_negative",
        lambda: dm.fixed_depth([0.5, -0.25, 0.75]),
        ValueError,
        "probabilities must not be negative",
        "-0.25",
    ),
    error(
        "probabilities_nan",
        lambda: dm.fixed_depth([0.5, float("nan"), 0.5]),
        ValueError,
        "probabilities",
        "nan",
    ),
    error(
        "probabilities_that_do_not_sum_to_one",
        lambda: dm.fixed_depth([0.5, 0.25, 0.5]),
        ValueError,
        "probabilities must sum to 1, got 1.25",
    ),
    error(
        "probabilities_empty",
        lambda: dm.fixed_depth([]),
        ValueError,
        "probabilities must be a sequence of numbers",
    ),
    error(
        "probabilities_of_wrong_length",
        lambda: sampler(dm.fixed_depth([0.5, 0.5]), seed=0),
        ValueError,
        "gives 2 probabilities, and 3 layers need 3",
        "stem, mid, head",
    ),
    error(
        "own_probabilities_negative",
        lambda: sampler(
            dm.LayerDistribution(
                dm.sampling.depth_subsets, lambda step, b: jnp.array([1.5, -0.5, 0.0])
            ),
            seed=0,
        ),
        ValueError,
        "probabilities must not be negative",
        "at step 0",
    ),
    error(
        "own_probabilities_that_do_not_sum_to_one",
        lambda: sampler(
            dm.LayerDistribution(dm.sampling.depth_subsets, lambda step, b: jnp.full(b, 0.5)),
            seed=0,
        ),
        ValueError,
        "probabilities must sum to 1, got 1.5 at step 0",
    ),
    error(
        "distribution_not_called",
        lambda: sampler(dm.uniform_depth, seed=0),
        TypeError,
        "distribution must be a LayerDistribution such as dm.uniform_depth()",
    ),
    *(
        error(
            f"layers_that_are_patterns_in_{make.__name__}",
            lambda make=make: make(["stem", "mid", "head"], UNIFORM, seed=0),
            TypeError,
            "layers must be made by layers_by_path or trace_layers",
        )
        for make in (dm.DepthSampler, dm.layer_mask_sampler)
    ),
    *(
        error(
            f"seed_missing_in_{make.__name__}",
            lambda make=make: make(LAYERS, UNIFORM),
            TypeError,
            "'seed'",
        )
        for make in (dm.DepthSampler, dm.layer_mask_sampler)
    ),
    error(
        "seed_given_to_drop_muon",
        lambda: dm.drop_muon(0.1, LAYERS, UNIFORM, seed=0),  # pyright: ignore[reportCallIssue]
        TypeError,
        "drop_muon() has no argument 'seed': say dm.DepthSampler(layers, distribution, seed=…)",
    ),
    error(
        "seed_negative",
        lambda: sampler(UNIFORM, seed=-1),
        ValueError,
        "seed must be at least 0, got -1",
    ),
    error("seed_boolean", lambda: sampler(UNIFORM, seed=True), TypeError, "seed", "truth value"),
    error(
        "seeds_in_a_vector",
        lambda: sampler(UNIFORM, seed=jax.random.split(jax.random.key(0))),
        TypeError,
        "seed must be a Python integer, got an array",
        "or a key such as jax.random.key(0)",
    ),
    error(
        "seed_of_floats",
        lambda: sampler(UNIFORM, seed=jnp.float32(1)),
        TypeError,
        "seed must be a Python integer, got an array",
    ),
    error(
        "host_draw_of_an_array_as_seed",
        lambda: sampler(UNIFORM, seed=jnp.int32(1)).depth(0),
        TypeError,
        "seed is an array",
        "sampler.sample",
    ),
    error(
        "steps_per_draw_zero",
        lambda: sampler(UNIFORM, seed=0, steps_per_draw=0),
        ValueError,
        "steps_per_draw must be at least 1, got 0",
    ),
    error(
        "steps_per_draw_injected",
        lambda: optax.inject_hyperparams(dm.layer_mask_sampler)(LAYERS, UNIFORM, seed=0).init(
            PARAMS
        ),
        TypeError,
        "steps_per_draw must be a Python integer, got an array",
        "static_args",
    ),
    error(
        "epoch_shift_without_steps",
        lambda: dm.epoch_shift_depth(0),
        ValueError,
        "num_steps must be at least 1, got 0",
    ),
    error(
        "epoch_shift_with_negative_alpha",
        lambda: dm.epoch_shift_depth(10, alpha=-0.5),
        ValueError,
        "alpha must be at least 0",
        "-0.5",
    ),
    error(
        "epoch_shift_with_infinite_alpha",
        lambda: dm.epoch_shift_depth(10, alpha=float("inf")),
        ValueError,
        "alpha must be at least 0 and finite, got inf",
    ),
    error(
        "independent_layers_above_one",
        lambda: dm.sampling.independent_layers([0.5, 1.5, 0.5]),
        ValueError,
        "probabilities must lie in [0, 1]",
        "1.5",
    ),
    error(
        "independent_layers_empty",
        lambda: dm.sampling.independent_layers([]),
        ValueError,
        "probabilities must be a sequence of numbers",
    ),
    error(
        "independent_layers_of_wrong_length",
        lambda: sampler(dm.sampling.independent_layers([0.5, 0.5]), seed=0),
        ValueError,
        "subsets of shape (4, 2), and there are 3 layers",
        "stem, mid, head",
    ),
    error(
        "independent_layers_too_many",
        lambda: dm.sampling.independent_layers([0.5] * 13),
        ValueError,
        "has 8192 subsets",
        "layers.group(k)",
    ),
    error(
        "fixed_size_subsets_of_nothing",
        lambda: dm.sampling.fixed_size_subsets(0),
        ValueError,
        "size must be at least 1, got 0",
    ),
    error(
        "fixed_size_subsets_of_more_than_all",
        lambda: sampler(dm.sampling.fixed_size_subsets(4), seed=0),
        ValueError,
        "size must be at most 3, the number of layers, got 4",
    ),
    error(
        "fixed_size_subsets_too_many",
        lambda: dm.sampling.fixed_size_subsets(8).inclusion_probabilities(0, 16),
        ValueError,
        "has 12870 subsets",
        "layers.group(k)",
    ),
    error(
        "depth_of_an_array",
        lambda: SAMPLER.depth(jnp.array(3)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "step must be a Python integer, got an array",
        "Count the steps in Python, or use sampler.sample",
    ),
    error(
        "depth_of_a_negative_step",
        lambda: SAMPLER.depth(-1),
        ValueError,
        "step must be at least 0, got -1",
    ),
    error(
        "depth_of_a_subset_distribution",
        lambda: SUBSET_SAMPLER.depth(0),
        TypeError,
        "draws arbitrary subsets, not depths",
        "sampler.active(step)",
        "layers.subset(active)",
    ),
]

LMO_ERRORS = [
    error(
        "vector",
        lambda: dm.newton_schulz_lmo().init(PARAMS),
        ValueError,
        "needs matrices, and leaf 'head/bias' has shape (2,)",
        "dm.chain_subtrees",
    ),
    error("scalar", lambda: init_lmo(()), ValueError, "leaf 'blocks/0/kernel' has shape ()"),
    error(
        "vector_called_a_matrix",
        lambda: drop_muon(roles={"bias": "hidden"}).init(PARAMS),
        ValueError,
        "needs matrices, and leaf 'head/bias' has shape (2,)",
    ),
    error(
        "labels_in_place_of_roles",
        lambda: drop_muon(labels=dm.matrix_labels),
        TypeError,
        "drop_muon() has no argument 'labels': say roles=",
    ),
    error(
        "three_axes_without_dimension_numbers",
        lambda: init_lmo((2, 3, 4)),
        ValueError,
        "leaf 'blocks/0/kernel', of shape (2, 3, 4)",
        "dimension_numbers={'blocks/0/kernel'",
        "batch axes",
    ),
    error(
        "five_axes_without_dimension_numbers",
        lambda: init_lmo((2, 3, 4, 5, 6)),
        ValueError,
        "leaf 'blocks/0/kernel', of shape (2, 3, 4, 5, 6)",
    ),
    error(
        "weight_of_an_unknown_layout",
        lambda: dm.newton_schulz_lmo().init({"layers": [{"weight": jnp.ones((3, 4))}]}),
        ValueError,
        "Leaf 'layers/0/weight' of shape (3, 4)",
        "(out, in, *window), as in Equinox and PyTorch",
        "dimension_numbers='out_in' or 'in_out'",
    ),
    error(
        "dimension_numbers_out_of_range",
        lambda: init_lmo((2, 3, 4), spec(1, 3)),
        ValueError,
        "dimension_numbers name an axis of (3,), but leaf 'blocks/0/kernel' has 3 axes",
    ),
    error(
        "dimension_numbers_with_an_axis_twice",
        lambda: init_lmo((2, 3, 4), spec((0, 1), -2)),
        ValueError,
        "none twice; leaf 'blocks/0/kernel' got reduction_axis=(0, 1), output_axis=(1,)",
    ),
    error(
        "dimension_numbers_without_fan_in",
        lambda: init_lmo((2, 3, 4), spec((), 2)),
        ValueError,
        "at least one axis each for fan-in and fan-out",
    ),
    error(
        "dimension_numbers_pattern_without_match",
        lambda: init_lmo((2, 3, 4), {"blocks/0/kernels": spec(1, 2)}),
        ValueError,
        "pattern 'blocks/0/kernels' matches no leaf",
        "Did you mean 'blocks/0/kernel'?",
    ),
    error(
        "dimension_numbers_leaf_that_matches_twice",
        lambda: init_lmo((2, 3, 4), {"blocks": spec(1, 2), "kernel": spec(1, 2)}),
        ValueError,
        "leaf 'blocks/0/kernel' matches both",
    ),
    error(
        "dimension_numbers_that_are_none",
        lambda: init_lmo((2, 3, 4), (1, 2)),
        TypeError,
        "dimension_numbers must be an optax.contrib.MuonDimensionNumbers, 'in_out', 'out_in', or a",
        "(1, 2)",
    ),
    error("radius_zero", lambda: dm.newton_schulz_lmo(0.0), ValueError, "radius must be positive"),
    error(
        "radius_negative",
        lambda: dm.newton_schulz_lmo(radius=-1),
        ValueError,
        "radius must be positive and finite, got -1",
    ),
    error(
        "momentum_is_a_number_out_of_range",
        lambda: drop_muon(momentum=1.0),
        ValueError,
        "decay is the weight of the past and must lie in [0, 1), got 1.0",
    ),
    error(
        "momentum_is_a_list",
        lambda: drop_muon(momentum=[dm.momentum()]),
        TypeError,
        "momentum must be an optax.GradientTransformation, got a list",
    ),
    error(
        "momentum_is_not_called",
        lambda: drop_muon(momentum=dm.momentum),
        TypeError,
        "decay is a function that makes a transformation: call it",
    ),
    error(
        "per_layer_with_swapped_arguments",
        lambda: dm.per_layer(LAYERS, optax.adam(0.1)),
        TypeError,
        "inner must be an optax.GradientTransformation, got a Layers",
    ),
    error(
        "per_layer_without_layers",
        lambda: dm.per_layer(optax.adam(0.1), ["stem"]),
        TypeError,
        "layers must be made by layers_by_path or trace_layers, got a list",
    ),
    error(
        "sampler_of_parameters",
        lambda: dm.layer_mask_sampler(PARAMS, UNIFORM, seed=0),
        TypeError,
        "layers must be made by layers_by_path or trace_layers, got a dict",
    ),
    error(
        "subtree_of_a_number",
        lambda: dm.chain_subtrees({"matrix": 0.1}, "matrix"),
        TypeError,
        "transforms['matrix'] must be an optax.GradientTransformation, got 0.1",
    ),
    error(
        "switch_over_layers",
        lambda: dm.switch_depth(gradients, LAYERS),
        TypeError,
        "sampler must be a DepthSampler, got a Layers",
        "dm.DepthSampler(layers, dm.uniform_depth(), seed=0)",
    ),
    error(
        "switch_over_the_link_of_a_chain",
        lambda: dm.switch_depth(gradients, LINK),
        TypeError,
        "sampler must be a DepthSampler, got a LayerMaskSampler",
        "Give its attribute, sampler.draws",
    ),
    error(
        "record_of_no_transformation",
        lambda: dm.record_gains(0.1, ADAPTIVE_SAMPLER),
        TypeError,
        "inner must be an optax.GradientTransformation, got 0.1",
    ),
    error(
        "record_for_a_distribution_that_needs_none",
        lambda: dm.record_gains(drop_muon(), SAMPLER),
        TypeError,
        "sampler must be a DepthSampler with an AdaptiveDistribution",
        "got a DepthSampler with a LayerDistribution",
        "Other distributions need no record",
    ),
    error(
        "mask_not_cut_by_optax",
        lambda: updated(optax.masked(dm.momentum(), LAYERS.mask(1)), layer_mask=LAYERS.mask(0)),
        ValueError,
        "layer_mask has another structure",
        "dm.chain_subtrees",
        "mask_compatible_extra_args=True",
    ),
    error(
        "seed_too_large",
        lambda: dm.layer_mask_sampler(LAYERS, UNIFORM, seed=2**64),
        ValueError,
        "seed must be below 2^64",
    ),
    error("step_too_large", lambda: SAMPLER.depth(2**31), ValueError, "step must be at most"),
    error(
        "probabilities_go_wrong_later",
        lambda: sampler(
            dm.LayerDistribution(
                dm.sampling.depth_subsets, lambda k, b: jnp.array([1.0, 0.0, 0.0]) - 0.01 * k
            ),
            seed=0,
        ).depth(7),
        ValueError,
        "probabilities must not be negative",
        "at step 1",
    ),
    error(
        "probabilities_branch_in_python",
        lambda: sampler(
            dm.LayerDistribution(
                dm.sampling.depth_subsets, lambda k, b: jnp.eye(b)[0] if k < 9 else jnp.eye(b)[1]
            ),
            seed=0,
        ),
        TypeError,
        "jnp.where(step < n",
    ),
    error(
        "subsets_of_numbers",
        lambda: sampler(
            dm.LayerDistribution(lambda b: np.eye(b), lambda k, b: jnp.full(b, 1 / b)), seed=0
        ),
        TypeError,
        "subsets of the distribution must be booleans, got float64",
    ),
    error(
        "radius_not_scalar",
        lambda: dm.newton_schulz_lmo(jnp.array([1.0, 2.0])),
        ValueError,
        "radius must be one number, got an array of shape (2,)",
    ),
    error(
        "matrix_of_integers",
        lambda: dm.newton_schulz_lmo().init({"steps": jnp.ones((2, 2), int)}),
        TypeError,
        "params must be trainable floating-point arrays, and leaf 'steps' is an array of int32",
    ),
    error(
        "momentum_of_integers",
        lambda: dm.momentum(dtype=jnp.int32),
        TypeError,
        "dtype must be of a floating-point dtype, got int32",
    ),
    error(
        "labels_of_several_types",
        lambda: dm.chain_subtrees({"a": optax.identity(), 0: optax.identity()}, "b").init(PARAMS),
        ValueError,
        "Leaf 'head/bias' has the label 'b'",
    ),
    error("radius_nan", lambda: dm.newton_schulz_lmo(float("nan")), ValueError, "radius", "nan"),
    error(
        "num_steps_zero",
        lambda: dm.newton_schulz_lmo(num_steps=0),
        ValueError,
        "num_steps must be at least 1, got 0",
    ),
    error(
        "num_steps_injected",
        lambda: optax.inject_hyperparams(dm.newton_schulz_lmo)(num_steps=5).init(KERNELS),
        TypeError,
        "num_steps must be a Python integer",
        "static_args",
    ),
    error(
        "num_steps_unlike_the_number_of_coefficients",
        lambda: dm.newton_schulz_lmo(coefficients=[(2.0, -1.5, 0.5)], num_steps=5),
        ValueError,
        "num_steps is 5, but the number of coefficients (a, b, c) is 1",
        "leave num_steps out",
    ),
    error(
        "coefficients_unknown",
        lambda: dm.newton_schulz_lmo(coefficients="polar_expres"),
        ValueError,
        "coefficients must be one of ['dion', 'muon', 'polar_express', 'turbo_muon']",
        "Did you mean 'polar_express'?",
    ),
    error(
        "coefficients_of_words",
        lambda: dm.newton_schulz_lmo(coefficients=[("a", "b", "c")]),  # pyright: ignore[reportArgumentType]
        ValueError,
        "coefficients must be a name or triples of finite numbers (a, b, c)",
        "got [('a', 'b', 'c')]",
    ),
    error(
        "coefficients_in_a_jax_array",
        lambda: dm.orthogonalize.newton_schulz(jnp.eye(3)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "coefficients are static",
        "dm.orthogonalize.newton_schulz()(x)",
    ),
    error(
        "kernel_of_a_tree",
        lambda: dm.orthogonalize.newton_schulz()({"w": jnp.eye(3)}),  # pyright: ignore[reportArgumentType]
        TypeError,
        "newton_schulz orthogonalizes an array, got a dict",
        "newton_schulz_lmo",
    ),
    error(
        "kernel_not_made",
        lambda: drop_muon(orthogonalize=dm.orthogonalize.newton_schulz),
        TypeError,
        "such as dm.orthogonalize.newton_schulz() with its parentheses",
    ),
    error(
        "lmo_in_place_of_a_kernel",
        lambda: dm.muon(0.1, lmo=dm.newton_schulz_lmo()),  # pyright: ignore[reportCallIssue]
        TypeError,
        "muon() has no argument 'lmo': say orthogonalize=",
        "dm.scion",
    ),
    error(
        "kernel_in_place_of_a_transformation",
        lambda: dm.chain_subtrees({"matrix": dm.orthogonalize.newton_schulz()}, "matrix"),
        TypeError,
        "transforms['matrix'] must be an optax.GradientTransformation",
        "a function that orthogonalizes matrices goes into dm.norms.spectral_norm",
    ),
    error(
        "kernel_returns_nothing",
        lambda: lmo(dm.norms.spectral_norm(orthogonalize=lambda x: None)).update(
            KERNELS, optax.EmptyState()
        ),  # pyright: ignore[reportArgumentType]
        TypeError,
        "The orthogonalize function must return an array of the shape it is given",
        "returned None",
    ),
    error(
        "memory_limit_injected",
        lambda: optax.inject_hyperparams(dm.newton_schulz_lmo)(memory_limit=10**6).init(KERNELS),
        TypeError,
        "memory_limit must be a Python integer, got an array",
        "name it in static_args",
    ),
    error(
        "dimension_numbers_of_tuples",
        lambda: dm.newton_schulz_lmo(dimension_numbers={"stem": (0, 1)}).init(KERNELS),  # pyright: ignore[reportArgumentType]
        TypeError,
        "dimension_numbers of leaf 'stem/kernel' must be an optax.contrib.MuonDimensionNumbers, ",
        "'in_out' or 'out_in', got (0, 1)",
    ),
    error(
        "preconditioning_unknown",
        lambda: dm.newton_schulz_lmo(preconditioning="schaten"),
        ValueError,
        "preconditioning must be one of ['aol', 'frobenius', 'schatten']",
        "Did you mean 'schatten'?",
    ),
    error(
        "iteration_in_integers",
        lambda: dm.newton_schulz_lmo(dtype=jnp.int8),
        ValueError,
        "dtype must be one of ['float32', 'bfloat16', 'float16'], got 'int8'",
    ),
    error(
        "iteration_in_no_dtype",
        lambda: dm.newton_schulz_lmo(dtype="bf16"),
        TypeError,
        "dtype must be one of ['float32', 'bfloat16', 'float16'], got 'bf16'",
    ),
    error(
        "precision_unknown",
        lambda: dm.newton_schulz_lmo(precision="hihgest"),
        ValueError,
        "precision must be one of ['default', 'high', 'highest']",
        "Did you mean 'highest'?",
    ),
    error(
        "float16_overflows",
        lambda: dm.newton_schulz_lmo(coefficients=[(30.0, 0.0, 0.0)] * 4, dtype=jnp.float16),
        ValueError,
        "overflows in float16",
        "dtype=jnp.bfloat16",
    ),
    error(
        "float16_from_aol",
        lambda: dm.newton_schulz_lmo(coefficients="turbo_muon", dtype=jnp.float16),
        ValueError,
        'preconditioning="aol" divides each row',
        "another preconditioning",
    ),
    error(
        "memory_limit_zero",
        lambda: dm.newton_schulz_lmo(memory_limit=0),
        ValueError,
        "memory_limit must be at least 1, got 0",
    ),
    error(
        "memory_limit_no_integer",
        lambda: dm.newton_schulz_lmo(memory_limit=1e9),
        TypeError,
        "memory_limit must be a Python integer, got 1000000000.0. It is in bytes",
    ),
    error(
        "memory_limit_below_one_matrix",
        lambda: dm.newton_schulz_lmo(memory_limit=1000).init({"big": {"w": jnp.ones((64, 32))}}),
        ValueError,
        "memory_limit is 1,000 bytes",
        "leaf 'big/w', 64×32, needs 36,864",
    ),
    error(
        "kernel_not_callable",
        lambda: drop_muon(orthogonalize="svd"),
        TypeError,
        "orthogonalize must be a function",
        "dm.orthogonalize.newton_schulz()",
    ),
    error(
        "kernel_changes_the_shape",
        lambda: lmo(dm.norms.spectral_norm(orthogonalize=lambda x: x @ x.mT)).update(
            KERNELS, optax.EmptyState()
        ),
        ValueError,
        "The orthogonalize function was given float32[",
        "shape and dtype must stay",
    ),
    error(
        "kernel_of_integers",
        lambda: dm.orthogonalize.newton_schulz()(jnp.ones((2, 3), int)),
        TypeError,
        "must be of a floating-point dtype",
    ),
    error(
        "kernel_of_a_vector",
        lambda: dm.orthogonalize.newton_schulz()(jnp.ones(3)),
        ValueError,
        "must have shape (*batch, rows, cols), got (3,)",
    ),
    error(
        "smallest_singular_value_zero",
        lambda: dm.orthogonalize.polar_express_coefficients(5, smallest=0.0),
        ValueError,
        "smallest must lie in (0, 1), got 0.0",
    ),
    error(
        "cushion_one",
        lambda: dm.orthogonalize.polar_express_coefficients(5, cushion=1.0),
        ValueError,
        "cushion must lie in [0, 1), got 1.0",
    ),
    error(
        "ease_below_one",
        lambda: dm.orthogonalize.polar_express_coefficients(5, ease=0.99),
        ValueError,
        "ease must be at least 1, got 0.99",
    ),
    error(
        "no_coefficients",
        lambda: dm.orthogonalize.polar_express_coefficients(0),
        ValueError,
        "num_steps must be at least 1, got 0",
    ),
    error(
        "coefficients_of_wrong_shape",
        lambda: dm.newton_schulz_lmo(coefficients=[(1.5, -0.5)]),
        ValueError,
        "coefficients must be a name or triples of finite numbers (a, b, c)",
        "got [(1.5, -0.5)]",
    ),
    error(
        "coefficients_of_one_step_without_brackets",
        lambda: dm.newton_schulz_lmo(coefficients=(1.5, -0.5, 0.0)),  # pyright: ignore[reportArgumentType]
        ValueError,
        "coefficients must be a name or triples of finite numbers (a, b, c)",
        "[(a, b, c)] * num_steps",
    ),
    error(
        "coefficients_empty",
        lambda: dm.newton_schulz_lmo(coefficients=[]),
        ValueError,
        "coefficients must be a name or triples of finite numbers",
        "got []",
    ),
    error(
        "coefficients_infinite",
        lambda: dm.newton_schulz_lmo(coefficients=[(1.5, -0.5, float("inf"))]),
        ValueError,
        "coefficients must be a name or triples of finite numbers",
    ),
    error(
        "shape_factor_unknown",
        lambda: dm.newton_schulz_lmo(shape_factor="moonligth"),
        ValueError,
        "shape_factor must be one of ['moonlight', 'muon', 'rms_to_rms', 'scion', 'spectral']",
        "Did you mean 'moonlight'?",
    ),
]

NORM_ERRORS = [
    error(
        "norm_not_called",
        lambda: dm.norm_lmo(dm.norms.sign_norm),  # pyright: ignore[reportArgumentType]
        TypeError,
        "norm must be a dm.norms.Norm, got a function. Call it",
    ),
    error(
        "norm_that_is_a_name",
        lambda: dm.transforms.norm_sharp("sign"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "norm must be a dm.norms.Norm, got 'sign'",
    ),
    error(
        "norm_that_is_a_radius",
        lambda: dm.norm_lmo(0.3),  # pyright: ignore[reportArgumentType]
        TypeError,
        "norm must be a dm.norms.Norm, got 0.3",
    ),
    error(
        "norm_of_a_tree",
        lambda: dm.norms.sign_norm().argmin(KERNELS),  # pyright: ignore[reportArgumentType]
        TypeError,
        "A norm takes one array, got a dict",
        "jax.tree.map",
    ),
    error(
        "norm_of_a_list",
        lambda: dm.norms.rms_norm().norm([1.0, 2.0]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "A norm takes one array, got a list",
    ),
    error(
        "norm_with_an_unknown_shape_factor",
        lambda: dm.norms.Norm("mine", dm.norms.sign_norm().geometry, "none"),
        ValueError,
        "shape_factor must be one of",
        "'one'",
        "got 'none'",
    ),
    error(
        "radius_is_the_maker_of_a_schedule",
        lambda: lmo(dm.norms.sign_norm(), dm.schedules.gluon_radius),
        TypeError,
        "radius is dm.schedules.gluon_radius itself: call it",
    ),
    error(
        "decay_is_the_maker_of_a_schedule",
        lambda: dm.momentum(dm.schedules.gluon_decay),
        TypeError,
        "decay is dm.schedules.gluon_decay itself: call it",
    ),
    error(
        "schedule_that_returns_an_array",
        lambda: updated(lmo(dm.norms.sign_norm(), lambda count: jnp.ones(3)), KERNELS),
        ValueError,
        "A schedule must return one number",
        "radius",
        "(3,)",
    ),
    error(
        "dimension_numbers_of_whole_leaves",
        lambda: lmo(dm.norms.rms_norm(), dimension_numbers="in_out").init(KERNELS),
        ValueError,
        "rms_norm() is of whole leaves",
        "leave out dimension_numbers",
    ),
    error(
        "norm_of_matrices_of_a_vector",
        lambda: dm.norms.column_norm().dual_norm(jnp.ones(3)),
        ValueError,
        "is of matrices (in, out)",
        "shape (3,)",
    ),
    error(
        "norm_of_integers",
        lambda: dm.norms.euclidean_norm().direction(jnp.ones(3, int)),
        TypeError,
        "must be of a floating-point dtype, got int32",
    ),
    error(
        "random_array_of_integers",
        lambda: dm.norms.sign_norm().init(jax.random.key(0), (3, 2), jnp.int32),
        TypeError,
        "dtype must be of a floating-point dtype, got int32",
    ),
    error(
        "random_vector_of_a_norm_of_matrices",
        lambda: dm.norms.spectral_norm().init(jax.random.key(0), (3,)),
        ValueError,
        "is of matrices (in, out)",
        "shape (3,)",
    ),
    error(
        "initializer_with_radius_zero",
        lambda: dm.norms.sign_norm().initializer(0),
        ValueError,
        "radius must be positive and finite, got 0",
    ),
    error(
        "spectral_norm_with_unknown_shape_factor",
        lambda: dm.norms.spectral_norm("scoin"),
        ValueError,
        "shape_factor must be one of ['moonlight', 'muon', 'rms_to_rms', 'scion', 'spectral']",
        "Did you mean 'scion'?",
    ),
    error(
        "spectral_norm_of_a_kernel_not_made",
        lambda: dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.newton_schulz),  # pyright: ignore[reportArgumentType]
        TypeError,
        "such as dm.orthogonalize.newton_schulz() with its parentheses",
    ),
    error(
        "spectral_norm_of_a_kernel_that_is_a_name",
        lambda: dm.norms.spectral_norm(orthogonalize="svd"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "orthogonalize must be a function",
        "got 'svd'",
    ),
    error(
        "vector_of_column_lmo",
        lambda: lmo(dm.norms.column_norm()).init(PARAMS),
        ValueError,
        "needs matrices, and leaf 'head/bias' has shape (2,)",
        "dm.chain_subtrees",
    ),
    error(
        "scalar_of_row_sharp",
        lambda: sharp(dm.norms.row_norm()).init({"temperature": jnp.ones(())}),
        ValueError,
        "leaf 'temperature' has shape ()",
    ),
    error(
        "three_axes_of_sign_lmo",
        lambda: lmo(dm.norms.sign_norm()).init({"conv": {"kernel": jnp.ones((3, 2, 4))}}),
        ValueError,
        "leaf 'conv/kernel', of shape (3, 2, 4)",
        "dimension_numbers={'conv/kernel'",
        "for a convolution, with 'in_out'",
    ),
    error(
        "five_axes_of_row_lmo",
        lambda: lmo(dm.norms.row_norm()).init({"conv": {"kernel": jnp.ones((2, 2, 2, 3, 4))}}),
        ValueError,
        "leaf 'conv/kernel', of shape (2, 2, 2, 3, 4)",
        "for a convolution, with 'in_out'",
    ),
    error(
        "dimension_numbers_of_an_unknown_name",
        lambda: lmo(dm.norms.sign_norm(), dimension_numbers="in-out"),
        ValueError,
        "dimension_numbers must be one of ['in_out', 'out_in'], got 'in-out'",
        "Did you mean 'in_out'?",
    ),
    error(
        "dimension_numbers_of_an_unknown_name_by_pattern",
        lambda: lmo(dm.norms.row_norm(), dimension_numbers={"stem": "out-in"}).init(KERNELS),
        ValueError,
        "dimension_numbers of leaf 'stem/kernel' must be one of ['in_out', 'out_in'], got 'out-in'",
        "Did you mean 'out_in'?",
    ),
    error(
        "integers_in_norm_lmo",
        lambda: lmo(dm.norms.rms_norm()).init({"count": jnp.ones(3, int)}),
        TypeError,
        "leaf 'count' is an array of int32",
    ),
]

RADIUS_ERRORS = [
    error(
        "radius_of_norm_lmo_negative",
        lambda: lmo(dm.norms.sign_norm(), -1.0),
        ValueError,
        "radius must be positive and finite, got -1.0",
    ),
    error(
        "radius_of_norm_lmo_zero",
        lambda: lmo(dm.norms.rms_norm(), 0),
        ValueError,
        "radius must be positive and finite, got 0",
    ),
    error(
        "radius_of_norm_lmo_a_string",
        lambda: lmo(dm.norms.sign_norm(), "0.1"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "radius must be a number or a scalar array, got '0.1'",
    ),
    error(
        "step_size_negative",
        lambda: sharp(dm.norms.sign_norm(), -0.5),
        ValueError,
        "step_size must be positive and finite, got -0.5",
    ),
    error(
        "step_size_infinite",
        lambda: sharp(dm.norms.spectral_norm(), float("inf")),
        ValueError,
        "step_size must be positive and finite, got inf",
    ),
    error(
        "step_size_adaptive",
        lambda: sharp(dm.norms.spectral_norm(), dm.schedules.adaptive_radius(1.0)),
        TypeError,
        "step_size multiplies the dual norm already",
        "dm.newton_schulz_lmo(dm.schedules.adaptive_radius(l0, l1))",
    ),
    error(
        "step_size_adaptive_by_pattern",
        lambda: sharp(
            dm.norms.rms_norm(), {"stem": 1.0, "head": dm.schedules.adaptive_radius(1.0)}
        ),
        TypeError,
        "step_size multiplies the dual norm already",
    ),
    error(
        "radius_mapping_empty",
        lambda: lmo(dm.norms.rms_norm(), {}),
        ValueError,
        "radius is an empty mapping",
        "give a number, or a pattern for each",
    ),
    error(
        "radius_pattern_without_match",
        lambda: lmo(dm.norms.rms_norm(), {"stem": 1.0, "mit": 1.0, "head": 1.0}).init(PARAMS),
        ValueError,
        "radius: pattern 'mit' matches no leaf",
        "Did you mean 'mid'?",
    ),
    error(
        "radius_leaf_that_matches_twice",
        lambda: lmo(
            dm.norms.rms_norm(), {"stem": 1.0, "mid": 1.0, "head": 1.0, "mid/bias": 2.0}
        ).init(PARAMS),
        ValueError,
        "radius: leaf 'mid/bias' matches both 'mid' and 'mid/bias'",
    ),
    error(
        "radius_leaf_without_pattern",
        lambda: lmo(dm.norms.rms_norm(), {"stem": 1.0, "head": 1.0}).init(PARAMS),
        ValueError,
        "radius has no pattern for ['mid/bias', 'mid/kernel']",
        "every leaf needs one",
        "['stem', 'head']",
    ),
    error(
        "step_size_leaf_without_pattern",
        lambda: sharp(dm.norms.rms_norm(), {"stem": 1.0, "head": 1.0}).init(PARAMS),
        ValueError,
        "step_size has no pattern for ['mid/bias', 'mid/kernel']",
    ),
    error(
        "radius_mapping_nested",
        lambda: lmo(dm.norms.rms_norm(), {"stem": {"kernel": 1.0}}),  # pyright: ignore[reportArgumentType]
        TypeError,
        "radius['stem'] is a mapping again; write one pattern of both",
    ),
    error(
        "radius_pattern_that_is_no_string",
        lambda: lmo(dm.norms.rms_norm(), {0: 1.0}),  # pyright: ignore[reportArgumentType]
        TypeError,
        "radius",
        "patterns, which are strings",
        "0",
    ),
    error(
        "radius_negative_by_pattern",
        lambda: lmo(dm.norms.rms_norm(), {"stem": 1.0, "head": -1.0}),
        ValueError,
        "radius['head'] must be positive and finite, got -1.0",
    ),
    error(
        "radius_no_number_by_pattern",
        lambda: lmo(dm.norms.rms_norm(), {"stem": None}),  # pyright: ignore[reportArgumentType]
        TypeError,
        "radius['stem'] must be a number or a scalar array, got None",
    ),
    error(
        "adaptive_radius_with_negative_l0",
        lambda: dm.schedules.adaptive_radius(-1.0),
        ValueError,
        "l0 must be at least 0 and finite, got -1.0",
    ),
    error(
        "adaptive_radius_with_negative_l1",
        lambda: dm.schedules.adaptive_radius(1.0, -2.0),
        ValueError,
        "l1 must be at least 0 and finite, got -2.0",
    ),
    error(
        "adaptive_radius_of_zeros",
        lambda: dm.schedules.adaptive_radius(0, 0.0),
        ValueError,
        "l0 and l1 are both 0, which makes the radius infinite",
    ),
    error(
        "adaptive_radius_of_words",
        lambda: dm.schedules.adaptive_radius("1"),  # pyright: ignore[reportArgumentType]
        TypeError,
        "l0 must be a number or a scalar array, got '1'",
    ),
    error(
        "gluon_radius_negative",
        lambda: dm.schedules.gluon_radius(-1),
        ValueError,
        "radius must be positive and finite, got -1",
    ),
]

MOMENTUM_ERRORS = [
    error(
        "without_the_second_gradient",
        lambda: updated(dm.mvr_momentum()),
        TypeError,
        "mvr_momentum needs the extra argument 'prev_params_grads'",
        "dm.masked_value_and_grad_pair",
    ),
    error(
        "without_the_second_gradient_in_muon",
        lambda: updated(dm.muon(0.1, momentum=dm.mvr_momentum())),
        TypeError,
        "needs the extra argument 'prev_params_grads'",
    ),
    *(
        error(
            f"the_last_steps_gradient_as_{name}",
            lambda name=name: updated(dm.mvr_momentum(), **{name: PARAMS}),
            TypeError,
            f"update() got '{name}'",
            "gradient of the last step, on another batch",
            "prev_params_grads",
            "dm.transforms.mars_momentum",
        )
        for name in ("prev_grads", "last_gradient", "grads_prev", "old_step_grads", "g_prev")
    ),
    error(
        "second_gradient_misspelt",
        lambda: updated(dm.mvr_momentum(), prev_param_grads=PARAMS),
        TypeError,
        "update() got 'prev_param_grads'. Did you mean 'prev_params_grads'?",
    ),
    error(
        "second_gradient_of_another_structure",
        lambda: updated(dm.mvr_momentum(), prev_params_grads=KERNELS),
        ValueError,
        "prev_params_grads must have the leaves of the gradients",
        "'head/bias' is missing",
    ),
    error(
        "second_gradient_of_another_structure_in_muon",
        lambda: updated(
            dm.muon(0.1, momentum=dm.mvr_momentum()), prev_params_grads={**PARAMS, "tail": 0.0}
        ),
        ValueError,
        "prev_params_grads must have the leaves of the gradients",
        "'tail' is only in prev_params_grads",
    ),
    error(
        "second_gradient_of_another_shape",
        lambda: updated(
            dm.mvr_momentum(),
            prev_params_grads=jax.tree.map(lambda leaf: leaf[None], PARAMS),
        ),
        ValueError,
        "prev_params_grads has shape (1, 2) at 'head/bias', where the gradients have (2,)",
    ),
    error(
        "mvr_without_params",
        lambda: dm.mvr_momentum().update(
            PARAMS, dm.mvr_momentum().init(PARAMS), prev_params_grads=PARAMS
        ),
        ValueError,
        "mvr_momentum keeps the parameters: pass them to update",
    ),
    error(
        "keep_prev_params_without_params",
        lambda: dm.transforms.keep_prev_params().update(
            PARAMS, dm.transforms.keep_prev_params().init(PARAMS)
        ),
        ValueError,
        "keep_prev_params keeps the parameters: pass them to update",
    ),
    error("variant_4", lambda: dm.mvr_momentum(variant=4), ValueError, "variant must be 1, 2 or 3"),
    error("variant_0", lambda: dm.mvr_momentum(variant=0), ValueError, "variant must be at least"),
    error(
        "variant_injected",
        lambda: dm.mvr_momentum(variant=jnp.array(2)),
        TypeError,
        "variant must be a Python integer, got an array",
        "static_args",
    ),
    error(
        "q_for_variant_1",
        lambda: dm.mvr_momentum(q=0.5),
        ValueError,
        "variant 1 has no q",
        "variant=2 or 3",
    ),
    *(
        error(
            f"q_of_{q}",
            lambda q=q: dm.mvr_momentum(variant=2, q=q),
            ValueError,
            "q is the weight of the new gradient",
            f"in (0, 1], got {q}",
        )
        for q in (0.0, 1.5, -0.5)
    ),
    error(
        "q_schedule_not_called",
        lambda: dm.mvr_momentum(variant=2, q=dm.schedules.mvr_q),
        TypeError,
        "q is dm.schedules.mvr_q itself: call it",
    ),
    error(
        "q_is_another_schedule_not_called",
        lambda: dm.mvr_momentum(variant=2, q=dm.schedules.mvr_decay),
        TypeError,
        "q is dm.schedules.mvr_decay itself: call it",
    ),
    error(
        "rate_schedule_not_called",
        lambda: dm.muon(dm.schedules.star_convex_rate, momentum=dm.mvr_momentum()),
        TypeError,
        "learning_rate is dm.schedules.star_convex_rate itself: call it",
    ),
    error(
        "second_gradient_in_masked",
        lambda: updated(optax.masked(dm.mvr_momentum(), LAYERS.mask(1)), prev_params_grads=PARAMS),
        ValueError,
        "prev_params_grads must have the leaves of the gradients",
        "mask_compatible_extra_args=True",
    ),
    error(
        "second_gradient_in_other_containers",
        lambda: dm.mvr_momentum().update(
            [jnp.ones(2)],
            dm.mvr_momentum().init([jnp.ones(2)]),
            [jnp.ones(2)],
            prev_params_grads={"0": jnp.ones(2)},
        ),
        ValueError,
        "prev_params_grads must have the leaves of the gradients: the containers differ",
    ),
    error(
        "second_gradient_of_another_structure_in_per_layer",
        lambda: updated(dm.per_layer(optax.sgd(1.0), LAYERS), prev_params_grads=KERNELS),
        ValueError,
        "prev_params_grads must have the leaves of the gradients",
        "'head/bias' is missing",
    ),
    error(
        "mvr_in_per_layer",
        lambda: dm.per_layer(dm.mvr_momentum(), LAYERS).init(PARAMS),
        ValueError,
        "mvr_momentum looks at the layer mask itself",
        "leave per_layer out",
    ),
    error(
        "injected_dtype",
        lambda: optax.inject_hyperparams(dm.mvr_momentum, static_args="variant")(
            prev_params_dtype=jnp.bfloat16
        ).init(PARAMS),
        TypeError,
        "prev_params_dtype must be a dtype, got an array",
        "static_args",
    ),
    error(
        "params_of_another_shape_than_the_state",
        lambda: dm.mvr_momentum().update(
            PARAMS,
            dm.mvr_momentum().init(PARAMS),
            jax.tree.map(lambda leaf: leaf[None], PARAMS),
            prev_params_grads=PARAMS,
        ),
        ValueError,
        "params has shape (1, 2) at 'head/bias', where the state have (2,)",
    ),
    error(
        "previous_parameters_of_another_shape",
        lambda: dm.prev_params(
            dm.mvr_momentum().init(PARAMS), jax.tree.map(lambda leaf: leaf[None], PARAMS)
        ),
        ValueError,
        "opt_state's params has shape (2,) at 'head/bias', where the parameters have (1, 2)",
    ),
    error(
        "previous_parameters_kept_twice",
        lambda: dm.prev_params(
            optax.chain(dm.transforms.keep_prev_params(), dm.mvr_momentum()).init(PARAMS), PARAMS
        ),
        ValueError,
        "opt_state keeps the previous parameters of 'head/bias' twice",
    ),
    error(
        "decay_schedule_not_called",
        lambda: dm.mvr_momentum(dm.schedules.mvr_decay),
        TypeError,
        "decay is dm.schedules.mvr_decay itself: call it",
    ),
    error("mvr_decay_of_one", lambda: dm.mvr_momentum(1.0), ValueError, "must lie in [0, 1)"),
    error(
        "mars_decay_of_one",
        lambda: dm.transforms.mars_momentum(1.0),
        ValueError,
        "must lie in [0, 1)",
    ),
    error(
        "start_unknown",
        lambda: dm.mvr_momentum(start="zeros"),
        ValueError,
        "start must be one of ['gradient', 'zero'], got 'zeros'",
        "Did you mean 'zero'?",
    ),
    error(
        "on_reactivate_unknown",
        lambda: dm.mvr_momentum(on_reactivate="reset"),
        ValueError,
        "on_reactivate must be one of ['correct', 'decay', 'restart'], got 'reset'",
    ),
    error(
        "the_state_of_another_momentum",
        lambda: dm.mvr_momentum().update(
            PARAMS, dm.momentum().init(PARAMS), PARAMS, prev_params_grads=PARAMS
        ),
        TypeError,
        "The state given to mvr_momentum is none of variant 1",
        "tx.init(params)",
    ),
    error(
        "the_state_of_another_variant",
        lambda: dm.mvr_momentum(variant=2).update(
            PARAMS, dm.mvr_momentum().init(PARAMS), PARAMS, prev_params_grads=PARAMS
        ),
        TypeError,
        "none of variant 2",
    ),
    error(
        "the_state_of_mvr_in_mars",
        lambda: dm.transforms.mars_momentum().update(PARAMS, dm.mvr_momentum().init(PARAMS)),
        TypeError,
        "The state given to mars_momentum is that of another momentum",
    ),
    error(
        "a_schedule_of_q_as_decay",
        lambda: dm.mvr_momentum(dm.schedules.mvr_q()),
        ValueError,
        "decay is the weight of the past and must lie in [0, 1), got 1.0",
    ),
    error(
        "a_schedule_of_decay_as_q",
        lambda: dm.mvr_momentum(variant=2, q=dm.schedules.mvr_decay()),
        ValueError,
        "q is the weight of the new gradient",
        "got 0.0",
    ),
    error(
        "a_dtype_by_a_wrong_name",
        lambda: dm.mvr_momentum(prev_params_dtype="bf16"),
        TypeError,
        "prev_params_dtype must be a dtype, such as jnp.bfloat16, got 'bf16'",
    ),
    error("mvr_dtype", lambda: dm.mvr_momentum(dtype=jnp.int32), TypeError, "dtype", "int32"),
    error(
        "prev_params_dtype",
        lambda: dm.mvr_momentum(prev_params_dtype=jnp.int8),
        TypeError,
        "prev_params_dtype must be of a floating-point dtype, got int8",
    ),
    error(
        "kept_dtype", lambda: dm.transforms.keep_prev_params(jnp.int8), TypeError, "dtype", "int8"
    ),
    error(
        "gamma_negative",
        lambda: dm.transforms.mars_momentum(gamma=-1.0),
        ValueError,
        "gamma",
        "-1.0",
    ),
    error(
        "max_norm_zero",
        lambda: dm.transforms.mars_momentum(max_norm=0.0),
        ValueError,
        "max_norm",
        "0.0",
    ),
    error(
        "mars_dtype",
        lambda: dm.transforms.mars_momentum(dtype=jnp.int32),
        TypeError,
        "dtype",
        "int32",
    ),
    error(
        "no_previous_parameters_at_all",
        lambda: dm.prev_params(dm.momentum().init(PARAMS), PARAMS),
        ValueError,
        "opt_state keeps no previous parameters of 'head/bias'",
        "Is there a dm.mvr_momentum in the optimizer",
    ),
    error(
        "no_previous_parameters_of_a_leaf",
        lambda: dm.prev_params(dm.mvr_momentum().init(KERNELS), PARAMS),
        ValueError,
        "opt_state keeps no previous parameters of 'head/bias'",
        "dm.transforms.keep_prev_params()",
    ),
    error(
        "previous_parameters_under_accumulation",
        lambda: dm.prev_params(
            (optax.MultiSteps(dm.muon(0.1, momentum=dm.mvr_momentum()), 2).init(PARAMS),), PARAMS
        ),
        ValueError,
        "optax.MultiSteps averages the gradients of its micro-batches, and not prev_params_grads",
        "average both gradients",
    ),
    error(
        "a_pair_without_a_mask",
        lambda: dm.masked_value_and_grad_pair(loss_fn)(PARAMS, PARAMS),
        TypeError,
        "The keyword argument 'layer_mask' is missing",
        "layer_mask=None for all layers",
    ),
    error(
        "a_pair_with_a_mask_of_another_structure",
        lambda: dm.masked_value_and_grad_pair(loss_fn)(
            PARAMS, PARAMS, layer_mask=dm.layers_by_path(KERNELS, ["stem", "mid", "head"]).mask(0)
        ),
        ValueError,
        "'head/bias' is missing from the mask",
    ),
    error(
        "a_pair_with_other_previous_parameters",
        lambda: dm.masked_value_and_grad_pair(loss_fn)(PARAMS, KERNELS, layer_mask=None),
        ValueError,
        "prev_params must have the leaves of the parameters",
        "'head/bias' is missing",
    ),
    error(
        "constrained_rate_above_one",
        lambda: dm.scion(1.5, {"hidden": 3.0}, momentum=dm.mvr_momentum()),
        ValueError,
        "learning_rate",
        "at most 1, got 1.5",
    ),
    error(
        "ball_of_radius_zero",
        lambda: dm.scion(0.2, {"hidden": 0.0}),
        ValueError,
        "radii['hidden'] must be positive and finite, got 0.0",
    ),
    error(
        "radius_schedule",
        lambda: dm.schedules.mvr_radius(0.0),
        ValueError,
        "radius must be positive",
    ),
    error(
        "radius_schedule_not_called",
        lambda: dm.gluon(dm.schedules.mvr_radius),
        TypeError,
        "learning_rate is dm.schedules.mvr_radius itself",
    ),
    *(
        error(
            f"{name}_with_mvr_and_a_mask",
            lambda tx=tx: updated(tx, layer_mask=LAYERS.mask(0), prev_params_grads=PARAMS),
            TypeError,
            f"{name} updates every layer and takes no layer_mask or depth; use drop_{name}.",
        )
        for name, tx in (
            ("gluon", dm.gluon(0.1, momentum=dm.mvr_momentum())),
            (
                "scion",
                dm.scion(0.1, dict.fromkeys(dm.layers.ROLES, 3.0), momentum=dm.mvr_momentum()),
            ),
        )
    ),
]

OPTIMIZER_ERRORS = [
    error(
        "decay_of_one",
        lambda: dm.momentum(1.0),
        ValueError,
        "decay is the weight of the past and must lie in [0, 1), got 1.0",
        "1 - decay",
    ),
    error("decay_negative", lambda: dm.momentum(-0.1), ValueError, "decay", "[0, 1), got -0.1"),
    error("decay_nan", lambda: dm.momentum(float("nan")), ValueError, "decay", "got nan"),
    error(
        "learning_rate_negative",
        lambda: drop_muon(-0.1),
        ValueError,
        "learning_rate must be at least 0 and finite, got -0.1",
    ),
    error(
        "learning_rate_negative_in_muon",
        lambda: dm.muon(-0.1),
        ValueError,
        "learning_rate must be at least 0 and finite, got -0.1",
    ),
    error(
        "auxiliary_learning_rate_negative",
        lambda: drop_muon(auxiliary_learning_rate=-0.1),
        ValueError,
        "auxiliary_learning_rate must be at least 0",
    ),
    error(
        "weight_decay_negative",
        lambda: drop_muon(weight_decay=-0.1),
        ValueError,
        "weight_decay must be at least 0",
    ),
    error(
        "leaf_in_no_layer",
        lambda: dm.per_layer(optax.sgd(0.1), LAYERS).init(PARAMS | {"tail": jnp.ones(2)}),
        ValueError,
        "Leaf 'tail' is in no layer",
        "Make the layers from these parameters",
    ),
    error(
        "auxiliary_leaf_in_no_layer_in_drop_muon",
        lambda: drop_muon().init(PARAMS | {"tail": jnp.ones(2)}),
        ValueError,
        "Leaf 'tail' is in no layer",
    ),
    error(
        "matrix_in_no_layer_in_drop_muon",
        lambda: drop_muon().init(PARAMS | {"tail": jnp.ones((2, 2))}),
        ValueError,
        "Leaf 'tail' is in no layer",
    ),
    error(
        "mask_that_splits_a_layer",
        lambda: updated(dm.per_layer(optax.sgd(0.1), LAYERS), layer_mask=mask_that_splits("mid")),
        ValueError,
        "layer_mask is True at 'mid/kernel' and False at another leaf of layer mid",
        "layers.mask or layers.subset",
    ),
    error(
        "label_unknown",
        lambda: dm.chain_subtrees(
            {"matrix": optax.sgd(0.1), "vector": optax.sgd(0.1)},
            {"stem": "matrix", "mid": {"kernel": "matrices", "bias": "vector"}, "head": "matrix"},
        ).init(PARAMS),
        ValueError,
        "Leaf 'mid/kernel' has the label 'matrices'",
        "['matrix', 'vector']",
        "Did you mean 'matrix'?",
    ),
    error(
        "step_of_multi_steps",
        lambda: dm.train_step(loss_fn, optax.MultiSteps(drop_muon(), 2), SAMPLER),
        TypeError,
        "optimizer must be an optax.GradientTransformation, got a MultiSteps",
        "Give optax.GradientTransformationExtraArgs(steps.init, steps.update)",
    ),
    error(
        "no_transforms",
        lambda: dm.chain_subtrees({}, {}),
        ValueError,
        "transforms is empty; give one transformation for each label",
    ),
    error(
        "auxiliary_descends",
        lambda: dm.check_optimizer(drop_muon(auxiliary=optax.adamw(1e-3)), PARAMS, LAYERS),
        ValueError,
        "Leaf 'head/bias' moves along its gradient: the optimizer climbs there",
        "optax.scale_by_adam() in place of",
        "auxiliary_learning_rate",
    ),
    error(
        "momentum_descends",
        lambda: dm.check_optimizer(dm.muon(0.1, momentum=optax.sgd(0.1)), PARAMS),
        ValueError,
        "Leaf 'head/kernel' moves along its gradient: the optimizer climbs there",
    ),
    error(
        "no_learning_rate",
        lambda: dm.check_optimizer(dm.momentum(), PARAMS),
        ValueError,
        "moves along its gradient",
        "end a chain of your own with optax.scale_by_learning_rate(…)",
    ),
    error(
        "frozen_parameters_that_move",
        lambda: dm.check_optimizer(optax.chain(LINK, optax.adam(0.1)), PARAMS, LAYERS),
        ValueError,
        "moves in a step in which its layer is not active",
        "dm.per_layer(…, layers), or before dm.layer_mask_sampler(layers, …)",
    ),
    error(
        "frozen_state_that_moves",
        lambda: dm.check_optimizer(optax.chain(optax.adam(0.1), LINK), PARAMS, LAYERS),
        ValueError,
        "The state",
        "of leaf 'mid/bias' changes in a step in which its layer is not active",
        "dm.per_layer(…, layers)",
    ),
]

STACK = {"embed": jnp.ones((3, 4)), "blocks": {"w": jnp.ones((5, 4, 4)), "b": jnp.ones((5, 4))}}
STACK_LAYERS = dm.layers_by_path(STACK, ["embed", dm.stacked("blocks")])


def stack_layers(*patterns: Any, params: Any = STACK) -> Any:
    return dm.layers_by_path(params, patterns)


def scan(xs: Any = STACK["blocks"], f: Any = None, init: Any = None, depth: Any = 0) -> Any:
    def layer(carry, row):
        return carry @ row["w"], None

    return dm.scan_layers(f or layer, jnp.ones(4) if init is None else init, xs, depth=depth)


STACK_ERRORS = [
    error(
        "stack_of_unequal_sizes",
        lambda: stack_layers(
            dm.stacked("*"), params={"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}
        ),
        ValueError,
        "The leaves of the stack '*' need a leading axis of one size",
        "'a' has shape (3, 2), and 'b' (4, 2)",
    ),
    error(
        "stack_with_a_scalar",
        lambda: stack_layers(dm.stacked("*"), params={"a": jnp.ones((3, 2)), "b": jnp.ones(())}),
        ValueError,
        "'a' has shape (3, 2), and 'b' ()",
        "A leaf that is not stacked belongs to a layer of its own",
    ),
    error(
        "stack_of_an_empty_axis",
        lambda: stack_layers(dm.stacked("*"), params={"a": jnp.ones((0, 2))}),
        ValueError,
        "need a leading axis of one size, an entry for each layer",
    ),
    error(
        "stack_misspelt",
        lambda: stack_layers("embed", dm.stacked("block")),
        ValueError,
        "Pattern 'block' matches no leaf. Did you mean 'blocks'?",
    ),
    error("stack_without_patterns", lambda: dm.stacked(), TypeError, "nonempty string patterns"),
    error("stack_of_a_number", lambda: dm.stacked(3), TypeError, "nonempty string patterns"),
    error(
        "stack_as_the_patterns",
        lambda: dm.layers_by_path(STACK, dm.stacked("blocks")),
        TypeError,
        "patterns must be a sequence with a pattern for each layer",
    ),
    error(
        "depth_of_a_stack_unknown",
        lambda: STACK_LAYERS.stack_depth(1, "block"),
        ValueError,
        "stack must be one of ['blocks'], got 'block'",
        "Did you mean 'blocks'?",
    ),
    error(
        "depth_of_one_of_several_stacks",
        lambda: stack_layers(
            dm.stacked("a"), dm.stacked("b"), params={"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))}
        ).stack_depth(1),
        ValueError,
        "There are several stacks, ['a', 'b']: say which, stack='a'",
    ),
    error(
        "depth_of_no_stack",
        lambda: LAYERS.stack_depth(1),
        ValueError,
        "stack_depth needs stacked layers, and there are none",
        "dm.stacked",
    ),
    error(
        "depth_of_a_stack_out_of_range",
        lambda: STACK_LAYERS.stack_depth(6),
        ValueError,
        "depth must be at most 5, with 6 layers, got 6",
    ),
    error(
        "depth_of_a_mask_is_a_float",
        lambda: STACK_LAYERS.mask(jnp.ones(())),
        TypeError,
        "depth must be one integer, got an array of float32[]",
    ),
    error(
        "depth_of_a_mask_is_a_vector",
        lambda: traced(STACK_LAYERS.mask, jnp.arange(2)),
        TypeError,
        "depth must be one integer, got an array of int32[2]",
    ),
    error(
        "mask_of_another_stack",
        lambda: updated(
            dm.per_layer(optax.sgd(0.1), STACK_LAYERS),
            STACK,
            layer_mask={"embed": True, "blocks": {"w": np.ones(4, bool), "b": np.ones(4, bool)}},
        ),
        ValueError,
        "layer_mask has shape (4,) at 'blocks/b', and the leaf (5, 4)",
        "one boolean for each layer of the stack",
    ),
    error(
        "mask_of_numbers_for_rows",
        lambda: updated(
            dm.per_layer(optax.sgd(0.1), STACK_LAYERS),
            STACK,
            layer_mask={"embed": True, "blocks": {"w": np.ones(5), "b": np.ones(5)}},
        ),
        TypeError,
        "layer_mask must have Python booleans as leaves",
        "'blocks/b'",
    ),
    error(
        "mask_of_rows_that_splits_a_layer",
        lambda: updated(
            dm.per_layer(optax.sgd(0.1), STACK_LAYERS),
            STACK,
            layer_mask={"embed": True, "blocks": {"w": np.arange(5) > 1, "b": np.arange(5) > 2}},
        ),
        ValueError,
        "at 'blocks/w'",
        "another leaf of layer blocks",
    ),
    error(
        "mask_of_rows_for_layers_without_stacks",
        lambda: updated(
            dm.per_layer(optax.sgd(0.1), dm.layers_by_path(STACK, ["embed", "blocks"])),
            STACK,
            layer_mask=STACK_LAYERS.mask(3),
        ),
        TypeError,
        "layer_mask tells the layers of the stack 'blocks/b' apart",
        "dm.per_layer(…, layers, takes_mask=True)",
    ),
    *(
        error(
            f"mask_of_rows_in_{name}",
            lambda tx=tx: updated(
                tx, {"w": jnp.ones((3, 2, 2))}, layer_mask={"w": np.arange(3) > 1}
            ),
            TypeError,
            "layer_mask tells the layers of the stack 'w' apart, which this transformation does",
            "dm.per_layer(…, layers, takes_mask=True)",
        )
        for name, tx in (
            ("momentum", dm.momentum()),
            ("mvr_momentum", dm.mvr_momentum()),
            ("mars_momentum", dm.transforms.mars_momentum()),
            ("keep_prev_params", dm.transforms.keep_prev_params()),
            ("an_lmo", dm.newton_schulz_lmo(dimension_numbers=spec(1, 2))),
        )
    ),
    error(
        "mask_of_rows_for_a_leaf_that_is_not_stacked",
        lambda: updated(
            dm.per_layer(optax.sgd(0.1), STACK_LAYERS),
            STACK,
            layer_mask=STACK_LAYERS.mask(0) | {"embed": np.ones(3, bool)},
        ),
        ValueError,
        "layer_mask is a vector at 'embed', which is not stacked in these layers",
    ),
    error(
        "mask_for_an_inner_that_takes_none",
        lambda: dm.per_layer(optax.scale_by_adam(), STACK_LAYERS, takes_mask=True),
        TypeError,
        "takes_mask=True is for an inner that looks at layer_mask",
        "leave takes_mask out",
    ),
    error(
        "mask_for_an_inner_that_ignores_it",
        lambda: dm.check_optimizer(
            dm.per_layer(optax.chain(optax.adam(0.1)), STACK_LAYERS, takes_mask=True),
            STACK,
            STACK_LAYERS,
        ),
        ValueError,
        "changes in a step in which its layer is not active",
    ),
    error(
        "rows_of_rows",
        lambda: dm.drop_muon(
            0.1,
            STACK_LAYERS,
            momentum=dm.per_layer(optax.trace(0.9), STACK_LAYERS),
        ).init(STACK),
        ValueError,
        "Leaf 'blocks/w' has shape (4, 4), and the stack 'blocks' 5 layers",
        "inside another dm.per_layer",
    ),
    error(
        "stack_inside_a_layer",
        lambda: stack_layers(("embed", dm.stacked("blocks"))),
        TypeError,
        "dm.stacked(…) is an entry of its own",
    ),
    error(
        "scan_with_another_dtype_of_the_whole_carry",
        lambda: scan(f=lambda carry, row: (carry.astype(jnp.bfloat16), None)),
        TypeError,
        "The carry is float32[4] and becomes bfloat16[4]",
    ),
    error(
        "scan_of_nothing",
        lambda: scan(xs={}),
        ValueError,
        "xs has no leaves: give the stacked parameters",
    ),
    error(
        "scan_of_unequal_sizes",
        lambda: scan(xs={"w": jnp.ones((5, 4, 4)), "key": jnp.ones(4)}),
        ValueError,
        "The leaves of xs must agree in their leading size",
        "'key' has shape (4,), and 'w' (5, 4, 4)",
    ),
    error(
        "scan_of_a_scalar",
        lambda: scan(xs={"w": jnp.ones((5, 4, 4)), "temperature": 1.0}),
        ValueError,
        "Leaf 'temperature' of xs is a scalar",
        "f can close over",
    ),
    error("scan_below_0", lambda: scan(depth=-1), ValueError, "depth must be at least 0, got -1"),
    error(
        "scan_beyond_the_last_layer",
        lambda: scan(depth=6),
        ValueError,
        "depth must be at most 5, the number of layers in xs, got 6",
        "layers.stack_depth",
    ),
    error(
        "scan_to_a_fraction", lambda: scan(depth=0.5), TypeError, "depth must be a Python integer"
    ),
    error("scan_to_a_truth_value", lambda: scan(depth=True), TypeError, "got a truth value"),
    error(
        "scan_to_a_traced_fraction",
        lambda: scan(depth=jnp.ones(())),
        TypeError,
        "depth must be one integer, got an array of float32[]",
    ),
    error(
        "scan_without_a_pair",
        lambda: scan(f=lambda carry, row: carry),
        TypeError,
        "f must return a pair of the next carry and an output",
        "got one array",
        "return carry, None",
    ),
    error(
        "scan_with_another_structure",
        lambda: scan(f=lambda carry, row: ((carry, carry), None)),
        TypeError,
        "f must return a carry of the structure that it takes",
        "PyTreeDef(*)",
        "PyTreeDef((*, *))",
    ),
    error(
        "scan_with_another_shape",
        lambda: scan(init={"x": jnp.ones(4)}, f=lambda c, row: ({"x": c["x"][:2]}, None)),
        TypeError,
        "Leaf 'x' of the carry is float32[4] and becomes float32[2]",
    ),
    error(
        "scan_with_another_dtype",
        lambda: scan(
            init={"x": jnp.ones(4, jnp.bfloat16)}, f=lambda c, row: ({"x": c["x"] @ row["w"]}, None)
        ),
        TypeError,
        "Leaf 'x' of the carry is bfloat16[4] and becomes float32[4]",
    ),
]


def assert_message(exception: type[Exception], words: tuple[str, ...], function: Any) -> None:
    with pytest.raises(exception, match="(?s)" + ".*".join(map(re.escape, words))):
        function()


@pytest.mark.parametrize(
    ("function", "exception", "words"),
    [
        *LAYER_ERRORS,
        *MASK_ERRORS,
        *SAMPLING_ERRORS,
        *LMO_ERRORS,
        *NORM_ERRORS,
        *RADIUS_ERRORS,
        *MOMENTUM_ERRORS,
        *OPTIMIZER_ERRORS,
        *STACK_ERRORS,
    ],
)
def test_bad_input_is_named_with_the_way_out(function, exception, words):
    assert_message(exception, words, function)


@pytest.mark.parametrize(("function", "exception", "words"), BAD_MASKS)
@pytest.mark.parametrize(
    "call", [pytest.param(call, id=name) for name, call in TAKES_A_MASK.items()]
)
def test_a_bad_mask_is_named_with_the_way_out(call, function, exception, words):
    assert_message(exception, words, functools.partial(function, call))


@pytest.mark.parametrize("seed", [0.5, "7", None])
def test_a_seed_that_is_no_integer_is_a_type_error(seed):
    with pytest.raises(TypeError, match="seed"):
        sampler(UNIFORM, seed=seed)


@pytest.mark.parametrize("value", ["0.1", None, True])
@pytest.mark.parametrize(
    ("name", "factory"),
    [
        pytest.param("radius", dm.newton_schulz_lmo, id="newton_schulz_lmo"),
        pytest.param(
            "step_size",
            functools.partial(dm.transforms.norm_sharp, dm.norms.sign_norm()),
            id="norm_sharp",
        ),
        pytest.param("decay", dm.momentum, id="momentum"),
        pytest.param("decay", dm.mvr_momentum, id="mvr_momentum"),
        pytest.param("gamma", dm.transforms.mars_momentum, id="mars_momentum"),
        pytest.param("learning_rate", drop_muon, id="drop_muon"),
    ],
)
def test_a_hyperparameter_that_is_no_number_is_a_type_error(name, factory, value):
    with pytest.raises(TypeError, match=name):
        factory(**{name: value})


@pytest.mark.parametrize(
    "name",
    sorted(
        {*inspect.signature(optax.contrib.muon).parameters}
        - {*inspect.signature(dm.muon).parameters}
    ),
)
@pytest.mark.parametrize("muon", [functools.partial(dm.muon, 0.1), drop_muon])
def test_an_argument_of_optax_muon_names_what_says_the_same_here(muon, name):
    with pytest.raises(TypeError, match=f"muon.. has no argument '{name}': say .*"):
        muon(**{name: None})
