"""Measure how far momentum, MVR and MARS are from the full gradient, also with dropped layers.

python benchmarks/estimator_error.py --output-dir results
"""

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from estimator_study import all_layers, dropped_layers
from estimator_study.problems import make_layered_quadratic, make_problem
from estimator_study.report import print_tables, ratios_figure, record, steps_figure
from estimator_study.settings import ProblemName, Settings, check_settings
from records import environment, to_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description:<45}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("programs"),
        TimeElapsedColumn(),
        console=console,
    )
    moving = [name for name in all_layers.ESTIMATORS if name != "gradient"]
    errors: dict[tuple[ProblemName, all_layers.Trajectory], dict[str, all_layers.Errors]] = {}
    dropped = {}
    with progress:
        num_programs = len(settings.problems) * (1 + len(moving)) + len(dropped_layers.RULES)
        task = progress.add_task("", total=num_programs)
        for name in settings.problems:
            problem = make_problem(name, settings.num_samples, settings.seed)
            progress.update(task, description=f"{name}, common trajectory")
            errors[name, "common"] = all_layers.measure(
                problem, settings, "common", all_layers.ESTIMATORS
            )
            progress.advance(task)
            errors[name, "own"] = {}
            for estimator in moving:
                progress.update(task, description=f"{name}, {estimator}")
                chosen = {estimator: all_layers.ESTIMATORS[estimator]}
                errors[name, "own"] |= all_layers.measure(problem, settings, "own", chosen)
                progress.advance(task)
        layered = make_layered_quadratic(settings.seed)
        for rule in dropped_layers.RULES:
            variant = f"MVR-{rule.variant}, " if rule.variant else ""
            progress.update(task, description=f"layers, {variant}{rule.name}")
            dropped[rule] = dropped_layers.measure(layered, settings, rule)
            progress.advance(task)
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    text = to_json(
        {
            "benchmark": "estimator_error",
            "arguments": arguments_record,
            "environment": environment(),
            **record(settings, errors, dropped),
        }
    )
    (settings.output_dir / "estimator_error.json").write_text(text, encoding="utf-8")
    figures = {
        f"estimator_error_{name}": steps_figure(
            settings, errors[name, "common"], f"{name}, one trajectory for all"
        )
        for name in settings.problems
    }
    figures["dropped_layers"] = ratios_figure(dropped)
    for name, figure in figures.items():
        figure.savefig(settings.output_dir / f"{name}.png", dpi=150)
    print_tables(console, settings, errors, dropped)
    written = ", ".join(["estimator_error.json", *(f"{name}.png" for name in figures)])
    console.print(f"Written to {settings.output_dir}: {written}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
