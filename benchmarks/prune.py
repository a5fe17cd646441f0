"""What a GPT loses when it is pruned without training, by every score, with and without exchange.

python benchmarks/prune.py --output-dir results
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import dropmuon_jax as dm
from drawing import finish, legend, median, new_table, show, show_spread, style
from gpt import GPT
from records import rounded
from study import Count, Distinct, Positive, Record, Settings, Study, Whole, Work
from text import draw_starts, even_windows, load_text

pruning = dm.contrib.pruning

ScoreName = Literal["magnitude", "OWanda", "Wanda", "SymWanda", "SymWanda²", "RIA", "stochRIA"]
SchemeName = Literal[
    "50 % per output", "50 % per kernel", "60 % per output", "60 % per kernel", "2:4"
]
ExchangeName = Literal["none", "DSnoT", "DSnoT, sign", "R²-DSnoT", "R²-DSnoT, sign"]
SCORES: dict[str, Callable[..., dict[str, jax.Array]]] = {
    "magnitude": pruning.magnitude,
    "OWanda": pruning.owanda,
    "Wanda": pruning.wanda,
    "SymWanda": pruning.symwanda,
    "SymWanda²": functools.partial(pruning.symwanda, squared=True),
    "RIA": pruning.ria,
    "stochRIA": functools.partial(pruning.stochastic_ria, key=jax.random.key(0)),
}
RETRAINED: SchemeName = "60 % per output"


class Prune(Settings):
    """Prune a GPT by every score, with and without exchange, and train what is left."""

    seeds: Distinct[Whole] = (0, 1, 2)
    """Of initial parameters and batches."""
    scores: Distinct[ScoreName] = get_args(ScoreName)
    """What weights are compared by."""
    schemes: Distinct[SchemeName] = get_args(SchemeName)
    """How many are pruned of which."""
    exchanges: Distinct[ExchangeName] = get_args(ExchangeName)
    """What is done to the masks afterwards; "sign": as long as what is lost keeps its sign."""
    width: Count = 64
    """Of the network, which has 4 heads."""
    num_blocks: Count = 4
    """Of the network."""
    context: Count = 64
    """Characters that are seen."""
    batch_size: Count = 32
    """Windows of a step."""
    num_steps: Count = 2000
    """Of Muon, before anything is pruned."""
    learning_rate: Positive = 0.02
    """Of them; falls linearly to 0."""
    num_calibration: Count = 64
    """Windows of the training text that activations are recorded on."""
    num_eval_windows: Count = 256
    """Of the text for tests."""
    retrain_steps: Count = 200
    """Of Drop-Muon with uniform depths, of what is left, at half the learning rate."""
    speed_width: Count = 768
    """Of the stack whose pruning is timed."""
    speed_blocks: Count = 12
    """Of the stack whose pruning is timed."""


class Network:
    """The text and the GPT that learns it."""

    def __init__(self, settings: Prune):
        text, self.settings = load_text(), settings
        self.text = text
        self.model = GPT(
            len(text.alphabet), settings.width, 4, settings.num_blocks, settings.context
        )
        tokens = jnp.zeros((1, settings.context), jnp.int32)
        self.init = jax.jit(lambda key: self.model.init(key, tokens)["params"])
        self.layers = dm.layers_by_path(self.init(jax.random.key(0)), self.model.layer_patterns())
        windows = functools.partial(even_windows, length=settings.context + 1)
        self.test = jnp.asarray(windows("test", text.test, settings.num_eval_windows))
        self.calibration = windows("train", text.train, settings.num_calibration)
        self.evaluated = jax.jit(self.loss)

    def loss(self, params: Any, batch: jax.Array, depth: Any = 0) -> jax.Array:
        """Nats a character."""
        of_stack = self.layers.stack_depth(depth)
        logits: Any = self.model.apply({"params": params}, batch[:, :-1], of_stack)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def perplexity(self, params: Any) -> float:
        """Of a character of the test text."""
        return float(jnp.exp(self.evaluated(params, self.test)))

    def train(self, params: Any, optimizer: Any, depths: Any, num_steps: int, seed: int) -> Any:
        """So many steps at depths that a distribution draws."""
        sampler = dm.DepthSampler(self.layers, depths, seed=seed)
        step = dm.train_step(self.loss, optimizer, sampler)
        state, window = optimizer.init(params), np.arange(self.settings.context + 1)
        starts = draw_starts(
            seed,
            num_batches=num_steps,
            batch_size=self.settings.batch_size,
            num_starts=len(self.text.train) - self.settings.context,
        )
        for i, start in enumerate(starts):
            batch = self.text.train[start[:, None] + window]
            params, state, _ = step(i, params, state, batch)
        return params


def run(settings: Prune, work: Work) -> Record:
    """Each seed is a part, and so is the speed."""
    network, runs = Network(settings), []
    for seed in work.track(settings.seeds, "training and pruning"):
        runs.append(work.part(f"seed_{seed}", functools.partial(_prune, network, seed)))
    speed = work.part("speed", functools.partial(_time, settings))
    return {"text": network.text.record(), "runs": runs, "speed": speed}


def _prune(network: Network, seed: int) -> Record:
    settings = network.settings
    rate = optax.linear_schedule(settings.learning_rate, 0.0, settings.num_steps)
    start = network.init(jax.random.key(seed))
    optimizer = dm.drop_muon(rate, network.layers)
    dense = network.train(start, optimizer, dm.full_depth(), settings.num_steps, seed)
    kernels = record(network.model, dense, np.split(network.calibration[:, :-1], 1))
    found, retrained = [], []
    for name, scheme in itertools.product(settings.scores, settings.schemes):
        scores = SCORES[name](dense, kernels)
        for exchange in settings.exchanges:
            masks = exchanged(dense, kernels, masks_of(scores, kernels, scheme), exchange, scheme)
            pruned = pruning.apply_masks(dense, masks)
            perplexity = network.perplexity(pruned)
            found.append([name, scheme, exchange, perplexity])
            if scheme == RETRAINED and exchange == "none":
                after = _retrain(network, pruned, masks, seed)
                retrained.append({"score": name, "before": perplexity} | after)
    return {
        "seed": seed,
        "dense": network.perplexity(dense),
        "pruned": [[*names, *rounded([of])] for *names, of in found],
        "retrained": retrained,
    }


def record(model: GPT, params: Any, batches: Any) -> Any:
    """The kernels of the blocks; embeddings and the head are left whole, as in the papers."""
    kernels = pruning.record_kernels(
        lambda params, tokens: model.apply({"params": params}, tokens), params, batches
    )
    return {path: of for path, of in kernels.items() if path.startswith("blocks/")}


def masks_of(scores: Any, kernels: Any, scheme: str) -> Any:
    """The masks of a scheme."""
    if scheme == "2:4":
        return pruning.n_of_m_masks(scores, kernels, 2, 4)
    per: Any = scheme.split()[-1]
    return pruning.make_masks(scores, kernels, int(scheme[:2]) / 100, per=per)


def exchanged(params: Any, kernels: Any, masks: Any, exchange: str, scheme: str) -> Any:
    """The masks after the exchange, which keeps 2:4."""
    m = 4 if scheme == "2:4" else None
    if exchange == "none":
        return masks
    rule = pruning.dsnot if exchange.startswith("DSnoT") else pruning.r2_dsnot
    return rule(params, kernels, masks, keeps_sign=exchange.endswith("sign"), m=m)


def _retrain(network: Network, pruned: Any, masks: Any, seed: int) -> dict[str, float]:
    settings = network.settings
    rate = optax.linear_schedule(settings.learning_rate / 2, 0.0, settings.retrain_steps)
    optimizer = pruning.keep_pruned(dm.drop_muon(rate, network.layers), masks)
    params = jax.tree.map(jnp.copy, pruned)
    depths = dm.uniform_depth()
    params = network.train(params, optimizer, depths, settings.retrain_steps, seed + 1000)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_path = {jax.tree_util.keystr(at, simple=True, separator="/"): x for at, x in leaves}
    zeros = sum(int((by_path[path] == 0).sum()) for path in masks)
    pruned_weights = sum(int((~mask).sum()) for mask in masks.values())
    return {"after": network.perplexity(params), "zeros": zeros, "pruned_weights": pruned_weights}


def _time(settings: Prune) -> Record:
    """Seconds to record, and to score and mask by each score, once compiled and once not."""
    model = GPT(64, settings.speed_width, 4, settings.speed_blocks, settings.context)
    tokens = jnp.zeros((4, settings.context), jnp.int32)
    params = jax.jit(lambda key: model.init(key, tokens)["params"])(jax.random.key(0))

    def timed(make: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        made = jax.block_until_ready(make())
        return time.perf_counter() - start, made

    batches = [jax.random.randint(jax.random.key(i), tokens.shape, 0, 64) for i in range(4)]
    seconds = {}
    seconds["recording 4 batches"], kernels = timed(lambda: record(model, params, batches))
    for name in settings.scores:
        seconds[name], masks = timed(
            lambda name=name: pruning.make_masks(SCORES[name](params, kernels), kernels, 0.5)
        )
        del masks
    weights = sum(x.size for x in pruning.magnitude(params, kernels).values())
    return {
        "seconds": {name: rounded([of], 3)[0] for name, of in seconds.items()},
        "weights": weights,
        "bytes_of_record": sum(x.nbytes for x in jax.tree.leaves(kernels)),
    }


def of(record: Record, score: str, scheme: str, exchange: str) -> list[float | None]:
    """The perplexity of each seed."""
    return [
        value
        for run in record["runs"]
        for *names, value in run["pruned"]
        if names == [score, scheme, exchange]
    ]


def tables(record: Record) -> Iterator[Table | str]:
    """A table of medians for each scheme, one of what is trained afterwards, and the speed."""
    settings = record["settings"]
    dense = show_spread([run["dense"] for run in record["runs"]], 3)
    yield f"Perplexity of a character; before the pruning {dense}.\n"
    for scheme in settings["schemes"]:
        table = new_table(scheme, "score", *settings["exchanges"])
        for score in settings["scores"]:
            cells = (of(record, score, scheme, exchange) for exchange in settings["exchanges"])
            table.add_row(score, *(show(median(cell), 3) for cell in cells))
        yield table
    if RETRAINED in settings["schemes"] and "none" in settings["exchanges"]:
        title = f"{RETRAINED}, and {settings['retrain_steps']} steps of Drop-Muon"
        table = new_table(title, "score", "before", "after", "zeros − pruned")
        for i, score in enumerate(settings["scores"]):
            runs = [run["retrained"][i] for run in record["runs"]]
            columns = ([run[when] for run in runs] for when in ("before", "after"))
            extra = sum(run["zeros"] - run["pruned_weights"] for run in runs)
            table.add_row(score, *(show_spread(column, 3) for column in columns), str(extra))
        yield table
    speed = record["speed"]
    table = new_table(f"Pruning {speed['weights']:,} weights", "what", "seconds")
    for name, seconds in speed["seconds"].items():
        table.add_row(name, f"{seconds:.2f}")
    table.add_row("all", f"{sum(speed['seconds'].values()):.2f}")
    yield table
    yield f"What is recorded of activations is {speed['bytes_of_record'] / 1e6:.1f} MB."


def figures(record: Record) -> dict[str, Figure]:
    """A panel for each scheme, a row for each score, a mark for each exchange."""
    settings = record["settings"]
    schemes = settings["schemes"]
    figure = Figure(figsize=(2.6 * len(schemes) + 2, 3.6), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0]
    rows = np.arange(len(settings["scores"]))
    for axes, scheme in zip(panels, schemes, strict=True):
        for index, exchange in enumerate(settings["exchanges"]):
            values = [of(record, score, scheme, exchange) for score in settings["scores"]]
            look = style(index) | {"linestyle": "none"}
            at = rows + 0.2 * (index - (len(settings["exchanges"]) - 1) / 2)
            middle = np.array([median(seeds) for seeds in values], float)
            for y, seeds in zip(at, values, strict=True):
                axes.plot(seeds, [y] * len(seeds), color=look["color"], linewidth=1, alpha=0.5)
            axes.plot(middle, at, **look, markersize=5, label=exchange)
        dense = median([run["dense"] for run in record["runs"]])
        axes.axvline(dense, color="black", linewidth=0.8, label="not pruned")
        finish(axes, scheme)
    panels[0].set_yticks(rows, settings["scores"])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("perplexity of a character (median and range of seeds)")
    legend(figure, panels[0])
    return {"": figure}


STUDY = Study("prune", Prune, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
