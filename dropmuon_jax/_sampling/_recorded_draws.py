"""The draws of an adaptive sampler on the host, which follows one run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dropmuon_jax._sampling._draws import draw_index
from dropmuon_jax._sampling._host_draws import check_probabilities, on_host
from dropmuon_jax._sampling._record import find_record


class _Reading(NamedTuple):
    """A part of the record, on its way to the host or there."""

    count: Any
    probabilities: Any
    next_probabilities: Any


class RecordedDraws:
    """Draws by the plans in the optimizer state of one run, step by step.

    The plan of a period is in the state one period ahead. Its copy to the host starts with the
    period before, and is there when it is needed; only the first step, and one that does not follow
    the last, waits for the device.

    Args:
        seed: As the sampler's.
        steps_per_plan: The length of a period.
        steps_per_draw: The steps that share a draw.
    """

    def __init__(self, seed: int | jax.Array, steps_per_plan: int, steps_per_draw: int):
        self._steps_per_plan, self._steps_per_draw = steps_per_plan, steps_per_draw
        self._draw = jax.jit(
            jax.vmap(lambda draw, of_draw: draw_index(seed, draw, of_draw), in_axes=(0, None))
        )
        self._last_step = -1
        self._indices = np.zeros(0, np.int32)
        self._now = np.zeros(0, np.float32)
        self._coming: _Reading | None = None
        self._coming_step = 0  # at which it was begun
        self._again: list[_Reading] = []  # by further calls at that step

    def index(self, step: int, opt_state: Any) -> int:
        """What is drawn in a step, from the state before it."""
        period, offset = divmod(step, self._steps_per_plan)
        if step == self._last_step:  # again, as for the micro-batches of a step
            if offset == 0:  # or of another run, which is found out when the period ends
                self._again = [*self._again[-7:], _start_reading(opt_state)]
            return int(self._indices[offset])
        follows, self._last_step = step == self._last_step + 1, -1
        if not follows or offset == 0:
            reading = self._finish_reading()
            if follows and reading is not None:
                self._now = reading.next_probabilities
                self._coming, self._coming_step = _start_reading(opt_state), step
            else:
                self._read(step, opt_state)
            self._draw_period(period)
        self._last_step = step
        return int(self._indices[offset])

    def _read(self, step: int, opt_state: Any) -> None:
        """The plan of the period of a step; waits for it."""
        reading = _arrived(_start_reading(opt_state))
        # Fewer is possible: a wrapper may leave steps out, as optax.apply_if_finite does.
        if int(reading.count) > step:
            raise ValueError(
                f"opt_state has taken {reading.count} steps, and is asked for the draw of step "
                f"{step}. Give the state before that step; after a restart count on from its steps."
            )
        self._now, self._coming, self._coming_step = reading.probabilities, reading, step

    def _finish_reading(self) -> _Reading | None:
        """What began to be read at the beginning of this period, if it began then.

        Raises:
            ValueError: If it does not have the plan that has been followed since.
        """
        if self._coming is None:
            return None
        reading, again = _arrived(self._coming), map(_arrived, self._again)
        self._coming, self._again = None, []
        left_out = int(reading.count) < self._coming_step
        agrees = np.array_equal(reading.probabilities, self._now) and all(
            np.array_equal(other.next_probabilities, reading.next_probabilities) for other in again
        )
        if not left_out and not agrees:
            raise ValueError(
                f"The plan that was followed since step {reading.count} is not that of opt_state. "
                "A sampler follows one run: make one for each, and give it the state of every step."
            )
        return reading

    def _draw_period(self, period: int) -> None:
        start = period * self._steps_per_plan
        draws = np.arange(start, start + self._steps_per_plan, dtype=np.int32)
        check_probabilities(self._now, start)
        self._indices = on_host(self._draw, draws // self._steps_per_draw, self._now)


def _start_reading(opt_state: Any) -> _Reading:
    """Copies, since the next step may overwrite what it is given."""
    record = find_record(opt_state)
    if isinstance(record.count, Tracer):
        raise TypeError("opt_state is traced: on the device, draw with sampler.sample.")
    if record.count.ndim:
        raise ValueError(
            f"opt_state is that of {record.count.shape} runs at once: draw with sampler.sample in "
            "jax.vmap, or make a sampler for each."
        )
    with jax.transfer_guard("allow"), jax.ensure_compile_time_eval():
        reading = _Reading(
            *map(jnp.copy, (record.count, record.probabilities, record.next_probabilities))
        )
        for array in reading:
            array.copy_to_host_async()
    return reading


def _arrived(reading: _Reading) -> _Reading:
    """As NumPy arrays."""
    return _Reading(*map(to_host, reading))


def to_host(array: Any) -> np.ndarray:
    """Its value; on a pod of the copy that lies on a device of this process."""
    if not isinstance(array, jax.Array):
        return array
    if not array.is_fully_addressable:
        if not array.is_fully_replicated:
            raise ValueError(
                "The record of gains is sharded over processes. Give the jitted step "
                "out_shardings=dm.state_shardings(tx, params) for the optimizer state."
            )
        array = array.addressable_data(0)
    with jax.transfer_guard("allow"):
        return np.asarray(array)
