"""What a traced depth costs in a stack: its time, its memory and the programs that it saves.

python benchmarks/stacked_cost.py --output-dir results
"""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import track

from records import save_study
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
    print_tables(console, measured, settings)
    figure = make_figure(measured, settings)
    console.print(save_study("stacked_cost", settings, record(measured, settings), figure))


if __name__ == "__main__":
    main()
