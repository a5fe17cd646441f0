"""A model of the time of a step on a pod: counted operations and bytes, none of it measured.

Every device takes the gradient of its own tokens, and parameters are sharded over all devices
(FSDP): gathered before the forward pass and before the backward pass, and gradients are summed and
scattered. Below the depth there is no backward pass. What moves meanwhile is hidden by operations,
or hides them; what the optimizer moves hides nothing. Attention scores, norms, the elementwise part
of optimizers and the latency of collectives are left out, and so is what links share.
"""

import dataclasses
import functools
import itertools
import statistics
from typing import Literal, NamedTuple, get_args

from jax.sharding import AbstractMesh

import dropmuon_jax as dm
from scale_study.networks import NETWORKS, Network
from scale_study.settings import NetworkName, Settings

Sharing = Literal["auto", "owner", "replicated", "optax"]
Optimizer = Literal["Muon", "Drop-Muon"]
BARS: tuple[tuple[Optimizer, Sharing, str], ...] = (
    ("Muon", "optax", "optax"),
    ("Muon", "replicated", "repl."),
    ("Muon", "owner", "owner"),
    ("Muon", "auto", "auto"),
    ("Drop-Muon", "auto", "auto"),
)
"""What tables and pictures show, by a short name."""
INNER_DEVICES = 8  # of the second axis of a mesh with more
NOTE = "model, not measured"
_ITEMSIZE = 4  # of the matrices that are orthogonalized


class Work(NamedTuple):
    """Of a device."""

    flops: float
    received: float
    """Bytes."""

    def seconds(self, settings: Settings) -> tuple[float, float]:
        """Of the operations, and of the bytes."""
        return self.flops / settings.device_flops, self.received / settings.link_bytes


@dataclasses.dataclass(frozen=True)
class ModelledStep:
    """The mean over depths of what a device does in a step; seconds are a model."""

    network: NetworkName
    devices: int
    optimizer: Optimizer
    sharing: Sharing
    """Of the optimizer's work: a layout, or as XLA shares out `optax.contrib.muon`."""
    gradient_flops: float
    gradient_bytes: float
    optimizer_flops: float
    optimizer_bytes: float
    gradient_seconds: float
    """The longer of its operations and its bytes, at each depth."""
    optimizer_compute_seconds: float
    optimizer_transfer_seconds: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        optimizer = self.optimizer_compute_seconds + self.optimizer_transfer_seconds
        return self.gradient_seconds + optimizer

    @property
    def optimizer_share(self) -> float:
        """Of the step's time."""
        return 1 - self.gradient_seconds / self.seconds

    @property
    def transfer_share(self) -> float:
        """Of the optimizer's time."""
        optimizer = self.optimizer_compute_seconds + self.optimizer_transfer_seconds
        return self.optimizer_transfer_seconds / optimizer


def modelled_cases(settings: Settings) -> list[tuple[NetworkName, int, Optimizer, Sharing]]:
    """Every network on every pod: Muon, and Drop-Muon but as optax, which has no layers to drop."""
    optimizers: tuple[Optimizer, ...] = get_args(Optimizer)
    return [
        case
        for case in itertools.product(
            settings.networks, settings.pod_devices, optimizers, get_args(Sharing)
        )
        if case[2:] != ("Drop-Muon", "optax")
    ]


def model_step(
    name: NetworkName, devices: int, optimizer: Optimizer, sharing: Sharing, settings: Settings
) -> ModelledStep:
    """Of Muon, or the mean of Drop-Muon over uniformly drawn depths."""
    network = NETWORKS[name]
    rows = []
    for depth in range(1 if optimizer == "Muon" else network.num_depths):
        gradient = gradient_work(network, depth, devices, settings)
        blocks = network.num_blocks - max(depth - 1, 0)
        work = optimizer_work(network, blocks, devices, sharing, settings)
        times = max(gradient.seconds(settings)), *work.seconds(settings)
        rows.append((*gradient, *work, *times))
    mean = (statistics.fmean(column) for column in zip(*rows, strict=True))
    return ModelledStep(name, devices, optimizer, sharing, *mean)


def gradient_work(network: Network, depth: int, devices: int, settings: Settings) -> Work:
    """Of forward and backward pass; depth 0 is the token table, 1 the first block.

    A token takes 2 operations for each parameter forward and 4 backward; of a frozen head 2, for
    the gradient of its input.
    """
    active = network.num_blocks - max(depth - 1, 0)
    blocks = network.block_size * (2 * network.num_blocks + 4 * active)
    head = network.table_size * (6 if depth == 0 else 4)
    # Forward all; backward the active blocks and the head; gradients of what is trained.
    gathered = network.num_parameters + active * network.block_size + network.table_size
    scattered = active * network.block_size + (network.table_size if depth == 0 else 0)
    size = settings.bytes_per_parameter * (gathered + scattered)
    return Work(settings.tokens_per_device * (blocks + head), size * (devices - 1) / devices)


def optimizer_work(
    network: Network, num_blocks: int, devices: int, sharing: Sharing, settings: Settings
) -> Work:
    """Of orthogonalizing the matrices of the last blocks."""
    if sharing == "optax":
        return _work_of_optax(network, num_blocks, devices, settings)
    flops_per_byte = settings.device_flops / settings.link_bytes
    steps = settings.num_steps[0]
    return _planned(network, num_blocks, devices, sharing, flops_per_byte, steps)


@functools.cache
def _planned(
    network: Network,
    num_blocks: int,
    devices: int,
    layout: str,
    flops_per_byte: float,
    num_steps: int,
) -> Work:
    params, layers = network.matrices()
    plan = dm.sharding.plan_layouts(
        params,
        pod(devices),
        layers=layers,
        layer_mask=layers.mask(network.num_blocks - num_blocks),
        layout=layout,
        flops_per_byte=flops_per_byte,
        orthogonalize=dm.orthogonalize.newton_schulz(num_steps=num_steps),
    )
    return Work(
        sum(of_shape.flops for of_shape in plan), sum(of_shape.bytes_received for of_shape in plan)
    )


def pod(devices: int) -> AbstractMesh:
    """A mesh of all devices, over both axes of which parameters are sharded."""
    if devices <= INNER_DEVICES:
        return AbstractMesh((devices,), ("fsdp",))
    return AbstractMesh((devices // INNER_DEVICES, INNER_DEVICES), ("outer", "inner"))


def _work_of_optax(network: Network, num_blocks: int, devices: int, settings: Settings) -> Work:
    each = [work_of_iteration(*shape, devices) for shape in network.shapes().values()]
    times = num_blocks * settings.num_steps[0]
    return Work(times * sum(w.flops for w in each), times * sum(w.received for w in each))


def work_of_iteration(fan_in: int, fan_out: int, devices: int) -> Work:
    """Of a step of the iteration X ← aX + (bA + cA²)X, A = XXᵀ, as XLA shares it out for optax.

    As counted with one axis that shards the longer side of X, which moves least: A is summed
    over all devices, and each has all of A². Of a square X the rows are sharded: X is gathered
    twice, for XXᵀ and for the product with A, and A once.
    """
    rows, cols = sorted((fan_in, fan_out))
    others = (devices - 1) / devices
    if rows == cols:
        return Work(6 * rows**3 / devices, 3 * rows**2 * _ITEMSIZE * others)
    return Work(2 * (2 * rows**2 * cols / devices + rows**3), 2 * rows**2 * _ITEMSIZE * others)
