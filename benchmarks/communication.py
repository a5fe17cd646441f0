"""What compression and dropped layers save of what workers send, at equal steps and at equal loss.

python benchmarks/communication.py --output-dir results

The workers run side by side on one device. What they send is counted by `payload_bits`, which the
tests of the package compare with compiled programs on devices of their own.
"""

import functools
import itertools
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from pydantic import Field

import dropmuon_jax as dm
from communicating.task import (
    METHODS,
    GPTSettings,
    Task,
    make_optimizer,
    make_task,
    payload_bytes,
)
from drawing import draw_spread, finish, legend, new_table, show, show_spread
from records import rounded
from study import Count, Distinct, Positive, Record, Study, Whole, Work

MethodName = Literal[
    "muon",
    "natural8",
    "top10_natural",
    "rank15",
    "rank15_natural8",
    "rank15_natural8_server",
    "drop_muon",
    "drop_natural8",
    "drop_rank15_natural8",
]


class CommunicationSettings(GPTSettings):
    """The arguments of the study."""

    methods: Distinct[MethodName] = get_args(MethodName)
    """Who takes part. muon must, with whom all are compared."""
    num_steps: Count = 300
    """The same for all methods, and so the same text. Learning rates fall linearly to 0."""
    longer: Annotated[float, Field(ge=1)] = 2.5
    """How many times as many steps a second run of each other method has, with its own decay of the
    rate, in which it may come to Muon's loss."""
    num_evaluations: Count = 20
    """On the way of each run, at equal distances."""
    rates: Distinct[Positive] = (0.02, 0.05)
    """Of the matrices, of which each method takes the best by the validation loss of the first
    seed."""
    auxiliary_rate: Positive = 0.2
    """Of Adam on everything else, times the rate of the matrices."""
    seeds: Distinct[Whole] = (0, 1, 2)
    """Of parameters, batches and depths."""


class Runs:
    """The runs of one method, whose steps are compiled once for all rates and seeds."""

    def __init__(self, name: str, task: Task, settings: CommunicationSettings, work: Work):
        self.method, self.task, self.settings, self.work = METHODS[name], task, settings, work
        self.step_at = functools.cache(self._step_at)
        depths = range(task.layers.num_layers)
        self.bytes_by_depth = [payload_bytes(self.method, task, depth) for depth in depths]

    def _optimizer(self, rate: Any) -> Any:
        of = self.settings
        return make_optimizer(
            self.method, self.task, rate, of.num_workers, auxiliary_rate=of.auxiliary_rate
        )

    def _step_at(self, depth: int) -> Any:
        def step(params: Any, state: Any, batches: Any, rate: Any) -> Any:
            gradient = jax.grad(lambda of, batch: self.task.loss(of, batch, depth))
            grads = jax.vmap(gradient, in_axes=(None, 0))(params, batches)
            updates, state = self._optimizer(rate).update(grads, state, params, depth=depth)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1))

    def train(self, rate: float, seed: int, num_steps: int) -> list[list[float]]:
        """Steps, bytes sent, and losses on the way: validation at W, test at W and at X."""
        task, method = self.task, self.method
        at = np.linspace(0, num_steps, self.settings.num_evaluations + 1).round().astype(int)
        distribution = dm.uniform_depth() if method.drops else dm.full_depth()
        sampler = dm.DepthSampler(task.layers, distribution, seed=seed)
        params = task.params(seed)
        state, sent, curve = self._optimizer(1.0).init(params), 0, []
        for i in range(num_steps + 1):
            if i in at:
                of_w = of_x = task.evaluate(params)
                if method.server is not None:
                    of_x = task.evaluate(dm.compression.server_params(state, params))
                curve.append([i, sent, of_w["validation"], of_w["test"], of_x["test"]])
            if i == num_steps:
                break
            depth, falling = sampler.depth(i), jnp.float32(rate * (1 - i / num_steps))
            params, state = self.step_at(depth)(params, state, task.batches(seed, i), falling)
            sent += self.bytes_by_depth[depth]
            self.work.say(f"{method.title}, rate {rate}, seed {seed}", done=1)
        return rounded(curve, 6)


def run(settings: CommunicationSettings, work: Work) -> Record:
    """Trains by each method at each rate with the first seed, and with all seeds at the best."""
    if "muon" not in settings.methods:
        raise SystemExit("--methods lacks muon, with which all are compared.")
    task, methods = make_task(settings), {}
    num_steps, longer = settings.num_steps, round(settings.longer * settings.num_steps)
    count = len(settings.methods) * (len(settings.rates) + len(settings.seeds) - 1)
    work.expect(count * num_steps + (len(settings.methods) - 1) * len(settings.seeds) * longer)
    for name in settings.methods:
        runs = Runs(name, task, settings, work)

        def curve(rate: float, seed: int, steps: int, name: str = name, runs: Runs = runs) -> Any:
            return work.part(f"{name}_{rate}_{seed}_{steps}", lambda: runs.train(rate, seed, steps))

        first = settings.seeds[0]
        found = [[rate, curve(rate, first, num_steps)[-1][2]] for rate in settings.rates]
        best = min((one for one in found if one[1] is not None), key=lambda one: one[1])[0]
        methods[name] = {
            "validation_by_rate": found,
            "rate": best,
            "bytes_by_depth": runs.bytes_by_depth,
            "curves": [curve(best, seed, num_steps) for seed in settings.seeds],
            "longer": [curve(best, seed, longer) for seed in settings.seeds]
            if name != "muon"
            else [],
        }
    return {"text": task.text, "methods": methods}


def first_below(curve: list[list[float]], loss: float) -> list[float] | None:
    """Steps and bytes when the test loss at W is first at most `loss`, between two evaluations."""
    for before, after in itertools.pairwise(curve):
        if after[3] is not None and after[3] <= loss:
            part = min(1.0, max(0.0, (before[3] - loss) / max(1e-12, before[3] - after[3])))
            return [x + part * (y - x) for x, y in zip(before[:2], after[:2], strict=True)]
    return None


def targets(record: Record) -> list[float]:
    """Of each seed the test loss of Muon at 90 % of its run."""
    return [
        float(np.interp(0.9 * curve[-1][0], [of[0] for of in curve], [of[3] for of in curve]))
        for curve in record["methods"]["muon"]["curves"]
    ]


def tables(record: Record) -> Any:
    """At equal steps, and at the loss that Muon has at 90 % of its run."""
    reached = targets(record)
    muon = [
        first_below(curve, loss)
        for curve, loss in zip(record["methods"]["muon"]["curves"], reached, strict=True)
    ]
    table = new_table(
        f"Test loss after {record['settings']['num_steps']} steps; in longer runs, steps and bytes "
        "to Muon's loss at 90 %",
        *("method", "bytes/step", "loss at W", "at X", "steps", "bytes saved"),
    )
    for name, of in record["methods"].items():
        curves = of["curves"]
        until = of["longer"] or curves
        found = [first_below(curve, loss) for curve, loss in zip(until, reached, strict=True)]
        steps = [None if x is None else x[0] for x in found]
        saved = [
            None if x is None or y is None else y[1] / x[1]
            for x, y in zip(found, muon, strict=True)
        ]
        mean = curves[0][-1][1] / curves[0][-1][0]
        table.add_row(
            METHODS[name].title,
            f"{mean:,.0f}",
            show_spread([curve[-1][3] for curve in curves], 3),
            show(float(np.median([curve[-1][4] for curve in curves])), 3),
            show_spread(steps, 0),
            show_spread(saved, 1, "×"),
        )
    return [table]


def figures(record: Record) -> Any:
    """The test loss by steps, and of the longer runs by bytes."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for index, (name, of) in enumerate(record["methods"].items()):
        for panel, column in zip(panels, (0, 1), strict=True):
            curves = (of["longer"] if column else []) or of["curves"]
            losses = [[curve[i][3] for curve in curves] for i in range(1, len(curves[0]))]
            x = [
                float(np.mean([curve[i][column] for curve in curves]))
                for i in range(1, len(curves[0]))
            ]
            draw_spread(panel, x, losses, index, METHODS[name].title)
    panels[1].set_xscale("log")
    finish(panels[0], x="steps", y="test loss at W, nats a character")
    finish(panels[1], x="bytes that one worker has sent")
    legend(figure, panels[0])
    return {"": figure}


STUDY = Study(
    "communication", CommunicationSettings, run, tables, figures, ("rates", "seeds", "methods")
)

if __name__ == "__main__":
    STUDY.main()
