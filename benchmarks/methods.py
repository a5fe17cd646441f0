"""The optimizers that race, all made from the same settings, and the step that each one takes."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from optax.contrib import MuonDimensionNumbers

import dropmuon_jax as dm
from settings import MethodName, Settings, learning_rate

RADII = dm.optimizers.SCION_CNN_RADII  # the relative steps of hidden layers, head and biases


class Method(NamedTuple):
    """A contestant."""

    tx: Any
    reader: dm.sampling.PlanReader | None
    """Which draws the layers of each step, of one run; None if all layers are always trained."""
    num_steps: int
    """How long it runs."""
    init: Callable[[jax.Array, Any], Any] | None = None
    """Where it starts, from a key and everyone's initial parameters; None if with those."""
    two_gradients: bool = False
    """Whether a step takes the gradient at the previous parameters too."""

    @property
    def layers(self) -> dm.Layers | None:
        """Those of which it leaves some out; None if it never does."""
        return None if self.reader is None else self.reader.sampler.layers

    @property
    def num_depths(self) -> int:
        """How many different steps there are."""
        return 1 if self.layers is None else self.layers.num_layers

    def depth(self, step: int, opt_state: Any) -> int:
        """The shallowest layer that step trains, from the state before it."""
        return 0 if self.reader is None else self.reader.depth(step, opt_state)


def make_method(
    name: MethodName,
    settings: Settings,
    layers: dm.Layers,
    roles: Mapping[str, str],
    *,
    num_steps: int,
    seed: int,
    depth_costs: Callable[[], Sequence[float]],
) -> Method:
    """One contestant; every learning rate but Gluon's falls linearly to 0 over its run."""
    if name == "muon_short":
        num_steps = math.ceil(settings.short_run * num_steps)

    def falling(rate: float) -> optax.Schedule:
        return optax.linear_schedule(rate, 0.0, num_steps)

    first_rate = learning_rate(settings, name)
    rate, bias_rate = falling(first_rate), falling(settings.bias_learning_rate)
    two_gradients = name in ("muon_with_mvr", "drop_muon_with_mvr")
    make_momentum = dm.mvr_momentum if two_gradients else dm.momentum
    momentum = make_momentum(settings.decay)
    if name == "drop_muon_epoch_shift":
        distribution = dm.epoch_shift_depth(num_steps, alpha=settings.alpha)
    elif name == "drop_muon_time_aware":
        distribution = dm.time_aware_depth(depth_costs())
    else:
        distribution = dm.uniform_depth()
    sampler = dm.DepthSampler(layers, distribution, seed=seed)
    init = None
    match name:
        case "muon" | "muon_short" | "muon_with_mvr":
            tx = dm.muon(rate, momentum=momentum, auxiliary_learning_rate=bias_rate)
        case (
            "drop_muon_uniform"
            | "drop_muon_epoch_shift"
            | "drop_muon_time_aware"
            | "drop_muon_with_mvr"
        ):
            tx = dm.drop_muon(rate, layers, momentum=momentum, auxiliary_learning_rate=bias_rate)
            if name == "drop_muon_time_aware":
                tx = dm.record_gains(tx, sampler)
        case "optax_muon":
            tx = optax.contrib.muon(
                rate,
                beta=settings.decay,
                nesterov=False,
                adam_learning_rate=bias_rate,
                muon_weight_dimension_numbers=_dimension_numbers,
            )
        case "adamw":
            tx = optax.adamw(rate)
        case "scion":
            tx = dm.scion(rate, RADII, constrained=False, momentum=momentum, roles=roles)
        case "scion_constrained":
            tx = dm.scion(rate, RADII, momentum=momentum, roles=roles)
            init = functools.partial(dm.optimizers.scion_init, radii=RADII, roles=roles)
        case "gluon":
            tx = dm.gluon(dm.schedules.gluon_radius(first_rate), RADII, roles=roles)
        case "drop_scion":
            tx = dm.drop_scion(
                rate, layers, RADII, constrained=False, momentum=momentum, roles=roles
            )
        case "drop_gluon":
            tx = dm.drop_gluon(dm.schedules.gluon_radius(first_rate), layers, RADII, roles=roles)
    reader = dm.sampling.PlanReader(sampler) if name.startswith("drop_") else None
    return Method(tx, reader, num_steps, init, two_gradients)


def _dimension_numbers(params: optax.Params) -> Any:
    """For optax.contrib.muon: kernels are matrices with the last axis as fan-out."""

    def of_leaf(leaf: Any) -> MuonDimensionNumbers | None:
        if leaf.ndim < 2:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(of_leaf, params)


def cross_entropy(model: nn.Module, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean loss of a batch of inputs and labels."""
    inputs, labels = batch
    logits: Any = model.apply({"params": params}, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(model: nn.Module, method: Method, depth: int) -> Callable[..., Any]:
    """The training step at one depth, to be compiled; its batch is gathered on the device.

    Returns:
        A function of params, opt_state, all images, all labels, the rows of every batch of the
        race and the index of the step; it returns params and opt_state.
    """

    def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return cross_entropy(model, params, batch)

    def step(params, opt_state, images, labels, batches, index):
        rows = batches[index]
        batch = images[rows], labels[rows]
        mask = None if method.layers is None else method.layers.mask(depth)
        extra_args = {} if mask is None else {"layer_mask": mask}
        if method.two_gradients:
            prev_params = dm.prev_params(opt_state, params)
            _, (grads, extra_args["prev_params_grads"]) = dm.masked_value_and_grad_pair(loss_fn)(
                params, prev_params, batch, layer_mask=mask
            )
        elif mask is None:
            grads = jax.grad(loss_fn)(params, batch)
        else:
            _, grads = dm.masked_value_and_grad(loss_fn)(params, batch, layer_mask=mask)
        updates, opt_state = method.tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    return step
