"""What a run has shown of its layers: the record by which adaptive distributions draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from dropmuon_jax._checks import check_parameters, check_transformation, describe, static_int
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.states import checked_transformation
from dropmuon_jax.layers.trees import is_static, resolve_mask
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution, LayerGainsState
from dropmuon_jax.sampling.distributions import check_probabilities

if TYPE_CHECKING:  # it looks into records itself
    from dropmuon_jax.sampling.sampler import DepthSampler


def record_gains(
    inner: optax.GradientTransformation, sampler: DepthSampler
) -> optax.GradientTransformationExtraArgs:
    """Records what each layer's updates gain, and plans the draws of an adaptive sampler by it.

    Every step counts, so what leaves steps out, such as `optax.apply_if_finite`, goes inside.
    `optax.MultiSteps` goes neither around nor inside: gather gradients in the step itself.

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
    layers, num_subsets = sampler.layers, len(sampler.subsets)
    init, update = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> LayerGainsState:
        check_parameters(params)
        layers.rows_of(params)  # an error if a leaf is in no layer
        if _nodes(inner_state := init(params), optax.MultiStepsState):  # which gain 0 in between
            raise TypeError("inner holds an optax.MultiSteps: gather gradients in the step itself.")
        uniform = jnp.full(num_subsets, 1 / num_subsets, jnp.float32)
        return LayerGainsState(
            inner_state,
            jnp.zeros((), jnp.int32),
            jnp.zeros(layers.num_layers, jnp.float32),
            jnp.zeros(layers.num_layers, jnp.int32),
            uniform,
            uniform.copy(),
        )

    def update_fn(updates, state, params=None, **extra_args):
        rest = dict(extra_args)
        mask, depth = rest.pop("layer_mask", None), rest.get("depth")
        if depth is not None:
            if mask is not None:
                raise TypeError("update() got both layer_mask and depth: give one of the two.")
            mask = layers.mask(depth)
        mask = resolve_mask(mask, updates, rest, takes_rows=bool(layers.stacks))
        grads, leaf_layers = updates, layers.rows_of(updates)
        updates, inner_state = update(grads, state.inner_state, params, **extra_args)
        latest = _gains(layers, leaf_layers, mask, grads, updates)
        # A step that overflowed has shown nothing. The first step that has counts whole.
        counts = _active_layers(layers, leaf_layers, mask) & jnp.isfinite(latest)
        num_active_steps = state.num_active_steps + counts.astype(jnp.int32)
        weight = jnp.maximum(1 - distribution.decay, 1 / jnp.maximum(num_active_steps, 1))
        average = state.gains + weight.astype(jnp.float32) * (latest - state.gains)
        gains = jnp.where(counts, average, state.gains)
        count = jnp.asarray(optax.safe_increment(state.count))
        ends_period = count % distribution.steps_per_plan == 0
        # A layer that has not been seen may be worth as much as the best.
        optimistic = jnp.where(num_active_steps > 0, gains, jnp.max(gains))
        plan = jnp.asarray(distribution.plan(optimistic), jnp.float32)
        return updates, LayerGainsState(
            inner_state,
            count,
            gains,
            num_active_steps,
            jnp.where(ends_period, state.next_probabilities, state.probabilities),
            jnp.where(ends_period, plan, state.next_probabilities),
        )

    return checked_transformation(init_fn, update_fn)


def _active_layers(
    layers: Layers, leaf_layers: Sequence[tuple[int, ...]], mask: Any
) -> Bool[Array, " num_layers"] | np.ndarray:
    """An entry for each layer; NumPy's where the mask is static."""
    flags: list[Any] = [False] * layers.num_layers
    for flag, of_leaf in zip(jax.tree.leaves(mask), leaf_layers, strict=True):
        rows = flag.ravel() if np.ndim(flag) else None
        for row, layer in enumerate(of_leaf):
            flags[layer] = flag if rows is None else rows[row]
    if all(map(is_static, flags)):
        return np.array(flags, bool)
    return jnp.stack([jnp.asarray(flag, bool) for flag in flags])


def _gains(
    layers: Layers, leaf_layers: Sequence[tuple[int, ...]], mask: Any, grads: Any, updates: Any
) -> Float[Array, " num_layers"]:
    """−⟨gradient, update⟩ of each layer."""
    total = jnp.zeros(layers.num_layers, jnp.float32)
    trees = [jax.tree.leaves(tree) for tree in (mask, grads, updates)]
    row_axes = layers.row_axes_of(updates)
    for of_leaf, row_axis, flag, grad, update in zip(leaf_layers, row_axes, *trees, strict=True):
        if is_static(flag) and not flag:
            continue
        products = grad.astype(jnp.float32) * update.astype(jnp.float32)
        gains = jnp.sum(products, axis=tuple(i for i in range(products.ndim) if i != row_axis))
        # A sum, not a scatter, which explicit axes would want to know more of.
        is_of_layer = np.arange(layers.num_layers)[:, None] == np.array(of_leaf)
        gains = gains[None] if gains.ndim else gains
        total -= jnp.sum(jnp.where(is_of_layer, gains, 0), axis=1)
    return total


def find_record(opt_state: Any) -> LayerGainsState:
    """The one record in the state of an optimizer; an error if there are none or several."""
    if opt_state is None:
        way_out = "give the optimizer state before the step, sampler.depth(step, opt_state)"
        raise TypeError(f"This distribution follows the run: {way_out}.")
    found = _nodes(opt_state, LayerGainsState)
    if not found:
        raise ValueError(
            "opt_state has no record of the layers' gains, which this distribution draws by. Make "
            "the optimizer by tx = dm.record_gains(optimizer, sampler), and give the state of tx."
        )
    if len(found) > 1 or _nodes(found[0].inner_state, LayerGainsState):
        raise ValueError(
            "opt_state has several records of gains: call dm.record_gains once, around all else."
        )
    return found[0]


def _nodes(tree: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


LAST_STEP = 2**31 - 1


def check_step(step: Any) -> int:
    """The step, if it is a Python integer that fits into an int32."""
    hint = "Count the steps in Python, or use sampler.sample."
    step = static_int("step", step, minimum=0, hint=hint)
    if step > LAST_STEP:
        raise ValueError(f"step must be at most {LAST_STEP}, an int32, got {step}.")
    return step


class Reading(NamedTuple):
    """A part of the record, on its way to the host or there."""

    count: Any
    probabilities: Any
    next_probabilities: Any

    @classmethod
    def begin(cls, opt_state: Any) -> Reading:
        """Copies on their way to the host, since the next step may overwrite the state."""
        record = find_record(opt_state)
        if isinstance(record.count, Tracer):
            raise TypeError("opt_state is traced: on the device, draw with sampler.sample.")
        if np.ndim(record.count):
            shape = np.shape(record.count)
            raise ValueError(f"opt_state is of {shape} runs at once: draw with sampler.sample.")
        with jax.transfer_guard("allow"), jax.ensure_compile_time_eval():
            reading = cls(*(jnp.copy(getattr(record, name)) for name in cls._fields))
            for array in reading:
                array.copy_to_host_async()
        return reading

    def arrive(self, step: int) -> Reading:
        """NumPy arrays, waited for; an error unless they are of the state before a step."""
        reading = Reading(*map(to_host, self))
        if reading.count != step:
            raise ValueError(
                f"opt_state has taken {reading.count} steps, and was given for step {step}. Give "
                "each step the state before it; after a restart count on from its steps. What "
                "leaves steps out (optax.apply_if_finite) goes inside, optax.MultiSteps nowhere."
            )
        check_probabilities(reading.probabilities, step)
        return reading


def to_host(array: Any) -> np.ndarray:
    """The value of an array; on a pod, of the copy that lies on a device of this process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated:
            raise ValueError(
                "The record of gains is sharded over processes. Give the jitted step "
                "out_shardings=dm.state_shardings(tx, params) for the optimizer state."
            )
        array = array.addressable_data(0)
    with jax.transfer_guard("allow"):
        return np.asarray(array)


class PlanReader:
    """Draws by the plans of one run, step by step, without waiting for the device that trains.

    The plan of a period is in the state one period ahead. Its copy to the host starts with the
    period before, and is there when it is needed: one read a period. Only the first step, and one
    that does not follow the last, waits for the device. A reader changes with every step: make one
    for each run. (Distributions that are not adaptive are drawn by the sampler.)

    Args:
        sampler: The :class:`DepthSampler` with which :func:`record_gains` was called.
    """

    def __init__(self, sampler: DepthSampler) -> None:
        self.sampler = sampler
        self._last_step = -1
        self._indices = np.zeros(0, np.int32)  # drawn for the steps of a period
        self._plan = np.zeros(0, np.float32)  # by these probabilities
        self._readings: list[Reading] = []  # of the state before the step `_begun`
        self._begun = 0

    def depth(self, step: int, opt_state: Any = None) -> int:
        """The depth of a step, equal to `sampler.depth(step, opt_state)`.

        A state of another step or run is a ValueError: at once at the first step and after a jump,
        else when the period that begins with the step has ended.
        """
        return (self._index if self.sampler.draws_depths else self.sampler.depth)(step, opt_state)

    def active(self, step: int, opt_state: Any = None) -> tuple[bool, ...]:
        """The layers of a step, equal to `sampler.active(step, opt_state)`."""
        return tuple(self.sampler.subsets[self._index(step, opt_state)].tolist())

    def _index(self, step: int, opt_state: Any) -> int:
        sampler, distribution = self.sampler, self.sampler.distribution
        if not isinstance(distribution, AdaptiveDistribution):
            return sampler.index(step)
        step = check_step(step)
        offset = step % distribution.steps_per_plan
        if step == self._last_step:  # again, as for the micro-batches of a step
            if step == self._begun:  # or of another run, which is found out when the period ends
                self._readings = [*self._readings[-7:], Reading.begin(opt_state)]
            return int(self._indices[offset])
        follows, self._last_step = step == self._last_step + 1, -1
        if not follows or offset == 0:
            finished = self._finish()
            latest = Reading.begin(opt_state)
            if follows and finished is not None:
                self._plan = finished.next_probabilities
            else:
                latest = latest.arrive(step)
                self._plan = latest.probabilities
            self._readings, self._begun = [latest], step
            steps = step - offset + np.arange(distribution.steps_per_plan)
            self._indices = sampler.draw_with(self._plan, steps)
        self._last_step = step
        return int(self._indices[offset])

    def _finish(self) -> Reading | None:
        """What has been read since the last plan was; an error unless it has that plan."""
        readings, self._readings = self._readings, []
        for reading in (arrived := [reading.arrive(self._begun) for reading in readings]):
            expected = reading.count, self._plan, arrived[0].next_probabilities
            if not all(map(np.array_equal, reading, expected)):
                raise ValueError(
                    f"The plan that was followed since step {self._begun} is not that of opt_state."
                    " A PlanReader follows one run: make one for each, and give it every step."
                )
        return arrived[0] if arrived else None
