"""Measure the rates of momentum and of variance reduction in K, on problems that noise dominates.

python benchmarks/convergence_rates.py --output-dir results
"""

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rates_study.problems import BALL, nonconvex, star_convex
from rates_study.report import Fitted, figure, fit, print_tables, record
from rates_study.runs import NONCONVEX, STAR_CONVEX, gap, gradient_norm, run
from rates_study.settings import Settings, check_settings
from records import environment, to_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("methods"),
        TimeElapsedColumn(),
        console=console,
    )
    noise = settings.noise, settings.noise_slope, settings.seed
    labels = {"non-convex": "‖∇f‖*"}
    fits: list[Fitted] = []
    with progress:
        total = len(NONCONVEX) + len(settings.powers) * len(STAR_CONVEX)
        task = progress.add_task("", total=total)
        problem = nonconvex(*noise)
        for name, method in NONCONVEX.items():
            progress.update(task, description=f"non-convex, {name}")
            of_radii = run(settings, problem, method, settings.radii, gradient_norm)
            for radius, measured in zip(settings.radii, of_radii, strict=True):
                fits.append(
                    fit(
                        settings,
                        measured,
                        problem="non-convex",
                        method=name,
                        radius=radius,
                        bound=method.bound,
                    )
                )
            progress.advance(task)
        for power in settings.powers:
            problem, title = star_convex(power, *noise), f"star-convex, p = {power:g}"
            labels[title] = "f - f*"
            for name, method in STAR_CONVEX.items():
                progress.update(task, description=f"{title}, {name}")
                (measured,) = run(settings, problem, method, (BALL,), gap)
                fits.append(
                    fit(
                        settings,
                        measured,
                        problem=title,
                        method=name,
                        radius=BALL,
                        bound=method.bound,
                        predicted=method.bound * power / (power - 1),
                    )
                )
                progress.advance(task)
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    text = to_json(
        {
            "benchmark": "convergence_rates",
            "arguments": arguments_record,
            "environment": environment(),
            "fits": record(fits),
        }
    )
    (settings.output_dir / "convergence_rates.json").write_text(text, encoding="utf-8")
    figure(fits, labels).savefig(settings.output_dir / "convergence_rates.png", dpi=150)
    print_tables(console, settings, fits)
    console.print(
        f"Written to {settings.output_dir}: convergence_rates.json, convergence_rates.png",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
