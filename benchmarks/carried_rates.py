"""Learning rates of other Muons in this one: does the rate that gives the same steps train as well?

python benchmarks/carried_rates.py --output-dir results
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure
from rich.table import Table

import dropmuon_jax as dm
from drawing import draw_spread, finish, legend, new_table, show_spread
from images import load_images
from models import CNN, MLP
from records import rounded
from study import Ascending, Count, Distinct, Positive, Record, Settings, Study, Whole, Work

NESTEROV = dm.momentum(0.95, nesterov=True)
POLYNOMIAL = 0.9  # what Muon's polynomial makes of UVᵀ, as docs/coming_from_another_muon.md says
Make = Callable[[Any, Any, int, dict[str, str]], optax.GradientTransformation]


def _optax(rate: Any, scale: Any, fan_in: int, roles: dict[str, str]) -> Any:
    return optax.contrib.muon(rate)


def _optax_moonlight(rate: Any, scale: Any, fan_in: int, roles: dict[str, str]) -> Any:
    return optax.contrib.muon(
        scale(1 / (0.2 * fan_in**0.5)), consistent_rms=0.2, adam_learning_rate=rate
    )


def _same_steps(rate: Any, scale: Any, fan_in: int, roles: dict[str, str]) -> Any:
    """What optax.contrib.muon does to matrices and vectors, and to convolutions too."""
    return dm.muon(
        rate,
        momentum=dm.momentum(0.95, nesterov=True, bias_correction=True),
        orthogonalize=dm.orthogonalize.newton_schulz("muon"),
        auxiliary=optax.scale_by_adam(nesterov=True),
        roles=roles,
    )


def _carried(rate: Any, scale: Any, fan_in: int, roles: dict[str, str]) -> Any:
    return dm.muon(scale(POLYNOMIAL), momentum=NESTEROV, auxiliary_learning_rate=rate, roles=roles)


METHODS: dict[str, Make] = {
    "optax.contrib.muon": _optax,
    "optax.contrib.muon, consistent_rms=0.2, rate ÷ 0.2 √fan-in": _optax_moonlight,
    "dm.muon, its arguments": _same_steps,
    "dm.muon, Polar Express, 0.9 × rate": _carried,
}


class Rates(Settings):
    """Train with optax.contrib.muon and, at the rates that give the same steps, with dm.muon."""

    networks: Distinct[Literal["mlp", "cnn"]] = ("mlp", "cnn")
    """Dense layers, or convolutions."""
    rates: Ascending[Positive] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Of optax.contrib.muon, at the start; they fall linearly to 0."""
    num_steps: Count = 60
    """Of every run."""
    batch_size: Count = 100
    """Images of a batch, drawn with replacement."""
    width: Count = 64
    """Of the two hidden layers of the MLP; the CNN has an eighth and a quarter as many channels."""
    num_seeds: Count = 3
    """Runs of each, with other parameters and batches."""
    seed: Whole = 0
    """Of everything drawn."""


def run(settings: Rates, work: Work) -> Record:
    """All methods on each network."""
    accuracies = {}
    for name in work.track(settings.networks, "rates on a network"):
        accuracies[name] = work.part(name, functools.partial(measure, settings, name))
    return {"accuracies": accuracies}


def measure(settings: Rates, name: str) -> dict[str, list[Any]]:
    """Of each method the test accuracy in % by rate and seed."""
    images, width = load_images("mnist5k"), settings.width
    model = MLP((width, width)) if name == "mlp" else CNN((width // 8, width // 4))
    apply: Any = model.apply
    # Of the matrices in the middle: a hidden layer, or the second convolution.
    fan_in = width if name == "mlp" else 9 * (width // 8)
    # Optax's Muon takes heads for matrices as any other.
    roles = {pattern: "hidden" for pattern in model.roles()} if name == "cnn" else {}
    roles |= {f"{model.layer_patterns()[-1]}/kernel": "hidden"}
    train_images, train_labels = map(jnp.asarray, (images.train_images, images.train_labels))

    def train(make: Make, key: PRNGKeyArray, rate: Float[Array, ""]) -> Float[Array, ""]:
        def scaled(factor: float) -> optax.Schedule:
            return lambda count: factor * rate * (1 - count / settings.num_steps)

        tx = make(scaled(1.0), scaled, fan_in, roles)
        key, init_key = jax.random.split(key)
        params = model.init(init_key, train_images[:1])["params"]

        def loss(params: Any, rows: Array) -> Array:
            logits = apply({"params": params}, train_images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, train_labels[rows]
            ).mean()

        def step(carry: Any, key: PRNGKeyArray) -> Any:
            params, state = carry
            rows = jax.random.randint(key, (settings.batch_size,), 0, len(train_labels))
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, settings.num_steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        found = apply({"params": params}, images.test_images).argmax(1)
        return 100 * (found == images.test_labels).mean()

    keys = jax.random.split(jax.random.key(settings.seed), settings.num_seeds)
    rates, accuracies = jnp.asarray(settings.rates), {}
    for method, make in METHODS.items():
        of_all = jax.jit(
            lambda keys, rates, make=make: jax.lax.map(
                lambda rate: jax.lax.map(lambda key: train(make, key, rate), keys), rates
            )
        )
        accuracies[method] = rounded(np.asarray(of_all(keys, rates)), 4)
    return accuracies


def tables(record: Record) -> Iterator[Table]:
    """The accuracies by rate."""
    rates = record["settings"]["rates"]
    for network, accuracies in record["accuracies"].items():
        title = f"Test accuracy in % by the rate of optax.contrib.muon: {network}"
        table = new_table(title, "method", *(f"{rate:g}" for rate in rates))
        for method, of in accuracies.items():
            table.add_row(method, *(show_spread(of_rate, 3) for of_rate in of))
        yield table


def figures(record: Record) -> dict[str, Figure]:
    """The accuracies against the rate, a panel for each network."""
    rates, found = record["settings"]["rates"], record["accuracies"]
    figure = Figure(figsize=(3 + 5 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (network, accuracies) in zip(panels, found.items(), strict=True):
        for index, (method, of) in enumerate(accuracies.items()):
            draw_spread(axes, rates, of, index, method)
        axes.set_xscale("log")
        finish(axes, network, "rate of optax.contrib.muon", "test accuracy, %")
    legend(figure, panels[0])
    return {"": figure}


STUDY = Study("carried_rates", Rates, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
