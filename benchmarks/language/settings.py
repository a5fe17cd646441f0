"""The arguments of the race on text, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path

from arguments import require, require_folder
from language.methods import METHODS, REFERENCE, MethodName


@dataclasses.dataclass(frozen=True)
class Settings:
    """Race Drop-Muon against Muon on text: a GPT whose blocks are stacked and scanned."""

    output_dir: Path
    """Folder for language_race.json and the plots."""
    methods: tuple[MethodName, ...] = METHODS
    """Who takes part; muon must, as all others are compared with it."""
    num_steps: int = 240
    """Of muon; a multiple of eval_every."""
    short_run: float = 0.6
    """Length of muon_short's run, in muon's. The Drop-Muons of as many steps as Muon end early on
    the clock, and with them their learning rates; muon_short is Muon with the same advantage."""
    long_run: float = 1.6
    """Length of drop_muon_long's run, in muon's: such that it takes about as many seconds."""
    learning_rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
    """Of the matrices, ascending: every method is tuned on all of them. They fall linearly to 0
    over the method's own run."""
    auxiliary_learning_rate: float = 0.003
    """Of Adam on everything that is no matrix, the same for all; falls linearly to 0."""
    decay: float = 0.9
    """Weight of the past in the momentum of every method."""
    alpha: float = 0.5
    """How far the epoch-shift distribution leans to the shallow layers first and the deep last."""
    tuning_seed: int = 100
    """Initial parameters, batches and depths of the runs that choose the learning rates."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Those of the runs that are reported."""
    targets: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0)
    """The validation losses to reach: those of Muon after these parts of its run."""
    eval_every: int = 20
    """Steps of muon between two evaluations. Every method has as many evaluations as Muon, in a
    longer run with more steps between them."""
    num_eval_windows: int = 64
    """Windows of text in an evaluation, of the validation block and as many of the test block."""
    batch_size: int = 16
    """Windows of text in a step."""
    context: int = 64
    """Characters that a window predicts."""
    width: int = 96
    """Of the GPT."""
    num_heads: int = 4
    """Of each attention."""
    num_blocks: int = 8
    """An attention and a feed-forward network each, in one stack."""
    tied: bool = False
    """Whether the token table is the head too."""


def count_seeds(settings: Settings) -> str:
    """In words, for titles."""
    return "one seed" if len(settings.seeds) == 1 else f"{len(settings.seeds)} seeds"


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no race."""
    for name in ("methods", "learning_rates", "seeds", "targets"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    require(
        REFERENCE in settings.methods,
        "methods",
        f"must name {REFERENCE}, with which the others are compared, got {settings.methods}",
    )
    for name in (
        *("num_steps", "eval_every", "num_eval_windows", "batch_size"),
        *("context", "width", "num_heads", "num_blocks"),
    ):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    require(
        settings.num_steps % settings.eval_every == 0,
        "eval_every",
        f"is {settings.eval_every}, and must divide num_steps, {settings.num_steps}",
    )
    require(
        settings.width % settings.num_heads == 0,
        "num_heads",
        f"must divide the width {settings.width}, got {settings.num_heads}",
    )
    rates = settings.learning_rates
    require(min(rates) > 0, "learning_rates", f"must be positive, got {rates}")
    require(list(rates) == sorted(rates), "learning_rates", f"must ascend, got {rates}")
    for name in ("auxiliary_learning_rate", "short_run", "long_run"):
        value = getattr(settings, name)
        require(value > 0, name, f"must be positive, got {value}")
    require(0 <= settings.decay < 1, "decay", f"must lie in [0, 1), got {settings.decay}")
    require(settings.alpha >= 0, "alpha", f"must not be negative, got {settings.alpha}")
    for target in settings.targets:
        require(0 < target <= 1, "targets", f"must lie in (0, 1], got {target}")
    for name in ("tuning_seed", "seeds"):
        values = getattr(settings, name)
        smallest = values if isinstance(values, int) else min(values)
        require(smallest >= 0, name, f"must not be negative, got {values}")
    require(
        settings.tuning_seed not in settings.seeds,
        "tuning_seed",
        f"is {settings.tuning_seed}, one of the seeds that are reported",
    )
    require_folder("output_dir", settings.output_dir)
