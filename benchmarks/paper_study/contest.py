"""Training: the learning rate of each method first, then a race for each seed."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from models import CNN
from paper_study.presets import Chosen
from paper_study.settings import Settings
from paper_study.units import Units
from racing import Race, Run, run_all
from rate_grid import RateGrid
from settings import LEARNING_RATES, METHODS, MethodName
from settings import Settings as RaceSettings
from theory_study.network import plan

Report = Callable[[str, int], None]
SMOOTHNESS_STEPS = 40


@dataclasses.dataclass(frozen=True)
class Contest:
    """Everything that was measured on one data set."""

    chosen: Chosen
    grids: dict[MethodName, RateGrid]
    """By validation error, 1 − accuracy; empty if there was only one rate."""
    learning_rates: dict[MethodName, float]
    runs: list[Run]
    depth_costs: list[float]
    """Seconds of a step at each depth, which the time-aware method plans by."""
    prediction: dict[str, Any]
    """What the bounds promise, from the measured smoothness of each layer; empty if nobody draws
    uniform depths."""


def num_steps(settings: Settings, chosen: Chosen) -> int:
    """Of all runs on a data set, tuning included."""
    race = chosen.race
    steps = race.epochs * (len(chosen.images.train_labels) // race.batch_size)
    runs = len(settings.seeds) * len(race.methods)
    if len(chosen.learning_rates) > 1:
        runs += len(chosen.learning_rates) * len(race.methods)
    return runs * steps


def hold_contest(settings: Settings, chosen: Chosen, report: Report) -> Contest:
    """Trains what is not finished yet."""
    units = Units(settings.output_dir / "runs")
    costs = _depth_costs(settings, chosen, units)
    grids = dict(_tune(settings, chosen, costs, units, report))
    rates: dict[MethodName, float] = {
        name: grids[name].best_rate if grids else chosen.learning_rates[0]
        for name in chosen.race.methods
    }
    # A rate of its own for each method, whose name comes first among the settings for it.
    own = {LEARNING_RATES[name][0]: rate for name, rate in rates.items()}
    race_settings = dataclasses.replace(chosen.race, **own)
    race, runs = None, []
    for seed in settings.seeds:
        name = f"{settings.figure}_{race_settings.dataset}_seed_{seed}"
        identity = _identity(race_settings, seeds=(seed,)) | {"depth_costs": costs}
        found = units.load(name, identity)
        if found is None:
            race = race or _make_race(race_settings, chosen.images, costs)
            of_seed = run_all(race.with_seeds((seed,)), _said(race_settings, report))
            found = [dataclasses.asdict(run) for run in of_seed]
            units.save(name, identity, found)
        else:
            report(f"{name} was finished", _num_steps(race_settings, chosen, len(found)))
        runs += [Run(**run) for run in found]
    prediction = _predict(settings, chosen, rates, costs, units, report)
    return Contest(chosen, grids, rates, runs, costs, prediction)


def _tune(
    settings: Settings, chosen: Chosen, costs: list[float], units: Units, report: Report
) -> Iterator[tuple[MethodName, RateGrid]]:
    """The validation errors of every method that is tuned, at every rate."""
    if len(chosen.learning_rates) == 1:
        return
    race = None
    for name in chosen.race.methods:
        errors = []
        for rate in chosen.learning_rates:
            chosen_rate: dict[str, Any] = {LEARNING_RATES[name][0]: rate}
            race_settings = dataclasses.replace(
                chosen.race,
                methods=(name,),
                seeds=(settings.tuning_seed,),
                eval_every=_num_steps(chosen.race, chosen, 1),  # only at the end
                **chosen_rate,
            )
            unit = f"{race_settings.dataset}_{name}_at_{rate:g}"
            identity = _identity(race_settings) | {
                "num_validation": settings.num_validation,
                "depth_costs": costs,
            }
            found = units.load(unit, identity)
            if found is None:
                race = race or _make_race(race_settings, chosen.tuning_images, costs)
                said = _said(race_settings, report, f"at {rate:g}")
                (run,) = run_all(race.with_settings(race_settings), said)
                found = dataclasses.asdict(run)
                units.save(unit, identity, found)
            else:
                report(f"{unit} was finished", _num_steps(race_settings, chosen, 1))
            errors.append(1 - found["test_accuracy"][-1])
        yield name, RateGrid(chosen.learning_rates, tuple(errors))


def _predict(
    settings: Settings,
    chosen: Chosen,
    rates: dict[MethodName, float],
    costs: list[float],
    units: Units,
    report: Report,
) -> dict[str, Any]:
    """From the smoothness along a short run of Muon, and the seconds of each depth."""
    if "drop_muon_uniform" not in rates or not costs:
        return {}
    name = f"{chosen.race.dataset}_prediction"
    identity = _identity(chosen.race, methods=(), seeds=(settings.tuning_seed,))
    identity |= {"learning_rate": rates["muon"], "num_steps": SMOOTHNESS_STEPS, "costs": costs}
    found = units.load(name, identity)
    if found is None:
        report(f"{chosen.race.dataset} measuring smoothness", 0)
        model = CNN(chosen.race.channels)
        planned = plan(
            model,
            model.layer_patterns(),
            chosen.images,
            batch_size=chosen.race.batch_size,
            num_steps=SMOOTHNESS_STEPS,
            learning_rate=rates["muon"],
            seed=settings.tuning_seed,
            costs=costs,
        )
        found = {
            "layers": planned.layers,
            "smoothness": {name: of.tolist() for name, of in planned.smoothness.items()},
            "probabilities": planned.probabilities(),
            "predicted_speed_ups": planned.speed_ups,
        }
        units.save(name, identity, found)
    return found


def _depth_costs(settings: Settings, chosen: Chosen, units: Units) -> list[float]:
    """Measured once for all runs, so that a study that goes on plans as it began."""
    if "drop_muon_time_aware" not in chosen.race.methods:
        return []
    name = f"{chosen.race.dataset}_depth_costs"
    identity = _identity(chosen.race, methods=(), seeds=())
    costs = units.load(name, identity)
    if costs is None:
        costs = _make_race(chosen.race, chosen.images, []).depth_costs()
        units.save(name, identity, costs)
    return costs


def _make_race(race_settings: RaceSettings, images: Any, costs: list[float]) -> Race:
    race = Race(race_settings, CNN(race_settings.channels), images)
    race.measured_costs += costs
    return race


def _said(race_settings: RaceSettings, report: Report, more: str = "") -> Report:
    return lambda text, steps: report(f"{race_settings.dataset} {more} {text}", steps)


def _identity(race_settings: RaceSettings, **changes: Any) -> dict[str, Any]:
    """All arguments of a race but those of the machine and the rates of those not in it."""
    race_settings = dataclasses.replace(race_settings, **changes)
    identity = dataclasses.asdict(race_settings)
    for name in ("output_dir", "data_dir", "download"):
        del identity[name]
    names = race_settings.methods
    used = {argument for name in names for argument in LEARNING_RATES[name]}
    for argument in {argument for name in METHODS for argument in LEARNING_RATES[name]} - used:
        del identity[argument]
    return identity


def _num_steps(race_settings: RaceSettings, chosen: Chosen, num_runs: int) -> int:
    per_epoch = len(chosen.images.train_labels) // race_settings.batch_size
    return num_runs * race_settings.epochs * per_epoch
