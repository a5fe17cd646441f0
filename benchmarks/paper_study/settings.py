"""The arguments of the paper's figures, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from arguments import require, require_folder
from images import DatasetName
from settings import MethodName

FigureName = Literal[
    "uniform-mnist",
    "epoch-shift-cifar10",
    "speed-up-mnist",
    "speed-up-fashion",
    "averaged-curves",
    "sampling",
]
Scale = Literal["paper", "cores", "tiny"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Make a figure of the Drop-Muon paper: who reaches which accuracy when."""

    figure: Annotated[FigureName, tyro.conf.Positional]
    """Accuracy against time for uniform depths on MNIST and epoch-shift on CIFAR-10; the averaged
    speed-up to parts of Muon's accuracy on MNIST and Fashion-MNIST; curves averaged over data sets,
    in parts of Muon's time; the distribution of depths over epochs (which trains nothing)."""
    output_dir: Path
    """Folder for the figure's JSON and PNG, and for finished runs."""
    scale: Scale = "cores"
    """"paper": batch 8192 (Fashion-MNIST 32768), channels 64-128-256 (CIFAR-10 128-256-512), rate
    0.1, all images, as its captions say; 50 epochs (Fashion-MNIST 200, of a step each), which they
    do not say. "cores": channels 16-32-64, batch 500, 4 epochs of 20,000 images, three rates.
    "tiny": MNIST's 5,000 digits that need no download, in a few minutes."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps prepared data; by default where it says itself."""
    download: bool = False
    """Download and prepare a data set that is not there."""
    datasets: tuple[DatasetName, ...] | None = None
    """By default the figure's."""
    methods: tuple[MethodName, ...] | None = None
    """Who takes part; by default the figure's. muon must, with whom all are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One race each: initial parameters, batches and depths all follow from the seed."""
    epochs: int | None = None
    """By default the scale's, as are the next."""
    max_train: int | None = None
    """Training images, those that are held out for tuning not counted."""
    channels: tuple[int, ...] | None = None
    """Output channels of each convolution."""
    batch_size: int | None = None
    """Images a step."""
    learning_rates: tuple[float, ...] | None = None
    """Ascending. If there are several, every method is tuned on all of them."""
    bias_learning_rate: float = 0.01
    """Of Adam on the biases, the same for all."""
    tuning_seed: int = 100
    """Of the runs that choose the learning rates."""
    num_validation: int = 4000
    """Held-out training images that choose them."""
    parts: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0)
    """Targets: the accuracies that Muon has reached after these parts of its run."""
    targets: tuple[float, ...] = ()
    """Further targets: accuracies, as fractions of all images."""
    num_evaluations: int = 20
    """Of each run, after equal numbers of steps."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    """Of the epoch-shift distributions that "sampling" shows."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no figure."""
    for name in ("datasets", "methods", "seeds", "channels", "learning_rates", "parts", "alphas"):
        values = getattr(settings, name)
        require(values is None or len(values) > 0, name, "needs at least one value")
        if name != "channels" and values is not None:
            require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    for name in ("epochs", "max_train", "batch_size", "num_validation", "num_evaluations"):
        value = getattr(settings, name)
        require(value is None or value >= 1, name, f"must be at least 1, got {value}")
    for name in ("learning_rates", "channels", "bias_learning_rate"):
        values = getattr(settings, name)
        smallest = min(values) if isinstance(values, tuple) else values
        require(smallest is None or smallest > 0, name, f"must be positive, got {values}")
    rates = settings.learning_rates
    require(rates is None or list(rates) == sorted(rates), "learning_rates", "must ascend")
    for name in ("parts", "targets"):
        for value in getattr(settings, name):
            require(0 < value <= 1, name, f"must lie in (0, 1], got {value}")
    require(min(settings.alphas) >= 0, "alphas", f"must not be negative, got {settings.alphas}")
    for name in ("tuning_seed", "seeds"):
        values = getattr(settings, name)
        smallest = values if isinstance(values, int) else min(values)
        require(smallest >= 0, name, f"must not be negative, got {values}")
    require(
        settings.tuning_seed not in settings.seeds,
        "tuning_seed",
        f"is {settings.tuning_seed}, one of the seeds that race",
    )
    methods = settings.methods
    require(
        methods is None or "muon" in methods,
        "methods",
        f"must name muon, with which the others are compared, got {methods}",
    )
    require_folder("output_dir", settings.output_dir)
