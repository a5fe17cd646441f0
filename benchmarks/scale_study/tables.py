"""Which steps are counted, for which question."""

import itertools
from typing import Literal

from scale_study.arrangements import is_possible
from scale_study.programs import LAYOUTS, Case
from scale_study.settings import Settings

Question = Literal["matrices", "shapes", "num_steps", "depth", "alone"]
"""By number of matrices, of shapes, of steps of the iteration, by depth; and networks that have no
other layers than those active at a depth."""


def cases(settings: Settings) -> dict[Question, list[Case]]:
    """The steps for each question."""
    layers, steps = settings.layers, settings.num_steps[0]
    found: dict[Question, list[Case]] = {}
    pairs = list(itertools.product(settings.arrangements, settings.methods))
    found["matrices"] = [
        Case(arrangement, method, number, 1, steps)
        for (arrangement, method), number in itertools.product(pairs, settings.matrices)
        if is_possible(arrangement, number, settings)
    ]
    found["shapes"] = [
        Case(*pair, settings.devices, number, steps) for pair in pairs for number in settings.shapes
    ]
    pairs = [pair for pair in pairs if is_possible(pair[0], layers, settings)]
    found["num_steps"] = [
        Case(*pair, layers, 1, number) for pair in pairs for number in settings.num_steps
    ]
    found["depth"] = [
        Case(*pair, layers, 1, steps, depth, is_traced)
        for pair in pairs
        for is_traced in (False, True)
        if not is_traced or (pair[0] == "stacked" and pair[1] != "optax")
        # A traced depth is any, and optax has none.
        for depth in ([0] if is_traced or pair[1] == "optax" else depths(settings))
    ]
    found["alone"] = [
        Case(*pair, layers - depth, 1, steps)
        for pair in pairs
        for depth in depths(settings)
        if pair[1] in LAYOUTS and is_possible(pair[0], layers - depth, settings)
    ]
    return found


def depths(settings: Settings) -> list[int]:
    """Quarters of the network, and its last layer."""
    layers = settings.layers
    return sorted({layers * quarter // 4 for quarter in range(4)} | {layers - 1})


def compared(settings: Settings) -> list[Case]:
    """The steps that also run on one device."""
    return [
        Case(arrangement, method, settings.layers, 1, settings.num_steps[0], depth)
        for arrangement, method in itertools.product(settings.arrangements, settings.methods)
        if is_possible(arrangement, settings.layers, settings)
        for depth in ([0] if method == "optax" else sorted({0, settings.layers // 2}))
    ]
