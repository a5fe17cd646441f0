"""Functions of several layers whose smoothness in the norm of each layer is known."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import dropmuon_jax as dm

Params = tuple[Array, ...]
# Asymmetric on purpose; the layers of a problem take turns with them.
SPACES: tuple[tuple[dm.norms.Norm, tuple[int, ...]], ...] = (
    (dm.norms.spectral_norm("rms_to_rms"), (4, 3)),
    (dm.norms.sign_norm(), (3, 2)),
    (dm.norms.euclidean_norm(), (5,)),
)


class Problem(NamedTuple):
    """f(X + G) ≤ f(X) + ⟨∇f(X), G⟩ + Σ_i ½(L⁰_i + L¹_i ‖∇_i f(X)‖*)‖G_i‖²."""

    norms: tuple[dm.norms.Norm, ...]
    loss: Callable[[Params], Array]
    start: Params
    l0: Float[np.ndarray, " layers"]
    l1: Float[np.ndarray, " layers"] | float = 0.0
    infimum: float = 0.0


def separable(smoothness: Sequence[float], seed: int) -> Problem:
    """Σ_i L_i/2 ‖X_i‖_F² / r_i, where r_i is the largest ‖Z‖_F² in the ball of the layer."""
    norms, start = _layers(len(smoothness), seed)
    curvatures = np.array(smoothness) / _largest_squares(norms, start)

    def loss(params: Params) -> Array:
        squares = jnp.stack([jnp.sum(x**2) for x in params])
        return 0.5 * jnp.sum(curvatures * squares)

    return Problem(norms, loss, start, np.array(smoothness))


def coupled(smoothness: Sequence[float], seed: int) -> Problem:
    """½‖Σ_i B_i vec X_i‖²; ‖Σ B_i g_i‖² ≤ b Σ ‖B_i‖² ‖G_i‖_F² gives the L_i."""
    norms, start = _layers(len(smoothness), seed)
    generator = np.random.default_rng(seed)
    maps = []
    for of, square, x in zip(smoothness, _largest_squares(norms, start), start, strict=True):
        random = generator.normal(size=(2 * len(smoothness), x.size))
        largest = len(smoothness) * square * np.linalg.norm(random, 2) ** 2
        maps.append(jnp.asarray(random * math.sqrt(of / largest)))

    def loss(params: Params) -> Array:
        images = [of @ x.reshape(-1) for of, x in zip(maps, params, strict=True)]
        return 0.5 * jnp.sum(jnp.sum(jnp.stack(images), 0) ** 2)

    return Problem(norms, loss, start, np.array(smoothness))


def huber(smoothness: Sequence[float], seed: int, *, num_steps: int = 240) -> Problem:
    """Σ_i h(⟨A_i, X_i⟩), ‖A_i‖* = 1, where h has curvature L_i near 0 and slope ε further out.

    All start with ⟨A_i, X_i⟩ = 1. A sharp step of 1/L_i comes ε/L_i nearer to 0, so layer i needs
    L_i/ε of them, and the stiffest `num_steps`.
    """
    norms, random = _layers(len(smoothness), seed)
    normals, directions = _hyperplanes(norms, random)
    curvatures, slope = np.array(smoothness), max(smoothness) / num_steps

    def loss(params: Params) -> Array:
        y = jnp.abs(_products(normals, params))
        near = jnp.minimum(y, slope / curvatures)
        return jnp.sum(0.5 * curvatures * near**2 + slope * (y - near))

    return Problem(norms, loss, directions, np.array(smoothness))


def hyperbolic(scales: Sequence[float], seed: int) -> Problem:
    """Σ_i cosh(s_i ⟨A_i, X_i⟩), ‖A_i‖* = 1: (L⁰, L¹)-smooth and not smooth.

    |φ''| ≤ s² + s|φ'| for φ = cosh(s ·), so that within a distance of 1/s (Zhang et al., 2020,
    arXiv:2010.02519, Lemma A.3) L⁰ = 2s² and L¹ = (e - 1)s; adaptive radii are below 1/L¹.
    """
    norms, random = _layers(len(scales), seed)
    normals, directions = _hyperplanes(norms, random)
    of = np.array(scales, float)

    def loss(params: Params) -> Array:
        return jnp.sum(jnp.cosh(of * _products(normals, params)))

    start = tuple(3 / scale * direction for scale, direction in zip(of, directions, strict=True))
    return Problem(norms, loss, start, 2 * of**2, (math.e - 1) * of, infimum=float(len(of)))


def _layers(num_layers: int, seed: int) -> tuple[tuple[dm.norms.Norm, ...], Params]:
    """The norms, and a random array for each."""
    generator = np.random.default_rng([seed, num_layers])
    spaces = [SPACES[i % len(SPACES)] for i in range(num_layers)]
    arrays = tuple(jnp.asarray(generator.normal(size=shape)) for _, shape in spaces)
    return tuple(norm for norm, _ in spaces), arrays


@functools.partial(jax.jit, static_argnums=0)  # operation by operation it compiles for seconds
def _hyperplanes(norms: tuple[dm.norms.Norm, ...], arrays: Params) -> tuple[Params, Params]:
    """The arrays, of dual norm 1, and the direction of each: ⟨A, direction⟩ = 1."""
    normals = tuple(x / norm.dual_norm(x) for norm, x in zip(norms, arrays, strict=True))
    return normals, tuple(norm.direction(x) for norm, x in zip(norms, normals, strict=True))


def _products(normals: Params, params: Params) -> Float[Array, " layers"]:
    return jnp.stack([jnp.sum(normal * x) for normal, x in zip(normals, params, strict=True)])


def _largest_squares(norms: tuple[dm.norms.Norm, ...], arrays: Params) -> np.ndarray:
    """Of ‖Z‖_F in each unit ball, which every direction of full rank attains."""
    return np.array([np.sum(np.square(of)) for of in _hyperplanes(norms, arrays)[1]])
