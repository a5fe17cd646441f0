"""The race: every method at every budget, at its best rate, and what theory expected of it."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
import optax

import dropmuon_jax as dm
from analysis.network import measured_smoothness
from analysis.search import CRITERIA
from comparing.settings import REFERENCE, CompareSettings, MethodName
from comparing.tasks import Task
from comparing.training import Track
from study import Record, Work


def tune(track: Track, name: MethodName, budget: float) -> Record:
    """A run at each learning rate, judged by the held-out data at its end."""
    rates, seed = track.settings.rates, track.settings.tuning_seed
    found = [track.run(name, budget, rate, seed)["validation"][-1] for rate in rates]
    return {"method": name, "budget": budget, "rates": list(rates), "validation": found}


def best_rate(tuned: Record) -> float:
    """Of those that were tried; of equal ones the smallest."""
    found = [math.inf if value is None else value for value in tuned["validation"]]
    return tuned["rates"][found.index(min(found))]


def compete(settings: CompareSettings, task: Task, work: Work) -> Record:
    """Times the steps, finds every method's rate at every budget, and runs them all."""
    track = Track(settings, task, work)
    num_runs = len(settings.seeds) + len(settings.rates) * (len(settings.rates) > 1)
    work.expect(num_runs * len(settings.methods) * sum(settings.budgets))
    track.step_seconds = work.part("step-seconds", track.time_steps)
    tuning: list[Record] = []
    runs: list[Record] = []
    for budget in settings.budgets:
        for name in settings.methods:
            [rate, *others] = settings.rates
            if others:
                tuning.append(tune(track, name, budget))
                rate = best_rate(tuning[-1])
            runs += [track.run(name, budget, rate, seed) for seed in settings.seeds]
    return {
        "measure": task.measure,
        "step_seconds": track.step_seconds,
        "tuning": tuning,
        "predicted": predictions(track, runs) if settings.predict else [],
        "runs": runs,
    }


def predictions(track: Track, runs: Sequence[Record]) -> list[Record]:
    """What theory expects of the depths that were drawn, over full steps, by each criterion.

    It knows each layer's smoothness along Muon's run with the same budget, of the tuning seed.
    """
    task, seed, found = track.task, track.settings.tuning_seed, []
    gather = jax.jit(task.gather)
    for budget in track.settings.budgets:
        of_budget = [run for run in runs if run["budget"] == budget]
        [rate, *_] = [run["rate"] for run in of_budget if run["method"] == REFERENCE]

        def measure(budget: int = budget, rate: float = rate) -> dict[str, list[float]]:
            track.work.say(f"measuring smoothness, budget {budget}")
            rows = itertools.islice(task.batches(seed), budget)
            batches = (gather(task.data, of_step) for of_step in rows)
            schedule = optax.linear_schedule(rate, 0.0, budget)
            return measured_smoothness(task.loss, task.params(seed), task.layers, batches, schedule)

        smoothness = track.work.part(f"smoothness-{budget}", measure)
        for name in track.settings.methods:
            if not name.startswith("drop_muon"):
                continue
            drawn = np.sum([run["depths"] for run in of_budget if run["method"] == name], axis=0)
            distribution = dm.fixed_depth((drawn / drawn.sum()).tolist())
            speed_ups = {
                of: dm.planning.predicted_speed_up(
                    distribution, smoothness[of], track.step_seconds[name], criterion=of
                )
                for of in CRITERIA
            }
            found.append({"method": name, "budget": budget, "smoothness": smoothness} | speed_ups)
    return found
