"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path

from arguments import require, require_folder
from momentum_study.methods import METHODS, REFERENCE, MethodName


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train a transformer on text with momentum and with variance reduction of it."""

    output_dir: Path
    """Folder for momentum.json and the plots."""
    methods: tuple[MethodName, ...] = METHODS
    """Who takes part; ema must, as all others are compared with it."""
    batch_sizes: tuple[int, ...] = (8, 64)
    """Windows of text in a batch; everything is done with each size."""
    num_steps: int = 200
    """Of ema, and of every method but ema_twice_the_steps."""
    learning_rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
    """Of the matrices, ascending: every method is tuned on all of them. They fall linearly to 0."""
    auxiliary_learning_rate: float = 0.003
    """Of Adam on everything that is no matrix, the same for all; falls linearly to 0."""
    decay: float = 0.9
    """Weight of the past in EMA and MVR; MARS has its published one."""
    q: float = 0.5
    """Weight of the new gradient in the estimator of MVR-2 and MVR-3."""
    tuning_seed: int = 100
    """Initial parameters and batches of the runs that choose the learning rates."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Those of the runs that are reported."""
    eval_every: int = 20
    """Steps of ema between two evaluations."""
    num_eval_windows: int = 128
    """Windows of text in an evaluation, of the validation block and as many of the test block."""
    context: int = 32
    """Characters that a window predicts."""
    width: int = 64
    """Of the transformer."""
    num_heads: int = 4
    """Of each attention."""
    num_blocks: int = 2
    """An attention and a feed-forward network each; with 0 there is the embedding and the head."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in ("methods", "batch_sizes", "learning_rates", "seeds"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    require(
        REFERENCE in settings.methods,
        "methods",
        f"must name {REFERENCE}, with which the others are compared, got {settings.methods}",
    )
    for name in (
        *("num_steps", "eval_every", "num_eval_windows"),
        *("context", "width", "num_heads", "batch_sizes"),
    ):
        values = getattr(settings, name)
        smallest = values if isinstance(values, int) else min(values)
        require(smallest >= 1, name, f"must be at least 1, got {values}")
    blocks = settings.num_blocks
    require(blocks >= 0, "num_blocks", f"must not be negative, got {blocks}")
    require(
        settings.eval_every <= settings.num_steps,
        "eval_every",
        f"is {settings.eval_every}, and there are only {settings.num_steps} steps",
    )
    require(
        settings.width % settings.num_heads == 0,
        "num_heads",
        f"must divide the width {settings.width}, got {settings.num_heads}",
    )
    rates = settings.learning_rates
    require(min(rates) > 0, "learning_rates", f"must be positive, got {rates}")
    require(list(rates) == sorted(rates), "learning_rates", f"must ascend, got {rates}")
    rate = settings.auxiliary_learning_rate
    require(rate > 0, "auxiliary_learning_rate", f"must be positive, got {rate}")
    require(0 <= settings.decay < 1, "decay", f"must lie in [0, 1), got {settings.decay}")
    require(0 < settings.q <= 1, "q", f"must lie in (0, 1], got {settings.q}")
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
