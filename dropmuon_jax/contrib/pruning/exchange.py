"""DSnoT and our R²-DSnoT: pruned weights come back for kept ones, without training.

What an output loses on average to its pruned weights is ε = Σ_pruned D_j, with D_j = W_j E[X_j] of
the weight from input j. Each cycle brings a weight back that counts much in ε, and prunes one of
the other sign that is worth little, which both move ε towards zero, or beyond.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_choice, check_nonnegative, static_int
from dropmuon_jax.contrib.pruning.kernels import Kernels, check_kernels, check_mapping
from dropmuon_jax.contrib.pruning.masks import Masks, mask_of_leaves
from dropmuon_jax.contrib.pruning.scores import check_order, magnitude, ria, wanda

# The authors' 0.1 of a sum over a sequence of 2048 tokens; here ε is of one token.
_THRESHOLD = 0.1 / 2048
_NUM_CYCLES = 50

Rows = Float[Array, "batch fan_out fan_in"]
Where = Literal["prune", "grow", "both"]


def dsnot(
    params: Any,
    kernels: Kernels,
    masks: Mapping[str, Array],
    *,
    scores: Mapping[str, Array] | None = None,
    grow_weights: Mapping[str, Array] | None = None,
    num_cycles: int = _NUM_CYCLES,
    threshold: float = _THRESHOLD,
    variance_power: float = 1.0,
    keeps_sign: bool = False,
    m: int | None = None,
) -> Masks:
    r"""Exchanges pruned weights for kept ones, towards outputs with the mean that they had.

    For each output, with ε = Σ over pruned weights of D_j = W_j E[X_j], in each cycle

    .. math::
        i &= \operatorname{argmax}_{\text{pruned}} \operatorname{sign}(\varepsilon)
            D_i / \operatorname{Var}(X_i)^{\text{power}} && \text{comes back,} \\
        j &= \operatorname{argmin}_{\text{kept},\ D_j \varepsilon < 0} \text{score}_j
            && \text{is pruned,} \\
        \varepsilon &\leftarrow \varepsilon + D_j - D_i.

    A weight is exchanged once at most, and every output keeps its number of weights. An exchange
    may move ε beyond zero, and further away, unless `keeps_sign`: then `|ε|` falls in every cycle.

    Args:
        params: The parameters before the pruning.
        kernels: What :func:`record_kernels` returned for them.
        masks: The masks to begin with. Kernels without one are left out.
        scores: Which kept weight goes first, by default :func:`wanda`.
        grow_weights: What D_i / Var^power is multiplied with to choose what comes back, by default
            nothing. Positive.
        num_cycles: After so many exchanges an output is left.
        threshold: `|ε|` of one row (token) at which an output is left.
        variance_power: The power of the variances, at least 0.
        keeps_sign: Whether an output is left before ε changes its sign.
        m: The size of a group of neighbouring inputs, as in 2:4, within which weights are
            exchanged: then j is the kept weight of i's group with the lowest score, whatever its
            sign, and the sign of ε is kept.

    Returns:
        The new masks.

    Raises:
        TypeError: If `num_cycles` or `m` is no Python integer.
        ValueError: For numbers out of range; for masks, scores or a group that do not fit, naming
            a kernel.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> pruning = dm.contrib.pruning
        >>> params = {"w": jnp.array([[2.0], [1.0], [-1.0]])}
        >>> x = jnp.array([[1.0, 1.0, 1.0], [3.0, 2.0, 2.0]])
        >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [x])
        >>> masks = {"w": jnp.array([[False], [True], [True]])}  # a mean of 4 is lost
        >>> print(pruning.dsnot(params, kernels, masks)["w"].T)  # now -1.5
        [[ True  True False]]

    References:
        Zhang et al., *Dynamic Sparse No Training*, 2023, arXiv:2310.08915, as the authors' code has
        it, `lib/prune.py` of zyxxmu/DSnoT, with three differences: ε, and so `threshold`, is of one
        token and not of a sequence; an output whose candidates run out is left, where the code goes
        on with weights that are kept already; and all kernels are exchanged, where the code leaves
        the feed-forward ones out by default.
    """
    static_int("num_cycles", num_cycles, minimum=0)
    check_nonnegative("threshold", threshold)
    check_nonnegative("variance_power", variance_power)
    if m is not None:
        static_int("m", m, minimum=1)
    mask_of_leaves(params, masks)
    kernels = _kernels_of(masks, kernels)
    leaves = check_kernels(params, kernels)
    if scores is None:
        scores = wanda(params, kernels)
    for name, of_kernels in (("scores", scores), ("grow_weights", grow_weights)):
        for path, leaf in {} if of_kernels is None else leaves.items():
            of_leaf = check_mapping(name, of_kernels).get(path)
            if of_leaf is None or of_leaf.shape != leaf.shape:
                has = "lacks it" if of_leaf is None else f"has shape {of_leaf.shape}"
                raise ValueError(f"masks have '{path}' {leaf.shape}, and {name} {has}.")
    new = {}
    for path, leaf in leaves.items():
        kernel = kernels[path]
        mask, restore = kernel.matrices(masks[path])
        if m is not None and mask.shape[1] % m:
            raise ValueError(
                f"m is {m}, which does not divide the fan-in {mask.shape[1]} of '{path}'."
            )
        mean, variance = (kernel.matrices(x)[0] for x in kernel.inputs[1:])
        change = kernel.matrices(leaf)[0].astype(mean.dtype) * mean
        # What comes from an input that never varies comes back first.
        tiny = jnp.finfo(mean.dtype).tiny
        gain = change / jnp.maximum(variance ** jnp.asarray(variance_power, mean.dtype), tiny)
        if grow_weights is not None:
            gain = gain * kernel.matrices(grow_weights[path])[0]
        of_score = kernel.matrices(scores[path])[0]
        rows = (x.mT for x in (mask, change, gain, of_score))
        rule = _Rule(num_cycles, float(threshold), keeps_sign, m)
        new[path] = restore(_exchange(*rows, rule).mT)
    return new


def r2_dsnot(
    params: Any,
    kernels: Kernels,
    masks: Mapping[str, Array],
    *,
    relative: Where = "prune",
    power: float = 0.5,
    regularizer: float = 0.0,
    order: float = 2.0,
    keeps_sign: bool = False,
    m: int | None = None,
) -> Masks:
    """Our reading of R²-DSnoT: the exchange of :func:`dsnot` by relative importance.

    The score by which kept weights go is :func:`ria` plus `regularizer · ‖W_j:‖_p` of the input;
    what comes back may be weighted by the relative importance, too.

    Args:
        params: The parameters before the pruning.
        kernels: What :func:`record_kernels` returned for them.
        masks: The masks to begin with.
        relative: Where relative importance counts: in what is pruned, "prune", in what comes back,
            "grow", or in "both".
        power: Of the activations in the score.
        regularizer: Of the norm in the score, at least 0.
        order: p of that norm.
        keeps_sign: As in :func:`dsnot`.
        m: The size of a group, as in :func:`dsnot`.

    Returns:
        The new masks.

    Raises:
        ValueError: For numbers out of range or another `relative`.

    References:
        Yi and Richtárik, 2025, arXiv:2501.18980, of which reviews tell the three ingredients:
        relative importance in one of both criteria (in both it hurts), a regularised boundary of
        little effect, and square roots of activations. How they are put together, and the default
        without regularizer, are ours.
    """
    check_choice("relative", relative, get_args(Where))
    check_nonnegative("power", power)
    check_nonnegative("regularizer", regularizer)
    check_order(order)
    kernels = _kernels_of(masks, kernels)
    leaves = check_kernels(params, kernels)
    if relative == "grow":
        sizes = magnitude(params, kernels)
        scores = {path: sizes[path] * of.inputs.rms**power for path, of in kernels.items()}
    else:
        scores = ria(params, kernels, power=power)
    for path, of in kernels.items():
        stack, _ = of.matrices(leaves[path].astype(scores[path].dtype))
        norms = jnp.linalg.norm(stack, order, -1, keepdims=True)
        flat, restore = of.matrices(scores[path])
        scores[path] = restore(flat + regularizer * norms)
    grow = None if relative == "prune" else ria(params, kernels, power=0.0)
    return dsnot(
        params, kernels, masks, scores=scores, grow_weights=grow, keeps_sign=keeps_sign, m=m
    )


def _kernels_of(masks: Mapping[str, Array], kernels: Kernels) -> Kernels:
    """Those that have a mask."""
    if missing := [path for path in check_mapping("masks", masks) if path not in kernels]:
        raise ValueError(f"masks have '{missing[0]}', which kernels do not: {list(kernels)[:6]}.")
    return {path: kernels[path] for path in masks}


class _Rule(NamedTuple):
    num_cycles: int
    threshold: float
    keeps_sign: bool
    m: int | None


class _Exchange(NamedTuple):
    """The state of all outputs behind a cycle."""

    cycle: Array
    kept: Bool[Array, "batch fan_out fan_in"]
    may_grow: Bool[Array, "batch fan_out fan_in"]
    may_go: Bool[Array, "batch fan_out fan_in"]
    error: Float[Array, "batch fan_out 1"]
    goes_on: Bool[Array, "batch fan_out 1"]


@functools.partial(jax.jit, static_argnames="rule")
def _exchange(
    kept: Bool[Array, "batch fan_out fan_in"], change: Rows, gain: Rows, score: Rows, rule: _Rule
) -> Bool[Array, "batch fan_out fan_in"]:
    """The cycles of all outputs at once."""
    index = jnp.arange(kept.shape[-1])[None, None]
    start = jnp.sum(jnp.where(kept, 0, change), -1, keepdims=True)

    def choose(candidates: Array, value: Rows) -> tuple[Array, Array]:
        """The position of the largest value, and whether there is a candidate."""
        best = jnp.argmax(jnp.where(candidates, value, -jnp.inf), -1, keepdims=True)
        return best, candidates.any(-1, keepdims=True)

    def cycle(now: _Exchange) -> _Exchange:
        towards = jnp.where(now.error > 0, 1, -1).astype(change.dtype) * change
        grown, can_grow = choose(now.may_grow & (towards > 0), jnp.sign(now.error) * gain)
        if rule.m is None:
            may_go = now.may_go & (towards < 0)
        else:
            may_go = now.may_go & (index // rule.m == grown // rule.m)
        gone, can_go = choose(may_go, -score)
        at = functools.partial(jnp.take_along_axis, change, axis=-1)
        error = now.error + at(gone) - at(grown)
        goes_on = now.goes_on & can_grow & can_go & (jnp.abs(now.error) > rule.threshold)
        if rule.keeps_sign or rule.m is not None:
            goes_on &= jnp.sign(error) == jnp.sign(start)
        is_grown, is_gone = (goes_on & (index == at_index) for at_index in (grown, gone))
        return _Exchange(
            now.cycle + 1,
            (now.kept | is_grown) & ~is_gone,
            now.may_grow & ~is_grown,
            now.may_go & ~is_gone,
            jnp.where(goes_on, error, now.error),
            goes_on,
        )

    first = _Exchange(jnp.int32(0), kept, ~kept, kept, start, jnp.ones_like(start, bool))
    last = jax.lax.while_loop(
        lambda now: (now.cycle < rule.num_cycles) & now.goes_on.any(), cycle, first
    )
    return last.kept
