"""Draws on the host, many steps at once, without touching the device that trains."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dropmuon_jax._checks import static_int
from dropmuon_jax._sampling._draws import draw_index

LAST_STEP = 2**31 - 1
_STEPS_PER_BLOCK = 1024  # how many steps the host draws at once


def check_step(step: int) -> int:
    """The step, if it is a Python integer that fits into an int32."""
    step = static_int(
        "step", step, minimum=0, hint="Count the steps in Python, or use sampler.sample."
    )
    if step > LAST_STEP:
        raise ValueError(f"step must be at most {LAST_STEP}, an int32, got {step}.")
    return step


class HostDraws:
    """The draws of a seed, of probabilities that are a function of the step.

    Args:
        seed: As the sampler's.
        probabilities: From a step, which may be traced, to the probabilities.
        steps_per_draw: The steps that share a draw.
    """

    def __init__(
        self,
        seed: int | jax.Array,
        probabilities: Callable[[Array | int], Float[Array, " num_subsets"]],
        steps_per_draw: int,
    ):
        self._seed = seed
        self._probabilities = probabilities
        self._steps_per_draw = steps_per_draw

    def index(self, draw: int) -> int:
        """What is drawn."""
        block, offset = divmod(draw, _STEPS_PER_BLOCK)
        return int(self._block(block)[offset])

    @functools.cached_property
    def _block(self) -> Callable[[int], np.ndarray]:
        def one(draw: Array) -> Any:
            probabilities = self._probabilities(draw * self._steps_per_draw)
            return draw_index(self._seed, draw, probabilities), probabilities

        draw_all = jax.jit(jax.vmap(one))

        @functools.lru_cache(maxsize=4)
        def block(number: int) -> np.ndarray:
            start = number * _STEPS_PER_BLOCK
            draws = np.arange(start, start + _STEPS_PER_BLOCK)
            # Nobody asks for those beyond, whose steps would overflow.
            draws = np.minimum(draws, LAST_STEP // self._steps_per_draw).astype(np.int32)
            indices, probabilities = on_host(draw_all, draws)
            for draw, of_draw in enumerate(probabilities, start):
                check_probabilities(of_draw, draw * self._steps_per_draw)
            return indices

        return block


def on_host(function: Callable[..., Any], *args: Any) -> Any:
    """The outputs of a compiled function as NumPy arrays, computed on the host's processor.

    So that a busy accelerator is not waited for; now, even if a user's trace is under way; and
    under a transfer guard, which guards the accelerator.
    """
    with (
        jax.ensure_compile_time_eval(),
        jax.transfer_guard("allow"),
        jax.default_device(_host_device()),
    ):
        return jax.tree.map(np.asarray, function(*args))


def check_probabilities(probabilities: np.ndarray, step: int) -> None:
    """Error for what is no distribution."""
    if not (probabilities >= 0).all():
        raise ValueError(f"probabilities must not be negative, got {probabilities} at step {step}.")
    if not np.isclose(probabilities.sum(), 1, atol=1e-5):
        raise ValueError(
            f"probabilities must sum to 1, got {probabilities.sum():g} at step {step}."
        )


def _host_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS without "cpu"
        return None
