"""Race Drop-Muon against Muon on text: a GPT of stacked blocks that learns characters.

Every method is one program, compiled once: its steps run in one `lax.scan`, in which Drop-Muon
draws the depths.

python benchmarks/language_race.py --output-dir results
python benchmarks/language_race.py --output-dir results --tied --methods muon drop_muon_uniform
"""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from language.contest import hold_contest, num_steps
from language.outcomes import summarise
from language.plots import figures
from language.report import print_tables, record
from language.settings import Settings, check_settings
from language.training import Race
from records import to_json
from text import load_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Holds the race that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    text = load_text()
    race = Race(settings, text)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"Layers of the network, shallow to deep:\n{race.layers}", highlight=False)
    progress = Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("", total=num_steps(race))
        contest = hold_contest(
            race, lambda text, steps: progress.update(task, description=text, advance=steps)
        )
    outcomes = summarise(settings, contest)
    (settings.output_dir / "language_race.json").write_text(
        to_json(record(settings, text, race, contest, outcomes)), encoding="utf-8"
    )
    pictures = figures(settings, contest, outcomes)
    for name, figure in pictures.items():
        figure.savefig(settings.output_dir / f"{name}.png", dpi=150)
    print_tables(console, settings, outcomes)
    written = ", ".join(["language_race.json", *(f"{name}.png" for name in pictures)])
    console.print(f"Written to {settings.output_dir}: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
