"""Whether all processes of a pod draw the same layers."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

_MASK = 2**32 - 1


def check_agreement(seed: int, step: int, draws: Sequence[int], description: str) -> None:
    """Error if another process has another seed, step or draws; all have to call it.

    Args:
        seed: Of this process.
        step: Likewise.
        draws: What it is about to draw.
        description: Of what it draws from.
    """
    if jax.process_count() == 1:
        return
    # Imported here because importing it starts no pod, but takes time on one device.
    from jax.experimental import multihost_utils

    about = zlib.crc32(description.encode())
    drawn = zlib.crc32(np.asarray(draws, np.int64).tobytes())
    mine = np.array([seed & _MASK, seed >> 32, step, about, drawn], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    if (everyone == everyone[0]).all():
        return
    said = [
        f"process {process} has seed {int(low) + (int(high) << 32)} and step {of_step}, "
        f"layers {layers:08x} and draws {of_draws:08x}"
        for process, (low, high, of_step, layers, of_draws) in enumerate(everyone.tolist())
    ]
    raise ValueError(
        "The processes do not draw the same layers, and would wait for each other forever: "
        f"{'; '.join(said)}. Give all the same seed, layers and distribution, and count steps from "
        "the same checkpoint."
    )
