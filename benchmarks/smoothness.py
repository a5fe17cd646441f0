"""Fit the smoothness of each layer along a run, and try the step sizes that it predicts.

python benchmarks/smoothness.py --output-dir results
"""

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import dropmuon_jax as dm
from images import load_images
from records import environment, to_json
from smoothness_study.comparison import compare, num_runs
from smoothness_study.plot import plot_smoothness
from smoothness_study.report import print_tables, record, sweep_figure
from smoothness_study.settings import Settings, check_settings
from smoothness_study.training import GRADIENTS, SampleKind, Samples, Study


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
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
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    study = Study(settings, images)
    progress = Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        console=console,
    )
    samples: dict[SampleKind, Samples] = {}
    with progress:
        task = progress.add_task("", total=len(GRADIENTS) + num_runs(settings))
        for gradients in GRADIENTS:
            progress.update(task, description=f"{gradients}, measured")
            samples |= study.measure(gradients)
            progress.advance(task)
        fits: dict[SampleKind, dm.planning.SmoothnessFit] = {
            kind: dm.planning.fit_smoothness(of_kind, hinge=settings.hinge)
            for kind, of_kind in samples.items()
        }
        sweeps = compare(
            study,
            fits,
            lambda text, runs: progress.update(task, description=text, advance=runs),
        )
    arguments_record = dataclasses.asdict(settings)
    for path in ("data_dir", "output_dir"):  # of the machine, not of the measurement
        del arguments_record[path]
    text = to_json(
        {
            "benchmark": "smoothness",
            "arguments": arguments_record,
            "environment": environment(),
            **record(samples, fits, sweeps),
        }
    )
    (settings.output_dir / "smoothness.json").write_text(text, encoding="utf-8")
    figures = {
        f"smoothness_{kind.replace(' ', '_')}": plot_smoothness(samples[kind], fits[kind])
        for kind in samples
    }
    figures["step_sizes"] = sweep_figure(sweeps)
    for name, figure in figures.items():
        figure.savefig(settings.output_dir / f"{name}.png", dpi=150)
    print_tables(console, samples, fits, sweeps)
    written = ", ".join(["smoothness.json", *(f"{name}.png" for name in figures)])
    console.print(f"Written to {settings.output_dir}: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
