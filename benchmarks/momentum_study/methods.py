"""The contestants: what their momentum is, and what they spend gradients on."""

import dataclasses
from typing import Any, Literal, get_args

import optax

import dropmuon_jax as dm

MethodName = Literal[
    "ema", "mvr1", "mvr2", "mvr3", "mars", "ema_twice_the_steps", "ema_twice_the_batch"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
REFERENCE: MethodName = "ema"
MVR: tuple[MethodName, ...] = ("mvr1", "mvr2", "mvr3")
# The gradients of MVR, spent on EMA.
CONTROLS: tuple[MethodName, ...] = ("ema_twice_the_steps", "ema_twice_the_batch")
TITLES: dict[MethodName, str] = {
    "ema": "EMA",
    "mvr1": "MVR-1",
    "mvr2": "MVR-2",
    "mvr3": "MVR-3",
    "mars": "MARS",
    "ema_twice_the_steps": "EMA, twice the steps",
    "ema_twice_the_batch": "EMA, twice the batch",
}
assert tuple(TITLES) == METHODS


@dataclasses.dataclass(frozen=True)
class Spending:
    """Where the gradients of a method go; the product is what it spends, in runs of EMA."""

    steps: int = 1
    """Steps of the method in the place of one of EMA."""
    batches: int = 1
    """Batches that are joined into that of one step."""
    points: int = 1
    """Parameters at which the gradient of the batch is taken."""

    @property
    def evaluations_per_step(self) -> int:
        """Gradients of one batch of the common size in each step."""
        return self.batches * self.points


def spending(method: MethodName) -> Spending:
    """Of a method by name."""
    return Spending(
        steps=2 if method == "ema_twice_the_steps" else 1,
        batches=2 if method == "ema_twice_the_batch" else 1,
        points=2 if method in MVR else 1,
    )


def make_momentum(method: MethodName, *, decay: float, q: float) -> optax.GradientTransformation:
    """What becomes of the gradients of the matrices."""
    if method == "mars":
        return dm.transforms.mars_momentum(
            decay=0.95
        )  # with its γ and its norm, the published ones
    if method == "mvr1":
        return dm.mvr_momentum(decay, variant=1)
    if method == "mvr2":
        return dm.mvr_momentum(decay, variant=2, q=q)
    if method == "mvr3":
        return dm.mvr_momentum(decay, variant=3, q=q)
    return dm.momentum(decay)


def make_optimizer(
    momentum: optax.GradientTransformation,
    *,
    learning_rate: Any,
    auxiliary_learning_rate: float,
    num_steps: int,
) -> optax.GradientTransformationExtraArgs:
    """Muon with a momentum, whose learning rates fall linearly to 0.

    `learning_rate` may be traced: it is a number in the compiled step, not another program.
    """

    def falling(first: Any) -> optax.Schedule:
        return lambda count: first * (1 - count / num_steps)

    return dm.muon(
        falling(learning_rate),
        momentum=momentum,
        auxiliary_learning_rate=falling(auxiliary_learning_rate),
    )
