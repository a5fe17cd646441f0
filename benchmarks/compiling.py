"""Seconds until all depths of a GPT are compiled, in three ways, and at a second start.

python benchmarks/compiling.py --output-dir results

Each start is a process of its own with an empty compilation cache, and once more with the one that
it has left. Beside processor time of all threads and wall time stand steps of a program for each
depth against those with the update by layer, in turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from counting.compilations import WAYS
from counting.settings import Blocks, Width
from drawing import COLOURS, finish, new_table, show, show_spread
from study import Count, Record, Settings, Study, Work

BENCHMARKS = Path(__file__).parent


class CompilingSettings(Settings):
    """The arguments of the study."""

    width: Width = 64
    """Of the residual stream, with 4 heads."""
    blocks: Blocks = 10
    """Each is a layer, as are the embedding and the head."""
    context: Count = 64
    """Tokens of a sequence."""
    batch_size: Count = 8
    """Sequences in a batch."""
    turns: Count = 3
    """Of all ways, each time in another order."""
    rounds: Count = 40
    """Timed steps of each kind."""


def run(settings: CompilingSettings, work: Work) -> Record:
    """Starts processes in turns."""
    starts: list[Record] = []
    for turn in range(settings.turns):
        order = [*WAYS[turn % 3 :], *WAYS[: turn % 3]]
        for way in work.track(order, f"turn {turn + 1} of {settings.turns}"):
            name = f"{turn}_{WAYS.index(way)}"
            starts.append(work.part(name, lambda way=way: {"way": way} | _start(settings, way)))
    steps = work.part("steps", lambda: _process(settings, "steps", {}))
    return {"starts": starts, "steps": steps}


def _start(settings: CompilingSettings, way: str) -> Record:
    """The first and the second start with one cache."""
    with tempfile.TemporaryDirectory() as folder:
        # Programs of less than a second are stored by `compile` itself.
        cache = {"JAX_COMPILATION_CACHE_DIR": folder}
        return {which: _process(settings, way, cache) for which in ("first", "second")}


def _process(settings: CompilingSettings, way: str, more: dict[str, str]) -> Any:
    sizes = settings.model_dump(include={"width", "blocks", "context", "batch_size"})
    told = {"way": way, "sizes": sizes, "rounds": settings.rounds}
    known = {name: of for name, of in os.environ.items() if not name.startswith("JAX_")}
    path = os.pathsep.join([str(BENCHMARKS), *filter(None, [known.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "counting.compilations", json.dumps(told)],
        env=known | more | {"PYTHONPATH": path},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


def tables(record: Record) -> Any:
    """The seconds of each way as parts of those of the first; and ratios of steps."""
    number = record["settings"]["blocks"] + 2
    for which in ("first", "second"):
        table = new_table(
            f"{number} depths of a GPT, {which} start: × one after the other, first start",
            *("", "processor, s", "×", "wall, s", "×", "programs"),
        )
        for way in WAYS:
            of_way = [start[which] for start in record["starts"] if start["way"] == way]
            cells = []
            for what in ("processor", "wall"):
                ratios = [
                    a[what] / b["first"][what]
                    for a, b in zip(of_way, _of_first(record), strict=True)
                ]
                seconds = statistics.median(start[what] for start in of_way)
                cells += [show(seconds, 1), show_spread(ratios, 2)]
            table.add_row(way, *cells, f"{of_way[0]['hits'] + of_way[0]['misses']}")
        yield table
    steps = new_table("A step: by layer ÷ one program", "depth", "ms", "×")
    for depth, (whole, by_layer) in record["steps"].items():
        ratio = statistics.median(b / a for a, b in zip(whole, by_layer, strict=True))
        steps.add_row(depth, show(1e3 * statistics.median(whole)), show(ratio))
    yield steps


def _of_first(record: Record) -> list[Record]:
    return [start for start in record["starts"] if start["way"] == WAYS[0]]


def figures(record: Record) -> Any:
    """Bars of both kinds of seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    for axes, what in zip(panels, ("processor", "wall"), strict=True):
        for index, which in enumerate(("first", "second")):
            seconds = [
                statistics.median(x[which][what] for x in record["starts"] if x["way"] == way)
                for way in WAYS
            ]
            at = [place + 0.35 * index for place in range(len(WAYS))]
            axes.barh(at, seconds, height=0.35, color=COLOURS[index], label=f"{which} start")
        axes.set_yticks([place + 0.175 for place in range(len(WAYS))], WAYS)
        finish(axes, x=f"seconds, {what}")
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False)
    return {"": figure}


STUDY = Study("compiling", CompilingSettings, run, tables, figures, extending=("turns",))

if __name__ == "__main__":
    STUDY.main()
