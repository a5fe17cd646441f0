"""The arguments of the study, and the sentences that refuse bad ones."""

import dataclasses
from pathlib import Path

from arguments import require, require_folder


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measure the rates of momentum and of variance reduction, and compare them with the theory."""

    output_dir: Path
    """Folder for convergence_rates.json and the plots."""
    horizon: int = 30_000
    """Steps of each run. The schedules know no horizon, so that one run has all shorter ones."""
    measure_every: int = 10
    """Steps between two measurements."""
    decades: float = 1.5
    """Slopes are fitted to the horizons of the last so many powers of ten."""
    num_seeds: int = 12
    """Runs of each method; confidence intervals are of a bootstrap over them."""
    seed: int = 0
    """Of the problems, of the noise and of the bootstrap."""
    radii: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """First radii t of the non-convex runs. All are reported; the table's is the best at the
    horizon in the middle of the fitted ones."""
    noise: float = 1.0
    """Deviation of every entry of the gradient's constant noise."""
    noise_slope: float = 0.3
    """That of the noise which moves with X, relative to `noise`: mean-square smoothness."""
    powers: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Those p of the star-convex functions Σ|y|^p / p: the higher, the flatter at the minimum."""
    mvr_decay: float = 0.9
    """Weight of the past in the momentum of MVR-2 and MVR-3, whose q follows a schedule."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that make no study."""
    for name in ("radii", "powers"):
        values = getattr(settings, name)
        require(len(values) > 0, name, "needs at least one value")
        require(len(set(values)) == len(values), name, f"names a value twice: {values}")
    require(min(settings.radii) > 0, "radii", f"must be positive, got {settings.radii}")
    require(min(settings.powers) >= 2, "powers", f"must be at least 2, got {settings.powers}")
    for name, least in (("measure_every", 1), ("num_seeds", 2)):
        value = getattr(settings, name)
        require(value >= least, name, f"must be at least {least}, got {value}")
    require(settings.decades > 0, "decades", f"must be positive, got {settings.decades}")
    require(settings.seed >= 0, "seed", f"must not be negative, got {settings.seed}")
    for name in ("noise", "noise_slope"):
        value = getattr(settings, name)
        require(value >= 0, name, f"must not be negative, got {value}")
    require(
        0 <= settings.mvr_decay < 1, "mvr_decay", f"must lie in [0, 1), got {settings.mvr_decay}"
    )
    least = 8 * settings.measure_every
    require(
        settings.horizon >= least,
        "horizon",
        f"must be at least 8 × --measure-every = {least}, got {settings.horizon}",
    )
    require_folder("output_dir", settings.output_dir)
