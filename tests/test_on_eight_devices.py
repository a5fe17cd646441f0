"""Runs the tests of `eight_devices`, each file in a process of its own with eight CPU devices."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "eight_devices"
SECONDS = 300  # several times what each takes


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_on_eight_devices(path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        # Of the code for a processor only: what is counted in the program stays as it is.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # XLA may run the collectives of a program that it has read from a cache in another order on
        # each device, which then wait for each other.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Warnings of the partitioner about layouts that tests choose because they are bad.
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{path.name} took more than {SECONDS} s:\n{late.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr
