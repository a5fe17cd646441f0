"""Private training on images: α-NormEC against DP-SGD with normalised messages, and Clip21.

python benchmarks/private.py --output-dir results --data-dir FOLDER

Every client takes the gradient of all of its images, and what it sends in all rounds together is
(ε, δ)-differentially private: of the whole client, not of an image. Rates and the second parameter
of each method are chosen on held-out images with the first seed, which costs privacy that is not
accounted for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt
from pydantic import Field

import dropmuon_jax as dm
from drawing import draw_spread, finish, legend, new_table, show, show_spread
from images import DatasetName, load_images
from models import MLP
from records import rounded
from study import Count, Distinct, Positive, Record, Settings, Study, Whole, Work

MethodName = Literal["norm_ec", "dp_norm", "clip21", "norm_ec_without_noise"]
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
# What is tuned of each method beside the rate, as many values of each.
SECOND: dict[str, tuple[str, tuple[float, ...]]] = {
    "norm_ec": ("β", SECONDS),
    "dp_norm": ("α", SECONDS),
    "clip21": ("τ", SECONDS),
    "norm_ec_without_noise": ("β", SECONDS),
}
TITLES = {
    "norm_ec": "α-NormEC",
    "dp_norm": "DP-SGD with Norm_α",
    "clip21": "Clip21",
    "norm_ec_without_noise": "α-NormEC, not private",
}


class PrivateSettings(Settings):
    """The arguments of the study."""

    methods: Distinct[MethodName] = ("norm_ec", "dp_norm", "clip21", "norm_ec_without_noise")
    """Who takes part."""
    dataset: DatasetName = "fashion_mnist"
    """What is learned."""
    data_dir: Path | None = None
    """Where tensorflow-datasets keeps its data."""
    max_train: Count | None = 10_000
    """Images of all clients together, and those that are held out."""
    num_validation: Count = 1_000
    """Held out."""
    widths: tuple[Count, ...] = ()
    """Of hidden layers; none is multinomial regression."""
    num_clients: Count = 10
    """Who have equal parts of the images, at random."""
    rounds: Count = 100
    """All clients send in each."""
    epsilon: Positive = 8.0
    """Of the privacy of all rounds."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Likewise."""
    alpha: Positive = 0.1
    """α of NormEC."""
    rates: Distinct[Positive] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Of which each method takes the best; its steps have length 1, times the rate."""
    num_evaluations: Count = 10
    """On the way of a run."""
    seeds: Distinct[Whole] = (0, 1, 2)
    """Of parameters, parts and noise."""


def make_transformation(
    name: str, second: float, settings: PrivateSettings, plan: Any, seed: int
) -> optax.GradientTransformation:
    """What a method makes of the clients' gradients, of length 1."""
    if name.startswith("norm_ec"):
        plan = plan if name == "norm_ec" else None
        return dm.privacy.norm_ec(settings.alpha, second, plan=plan, seed=seed)
    if name == "clip21":
        return dm.privacy.clip21(second, plan=plan, server_normalization=True, seed=seed)
    return dm.privacy.bounded_mean(alpha=second, plan=plan, server_normalization=True, seed=seed)


def make_trainer(settings: PrivateSettings, plan: Any) -> Callable[..., Any]:
    """From a method, its second parameter and a seed to accuracies on the way for each rate."""
    images = load_images(settings.dataset, data_dir=settings.data_dir, max_train=settings.max_train)
    model = MLP(settings.widths)

    def accuracy(params: Any, images: Any, labels: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return jnp.mean(logits.argmax(-1) == labels)

    def loss(params: Any, images: Any, labels: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(name: str, second: float, seed: int) -> Any:
        order = np.random.default_rng(seed).permutation(len(images.train_labels))
        held_out, rest = np.split(order, [settings.num_validation])
        each = len(rest) // settings.num_clients
        parts = rest[: each * settings.num_clients].reshape(settings.num_clients, each)
        clients = images.train_images[parts], images.train_labels[parts]
        validation = images.train_images[held_out], images.train_labels[held_out]
        test = images.test_images, images.test_labels
        tx = make_transformation(name, second, settings, plan, seed)
        params = model.init(jax.random.key(seed), images.train_images[:1])["params"]
        gradient = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))

        def run(rate: jax.Array, data: Any) -> Any:
            clients, validation, test = data
            optimizer = dm.compression.on_workers(
                optax.chain(tx, optax.scale_by_learning_rate(rate)), settings.num_clients
            )

            def one_round(carry: Any, _: Any) -> Any:
                params, state = carry
                updates, state = optimizer.update(gradient(params, *clients), state, params)
                return (optax.apply_updates(params, updates), state), None

            def some_rounds(carry: Any, _: Any) -> Any:
                length = settings.rounds // settings.num_evaluations
                carry, _ = jax.lax.scan(one_round, carry, length=length)
                return carry, jnp.stack([accuracy(carry[0], *of) for of in (validation, test)])

            carry = params, optimizer.init(params)
            return jax.lax.scan(some_rounds, carry, length=settings.num_evaluations)[1]

        many = jax.jit(jax.vmap(run, in_axes=(0, None)))
        return lambda rates: np.asarray(many(jnp.asarray(rates), (clients, validation, test)))

    return train


def run(settings: PrivateSettings, work: Work) -> Record:
    """Tunes each method with the first seed, and runs it with all."""
    if settings.rounds % settings.num_evaluations:
        raise SystemExit("--rounds must be a multiple of --num-evaluations.")
    plan = dm.privacy.PrivacyPlan(settings.epsilon, settings.delta, rounds=settings.rounds)
    train = make_trainer(settings, plan)
    methods: Record = {}
    values = sum(len(SECOND[name][1]) for name in settings.methods)
    work.expect(values + len(settings.methods) * len(settings.seeds))
    for name in settings.methods:
        tuned = {}
        for second in SECOND[name][1]:
            work.say(f"{TITLES[name]}, {SECOND[name][0]} = {second}", done=1)
            found = work.part(
                f"{name}_{second}",
                lambda name=name, second=second: rounded(
                    train(name, second, settings.seeds[0])(settings.rates)[:, -1, 0]
                ),
            )
            tuned |= {(second, r): x for r, x in zip(settings.rates, found, strict=True)}
        second, rate = max(tuned, key=lambda of: tuned[of])
        curves = []
        for seed in settings.seeds:
            work.say(f"{TITLES[name]}, seed {seed}", done=1)
            curves.append(
                work.part(
                    f"{name}_best_{seed}",
                    lambda name=name, second=second, rate=rate, seed=seed: rounded(
                        train(name, second, seed)([rate])[0]
                    ),
                )
            )
        methods[name] = {
            "tuned": [[second, rate, x] for (second, rate), x in tuned.items()],
            "best": [second, rate],
            "curves": curves,
        }
    made = {"noise_multiplier": plan.noise_multiplier, "accountant": plan.accountant}
    return made | {"relation": plan.relation, "methods": methods}


def tables(record: Record) -> Any:
    """Accuracies after all rounds."""
    of = record["settings"]
    table = new_table(
        f"Test accuracy after {of['rounds']} rounds, ε = {of['epsilon']:g}, δ = {of['delta']:g}, "
        f"σ = {record['noise_multiplier']:.3f}",
        *("method", "second parameter", "rate", "accuracy"),
    )
    for name, one in record["methods"].items():
        second, rate = one["best"]
        accuracies = [100 * curve[-1][1] for curve in one["curves"]]
        table.add_row(
            TITLES[name],
            f"{SECOND[name][0]} = {second:g}",
            show(rate, 3),
            show_spread(accuracies, 1, " %"),
        )
    return [table]


def figures(record: Record) -> Any:
    """Accuracies by rounds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    of = record["settings"]
    every = of["rounds"] // of["num_evaluations"]
    for index, (name, one) in enumerate(record["methods"].items()):
        by_time = [list(at) for at in zip(*([x[1] for x in c] for c in one["curves"]), strict=True)]
        x = [every * (i + 1) for i in range(len(by_time))]
        draw_spread(axes, x, by_time, index, TITLES[name])
    finish(axes, x="rounds", y="test accuracy")
    legend(figure, axes)
    return {"": figure}


STUDY = Study("private", PrivateSettings, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
