"""The fixed distribution over depths that each criterion calls best, and what it promises."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from dropmuon_jax._checks import check_choice, describe, static_int
from dropmuon_jax._sampling import LayerDistribution, depth_subsets, fixed_depth
from dropmuon_jax._waiting import minimise_waiting, not_rising

CRITERIA = ("max", "sum")
_minimise_waiting = jax.jit(minimise_waiting)  # operation by operation it compiles for seconds
Numbers = Sequence[float] | Float[np.ndarray, " num_layers"]


def optimal_depth(
    smoothness: Numbers, costs: Numbers, *, criterion: str = "max"
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
    something. Depths that cost as much as a shallower one are never drawn. A bound is a worst case:
    :func:`predicted_speed_up` says how much it promises, and `benchmarks/theory.py` what became of
    it.

    Args:
        smoothness: L of each layer, shallow to deep, positive, in the norm of its steps; such as
            :func:`fit_smoothness` measures. The unit does not matter. Of a layer with several
            leaves that step in norms of their own, the largest of theirs for "max", their sum for
            "sum": as the bounds have it if every leaf counts.
        costs: Of a step at each depth, as :func:`depth_cost` gives them; positive, in any unit.
            Where they rise with depth, as noise has it, the nearest in least squares that do not
            are taken.
        criterion: "max" or "sum".

    Returns:
        A :class:`LayerDistribution` over depths, the same in every step.

    Raises:
        ValueError: If `smoothness` or `costs` are not positive numbers, one for each layer, or
            `criterion` is unknown.

    Examples:
        The first layer is ten times as smooth as the others, and a full step costs twice as much
        as one without it.

        >>> import dropmuon_jax as dm
        >>> smoothness, costs = [0.1, 1.0, 1.0], [6.0, 3.0, 2.0]
        >>> for criterion in ("max", "sum"):
        ...     best = dm.optimal_depth(smoothness, costs, criterion=criterion)
        ...     speed_up = dm.predicted_speed_up(best, smoothness, costs, criterion=criterion)
        ...     print((100 * best.inclusion_probabilities(0, 3)).round(), round(speed_up, 2))
        [ 10. 100. 100.] 1.82
        [ 22. 100. 100.] 1.4

    References:
        Gruntkowska et al., *Drop-Muon*, 2025, arXiv:2510.02239, prove that full updates are not
        optimal unless a condition on the smoothness holds, for bounds and constants of their own.
        The bounds, both minimisers and both conditions here were derived for this package, and are
        checked by search in its tests.
    """
    check_choice("criterion", criterion, CRITERIA)
    smoothness, costs = _checked(smoothness, costs)
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
    costs: Numbers,
    *,
    criterion: str = "max",
    step: int = 0,
) -> float:
    """How many times as long full steps take as the distribution, by the bounds of both.

    The ratio of two upper bounds, as in :func:`optimal_depth`: above 1 the theory expects the
    distribution to be faster. It knows nothing of noise, of momentum or of how far each bound lies
    from what happens.

    Args:
        distribution: Over depths.
        smoothness: L of each layer, as in :func:`optimal_depth`.
        costs: Of a step at each depth, as in :func:`optimal_depth`.
        criterion: "max" or "sum".
        step: Whose probabilities count, of a distribution that changes along the run.

    Returns:
        A Python number; 0 if a layer is never active, and the bound infinite.

    Raises:
        TypeError: If `distribution` is no :class:`LayerDistribution` over depths, or `step` no
            Python integer.
        ValueError: As in :func:`optimal_depth`; or if the probabilities are not those of as many
            depths as there are layers.

    Examples:
        Uniform depths are promised to be slower where all layers are alike.

        >>> import dropmuon_jax as dm
        >>> dm.predicted_speed_up(dm.uniform_depth(), [1, 1], [4, 2])
        0.666...
        >>> dm.predicted_speed_up(dm.uniform_depth(), [0.5, 1], [4, 2])
        1.333...

    References:
        Derived for this package; see :func:`optimal_depth`.
    """
    check_choice("criterion", criterion, CRITERIA)
    smoothness, costs = _checked(smoothness, costs)
    step = static_int("step", step, minimum=0)
    probabilities = _depth_probabilities(distribution, step, len(costs))
    ratio = bound(np.eye(len(costs))[0], smoothness, costs, criterion) / bound(
        probabilities, smoothness, costs, criterion
    )
    return float(ratio)


def bound(
    probabilities: np.ndarray, smoothness: np.ndarray, costs: np.ndarray, criterion: str
) -> np.ndarray:
    """What is proportional to the time of depths drawn so; of many distributions at once."""
    included = np.cumsum(probabilities, axis=-1)
    waits = np.divide(smoothness, included, out=np.full(included.shape, np.inf), where=included > 0)
    return (probabilities @ costs) * (waits.max(-1) if criterion == "max" else waits.sum(-1))


def _depth_probabilities(distribution: LayerDistribution, step: int, num_layers: int) -> np.ndarray:
    if not isinstance(distribution, LayerDistribution):
        raise TypeError(
            "distribution must be a LayerDistribution such as dm.uniform_depth(), "
            f"got {describe(distribution)}."
        )
    if not np.array_equal(distribution.subsets(num_layers), depth_subsets(num_layers)):
        raise TypeError(
            "distribution draws arbitrary subsets, and costs are those of depths. Give one over "
            "depths, such as dm.fixed_depth(probabilities)."
        )
    with jax.ensure_compile_time_eval():
        probabilities = np.asarray(distribution.probabilities(step, num_layers), np.float64)
    if probabilities.shape != (num_layers,):
        raise ValueError(
            f"The distribution gives {probabilities.size} probabilities, and smoothness and costs "
            f"are of {num_layers} layers."
        )
    return probabilities / probabilities.sum()  # of float32


def _checked(smoothness: Numbers, costs: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, the costs not rising."""
    checked = _positive("smoothness", smoothness), _positive("costs", costs)
    lengths = [len(of) for of in checked]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"smoothness is of {lengths[0]} layers and costs of {lengths[1]}: give one number for "
            "each layer, shallow to deep."
        )
    return checked[0], not_rising(checked[1])


def _positive(name: str, values: Numbers) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(
            f"{name} must be positive and finite numbers, one for each layer, got {array.tolist()}."
        )
    return array
