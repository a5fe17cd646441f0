"""Measures how far an average of gradients, MVR and MARS are from the full gradient.

python benchmarks/estimator_error.py --output-dir results
"""

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

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
from study import Ascending, Count, Decay, Distinct, Positive, Record, Settings, Study, Whole, Work

NUM_SAMPLES = 2000  # of each problem, of which the full gradient is the mean
# The mean loss of some samples, and where runs start.
FiniteSum = tuple[Callable[[Array, Int[Array, " batch"]], Array], Float[Array, "rows columns"]]


def quadratic(seed: int) -> FiniteSum:
    """The mean over samples i of ½⟨X, HᵢX⟩ + ⟨Bᵢ, X⟩; the mean of Bᵢ is 0, and so is X*.

    Two gradients of a sample differ by Hᵢ(X - Y), whose noise is that of Hᵢ, of spectral norm 1 or
    so. The mean of Hᵢ has eigenvalues from 0.1 to 1.
    """
    generator = np.random.default_rng(seed)
    rows, columns = 12, 8
    basis = np.linalg.qr(generator.standard_normal((rows, rows)))[0]
    square = generator.standard_normal((NUM_SAMPLES, rows, rows))
    noise = (square + square.swapaxes(1, 2)) / np.sqrt(8 * rows)
    of_all = basis * np.geomspace(0.1, 1, rows) @ basis.T + noise - noise.mean(0)
    offsets = generator.standard_normal((NUM_SAMPLES, rows, columns))
    start = generator.standard_normal((rows, columns))
    curvatures = jnp.asarray(of_all, jnp.float32)
    linear = jnp.asarray(offsets - offsets.mean(0), jnp.float32)

    def loss(params: Array, samples: Int[Array, " batch"]) -> Array:
        curvature, offset = curvatures[samples].mean(0), linear[samples].mean(0)
        return jnp.vdot(params, curvature @ params) / 2 + jnp.vdot(offset, params)

    return loss, jnp.asarray(start, jnp.float32)


def logistic(seed: int) -> FiniteSum:
    """Multinomial logistic regression: cross-entropy of the classes of standard normal features.

    The classes are drawn from the softmax of features · W with W normal of deviation ½, so that
    they can be told apart, and not all of them.
    """
    generator = np.random.default_rng(seed)
    num_features, num_classes = 20, 4
    of_all = generator.standard_normal((NUM_SAMPLES, num_features))
    logits = of_all @ generator.normal(0, 0.5, (num_features, num_classes))
    classes = jnp.asarray((logits + generator.gumbel(size=logits.shape)).argmax(1))
    start = generator.standard_normal((num_features, num_classes))
    features = jnp.asarray(of_all, jnp.float32)

    def loss(params: Array, samples: Int[Array, " batch"]) -> Array:
        log_probabilities = jax.nn.log_softmax(features[samples] @ params)
        return -jnp.take_along_axis(log_probabilities, classes[samples, None], axis=1).mean()

    return loss, jnp.asarray(start, jnp.float32)


PROBLEMS = {"quadratic": quadratic, "logistic": logistic}
ESTIMATORS = {  # by their decay
    "average": dm.momentum,
    "MVR-1": dm.mvr_momentum,
    "MVR-2, q 0.5": functools.partial(dm.mvr_momentum, variant=2, q=0.5),
    "MVR-2, q 0.1": functools.partial(dm.mvr_momentum, variant=2, q=0.1),
    "MVR-3, q 0.5": functools.partial(dm.mvr_momentum, variant=3, q=0.5),
    "MVR-3, q 0.1": functools.partial(dm.mvr_momentum, variant=3, q=0.1),
    "MARS": dm.transforms.mars_momentum,
}


class Errors(Settings):
    """Measure how far an average of gradients, MVR and MARS are from the full gradient."""

    problems: Distinct[Literal["quadratic", "logistic"]] = ("quadratic", "logistic")
    """The finite sums."""
    batch_size: Count = 8
    """Samples of a minibatch, drawn with replacement."""
    num_steps: Annotated[int, Field(ge=2)] = 500
    """Of every run; means are over the second half."""
    radii: Ascending[Positive] = (0.001, 0.01, 0.1)
    """Spectral norm of each step: little, middling and much movement."""
    decays: Ascending[Decay] = (0.9, 0.98)
    """Weight of the past, the same in every momentum."""
    num_seeds: Count = 8
    """Runs of each configuration, with other minibatches of the same problem."""
    seed: Whole = 0
    """Of the problems and of everything drawn."""


def run(settings: Errors, work: Work) -> Record:
    """All estimators on each problem."""
    errors = {}
    for name in work.track(settings.problems, "momenta on a problem"):
        errors[name] = work.part(name, functools.partial(measure, settings, name))
    return {"errors": errors}


def measure(settings: Errors, name: str) -> dict[str, list[Any]]:
    """Of each estimator ‖M - ∇f‖ by radius, decay and seed, on a trajectory for all.

    They see the same X and the same minibatches, and move nothing: the iterates are those of Muon
    with an average of decay 0.9 on minibatches of its own, which moves as training does. (Steps
    along the exact gradient would end in a cycle of two points, in the middle of which an average
    of gradients lies.)
    """
    loss, start = PROBLEMS[name](settings.seed)
    gradient, driver = jax.grad(loss), dm.momentum(0.9)

    def run(key: PRNGKeyArray, radius: Array, decay: Array) -> dict[str, Float[Array, ""]]:
        txs = {
            name: optax.with_extra_args_support(make(decay)) for name, make in ESTIMATORS.items()
        }
        lmo = dm.norm_lmo(dm.norms.spectral_norm(), radius)

        def step(carry: Any, key: PRNGKeyArray) -> Any:
            params, driver_state, states = carry
            shape = 2, settings.batch_size
            samples, driver_samples = jax.random.randint(key, shape, 0, NUM_SAMPLES)
            full = gradient(params, jnp.arange(NUM_SAMPLES))
            grads, errors, new_states = gradient(params, samples), {}, {}
            for name, tx in txs.items():
                extra_args = {}
                if name.startswith("MVR"):
                    prev = dm.prev_params(states[name], params)
                    extra_args["prev_params_grads"] = gradient(prev, samples)
                estimate, new_states[name] = tx.update(grads, states[name], params, **extra_args)
                errors[name] = jnp.linalg.norm(estimate - full)
            direction, driver_state = driver.update(
                gradient(params, driver_samples), driver_state, params
            )
            updates, _ = lmo.update(direction, lmo.init(params), params)
            return (params - updates, driver_state, new_states), errors

        carry = start, driver.init(start), {name: tx.init(start) for name, tx in txs.items()}
        _, errors = jax.lax.scan(step, carry, jax.random.split(key, settings.num_steps))
        return jax.tree.map(lambda of_steps: of_steps[settings.num_steps // 2 :].mean(), errors)

    of_seeds = jax.vmap(run, (0, None, None))
    of_all = jax.vmap(jax.vmap(of_seeds, (None, None, 0)), (None, 0, None))
    keys = jax.random.split(jax.random.key(settings.seed), settings.num_seeds)
    errors = jax.jit(of_all)(keys, jnp.asarray(settings.radii), jnp.asarray(settings.decays))
    return {name: rounded(np.asarray(errors[name])) for name in ESTIMATORS}


def tables(record: Record) -> Iterator[Table]:
    """The errors of all estimators."""
    radii, decays = record["settings"]["radii"], record["settings"]["decays"]
    for problem, errors in record["errors"].items():
        for d, decay in enumerate(decays):
            title = f"‖M - ∇f‖ late in a run: {problem}, decay {decay:g}"
            table = new_table(title, "momentum", *(f"radius {radius:g}" for radius in radii))
            for name, of in errors.items():
                table.add_row(name, *(show_spread(of_radius[d], 3) for of_radius in of))
            yield table


def figures(record: Record) -> dict[str, Figure]:
    """The errors against the radius, a panel for each problem and decay."""
    radii, decays = record["settings"]["radii"], record["settings"]["decays"]
    figure = Figure(figsize=(11, 3.5 * len(record["errors"])), layout="constrained")
    panels = figure.subplots(len(record["errors"]), len(decays), sharex=True, squeeze=False)
    for row, (problem, errors) in zip(panels, record["errors"].items(), strict=True):
        for d, (axes, decay) in enumerate(zip(row, decays, strict=True)):
            for index, (name, of) in enumerate(errors.items()):
                draw_spread(axes, radii, [of_radius[d] for of_radius in of], index, name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            finish(axes, f"{problem}, decay {decay:g}", "radius of a step", "‖M - ∇f‖")
    legend(figure, panels[0, 0])
    return {"": figure}


STUDY = Study("estimator_error", Errors, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
