"""What a traced depth costs in a stack: its time, its memory and the programs that it saves.

python benchmarks/stacked_cost.py --output-dir results
"""

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import track

from records import environment, to_json
from stacked_study.counts import count, count_compilations, warm_up
from stacked_study.plot import make_figure
from stacked_study.programs import Problem
from stacked_study.report import print_tables, record
from stacked_study.settings import Settings, check_settings
from stacked_study.timing import take_turns
from stacked_study.verdicts import Measurements


def measure(settings: Settings, console: Console) -> Measurements:
    """Everything, with progress bars."""
    programs = Problem(settings).programs()
    num_programs, times = {}, {}
    if settings.repetitions:
        num_programs = warm_up(programs, console)
        times = take_turns(programs, settings.repetitions, console)
    flops = {
        case: program.flops() for case, program in track(programs.items(), "FLOPs", console=console)
    }
    counts = count(programs, console)
    compilations = count_compilations(settings, console)
    return Measurements(flops, counts, num_programs, times, compilations)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    measured = measure(settings, console)
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    text = to_json(
        {
            "benchmark": "stacked_cost",
            "arguments": arguments_record,
            "environment": environment(),
            **record(measured, settings),
        }
    )
    (settings.output_dir / "stacked_cost.json").write_text(text, encoding="utf-8")
    figure = make_figure(measured, settings)
    figure.savefig(settings.output_dir / "stacked_cost.png", dpi=150)
    print_tables(console, measured, settings)
    console.print(f"Written to {settings.output_dir}: stacked_cost.json, stacked_cost.png")


if __name__ == "__main__":
    main()
