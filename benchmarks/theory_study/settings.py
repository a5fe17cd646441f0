"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path

from arguments import require, require_folder


@dataclasses.dataclass(frozen=True)
class Settings:
    """Check the bounds and the optimal distributions of the theory, and race what they predict."""

    output_dir: Path
    """Folder for theory.json and theory.png."""
    seed: int = 0
    """Of random problems, draws and searches."""
    bound_steps: int = 30
    """Steps of each run whose bounds are checked."""
    bound_runs: int = 64
    """Runs that an expectation is the mean of."""
    problems: int = 1000
    """Random problems in which the best distribution is searched for."""
    candidates: int = 2000
    """Random distributions a search tries, beside small moves away from full steps."""
    race_layers: int = 6
    """Layers of a problem that is raced."""
    race_ratio: float = 32.0
    """The largest smoothness of a layer over the smallest, where they differ."""
    race_runs: int = 16
    """Runs of each distribution in each race."""
    race_steps: int = 4000
    """After so many steps a run gives up."""
    tolerance: float = 0.1
    """The gradient that ends a race, in that of the start."""
    channels: tuple[int, ...] = (8, 16, 32)
    """Output channels of each convolution of the network."""
    max_train: int = 1000
    """Training images."""
    batch_size: int = 200
    """Images of a step."""
    num_steps: int = 40
    """Steps of Muon along which the smoothness of the network is measured."""
    learning_rate: float = 0.05
    """Of these steps; falls linearly to 0."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in ("bound_steps", "bound_runs", "problems", "candidates", "race_runs", "race_steps"):
        value = getattr(settings, name)
        require(value >= 1, name, f"must be at least 1, got {value}")
    for name, minimum in (("race_layers", 2), ("num_steps", 3), ("seed", 0), ("batch_size", 1)):
        value = getattr(settings, name)
        require(value >= minimum, name, f"must be at least {minimum}, got {value}")
    require(settings.race_ratio > 1, "race_ratio", f"must exceed 1, got {settings.race_ratio}")
    inside = 0 < settings.tolerance < 1
    require(inside, "tolerance", f"must lie in (0, 1), got {settings.tolerance}")
    positive = settings.learning_rate > 0
    require(positive, "learning_rate", f"must be positive, got {settings.learning_rate}")
    channels = settings.channels
    require(len(channels) > 0, "channels", "needs at least one value")
    require(min(channels) >= 1, "channels", f"must be positive, got {channels}")
    enough = settings.batch_size <= settings.max_train
    require(enough, "batch_size", f"exceeds the {settings.max_train} training images")
    require_folder("output_dir", settings.output_dir)
