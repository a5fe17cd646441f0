"""Runs: steps that are compiled once for all of them, until the budget is spent."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dropmuon_jax as dm
from comparing.methods import TITLES, Method
from comparing.settings import REFERENCE, CompareSettings, MethodName
from comparing.tasks import Task
from study import Record, Work

TURNS = 8  # of every step
STEPS_PER_TURN = 6  # in a row: one that follows a smaller step is up to a sixth faster


class Track:
    """A task, its methods, and their compiled steps."""

    def __init__(self, settings: CompareSettings, task: Task, work: Work):
        self.settings, self.task, self.work = settings, task, work
        self.methods = {name: Method(name, task, settings) for name in settings.methods}
        self.step_seconds: dict[str, list[float]] = {}
        """Of a step of each method at each depth; empty until they are timed."""
        self._steps: dict[Any, Callable[..., Any]] = {}

    def costs(self, method: Method) -> tuple[float, ...]:
        """Seconds of a step at each depth; until they are measured all are alike."""
        return tuple(self.step_seconds.get(method.name) or [1.0] * self.task.layers.num_layers)

    def take_step(self, method: Method, depth: int, *arguments: Any) -> Any:
        """A step at a depth, by a program that is compiled when it is first needed.

        Where layers are stacked, one program serves every depth.
        """
        static = None if self.task.layers.stacks else depth
        # What plans by costs is another program once they are known.
        key = method.kind, static, self.costs(method) if method.follows_the_run else None
        arguments = (*arguments, np.int32(depth))
        if key not in self._steps:
            step = jax.jit(method.step(static, self.costs(method)), donate_argnums=(0, 1))
            self._steps[key] = step.lower(*arguments).compile()
        return self._steps[key](*arguments)

    def time_steps(self) -> dict[str, list[float]]:
        """Seconds of one step at each depth among its like; all methods and depths take turns.

        The smallest of the turns, since whatever else the machine does only adds to it.
        """
        runs = {kind.kind: Run(self, kind, 1, 0.01, 0) for kind in self.methods.values()}
        samples: dict[tuple[str, int], list[float]] = {}
        for turn in range(1 + TURNS):  # the first compiles
            for kind, run in runs.items():
                for depth in range(run.method.num_depths):
                    said = "timing" if turn else "compiling"
                    self.work.say(f"{said} {TITLES[run.method.name]}, depth {depth}")
                    run.step(depth)
                    jax.block_until_ready((run.params, run.opt_state))
                    begin = time.perf_counter()
                    for _ in range(STEPS_PER_TURN if turn else 0):
                        run.step(depth)
                    jax.block_until_ready((run.params, run.opt_state))
                    seconds = (time.perf_counter() - begin) / STEPS_PER_TURN
                    samples.setdefault((kind, depth), []).extend([seconds] * bool(turn))
        return {
            name: [min(samples[method.kind, depth]) for depth in range(method.num_depths)]
            for name, method in self.methods.items()
        }

    def cost(self, method: Method, depth: int) -> float:
        """What a step spends, in full steps of Muon."""
        match self.settings.unit:
            case "steps":
                return 1.0
            case "gradients":
                return float(method.gradients_per_step)
            case "seconds":
                return self.step_seconds[method.name][depth] / self.step_seconds[REFERENCE][0]

    def expected_steps(self, method: Method, budget: float) -> int:
        """Of a run, for schedules of depths that want to know it."""
        costs, resolution = [self.cost(method, d) for d in range(method.num_depths)], 100
        if len(costs) == 1 or method.follows_the_run:
            return math.ceil(budget / statistics.fmean(costs))
        sampler = method.sampler(0, resolution, costs)
        mean = np.mean([sampler.probabilities(k) for k in range(resolution)], axis=0) @ costs
        return math.ceil(budget / float(mean))

    def run(self, name: MethodName, budget: float, rate: float, seed: int) -> Record:
        """A whole run, from disk if it has been finished."""
        part = f"{name}-{budget:g}-{rate:g}-{seed}"
        found = self.work.part(part, lambda: Run(self, self.methods[name], budget, rate, seed).go())
        self.work.say(f"{part} done", done=budget)
        return found


class Run:
    """A method on its way."""

    def __init__(self, track: Track, method: Method, budget: float, rate: float, seed: int):
        self.track, self.method, self.seed = track, method, seed
        self.budget, self.rate = budget, rate
        num_steps = track.expected_steps(method, budget) if track.step_seconds else 1
        sampler = method.sampler(seed, num_steps, track.costs(method))
        params = method.initial(seed)
        opt_state = method.optimizer(rate, track.settings.auxiliary_rate, sampler).init(params)
        # Buffers of its own, which its steps may overwrite.
        self.params, self.opt_state = jax.tree.map(jnp.array, (params, opt_state))
        self.batches = track.task.batches(seed)
        dm.sampling.PlanReader(sampler).depth(0, self.opt_state)  # compiles, and is not timed
        self.reader = dm.sampling.PlanReader(sampler)
        self.spent = 0.0

    def step(self, depth: int) -> None:
        """One step, not waited for, with learning rates that fall as the budget is spent."""
        left = max(0.0, 1 - self.spent / self.budget)
        own = self.method.rate_factor * self.rate * (1.0 if self.method.has_own_schedule else left)
        auxiliary = self.track.settings.auxiliary_rate * left
        arguments = (
            *(self.params, self.opt_state, self.track.task.data, next(self.batches)),
            *(np.float32(own), np.float32(auxiliary), np.uint32(self.seed)),
        )
        self.params, self.opt_state = self.track.take_step(self.method, depth, *arguments)

    def go(self) -> Record:
        """Trains until the budget is spent, and returns lists with an entry for each evaluation."""
        track, method = self.track, self.method
        title = (
            f"{TITLES[method.name]}, budget {self.budget:g}, rate {self.rate:g}, seed {self.seed}"
        )
        lists: dict[str, list[Any]] = {"spent": [], "steps": [], "gradients": [], "seconds": []}
        measured: dict[str, list[float]] = {"train": [], "validation": [], "test": []}
        depths, steps, seconds = np.zeros(method.num_depths, int), 0, 0.0
        evaluations = np.linspace(0, self.budget, track.settings.num_evaluations + 1)
        for target in evaluations:
            begin = time.perf_counter()
            while self.spent < target - 1e-6 * self.budget:
                depth = self.reader.depth(steps, self.opt_state) if method.drops_layers else 0
                self.step(depth)
                self.spent += track.cost(method, depth)
                depths[depth] += 1
                steps += 1
            jax.block_until_ready((self.params, self.opt_state))
            seconds += time.perf_counter() - begin
            for name, value in track.task.evaluate(self.params).items():
                measured[name].append(value)
            numbers = self.spent, steps, steps * method.gradients_per_step, seconds
            for entries, number in zip(lists.values(), numbers, strict=True):
                entries.append(number)
            track.work.say(f"{title}: test {track.task.measure} {measured['test'][-1]:.4f}")
        return {
            "method": method.name,
            "budget": self.budget,
            "rate": self.rate,
            "seed": self.seed,
            **lists,
            **measured,
            "depths": depths.tolist(),
        }
