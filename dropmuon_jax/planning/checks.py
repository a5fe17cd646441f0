"""`check_depths`: what a training step computes at each depth, and which depths save nothing."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Float

from dropmuon_jax.layers.layers import Layers, check_layers, format_table
from dropmuon_jax.planning.costs import trace_step
from dropmuon_jax.planning.meetings import PRODUCTS, Meetings, find_meetings

_NOTHING = 0.1  # of an equal share of the backward pass: what is too little to count as saved


class DepthWarning(UserWarning):
    """A depth of a training step saves nothing, or layers do not stand in forward order."""


@dataclasses.dataclass(frozen=True)
class DepthReport:
    """What a step computes at each depth, made by :func:`check_depths`; print it for a table.

    Attributes:
        names: The layers, shallow to deep.
        flops: FLOPs of the matrix products and convolutions of the step, at each depth.
        backward_flops: The FLOPs of its backward pass among them.
        wasted: The depths that save hardly anything of the backward pass of the depth before.
    """

    names: tuple[str, ...]
    flops: Float[np.ndarray, " num_layers"]
    backward_flops: Float[np.ndarray, " num_layers"]
    wasted: tuple[int, ...]

    def __str__(self) -> str:
        unit, name = (1e9, "GFLOP") if self.flops.max() >= 1e10 else (1e6, "MFLOP")
        full = self.flops[0] or 1.0
        saved = ["", *(f"{of_depth:.1%}" for of_depth in (self.flops[:-1] - self.flops[1:]) / full)]
        rows = [("depth", "layer", name, "backward", "of full", "saved")]
        for depth, layer in enumerate(self.names):
            flops, backward = (f"{x[depth] / unit:,.3f}" for x in (self.flops, self.backward_flops))
            share = f"{self.flops[depth] / full:.1%}"
            rows.append((str(depth), layer, flops, backward, share, saved[depth]))
        wasted = ", ".join(map(str, self.wasted))
        end = f"These depths save hardly anything: {wasted}." if wasted else "Every depth saves."
        return f"{format_table(rows, '><>>>>')}\n{end}"


def check_depths(step: Any, layers: Layers, /, *args: Any, **kwargs: Any) -> DepthReport:
    """Counts what a training step computes at each depth, and warns where a depth saves nothing.

    The step is traced for each depth, not compiled and not run. Counted are matrix products and
    convolutions, after what nobody uses is dropped, as XLA drops it: so a gradient of all leaves,
    with the mask in `update` alone, is seen to save what it saves. Loops count as often as they
    turn; where that is not known, once. What a foreign kernel computes is not seen.

    A depth saves if its backward pass is smaller than that of the depth before. It is not if
    something reads the gradients of inactive layers (a global norm before the mask, gradients that
    leave the jit), or if a model runs stacked layers by a scan of its own; hardly, if the layer
    left out has no matrix products, such as an embedding alone. And it goes through inactive layers
    if they are given from the output to the input, which a warning tells of a layer that meets what
    comes from one given behind it. A scan over a stack that takes another number of turns than the
    stack has layers is told too: they lie along another axis.

    Args:
        step: A jitted training step with a static argument `depth`, which is given by keyword; or a
            :class:`TrainStep`.
        layers: The layers.
        *args: The other arguments of the step, of a :class:`TrainStep` from the parameters on;
            `jax.ShapeDtypeStruct`s will do.
        **kwargs: The other keyword arguments of the step.

    Returns:
        A :class:`DepthReport`; its `flops` are what :func:`time_aware_depth` takes for costs.

    Raises:
        TypeError: If `step` is not jitted, or has no argument `depth` or not as a static one.
        ValueError: If `step` is a :class:`TrainStep` with a sampler of other layers.

    Warns:
        DepthWarning: For depths that save nothing, with their layers, causes and ways out; for
            stacks whose number of layers is not that of the scan.

    Examples:
        >>> import functools, jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(8), "mid": jnp.eye(8), "head": jnp.eye(8)}
        >>> layers = dm.layers_by_path(params, ["stem", "mid", "head"])
        >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["stem"] @ p["mid"]) @ p["head"])
        >>> @functools.partial(jax.jit, static_argnames="depth")
        ... def step(params, x, depth):
        ...     grads = jax.grad(loss_fn)(params, x)
        ...     return jax.tree.map(
        ...         lambda p, g, on: p - 0.1 * g if on else p, params, grads, layers.mask(depth)
        ...     )
        >>> print(dm.check_depths(step, layers, params, jnp.ones((1000, 8))))
        depth  layer  MFLOP  backward  of full  saved
            0  stem   0.896     0.640   100.0%
            1  mid    0.640     0.384    71.4%  28.6%
            2  head   0.384     0.128    42.9%  28.6%
        Every depth saves.
    """
    check_layers(layers)
    if hasattr(step, "sampler") and step.sampler.layers != layers:
        raise ValueError(
            f"step draws depths among {step.sampler.layers.num_layers} layers, "
            f"{', '.join(step.sampler.layers.names)}, which are not the given ones: give "
            "step.sampler.layers."
        )
    depths = range(layers.num_layers)
    traced = [trace_step(step, depth, args, kwargs) for depth in depths]
    programs = [of_depth.jaxpr.jaxpr for of_depth in traced]
    used = [dce_jaxpr(program, [True] * len(program.outvars))[0] for program in programs]
    flops, backward = np.array([_flops(program) for program in used]).T
    backward = backward if backward[0] else flops  # for derivatives of another make
    saved = -np.diff(backward)
    named = step.trace_named(*args, **kwargs) if hasattr(step, "trace_named") else traced[0]
    found = find_meetings(named, (args, kwargs), layers)
    enough = [_NOTHING if layer in found.multiplied else 1.0 for layer in depths]
    share = backward[0] / len(depths)
    wasted = tuple(s for s in depths[1:] if saved[s - 1] <= enough[s - 1] * share)
    for message in _messages(layers, wasted, found):
        warnings.warn(message, DepthWarning, stacklevel=2)
    return DepthReport(layers.names, flops, backward, wasted)


def _flops(jaxpr: Jaxpr, in_backward: bool = False) -> np.ndarray:
    """FLOPs of products, in all and in the backward pass."""
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        # Derivatives by transposition say so in the names that profilers show.
        backward = in_backward or "transpose(" in str(eqn.source_info.name_stack)
        if eqn.primitive.name in PRODUCTS:
            total += _flops_of_product(eqn) * np.array([1.0, backward])
            continue
        inner = [_flops(program, backward) for program in jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda of_branch: of_branch[0])]
        total += _turns(eqn) * sum(inner, np.zeros(2))
    return total


def _turns(eqn: JaxprEqn) -> int:
    """How often the programs inside an operation run."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if name == "shard_map" else 1


def _flops_of_product(eqn: Any) -> float:
    """Two for each multiplication, of which padding and the gaps of dilation need none."""
    left, right = (var.aval.shape for var in eqn.invars[:2])
    params, out = eqn.params, eqn.outvars[0].aval.shape
    if eqn.primitive.name != "conv_general_dilated":
        numbers = params.get("dimension_numbers") or params["ragged_dot_dimension_numbers"]
        groups = getattr(numbers, "rhs_group_dimensions", ())
        (_, contracted), (_, batch) = getattr(numbers, "dot_dimension_numbers", numbers)
        free = (size for i, size in enumerate(right) if i not in {*contracted, *batch, *groups})
        return 2.0 * math.prod(left) * math.prod(free)
    numbers = params["dimension_numbers"]
    places = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    pairs = 1  # of an output's place and one in the window
    for i, (of_left, of_right, of_out) in enumerate(places):
        starts = np.arange(out[of_out]) * params["window_strides"][i] - params["padding"][i][0]
        at = starts[:, None] + np.arange(right[of_right]) * params["rhs_dilation"][i]
        dilation = params["lhs_dilation"][i]
        pairs *= np.sum((at % dilation == 0) & (at >= 0) & (at < left[of_left] * dilation))
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2.0 * float(pairs) * right[numbers.rhs_spec[1]] * batch * features


def _messages(layers: Layers, wasted: Sequence[int], found: Meetings) -> Iterator[str]:
    """The warnings, each with its depths, their layers, likely causes and ways out."""
    names = layers.names
    for stack, turns in found.scanned:
        yield (
            f"A scan takes {turns} turns over the stack {stack.name!r}, which is "
            f"{len(stack.layers)} layers along axis {stack.axis} of its leaves. If they lie along "
            f"another one, say so: dm.stacked(…, axis=axis)."
        )
    if found.disordered:
        i, j = found.disordered[0]
        cut = f", or, cut short in a stack, leaves that of {names[j]!r} without a part"
        yield (
            f"Layer {names[i]!r} (depth {i}) comes behind {names[j]!r} (depth {j}) in the network. "
            f"So the backward pass of depth {i + 1} still goes through it, and saves no more than "
            f"the gradient of its parameters{cut * bool(layers.stacks)}. Give the patterns from "
            "the input to the output, with a tied head where the embedding is, or take "
            "dm.trace_layers(loss_fn, params, batch)."
        )
    misplaced = {layer for layer, _ in found.disordered}
    wasted = [depth for depth in wasted if depth - 1 not in misplaced]
    stack_of = {layer: stack.name for stack in layers.stacks for layer in stack.layers}
    in_stack = [s for s in wasted if stack_of.get(s - 1) == stack_of.get(s, "")]
    others = [s for s in wasted if s not in in_stack]
    all_layers = (
        "Something reads the gradients of all layers, such as a global norm before the mask "
        "(optax.clip_by_global_norm), or they leave the jit. Take them by "
        "dm.masked_value_and_grad(loss_fn)(…, layer_mask=layers.mask(depth)), or make the whole "
        "step by dm.train_step."
    )
    if in_stack:
        scan = (
            f"The model runs the stack {stack_of[in_stack[0]]!r} by a scan of its own: run it by "
            "dm.scan_layers(…, depth=layers.stack_depth(depth))."
        )
        yield _message(names, in_stack, scan, all_layers)
    if others:
        nearly_all = len(wasted) == len(names) - 1
        pair = " + ".join(names[others[0] - 1 : others[0] + 1]).split(" + ")
        by_patterns = f"{pair} as one entry of the patterns, or by " * (others[0] not in stack_of)
        no_products = (
            "A layer without matrix products of its own, as an embedding or a norm, has hardly a "
            "backward pass, so that draws of the depth are wasted. Make it one with the next "
            f"layer, by {by_patterns}layers.group(k)."
        )
        causes = [all_layers] * nearly_all + [no_products] * (not nearly_all or len(names) == 2)
        yield _message(names, others, *causes)


def _message(names: Sequence[str], depths: Sequence[int], *causes: str) -> str:
    left_out = ", ".join(repr(names[depth - 1]) for depth in depths)
    subject = "Depth {} saves" if len(depths) == 1 else "Depths {} save"
    return (
        f"{subject.format(', '.join(map(str, depths)))} hardly anything: without layer {left_out} "
        f"the backward pass is about as large as with it. Likely causes: {' Or: '.join(causes)}"
    )
