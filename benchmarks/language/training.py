"""Training a method: its one program for any number of steps at any depths, and its curves."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from gpt import GPT
from language.methods import Method, MethodName, make_method
from language.settings import Settings
from text import Text, draw_starts, even_windows

STACK = "blocks"


@dataclasses.dataclass
class Run:
    """What one method did with one seed; an entry of each list for each evaluation."""

    method: MethodName
    learning_rate: float
    seed: int
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of training alone, without compilation and evaluation."""
    validation_loss: list[float] = dataclasses.field(default_factory=list)
    """Infinite where the run has diverged, as `test_loss`."""
    test_loss: list[float] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    """The shallowest layer that is updated; an entry for each step."""


class Race:
    """The network, the text on the device, and the compiled program of every method.

    The program takes the steps between two evaluations, in one `lax.scan` that draws the depths.
    Learning rate, seed and the number of the first step are its arguments, so it is compiled once.
    """

    def __init__(self, settings: Settings, text: Text):
        self.settings = settings
        self.window = settings.context + 1  # the last character is only predicted
        self.num_starts = len(text.train) - settings.context
        if self.num_starts < 1:
            raise SystemExit(
                f"--context is {settings.context}, and there are only {len(text.train)} "
                "characters to train with."
            )
        self.train_tokens = jax.device_put(text.train)
        blocks = {"validation": text.validation, "test": text.test}
        self.eval_windows = {
            name: jax.device_put(even_windows(name, block, settings.num_eval_windows, self.window))
            for name, block in blocks.items()
        }
        self.model = GPT(
            len(text.alphabet),
            settings.width,
            settings.num_heads,
            settings.num_blocks,
            settings.context,
            tied=settings.tied,
        )
        self._init = jax.jit(self.model.init)
        self.layers = dm.layers_by_path(self.init_params(0), self.model.layer_patterns())
        self.num_turns = settings.num_steps // settings.eval_every
        self.measured_costs: list[float] = []
        """What `depth_costs` has measured."""
        self.compile_seconds: dict[MethodName, list[float]] = {}
        """An entry for each compilation."""
        self._executables: dict[MethodName, Callable[..., Any]] = {}
        self._evaluate = jax.jit(self._loss)

    def init_params(self, seed: int) -> Any:
        """The same for every method."""
        no_tokens = jnp.zeros((1, self.settings.context), jnp.int32)
        return self._init(jax.random.key(seed), no_tokens)["params"]

    def steps_per_turn(self, name: MethodName) -> int:
        """Between two evaluations."""
        settings = self.settings
        factors = {"muon_short": settings.short_run, "drop_muon_long": settings.long_run}
        return max(1, round(settings.eval_every * factors.get(name, 1.0)))

    def num_steps(self, name: MethodName) -> int:
        """Of a whole run."""
        return self.num_turns * self.steps_per_turn(name)

    def starts(self, name: MethodName, seed: int) -> np.ndarray:
        """Where the windows of each step start, (steps, batch size): the same for every method."""
        return draw_starts(
            seed,
            num_batches=self.num_steps(name),
            batch_size=self.settings.batch_size,
            num_starts=self.num_starts,
        )

    def start(self, name: MethodName, learning_rate: float, seed: int) -> "Runner":
        """A method at the start, with buffers of its own, which its steps overwrite."""
        params = self.init_params(seed)
        opt_state = self.method(name, learning_rate, seed).tx.init(params)
        params, opt_state = jax.tree.map(jnp.array, (params, opt_state))
        run = Run(name, learning_rate, seed)
        return Runner(self, run, params, opt_state, self.starts(name, seed))

    def method(self, name: MethodName, learning_rate: Any, seed: Any) -> Method:
        """A contestant of this race."""
        settings = self.settings
        return make_method(
            name,
            self.layers,
            learning_rate=learning_rate,
            auxiliary_learning_rate=settings.auxiliary_learning_rate,
            decay=settings.decay,
            alpha=settings.alpha,
            num_steps=self.num_steps(name),
            seed=seed,
            depth_costs=self.depth_costs,
        )

    def depth_costs(self) -> list[float]:
        """Seconds of a Drop-Muon step at each depth, measured once, before anyone races.

        Of steps with a static depth, which take as long as those of the race, with a traced one.
        """
        if not self.measured_costs:
            runner = self.start("drop_muon_uniform", 0.01, 0)
            tx, layers = self.method("drop_muon_uniform", 0.01, 0).tx, self.layers

            def step(params, opt_state, windows, depth):
                mask = layers.mask(depth)
                _, grads = dm.masked_value_and_grad(self._loss)(
                    params, windows, layers.stack_depth(depth, STACK), layer_mask=mask
                )
                updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
                return optax.apply_updates(params, updates), opt_state

            jitted = jax.jit(step, static_argnames="depth", donate_argnums=(0, 1))
            windows = self.train_tokens[runner.starts[0][:, None] + np.arange(self.window)]
            arguments = runner.params, runner.opt_state, windows
            costs = dm.planning.depth_cost(jitted, layers, *arguments, measure="seconds")
            self.measured_costs += costs.tolist()
        return self.measured_costs

    def executable(self, runner: "Runner") -> Callable[..., Any]:
        """The compiled steps of a runner, for every seed and learning rate."""
        name = runner.run.method
        if name not in self._executables:
            begin = time.perf_counter()
            program = jax.jit(self._turn_function(name), donate_argnums=(0, 1))
            self._executables[name] = program.lower(*runner.arguments()).compile()
            seconds = time.perf_counter() - begin
            self.compile_seconds.setdefault(name, []).append(seconds)
        return self._executables[name]

    def evaluate(self, params: Any) -> dict[str, float]:
        """Validation and test loss; infinite where they are no number."""
        losses = {
            name: float(self._evaluate(params, windows))
            for name, windows in self.eval_windows.items()
        }
        return {name: loss if math.isfinite(loss) else math.inf for name, loss in losses.items()}

    def _loss(self, params: Any, windows: jax.Array, depth: int | jax.Array = 0) -> jax.Array:
        """Mean cross-entropy in nats a character; differentiated from a depth of the stack on."""
        logits: Any = self.model.apply({"params": params}, windows[:, :-1], depth)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def _turn_function(self, name: MethodName) -> Callable[..., Any]:
        layers = self.layers

        def turn(params, opt_state, tokens, starts, first, learning_rate, seed):
            method = self.method(name, learning_rate, seed)

            def step(carry, batch):
                params, opt_state = carry
                count, starts = batch
                windows = tokens[starts[:, None] + np.arange(self.window)]
                depth = method.depth(count, opt_state)
                mask = layers.mask(depth)
                _, grads = dm.masked_value_and_grad(self._loss)(
                    params, windows, layers.stack_depth(depth, STACK), layer_mask=mask
                )
                updates, opt_state = method.tx.update(grads, opt_state, params, layer_mask=mask)
                return (optax.apply_updates(params, updates), opt_state), depth

            counts = first + np.arange(len(starts), dtype=np.int32)
            carry, depths = jax.lax.scan(step, (params, opt_state), (counts, starts))
            return *carry, depths

        return turn


@dataclasses.dataclass
class Runner:
    """A method on its way."""

    race: Race
    run: Run
    params: Any
    opt_state: Any
    starts: np.ndarray
    seconds: float = 0.0
    num_steps: int = 0
    """Taken so far."""

    def arguments(self) -> tuple[Any, ...]:
        """What the compiled program takes, for the next turn."""
        starts = self.starts[self.num_steps :][: self.race.steps_per_turn(self.run.method)]
        numbers = (
            np.int32(self.num_steps),
            np.float32(self.run.learning_rate),
            np.uint32(self.run.seed),
        )
        return (self.params, self.opt_state, self.race.train_tokens, starts, *numbers)

    def train(self) -> None:
        """The steps to the next evaluation, timed until the device has finished them."""
        executable, arguments = self.race.executable(self), self.arguments()
        begin = time.perf_counter()
        self.params, self.opt_state, depths = jax.block_until_ready(executable(*arguments))
        self.seconds += time.perf_counter() - begin
        self.num_steps += len(depths)
        self.run.depths += np.asarray(depths).tolist()

    def evaluate(self) -> None:
        """Adds a point to the curves."""
        losses = self.race.evaluate(self.params)
        self.run.steps.append(self.num_steps)
        self.run.seconds.append(self.seconds)
        self.run.validation_loss.append(losses["validation"])
        self.run.test_loss.append(losses["test"])
