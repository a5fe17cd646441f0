"""Starts the processes of pods, waits a bounded time, and leaves none behind."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

TIME_LIMIT = 240.0  # seconds for all processes; they take about a tenth
_PATIENCE = 3.0  # seconds in which the others may say why they failed too
_TESTS = Path(__file__).parents[1]
_IMPORTED_FROM = (_TESTS, _TESTS.parent / "benchmarks", _TESTS.parent)


class Pod(NamedTuple):
    """Processes that belong together, and what they do."""

    num_processes: int
    num_devices: int
    """Of each process."""
    directory: Path
    """For what the processes write."""
    jobs: list[dict[str, Any]]
    """As run.py describes them."""

    def answer(self, process: int) -> Path:
        """The file of its standard output."""
        return self.directory / f"answer_{process}.txt"

    def complaint(self, process: int) -> Path:
        """The file of its standard error."""
        return self.directory / f"complaint_{process}.txt"


def run_pods(*pods: Pod) -> list[list[list[Any]]]:
    """Of each pod, of each process, what each job answers. The pods run at the same time.

    Raises:
        AssertionError: If a process fails or takes too long, with what all of them said.
    """
    members = [(pod, process) for pod in pods for process in range(pod.num_processes)]
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as ports:
        addresses = {pod.directory: ports.enter_context(_Port()).address for pod in pods}
        try:
            for pod, process in members:
                started.append(_start(pod, process, addresses[pod.directory]))
            codes = _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
    said = [
        f"--- process {process} of {pod.num_processes} in {pod.directory.name} ended with "
        f"{'a signal, in the end' if code is None else code}:\n"
        f"{pod.complaint(process).read_text()}"
        for (pod, process), code in zip(members, codes, strict=True)
    ]
    assert not any(code != 0 for code in codes), "\n".join(["Not all ended well.", *said])
    return [
        [
            json.loads(pod.answer(process).read_text().splitlines()[-1])
            for process in range(pod.num_processes)
        ]
        for pod in pods
    ]


class _Port(socket.socket):
    """Holds a port on the loopback, so that nobody else gets it before the coordinator binds it."""

    def __init__(self) -> None:
        super().__init__()
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.bind(("127.0.0.1", 0))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.getsockname()[1]}"


def _start(pod: Pod, process: int, address: str) -> subprocess.Popen[bytes]:
    settings = {
        "num_processes": pod.num_processes,
        "process": process,
        "num_devices": pod.num_devices,
        "address": address,
        "time_limit": TIME_LIMIT,
        "jobs": pod.jobs,
    }
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join(map(str, _IMPORTED_FROM)),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(pod.num_devices),
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA warns of shardings that only so small a network has
        # So that another order of sums does not show, and anything else does.
        "JAX_ENABLE_X64": "1",
        # Collectives of programs that are read from a cache may wait for each other forever.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # The programs run for a few milliseconds, and take seconds to compile.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    # Files, because a full pipe would stop one process while another is waited for.
    with pod.answer(process).open("wb") as out, pod.complaint(process).open("wb") as error:
        return subprocess.Popen(
            [sys.executable, "-m", "pods.run", json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            env=environment,
        )


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit statuses, None for what still runs when time is up or another process has failed."""
    deadline = time.monotonic() + TIME_LIMIT
    has_failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return codes
        if any(codes) and not has_failed:
            # The others wait for it, in a collective or at the end, for longer than this.
            has_failed, deadline = True, time.monotonic() + _PATIENCE
        time.sleep(0.05)
    return [process.poll() for process in processes]
