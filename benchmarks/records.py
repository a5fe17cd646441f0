"""Records that benchmarks leave, as JSON: how they were made, without names of machines."""

import datetime
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("dropmuon-jax", "jax", "jaxlib", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """A record that goes into the JSON of every benchmark."""
    changes = _git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "jax_platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def rounded(values: Any, digits: int = 5) -> Any:
    """Numbers in lists of lists, to so many digits: records are read by people, too."""
    if isinstance(values, list | tuple):
        return [rounded(value, digits) for value in values]
    if isinstance(values, np.ndarray):
        return rounded(values.tolist(), digits)
    return float(f"{values:.{digits}g}")


def to_json(tree: Any) -> str:
    """JSON proper: what is not finite becomes null (never reached, or diverged)."""
    return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON proper; a program that is ended meanwhile leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(to_json(tree), encoding="utf-8")
    unfinished.rename(path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` has written, with None where a number was not finite."""
    return json.loads(path.read_text(encoding="utf-8"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command, None where there is no repository or no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree
