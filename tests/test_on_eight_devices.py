"""Runs the tests of `eight_devices` in processes of their own with eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "eight_devices"
FILES = sorted(FOLDER.glob("test_*.py"))
SECONDS = 300  # several times what each takes
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    # XLA may run the collectives of a program that it has read from a cache in another order on
    # each device, which then wait for each other.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    # Warnings of the partitioner about layouts that tests choose because they are bad.
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def run_pytest(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        run = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{arguments} took more than {SECONDS} s:\n{late.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_core_on_eight_devices():
    run_pytest("-m", "not deep", str(FOLDER))


@pytest.mark.deep
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_depth_on_eight_devices(path):
    run_pytest("-m", "deep", str(path))
