"""The contestants: how long they run, which layers a step updates, and by what."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm

MethodName = Literal[
    "muon",
    "muon_short",
    "optax_muon",
    "drop_muon_uniform",
    "drop_muon_epoch_shift",
    "drop_muon_time_aware",
    "drop_muon_half",
    "drop_muon_long",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
REFERENCE: MethodName = "muon"
CONTROL: MethodName = "muon_short"  # of everyone who is done before Muon
TITLES: dict[MethodName, str] = {
    "muon": "Muon",
    "muon_short": "Muon, shorter run",
    "optax_muon": "optax.contrib.muon",
    "drop_muon_uniform": "Drop-Muon, uniform",
    "drop_muon_epoch_shift": "Drop-Muon, epoch-shift",
    "drop_muon_time_aware": "Drop-Muon, time-aware",
    "drop_muon_half": "Drop-Muon, half of the steps full",
    "drop_muon_long": "Drop-Muon, longer run",
}
assert tuple(TITLES) == METHODS


class Method(NamedTuple):
    """A contestant at a learning rate and with a seed, both of which may be traced."""

    tx: optax.GradientTransformationExtraArgs
    sampler: dm.DepthSampler
    depth: Callable[[jax.Array, Any], int | jax.Array]
    """Of a step, by its number and the state before it: 0, a Python integer, of those that update
    every layer."""


def make_method(
    name: MethodName,
    layers: dm.Layers,
    *,
    learning_rate: Any,
    auxiliary_learning_rate: float,
    decay: float,
    alpha: float,
    num_steps: int,
    seed: Any,
    depth_costs: Callable[[], Sequence[float]],
) -> Method:
    """A contestant by name, whose learning rates fall linearly to 0 over `num_steps`."""

    def falling(first: Any) -> optax.Schedule:
        return lambda count: first * (1 - count / num_steps)

    rate, auxiliary_rate = falling(learning_rate), falling(auxiliary_learning_rate)
    if name == "optax_muon":
        tx = optax.contrib.muon(
            rate,
            beta=decay,
            nesterov=False,
            adam_learning_rate=auxiliary_rate,
            muon_weight_dimension_numbers=_dimension_numbers,
        )
        sampler = dm.DepthSampler(layers, dm.full_depth(), seed=seed)
        return Method(optax.with_extra_args_support(tx), sampler, lambda count, opt_state: 0)
    if name in ("muon", "muon_short"):
        distribution = dm.full_depth()
    elif name == "drop_muon_epoch_shift":
        distribution = dm.epoch_shift_depth(num_steps, alpha=alpha)
    elif name == "drop_muon_time_aware":
        distribution = dm.time_aware_depth(depth_costs())
    elif name == "drop_muon_half":
        full, rest = 0.5, 0.5 / layers.num_layers  # of every depth, the full one included
        distribution = dm.fixed_depth([full + rest] + [rest] * (layers.num_layers - 1))
    else:
        distribution = dm.uniform_depth()
    tx = dm.drop_muon(rate, layers, momentum=decay, auxiliary_learning_rate=auxiliary_rate)
    sampler = dm.DepthSampler(layers, distribution, seed=seed)
    if name == "drop_muon_time_aware":
        tx = dm.record_gains(tx, sampler)
    return Method(tx, sampler, sampler.sample if drops_layers(name) else lambda count, opt_state: 0)


def drops_layers(name: MethodName) -> bool:
    """Whether a method leaves some layers out."""
    return name.startswith("drop_")


def _dimension_numbers(params: optax.Params) -> Any:
    """For optax.contrib.muon: the matrices of Drop-Muon, (in, out), or a stack of them."""

    def of_leaf(leaf: Any, label: str) -> MuonDimensionNumbers | None:
        if label != "matrix":
            return None
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree.map(of_leaf, params, dm.matrix_labels(params))
