"""Finite sums with a full gradient that is cheap: a quadratic, a logistic one, one of layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from estimator_study.settings import ProblemName

QUADRATIC_SHAPE = (12, 8)
NUM_FEATURES, NUM_CLASSES = 20, 4
NUM_LAYERS, LAYER_SHAPE = 6, (4, 3)
_LAYER_SAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The mean over samples i of ½⟨X, HᵢX⟩ + ⟨Bᵢ, X⟩; the mean of Bᵢ is 0, and so is X*.

    Two gradients of a sample differ by Hᵢ(X - Y), whose noise is that of Hᵢ.
    """

    curvatures: Float[Array, "samples rows rows"]
    offsets: Float[Array, "samples rows columns"]
    start: Float[Array, "rows columns"]

    @property
    def num_samples(self) -> int:
        """How many."""
        return len(self.curvatures)

    def loss(self, params: Array, samples: Int[Array, " batch"]) -> Array:
        """Of a minibatch."""
        curvature, offset = self.curvatures[samples].mean(0), self.offsets[samples].mean(0)
        return jnp.vdot(params, curvature @ params) / 2 + jnp.vdot(offset, params)

    def gradient(self, params: Array) -> Array:
        """Of all samples."""
        return self.curvatures.mean(0) @ params + self.offsets.mean(0)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression: cross-entropy of the classes of standard normal features.

    The classes are drawn from the softmax of features · W with W normal of deviation ½, so that
    they can be told apart, and not all of them.
    """

    features: Float[Array, "samples features"]
    classes: Int[Array, " samples"]
    start: Float[Array, "features classes"]

    @property
    def num_samples(self) -> int:
        """How many."""
        return len(self.features)

    def loss(self, params: Array, samples: Int[Array, " batch"]) -> Array:
        """Of a minibatch."""
        log_probabilities = jax.nn.log_softmax(self.features[samples] @ params)
        return -jnp.take_along_axis(log_probabilities, self.classes[samples, None], axis=1).mean()

    def gradient(self, params: Array) -> Array:
        """Of all samples."""
        return jax.grad(self.loss)(params, jnp.arange(self.num_samples))


def make_problem(name: ProblemName, num_samples: int, seed: int) -> Quadratic | Logistic:
    """A problem from its generating process."""
    generator = np.random.default_rng(seed)
    if name == "quadratic":
        rows, columns = QUADRATIC_SHAPE
        curvatures = _curvature(generator, rows) + _centred_symmetric(generator, num_samples, rows)
        offsets = generator.standard_normal((num_samples, rows, columns))
        return Quadratic(
            jnp.asarray(curvatures, jnp.float32),
            jnp.asarray(offsets - offsets.mean(0), jnp.float32),
            jnp.asarray(generator.standard_normal((rows, columns)), jnp.float32),
        )
    features = generator.standard_normal((num_samples, NUM_FEATURES))
    logits = features @ generator.normal(0, 0.5, (NUM_FEATURES, NUM_CLASSES))
    classes = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    return Logistic(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(classes),
        jnp.asarray(generator.standard_normal((NUM_FEATURES, NUM_CLASSES)), jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class LayeredQuadratic:
    """The mean over samples i of ½⟨x, (H + noise · Eᵢ)x⟩ + noise · ⟨bᵢ, x⟩, x the layers in a row.

    Blocks between layers, of H and of Eᵢ, are multiplied by `coupling`. Eᵢ and bᵢ have mean 0, and
    the minimum is f(0) = 0.
    """

    curvature: Float[Array, "size size"]
    sample_curvatures: Float[Array, "samples size size"]
    sample_offsets: Float[Array, "samples size"]
    within_layers: Float[Array, "size size"]
    """1 in the blocks on the diagonal, 0 elsewhere."""
    start: dict[str, Float[Array, "rows columns"]]

    @property
    def num_samples(self) -> int:
        """How many."""
        return len(self.sample_offsets)

    def value(self, params: Any, coupling: Array | float) -> Array:
        """f, of all samples."""
        x = _in_a_row(params)
        return x @ self._product(self.curvature, x, coupling) / 2

    def loss(
        self, params: Any, sample: Array, noise: Array | float, coupling: Array | float
    ) -> Array:
        """Of one sample."""
        x = _in_a_row(params)
        of_sample = x @ self._product(self.sample_curvatures[sample], x, coupling) / 2
        return self.value(params, coupling) + noise * (of_sample + self.sample_offsets[sample] @ x)

    def gradient(self, params: Any, coupling: Array | float) -> Any:
        """Of all samples."""
        return jax.grad(self.value)(params, coupling)

    def _product(self, matrix: Array, x: Array, coupling: Array | float) -> Array:
        # Products first: a vmap over couplings then makes them products of matrices.
        return coupling * (matrix @ x) + (1 - coupling) * ((matrix * self.within_layers) @ x)


def make_layered_quadratic(seed: int) -> LayeredQuadratic:
    """Six layers of 4 × 3, shallow to deep."""
    generator = np.random.default_rng(seed)
    layer_size = LAYER_SHAPE[0] * LAYER_SHAPE[1]
    size = NUM_LAYERS * layer_size
    offsets = generator.standard_normal((_LAYER_SAMPLES, size))
    curvature = _curvature(generator, size)
    sample_curvatures = _centred_symmetric(generator, _LAYER_SAMPLES, size)
    return LayeredQuadratic(
        jnp.asarray(curvature, jnp.float32),
        jnp.asarray(sample_curvatures, jnp.float32),
        jnp.asarray(offsets - offsets.mean(0), jnp.float32),
        jnp.asarray(np.kron(np.eye(NUM_LAYERS), np.ones((layer_size, layer_size))), jnp.float32),
        start={
            f"layer_{i}": jnp.asarray(generator.standard_normal(LAYER_SHAPE), jnp.float32)
            for i in range(NUM_LAYERS)
        },
    )


def _curvature(generator: np.random.Generator, size: int) -> np.ndarray:
    """A symmetric matrix with eigenvalues evenly spaced in the logarithm from 0.1 to 1."""
    basis = np.linalg.qr(generator.standard_normal((size, size)))[0]
    return basis * np.geomspace(0.1, 1, size) @ basis.T


def _centred_symmetric(generator: np.random.Generator, num_samples: int, size: int) -> np.ndarray:
    """Symmetric matrices of mean 0 with a spectral norm of about 1."""
    square = generator.standard_normal((num_samples, size, size))
    symmetric = (square + square.swapaxes(1, 2)) / np.sqrt(8 * size)
    return symmetric - symmetric.mean(0)


def _in_a_row(params: Any) -> Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])
