"""What depths cost, counted or timed, and which distribution over them theory calls best."""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dropmuon_jax._checks import check_choice, describe, static_int
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.sampling.adaptive import minimise_waiting, not_rising
from dropmuon_jax.sampling.distributions import LayerDistribution, depth_subsets, fixed_depth

# What XLA's cost analysis calls them.
_COUNTS = {"flops": "flops", "bytes": "bytes accessed"}
_MAKE_STATIC = "jax.jit(step, static_argnames='depth')"
CRITERIA = ("max", "sum")
_minimise_waiting = jax.jit(minimise_waiting)  # operation by operation it compiles for seconds
Numbers = Sequence[float] | Float[np.ndarray, " num_layers"]


def depth_cost(
    step: Callable[..., Any],
    layers: Layers,
    /,
    *args: Any,
    measure: str = "flops",
    repetitions: int = 5,
    **kwargs: Any,
) -> Float[np.ndarray, " num_layers"]:
    """What your training step costs at each depth: what :func:`optimal_depth` needs.

    * "flops" and "bytes" are XLA's counts of the compiled step, on one of its devices: floating
      point operations, and bytes that operations read and write. They do not flicker. XLA counts
      the body of a loop once, however often it runs, and nothing inside of a foreign call, such as
      LAPACK's SVD on a CPU. (:func:`check_depths` counts loops.)
    * "seconds" is the median time of the step itself, depths taking turns, each waited for; the
      first call at each depth compiles and does not count. It steps copies of the arguments:
      donated buffers stay yours, and one more copy of them is in memory.

    Args:
        step: A jitted training step with a static argument `depth`, which is given by keyword; for
            counts also a :class:`TrainStep`.
        layers: The layers.
        *args: The other arguments of the step. For counts `jax.ShapeDtypeStruct`s will do.
        measure: "flops", "bytes" or "seconds".
        repetitions: How often each depth is timed, at least 1.
        **kwargs: The other keyword arguments of the step.

    Returns:
        The cost at each depth s, in the unit of `measure`; float64, of shape (num_layers,).
        On several processes, which all have to call it, the seconds are those of process 0.

    Raises:
        TypeError: If `step` is not jitted with a static argument `depth`, or arrays are abstract
            and `measure` is "seconds".
        ValueError: If `measure` is unknown or the backend does not count it.

    Examples:
        >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(8), "head": jnp.eye(8)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> grad_fn = dm.masked_value_and_grad(lambda p, x: jnp.sum(x @ p["stem"] @ p["head"]))
        >>> def step(params, x, depth):
        ...     return grad_fn(params, x, layer_mask=layers.mask(depth))
        >>> step = jax.jit(step, static_argnames="depth")
        >>> full, head_only = dm.planning.depth_cost(step, layers, params, jnp.ones((4, 8)))
        >>> bool(full > head_only)
        True
    """
    check_layers(layers)
    check_choice("measure", measure, [*_COUNTS, "seconds"])
    static_int("repetitions", repetitions, minimum=1)
    trace_step(step, 0, args, kwargs)  # which checks it
    depths = range(layers.num_layers)
    if measure == "seconds":
        return _on_every_process(_time(step, depths, args, kwargs, repetitions))
    return np.array([_count(step, depth, args, kwargs, measure) for depth in depths])


def _count(step: Any, depth: int, args: Any, kwargs: Any, measure: str) -> float:
    analysis = trace_step(step, depth, args, kwargs).lower().compile().cost_analysis()
    if not analysis or _COUNTS[measure] not in analysis:
        backend = jax.default_backend()
        raise ValueError(
            f"The backend {backend!r} does not count {measure}: take measure='seconds'."
        )
    return float(analysis[_COUNTS[measure]])


def _time(step: Any, depths: range, args: Any, kwargs: Any, repetitions: int) -> list[float]:
    """The median seconds of each depth, in a step that follows one of its own."""
    if hasattr(step, "trace_depth"):
        raise TypeError(f"measure='seconds' needs a jitted step, {_MAKE_STATIC}: take 'flops'.")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((args, kwargs))):
        raise TypeError("measure='seconds' needs arrays, got a ShapeDtypeStruct: take 'flops'.")
    samples: list[list[float]] = [[] for _ in depths]
    for repetition in range(repetitions + 1):
        for depth in sorted([*depths] * 2):  # the second is timed: after a smaller one it is faster
            own_args, own_kwargs = jax.tree.map(_copy, (args, kwargs))
            jax.block_until_ready((own_args, own_kwargs))
            start = time.perf_counter()
            jax.block_until_ready(step(*own_args, depth=depth, **own_kwargs))
            if repetition > 0:
                samples[depth].append(time.perf_counter() - start)
    return [statistics.median(of_depth[1::2]) for of_depth in samples]


def _copy(leaf: Any) -> Any:
    """A buffer of its own, for the step to overwrite; what is no array of JAX cannot be donated."""
    if not isinstance(leaf, jax.Array):
        return leaf
    copy = jnp.copy(leaf)
    # To the letter, P("x") for P("x", None), or the step would be compiled for both.
    return jax.device_put(copy, leaf.sharding) if leaf.committed else copy


def _on_every_process(seconds: list[float]) -> Float[np.ndarray, " num_layers"]:
    """The seconds of process 0, so that all draw from the same distribution."""
    if jax.process_count() == 1:
        return np.array(seconds)
    # Imported here for the sake of one device, where it would take time for nothing.
    from jax.experimental import multihost_utils

    rounded = np.array(seconds, np.float32)  # on process 0 as well
    return np.asarray(multihost_utils.broadcast_one_to_all(rounded), np.float64)


def trace_step(step: Any, depth: int, args: Any, kwargs: Any) -> Any:
    """The program of a step at a depth; an error unless the depth is a static argument."""
    if hasattr(step, "trace_depth"):
        return step.trace_depth(depth, *args, **kwargs)
    if not (callable(step) and hasattr(step, "trace")):
        raise TypeError(f"step must be a jitted function, {_MAKE_STATIC}, got {describe(step)}.")
    jitted: Any = step
    parameters = inspect.signature(step).parameters.values()
    if not any(of.name == "depth" or of.kind is of.VAR_KEYWORD for of in parameters):
        names = f"Its arguments are {', '.join(of.name for of in parameters)}."
        raise TypeError(f"step must have an argument `depth`: {_MAKE_STATIC}. {names}")
    traced = jitted.trace(*args, depth=depth, **kwargs)
    traced = getattr(traced, "traced", traced)  # inside what nnx.jit makes
    if "depth" in traced.args_info[1]:
        traced_depth = "The argument `depth` of step is traced, and so of one cost"
        raise TypeError(f"{traced_depth}: make it static, {_MAKE_STATIC}.")
    return traced


def optimal_depth(
    smoothness: Numbers, depth_costs: Numbers, *, criterion: str = "max"
) -> LayerDistribution:
    r"""The fixed distribution over depths whose bound on the time to a small gradient is smallest.

    With steps of the sharp form and size :math:`1/L_i`, the dual norms :math:`a_i` of the gradient
    satisfy :math:`\tfrac1K \sum_k \sum_i \tfrac{\pi_i}{L_i} \mathbb{E} a_i^2 \le 2\Delta/K`. The
    bound on the number of steps, times the cost of one, is proportional to

    .. math::
        \text{"max":}\quad \Big(\sum_s p_s \text{costs}_s\Big) \max_i \frac{L_i}{\pi_i}
        \quad\text{for } \sum_i a_i^2 \le \epsilon^2, \qquad
        \text{"sum":}\quad \Big(\sum_s p_s \text{costs}_s\Big) \sum_i \frac{L_i}{\pi_i}
        \quad\text{for } \sum_i a_i \le \epsilon

    where :math:`\pi_i = \sum_{s \le i} p_s`, and the last layer is always active.

    * "max" is minimised by :math:`\pi_i = \max_{j \le i} L_j / \max_j L_j`, whatever the costs.
      **Full steps are optimal only if no layer has a larger L than layer 0.**
    * "sum" is minimised by :math:`\pi_i \propto \sqrt{L_i / c_i}`, pooled until it does not fall,
      at most 1, where :math:`c_i = \text{costs}_i - \text{costs}_{i+1}`. **Full steps are optimal
      only if, for every s, the layers before depth s have at least as large a share of ΣL as
      depth s saves of the cost of a full step.**

    Both statements hold in the other direction too, and the first as long as every depth saves
    something. Depths that cost as much as a shallower one are never drawn. A bound is a worst case.

    Args:
        smoothness: L of each layer, shallow to deep, positive, in the norm of its steps; such as
            :func:`fit_smoothness` measures, in any unit. For a layer with several leaves that step
            in norms of their own, give the largest of theirs for "max", their sum for "sum".
        depth_costs: The cost of a step at each depth, as :func:`depth_cost` gives it; positive, in
            any unit. Where noise has made them rise with depth, neighbours are pooled.
        criterion: "max" or "sum".

    Examples:
        The first layer is ten times as smooth as the others, and a full step costs twice as much
        as one without it.

        >>> import dropmuon_jax as dm
        >>> numbers = [0.1, 1.0, 1.0], [6.0, 3.0, 2.0]
        >>> for criterion in ("max", "sum"):
        ...     best = dm.planning.optimal_depth(*numbers, criterion=criterion)
        ...     speed_up = dm.planning.predicted_speed_up(best, *numbers, criterion=criterion)
        ...     print((100 * best.inclusion_probabilities(0, 3)).round(), round(speed_up, 2))
        [ 10. 100. 100.] 1.82
        [ 22. 100. 100.] 1.4

    References:
        Gruntkowska et al., *Drop-Muon*, 2025, arXiv:2510.02239, prove that full updates are not
        optimal unless a condition on the smoothness holds, for bounds of their own. The bounds,
        minimisers and conditions here are ours, and are checked by search in the tests.
    """
    check_choice("criterion", criterion, CRITERIA)
    smoothness, costs = _checked(smoothness, depth_costs)
    layer_costs = np.append(costs[:-1] - costs[1:], costs[-1])
    if criterion == "max":
        included = np.maximum.accumulate(smoothness) / smoothness.max()
        for i in reversed(range(len(included) - 1)):
            if layer_costs[i] == 0:  # for free
                included[i] = included[i + 1]
    else:
        with jax.ensure_compile_time_eval():
            solved = _minimise_waiting(smoothness, layer_costs)
        included = np.asarray(solved, np.float64)
    return fixed_depth(np.diff(included, prepend=0.0).tolist())


def predicted_speed_up(
    distribution: LayerDistribution,
    smoothness: Numbers,
    depth_costs: Numbers,
    *,
    criterion: str = "max",
    step: int = 0,
) -> float:
    """How many times as long full steps take as the distribution, by the bounds of both.

    The theory of :func:`optimal_depth` expects the distribution to be faster if it is above 1, and
    knows nothing of noise, of momentum or of how far each bound lies from what happens.

    Args:
        distribution: Over depths.
        smoothness: L of each layer, as :func:`optimal_depth` takes it.
        depth_costs: The cost of a step at each depth, positive.
        criterion: "max" or "sum".
        step: The step whose probabilities count, of a distribution that changes along the run.

    Returns:
        A Python number; 0 if a layer is never active, and the bound infinite.

    Examples:
        >>> import dropmuon_jax as dm
        >>> dm.planning.predicted_speed_up(dm.uniform_depth(), [1, 1], [4, 2])
        0.666...
        >>> dm.planning.predicted_speed_up(dm.uniform_depth(), [0.5, 1], [4, 2])
        1.333...
    """
    check_choice("criterion", criterion, CRITERIA)
    smoothness, costs = _checked(smoothness, depth_costs)
    step = static_int("step", step, minimum=0)
    probabilities = _depth_probabilities(distribution, step, len(costs))
    full = _bound(np.eye(len(costs))[0], smoothness, costs, criterion)
    return float(full / _bound(probabilities, smoothness, costs, criterion))


def _bound(
    probabilities: np.ndarray, smoothness: np.ndarray, costs: np.ndarray, criterion: str
) -> np.ndarray:
    """A number in proportion to the time of depths drawn so; of many distributions at once."""
    included = np.cumsum(probabilities, axis=-1)
    waits = np.divide(smoothness, included, out=np.full(included.shape, np.inf), where=included > 0)
    return (probabilities @ costs) * (waits.max(-1) if criterion == "max" else waits.sum(-1))


def _depth_probabilities(distribution: LayerDistribution, step: int, num_layers: int) -> np.ndarray:
    if not isinstance(distribution, LayerDistribution):
        expected = "a LayerDistribution such as dm.uniform_depth()"
        raise TypeError(f"distribution must be {expected}, got {describe(distribution)}.")
    if not np.array_equal(distribution.subsets(num_layers), depth_subsets(num_layers)):
        raise TypeError(
            "distribution draws arbitrary subsets, and costs are those of depths. Give one over "
            "depths, such as dm.fixed_depth(probabilities)."
        )
    with jax.ensure_compile_time_eval():
        probabilities = np.asarray(distribution.probabilities(step, num_layers), np.float64)
    if probabilities.shape != (num_layers,):
        given = f"The distribution gives {probabilities.size} probabilities"
        raise ValueError(f"{given}, and smoothness and depth_costs are of {num_layers} layers.")
    return probabilities / probabilities.sum()  # of float32


def _checked(smoothness: Numbers, depth_costs: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, the costs not rising."""
    constants, costs = _positive("smoothness", smoothness), _positive("depth_costs", depth_costs)
    if len(constants) != len(costs):
        given = f"smoothness is of {len(constants)} layers and depth_costs of {len(costs)}"
        raise ValueError(f"{given}: give one number for each layer, shallow to deep.")
    return constants, not_rising(costs)


def _positive(name: str, values: Numbers) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(
            f"{name} must be positive and finite numbers, one for each layer, got {array.tolist()}."
        )
    return array
