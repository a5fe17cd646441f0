"""The race itself: methods take turns on one machine, each chunk of steps timed."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from images import Images
from methods import Method, make_method, make_step
from models import CNN
from settings import MethodName, Settings

EVALUATION_BATCH = 1000
Report = Callable[[str, int], None]


@dataclasses.dataclass
class Run:
    """What one method did with one seed; an entry of each list for each evaluation."""

    method: MethodName
    seed: int
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of training alone, without compilation and evaluation."""
    train_accuracy: list[float] = dataclasses.field(default_factory=list)
    test_accuracy: list[float] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    """An entry for each step."""


@dataclasses.dataclass
class Contest:
    """Everything that the race measured."""

    runs: list[Run]
    steps_per_epoch: int
    compile_seconds: dict[MethodName, list[float]]
    """By depth."""
    step_seconds: dict[MethodName, list[float]]
    """Median by depth."""
    probabilities: dict[MethodName, list[list[float]]]
    """Of every depth, in the middle of each epoch; of the methods that draw one by the step."""
    depth_costs: list[float]
    """Seconds of a step at each depth, that the time-aware method knows of; empty without it."""


class Race:
    """The network, the data on the device, and the compiled steps of every method.

    The step of a method at a depth does not depend on the seed, so it is compiled once.
    """

    def __init__(self, settings: Settings, model: CNN, images: Images):
        self.settings = settings
        self.model = model
        self.data = jax.device_put(images)
        self.num_train = len(images.train_labels)
        self.steps_per_epoch = self.num_train // settings.batch_size
        self.num_steps = settings.epochs * self.steps_per_epoch
        self.eval_every = settings.eval_every or max(1, self.steps_per_epoch // 2)
        self._init = jax.jit(model.init)
        params = self.init_params(settings.seeds[0])
        self.layers = dm.layers_by_path(params, model.layer_patterns())
        self.executables: dict[MethodName, list[Callable[..., Any]]] = {}
        self.compile_seconds: dict[MethodName, list[float]] = {}
        self._evaluate = jax.jit(self._count)
        self.measured_costs: list[float] = []
        """What `depth_costs` has measured."""

    def init_params(self, seed: int) -> Any:
        """The same initial parameters for every method that has none of its own."""
        return self._init(jax.random.key(seed), self.data.train_images[:1])["params"]

    def batches(self, seed: int) -> np.ndarray:
        """The rows of each step's batch, the same for every method: each epoch a permutation."""
        generator = np.random.default_rng(seed)
        shape = (self.steps_per_epoch, self.settings.batch_size)
        used = self.steps_per_epoch * self.settings.batch_size
        epochs = [
            generator.permutation(self.num_train)[:used].reshape(shape)
            for _ in range(self.settings.epochs)
        ]
        return np.concatenate(epochs).astype(np.int32)

    def with_settings(self, settings: Settings) -> "Race":
        """The same network, data and batches for methods with other settings."""
        race = copy.copy(self)
        race.settings, race.executables, race.compile_seconds = settings, {}, {}
        return race

    def with_seeds(self, seeds: tuple[int, ...]) -> "Race":
        """The same race, compiled steps included, for other seeds."""
        race = copy.copy(self)
        race.settings = dataclasses.replace(self.settings, seeds=seeds)
        return race

    def method(self, name: MethodName, seed: int) -> Method:
        """A contestant of this race."""
        return make_method(
            name,
            self.settings,
            self.layers,
            self.model.roles(),
            num_steps=self.num_steps,
            seed=seed,
            depth_costs=self.depth_costs,
        )

    def depth_costs(self) -> list[float]:
        """Seconds of a Drop-Muon step at each depth, measured once, before anyone races."""
        if not self.measured_costs:
            runner = self.start("drop_muon_uniform", self.settings.seeds[0])
            steps = [make_step(self.model, runner.method, d) for d in range(self.layers.num_layers)]

            def step(*arguments: Any, depth: int) -> Any:
                return steps[depth](*arguments)

            jitted = jax.jit(step, static_argnames="depth", donate_argnums=(0, 1))
            costs = dm.planning.depth_cost(
                jitted, self.layers, *runner.arguments(0), measure="seconds"
            )
            self.measured_costs += costs.tolist()
        return self.measured_costs

    def start(self, name: MethodName, seed: int) -> "Runner":
        """A contestant at the start, with buffers of its own, which its steps may overwrite."""
        method = self.method(name, seed)
        params = self.init_params(seed)
        if method.init is not None:
            params = method.init(jax.random.key(seed), params)
        params, opt_state = jax.tree.map(jnp.array, (params, method.tx.init(params)))
        method.depth(0, opt_state)  # draws the first block of depths, which compiles
        batches = jax.device_put(self.batches(seed))
        return Runner(self, method, Run(name, seed), params, opt_state, batches)

    def compile(self, name: MethodName) -> None:
        """Compiles a method's step at each depth ahead of time, and runs each once."""
        runner = self.start(name, self.settings.seeds[0])
        self.executables[name], self.compile_seconds[name] = [], []
        for depth in range(runner.method.num_depths):
            step = make_step(self.model, runner.method, depth)
            start = time.perf_counter()
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*runner.arguments(0))
            self.executables[name].append(lowered.compile())
            self.compile_seconds[name].append(time.perf_counter() - start)
            runner.step(0, depth)
        jax.block_until_ready(runner.params)

    def _count(self, params: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits: Any = self.model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (logits.argmax(-1) == labels).sum(), losses.sum()

    def evaluate(self, params: Any, images: jax.Array, labels: jax.Array) -> tuple[float, float]:
        """Accuracy and mean loss over all images."""
        correct, loss = 0.0, 0.0
        for start in range(0, len(labels), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            counted = self._evaluate(params, images[rows], labels[rows])
            correct, loss = correct + float(counted[0]), loss + float(counted[1])
        return correct / len(labels), loss / len(labels)

    def measure_steps(self, repetitions: int = 9) -> dict[MethodName, list[float]]:
        """Median seconds of one blocked step at each depth, all methods and depths in turn."""
        seed = self.settings.seeds[0]
        runners: dict[MethodName, Runner] = {n: self.start(n, seed) for n in self.executables}
        samples: dict[MethodName, list[list[float]]] = {}
        for name, by_depth in self.executables.items():
            samples[name] = [[] for _ in by_depth]
        for repetition in range(repetitions):
            for name, runner in runners.items():
                for depth, sample in enumerate(samples[name]):
                    start = time.perf_counter()
                    runner.step(repetition % self.num_steps, depth)
                    jax.block_until_ready((runner.params, runner.opt_state))
                    sample.append(time.perf_counter() - start)
        medians: dict[MethodName, list[float]] = {}
        for name, of_depths in samples.items():
            medians[name] = [statistics.median(sample) for sample in of_depths]
        return medians


@dataclasses.dataclass
class Runner:
    """A contestant on its way."""

    race: Race
    method: Method
    run: Run
    params: Any
    opt_state: Any
    batches: jax.Array
    seconds: float = 0.0

    def arguments(self, index: int) -> tuple[Any, ...]:
        """What the compiled step takes."""
        images, labels = self.race.data.train_images, self.race.data.train_labels
        return (self.params, self.opt_state, images, labels, self.batches, np.int32(index))

    def step(self, index: int, depth: int) -> None:
        """One step, not waited for."""
        executable = self.race.executables[self.run.method][depth]
        self.params, self.opt_state = executable(*self.arguments(index))

    def train(self, first: int, last: int) -> None:
        """Steps from first to before last, timed until the device has finished them."""
        start = time.perf_counter()
        for index in range(first, last):
            depth = self.method.depth(index, self.opt_state)
            self.run.depths.append(depth)
            self.step(index, depth)
        jax.block_until_ready((self.params, self.opt_state))
        self.seconds += time.perf_counter() - start

    def evaluate(self, step: int) -> None:
        """Adds a point to the curves."""
        data = self.race.data
        train, loss = self.race.evaluate(self.params, data.train_images, data.train_labels)
        test, _ = self.race.evaluate(self.params, data.test_images, data.test_labels)
        self.run.steps.append(step)
        self.run.seconds.append(self.seconds)
        self.run.train_accuracy.append(train)
        self.run.test_accuracy.append(test)
        self.run.train_loss.append(loss)


def run_all(race: Race, report: Report = lambda text, steps: None) -> list[Run]:
    """Compiles everything, then lets the methods take turns, chunk by chunk.

    A chunk is the steps between two evaluations. Taking turns, whatever slows the machine for a
    while slows every method alike; who begins changes from chunk to chunk.

    Args:
        race: What is raced.
        report: Told what happens, and how many training steps have been done since it was last
            told; those that a shorter run leaves out count as done.
    """
    settings = race.settings
    for name in settings.methods:
        report(f"compiling {name}", 0)
        if name not in race.executables:
            race.compile(name)
    runs: list[Run] = []
    for seed in settings.seeds:
        runners = [race.start(name, seed) for name in settings.methods]
        for runner in runners:
            runner.evaluate(0)
        for turn, first in enumerate(range(0, race.num_steps, race.eval_every)):
            last = min(first + race.eval_every, race.num_steps)
            begin = turn % len(runners)
            for runner in runners[begin:] + runners[:begin]:
                end = min(last, runner.method.num_steps)
                if first < end:
                    runner.train(first, end)
                    runner.evaluate(end)
                accuracy = runner.run.test_accuracy[-1]
                report(f"seed {seed}, {runner.run.method}: test {accuracy:.1%}", last - first)
        runs += [runner.run for runner in runners]
    return runs


def hold_race(race: Race, report: Report = lambda text, steps: None) -> Contest:
    """All runs of a race, as :func:`run_all`, and what its single steps cost."""
    settings, runs = race.settings, run_all(race, report)
    report("timing single steps", 0)
    step_seconds = race.measure_steps()
    return Contest(
        runs,
        race.steps_per_epoch,
        race.compile_seconds,
        step_seconds,
        {name: _probabilities(race, name) for name in settings.methods if _draws(race, name)},
        race.measured_costs,
    )


def _draws(race: Race, name: MethodName) -> bool:
    reader = race.method(name, race.settings.seeds[0]).reader
    return reader is not None and isinstance(reader.sampler.distribution, dm.LayerDistribution)


def _probabilities(race: Race, name: MethodName) -> list[list[float]]:
    """Of each depth, in the middle of each epoch."""
    reader = race.method(name, race.settings.seeds[0]).reader
    assert reader is not None
    middles = [int((epoch + 0.5) * race.steps_per_epoch) for epoch in range(race.settings.epochs)]
    return [[float(p) for p in reader.sampler.probabilities(step)] for step in middles]
