"""Four processes train a GPT, one is killed, and all that start again repeat the run bit for bit.

python benchmarks/processes.py --output-dir results

Each process has one device and text of its own, and sends what is new in its momentum, compressed.
A run that nobody disturbs is compared with one of which a process is killed and that new processes
restore from the last checkpoint.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from matplotlib import pyplot as plt

from communicating.task import METHODS, GPTSettings
from drawing import finish, new_table
from records import read_json
from study import Count, Positive, Record, Study, Work

BENCHMARKS = Path(__file__).parent
# A process whose fellow has died learns it after so many seconds.
HEARTBEAT = 10


class ProcessesSettings(GPTSettings):
    """The arguments of the demonstration."""

    method: Literal["muon", "rank15_natural8", "drop_rank15_natural8"] = "drop_rank15_natural8"
    """How they send."""
    num_steps: Count = 30
    """Of each run."""
    checkpoint_every: Count = 10
    """Steps between two checkpoints."""
    kill_after: Count = 17
    """The step after which the last process is killed."""
    rate: Positive = 0.05
    """Of the matrices; it falls linearly to 0."""
    auxiliary_rate: Positive = 0.2
    """Of Adam on everything else, times the rate of the matrices."""
    time_limit: Count = 900
    """Seconds after which whatever still runs is ended."""


class Group:
    """Processes of one run, whose output goes to files in a folder."""

    def __init__(self, settings: ProcessesSettings, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {name: of for name, of in os.environ.items() if name != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            # Collectives of programs that are read from a cache may wait for each other forever.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self.folder, self.limit = folder, settings.time_limit
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(settings.num_workers):
            told = {
                "settings": settings.model_dump(mode="json"),
                "address": address,
                "number": number,
                "folder": str(folder),
                "heartbeat": HEARTBEAT,
            }
            with (folder / f"process_{number}.log").open("ab") as log:
                command = [sys.executable, "-m", "communicating.process", json.dumps(told)]
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            self.processes.append(process)

    def wait(self, until: Any = lambda: False) -> None:
        """Until all have ended or a condition holds; ends what runs for too long."""
        deadline = time.monotonic() + self.limit
        while time.monotonic() < deadline and not until():
            if all(process.poll() is not None for process in self.processes):
                return
            time.sleep(0.05)
        if time.monotonic() >= deadline:
            self.close()
            raise SystemExit(f"The processes took more than {self.limit} s: see {self.folder}.")

    def close(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def answers(self) -> Record:
        """What the first process has written, when all have ended; an error if one failed."""
        self.wait()
        codes = [process.returncode for process in self.processes]
        if any(codes):
            raise SystemExit(f"The processes ended with {codes}: see {self.folder}.")
        return read_json(self.folder / "answers.json")


def steps_taken(folder: Path) -> int:
    """Of the run in a folder, as far as its first process has said."""
    path = folder / "losses.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def run(settings: ProcessesSettings, work: Work) -> Record:
    """The run that nobody disturbs, and the one of which a process is killed."""
    if not settings.checkpoint_every < settings.kill_after < settings.num_steps:
        raise SystemExit("--kill-after must lie between the first checkpoint and the last step.")
    base = settings.output_dir.resolve() / "processes"
    shutil.rmtree(base, ignore_errors=True)  # checkpoints of an earlier run
    work.say("all processes, undisturbed")
    with contextlib.closing(Group(settings, base / "undisturbed")) as group:
        undisturbed = group.answers()
    work.say("all processes, of which one is killed")
    with contextlib.closing(Group(settings, base / "killed")) as group:
        group.wait(until=lambda: steps_taken(base / "killed") >= settings.kill_after)
        group.processes[-1].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        group.wait()
        ended = time.monotonic() - begin
        codes = [process.returncode for process in group.processes]
    before = [json.loads(of) for of in (base / "killed/losses.jsonl").read_text().splitlines()]
    work.say("new processes, restored")
    with contextlib.closing(Group(settings, base / "killed")) as group:
        restored = group.answers()
    return {
        "undisturbed": undisturbed,
        "restored": restored,
        "losses_before": before,
        "seconds_until_all_ended": round(ended, 1),
        "exit_codes": codes,
        "bits_are_equal": undisturbed["digest"] == restored["digest"],
    }


def tables(record: Record) -> Any:
    """What became of the processes, and whether the bits are equal."""
    whole, again = record["undisturbed"], record["restored"]
    table = new_table(
        f"{record['settings']['num_workers']} processes, one of them killed", "what", "value"
    )
    sent = ", ".join(f"{of:,}" for of in whole["received_by_depth"].values())
    for name, value in {
        "method": METHODS[record["settings"]["method"]].title,
        "loss of the first step and of the last": (
            f"{whole['losses'][0]:.3f} → {whole['losses'][-1]:.3f}"
        ),
        "bytes received in a step, by depth (in the program)": sent,
        "exit codes after the kill": ", ".join(map(str, record["exit_codes"])),
        "seconds until all had ended": f"{record['seconds_until_all_ended']:.1f}",
        "restored at step": str(again["start"]),
        "bits equal to those of the undisturbed run": str(record["bits_are_equal"]),
        "digest": whole["digest"][:16],
    }.items():
        table.add_row(name, value)
    return [table]


def figures(record: Record) -> Any:
    """The losses of both runs."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    whole, again, before = record["undisturbed"], record["restored"], record["losses_before"]
    axes.plot(whole["losses"], color="#999999", linewidth=4, label="undisturbed")
    axes.plot(before, color="#D55E00", label="until a process was killed")
    later = range(again["start"], again["start"] + len(again["losses"]))
    axes.plot(later, again["losses"], "--", color="#0072B2", label="restored")
    axes.legend(frameon=False)
    finish(axes, x="step", y="training loss, mean over workers")
    return {"": figure}


STUDY = Study("processes", ProcessesSettings, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
