"""Check the theory by numbers: its bounds, its optimal distributions, and what they predict.

python benchmarks/theory.py --output-dir results
"""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from images import load_images
from models import CNN
from records import save_study
from theory_study.bounds import check_bounds
from theory_study.network import plan
from theory_study.race import num_runs, race
from theory_study.report import make_figure, print_tables, record
from theory_study.search import CRITERIA, search
from theory_study.settings import Settings, check_settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    images = load_images("mnist5k", max_train=settings.max_train)
    model = CNN(settings.channels)
    progress = Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("bounds", total=2 + len(CRITERIA) + num_runs(settings))
        bounds = check_bounds(settings)
        verdicts = []
        for criterion in CRITERIA:
            progress.update(task, description=f"search, {criterion}", advance=1)
            verdicts.append(search(settings, criterion))
        progress.advance(task)
        outcomes = race(settings, lambda text: progress.update(task, description=text, advance=1))
        progress.update(task, description="network")
        planned = plan(
            model,
            model.layer_patterns(),
            images,
            batch_size=settings.batch_size,
            num_steps=settings.num_steps,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
        )
        progress.advance(task)
    print_tables(console, bounds, verdicts, outcomes, planned)
    results = record(bounds, verdicts, outcomes, planned)
    figure = make_figure(bounds, outcomes, planned)
    console.print(save_study("theory", settings, results, figure), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
