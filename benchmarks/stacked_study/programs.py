"""The programs that are measured: gradients, whole steps and updates of a GPT."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dropmuon_jax as dm
from by_hand import logits_by_hand, muon_by_hand
from gpt import GPT
from stacked_study.flops import matmul_flops
from stacked_study.settings import POLICIES, Policy, Settings

DepthPart = Literal["gradient", "step"]
Part = Literal[DepthPart, "update"]
DepthForm = Literal["dynamic", "static"]
Form = Literal[DepthForm, "lax.scan", "all active", "by hand"]
SAVED: dict[Policy, Callable[..., bool] | None] = {
    "inputs": None,
    "everything": jax.checkpoint_policies.everything_saveable,
}
assert tuple(SAVED) == POLICIES
LEARNING_RATE = optax.linear_schedule(0.02, 0.0, 10_000)  # as in real runs, not to be folded away


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured."""

    part: Part
    """The gradient alone, the whole step, or the optimizer's update alone."""
    form: Form
    """The depth an argument of the program, or static; or another program without a depth: the
    gradient by lax.scan, rematerialized with policy "inputs"; the update of all layers, by this
    package or by hand, with all matrices of a stack at once."""
    policy: Policy | None
    """What a block saves; None for updates, which have no backward pass."""
    depth: int
    """The first active layer among all: 0 the embeddings, 1 the first block, num_blocks + 1 the
    head. Of gradients, where all layers but blocks are always differentiated, from 1 on."""


class Sample(NamedTuple):
    """One run of a program."""

    seconds: float
    processor_seconds: float
    """Of all cores together, without what other processes take meanwhile."""


class Program:
    """A compiled function with its arguments, of which it overwrites the first ones.

    Attributes:
        function: A result of `jax.jit` that returns the new values of `kept`, and more.
        kept: The arguments that it overwrites; other programs may have the same list.
        given: The other arguments.
    """

    def __init__(self, function: Any, kept: list[Any], *given: Any):
        self.function = function
        self.kept = kept
        self.given = given

    def compile(self) -> Any:
        """Its executable; `run` does not compile it again."""
        return self.function.lower(*self.kept, *self.given).compile()

    def flops(self) -> float:
        """Of its matrix products, each turn of a loop counted."""
        leaves = jax.tree.leaves((self.kept, self.given))
        traced = self.function.trace(*self.kept, *self.given)
        return matmul_flops(traced, [leaf for leaf in leaves if isinstance(leaf, jax.Array)])

    def run(self) -> Sample:
        """What one run takes."""
        start, processor_start = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(self.function(*self.kept, *self.given))
        sample = Sample(time.perf_counter() - start, time.process_time() - processor_start)
        self.kept[:] = out[: len(self.kept)]
        return sample


class Problem:
    """A GPT with its parameters, one batch of random tokens, and an optimizer."""

    def __init__(self, settings: Settings):
        self.settings = settings
        generator = np.random.default_rng(0)
        shape = settings.batch_size, settings.context + 1
        tokens = generator.integers(settings.vocabulary, size=shape, dtype=np.int32)
        self.batch = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
        model = self._model("inputs")
        self.params = jax.jit(model.init)(jax.random.key(0), self.batch[0][:1])["params"]
        self.layers = dm.layers_by_path(self.params, model.layer_patterns())
        self.tx = dm.drop_muon(LEARNING_RATE, self.layers)
        params = jax.tree.map(jnp.copy, self.params)
        self._of_steps = [params, self.tx.init(params)]  # which steps of all depths overwrite

    def programs(self) -> dict[Case, Program]:
        """All that is timed."""
        blocks = self.settings.num_blocks
        some_depths = sorted({1, 1 + blocks // 2, blocks})
        found = {} if self.settings.gradient_only else self.of_update()
        for policy in self.settings.policies:
            found |= self.by_depth("gradient", "dynamic", policy, range(1, blocks + 2))
            found |= self.by_depth("gradient", "static", policy, some_depths)
            found |= self.by_lax_scan(policy)
            if not self.settings.gradient_only:
                found |= self.by_depth("step", "dynamic", policy, range(blocks + 2))
                found |= self.by_depth("step", "static", policy, some_depths)
        return found

    def by_depth(
        self, part: DepthPart, form: DepthForm, policy: Policy, depths: Iterable[int]
    ) -> dict[Case, Program]:
        """The gradient or the step, at some depths among all layers."""
        model, layers, tx = self._model(policy), self.layers, self.tx

        def loss_fn(params: Any, batch: Any, stack_depth: Any) -> jax.Array:
            def logits_fn(p: Any) -> Any:
                return model.apply({"params": p}, batch[0], stack_depth)

            return self._loss(logits_fn, params, batch[1])

        def gradient(params: Any, batch: Any, depth: Any) -> Any:
            stack_depth = layers.stack_depth(depth, "blocks")
            return jax.value_and_grad(loss_fn)(params, batch, stack_depth)

        def step(params: Any, opt_state: Any, batch: Any, depth: Any) -> Any:
            mask = layers.mask(depth)
            loss, grads = dm.masked_value_and_grad(loss_fn)(
                params, batch, layers.stack_depth(depth, "blocks"), layer_mask=mask
            )
            updates, opt_state = tx.update(grads, opt_state, params, layer_mask=mask)
            return optax.apply_updates(params, updates), opt_state, loss

        static = ("depth",) if form == "static" else ()
        if part == "gradient":
            function = jax.jit(gradient, static_argnames=static)
            kept, given = [], (self.params, self.batch)
        else:
            function = jax.jit(step, donate_argnums=(0, 1), static_argnames=static)
            kept, given = self._of_steps, (self.batch,)
        return {
            Case(part, form, policy, depth): Program(
                function, kept, *given, depth if form == "static" else _traced(depth)
            )
            for depth in depths
        }

    def by_lax_scan(self, policy: Policy) -> dict[Case, Program]:
        """The gradient without this package."""
        model = self._model(policy)

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            def logits_fn(p: Any) -> Any:
                return logits_by_hand(model, p, [p["blocks"]], batch[0])

            return self._loss(logits_fn, params, batch[1])

        function = jax.jit(jax.value_and_grad(loss_fn))
        program = Program(function, [], self.params, self.batch)
        return {Case("gradient", "lax.scan", policy, 1): program}

    def of_update(self) -> dict[Case, Program]:
        """The update of the parameters, taken for gradients, at every depth; and of all layers."""

        def update(opt_state: Any, params: Any, grads: Any, depth: Any = 0) -> Any:
            mask = self.layers.mask(depth)
            updates, opt_state = self.tx.update(grads, opt_state, params, layer_mask=mask)
            return opt_state, updates

        def update_by_hand(opt_state: Any, params: Any, grads: Any) -> Any:
            updates, opt_state = by_hand.update(grads, opt_state, params)
            return opt_state, updates

        by_hand = muon_by_hand(LEARNING_RATE)
        function = jax.jit(update, donate_argnums=0)
        kept, given = [self.tx.init(self.params)], (self.params, self.params)
        found = {Case("update", "all active", None, 0): Program(function, kept, *given)}
        for depth in range(self.layers.num_layers):
            program = Program(function, kept, *given, _traced(depth))
            found[Case("update", "dynamic", None, depth)] = program
        function, kept = jax.jit(update_by_hand, donate_argnums=0), [by_hand.init(self.params)]
        found[Case("update", "by hand", None, 0)] = Program(function, kept, *given)
        return found

    def _model(self, policy: Policy) -> GPT:
        s = self.settings
        return GPT(
            s.vocabulary, s.width, s.num_heads, s.num_blocks, s.context, s.tied, SAVED[policy]
        )

    def _loss(self, logits_fn: Callable[[Any], Any], params: Any, labels: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda leaf: leaf.astype(self.settings.dtype), params)
        logits = logits_fn(params).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _traced(depth: int) -> jax.Array:
    """A depth that a program takes as an argument."""
    return jnp.asarray(depth, jnp.int32)
