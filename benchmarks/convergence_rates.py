"""Measures how fast gradients fall in K with an average and with variance reduction, under noise.

python benchmarks/convergence_rates.py --output-dir results
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table

import dropmuon_jax as dm
from drawing import draw_spread, finish, legend, new_table, show_spread
from records import rounded
from study import Count, Distinct, Positive, Record, Settings, Study, Whole, Work

SHAPE = (6, 4)
# Of the spectral norm, for the star-convex runs. With a ball of 1 |y| stays below ½, and the noise
# drowns the gradient of a high power: f - f* at K = 10,000 was then that of the start.
BALL = 3.0
MethodName = Literal["average", "MVR-1", "MVR-2", "MVR-3"]
NOISE, MOVING_NOISE = 1.0, 0.3
MEASURE_EVERY = 10
DECADES = 1.5  # of K, to which slopes are fitted


class Rates(Settings):
    """Measure the rates of momentum and of variance reduction, and compare them with the theory."""

    horizon: Annotated[int, Field(ge=100)] = 30_000
    """Steps of each run. The schedules know no horizon, so that one run has all shorter ones."""
    num_seeds: Count = 12
    """Runs of each method."""
    seed: Whole = 0
    """Of the problems and of the noise."""
    radii: Distinct[Positive] = (0.1, 0.3, 1.0, 3.0)
    """First radii t of the non-convex runs."""
    powers: Distinct[Annotated[float, Field(ge=2, allow_inf_nan=False)]] = (2.0, 4.0, 8.0)
    """Those p of the star-convex functions Σ|y|^p / p: the higher, the flatter at the minimum."""
    methods: Distinct[MethodName] = get_args(MethodName)
    """Those of the non-convex runs; star-convex ones have the first two."""


class Problem(NamedTuple):
    r"""f(X) = Σ φ(Y) over the entries of Y = U(X - X*)V, U and V orthogonal, φ(0) = 0 its minimum.

    A sample adds noise · Σ (ξ Y + slope · ζ sin Y), ξ and ζ standard normal: the noise of a
    gradient has a constant part and one that moves with X, so that the noise of the difference of
    two gradients is at most noise · slope · ‖X - X'‖.
    """

    phi: Callable[[Array], Array]
    rotations: tuple[np.ndarray, ...]
    """U and V."""
    minimum: Float[np.ndarray, "rows columns"]
    start: Float[np.ndarray, "rows columns"]

    def loss(self, params: Array, sample: Float[Array, "2 rows columns"]) -> Array:
        """The value of a sample of ξ and ζ."""
        left, right = self.rotations
        y: Any = left @ (params - self.minimum) @ right
        constant, moving = sample
        noise = constant * y + MOVING_NOISE * moving * jnp.sin(y)
        return jnp.sum(self.phi(y) + NOISE * noise)

    def value(self, params: Array) -> Array:
        """The value f(X)."""
        return self.loss(params, jnp.zeros((2, *SHAPE)))


def nonconvex(seed: int) -> Problem:
    """φ(y) = y² / (1 + y²), concave beyond 0.58 and flat far away; Y starts standard normal."""
    generator = np.random.default_rng(seed)
    rotations, start = _rotations(generator), generator.standard_normal(SHAPE)
    return Problem(lambda y: y**2 / (1 + y**2), rotations, np.zeros(SHAPE), start)


def star_convex(power: float, seed: int) -> Problem:
    """φ(y) = |y|^p / p, convex, with X* of half the ball's spectral norm; starts at X = 0."""
    generator = np.random.default_rng(seed)
    minimum = generator.standard_normal(SHAPE)
    minimum *= BALL / 2 / np.linalg.norm(minimum, 2)
    rotations = _rotations(generator)
    return Problem(lambda y: jnp.abs(y) ** power / power, rotations, minimum, np.zeros(SHAPE))


def _rotations(generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    return tuple(np.linalg.qr(generator.standard_normal((n, n)))[0] for n in SHAPE)


class Method(NamedTuple):
    """Muon with the schedules of a theorem."""

    bound: float
    """The exponent of K in the upper bound."""
    momentum: optax.GradientTransformation
    steps: Callable[[Any], optax.GradientTransformation]
    """By their first radius."""


NORM = dm.norms.spectral_norm(orthogonalize=dm.orthogonalize.svd_polar_factor)
RATE = dm.schedules.star_convex_rate()


def _scheduled(schedule: Callable[[Any], optax.Schedule]) -> Callable[[Any], Any]:
    lmo = dm.norm_lmo(NORM)
    return lambda radius: optax.chain(lmo, optax.scale_by_learning_rate(schedule(radius)))


def _within_ball(ball: Any) -> optax.GradientTransformation:
    """X ← (1 - β_k)X - β_k · ball · UVᵀ."""
    parts = optax.add_decayed_weights(1.0), optax.scale_by_learning_rate(RATE)
    return optax.chain(dm.norm_lmo(NORM, ball), *parts)


_AVERAGE = _scheduled(dm.schedules.gluon_radius)
_MVR, _Q = _scheduled(dm.schedules.mvr_radius), dm.schedules.mvr_q()
NONCONVEX = {
    "average": Method(-1 / 4, dm.momentum(dm.schedules.gluon_decay()), _AVERAGE),
    "MVR-1": Method(-1 / 3, dm.mvr_momentum(dm.schedules.mvr_decay()), _MVR),
    "MVR-2": Method(-1 / 3, dm.mvr_momentum(0.9, variant=2, q=_Q), _MVR),
    "MVR-3": Method(-1 / 3, dm.mvr_momentum(0.9, variant=3, q=_Q), _MVR),
}
STAR_CONVEX = {  # the new gradient weighs β_k^⅔ in the average, β_k in MVR
    "average": Method(-1 / 3, dm.momentum(lambda k: 1 - RATE(k) ** (2 / 3)), _within_ball),
    "MVR-1": Method(-1 / 2, dm.mvr_momentum(lambda k: 1 - RATE(k)), _within_ball),
}


def run(settings: Rates, work: Work) -> Record:
    """Every method on every problem."""
    problem = nonconvex(settings.seed)
    cases = [("non-convex", problem, name, of, settings.radii) for name, of in NONCONVEX.items()]
    for power in settings.powers:
        title, problem = f"star-convex, p = {power:g}", star_convex(power, settings.seed)
        cases += [(title, problem, name, of, (BALL,)) for name, of in STAR_CONVEX.items()]
    cases = [case for case in cases if case[2] in settings.methods]
    at, runs = horizons(settings.horizon // MEASURE_EVERY), []
    work.expect(len(cases))
    for title, problem, name, method, radii in cases:
        work.say(f"{title}, {name}")
        make = functools.partial(measure, settings, problem, method, radii, at)
        of_radii = work.part(f"{title}, {name}", make)
        for radius, of_seeds in zip(radii, of_radii, strict=True):
            kind = {"problem": title, "method": name, "radius": radius, "bound": method.bound}
            runs.append(kind | {"of_seeds": of_seeds})
        work.say(f"{title}, {name}", done=1)
    return {"horizons": (at * MEASURE_EVERY).tolist(), "runs": runs}


def measure(
    settings: Rates,
    problem: Problem,
    method: Method,
    radii: tuple[float, ...],
    at: Int[np.ndarray, " horizons"],
) -> list[list[list[float]]]:
    """By radius, seed and horizon, the mean of the later half of its steps.

    Of ‖∇f‖* with the non-convex problem, of f - f* with the star-convex ones.
    """

    def size(params: Array) -> Array:
        if method.steps is _within_ball:
            return problem.value(params)
        return NORM.dual_norm(jax.grad(problem.value)(params))

    def of_run(key: PRNGKeyArray, radius: Array) -> Float[Array, " measurements"]:
        momentum = optax.with_extra_args_support(method.momentum)
        steps = method.steps(radius)

        def step(carry: Any, key: PRNGKeyArray) -> Any:
            params, state, of_steps = carry
            sample, extra_args = jax.random.normal(key, (2, *SHAPE)), {}
            if needs_second_gradient:
                prev = dm.prev_params(state, params)
                extra_args["prev_params_grads"] = jax.grad(problem.loss)(prev, sample)
            grads = jax.grad(problem.loss)(params, sample)
            estimate, state = momentum.update(grads, state, params, **extra_args)
            updates, of_steps = steps.update(estimate, of_steps, params)
            return (optax.apply_updates(params, updates), state, of_steps), None

        def block(carry: Any, key: PRNGKeyArray) -> Any:
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, MEASURE_EVERY))
            return carry, size(carry[0])

        start = jnp.asarray(problem.start, jnp.float32)
        carry = start, momentum.init(start), steps.init(start)
        keys = jax.random.split(key, settings.horizon // MEASURE_EVERY)
        return jax.lax.scan(block, carry, keys)[1]

    needs_second_gradient = hasattr(method.momentum.init(jnp.zeros(SHAPE)), "prev_params")
    of_radii = jax.vmap(jax.vmap(of_run, (0, None)), (None, 0))
    keys = jax.random.split(jax.random.key(settings.seed), settings.num_seeds)
    measured = np.asarray(jax.jit(of_radii)(keys, jnp.asarray(radii)), np.float64)
    return rounded(late_average(measured)[..., at - 1])


def horizons(last: int) -> Int[np.ndarray, " horizons"]:
    """Ten a decade in the last decades, from 2 on."""
    of = np.geomspace(last / 10**DECADES, last, round(10 * DECADES) + 1).round().astype(int)
    return np.unique(np.maximum(of, 2))


def late_average(
    measured: Float[np.ndarray, "... measurements"],
) -> Float[np.ndarray, "... measurements"]:
    """The mean of the later half of the measurements so far: without the way from the start."""
    total = np.concatenate([np.zeros_like(measured[..., :1]), measured.cumsum(-1)], -1)
    ends = np.arange(1, measured.shape[-1] + 1)
    starts = ends // 2
    return (total[..., ends] - total[..., starts]) / (ends - starts)


def slopes(
    at: Sequence[float], of_seeds: Float[np.ndarray, "seeds horizons"]
) -> Float[np.ndarray, " seeds"]:
    """The exponent of K of each seed, by least squares in the logarithms."""
    return np.polyfit(np.log(at), np.log(of_seeds).T, 1)[0]


def tables(record: Record) -> Iterator[Table]:
    """The exponents of every method, a table for each problem."""
    at = record["horizons"]
    for problem, runs in _by_problem(record):
        title = f"{problem}: {_measured(problem)} falls as 1 / K^…, K = {at[0]:,} … {at[-1]:,}"
        table = new_table(title, "method", "radius", "bound", "measured", f"at K = {at[-1]:,}")
        for of in runs:
            values = np.array(of["of_seeds"])
            measured = show_spread((-slopes(at, values)).tolist(), 3)
            numbers = f"{of['radius']:g}", f"{-of['bound']:.3f}", measured
            table.add_row(of["method"], *numbers, show_spread(values[:, -1].tolist(), 5))
        yield table


def _by_problem(record: Record) -> list[tuple[str, list[Record]]]:
    grouped = itertools.groupby(record["runs"], lambda of: of["problem"])
    return [(problem, list(runs)) for problem, runs in grouped]


def _measured(problem: str) -> str:
    return "‖∇f‖*" if problem == "non-convex" else "f - f*"


def figures(record: Record) -> dict[str, Figure]:
    """The mean of the later half of K steps against K, beside the slopes of the bounds."""
    at = np.array(record["horizons"])
    panels: dict[tuple[str, float], list[Record]] = {}
    for of in record["runs"]:
        panels.setdefault((of["problem"], of["radius"]), []).append(of)
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    grid = figure.subplots(2, -(-len(panels) // 2), squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, ((problem, radius), runs) in zip(grid, panels.items(), strict=False):
        bounds: dict[float, float] = {}
        for of in runs:
            index = list(NONCONVEX).index(of["method"])
            of_horizons = np.transpose(of["of_seeds"]).tolist()
            middle = draw_spread(axes, record["horizons"], of_horizons, index, of["method"])
            bounds.setdefault(of["bound"], middle[0])
        for bound, start in bounds.items():
            falling = start * (at / at[0]) ** bound
            axes.plot(at, falling, ":", color="#777777", linewidth=1)
            axes.annotate(f"K^{bound:.2f}", (at[-1], falling[-1]), fontsize="x-small")
        axes.set_xscale("log")
        axes.set_yscale("log")
        finish(axes, f"{problem}, radius {radius:g}", "K", _measured(problem))
    legend(figure, grid[0])
    return {"": figure}


STUDY = Study("convergence_rates", Rates, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
