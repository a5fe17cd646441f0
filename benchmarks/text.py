"""The text: the manual of Python's syntax, which every CPython ships, as numbers of characters."""

import dataclasses
import hashlib
import platform
from pydoc_data.topics import topics
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in three blocks that follow each other; a character is its index in the alphabet."""

    alphabet: str
    """Every character of the whole text once, sorted."""
    train: np.ndarray
    validation: np.ndarray
    """Chooses the learning rates."""
    test: np.ndarray
    """Is reported."""
    sha256: str
    """Of the whole text in UTF-8."""

    def record(self) -> dict[str, Any]:
        """What identifies the text, which differs between versions of Python."""
        sizes = {name: len(getattr(self, name)) for name in ("train", "validation", "test")}
        return {
            "source": "pydoc_data.topics",
            "python": platform.python_version(),
            "sha256": self.sha256,
            "num_characters": sum(sizes.values()),
            "num_different_characters": len(self.alphabet),
            "num_characters_by_block": sizes,
        }


def load_text() -> Text:
    """All topics of the manual, sorted by name, with blank lines between them."""
    return split_text("\n\n".join(topics[name] for name in sorted(topics)))


def split_text(text: str) -> Text:
    """80 % to train with, 10 % to validate and 10 % to test, in this order."""
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    tokens = np.array([index[character] for character in text], np.int32)
    train, validation, test = np.split(tokens, [8 * len(tokens) // 10, 9 * len(tokens) // 10])
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Text(alphabet, train, validation, test, sha256)


def even_windows(name: str, block: np.ndarray, count: int, length: int) -> np.ndarray:
    """Windows that do not overlap, (count, length), at equal distances over a block."""
    stride = len(block) // count
    if stride < length:
        raise SystemExit(
            f"--num-eval-windows is {count}, and the {name} block of {len(block)} characters has "
            f"only {len(block) // length} windows of {length} that do not overlap."
        )
    starts = stride * np.arange(count)
    return block[starts[:, None] + np.arange(length)]


def draw_starts(seed: int, *, num_batches: int, batch_size: int, num_starts: int) -> np.ndarray:
    """Where the windows of each batch start, (batches, batch size), fresh in each batch.

    Fewer batches of the same seed and size are the first of more.
    """
    generator = np.random.default_rng(seed)
    batches = [generator.integers(num_starts, size=batch_size) for _ in range(num_batches)]
    return np.array(batches, np.int32)
