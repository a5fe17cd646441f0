"""What a step on a mesh moves between devices, counted; and the time on a pod, modelled.

python benchmarks/scale.py --output-dir results
"""

import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else XLA warns of what is counted here

import jax
import tyro
from rich.console import Console
from rich.progress import track

from records import save_study
from scale_study.model import model_step, modelled_cases
from scale_study.plot import make_figure
from scale_study.programs import Programs
from scale_study.report import print_tables, record
from scale_study.settings import Settings, check_settings
from scale_study.tables import cases, compared
from scale_study.verdicts import Measurements


def measure(settings: Settings, console: Console) -> Measurements:
    """Everything, with progress bars."""
    programs, asked = Programs(settings), cases(settings)
    distinct = list(dict.fromkeys(case for of_question in asked.values() for case in of_question))
    counts = {case: programs.count(case) for case in track(distinct, "counting", console=console)}
    agreements = [
        programs.compare(case)
        for case in track(compared(settings), "against one device", console=console)
    ]
    modelled = [
        model_step(*case, settings)
        for case in track(modelled_cases(settings), "modelling", console=console)
    ]
    return Measurements(counts, asked, agreements, modelled)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the study that the command line describes."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.devices)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    measured = measure(settings, console)
    print_tables(console, measured, settings)
    figure = make_figure(measured, settings)
    console.print(save_study("scale", settings, record(measured, settings), figure))


if __name__ == "__main__":
    main()
