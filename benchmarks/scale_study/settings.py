"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from arguments import require, require_folder

Arrangement = Literal["fsdp", "fsdp_tensor", "stacked", "stack_axis"]
ARRANGEMENTS: tuple[Arrangement, ...] = get_args(Arrangement)
Method = Literal["set_mesh", "on_mesh", "owner", "optax"]
METHODS: tuple[Method, ...] = get_args(Method)
NetworkName = Literal["124M", "350M", "1.3B", "7B"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Count what a step on a mesh moves, and model the time of a step on a pod."""

    output_dir: Path
    """Folder for scale.json and scale.png."""
    devices: int = 8
    """Devices that this computer's processor stands for: a power of two."""
    arrangements: tuple[Arrangement, ...] = ARRANGEMENTS
    """How the matrices are sharded: leaves of their own over one axis (fsdp) or two (fsdp_tensor, a
    mesh of devices/2 × 2, every other one transposed), or rows of stacks, which are sharded inside
    each row (stacked) or by rows (stack_axis)."""
    methods: tuple[Method, ...] = METHODS
    """Drop-Muon with `jax.set_mesh` alone, with `on_mesh(shardings)`, with its layout "owner", and
    `optax.contrib.muon`."""
    rows: int = 128
    """Shorter side of the matrices; those of fsdp_tensor are square."""
    cols: int = 256
    """Longer side of the matrices; further shapes are longer."""
    matrices: tuple[int, ...] = (1, 2, 4, 8, 12, 24, 48)
    """Numbers of matrices; stack_axis has only those that the devices divide."""
    shapes: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of shapes, each with as many matrices as there are devices."""
    num_steps: tuple[int, ...] = (5, 8, 12)
    """Steps of the Newton-Schulz iteration; the first is that of everything else."""
    layers: int = 16
    """Matrices where steps and depths are compared, one a layer."""
    pod_devices: tuple[int, ...] = (8, 64, 512)
    """Devices of the modelled pods: powers of two."""
    networks: tuple[NetworkName, ...] = NETWORKS
    """Modelled networks."""
    tokens_per_device: int = 8192
    """Tokens of which each device of a pod takes the gradient in a step."""
    device_flops: float = 2e14
    """Modelled operations of a device in a second."""
    link_bytes: float = 2e11
    """Modelled bytes that a device receives in a second."""
    bytes_per_parameter: int = 2
    """Modelled size of parameters and gradients on their way; matrices to orthogonalize have 4."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in (
        *("arrangements", "methods", "matrices", "shapes", "num_steps"),
        *("pod_devices", "networks"),
    ):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    for name in ("devices", "pod_devices"):
        given = getattr(settings, name)
        for value in (given,) if isinstance(given, int) else given:
            is_power = value >= 2 and value & (value - 1) == 0
            require(is_power, name, f"must be a power of two, at least 2, got {value}")
    for name in ("matrices", "shapes", "num_steps"):
        values = getattr(settings, name)
        require(min(values) >= 1, name, f"must be at least 1, got {values}")
    for name in ("rows", "cols"):
        value = getattr(settings, name)
        fits = value >= 1 and value % settings.devices == 0
        complaint = f"must be a multiple of the {settings.devices} devices, got {value}"
        require(fits, name, complaint)
    require(settings.cols >= settings.rows, "cols", f"must be at least {settings.rows} rows")
    for name in ("layers", "tokens_per_device", "bytes_per_parameter"):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    for name in ("device_flops", "link_bytes"):
        value = getattr(settings, name)
        require(0 < value < float("inf"), name, f"must be positive and finite, got {value}")
    has_any = settings.arrangements != ("stack_axis",) or any(
        number % settings.devices == 0 for number in settings.matrices
    )
    require(has_any, "matrices", f"of stack_axis must be divisible by {settings.devices} devices")
    require_folder("output_dir", settings.output_dir)
