"""Parameters, batches and learning rates, in NumPy, which every library is given."""

from typing import Literal, NamedTuple

import numpy as np

from text import load_text

GraphName = Literal["tiny", "small", "mlp", "gpt"]
SYMBOLS, CONTEXT, EMBEDDING = 27, 16, 64  # of the multilayer perceptron
VOCABULARY, LENGTH, WIDTH, HEADS, BLOCKS = 65, 8, 24, 6, 6  # of the GPT, with 46,337 parameters
Arrays = dict[str, np.ndarray]


class Problem(NamedTuple):
    """What is trained, on the same batches by all."""

    params: Arrays
    inputs: np.ndarray
    """Of each step: empty for scalar graphs, (steps, batch, characters) for others."""
    labels: np.ndarray
    """Of each step, (steps, batch) or, of every character, (steps, batch, characters)."""
    rate: float
    """Of gradient descent."""


def make_problem(graph: GraphName, width: int, batch_size: int, num_steps: int) -> Problem:
    """A graph with random parameters; `width` is that of the hidden layer of the "mlp"."""
    generator = np.random.default_rng(0)
    if graph in ("tiny", "small"):
        start = {"tiny": (-41.0, 2.0), "small": (-4.0, 2.0)}[graph]
        params = {name: np.array(value) for name, value in zip("ab", start, strict=True)}
        empty = np.zeros((num_steps, 0), np.int32)
        return Problem(params, empty, empty, 1e-9)
    symbols, length = (SYMBOLS, CONTEXT + 1) if graph == "mlp" else (VOCABULARY, LENGTH + 1)
    tokens = _tokens(symbols)
    starts = generator.integers(len(tokens) - length, size=(num_steps, batch_size))
    windows = tokens[starts[..., None] + np.arange(length)]
    shapes = _of_mlp(width) if graph == "mlp" else _of_gpt()
    params = {name: _initial(generator, name, shape) for name, shape in shapes.items()}
    labels = windows[..., -1] if graph == "mlp" else windows[..., 1:]
    return Problem(params, windows[..., :-1], labels, 0.1 if graph == "mlp" else 0.01)


def _tokens(symbols: int) -> np.ndarray:
    """The manual of Python's syntax, all but the most frequent characters as one symbol."""
    train = load_text().train
    frequent = np.argsort(-np.bincount(train), kind="stable")[: symbols - 1]
    number = np.full(train.max() + 1, symbols - 1, np.int32)
    number[frequent] = np.arange(symbols - 1)
    return number[train]


def _of_mlp(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "embedding": (SYMBOLS, EMBEDDING),
        "hidden/kernel": (CONTEXT * EMBEDDING, width),
        "hidden/bias": (width,),
        "head/kernel": (width, SYMBOLS),
        "head/bias": (SYMBOLS,),
    }


def _of_gpt() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (VOCABULARY, WIDTH),
        "positions": (LENGTH, WIDTH),
    }
    for block in map(str, range(BLOCKS)):
        shapes |= {
            block + "/norm_1/scale": (WIDTH,),
            block + "/norm_1/bias": (WIDTH,),
            block + "/attention/kernel": (WIDTH, 3 * WIDTH),
            block + "/out/kernel": (WIDTH, WIDTH),
            block + "/out/bias": (WIDTH,),
            block + "/norm_2/scale": (WIDTH,),
            block + "/norm_2/bias": (WIDTH,),
            block + "/up/kernel": (WIDTH, 4 * WIDTH),
            block + "/up/bias": (4 * WIDTH,),
            block + "/down/kernel": (4 * WIDTH, WIDTH),
            block + "/down/bias": (WIDTH,),
        }
    return shapes | {
        "norm/scale": (WIDTH,),
        "norm/bias": (WIDTH,),
        "head/kernel": (WIDTH, VOCABULARY),
        "head/bias": (VOCABULARY,),
    }


def _initial(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("scale"):
        return np.ones(shape, np.float32)
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    deviation = 0.02 if len(shape) < 2 or shape[0] == VOCABULARY else shape[0] ** -0.5
    return generator.normal(scale=deviation, size=shape).astype(np.float32)
