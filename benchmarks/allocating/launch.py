"""Starts processes that train together, waits a bounded time, and leaves none behind."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]


def run_processes(settings: dict[str, Any], time_limit: float) -> list[dict[str, Any]]:
    """What each process says in its last line.

    Raises:
        SystemExit: If one fails or takes too long, with what it said.
    """
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    changed = {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        # Collectives of programs that are read from a cache may wait for each other forever.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with contextlib.ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        # Holds a port, so that nobody else gets it before the coordinator binds it.
        port = scope.enter_context(socket.socket())
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port.bind(("127.0.0.1", 0))
        settings = settings | {"address": f"127.0.0.1:{port.getsockname()[1]}"}
        processes = []
        for rank in range(len(settings["slowness"])):
            # Files, because a full pipe would stop one process while another is waited for.
            out = scope.enter_context((folder / f"{rank}.out").open("wb"))
            err = scope.enter_context((folder / f"{rank}.err").open("wb"))
            script = str(BENCHMARKS / "allocating" / "process.py")
            process = subprocess.Popen(
                [sys.executable, script, json.dumps(settings | {"rank": rank})],
                stdout=out,
                stderr=err,
                env=kept | changed,
            )
            scope.callback(process.wait)
            scope.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + time_limit
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
        if any(code != 0 for code in codes):
            said = "\n".join((folder / f"{rank}.err").read_text() for rank in range(len(codes)))
            raise SystemExit(f"The processes ended with {codes}, not all well:\n{said}")
        outs = [(folder / f"{rank}.out").read_text() for rank in range(len(codes))]
    return [json.loads(out.splitlines()[-1]) for out in outs]
