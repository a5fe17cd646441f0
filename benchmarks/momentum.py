"""Compare momentum with variance reduction, by steps, by gradients taken and by seconds.

A transformer learns characters. MVR takes two gradients of each batch; two controls spend the
second one on plain momentum, on twice the steps and on twice the batch.

python benchmarks/momentum.py --output-dir results
python benchmarks/momentum.py --output-dir results --methods ema mvr1 --batch-sizes 8
"""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from momentum_study.contest import hold_contest, num_windows
from momentum_study.outcomes import summarise
from momentum_study.plots import figures
from momentum_study.report import print_tables, record
from momentum_study.settings import Settings, check_settings
from momentum_study.training import Study
from records import to_json
from text import load_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    text = load_text()
    study = Study(settings, text)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("", total=num_windows(settings))
        contest = hold_contest(
            study, lambda text, windows: progress.update(task, description=text, advance=windows)
        )
    outcomes = summarise(contest)
    (settings.output_dir / "momentum.json").write_text(
        to_json(record(settings, text, study, contest, outcomes)), encoding="utf-8"
    )
    pictures = figures(settings, contest)
    for name, figure in pictures.items():
        figure.savefig(settings.output_dir / f"{name}.png", dpi=150)
    print_tables(console, settings, outcomes)
    written = ", ".join(["momentum.json", *(f"{name}.png" for name in pictures)])
    console.print(f"Written to {settings.output_dir}: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
