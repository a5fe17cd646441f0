"""Orthogonalizations of whole networks: their time, their programs and their errors.

python benchmarks/orthogonalize.py --output-dir results
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import track

from orthogonalization.compiled_programs import compile_program
from orthogonalization.list_timing import svd_cost, time_list
from orthogonalization.matrix_products import ProductRates
from orthogonalization.orthogonalizers import (
    AS_FAST_AS_DEFAULT,
    DEFAULT,
    METHODS,
    REFERENCE,
    USUAL_NUM_STEPS,
    MethodName,
)
from orthogonalization.plot import make_figure
from orthogonalization.polar_errors import measure_accuracy
from orthogonalization.report import print_tables, print_targets, record
from orthogonalization.shape_lists import (
    LARGE_LISTS,
    LIST_NAMES,
    SHAPE_LISTS,
    ListName,
    Shape,
    parse_shape,
)
from orthogonalization.verdicts import Measurements, ProgramSize, judge
from records import environment, to_json


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare newton_schulz_lmo with optax.contrib.muon's orthogonalization and with SVD."""

    output_dir: Path
    """Folder for orthogonalize.json and orthogonalize.png."""
    lists: tuple[ListName, ...] | None = None
    """Matrices of which networks to time; by default all, and none where there are --shapes."""
    shapes: tuple[str, ...] = ()
    """A list of your own, of ROWSxCOLS or ROWSxCOLSxCOUNT, such as 768x3072x12 64x64x200."""
    methods: tuple[MethodName, ...] | None = None
    """Who takes part; by default all, but on gpt2 and stack without newton_schulz_muon and
    newton_schulz_dion, which take as long as newton_schulz. optax_muon is what all are measured
    against, and newton_schulz is newton_schulz_lmo() as it comes. The next two have other
    coefficients, then one multiplies in bfloat16, turbo_muon takes 4 steps, polar_express_7 7."""
    repetitions: int = 7
    """Rounds on each list, in which every method runs once."""
    seconds_per_list: float = 40.0
    """No new round after so long, once there are 3."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the leaves."""
    num_steps: int | None = None
    """Of the iterations, by default each method's own; turbo_muon and polar_express_7 keep it."""
    svd_limit: float = 1e9
    """svd is timed on lists whose Σ rows · cols · min(rows, cols) is not above it."""
    rate_sizes: tuple[int, ...] = (1024, 2048)
    """Square products whose best rate counts as the machine's."""
    program_shapes: tuple[str, ...] = ("512x2048", "64x64")
    """ROWSxCOLS of equal leaves, for the size of programs."""
    leaf_counts: tuple[int, ...] = (1, 8, 48)
    """How many of them."""
    accuracy_shapes: tuple[str, ...] = ("128x128", "96x384", "384x96")
    """ROWSxCOLS of the ill-conditioned matrices."""
    conditions: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4, 1e5)
    """Largest over smallest singular value."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of their singular vectors."""


def check_settings(settings: Settings) -> None:
    """Ends the program with a sentence for arguments that cannot be measured."""
    if settings.lists == () and not settings.shapes:
        raise SystemExit("--lists needs at least one value, or --shapes.")
    for name in ("methods", "lists", "rate_sizes", "program_shapes", "leaf_counts"):
        _check_distinct(name, getattr(settings, name))
    for name in ("accuracy_shapes", "conditions", "seeds"):
        _check_distinct(name, getattr(settings, name))
    for method in (REFERENCE, DEFAULT):
        if settings.methods is not None and method not in settings.methods:
            raise SystemExit(f"--methods must name {method}: the targets compare it. Add it.")
    for name in ("shapes", "program_shapes", "accuracy_shapes"):
        for text in getattr(settings, name):
            _check_shape(name, text)
    for name in ("rate_sizes", "leaf_counts", "conditions"):
        if not all(1 <= value < math.inf for value in getattr(settings, name)):
            raise SystemExit(
                f"{_option(name)} must be at least 1 and finite, got {getattr(settings, name)}."
            )
    if settings.repetitions < 1:
        raise SystemExit(f"--repetitions must be at least 1, got {settings.repetitions}.")
    if settings.num_steps is not None and settings.num_steps < 1:
        raise SystemExit(f"--num-steps must be at least 1, got {settings.num_steps}.")
    if min(settings.seeds) < 0:
        raise SystemExit(f"--seeds must not be negative, got {settings.seeds}.")
    for name in ("seconds_per_list", "svd_limit"):
        if not getattr(settings, name) >= 0:
            raise SystemExit(
                f"{_option(name)} must not be negative, got {getattr(settings, name)}."
            )
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise SystemExit("--output-dir must be a folder, and is a file.")


def _check_distinct(name: str, values: Sequence[object] | None) -> None:
    if values == () and name != "lists":
        raise SystemExit(f"{_option(name)} needs at least one value.")
    if values is not None and len(set(values)) < len(values):
        raise SystemExit(f"{_option(name)} names a value twice: {values}.")


def _check_shape(name: str, text: str) -> None:
    try:
        parsed = parse_shape(text)
    except ValueError as error:
        raise SystemExit(f"{_option(name)}: {error}.") from None
    if name != "shapes" and text.count("x") > 1:
        raise SystemExit(f"{_option(name)} takes ROWSxCOLS without a count, got {text!r}.")
    if name == "accuracy_shapes" and min(parsed[0]) < 2:
        raise SystemExit(f"{_option(name)} needs two rows and columns at least, got {text!r}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def leaves_by_list(settings: Settings) -> dict[str, Sequence[Shape]]:
    """What is to be timed: the named lists, and "custom"."""
    names = (
        (LIST_NAMES if not settings.shapes else ()) if settings.lists is None else settings.lists
    )
    leaves: dict[str, Sequence[Shape]] = {name: SHAPE_LISTS[name] for name in names}
    if settings.shapes:
        leaves["custom"] = [shape for text in settings.shapes for shape in parse_shape(text)]
    return leaves


def not_timed(settings: Settings, name: str, shapes: Sequence[Shape]) -> dict[MethodName, str]:
    """The methods that are left out on a list, and why."""
    reasons: dict[MethodName, str] = {}
    if settings.methods is None and name in LARGE_LISTS:
        reasons |= dict.fromkeys(AS_FAST_AS_DEFAULT, f"as {DEFAULT}, but for --methods")
    if svd_cost(shapes) > settings.svd_limit and "svd" in (settings.methods or METHODS):
        reasons["svd"] = "too much for it, see --svd-limit"
    return reasons


def measure(settings: Settings, console: Console) -> Measurements:
    """Everything, with progress bars."""
    methods = settings.methods or METHODS
    rates = ProductRates(settings.rate_sizes)
    compile_program(DEFAULT, ((2, 2),), settings.dtype, settings.num_steps)  # XLA's own start
    lists = [
        time_list(
            name,
            tuple(shapes),
            methods,
            not_timed=not_timed(settings, name, shapes),
            dtype=settings.dtype,
            num_steps=settings.num_steps,
            repetitions=settings.repetitions,
            max_seconds=settings.seconds_per_list,
            rates=rates,
            console=console,
        )
        for name, shapes in leaves_by_list(settings).items()
    ]
    cases: list[tuple[Shape, MethodName, int]] = [
        (parse_shape(text)[0], method, count)
        for text in settings.program_shapes
        for method in (REFERENCE, DEFAULT)
        for count in settings.leaf_counts
    ]
    sizes = [
        ProgramSize(
            shape,
            count,
            method,
            compile_program(method, (shape,) * count, settings.dtype, settings.num_steps),
        )
        for shape, method, count in track(cases, "program size", console=console)
    ]
    accuracies = measure_accuracy(
        methods,
        [parse_shape(text)[0] for text in settings.accuracy_shapes],
        settings.conditions,
        settings.seeds,
        dtype=settings.dtype,
        num_steps=settings.num_steps,
        console=console,
    )
    return Measurements(lists, sizes, accuracies)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    settings = tyro.cli(Settings, args=arguments)
    check_settings(settings)
    console = Console()
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    measurements = measure(settings, console)
    targets = judge(measurements)
    num_steps = settings.num_steps or USUAL_NUM_STEPS
    arguments_record = dataclasses.asdict(settings)
    del arguments_record["output_dir"]  # of the machine, not of the measurement
    text = to_json(
        {
            "benchmark": "orthogonalize",
            "arguments": arguments_record,
            "environment": environment(),
            **record(measurements, targets, num_steps),
        }
    )
    (settings.output_dir / "orthogonalize.json").write_text(text, encoding="utf-8")
    figure = make_figure(measurements, settings.dtype)
    figure.savefig(settings.output_dir / "orthogonalize.png", dpi=150)
    print_tables(console, measurements, num_steps)
    console.print(f"Written to {settings.output_dir}: orthogonalize.json, orthogonalize.png")
    print_targets(console, targets)


if __name__ == "__main__":
    main()
