"""Small graphs, where calls cost more than arithmetic: eager PyTorch, and JAX in two ways.

python benchmarks/small_graphs.py --output-dir results
"""

import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from drawing import finish, legend, new_table, show, style
from graphs import in_jax
from graphs.problems import GraphName, make_problem
from records import rounded
from study import Ascending, Count, Distinct, Record, Settings, Study, Work

IN_TORCH = Path(__file__).parent / "graphs" / "in_torch.py"
# Seconds. PyTorch's threads spin on for 0.2 s when they have nothing to do: what is timed in them
# took six times as long.
SETTLING = 0.5
REQUIREMENTS = ("torch==2.13.0", "numpy")
TITLES = {
    "torch": "PyTorch, eager",
    "step": "JAX, a program for each step",
    "steps": "JAX, many steps in one, own derivatives",
}
# Milliseconds a step as the authors published them (the repository names no processor), and what
# is not alike: nothing is updated in the scalar graphs; a batch of the GPT is made outside of what
# is timed, and their C++ version has no last normalization.
PUBLISHED = {
    ("tiny", 1): {
        "BurTorch": 0.007 / 100,
        "PyTorch, eager": 10.419 / 100,
        "JAX, jitted": 5.58 / 100,
    },
    **{
        ("gpt", batch): {"BurTorch": ours, "PyTorch, eager": theirs}
        for batch, ours, theirs in (
            (1, 0.525, 12.18),
            (8, 4.042, 13.52),
            (64, 31.696, 22.20),
        )
    },
}


class SmallGraphs(Settings):
    """Time a step of gradient descent on small graphs in eager PyTorch and in JAX."""

    graphs: Distinct[GraphName] = ("tiny", "small", "mlp", "gpt")
    """Two graphs of scalars, the makemore MLP and a GPT of 46 thousand parameters."""
    widths: Ascending[Count] = (4, 64, 1024)
    """Of the hidden layer of the MLP."""
    batch_sizes: Ascending[Count] = (1, 8, 64)
    """Examples of a step: windows of text, of which the GPT predicts every character."""
    at_once: Count = 100
    """Steps in one program, and of a sample of each library; ten times as many of scalar graphs."""
    rounds: Count = 7
    """Samples of each, which take turns."""
    torch: bool = True
    """Whether eager PyTorch takes part."""
    torch_dir: Path | None = None
    """A virtual environment with PyTorch; by default one is made and left in a temporary folder."""


class Case(NamedTuple):
    """A graph at a size."""

    graph: GraphName
    width: int
    batch: int

    @property
    def title(self) -> str:
        """In a table."""
        if self.graph in ("tiny", "small"):
            return f"{self.graph} graph of scalars"
        return f"{self.graph}{f' {self.width}' if self.width else ''}, batch {self.batch}"


def cases(settings: SmallGraphs) -> Iterator[Case]:
    """All of them."""
    for graph in settings.graphs:
        if graph in ("tiny", "small"):
            yield Case(graph, 0, 1)
            continue
        for width in settings.widths if graph == "mlp" else (0,):
            for batch in settings.batch_sizes:
                yield Case(graph, width, batch)


class Torch:
    """The process in which PyTorch runs."""

    def __init__(self, folder: Path):
        python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        if not python.exists():
            venv.create(folder, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        self._process: Any = subprocess.Popen(
            [python, IN_TORCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.environment: dict[str, Any] = self._read()

    def run(self, graph: str, path: Path, steps: int) -> dict[str, float]:
        """So many steps of the problem in a file, from where it was."""
        question = {"problem": str(path), "graph": graph, "steps": steps}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        found = self._read()
        time.sleep(SETTLING)
        return found

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("PyTorch's process has ended; what it said is above.")
        return json.loads(line)


def run(settings: SmallGraphs, work: Work) -> Record:
    """Samples of every case."""
    rows, torch = [], None
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings.torch:
            work.say("starting PyTorch")
            torch = Torch(settings.torch_dir or Path(tempfile.gettempdir()) / "small_graphs_torch")
            stack.enter_context(contextlib.closing(torch))
        for case in work.track(cases(settings), "graphs"):
            work.say(case.title)
            measure = functools.partial(_measure, case, settings, torch, scratch)
            rows.append(work.part(f"{case.graph}-{case.width}-{case.batch}", measure))
    return {"torch": torch and torch.environment, "rows": rows}


def _measure(case: Case, settings: SmallGraphs, torch: Torch | None, scratch: Path) -> Record:
    is_scalar = case.graph in ("tiny", "small")
    at_once = settings.at_once * (10 if is_scalar else 1)
    problem = make_problem(case.graph, case.width, case.batch, at_once)
    path = scratch / f"{case.graph}-{case.width}-{case.batch}.npz"
    others = {"inputs": problem.inputs, "labels": problem.labels, "rate": problem.rate}
    np.savez(path, **problem.params, **others)  # pyright: ignore[reportArgumentType]
    # Where it is entered, calls take longer: only where it is needed.
    with jax.enable_x64(True) if is_scalar else contextlib.nullcontext():
        ours = {"step": 1, "steps": at_once}
        trainings = {name: in_jax.Training(case.graph, problem, n) for name, n in ours.items()}
        runs = {name: functools.partial(of.run, at_once) for name, of in trainings.items()}
        if torch is not None:
            runs["torch"] = functools.partial(torch.run, case.graph, path, at_once)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(1 + settings.rounds):  # the first warms up
            for name, go in runs.items():
                samples[name].append(go())
    return case._asdict() | {
        "losses": {name: of[-1]["loss"] for name, of in samples.items()},
        "compile_seconds": {name: of.seconds_to_compile for name, of in trainings.items()},
        "milliseconds": {
            name: rounded([1000 * one["seconds"] / at_once for one in of[1:]], 4)
            for name, of in samples.items()
        },
    }


def tables(record: Record) -> Iterator[Table | str]:
    """Milliseconds a step, how many times as fast many steps in one program are, and published."""
    others = _others(record)
    title = f"Milliseconds of a step, the least of {record['settings']['rounds']} samples"
    if record["torch"]:
        title += f"; PyTorch {record['torch']['torch']}"
    headings = (*(f"{name}" for name in (*others, "steps")), *(f"÷ {name}" for name in others))
    table = new_table(title, "graph", *headings)
    for row in record["rows"]:
        seen = {name: min(of) for name, of in row["milliseconds"].items()}
        table.add_row(
            _title(row),
            *(show(seen[name], 4) for name in (*others, "steps")),
            *(show(ratio(row, name), 1, "×") for name in others),
        )
    yield table
    yield _agreement(record)
    found = [(row, PUBLISHED.get((row["graph"], row["batch"]), {})) for row in record["rows"]]
    if any(values for _, values in found):
        table = new_table("Published by BurTorch's authors, milliseconds", "graph", "method", "")
        for row, values in found:
            for method, value in values.items():
                table.add_row(_title(row), method, f"{value:.3g}")
        yield table


def _agreement(record: Record) -> str:
    worst = max(
        abs(loss - row["losses"]["step"]) / abs(row["losses"]["step"])
        for row in record["rows"]
        for loss in row["losses"].values()
    )
    compiled = [max(row["compile_seconds"].values()) for row in record["rows"]]
    return (
        f"At the end losses agree to {worst:.0e}. Compiling, which is not counted, took "
        f"{min(compiled):.2f} to {max(compiled):.2f} s.\n"
    )


def _others(record: Record) -> list[str]:
    return [name for name in TITLES if name in record["rows"][0]["milliseconds"]][:-1]


def _title(row: Mapping[str, Any]) -> str:
    return Case(row["graph"], row["width"], row["batch"]).title


def ratio(row: Mapping[str, Any], name: str) -> float:
    """How many times the time of many steps in one program another takes.

    Of the least, as whatever else the machine does only adds.
    """
    return min(row["milliseconds"][name]) / min(row["milliseconds"]["steps"])


def figures(record: Record) -> Mapping[str, Figure]:
    """How many times the time of many steps in one program others take, by graph."""
    rows = record["rows"]
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = [-place for place in range(len(rows))]
    for index, name in enumerate(_others(record)):
        ratios = [ratio(row, name) for row in rows]
        marker: dict[str, Any] = style(index) | {"linestyle": "none"}
        axes.plot(ratios, places, label=TITLES[name], **marker)
    axes.set_yticks(places, list(map(_title, rows)))
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    finish(axes, x="times as slow as many steps in one program")
    legend(figure, axes)
    return {"": figure}


STUDY = Study("small_graphs", SmallGraphs, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
