"""What the host reads of a run: the record in the optimizer state, and its plans."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dropmuon_jax._checks import static_int
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution
from dropmuon_jax.sampling.distributions import check_probabilities
from dropmuon_jax.sampling.record import DrawnBy, LayerGainsState, nodes

if TYPE_CHECKING:  # it looks into records itself
    from dropmuon_jax.sampling.sampler import DepthSampler


def find_record(opt_state: Any) -> LayerGainsState:
    """The one record in the state of an optimizer; an error if there are none or several."""
    if opt_state is None:
        way_out = "give the optimizer state before the step, sampler.depth(step, opt_state)"
        raise TypeError(f"This distribution follows the run: {way_out}.")
    found = nodes(opt_state, LayerGainsState)
    if not found:
        raise ValueError(
            "opt_state has no record of the layers' gains, which this distribution draws by. Make "
            "the optimizer by tx = dm.record_gains(optimizer, sampler), and give the state of tx."
        )
    if len(found) > 1 or nodes(found[0].inner_state, LayerGainsState):
        raise ValueError(
            "opt_state has several records of gains: call dm.record_gains once, around all else."
        )
    if holes := [name for name in found[0]._fields if getattr(found[0], name) is None]:
        raise ValueError(
            f"opt_state has a hole (None) in its record of gains, {holes[0]}, as one that another "
            f"version has saved. Fill it: record._replace({holes[0]}=tx.init(params).{holes[0]})."
        )
    return found[0]


def record_of(opt_state: Any, sampler: DepthSampler) -> LayerGainsState:
    """The record of a draw on the device, which in the first such draw is compared and waited for.

    To read later ones would hold up a loop that is ahead of the device.
    """
    record = find_record(opt_state)
    known = jax.tree.leaves((record.drawn_by, sampler.seed))
    is_known = not any(isinstance(x, Tracer) for x in known) and record.count.ndim == 0
    if is_known and not sampler.compared:
        drawn_by = jax.tree.map(to_host, record.drawn_by)
        drawn_by.refuse_other(sampler.drawn_by, sampler.told)
        sampler.compared.append(drawn_by)
    return record


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
    drawn_by: DrawnBy

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
            reading = cls(*(jax.tree.map(jnp.copy, getattr(record, name)) for name in cls._fields))
            for array in jax.tree.leaves(reading):
                array.copy_to_host_async()
        return reading

    def arrive(self, step: int, sampler: DepthSampler) -> Reading:
        """NumPy arrays, waited for; an error unless they are of the sampler, before a step."""
        reading = jax.tree.map(to_host, self)
        if reading.count != step:
            raise ValueError(
                f"opt_state has taken {reading.count} steps, and was given for step {step}. Give "
                "each step the state before it; after a restart count on from its steps. What "
                "leaves steps out (optax.apply_if_finite) goes inside, optax.MultiSteps nowhere."
            )
        reading.drawn_by.refuse_other(sampler.drawn_by, sampler.told)
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


def check_agreement(seed: Any, step: int, draws: Sequence[int], about: str) -> None:
    """Error if processes differ in what they draw, or in what they draw from."""
    if jax.process_count() == 1:
        return
    # Imported here for the sake of one device, where it would take time for nothing.
    from jax.experimental import multihost_utils

    checksums = zlib.crc32(about.encode()), zlib.crc32(np.asarray(draws, np.int64).tobytes())
    mine = np.array([seed & 0xFFFFFFFF, seed >> 32, step, *checksums], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    if (everyone == everyone[0]).all():
        return
    differences = "; ".join(
        f"process {process} has seed {low + (high << 32)} and step {of_step}, layers {layers:08x} "
        f"and draws {of_draws:08x}"
        for process, (low, high, of_step, layers, of_draws) in enumerate(everyone.tolist())
    )
    raise ValueError(
        "The processes do not draw the same layers, and would wait for each other forever: "
        f"{differences}. Give all one seed, layers and distribution, and a common first step."
    )


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
                latest = latest.arrive(step, sampler)
                self._plan = latest.probabilities
            self._readings, self._begun = [latest], step
            steps = step - offset + np.arange(distribution.steps_per_plan)
            self._indices = sampler.draw_with(self._plan, steps)
        self._last_step = step
        return int(self._indices[offset])

    def _finish(self) -> Reading | None:
        """What has been read since the last plan was; an error unless it has that plan."""
        readings, self._readings = self._readings, []
        arrived = [reading.arrive(self._begun, self.sampler) for reading in readings]
        for reading in arrived:
            expected = self._plan, arrived[0].next_probabilities
            if not all(map(np.array_equal, reading[1:3], expected)):
                raise ValueError(
                    f"The plan that was followed since step {self._begun} is not that of opt_state."
                    " A PlanReader follows one run: make one for each, and give it every step."
                )
        return arrived[0] if arrived else None


def possible_draws(sampler: DepthSampler) -> list[tuple[bool, ...]]:
    """The sets of layers that can be drawn in some step."""
    drawn = np.ones(len(sampler.subsets), bool)
    distribution, num_layers = sampler.distribution, sampler.layers.num_layers
    if not isinstance(distribution, AdaptiveDistribution):
        program = jax.make_jaxpr(lambda step: distribution.probabilities(step, num_layers))(0).jaxpr
        used = [x for eqn in program.eqns for x in eqn.invars] + program.outvars
        if not any(x is program.invars[0] for x in used):  # the same in every step
            drawn = np.asarray(sampler.probabilities(0)) > 0
    return list(dict.fromkeys(map(tuple, sampler.subsets[drawn].tolist())))
