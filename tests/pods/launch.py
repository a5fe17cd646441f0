"""Starts the processes of pods, waits a bounded time, and leaves none behind."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

TIME_LIMIT = 240.0  # seconds for all processes; they take about a tenth
_TESTS = Path(__file__).parents[1]
_ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent)]),
    # As the tests compile, but for how many devices they pretend to have.
    "XLA_FLAGS": " ".join(
        flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag
    ),
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA warns of shardings that only so small a network has
    # So that another order of sums does not show, and anything else does.
    "JAX_ENABLE_X64": "1",
    # Collectives of programs that are read from a cache may wait for each other forever.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


class Pod(NamedTuple):
    """Processes that train together, as the module does."""

    axes: dict[str, int]
    """Of the mesh over all their devices."""
    saved: Path
    """The folder to save in on the way, or to start from."""
    resumes: bool = False
    num_processes: int = 1
    module: str = "process"


def run_pods(*pods: Pod) -> list[list[dict[str, Any]]]:
    """Of each pod, of each process, what it answers. The pods run at the same time.

    Raises:
        AssertionError: If a process fails or takes too long, with what all of them said.
    """
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as scope:
        files = [_start(pod, scope, started) for pod in pods]
        codes = _wait(started)
    if any(code != 0 for code in codes):
        said = [f"--- {out.name}:\n{out.with_suffix('.err').read_text()}" for out in chain(*files)]
        raise AssertionError("\n".join([f"They ended with {codes}, not all well.", *said]))
    return [[json.loads(out.read_text().splitlines()[-1]) for out in of_pod] for of_pod in files]


def _start(pod: Pod, scope: contextlib.ExitStack, started: list[Any]) -> list[Path]:
    """Starts the processes of a pod, which end with the scope; the files of their answers."""
    # Holds a port, so that nobody else gets it before the coordinator binds it.
    port = scope.enter_context(socket.socket())
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port.bind(("127.0.0.1", 0))
    settings = {name: value for name, value in pod._asdict().items() if name != "module"}
    settings |= {"saved": str(pod.saved), "time_limit": TIME_LIMIT}
    settings["address"] = f"127.0.0.1:{port.getsockname()[1]}"
    devices = math.prod(pod.axes.values()) // pod.num_processes
    files = []
    for number in range(pod.num_processes):
        settings["number"] = number
        files.append(
            pod.saved.with_name(f"process {len(started)} of those of {pod.saved.name}.out")
        )
        # Files, because a full pipe would stop one process while another is waited for.
        with files[-1].open("wb") as out, files[-1].with_suffix(".err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", f"pods.{pod.module}", json.dumps(settings)],
                stdout=out,
                stderr=err,
                env=_ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)},
            )
        started.append(process)
        scope.callback(process.wait)
        scope.callback(process.kill)
    return files


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit statuses, None for what still runs when time is up or another process has failed.

    The others would wait for it, in a collective or at the end.
    """
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    return [process.poll() for process in processes]
