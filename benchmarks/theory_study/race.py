"""What a distribution was predicted to gain on problems of known smoothness, and what it gained."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import dropmuon_jax as dm
from theory_study.descent import Descent, descend, repeated
from theory_study.problems import Problem, coupled, huber
from theory_study.search import CRITERIA
from theory_study.settings import Settings

PROBLEMS: dict[str, Callable[..., Problem]] = {"Huber": huber, "coupled": coupled}
CHUNK = 100  # steps that are taken before anyone looks who has arrived


class Outcome(NamedTuple):
    """One distribution in one race; a criterion is also what ends the race."""

    problem: str
    profile: str
    criterion: str
    distribution: str
    probabilities: list[float]
    predicted: float
    """Speed-up over full steps, by the bounds."""
    measured: float
    """That of mean costs; 0 if a run gave up."""


def profiles(settings: Settings) -> dict[str, Float[np.ndarray, " layers"]]:
    """The smoothness of each layer, shallow to deep."""
    size = settings.race_layers
    rising = np.geomspace(1.0, settings.race_ratio, size)
    middle = np.ones(size)
    middle[size // 2] = settings.race_ratio
    return {"rising": rising, "falling": rising[::-1], "flat": np.ones(size), "middle": middle}


def race_costs(num_layers: int) -> Float[np.ndarray, " layers"]:
    """Of a step at each depth: a layer's forward pass costs 1, its backward pass 2."""
    return num_layers + 2.0 * np.arange(num_layers, 0, -1)


def num_runs(settings: Settings) -> int:
    """How often :func:`race` says what it has done."""
    return len(PROBLEMS) * len(profiles(settings)) * (2 + len(CRITERIA))


def race(settings: Settings, done: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Every distribution on every problem with every profile."""
    outcomes = []
    costs = race_costs(settings.race_layers)
    with jax.enable_x64(True):
        for problem_name, make in PROBLEMS.items():
            for profile, smoothness in profiles(settings).items():
                problem = make(smoothness.tolist(), settings.seed)
                distributions = {"full": dm.full_depth(), "uniform": dm.uniform_depth()} | {
                    f"best by {of}": dm.planning.optimal_depth(smoothness, costs, criterion=of)
                    for of in CRITERIA
                }
                probabilities = {
                    name: np.asarray(of.probabilities(0, len(costs)), float)
                    for name, of in distributions.items()
                }
                descent, spent = descend(problem), {}
                for name, of in probabilities.items():
                    spent[name] = _run(settings, problem, descent, of, costs)
                    done(f"{problem_name}, {profile}, {name}")
                for i, criterion in enumerate(CRITERIA):
                    for name, of in distributions.items():
                        outcomes.append(
                            Outcome(
                                problem_name,
                                profile,
                                criterion,
                                name,
                                probabilities[name].tolist(),
                                dm.planning.predicted_speed_up(
                                    of, smoothness, costs, criterion=criterion
                                ),
                                spent["full"][i] / spent[name][i],
                            )
                        )
    return outcomes


def _run(
    settings: Settings,
    problem: Problem,
    descent: Descent,
    probabilities: np.ndarray,
    costs: np.ndarray,
) -> list[float]:
    """The mean cost until the gradient is small by each criterion, infinite if a run gives up."""
    generator = np.random.default_rng(settings.seed)
    drawn, small = [], []
    arrived = np.zeros((len(CRITERIA), settings.race_runs, 1), bool)
    for depths, dual_norms in _chunks(settings, problem, descent, probabilities, generator):
        drawn.append(depths)
        small.append(np.stack([np.linalg.norm(dual_norms, axis=-1), dual_norms.sum(-1)]))
        sizes = np.concatenate(small, axis=2)
        arrived = sizes <= settings.tolerance * sizes[..., :1]
        if arrived.any(-1).all():
            break
    paid = np.cumsum(costs[np.concatenate(drawn, axis=1)], axis=1)
    before = np.pad(paid[:, :-1], ((0, 0), (1, 0)))  # the gradient is that before the step
    first = arrived.argmax(-1)
    spent = np.where(
        arrived.any(-1), np.take_along_axis(before[None], first[..., None], 2)[..., 0], np.inf
    )
    return spent.mean(1).tolist()


def _chunks(
    settings: Settings,
    problem: Problem,
    descent: Descent,
    probabilities: np.ndarray,
    generator: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The depths and dual norms of the next steps, until all are taken."""
    params = repeated(problem.start, settings.race_runs)
    chances = probabilities / probabilities.sum()
    for _ in range(-(-settings.race_steps // CHUNK)):
        depths = generator.choice(len(chances), (settings.race_runs, CHUNK), p=chances)
        params, steps = descent(params, jnp.asarray(depths))
        yield depths, np.asarray(steps.dual_norms)
