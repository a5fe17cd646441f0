"""Distributions over the sets of layers that a step updates.

Those made by the functions here are equal, and hash alike, if their arguments are equal.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_nonnegative, static_int

_MAX_SUBSETS = 4096  # each may become an executable; more than this is a mistake


@dataclasses.dataclass(frozen=True)
class LayerDistribution:
    """A distribution over subsets of the layers, as a function of the step.

    Like a learning-rate schedule it is pure in the step, which may be traced. Write your own by
    giving the two functions, in `jax.numpy` and without a Python `if` on the step; for a
    distribution over depths take `subsets=dm.sampling.depth_subsets`.

    Attributes:
        subsets: From the number of layers b to the subsets that can be drawn, a NumPy array of
            booleans of shape (num_subsets, b), True = active. Static.
        probabilities: From the step, a scalar integer array, and the static b to the probability of
            each subset, of shape (num_subsets,), in float32 under every JAX configuration.

    Examples:
        Full steps only, in the first hundred; any depth after that.

        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> def probabilities(step, num_layers):
        ...     late = jnp.full(num_layers, 1 / num_layers, jnp.float32)
        ...     return jnp.where(step < 100, jnp.zeros_like(late).at[0].set(1.0), late)
        >>> distribution = dm.LayerDistribution(dm.sampling.depth_subsets, probabilities)
        >>> for step in (99, 100):
        ...     print(distribution.inclusion_probabilities(step, 4))
        [1. 1. 1. 1.]
        [0.25 0.5  0.75 1.  ]
    """

    subsets: Callable[[int], Bool[np.ndarray, "num_subsets num_layers"]]
    probabilities: Callable[[Array | int, int], Float[Array, " num_subsets"]]

    def inclusion_probabilities(
        self, step: Array | int, num_layers: int
    ) -> Float[Array, " num_layers"]:
        """π_i = Σ_{S ∋ i} P(S), how likely each layer is active in a step; by enumeration."""
        probabilities = jnp.asarray(self.probabilities(step, num_layers), jnp.float32)
        return inclusion_probabilities(probabilities, self.subsets(num_layers))


def inclusion_probabilities(
    probabilities: Float[Array, " num_subsets"], subsets: Bool[np.ndarray, "num_subsets num_layers"]
) -> Float[Array, " num_layers"]:
    """The probability that a drawn subset holds a layer, for each layer."""
    # A sum, not a matrix product, which an accelerator would round to a half precision.
    return jnp.sum(jnp.where(subsets, probabilities[:, None], 0), axis=0)


def depth_subsets(num_layers: int) -> Bool[np.ndarray, "num_layers num_layers"]:
    """The subsets of a distribution over depths: subset s is the layers s, s+1, …, num_layers - 1.

    >>> depth_subsets(3).astype(int)
    array([[1, 1, 1],
           [0, 1, 1],
           [0, 0, 1]])
    """
    return np.triu(np.ones((num_layers, num_layers), dtype=bool))


def full_depth() -> LayerDistribution:
    """Depth 0 always: every layer in every step, which is Muon, Scion or Gluon.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(dm.full_depth().probabilities(0, 3))
        [1. 0. 0.]
    """
    return LayerDistribution(depth_subsets, _only_the_first)


def _only_the_first(step: Array | int, num_layers: int) -> Float[Array, " num_layers"]:
    return jnp.eye(num_layers, dtype=jnp.float32)[0]


def uniform_depth() -> LayerDistribution:
    """Every depth with the same probability, p_s = 1/b, so that π_i = (i + 1)/b.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(dm.uniform_depth().inclusion_probabilities(0, 4))
        [0.25 0.5  0.75 1.  ]

    References:
        Gruntkowska et al., *Drop-Muon*, 2025, arXiv:2510.02239 (the uniform index sampling).
    """
    return LayerDistribution(depth_subsets, _uniform)


def _uniform(step: Array | int, num_subsets: int) -> Float[Array, " num_subsets"]:
    return jnp.full(num_subsets, 1 / num_subsets, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Constant:
    """The same probabilities in every step."""

    values: tuple[float, ...]

    def __call__(self, step: Array | int, num_layers: int) -> Float[Array, " num_subsets"]:
        return jnp.asarray(self.values, jnp.float32)


def fixed_depth(probabilities: Sequence[float]) -> LayerDistribution:
    """Depth s with probability `probabilities[s]`, in every step.

    Args:
        probabilities: One for each layer, shallow to deep, nonnegative, summing to one. The first
            is that of a full step.

    Returns:
        A :class:`LayerDistribution` over depths.

    Raises:
        ValueError: If they are negative or do not sum to one; at construction of the sampler, if
            their number is not the number of layers.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(dm.fixed_depth([0.5, 0.25, 0.25]).inclusion_probabilities(0, 3))
        [0.5  0.75 1.  ]

    References:
        Gruntkowska et al., *Drop-Muon*, 2025, arXiv:2510.02239 (randomized progressive training).
    """
    fixed = np.asarray(probabilities, dtype=np.float64)
    if fixed.ndim != 1 or not fixed.size:
        raise ValueError(f"probabilities must be a sequence of numbers, got {probabilities!r}.")
    if not (fixed >= 0).all():
        raise ValueError(f"probabilities must not be negative, got {fixed.tolist()}.")
    if not math.isclose(fixed.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"probabilities must sum to 1, got {fixed.sum():g} from {fixed.tolist()}.")
    return LayerDistribution(depth_subsets, _Constant(tuple((fixed / fixed.sum()).tolist())))


@dataclasses.dataclass(frozen=True)
class _EpochShift:
    num_steps: int
    alpha: float

    @functools.partial(jax.jit, static_argnames=("self", "num_layers"))
    def __call__(self, step: Array | int, num_layers: int) -> Float[Array, " num_layers"]:
        depth = jnp.arange(num_layers, dtype=jnp.float32)
        tau = jnp.minimum(jnp.asarray(step, jnp.float32) / self.num_steps, 1)
        return jax.nn.softmax(self.alpha * ((1 - tau) * (num_layers - 1 - depth) + tau * depth))


def epoch_shift_depth(num_steps: int, alpha: float = 0.5) -> LayerDistribution:
    r"""Full steps are likely at first and ever less so: shallow layers are trained early.

    .. math::
        p_s \propto \exp(\alpha [(1 - \tau)(b - 1 - s) + \tau s]),
        \qquad \tau = \min(\text{step} / \text{num\_steps}, 1)

    which is uniform at τ = ½ and for α = 0.

    Args:
        num_steps: Steps of the whole run, at least 1; τ stays 1 after them. Static.
        alpha: How far the distribution leans, at least 0. The paper shows 0.5.

    Examples:
        >>> import dropmuon_jax as dm
        >>> distribution = dm.epoch_shift_depth(num_steps=100)
        >>> for step in (0, 50, 100):
        ...     print((100 * distribution.probabilities(step, 3)).round())
        [51. 31. 19.]
        [33. 33. 33.]
        [19. 31. 51.]

    References:
        Gruntkowska et al., *Drop-Muon*, 2025, arXiv:2510.02239, names this sampling and its α; the
        formula is that of a third-party implementation and was not seen in the paper.
    """
    num_steps = static_int("num_steps", num_steps, minimum=1)
    check_nonnegative("alpha", alpha)
    return LayerDistribution(depth_subsets, _EpochShift(num_steps, float(alpha)))


@dataclasses.dataclass(frozen=True)
class _Independent:
    """Both functions of :func:`independent_layers`: the subsets, or their probabilities."""

    included: tuple[float, ...]
    gives_subsets: bool

    def __call__(self, *_: Array | int) -> Any:
        # A layer of probability 0 or 1 is never or always active.
        choices = [[False] * (p < 1) + [True] * (p > 0) for p in self.included]
        subsets = np.array(list(itertools.product(*choices)), dtype=bool)
        if self.gives_subsets:
            return subsets
        included = np.array(self.included)
        return jnp.asarray(np.where(subsets, included, 1 - included).prod(axis=1), jnp.float32)


def independent_layers(probabilities: Sequence[float]) -> LayerDistribution:
    """Each layer on its own: layer i is active with probability `probabilities[i]`.

    The backward pass reaches down to the shallowest active layer. Every subset of nonzero
    probability, the empty one included, can become an executable: 2^b of them.

    Args:
        probabilities: One for each layer, shallow to deep, in [0, 1]; at most 12 of them strictly
            between, which makes 4096 subsets.

    Returns:
        A :class:`LayerDistribution` over subsets.

    Examples:
        >>> import dropmuon_jax as dm
        >>> distribution = dm.sampling.independent_layers([0.25, 1.0])
        >>> distribution.subsets(2).tolist()
        [[False, True], [True, True]]
        >>> print(distribution.probabilities(0, 2))
        [0.75 0.25]
    """
    included = np.asarray(probabilities, dtype=np.float64)
    if included.ndim != 1 or not included.size:
        raise ValueError(f"probabilities must be a sequence of numbers, got {probabilities!r}.")
    if not ((included >= 0) & (included <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1], got {included.tolist()}.")
    _check_num_subsets(2 ** int(((included > 0) & (included < 1)).sum()))
    values = tuple(included.tolist())
    return LayerDistribution(_Independent(values, True), _Independent(values, False))


@dataclasses.dataclass(frozen=True)
class _FixedSize:
    """Both functions of :func:`fixed_size_subsets`: the subsets, or their probabilities."""

    size: int
    gives_subsets: bool

    def __call__(self, *step_and_layers: Array | int) -> Any:
        num_layers = int(step_and_layers[-1])
        if not self.gives_subsets:
            return _uniform(0, math.comb(num_layers, self.size))
        if self.size > num_layers:
            raise ValueError(
                f"size must be at most {num_layers}, the number of layers, got {self.size}."
            )
        _check_num_subsets(math.comb(num_layers, self.size))
        chosen = np.array(list(itertools.combinations(range(num_layers), self.size)))
        return (chosen[:, :, None] == np.arange(num_layers)).any(axis=1)


def fixed_size_subsets(size: int) -> LayerDistribution:
    """A subset of `size` layers, each as likely as any other, so that π_i = size/b.

    Args:
        size: How many layers are active in each step, at least 1 and at most all; at most 4096
            subsets.

    Returns:
        A :class:`LayerDistribution` over subsets, in lexicographic order.

    Examples:
        >>> import dropmuon_jax as dm
        >>> print(dm.sampling.fixed_size_subsets(2).inclusion_probabilities(0, 4))
        [0.5 0.5 0.5 0.5]
    """
    size = static_int("size", size, minimum=1)
    return LayerDistribution(_FixedSize(size, True), _FixedSize(size, False))


def _check_num_subsets(count: int) -> None:
    if count > _MAX_SUBSETS:
        raise ValueError(
            f"The distribution has {count} subsets, and each can become an executable; at most "
            f"{_MAX_SUBSETS} are allowed. Merge layers first with layers.group(k)."
        )


def check_probabilities(probabilities: np.ndarray, step: int) -> None:
    """Error for what is no distribution."""
    if not (probabilities >= 0).all():
        raise ValueError(f"probabilities must not be negative, got {probabilities} at step {step}.")
    if not np.isclose(probabilities.sum(), 1, atol=1e-5):
        total = probabilities.sum()
        raise ValueError(f"probabilities must sum to 1, got {total:g} at step {step}.")
