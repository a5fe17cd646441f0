"""What each figure shows, at each scale: data sets, methods, and the settings of their races."""

import dataclasses
from typing import Any

from images import DatasetName, Images, load_images
from paper_study.settings import FigureName, Scale, Settings
from settings import MethodName
from settings import Settings as RaceSettings
from tune import hold_out

_MUONS: tuple[MethodName, ...] = ("muon", "muon_short", "optax_muon")
_EVERYONE: tuple[MethodName, ...] = (
    "muon",
    "muon_short",
    "drop_muon_uniform",
    "drop_muon_epoch_shift",
    "drop_muon_time_aware",
    "optax_muon",
)
METHODS: dict[FigureName, tuple[MethodName, ...]] = {
    "uniform-mnist": ("muon", "drop_muon_uniform"),
    "epoch-shift-cifar10": ("muon", "drop_muon_epoch_shift"),
    "speed-up-mnist": _EVERYONE,
    "speed-up-fashion": _EVERYONE,
    "averaged-curves": ("muon", "drop_muon_uniform", "drop_muon_time_aware"),
}
DATASETS: dict[FigureName, tuple[DatasetName, ...]] = {
    "uniform-mnist": ("mnist",),
    "epoch-shift-cifar10": ("cifar10",),
    "speed-up-mnist": ("mnist",),
    "speed-up-fashion": ("fashion_mnist",),
    "averaged-curves": ("mnist", "fashion_mnist", "cifar10"),
}
SCALES: dict[Scale, dict[str, Any]] = {
    "paper": {
        "epochs": 50,
        "max_train": None,
        "channels": (64, 128, 256),
        "batch_size": 8192,
        "learning_rates": (0.1,),
    },
    "cores": {
        "epochs": 4,
        "max_train": 20_000,
        "channels": (16, 32, 64),
        "batch_size": 500,
        "learning_rates": (0.025, 0.05, 0.1),
    },
    "tiny": {
        "epochs": 3,
        "max_train": 3000,
        "channels": (4, 8, 8),
        "batch_size": 250,
        "learning_rates": (0.05,),
    },
}
_OF_THE_PAPER: dict[DatasetName, dict[str, Any]] = {
    "fashion_mnist": {"batch_size": 32768, "epochs": 200},
    "cifar10": {"channels": (128, 256, 512)},
}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A data set with the settings of its race."""

    race: RaceSettings
    learning_rates: tuple[float, ...]
    images: Images
    """With the whole test set."""
    tuning_images: Images
    """Held-out training images in the place of the test images."""


def datasets(settings: Settings) -> tuple[DatasetName, ...]:
    """The given ones, or the figure's."""
    if settings.datasets is not None:
        return settings.datasets
    return ("mnist5k",) if settings.scale == "tiny" else DATASETS[settings.figure]


def left_out(settings: Settings, used: list[str]) -> list[str]:
    """The figure's data sets that are not in it."""
    return [name for name in DATASETS[settings.figure] if name not in used]


def choose(settings: Settings) -> list[Chosen]:
    """The data sets of the figure, read.

    One of several that is not there is left out; the only one that is not there ends the program.
    """
    names = datasets(settings)
    chosen, complaints = [], []
    for name in names:
        try:
            chosen.append(_choose(settings, name))
        except SystemExit as complaint:
            if settings.datasets is not None or len(names) == 1:
                raise
            complaints.append(str(complaint))
    if not chosen:
        raise SystemExit("\n".join(complaints))
    return chosen


def _choose(settings: Settings, name: DatasetName) -> Chosen:
    preset = dict(SCALES[settings.scale])
    if settings.scale == "paper":
        preset |= _OF_THE_PAPER.get(name, {})
    for field in preset:
        given = getattr(settings, field)
        preset[field] = preset[field] if given is None else given
    rates = preset.pop("learning_rates")
    tunes = len(rates) > 1
    limit = preset["max_train"]
    if limit is not None and tunes:
        limit += settings.num_validation
    images = load_images(
        name, data_dir=settings.data_dir, download=settings.download, max_train=limit
    )
    tuning_images = hold_out(images, settings.num_validation) if tunes else images
    if tunes:  # the race is on what the tuning trained on, and on the whole test set
        train = tuning_images.train_images, tuning_images.train_labels
        images = Images(*train, images.test_images, images.test_labels)
    steps = preset["epochs"] * (len(images.train_labels) // preset["batch_size"])
    if not steps:
        raise SystemExit(
            f"--batch-size is {preset['batch_size']}, and {name} has only "
            f"{len(images.train_labels)} training images."
        )
    race = RaceSettings(
        output_dir=settings.output_dir,
        dataset=name,
        methods=settings.methods or METHODS[settings.figure],
        seeds=settings.seeds,
        bias_learning_rate=settings.bias_learning_rate,
        eval_every=max(1, steps // settings.num_evaluations),
        **preset,
    )
    return Chosen(race, rates, images, tuning_images)
