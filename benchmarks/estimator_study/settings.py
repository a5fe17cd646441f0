"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from arguments import require, require_folder

ProblemName = Literal["quadratic", "logistic"]
PROBLEMS: tuple[ProblemName, ...] = get_args(ProblemName)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure how far momentum, MVR and MARS are from the full gradient, also of dropped layers."""

    output_dir: Path
    """Folder for estimator_error.json and the plots."""
    problems: tuple[ProblemName, ...] = PROBLEMS
    """Those in which all layers are active."""
    num_samples: int = 2000
    """Samples of each problem, of which the full gradient is the mean."""
    batch_size: int = 8
    """Samples of a minibatch, drawn with replacement."""
    num_steps: int = 500
    """Of every run; means are over the second half."""
    radii: tuple[float, ...] = (0.001, 0.01, 0.1)
    """Spectral norm of each step: little, middling and much movement."""
    decays: tuple[float, ...] = (0.9, 0.98)
    """Weight of the past, the same in every momentum."""
    num_seeds: int = 8
    """Runs of each configuration, with other minibatches of the same problem."""
    seed: int = 0
    """Of the problems and of everything drawn."""
    layer_steps: int = 400
    """Of every run with dropped layers; means are over the second half."""
    layer_radii: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Frobenius norm of each layer's step."""
    layer_noises: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Of the samples' curvatures and offsets, against a curvature of at most 1."""
    couplings: tuple[float, ...] = (0.3, 1.0)
    """What the blocks of the curvature between layers are multiplied by, in [0, 1]."""
    layer_decays: tuple[float, ...] = (0.9, 0.97)
    """Weight of the past with dropped layers."""
    layer_seeds: int = 4
    """Runs of each configuration with dropped layers: other samples and other depths."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    grids = ("radii", "layer_radii", "layer_noises")
    decays = ("decays", "layer_decays")
    for name in ("problems", *grids, *decays, "couplings"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    for name in ("num_samples", "batch_size", "num_seeds", "layer_seeds"):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    for name in ("num_steps", "layer_steps"):
        value = getattr(settings, name)
        require(value >= 2, name, f"must be at least 2, got {value}")
    for name in grids:
        values = getattr(settings, name)
        require(min(values) > 0, name, f"must be positive, got {values}")
    for name in decays:
        values = getattr(settings, name)
        require(0 <= min(values) <= max(values) < 1, name, f"must lie in [0, 1), got {values}")
    couplings = settings.couplings
    require(
        0 <= min(couplings) <= max(couplings) <= 1,
        "couplings",
        f"must lie in [0, 1], got {couplings}",
    )
    require(settings.seed >= 0, "seed", f"must not be negative, got {settings.seed}")
    require_folder("output_dir", settings.output_dir)
