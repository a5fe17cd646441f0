"""What a run has shown of its layers: the record by which adaptive distributions draw."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt32

from dropmuon_jax._checks import check_parameters, check_transformation, describe
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.prefixes import given_mask
from dropmuon_jax.layers.rows import active_layers
from dropmuon_jax.layers.states import checked_transformation
from dropmuon_jax.layers.trees import is_static, resolve_mask
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution

if TYPE_CHECKING:  # it looks into records itself
    from dropmuon_jax.sampling.sampler import DepthSampler


class DrawnBy(NamedTuple):
    """What the draws of a run depend on, beside its gains."""

    layer_costs: Float[Array | np.ndarray, " num_layers"]
    """The costs by which it plans, in :func:`time_aware_depth` what each layer adds, and the last
    one what no depth avoids; ones if its plan takes none."""
    settings: UInt32[Array | np.ndarray, " 8"]
    """Two words of the seed, steps per draw and per plan, the bits of the decay, checksums of
    layers and subsets, and whether another :func:`record_gains` has taken steps."""
    plans: Float[Array | np.ndarray, " examples"]
    """What its plan makes of some gains and costs: the mean index that is drawn."""

    def differs(self, own: DrawnBy) -> Any:
        """Whether draws by this are not those of a sampler, for other reasons than its costs."""
        # Another backend may round plans in another way.
        of_plans = abs(self.plans - own.plans) > np.float32(1e-4)
        return of_plans.any() | (self.settings != own.settings).any()

    def refuse_other(self, own: DrawnBy, told: list[str]) -> None:
        """Error if this is not what a sampler would have written, but for costs: then a warning.

        Both hold NumPy arrays; `told` gets the warning, so that it comes once.
        """
        old, new = _readable(self.settings), _readable(own.settings)
        found = [
            f"{name} is {old[name]}, not {new[name]}" for name in old if old[name] != new[name]
        ]
        if not found and self.differs(own):
            found = ["plan (its rate, floor or a function of your own) is another"]
        if found:
            raise ValueError(
                f"opt_state is not of this sampler: its {'; its '.join(found)}. The run would not "
                "draw as it did: make sampler and optimizer as in the script that began it. To go "
                f"on with these, {_take_over('drawn_by')}."
            )
        if not told and not np.allclose(self.layer_costs, own.layer_costs, rtol=1e-5):
            costs, others = (
                ", ".join(f"{cost:.3g}" for cost in of.layer_costs) for of in (self, own)
            )
            told.append(
                f"opt_state draws on by the layer costs with which its run began, [{costs}]. Those "
                f"of this sampler, [{others}], are not used: to take them, "
                f"{_take_over('layer_costs')}."
            )
            warnings.warn(told[0], stacklevel=2)


class LayerGainsState(NamedTuple):
    """State of :func:`record_gains`."""

    inner_state: optax.OptState
    """The state of the transformation inside."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of steps taken, a scalar int32."""
    gains: Float[Array, " num_layers"]
    """First-order decrease of the loss, −⟨gradient, update⟩, of each layer in a step in which it is
    active, over the length of that step: an exponential moving average over these steps."""
    step_length: Float[Array, ""]
    """Σ|u| of the latest update of the last layer: the learning rate, as far as gains need it."""
    num_active_steps: Int[Array, " num_layers"]
    """Number of steps in each average."""
    probabilities: Float[Array, " num_subsets"]
    """The probability of each subset, in the period under way."""
    next_probabilities: Float[Array, " num_subsets"]
    """The same in the next period; known one period ahead, so that the host never waits for it."""
    drawn_by: DrawnBy
    """What else the draws depend on, as it was when the run began."""


def record_gains(
    inner: optax.GradientTransformation, sampler: DepthSampler
) -> optax.GradientTransformationExtraArgs:
    """Records what each layer's updates gain, and plans the draws of an adaptive sampler by it.

    A gain is −⟨gradient, update⟩ of a layer over the length of the step, Σ|u| of the update of the
    last layer, which is active at every depth and must move: so layers that are seldom active are
    not taken for more because the learning rate was higher then, nor for less in a warm-up. (In a
    step without the last layer its latest length counts.)

    Every step counts, so what leaves steps out, such as `optax.apply_if_finite`, goes inside. A
    step that it leaves out, in which there are gradients and no layer moves, shows no gain.
    `optax.MultiSteps` goes neither around nor inside: gather gradients in the step itself.

    The state keeps what the draws depend on. So a script that is started again draws on as the run
    would have, by the costs of its state, even if it has measured others, of which it warns; and a
    state whose draws were another sampler's is refused where the host draws. (Draws inside a jitted
    loop cannot say so, and those of `sampler.sample` outside look at the first state alone: call
    `sampler.check_processes(step, opt_state)` or :func:`check_state` before.)

    Args:
        inner: The whole optimizer, from the gradient to the update that is added.
        sampler: A :class:`DepthSampler` whose distribution is adaptive.

    Returns:
        A transformation with the updates of `inner` and a :class:`LayerGainsState` around its
        state. `update` takes `layer_mask`, or `depth` if `inner` does, and passes on what it gets.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(2), "head": jnp.eye(2)}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> sampler = dm.DepthSampler(layers, dm.time_aware_depth([2.0, 1.0]), seed=0)
        >>> tx = dm.record_gains(dm.drop_muon(0.1, layers), sampler)
        >>> grads = {"stem": 3 * jnp.eye(2), "head": jnp.eye(2)}
        >>> _, state = tx.update(grads, tx.init(params), params, layer_mask=layers.mask(0))
        >>> bool(state.gains[0] > state.gains[1])
        True
    """
    check_transformation("inner", inner)
    sampler = getattr(sampler, "draws", sampler)  # of a layer_mask_sampler
    distribution = getattr(sampler, "distribution", None)
    if not isinstance(distribution, AdaptiveDistribution):
        raise TypeError(
            "sampler must be a DepthSampler with an AdaptiveDistribution such as "
            f"dm.time_aware_depth(…), got {describe(sampler)} with {describe(distribution)}. Other "
            "distributions need no record."
        )
    layers = sampler.layers
    init, update = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> LayerGainsState:
        check_parameters(params)
        layers.rows_of(params)  # an error if a leaf is in no layer
        inner_state = init(params)  # one that gathers would gain 0 in between
        gathered = optax.tree.get_all_with_path(inner_state, "AccumulatedState")
        if nodes(inner_state, optax.MultiStepsState) or gathered:
            raise TypeError(
                "inner accumulates, by optax.MultiSteps or dm.accumulate: gather gradients in the "
                "step itself."
            )
        ones = jnp.ones(layers.num_layers, jnp.float32)
        first = jnp.asarray(distribution.plan_with(ones, sampler.drawn_by.layer_costs), jnp.float32)
        return LayerGainsState(
            inner_state,
            jnp.zeros((), jnp.int32),
            jnp.zeros(layers.num_layers, jnp.float32),
            jnp.zeros((), jnp.float32),
            jnp.zeros(layers.num_layers, jnp.int32),
            first,
            first.copy(),
            jax.tree.map(jnp.array, sampler.drawn_by),
        )

    def update_fn(updates, state, params=None, **extra_args):
        rest = dict(extra_args)
        mask = given_mask(layers, updates, rest.pop("layer_mask", None), rest.get("depth"))
        mask = resolve_mask(mask, updates, rest, takes_rows=bool(layers.stacks))
        grads, leaf_layers = updates, layers.rows_of(updates)
        updates, inner_state = update(grads, state.inner_state, params, **extra_args)
        is_active, last = active_layers(layers.num_layers, leaf_layers, mask), layers.num_layers - 1
        flags = jax.tree.leaves(mask)
        slopes, lengths = (_sums(layers, flags, jnp.abs, tree) for tree in (grads, updates))
        # As by optax.apply_if_finite: there is a gradient, and no layer moves.
        is_left_out = (jnp.sum(slopes) != 0) & (jnp.sum(lengths) == 0)
        is_known = is_active[last] & jnp.isfinite(lengths[last]) & ~is_left_out
        step_length = jnp.where(is_known, lengths[last], state.step_length)
        decrease = -_sums(layers, flags, jnp.multiply, grads, updates)
        latest = decrease / jnp.where(step_length > 0, step_length, 1)
        # A step that overflowed, was left out or has no length, shows nothing. The first that does
        # counts whole.
        counts = is_active & jnp.isfinite(latest) & (step_length > 0) & ~is_left_out
        num_active_steps = state.num_active_steps + counts.astype(jnp.int32)
        weight = jnp.maximum(1 - distribution.decay, 1 / jnp.maximum(num_active_steps, 1))
        average = state.gains + weight.astype(jnp.float32) * (latest - state.gains)
        gains = jnp.where(counts, average, state.gains)
        count = jnp.asarray(optax.safe_increment(state.count))
        ends_period = count % distribution.steps_per_plan == 0
        # A layer that has not been seen may be worth as much as the best.
        optimistic = jnp.where(num_active_steps > 0, gains, jnp.max(gains))
        drawn_by: DrawnBy = state.drawn_by
        plan = jnp.asarray(distribution.plan_with(optimistic, drawn_by.layer_costs), jnp.float32)
        is_other = jnp.asarray(drawn_by.differs(sampler.drawn_by), jnp.uint32)
        flag = np.array([0] * 7 + [1], np.uint32) * is_other
        return updates, LayerGainsState(
            inner_state,
            count,
            gains,
            step_length,
            num_active_steps,
            jnp.where(ends_period, state.next_probabilities, state.probabilities),
            jnp.where(ends_period, plan, state.next_probabilities),
            drawn_by._replace(settings=jnp.maximum(drawn_by.settings, flag)),
        )

    return checked_transformation(init_fn, update_fn)


def _sums(
    layers: Layers, flags: Sequence[Any], function: Callable[..., Array], *trees: Any
) -> Float[Array, " num_layers"]:
    """The sum of a function of entries over each layer, in leaves that are not out by a flag."""
    total = jnp.zeros(layers.num_layers, jnp.float32)
    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    rows, row_axes = (places(trees[0]) for places in (layers.rows_of, layers.row_axes_of))
    for of_leaf, row_axis, flag, arrays in zip(rows, row_axes, flags, leaves, strict=True):
        if is_static(flag) and not flag:
            continue
        entries = function(*(array.astype(jnp.float32) for array in arrays))
        sums = jnp.sum(entries, axis=tuple(i for i in range(entries.ndim) if i != row_axis))
        # A sum, not a scatter, which explicit axes would want to know more of.
        is_of_layer = np.arange(layers.num_layers)[:, None] == np.array(of_leaf)
        total += jnp.sum(jnp.where(is_of_layer, sums if sums.ndim else sums[None], 0), axis=1)
    return total


def nodes(tree: Any, kind: type) -> list[Any]:
    """The nodes of a type in a tree, outermost."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def seed_words(seed: int | Array) -> Any:
    """The upper and the lower 32 bits of a seed, which is an integer or an array."""
    if isinstance(seed, int):  # JAX's own key of it depends on its configuration from 2^32 on
        return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return seed if seed.shape else jnp.stack([jnp.zeros((), jnp.uint32), seed.astype(jnp.uint32)])


def drawn_by_of(sampler: DepthSampler) -> DrawnBy:
    """What the draws of a sampler with an adaptive distribution depend on, beside gains."""
    distribution: Any = sampler.distribution
    layers, size = sampler.layers, sampler.layers.num_layers
    about = layers.names, [(leaf.path, leaf.layers) for leaf in layers.leaves]
    checksums = zlib.crc32(repr(about).encode()), zlib.crc32(sampler.subsets.tobytes())
    decay = np.float32(distribution.decay).view(np.uint32)
    steps = sampler.steps_per_draw, distribution.steps_per_plan
    words, others = seed_words(sampler.seed), np.array([*steps, decay, *checksums, 0], np.uint32)
    settings = (np if isinstance(words, np.ndarray) else jnp).concatenate([words, others])
    # Rising, falling, and one layer above all others. So steep costs let a plan show its floor.
    rising = 2.0 ** np.arange(1 - size, 1, dtype=np.float32)
    gains = [rising, rising[::-1], *(0.97 * np.eye(size, dtype=np.float32) + np.float32(0.03))]
    steep = np.maximum(64.0 ** -np.arange(size), 2.0**-20).astype(np.float32)
    index = np.linspace(0, 1, len(sampler.subsets), dtype=np.float32)
    with jax.transfer_guard("allow"), jax.ensure_compile_time_eval():
        plans = [
            np.asarray(distribution.plan_with(jnp.asarray(of_layers), jnp.asarray(steep)))
            for of_layers in gains
        ]
    given = distribution.layer_costs
    costs = np.ones(size, np.float32) if given is None else np.asarray(given)
    return DrawnBy(costs, settings, (np.stack(plans) @ index).astype(np.float32))


def _take_over(name: str) -> str:
    return (
        f"opt_state = optax.tree.set(opt_state, {name}=optax.tree.get(tx.init(params), '{name}'))"
    )


def _readable(settings: Array | np.ndarray) -> dict[str, Any]:
    """The settings by their names."""
    high, low, per_draw, per_plan, decay, layers, subsets, is_mixed = settings.tolist()
    return {
        "seed": (high << 32) + low,
        "steps_per_draw": per_draw,
        "steps_per_plan": per_plan,
        "decay": round(float(np.uint32(decay).view(np.float32)), 6),
        "order of layers": f"{layers:08x}",
        "set of subsets": f"{subsets:08x}",
        "record": "of two different samplers" if is_mixed else "of one",
    }
