"""Orthogonalizations and whole updates of networks: their time beside optax.contrib.muon's, error.

python benchmarks/orthogonalize.py --output-dir results
python benchmarks/orthogonalize.py --output-dir results --lists squares 768x3072x12+64x64x200
"""

import itertools
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orthogonalization.measuring import list_program, measure, measure_errors, update_program
from orthogonalization.methods import DEFAULT, FASTEST, REFERENCE, OtherName
from orthogonalization.show import figures, tables
from orthogonalization.subjects import GROUPS, groups_of, needed_flops, shapes_of, tree_of
from study import Ascending, Count, Distinct, NonNegative, Record, Settings, Study, Whole, Work

# Refused if it stands for no matrices, and kept as it is written.
ListName = Annotated[str, AfterValidator(lambda name: shapes_of(name) and name)]
Condition = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class OrthogonalizeSettings(Settings):
    """Compare this package's orthogonalization with optax.contrib.muon's."""

    lists: Distinct[ListName] = tuple(GROUPS)
    """Lists of matrices to orthogonalize: groups, networks, or lists of your own, each of
    ROWSxCOLS or ROWSxCOLSxCOUNT, as in 768x3072x12+64x64x200."""
    updates: tuple[ListName, ...] = ("gpt2", "resnet18", "64x64x4", "64x64x16")
    """Lists whose whole update to time, with two vectors for each matrix: momentum,
    orthogonalization, learning rate, sum, and Adam for vectors and tables. adamw takes part."""
    others: tuple[OtherName, ...] = ("nonic", "seven_steps", "turbo_muon")
    """Who takes part beside optax_muon and newton_schulz, which is newton_schulz_lmo() as it comes.
    The first two have as many steps of Polar Express, the next three other polynomials."""
    others_limit: NonNegative = 100.0
    """GFLOP that five steps on a list need, from where on it is timed without others but nonic."""
    rounds: Count = 5
    """In each of which each method runs once beside optax_muon."""
    seconds_per_list: NonNegative = 15.0
    """No new round after so long, once there are 3."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the leaves."""
    rate_sizes: Distinct[Count] = (1024, 2048)
    """Square products whose best rate counts as the machine's."""
    error_list: ListName = "128x128+96x384+384x96"
    """Of the matrices whose error is measured."""
    conditions: Ascending[Condition] = (1e1, 1e2, 1e3, 1e4, 1e5)
    """Their largest singular value over the smallest."""
    seeds: Distinct[Whole] = (0, 1, 2)
    """Of their singular vectors."""


def run(settings: OrthogonalizeSettings, work: Work) -> Record:
    """Times every list and every update, then measures errors."""
    groups = groups_of(settings.lists)
    lists = list(dict.fromkeys(itertools.chain(*groups.values())))
    tasks = {name: (name, partial(list_program, shapes=shapes_of(name))) for name in lists}
    updates = {f"{name}_update": name for name in settings.updates}
    for name, matrices in updates.items():
        tasks[name] = (matrices, partial(update_program, shapes=tree_of(matrices)))
    all_methods, subjects, errors = [REFERENCE, DEFAULT, *settings.others], [], []
    for name, (matrices, program) in work.track(tasks.items(), "timing"):
        shapes = shapes_of(matrices)
        methods = [*all_methods, *(["adamw"] if name in updates else [])]
        if needed_flops(shapes, num_steps=5) > 1e9 * settings.others_limit:
            methods = [method for method in (REFERENCE, DEFAULT, FASTEST) if method in methods]
        make = partial(
            measure,
            {method: partial(program, method, settings.dtype) for method in methods},
            shapes,
            rate_sizes=settings.rate_sizes,
            rounds=settings.rounds,
            max_seconds=settings.seconds_per_list,
            say=lambda text, name=name: work.say(f"{name}: {text}"),
        )
        subjects.append({"name": name, "leaves": len(shapes)} | work.part(name, make))
    spectra = list(itertools.product(settings.conditions, settings.seeds))
    for i, shape in enumerate(work.track(shapes_of(settings.error_list), "errors")):
        make = partial(measure_errors, all_methods, shape, spectra, settings.dtype, work.say)
        errors += work.part(f"errors_{i}", make)
    groups |= {"all lists": lists, "updates": list(updates)}
    return {"groups": groups, "subjects": subjects, "errors": errors}


STUDY = Study("orthogonalize", OrthogonalizeSettings, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
