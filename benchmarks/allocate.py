"""How many micro-batches each worker should get: simulated workers, and processes.

python benchmarks/allocate.py --output-dir results
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from allocating.launch import run_processes
from allocating.process import alone
from allocating.simulation import make_workers, simulate
from drawing import draw_spread, finish, legend, median, new_table, show, style
from records import rounded
from study import Count, Distinct, Positive, Record, Settings, Some, Study, Whole, Work

MethodName = Literal["greedy", "uniform", "ATA", "ATA-Empirical", "best"]
TimesName = Literal["sqrt", "linear", "mixture"]
POINTS = 40  # of a curve
RANDOM_TIMES = {
    "sqrt": "29√i + Exp(29√i)",
    "linear": "29 i + Exp(29 i)",
    "mixture": "five distributions",
}


class Allocate(Settings):
    """Simulate allocations to workers of unknown speed, and train with some processes."""

    times: Distinct[TimesName] = get_args(TimesName)
    """How long tasks take worker i."""
    num_workers: Distinct[Count] = (17, 51, 153, 459)
    """How many there are; of the mixture and the linear times the second alone."""
    num_tasks: Count = 23
    """Of an iteration."""
    num_iterations: Count = 10_000
    """Of a run."""
    methods: Distinct[MethodName] = get_args(MethodName)
    """Who decides; "best" knows the means, and shares by them."""
    seeds: Distinct[Whole] = (0, 1, 2, 3, 4)
    """Of the times."""
    widths: Distinct[Positive] = (1.0, 0.1)
    """Factors of the intervals of ATA; 1 has the guarantee."""
    slowness: Some[Count] = (1, 2, 3, 4)
    """Of each process, relative to the first."""
    process_tasks: Count = 24
    """Micro-batches of a step of the processes."""
    process_steps: Count = 60
    """Steps of the processes."""
    unit: Positive = 0.01
    """Seconds that a micro-batch takes a process of slowness 1."""
    slower: Count = 6
    """From the middle of another run on, how many times slower the first process becomes."""


def run(settings: Allocate, work: Work) -> Record:
    """Each kind of workers is a part, and so are the processes."""
    kinds = [
        (times, count)
        for times in settings.times
        for i, count in enumerate(settings.num_workers)
        if times == "sqrt" or i == min(1, len(settings.num_workers) - 1)
    ]
    simulated = {}
    for times, count in work.track(kinds, "simulating"):
        make = functools.partial(_simulate, settings, times, count)
        simulated[f"{times}, n = {count}"] = work.part(f"{times}_{count}", make)
    work.say("training with processes")
    processes = work.part("processes", functools.partial(_processes, settings))
    return {"simulated": simulated, "processes": processes}


def lines(settings: Record) -> list[tuple[str, str, float]]:
    """What is drawn and listed: a title, a method, and the width of its intervals."""
    found = []
    for method in settings["methods"]:
        if not method.startswith("ATA"):
            found.append((method, method, 1.0))
            continue
        for width in settings["widths"]:
            found.append((method if width == 1 else f"{method}, {width:g} wide", method, width))
    return found


def _simulate(settings: Allocate, times: str, count: int) -> Record:
    workers, found = make_workers(times, count), {}
    tenth = settings.num_iterations // 10
    at = np.unique(np.geomspace(1, settings.num_iterations, POINTS).astype(int))
    for title, method, width in lines(settings.arguments()):
        run = simulate(
            method, workers, settings.num_tasks, settings.num_iterations, settings.seeds, width
        )
        late = run["time"][:, -1] - run["time"][:, tenth - 1]
        found[title] = {name: rounded(of[:, at - 1]) for name, of in run.items()} | {
            "late_iteration": rounded(late / (settings.num_iterations - tenth))
        }
    return {"at": at.tolist(), "methods": found}


def _processes(settings: Allocate) -> Record:
    given = {
        "slowness": settings.slowness,
        "num_tasks": settings.process_tasks,
        "num_steps": settings.process_steps,
        "unit": settings.unit,
        "eta": 0.05,  # of waits, which are steady
        "width": 1.0,
        "decay": 1.0,
        "slower": 1,
        "change": settings.process_steps,
    }
    middle = settings.process_steps // 2
    changing = {"slower": settings.slower, "change": middle, "decay": 0.8}
    runs = {
        "equal shares": given | {"method": "equal"},
        "ATA": given | {"method": "ATA"},
        "ATA, the first one slower": given | changing | {"method": "ATA"},
    }
    expected = alone(settings.process_steps, settings.process_tasks)
    found = {}
    for title, of in runs.items():
        answers = run_processes(of, 60 + 10 * settings.process_steps * settings.unit * 100)
        of_shares = [answer["shares"] for answer in answers]
        seconds = np.max([answer["seconds"] for answer in answers], 0)
        error = max(np.abs(np.subtract(answer["params"], expected)).max() for answer in answers)
        found[title] = {
            "agree": all(shares == of_shares[0] for shares in of_shares),
            "shares": of_shares[0],
            "seconds": rounded(seconds, 3),
            "steps_per_second": rounded([len(seconds) / seconds.sum()], 4)[0],
            "error": rounded([float(error)], 2)[0],
        }
    return found


def tables(record: Record) -> Iterator[Table | str]:
    """What a run costs with each kind of workers, and what the processes did."""
    settings = record["settings"]
    titles = [title for title, *_ in lines(settings)]
    for kind, of in record["simulated"].items():
        methods = of["methods"]
        headings = "time / best", "worker time / best", "late iteration / best", "regret"
        table = new_table(f"{kind}: {settings['num_iterations']:,} iterations", "who", *headings)
        for title in titles:
            table.add_row(title, *(show(value) for value in ratios(methods, title)))
        yield table
    equal = record["processes"]["equal shares"]["steps_per_second"]
    table = new_table("Processes", "who", "steps/s", "over equal", "last shares", "error")
    for title, of in record["processes"].items():
        shares, rate = " ".join(map(str, of["shares"][-1])), of["steps_per_second"]
        agree = "" if of["agree"] else " (they disagree)"
        table.add_row(
            title, f"{rate:.2f}", f"{rate / equal:.2f}×", shares + agree, f"{of['error']:.0e}"
        )
    yield table


def ratios(methods: Record, title: str) -> list[float | None]:
    """Time, worker time and late iterations over those of the best shares, and the regret."""
    best = methods.get("best", methods[title])

    def over(name: str) -> float | None:
        return _last(methods[title][name]) / _last(best[name])

    middle: list[Any] = [median(of["late_iteration"]) for of in (methods[title], best)]
    late = middle[0] / middle[1]
    regret = _last(methods[title]["regret"])
    return [over("time"), over("worker_time"), late, None if title == "greedy" else regret]


def _last(curves: Any) -> Any:
    return median([curve[-1] for curve in curves])


def figures(record: Record) -> dict[str, Figure]:
    """Curves of the simulated workers, and the shares of the processes."""
    settings = record["settings"]
    kinds = record["simulated"]
    figure = Figure(figsize=(2.9 * len(kinds) + 2.2, 5.4), layout="constrained")
    panels = figure.subplots(2, len(kinds), sharex=True, squeeze=False)
    for column, (kind, of) in enumerate(kinds.items()):
        best = of["methods"].get("best")
        for index, (title, *_) in enumerate(lines(settings)):
            for row, name in enumerate(("time", "worker_time")):
                values = np.array(of["methods"][title][name], float)
                if best is not None:
                    values = values / np.median(best[name], 0)
                draw_spread(panels[row, column], of["at"], values.T.tolist(), index, title)
        for axes in panels[:, column]:
            axes.set(xscale="log", yscale="log")
            finish(axes)
        finish(panels[0, column], kind)
    panels[0, 0].set_ylabel("time / best")
    panels[1, 0].set_ylabel("worker time / best")
    figure.supxlabel("iterations")
    legend(figure, panels[0, 0])
    return {"": figure, "processes": _draw_processes(record)}


def _draw_processes(record: Record) -> Figure:
    runs = {title: of for title, of in record["processes"].items() if title != "equal shares"}
    figure = Figure(figsize=(4.2 * len(runs) + 1.5, 3), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (title, of) in zip(panels, runs.items(), strict=True):
        for i, slowness in enumerate(record["settings"]["slowness"]):
            look = style(i) | {"marker": None}
            shares = [of_step[i] for of_step in of["shares"]]
            axes.step(range(len(shares)), shares, **look, label=f"slowness {slowness}")
        finish(axes, title, x="step")
    panels[0].set_ylabel("micro-batches")
    legend(figure, panels[0])
    return figure


STUDY = Study("allocate", Allocate, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
