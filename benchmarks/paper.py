"""The experiments of the Drop-Muon paper, one figure each, and the time-aware sampler beside them.

python benchmarks/paper.py speed-up-mnist --output-dir results --data-dir …
python benchmarks/paper.py uniform-mnist --output-dir results --data-dir … --scale paper
python benchmarks/paper.py averaged-curves --output-dir results --scale tiny

Finished parts are kept in the output folder: the same command again goes on where it was ended.
"""

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paper_study.contest import Contest, hold_contest, num_steps
from paper_study.figures import make_figure
from paper_study.outcomes import summarise
from paper_study.presets import choose, left_out
from paper_study.report import print_tables, record
from paper_study.sampling import sampling_figure, sampling_record
from paper_study.settings import Settings, check_settings
from records import save_study


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the figure that the command line names."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    name = settings.figure
    if name == "sampling":
        results, figure = sampling_record(settings), sampling_figure(settings)
    else:
        contests = _train(settings, console)
        outcomes = [summarise(settings, contest) for contest in contests]
        print_tables(console, settings, contests, outcomes)
        results = record(settings, contests, outcomes)
        figure = make_figure(settings, contests, outcomes)
    # Where data lie is of the machine, not of the measurement.
    written = save_study(name, dataclasses.replace(settings, data_dir=None), results, figure)
    console.print(written, highlight=False, soft_wrap=True)


def _train(settings: Settings, console: Console) -> list[Contest]:
    """Everything that is not there yet, data set by data set."""
    progress = Progress(
        TextColumn("{task.description:<52}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=console,
    )
    contests = []
    try:
        with console.status("reading the data sets"):
            chosen = choose(settings)
        missing = left_out(settings, [it.race.dataset for it in chosen])
        if missing:
            console.print(
                f"[bold]Without {', '.join(missing)}: not at hand, or not asked for.[/bold]"
            )
        with progress:
            task = progress.add_task("", total=sum(num_steps(settings, it) for it in chosen))
            for images_and_race in chosen:
                contests.append(
                    hold_contest(
                        settings,
                        images_and_race,
                        lambda text, steps: progress.update(task, description=text, advance=steps),
                    )
                )
    except KeyboardInterrupt:
        raise SystemExit(
            f"Interrupted. What is finished lies in {settings.output_dir / 'runs'}; the same "
            "command goes on from there."
        ) from None
    return contests


if __name__ == "__main__":
    main()
