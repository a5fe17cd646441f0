"""Training a method: its compiled step, and its curves."""

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
from models import Transformer
from momentum_study.methods import MethodName, make_momentum, make_optimizer, spending
from momentum_study.settings import Settings
from text import Text, draw_starts, even_windows


@dataclasses.dataclass
class Run:
    """What one method did with one seed; an entry of each list for each evaluation."""

    method: MethodName
    batch_size: int
    learning_rate: float
    seed: int
    steps: list[int] = dataclasses.field(default_factory=list)
    evaluations: list[int] = dataclasses.field(default_factory=list)
    """Gradients so far of one batch of `batch_size`, wherever they were taken."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of training alone, without compilation and evaluation."""
    validation_loss: list[float] = dataclasses.field(default_factory=list)
    """Infinite where the run has diverged, as `test_loss`."""
    test_loss: list[float] = dataclasses.field(default_factory=list)


class Study:
    """The network, the text on the device, and the compiled step of every method.

    The step depends on method and batch size alone, so it is compiled once for each pair.
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
        self.model = Transformer(
            len(text.alphabet), settings.width, settings.num_heads, settings.num_blocks
        )
        self.compile_seconds: dict[tuple[MethodName, int], float] = {}
        self._executables: dict[tuple[MethodName, int], Callable[..., Any]] = {}
        self._init = jax.jit(self.model.init)
        self._evaluate = jax.jit(self._loss)

    def num_steps(self, method: MethodName) -> int:
        """Of a whole run."""
        return self.settings.num_steps * spending(method).steps

    def starts(self, method: MethodName, batch_size: int, seed: int) -> np.ndarray:
        """Where the windows of each step start: every method goes through the same batches."""
        num_steps, spent = self.num_steps(method), spending(method)
        starts = draw_starts(
            seed,
            num_batches=num_steps * spent.batches,
            batch_size=batch_size,
            num_starts=self.num_starts,
        )
        return starts.reshape(num_steps, spent.batches * batch_size)

    def start(
        self, method: MethodName, batch_size: int, learning_rate: float, seed: int
    ) -> "Runner":
        """A method at the start, with buffers of its own, which its steps overwrite."""
        no_tokens = jnp.zeros((1, self.settings.context), jnp.int32)
        params = self._init(jax.random.key(seed), no_tokens)["params"]
        opt_state = self._optimizer(method, learning_rate).init(params)
        params, opt_state = jax.tree.map(jnp.array, (params, opt_state))
        run = Run(method, batch_size, learning_rate, seed)
        starts = jax.device_put(self.starts(method, batch_size, seed))
        return Runner(self, run, params, opt_state, starts)

    def executable(self, runner: "Runner") -> Callable[..., Any]:
        """The compiled step of a runner, for every seed and learning rate."""
        key = runner.run.method, runner.run.batch_size
        if key not in self._executables:
            begin = time.perf_counter()
            step = jax.jit(self._step_function(runner.run.method), donate_argnums=(0, 1))
            self._executables[key] = step.lower(*runner.arguments(0)).compile()
            self.compile_seconds[key] = time.perf_counter() - begin
        return self._executables[key]

    def evaluate(self, params: Any) -> dict[str, float]:
        """Validation and test loss; infinite where they are no number."""
        losses = {
            name: float(self._evaluate(params, windows))
            for name, windows in self.eval_windows.items()
        }
        return {name: loss if math.isfinite(loss) else math.inf for name, loss in losses.items()}

    def _optimizer(
        self, method: MethodName, learning_rate: Any
    ) -> optax.GradientTransformationExtraArgs:
        settings = self.settings
        return make_optimizer(
            make_momentum(method, decay=settings.decay, q=settings.q),
            learning_rate=learning_rate,
            auxiliary_learning_rate=settings.auxiliary_learning_rate,
            num_steps=self.num_steps(method),
        )

    def _loss(self, params: Any, windows: jax.Array) -> jax.Array:
        """Mean cross-entropy in nats a character."""
        logits: Any = self.model.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def _step_function(self, method: MethodName) -> Callable[..., Any]:
        def step(params, opt_state, tokens, starts, index, learning_rate):
            windows = tokens[starts[index][:, None] + np.arange(self.window)]
            tx = self._optimizer(method, learning_rate)
            if spending(method).points == 1:
                grads = jax.grad(self._loss)(params, windows)
                updates, opt_state = tx.update(grads, opt_state, params)
            else:
                prev_params = dm.prev_params(opt_state, params)
                _, (grads, prev_grads) = dm.masked_value_and_grad_pair(self._loss)(
                    params, prev_params, windows, layer_mask=None
                )
                updates, opt_state = tx.update(
                    grads, opt_state, params, prev_params_grads=prev_grads
                )
            return optax.apply_updates(params, updates), opt_state

        return step


@dataclasses.dataclass
class Runner:
    """A method on its way."""

    study: Study
    run: Run
    params: Any
    opt_state: Any
    starts: jax.Array
    seconds: float = 0.0

    def arguments(self, index: int) -> tuple[Any, ...]:
        """What the compiled step takes."""
        rate = np.float32(self.run.learning_rate)
        tokens = self.study.train_tokens
        return (self.params, self.opt_state, tokens, self.starts, np.int32(index), rate)

    def train(self, first: int, last: int) -> None:
        """Steps from first to before last, timed until the device has finished them."""
        executable = self.study.executable(self)
        begin = time.perf_counter()
        for index in range(first, last):
            self.params, self.opt_state = executable(*self.arguments(index))
        jax.block_until_ready((self.params, self.opt_state))
        self.seconds += time.perf_counter() - begin

    def evaluate(self, step: int) -> None:
        """Adds a point to the curves."""
        losses = self.study.evaluate(self.params)
        self.run.steps.append(step)
        self.run.evaluations.append(step * spending(self.run.method).evaluations_per_step)
        self.run.seconds.append(self.seconds)
        self.run.validation_loss.append(losses["validation"])
        self.run.test_loss.append(losses["test"])
