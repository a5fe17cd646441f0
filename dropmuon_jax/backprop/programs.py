"""Programs of steps: what they are given and return, what depths share, how all are compiled."""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from dropmuon_jax.backprop.calls import refuse_traced

_COMMITTED, _WEAK = operator.attrgetter("committed"), operator.attrgetter("weak_type")


class ChangingOnly:
    """A step whose program is given what it changes, to overwrite it, and returns only that.

    What comes out as it went in, the parameters and the momentum of frozen layers, is handed on
    without the executable: as a donated argument and a result it would cost a microsecond a leaf.

    Args:
        step: A function of `(carried, others, static)` that returns a new `carried` and more.
        carried: To trace it with; shapes do as well.
        others: Likewise.
        static: What it is compiled for.
        donate: Whether what changes is overwritten.
        shardings: Of each leaf of `carried`, or None; and of the second result.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        carried: Any,
        others: Any,
        static: Any,
        *,
        donate: bool,
        shardings: tuple[Sequence[Any] | None, Any],
    ):
        whole: Any = jax.jit(step, static_argnums=2, inline=True)
        program = whole.trace(carried, others, static).jaxpr.jaxpr
        tree = jax.tree.structure(carried)
        self._changes = tuple(
            new is not old
            for new, old in zip(program.outvars[: tree.num_leaves], program.invars, strict=False)
        )
        self._stays = tuple(not changes for changes in self._changes)

        def train_step(changing: list[Any], kept: list[Any], others: Any, static: Any) -> Any:
            before = jax.tree.unflatten(tree, self._merge(changing, kept))
            after, more = whole(before, others, static)  # as traced above: not traced again
            return list(compress(jax.tree.leaves(after), self._changes)), more

        options: dict[str, Any] = {"donate_argnums": 0 if donate else ()}
        of_leaves, of_more = shardings
        if of_leaves is not None:
            of_changing, of_kept = self._split(of_leaves)
            options["in_shardings"] = of_changing, of_kept, None
            options["out_shardings"] = of_changing, of_more
        self._jitted: Any = jax.jit(train_step, static_argnums=3, **options)

    def __call__(self, leaves: Sequence[Any], others: Any, static: Any) -> tuple[list[Any], Any]:
        """The leaves of the new `carried`, and the step's second result."""
        changing, kept = self._split(leaves)
        changed, more = self._jitted(changing, kept, others, static)
        return self._merge(changed, kept), more

    def trace(self, leaves: Sequence[Any], others: Any, static: Any) -> jax.stages.Traced:
        """The program, for arrays or for their shapes."""
        return self._jitted.trace(*self._split(leaves), others, static)

    def lower(self, leaves: Sequence[Any], others: Any, static: Any) -> list[jax.stages.Lowered]:
        """What is to be compiled."""
        return [self.trace(leaves, others, static).lower()]

    def _split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return list(compress(leaves, self._changes)), list(compress(leaves, self._stays))

    def _merge(self, changing: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        of_each = iter(kept), iter(changing)
        return [next(of_each[changes]) for changes in self._changes]


class SharedGradient:
    """The gradient of a step, traced for one draw and cut down to later ones.

    Of a gradient with more active layers, that with fewer is what is left without the results of
    the others and all that only these need, such as the backward pass below. (Where the loss has a
    `jax.custom_vjp` below, its forward rule runs, as in the gradient with more layers.)

    Args:
        gradient: A function of `(carried, others, static)`, where `static` begins with the active
            layers. It returns a tuple of gradients like the parameters, each zero at inactive
            leaves, and more that does not depend on which are active.
        mask: A function from active layers to a tree of booleans like the parameters.
        takes_depth: Whether the loss is given the depth, and so may be another one at each.
    """

    def __init__(
        self, gradient: Callable[..., Any], mask: Callable[[Any], Any], *, takes_depth: bool
    ):
        self._gradient, self._mask, self._takes_depth = gradient, mask, takes_depth
        self._programs: dict[Any, Any] = {}

    def __call__(self, carried: Any, others: Any, static: Any) -> Any:
        """What `gradient` returns, of arguments that are being traced."""
        if self._takes_depth:
            return self._gradient(carried, others, static)
        active, *rest = static
        of_more = (
            program
            for (known, *of), program in self._programs.items()
            if of == rest and all(map(operator.le, active, known))
        )
        if static in self._programs or (wider := next(of_more, None)) is None:
            program = self._programs.get(static)
            program = program or jax.jit(partial(self._gradient, static=static), inline=True)
            result = program(carried, others)
            self._programs[static] = program  # now that it has been traced without an error
            return result
        traced = wider.trace(carried, others)
        (grads, *_), jaxpr = traced.out_info, traced.jaxpr
        # Printing a gradient is not cut away; and a second gradient, where only active layers are
        # at their previous parameters, is no part of another one.
        if jaxpr.effects or len(grads) > 1:
            return self._gradient(carried, others, static)
        results, tree = jax.tree.flatten(traced.out_info)
        of_grads = jax.tree.leaves(self._mask(active))
        is_kept = [*of_grads, *[True] * (len(results) - len(of_grads))]
        cut, is_used = dce_jaxpr(jaxpr.jaxpr, is_kept)
        inputs = compress(jax.tree.leaves((carried, others)), is_used)
        kept = iter(jaxpr_as_fun(ClosedJaxpr(cut, jaxpr.consts))(*inputs))
        params = jax.tree.leaves(carried[0])
        return tree.unflatten(
            next(kept) if keep else jnp.zeros_like(params[i]) for i, keep in enumerate(is_kept)
        )


def shardings_of(carried: Sequence[Any], shardings: Any) -> tuple[list[Any] | None, Any]:
    """Of each leaf that is carried on, and of the loss, from `out_shardings`."""
    if shardings is None:
        return None, None
    of_loss = shardings[2] if len(shardings) == 3 else None
    of_leaves: list[Any] = []
    for of_part, part in zip((*shardings[:2], None), carried, strict=True):
        if of_part is None:
            of_leaves += [None] * len(jax.tree.leaves(part))
        else:
            of_leaves += jax.tree.leaves(jax.tree.broadcast(of_part, part))
    return of_leaves, of_loss


def as_returned(leaves: list[Any], tree: Any, others: Any, shardings: Any) -> list[Any]:
    """The leaves of what steps carry on, in the types and places in which they return it.

    So the first step is compiled for all: arrays are strongly typed, and lie where `shardings` say
    or on the device on which another argument has been put. No array is there twice, as tied and
    cloned ones are, since it cannot be donated twice.
    """
    if _is_as_returned(leaves, others, shardings):
        return leaves
    if any(getattr(x, "weak_type", False) for x in leaves):
        leaves = list(map(_strong, leaves))
    if len({*map(id, leaves)}) < len(leaves):
        leaves = list(map(_once(set()), leaves))
    if all(map(_is_put, leaves)):
        return leaves
    if shardings is not None:
        *parts, rest = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves((*map(_put, parts, shardings), rest))
    put = list(filter(_is_put, [*leaves, *jax.tree.leaves(others)]))
    devices = set().union(*(x.sharding.device_set for x in put))
    if len(devices) != 1:  # with arrays on several, JAX says what does not fit
        return leaves
    return _put(leaves, jax.device_put(np.int32(0), *devices).sharding)


def _is_as_returned(leaves: Sequence[Any], others: Any, shardings: Any) -> bool:
    """Whether there is nothing to do: asked in every step, and so by loops that run in C."""
    try:
        is_put, is_weak = set(map(_COMMITTED, leaves)), any(map(_WEAK, leaves))
    except AttributeError:  # of what is no array yet
        return False
    except jax.errors.ConcretizationTypeError:  # traced arrays lie nowhere
        refuse_traced()
    if is_weak or len({*map(id, leaves)}) < len(leaves):
        return False
    if is_put == {False}:  # so is what comes back, if nothing at all has been put somewhere
        return shardings is None and not any(map(_is_put, jax.tree.leaves(others)))
    return is_put == {True}


def _once(seen: set[int]) -> Callable[[Any], Any]:
    """A function of arrays one by one, which copies those that it has seen."""

    def copy_if_seen(x: Any) -> Any:
        if id(x) in seen and isinstance(x, jax.Array):
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return copy_if_seen


def _is_put(x: Any) -> bool:
    return getattr(x, "committed", False)


def _put(tree: Any, shardings: Any) -> Any:
    """The arrays of a tree in other places, if shardings are given, for all or for each."""

    def put(x: Any, sharding: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(sharding=sharding)
        return jax.device_put(x, sharding)

    if shardings is None:
        return tree
    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def _strong(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(weak_type=False)
    return jnp.asarray(x, x.dtype) if hasattr(x, "dtype") else x


def compile_all(
    draws: Iterable[Callable[[], Sequence[jax.stages.Lowered]]],
    progress: Callable[[int, int], None] | None,
    max_workers: int,
) -> None:
    """Compiles the programs of all draws, `max_workers` at a time, and stores them in JAX's cache.

    They are traced and lowered here, since contexts do not reach other threads.
    """
    draws, done = list(draws), 0
    compiling: dict[jax.stages.Lowered, Future[Any]] = {}
    of_draws: list[list[Future[Any]]] = []

    def report() -> None:
        nonlocal done
        while done < sum(all(one.done() for one in programs) for programs in of_draws):
            done += 1
            if progress is not None:
                progress(done, len(draws))

    with all_stored(), ThreadPoolExecutor(max_workers) as pool:
        for lower in draws:
            with without_collector():
                lowered = lower()
            for one in lowered:
                if one not in compiling:
                    compiling[one] = pool.submit(one.compile)
            of_draws.append(list(map(compiling.__getitem__, lowered)))
            report()
        for future in as_completed(compiling.values()):
            future.result()
            report()


@contextlib.contextmanager
def all_stored() -> Iterator[None]:
    """In JAX's persistent cache, if there is one, also programs that compile in under a second."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    try:
        yield
    finally:
        jax.config.update(name, seconds)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Without Python's collector of cycles, which walks again and again through what is traced."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
