"""Race Drop-Muon against Muon, optax.contrib.muon, AdamW, Scion and Gluon on images.

python benchmarks/race.py --output-dir results
python benchmarks/race.py --output-dir results --dataset mnist --batch-size 1024 --epochs 4
python benchmarks/race.py --output-dir results --methods muon scion drop_scion gluon drop_gluon
"""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from images import load_images
from models import CNN
from plots import save_plots
from racing import Race, hold_race
from records import to_json
from reporting import print_tables, record
from settings import Settings, check_batch_size, check_settings
from targets import summarise


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the race that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    with console.status(f"reading {settings.dataset}"):
        images = load_images(
            settings.dataset,
            data_dir=settings.data_dir,
            download=settings.download,
            max_train=settings.max_train,
        )
    check_batch_size(settings, len(images.train_labels))
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    race = Race(settings, CNN(settings.channels), images)
    console.print(f"Layers of the network, shallow to deep:\n{race.layers}", highlight=False)

    progress = Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        total = race.num_steps * len(settings.seeds) * len(settings.methods)
        task = progress.add_task("", total=total)
        contest = hold_race(
            race, lambda text, steps: progress.update(task, description=text, advance=steps)
        )
    summaries = summarise(settings, contest.runs)
    (settings.output_dir / "race.json").write_text(
        to_json(record(settings, contest, summaries)), encoding="utf-8"
    )
    plots = save_plots(settings, contest, settings.output_dir)
    print_tables(console, settings, contest, summaries)
    written = ", ".join(["race.json", *(path.name for path in plots)])
    console.print(f"Written to {settings.output_dir}: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
