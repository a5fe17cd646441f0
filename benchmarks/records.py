"""Records that benchmarks leave, as JSON and PNG: how they were made, without names of machines."""

import dataclasses
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
from matplotlib.figure import Figure

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


def to_json(tree: Any) -> str:
    """JSON proper: what is not finite becomes null (never reached, or diverged)."""
    return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def save_study(benchmark: str, settings: Any, results: dict[str, Any], figure: Figure) -> str:
    """Writes a study as JSON and PNG, under its name.

    Args:
        benchmark: The name.
        settings: A dataclass, whose `output_dir` is where they go.
        results: What is recorded beside arguments and environment.
        figure: The picture.

    Returns:
        A sentence that says where they are.
    """
    arguments = dataclasses.asdict(settings)
    folder = arguments.pop("output_dir")  # of the machine, not of the measurement
    record = {"benchmark": benchmark, "arguments": arguments, "environment": environment()}
    (folder / f"{benchmark}.json").write_text(to_json(record | results), encoding="utf-8")
    figure.savefig(folder / f"{benchmark}.png", dpi=150)
    return f"Written to {folder}: {benchmark}.json, {benchmark}.png"


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
