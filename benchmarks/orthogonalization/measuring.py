"""Compiled programs, what they multiply and hold, how fast they are, and how far from the truth."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from matrix_products import product_flops
from orthogonalization.methods import DEGREES, NUM_STEPS, REFERENCE, optimizer, orthogonalizer
from orthogonalization.subjects import Shape, make_arrays, matrix_shape, needed_flops
from study import Record

MIN_ROUNDS = 3
RATE_TIME = 0.1  # of the time of a round goes into measuring the machine's rate before it
MIN_SAMPLE_SECONDS = 0.05  # shorter calls are repeated and averaged, against the noise of the clock
# Five steps on a list that need less are repeated in one program: within a training step they cost
# no call from Python, which takes as long as those on a lone 16 × 16 matrix.
MIN_FLOPS = 1e8
Program = tuple[Callable[[], None], Record, int]  # to be called, what it is made of, repetitions


def list_program(method: str, dtype: str, shapes: Sequence[Shape]) -> Program:
    """A method on a list of matrices, on its own result if it is repeated."""
    matrices, function = make_arrays(shapes, dtype), orthogonalizer(method, shapes)
    compiled, made = _build(function, (matrices,))
    times = math.ceil(MIN_FLOPS / needed_flops(shapes, num_steps=5))
    if times > 1:
        compiled = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, x: function(x), x))
    return lambda: jax.block_until_ready(compiled(matrices)), made, times


def update_program(method: str, dtype: str, shapes: Any) -> Program:
    """An optimizer's whole update of parameters of these shapes, in place."""
    gradients, tx = make_arrays(shapes, dtype), optimizer(method)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, gradients)
    held = [params, jax.jit(tx.init)(params)]
    compiled, made = _build(step, (*held, gradients), donated=(0, 1))

    def call() -> None:
        held[:] = jax.block_until_ready(compiled(*held, gradients))

    return call, made, 1


def _build(
    function: Callable[..., Any], arguments: tuple[Any, ...], donated: tuple[int, ...] = ()
) -> tuple[Any, Record]:
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donated).trace(*arguments)
    compiled: Any = traced.lower().compile()
    return compiled, {
        "build_seconds": time.perf_counter() - start,
        "product_flops": product_flops(traced),
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
    }


_square = functools.cache(make_arrays)
# Sums in float32: on a CPU with bfloat16 instructions twice as fast as to bfloat16.
_product = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.float32))


def product_rate(dtype: str, sizes: Sequence[int], seconds: float) -> float:
    """FLOPs a second of large square products, of the best size, sustained for some time."""
    rates = []
    for size in sizes:
        x = _square((size, size), dtype)
        call = functools.partial(lambda x: jax.block_until_ready(_product(x, x)), x)
        rates.append(2 * size**3 / _seconds(call, seconds / len(sizes)))
    return max(rates)


def measure(
    programs: Mapping[str, Callable[[], Program]],
    shapes: Sequence[Shape],
    *,
    rate_sizes: Sequence[int],
    rounds: int,
    max_seconds: float,
    say: Callable[[str], None],
) -> Record:
    """Compiles methods for these matrices and times each beside the reference, once a round.

    Either of a pair is first in turn. After `max_seconds` no round begins, once there are 3.
    """
    jax.block_until_ready(_product(jnp.ones((1, 1)), jnp.ones((1, 1))))  # XLA's own start
    calls: dict[str, Callable[[], None]] = {}
    made: dict[str, Record] = {}
    times = 1
    for method, program in programs.items():
        say(f"compiling {method}")
        calls[method], made[method], times = program()
        steps = NUM_STEPS.get(method, 5)
        degree = DEGREES.get(method, 5)
        made[method]["needed_flops"] = steps and needed_flops(shapes, steps, degree)
    dtypes = sorted({dtype for program in made.values() for dtype in program["product_flops"]})
    say("warming up")
    for dtype in dtypes:
        product_rate(dtype, rate_sizes, 0)  # compiles it
    took = sum(_seconds(call, 0) for call in calls.values())  # the first call pages memory in
    taken, started = [], time.perf_counter()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.perf_counter() - started > max_seconds:
            break
        rates = {dtype: product_rate(dtype, rate_sizes, RATE_TIME * took) for dtype in dtypes}
        begun, pairs = time.perf_counter(), {}
        for k, method in enumerate(method for method in calls if method != REFERENCE):
            say(f"round {i + 1}, {method}")
            pair = (REFERENCE, method) if (i + k) % 2 == 0 else (method, REFERENCE)
            seconds = {each: _seconds(calls[each], MIN_SAMPLE_SECONDS) / times for each in pair}
            pairs[method] = [seconds[REFERENCE], seconds[method]]
        pairs[REFERENCE] = [statistics.median(reference for reference, _ in pairs.values())] * 2
        took = time.perf_counter() - begun
        taken.append({"rates": rates, "pairs": pairs})
    return {"programs": made, "rounds": taken}


def _seconds(call: Callable[[], Any], at_least: float) -> float:
    """Of one call, the mean of as many as take so long."""
    count, elapsed, start = 0, 0.0, time.perf_counter()
    while count == 0 or elapsed < at_least:
        call()
        count, elapsed = count + 1, time.perf_counter() - start
    return elapsed / count


def ill_conditioned(rows: int, cols: int, condition: float, seed: int) -> np.ndarray:
    """UΣVᵀ in float64 of random U and V, and a geometric spectrum from 1 down to 1/condition."""
    generator = np.random.default_rng(seed)
    rank = min(rows, cols)
    u, v = (np.linalg.qr(generator.standard_normal((size, rank)))[0] for size in (rows, cols))
    return (u * np.geomspace(1, 1 / condition, rank)) @ v.T


def measure_errors(
    methods: Sequence[str],
    shape: Shape,
    spectra: Iterable[tuple[float, int]],
    dtype: str,
    say: Callable[[str], None],
) -> list[Record]:
    """‖UVᵀ − O‖_F / √rank of every method on the same matrices, one for each condition and seed."""
    rows, cols = matrix_shape(shape)
    cases, matrices = [], []
    for condition, seed in spectra:
        matrix = jnp.asarray(ill_conditioned(rows, cols, condition, seed), dtype)
        u, _, vt = np.linalg.svd(np.asarray(matrix).astype(np.float64), full_matrices=False)
        matrices.append((matrix, u @ vt))
        cases.append({"condition": condition, "errors": {}})
    for method in methods:
        say(f"errors of {method} on {rows}x{cols}")
        function = jax.jit(orthogonalizer(method, [(rows, cols)]))
        for case, (matrix, polar_factor) in zip(cases, matrices, strict=True):
            difference = polar_factor - np.asarray(function([matrix])[0])
            case["errors"][method] = float(np.linalg.norm(difference) / math.sqrt(min(rows, cols)))
    return cases
