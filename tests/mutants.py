"""Bugs of one line that users would notice, each with a test that finds it: no guarantee is lost.

python tests/mutants.py [NAME …] [--find [TEST …]] [--all-tests]

Each mutant is put into a copy of the checkout, where its killers are run: one that leaves them
green has SURVIVED, and is an error. In the end the tests that failed are run without any mutant,
since what is red anyway finds nothing. Killers are tests of `make test`, unless only several
devices or processes show the bug.

A NAME is a part of a mutant's name or file. With `--find` a killer is looked for in other tests as
well, by default in all of `make test`, and with `--all-tests` in the deep ones too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = (
    "dropmuon_jax",
    "tests",
    "benchmarks",
    "docs",
    "examples",
    "README.md",
    "pyproject.toml",
    "Makefile",
)
SECONDS = 1800  # many times what the slowest killers take


class Mutant(NamedTuple):
    """A bug: in the one place in a file of the package where `before` stands, `after` does."""

    name: str
    file: str
    before: str
    after: str
    killers: tuple[str, ...]
    """Tests as pytest takes them, without the name of their folder."""
    deep: bool = False
    """Whether only several devices or processes show it, so that the killer may be a deep test."""

    @property
    def title(self) -> str:
        """What it is called in the output, and found by."""
        return f"{self.file}: {self.name}"


# fmt: off
MUTANTS = (
    Mutant("a depth leaves out its own layer", "layers/layers.py",
        "[layer >= depth for", "[layer > depth for",
        ("test_layers.py::test_a_depth_activates_the_layers_from_there_to_the_output",)),
    Mutant("a depth one past the last is accepted", "layers/layers.py",
        "if depth > last:", "if depth > last + 1:",
        ("test_errors.py::test_bad_input_is_named_with_the_way_out",)),
    Mutant("a root pattern matches anywhere", "layers/by_path.py",
        '"^" if anchored', '"" if anchored',
        ("test_layers.py::test_patterns_match_whole_components_in_any_container",)),
    Mutant("a container is ordered by its last use", "layers/by_trace.py",
        "first[container] = min(", "first[container] = max(",
        ("test_layers.py::test_a_leaf_beside_containers_is_a_layer_of_its_own",)),
    Mutant("kernels (out, in) are read as (in, out)", "layers/matrices.py",
        "else (second, first)", "else (first, second)",
        ("test_other_libraries.py::test_an_equinox_model_learns_in_steps_of_the_due_size",)),
    Mutant("the window of a convolution is no fan-in", "layers/matrices.py",
        "(*of_window, fan_in), (fan_out,)", "(fan_in,), (fan_out,)",
        ("test_lmo.py::test_a_step_of_a_tree_is_its_norms_of_each_matrix",)),
    Mutant("axes do not come back in their order", "layers/matrices.py",
        "transpose(np.argsort(order))", "transpose(order)",
        ("test_lmo.py::test_dimension_numbers_say_by_path_what_the_matrices_of_a_leaf_are",)),
    Mutant("biases of several axes are matrices", "layers/kinds.py",
        "words[-1] in _VECTORS or", "False or", ("test_labels.py",)),
    Mutant("a misspelt key of labels is let through", "layers/prefixes.py",
        "or not used.issuperset(places.values())", "",
        ("test_prefixes.py::test_a_prefix_says_what_the_tree_says_that_it_stands_for",)),
    Mutant("a model of labels is called", "layers/prefixes.py",
        "jax.tree_util.all_leaves([given])", "callable(given)",
        ("test_prefixes.py::test_labels_are_found_by_path_whatever_contains_them",)),
    Mutant("inactive gradients pass a transformation", "layers/trees.py",
        "if active else jnp.zeros_like(update)", "if active else update", ("test_momentum.py",)),
    Mutant("an inactive momentum is advanced", "layers/trees.py",
        "function(old, *others) if active else old,", "function(old, *others),",
        ("test_momentum.py",)),
    Mutant("the epoch shift runs backwards", "sampling/distributions.py",
        "(num_layers - 1 - depth) + tau * depth", "depth + tau * (num_layers - 1 - depth)",
        ("test_sampling.py::test_epoch_shift_is_its_formula",)),
    Mutant("draws ignore the seed", "sampling/sampler.py",
        "return draw_index(seed_words(sampler.seed), draw, probabilities), probabilities",
        "return draw_index(seed_words(0), draw, probabilities), probabilities",
        ("test_sampling.py::test_the_link_of_a_chain_draws_as_a_sampler_with_the_same_arguments",)),
    Mutant("a seed loses its upper 32 bits", "sampling/record.py",
        "np.array([seed >> 32, seed", "np.array([0, seed", ("test_sampling.py",)),
    Mutant("processes need only share one word", "sampling/reading.py",
        "if (everyone == everyone[0]).all():", "if (everyone == everyone[0]).any():",
        ("test_pods.py::test_processes_that_would_draw_otherwise_get_an_error_that_names_both",),
        deep=True),
    Mutant("a layer costs what it saves, with the wrong sign", "sampling/adaptive.py",
        "-np.diff(not_rising(", "np.diff(not_rising(",
        ("test_adaptive_sampling.py",)),
    Mutant("a draw may outlive its plan", "sampling/adaptive.py",
        "if distribution.steps_per_plan % steps_per_draw:",
        "if distribution.steps_per_plan < steps_per_draw:",
        ("test_adaptive_sampling.py::test_what_no_record_or_plan_can_be_made_of_is_refused",)),
    Mutant("gains have the sign of the loss", "sampling/record.py",
        "decrease = -_sums(", "decrease = _sums(", ("test_adaptive_sampling.py",)),
    Mutant("a step that is left out gains nothing", "sampling/record.py",
        "(step_length > 0) & ~is_left_out", "(step_length > 0)",
        ("test_adaptive_sampling.py::test_steps_that_are_left_out_change_no_gain_before_or_after",)),
    Mutant("draws on the device wait for every state", "sampling/reading.py",
        "is_known and not sampler.compared", "is_known",
        ("test_adaptive_sampling.py::test_draws_on_the_device_read_the_first_state_and_wait_for_no_other",)),
    Mutant("all gradients are computed", "backprop/gradients.py",
        "[not is_static(flag) or flag for flag in flags]", "[True for _ in flags]",
        ("test_backprop.py::test_active_gradients_are_those_of_jax_and_the_others_zero",)),
    Mutant("the second gradient is taken at the new parameters", "backprop/gradients.py",
        "= gradient(previous, *args,", "= gradient(params, *args,",
        ("test_variance_reduction.py",)),
    Mutant("a step hands over its own parameters as the previous ones", "backprop/gradients.py",
        "args = prev_params(opt_state, params), *args", "args = params, *args",
        ("test_train_step.py::test_it_is_the_parts_bit_for_bit",)),
    Mutant("a second forward pass runs below the depth", "backprop/gradients.py",
        "return old.astype(now.dtype) if flag else now", "return old.astype(now.dtype)",
        ("test_variance_reduction.py",)),
    Mutant("batch statistics stand still", "backprop/gradients.py",
        "return loss, (aux, state_like(rest, new_rest))", "return loss, (aux, rest)",
        ("test_train_step.py::test_an_nnx_module_is_trained_in_place_as_its_state_is",)),
    Mutant("gradients pass below a static depth", "backprop/scan_layers.py",
        "init, below = jax.lax.stop_gradient((init, [x[:depth] for x in xs]))",
        "init, below = init, [x[:depth] for x in xs]", ("test_scan_layers.py",)),
    Mutant("the backward pass visits every layer", "backprop/traced_depth.py",
        "0, num_layers - depth, turn, (ct_consts", "0, num_layers, turn, (ct_consts",
        ("test_scan_layers.py::test_any_integer_is_a_depth",)),
    Mutant("the backward pass is one layer off", "backprop/traced_depth.py",
        "i = num_layers - 1 - t", "i = num_layers - 2 - t", ("test_scan_layers.py",)),
    Mutant("every layer keeps what it computes", "backprop/traced_depth.py",
        "jax.checkpoint(differentiable, prevent_cse=False, policy=policy)", "differentiable",
        ("test_scan_layers.py::test_memory_is_that_of_a_rematerialized_scan",)),
    Mutant("a switch has its branches in the wrong order", "backprop/traced_depth.py",
        "layer_mask=mask) for mask in masks]", "layer_mask=mask) for mask in masks[::-1]]",
        ("test_backprop.py::test_a_run_on_the_device_repeats_the_run_from_the_host",)),
    Mutant("a step donates against its word", "backprop/programs.py",
        '"donate_argnums": 0 if donate else ()', '"donate_argnums": 0',
        ("test_train_step.py::test_a_plain_optimizer_moves_no_inactive_parameter",)),
    Mutant("stacks have an executable for each depth", "backprop/train_step.py",
        "(self._index[active], None) if self._is_stacked", "(None, active) if self._is_stacked",
        ("test_stacked_layers.py::test_a_stack_trains_in_one_program_as_separate_layers_do",)),
    Mutant("parameters and state change their places", "backprop/programs.py",
        "zip((*shardings[:2], None), carried, strict=True)",
        "zip((*shardings[1::-1], None), carried, strict=True)",
        ("test_on_eight_devices.py",), deep=True),
    Mutant("a gradient that could not be traced is kept", "backprop/programs.py",
        "result = program(carried, others)",
        "result = self._programs.setdefault(static, program)(carried, others)",
        ("test_train_step.py::test_a_gradient_of_fewer_layers_does_without_one_of_more_that_fails",)),
    Mutant("an effect of a frozen layer stays in a cut gradient", "backprop/programs.py",
        "if jaxpr.effects or len(grads) > 1:", "if len(grads) > 1:",
        ("test_train_step.py::test_effects_of_a_backward_pass_are_those_of_active_layers",)),
    Mutant("the second of two gradients is cut out of another", "backprop/programs.py",
        "if jaxpr.effects or len(grads) > 1:", "if jaxpr.effects:",
        ("test_train_step.py::test_it_is_the_parts_bit_for_bit",)),
    Mutant("constants do not tell programs apart", "backprop/by_layer.py",
        "return x.dtype, x.shape, np.asarray(x).tobytes()", "return x.dtype, x.shape",
        ("test_by_layer.py::test_programs_are_equal_that_compute_the_same",)),
    Mutant("layers with functions of the host share them", "backprop/by_layer.py",
        "key if _calls_host(cut.jaxpr) else lowered.as_text()", "lowered.as_text()",
        ("test_by_layer.py::test_functions_of_the_host_are_those_of_their_layers",)),
    Mutant("what a layer joins depends on all", "orthogonalize/batches.py",
        "for i in chain(*buckets.values()))", "for i in range(len(size)))",
        ("test_by_layer.py::test_what_a_layer_joins_within_a_memory_limit_does_not_depend_on_others",)),
    Mutant("each leaf is a group of its own", "orthogonalize/batches.py",
        "if len(packed) > _MAX_GROUPS:", "if False:",
        ("test_orthogonalize.py::test_leaves_are_in_eight_groups_at_most_which_fit_where_fewer_do",)),
    Mutant("groups of leaves do not wait for each other", "orthogonalize/batches.py",
        "wide[0] = _after(last, wide[0])", "pass",
        ("test_orthogonalize.py::test_leaves_of_several_shapes_are_joined_one_shape_after_the_other",)),
    Mutant("the states of layers keep the nodes of all others", "transforms/per_layer.py",
        "states.append(without_masked(state_like(state, state)))",
        "states.append(state_like(state, state))",
        ("test_contract.py::test_a_state_by_layer_has_few_nodes_for_each_parameter",)),
    Mutant("zero matrices become NaN", "orthogonalize/newton_schulz.py",
        "jax.lax.rsqrt(jnp.where(x == 0, 1, x))", "jax.lax.rsqrt(x)", ("test_orthogonalize.py",)),
    Mutant("the larger Gram matrix is iterated", "orthogonalize/newton_schulz.py",
        "wide = x.shape[-2] <= x.shape[-1]", "wide = x.shape[-2] >= x.shape[-1]",
        ("test_orthogonalize.py::test_singular_values_end_in_the_stated_band",)),
    Mutant("bfloat16 is multiplied in full", "orthogonalize/newton_schulz.py",
        "if dtype != accumulator:", "if dtype == accumulator:", ("test_orthogonalize.py",)),
    Mutant("directions without a singular value get one", "orthogonalize/batches.py",
        "jnp.where(s <= threshold, 0, 1)", "jnp.where(s < 0, 0, 1)", ("test_norms.py",)),
    Mutant("Muon's factor is upside down", "norms/norm.py",
        "max(1.0, shape.fan_out / shape.fan_in)", "max(1.0, shape.fan_in / shape.fan_out)",
        ("test_norms.py",)),
    Mutant("lengths of bfloat16 are summed in bfloat16", "norms/norm.py",
        "wide = stack.astype(np.promote_types(x.dtype, np.float32))", "wide = stack",
        ("test_norms.py",)),
    Mutant("columns are normalized along rows", "norms/named.py",
        "direction=lambda g: _unit(g, -1),", "direction=lambda g: _unit(g, -2),",
        ("test_norms.py",)),
    Mutant("Gluon's decay falls", "schedules.py",
        "1 - _steps(count) ** -0.5", "_steps(count) ** -0.5", ("test_radii.py",)),
    Mutant("the constants of an adaptive radius are swapped", "schedules.py",
        "return AdaptiveRadius(l0, l1)", "return AdaptiveRadius(l1, l0)",
        ("test_radii.py::test_a_mapping_may_hold_schedules_and_adaptive_radii",)),
    Mutant("Algorithm 1 swaps its weights", "algorithm.py",
        "decay * m[i] + (1 - decay) * gradient[i]", "(1 - decay) * m[i] + decay * gradient[i]",
        ("test_algorithm.py",)),
    Mutant("a static integer may be below its minimum", "_checks.py",
        "if integer < minimum:", "if integer < 0:",
        ("test_errors.py::test_what_must_be_a_python_integer_is_named",)),
    Mutant("a misspelt layer_mask passes", "_checks.py", "cutoff=0.8", "cutoff=0.999",
        ("test_contract.py::test_a_misspelt_extra_argument_is_an_error_that_names_the_right_one",)),
    Mutant("NNX variables that are no parameters pass", "_checks.py",
        "isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)",
        "isinstance(node, nnx.RngState)", ("test_parameters.py",)),
    Mutant("a name is missing at the root", "__init__.py", "    epoch_shift_depth,", "",
        ("test_house.py::test_the_root_has_about_forty_names_and_all_are_there",)),
    Mutant("momentum swaps its weights", "transforms/momentum.py",
        "weight * m.astype(wide) + (1 - weight) * g", "(1 - weight) * m.astype(wide) + weight * g",
        ("test_momentum.py",)),
    Mutant("Nesterov does not look ahead", "transforms/momentum.py",
        "(average(m, g) if nesterov else m)", "m",
        ("test_algorithm.py::test_with_its_settings_our_muon_steps_like_optax_muon",)),
    Mutant("momentum averages in bfloat16", "transforms/momentum.py",
        "np.dtype(np.float32))", "np.dtype(np.float16))", ("test_momentum.py",)),
    Mutant("MARS forgets the last gradient", "transforms/momentum.py",
        "stored_like(state.last_grads, updates, layer_mask),", "state.last_grads,",
        ("test_variance_reduction.py",)),
    Mutant("MVR corrects by the new gradient", "transforms/mvr.py",
        "estimator = m = g + decay * (m - g_prev)", "estimator = m = g + decay * (m - g)",
        ("test_variance_reduction.py",)),
    Mutant("q is the weight of the past", "transforms/mvr.py",
        "1 - jnp.asarray(q(count) if callable(q) else q),",
        "jnp.asarray(q(count) if callable(q) else q),", ("test_variance_reduction.py",)),
    Mutant("a frozen minus zero becomes zero", "transforms/masked.py",
        "jnp.full_like(update, -0.0)", "jnp.zeros_like(update)", ("test_contract.py",)),
    Mutant("a link of a chain does not freeze rows", "transforms/masked.py",
        "return where_active(flag, update, -0.0)", "return update",
        ("test_stacked_layers.py::test_inactive_rows_keep_every_bit_of_parameters_and_state",)),
    Mutant("a state does not keep its dtype", "layers/states.py",
        "else jnp.asarray(x, dtype)", "else x",
        ("test_contract.py::test_per_layer_keeps_the_dtypes_of_a_state_that_its_inner_would_change",)),
    Mutant("a mask may be lost on the way", "layers/states.py",
        "has_mask, layer_mask = True,", "has_mask, layer_mask = False,",
        ("test_lost_masks.py::test_a_mask_that_is_lost_on_the_way_is_an_error",)),
    Mutant("a hole in a state is not seen", "layers/states.py",
        "if given == wanted and", "if",
        ("test_restored_states.py::test_a_leaf_that_does_not_fit_is_named",)),
    Mutant("an inactive layer is updated", "transforms/per_layer.py",
        "    if active:", "    if active is not None:", ("test_contract.py",)),
    Mutant("a row of state is written one too deep", "layers/rows.py",
        "axes.updates), state, pending, i", "axes.updates), state, pending, i + 1",
        ("test_stacked_layers.py::test_adam_counts_the_own_steps_of_each_row",)),
    Mutant("every row is orthogonalized", "layers/rows.py",
        "size=len(active))[0], jnp.sum(active)", "size=len(active))[0], len(active)",
        ("test_stacked_layers.py::test_only_active_rows_are_orthogonalized",)),
    Mutant("an active row gets the state of a sleeping one", "transforms/per_layer.py",
        "active), leaves[i], leaf)", "active), leaf, leaves[i])",
        ("test_stacked_layers.py",)),
    Mutant("an LMO forgets its shape factor", "norms/norm.py",
        "[factor * x for factor, x in", "[x for factor, x in", ("test_lmo.py",)),
    Mutant("parts are joined in the order of their groups", "layers/matrices.py",
        "return jnp.concatenate(pieces, at).reshape(", "return jnp.concatenate(pieces, 0).reshape(",
        ("test_parts.py",)),
    Mutant("the radius is not scheduled", "transforms/lmo.py",
        "state = RadiusState(jnp.asarray(optax.safe_increment(state.count)))",
        "state = RadiusState(state.count)", ("test_radii.py",)),
    Mutant("inactive leaves are orthogonalized", "transforms/lmo.py",
        "enumerate(jax.tree.leaves(layer_mask)) if flag]",
        "enumerate(jax.tree.leaves(layer_mask))]",
        ("test_lmo.py::test_inactive_leaves_are_not_orthogonalized",)),
    Mutant("weight decay moves what is frozen", "optimizers/composition.py",
        "return freeze(layer_mask, new_updates), new_state", "return new_updates, new_state",
        ("test_scion_and_gluon.py::test_a_dropped_layer_is_not_pulled_towards_zero",)),
    Mutant("an optimizer of all layers takes a depth", "layers/states.py",
        'or extra_args.get("depth") is not None', "",
        ("test_lost_masks.py::test_an_optimizer_of_all_layers_does_not_hide_behind_a_wrapper",)),
    Mutant("Muon with MVR does not keep what Adam had", "optimizers/composition.py",
        "if of_matrices and not of_others else", "if of_others else",
        ("test_variance_reduction.py::test_muon_keeps_the_previous_parameters_of_everything_if_its_momentum_does",)),
    Mutant("a constrained step is not pulled to zero", "optimizers/composition.py",
        "[promoting(optax.add_decayed_weights(1.0))] if constrained",
        "[promoting(optax.add_decayed_weights(0.0))] if constrained", ("test_scion_and_gluon.py",)),
    Mutant("Adam's moments of inactive layers decay", "optimizers/muon.py",
        "promoting(auxiliary) if layers is None else per_layer(auxiliary, layers)",
        "promoting(auxiliary)",
        ("test_contract.py",)),
    Mutant("a learning rate above 1 leaves the ball", "optimizers/scion.py",
        "and first > 1:", "and first > 2:", ("test_errors.py",)),
    Mutant("an optimizer that climbs is not found", "optimizers/checks.py",
        "move.astype(jnp.float32))) > 0:", "move.astype(jnp.float32))) > np.inf:",
        ("test_before_a_run.py::test_a_part_that_climbs_is_found_behind_a_warm_up_too",)),
    Mutant("a state is told by the wrong leaf", "optimizers/checks.py",
        "key=len, reverse=True", "key=len",
        ("test_before_a_run.py::test_paths_that_end_alike_are_told_apart",)),
    Mutant("the optimum by the largest smoothness goes by sums", "planning/costs.py",
        "np.maximum.accumulate(smoothness) / smoothness.max()",
        "np.cumsum(smoothness) / smoothness.sum()", ("test_planning.py",)),
    Mutant("a scan turns once", "planning/checks.py", 'return params["length"]', "return 1",
        ("test_two_lines.py::test_a_scan_of_the_model_itself_over_a_stack_is_seen",)),
    Mutant("layers in the wrong order are not seen", "planning/meetings.py",
        "if before[i] >> j & 1", "if before[j] >> i & 1", ("test_two_lines.py",)),
    Mutant("rows of a stack seem to be in the wrong order", "planning/meetings.py",
        "if stack_of.get(i, i) != stack_of.get(j, j)", "if i != j", ("test_two_lines.py",)),
    Mutant("the hinge weighs samples below the line", "planning/fitting.py",
        "1 + hinge, 1)", "1, 1 + hinge)", ("test_smoothness.py",)),
    Mutant("a leaf that slept has a sample", "planning/tracking.py",
        "known = old.active[leaf_of_matrix] & (smoothness >= 0)", "known = smoothness >= 0",
        ("test_smoothness.py",)),
    Mutant("a device holds fewer matrices than there are", "sharding/layouts.py",
        "held = -(-bucket.num_matrices // owners)", "held = bucket.num_matrices // owners",
        ("test_layouts.py::test_with_more_devices_than_matrices_bytes_do_not_grow",)),
    Mutant("what is left over goes to the busiest", "sharding/exchange.py",
        'np.argsort(busy, kind="stable")', 'np.argsort(-busy, kind="stable")',
        ("test_layouts.py::test_each_matrix_has_one_owner_and_all_owners_as_much_work_as_can_be",)),
    Mutant("a plan counts frozen layers", "sharding/placement.py",
        "np.broadcast_to(np.ravel(flags[axes.path]), num_rows).sum()", "np.ones(num_rows).sum()",
        ("test_layouts.py::test_masks_stacks_and_shardings_are_planned_as_they_will_run",)),
    Mutant("shardings on two meshes are accepted", "sharding/on_mesh.py",
        "if leaf.mesh.abstract_mesh != given:", "if leaf.mesh.abstract_mesh is None:",
        ("test_errors.py",)),
    Mutant("a state is replicated", "sharding/placement.py",
        "if sharding is not None:", "if sharding is None:",
        ("dropmuon_jax/sharding/placement.py::dropmuon_jax.sharding.placement.state_shardings",)),
    Mutant("what is known of shardings is not used", "sharding/exchange.py",
        "is_exchange = not of_batch and layout.owner_axes == sum(of_sides, ())",
        "is_exchange = False", ("test_on_eight_devices.py",), deep=True),
    Mutant("a momentum lies in another way than its parameter", "layers/rows.py",
        "if key.endswith(of) and row.shape == x.shape", "if False", ("test_stack_axes.py",)),
    Mutant("gains are summed along the layers", "sampling/record.py",
        "if i != row_axis", "if i != 0", ("test_stack_axes.py",)),
    Mutant("places that are left write row 0", "sharding/map_on_mesh.py",
        "fill_value=num_layers", "fill_value=0", ("test_on_eight_devices.py",), deep=True),
    Mutant("matrices come back in the wrong order", "sharding/exchange.py",
        "place_of[matrices[taken]] = np.flatnonzero(taken)",
        "place_of[matrices[taken]] = np.arange(count)", ("test_on_eight_devices.py",), deep=True),
    Mutant("rows of other devices are exchanged", "sharding/map_on_mesh.py",
        "if any(known[path].along(axis) for", "if any(not known[path] for",
        ("test_on_eight_devices.py",), deep=True),
    Mutant("moments of batches forget that their means differ", "contrib/pruning/kernels.py",
        "+ of_self * of_other * shift**2", "",
        ("test_pruning.py::test_moments_are_those_of_all_rows_however_they_come_in_batches",)),
    Mutant("of equal scores one too few is pruned", "contrib/pruning/masks.py",
        "jnp.cumsum(equal, -1) <= room", "jnp.cumsum(equal, -1) < room",
        ("test_pruning.py::test_the_lowest_of_each_group_are_pruned_and_as_many_as_said",)),
    Mutant("pruned weights stay where they are", "contrib/pruning/masks.py",
        "back = [-x for x in", "back = [0 * x for x in",
        ("test_pruning.py::test_weights_that_are_not_zero_yet_become_zero_and_their_gradients_are_not_seen",)),
    Mutant("the optimizer sees second gradients of pruned weights", "contrib/pruning/masks.py",
        'extra_args | {"prev_params_grads": second}', "extra_args",
        ("test_pruning.py::test_pruned_weights_and_their_momenta_are_zero_bit_for_bit",)),
    Mutant("the exchange prunes what has the sign of the error", "contrib/pruning/exchange.py",
        "now.may_go & (towards < 0)", "now.may_go & (towards > 0)",
        ("test_pruning.py::test_the_exchange_is_that_of_the_authors_by_hand",)),
    Mutant("the solver stops at half of the gap", "contrib/broximal/oracle.py",
        "jnp.maximum(inner(grads, _minus(point, nearest)), 0)",
        "0.1 * jnp.maximum(inner(grads, _minus(point, nearest)), 0)",
        ("test_broximal.py::test_no_point_of_the_ball_is_lower_than_the_gap_allows",)),
    Mutant("the gap of a value that is none is a number", "contrib/broximal/oracle.py",
        "jnp.where(jnp.isnan(value), jnp.nan, gap)", "gap",
        ("test_broximal.py::test_a_value_that_is_none_ends_the_search_and_nothing_is_certified",)),
    Mutant("means of clients begin behind their start", "compression/exchange.py",
        "reshape(-1)[: x.size]", "reshape(-1)[-x.size :]",
        ("test_privacy.py::test_means_are_added_in_the_order_of_clients_whatever_the_shape_of_an_array",)),
    Mutant("what is free goes to the first worker", "contrib/allocation.py",
        "jnp.where(done == done.min(), shares, num_tasks)", "done",
        ("test_allocation.py::test_what_is_free_is_spread",)),
)
# fmt: on


class Checkout:
    """A copy of the checkout in a temporary folder, to break and to mend."""

    def __init__(self, root: Path):
        self.root = root
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        found = self._run("-c", "import dropmuon_jax; print(dropmuon_jax.__file__)").stdout.strip()
        if found != str(root / "dropmuon_jax/__init__.py"):
            sys.exit(f"Python imports {found or 'no dropmuon_jax'} in place of the copy in {root}.")

    def first_failure(self, mutant: Mutant, tests: list[str], options: list[str]) -> str | None:
        """The first test that fails with the mutant."""
        path = self.root / "dropmuon_jax" / mutant.file
        source = path.read_text()
        path.write_text(source.replace(mutant.before, mutant.after))
        try:
            return next(iter(self.run_tests(tests, ["-x", *options])[1]), None)
        finally:
            path.write_text(source)

    def run_tests(self, tests: list[str], options: Iterable[str] = ()) -> tuple[int, list[str]]:
        """What pytest ends with, and which tests fail: none if it does not come that far."""
        command = ["-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *options]
        try:
            run = self._run(*command, *tests)
        except subprocess.TimeoutExpired:
            print(f"{tests} took more than {SECONDS} s.")
            return -1, []
        failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
        if run.returncode != 0 and not failed:
            print(f"pytest ended with {run.returncode}: {(run.stderr or run.stdout).strip()}")
        return run.returncode, failed

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": str(self.root),  # before the checkout that is installed
            "PYTHONDONTWRITEBYTECODE": "1",  # which would outlive a mutant of the same second
            # For programs of one device: tests of several start processes of their own without it.
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=SECONDS
        )


def chosen(names: list[str]) -> list[Mutant]:
    """The mutants with such names, all if there are none; every mutant must fit its file."""
    for mutant in MUTANTS:
        count = (ROOT / "dropmuon_jax" / mutant.file).read_text().count(mutant.before)
        if count != 1 or "\n" in mutant.before:
            sys.exit(f"{mutant.title}: {mutant.before!r} stands there {count} times, not once.")
    if unknown := [name for name in names if not any(name in m.title for m in MUTANTS)]:
        sys.exit(f"There is no mutant with {unknown} in its name or file.")
    return [m for m in MUTANTS if not names or any(name in m.title for name in names)]


def in_folder(tests: Iterable[str]) -> list[str]:
    """Tests as pytest takes them at the root of the checkout."""
    return [f"tests/{test}" if test.startswith("test_") else test for test in tests]


def main() -> None:
    """Runs mutants, and says which test kills each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name or file")
    parser.add_argument("--find", nargs="*", metavar="TEST", help="look in these tests, or in all")
    parser.add_argument("--all-tests", action="store_true", help="take deep tests for killers too")
    options = parser.parse_args()
    mutants, killers, survivors = chosen(options.names), set(), []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder).resolve())
        for mutant in mutants:
            searches = [in_folder(mutant.killers)]
            if options.find is not None or options.all_tests:
                searches.append(in_folder(options.find or ()))
            part = [] if mutant.deep or options.all_tests else ["-m", "not deep"]
            failures = (checkout.first_failure(mutant, tests, part) for tests in searches)
            killer = next(filter(None, failures), None)
            killers |= {killer} - {None}
            survivors += [] if killer else [f"SURVIVED: {mutant.title}"]
            print(f"{mutant.title}: {f'killed by {killer}' if killer else 'SURVIVED'}", flush=True)
        end, red = checkout.run_tests(sorted(killers)) if killers else (0, [])
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed.")
    sys.exit("\n".join([*survivors, *([f"Red without a mutant: {red}"] if end else [])]) or 0)


if __name__ == "__main__":
    main()
