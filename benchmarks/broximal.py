"""Where the broximal point method goes in balls of four norms, and what its envelope looks like.

python benchmarks/broximal.py --output-dir results
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import dropmuon_jax as dm
from drawing import COLOURS, finish, new_table, show, style
from records import rounded
from study import Ascending, Count, Distinct, Positive, Record, Settings, Study, Work

broximal = dm.contrib.broximal

NormName = Literal["Euclidean", "largest entry", "sum of entries", "ellipse"]
HESSIAN = np.array([[1.0, -2.5], [-2.5, 10.0]])
STRETCH = np.array([[2.0], [0.5]])  # the half axes of the ellipse


class Broximal(Settings):
    """Follow the method in two dimensions, and draw envelopes in one."""

    norms: Distinct[NormName] = get_args(NormName)
    """Of the balls."""
    start: tuple[float, float] = (1.0, 1.0)
    """Of the iterates, whose minimizer is the origin."""
    radius: Positive = 0.4
    """Of the balls."""
    num_steps: Count = 12
    """At most; they end at the minimizer."""
    solver_steps: Count = 3000
    """Of the solver, at most."""
    tolerance: Positive = 1e-5
    """Gap at which the solver stops."""
    envelope_radii: Ascending[Positive] = (0.5, 1.0)
    """Of the envelopes."""


def _one_entry(g: jax.Array) -> jax.Array:
    """A largest entry, the first of equal ones."""
    flat = jnp.abs(g).reshape(len(g), -1)
    first = jax.nn.one_hot(flat.argmax(-1), flat.shape[-1], dtype=g.dtype)
    return jnp.sign(g) * first.reshape(g.shape)


def _own(name: str, norm: Callable[..., Any], dual: Callable[..., Any], direction: Any) -> Any:
    def draw(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    return dm.norms.Norm(name, dm.norms.Geometry(norm, dual, direction, draw))


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, (-2, -1), keepdims=True))


def _unit(x: jax.Array) -> jax.Array:
    length = _length(x)
    return x / jnp.where(length == 0, 1, length)


NORMS = {
    "Euclidean": dm.norms.euclidean_norm(),
    "largest entry": dm.norms.sign_norm(normalized=False),
    "sum of entries": _own(
        "sum of entries",
        lambda x: jnp.abs(x).sum((-2, -1)),
        lambda g: jnp.abs(g).max((-2, -1)),
        _one_entry,
    ),
    "ellipse": _own(
        "ellipse",
        lambda x: _length(x / STRETCH)[:, 0, 0],
        lambda g: _length(g * STRETCH)[:, 0, 0],
        lambda g: STRETCH * _unit(g * STRETCH),
    ),
}


def cost(z: jax.Array) -> jax.Array:
    """The quadratic, of a column."""
    return 0.5 * (z.T @ jnp.asarray(HESSIAN, z.dtype) @ z)[0, 0]


def bump(z: jax.Array) -> jax.Array:
    """A convex function of one number, flat at the left and steep at the right."""
    return jnp.sum(jnp.logaddexp(3 * z, -z))


def run(settings: Broximal, work: Work) -> Record:
    """Iterates of each norm, and envelopes on a grid."""
    iterates = {}
    for name in work.track(settings.norms, "following the method"):
        iterates[name] = _follow(settings, NORMS[name])
    grid = np.linspace(-2.5, 2.5, 101)
    envelopes = {}
    for radius in settings.envelope_radii:

        def of(x: jax.Array, radius: float = radius) -> jax.Array:
            return broximal.ball_envelope(bump, x[None], radius, dm.norms.euclidean_norm())

        envelopes[f"{radius:g}"] = rounded(np.asarray(jax.jit(jax.vmap(of))(jnp.asarray(grid))))
    values = np.asarray(jax.vmap(bump)(jnp.asarray(grid)))
    return {
        "iterates": iterates,
        "grid": rounded(grid),
        "function": rounded(values),
        "envelopes": envelopes,
    }


def _follow(settings: Broximal, norm: Any) -> Record:
    @jax.jit
    def step(x: jax.Array) -> Any:
        return broximal.brox(
            cost,
            x,
            settings.radius,
            norm,
            tolerance=settings.tolerance,
            max_steps=settings.solver_steps,
        )

    x = jnp.asarray(settings.start)[:, None]
    points, values, gaps, solver_steps = [x], [float(cost(x))], [], []
    while len(points) <= settings.num_steps and values[-1] > 10 * settings.tolerance:
        found = step(points[-1])
        points.append(found.point)
        values.append(float(found.value))
        gaps.append(float(found.gap))
        solver_steps.append(int(found.num_steps))
    return {
        "points": rounded(np.array(points)[..., 0]),
        "values": rounded(values),
        "gaps": rounded(gaps, 2),
        "solver_steps": solver_steps,
    }


def tables(record: Record) -> Iterator[Table | str]:
    """How many steps each norm takes, and what the solver does for them."""
    settings = record["settings"]
    headings = "steps", "largest distance", "last value", "solver steps", "largest gap"
    table = new_table("To the minimizer, in balls of one radius", "norm", *headings)
    for name, of in record["iterates"].items():
        distances = np.linalg.norm(of["points"], axis=1)
        table.add_row(
            name,
            str(len(of["points"]) - 1),
            show(float(distances.max()), 3),
            f"{of['values'][-1]:.1e}",
            str(sum(of["solver_steps"])),
            f"{max(of['gaps']):.0e}",
        )
    yield table
    distance = math.hypot(*settings["start"])
    bound = math.ceil(distance**2 / settings["radius"] ** 2)
    yield f"The Euclidean bound is {bound} steps, from the distance {distance:.3f}."


def figures(record: Record) -> dict[str, Figure]:
    """A panel for each norm, and one of the envelopes."""
    settings = record["settings"]
    count = len(record["iterates"]) + 1
    figure = Figure(figsize=(3.1 * count, 3.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (name, of) in zip(panels, record["iterates"].items(), strict=False):
        _draw_iterates(axes, np.array(of["points"]), NORMS[name], settings["radius"])
        finish(axes, f"{name}: {len(of['points']) - 1} steps")
    axes = panels[-1]
    axes.plot(record["grid"], record["function"], color="black", label="f")
    for i, (radius, values) in enumerate(record["envelopes"].items()):
        look = style(i) | {"marker": None}
        axes.plot(record["grid"], values, **look, label=f"in a ball of {radius}")
    axes.legend(frameon=False)
    finish(axes, "smallest values")
    return {"": figure}


def _draw_iterates(axes: Axes, points: np.ndarray, norm: Any, radius: float) -> None:
    x, y = np.meshgrid(np.linspace(-0.6, 2.0, 80), np.linspace(-0.6, 1.6, 80))
    z = np.stack([x, y])
    heights = 0.5 * np.einsum("iab,ij,jab->ab", z, HESSIAN, z)
    axes.contour(x, y, np.sqrt(np.maximum(heights, 0)), 9, colors="#cccccc", linewidths=0.7)
    angle = np.linspace(0, 2 * np.pi, 400)
    around = np.stack([np.cos(angle), np.sin(angle)])
    lengths = [float(norm.norm(jnp.asarray(of[:, None], jnp.float32))) for of in around.T]
    sphere = radius * around / np.array(lengths)
    for i, point in enumerate(points[:-1]):
        axes.plot(
            *(point[:, None] + sphere), color=COLOURS[5], linewidth=0.8, alpha=0.4 + 0.6 * (i == 0)
        )
    axes.plot(*points.T, "o-", color=COLOURS[0], markersize=4)
    axes.plot(0, 0, "k*")
    axes.set_aspect("equal")


STUDY = Study("broximal", Broximal, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
