"""What is known of a kernel: where its fan-in and fan-out are, and moments of both sides."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dropmuon_jax._checks import describe
from dropmuon_jax.layers.matrices import MatrixAxes, to_matrices
from dropmuon_jax.layers.trees import leaf_paths


class Moments(NamedTuple):
    """Moments of activations over all rows (tokens) that were seen, in float32 at least."""

    num_rows: Float[Array, ""]
    """How many."""
    mean: Array
    """The mean of each feature."""
    variance: Array
    """The variance of each feature, divided by their number."""

    @property
    def rms(self) -> Array:
        """The root mean square of each feature: the column's norm `‖X_:j‖₂ / √rows`."""
        return jnp.sqrt(self.variance + self.mean**2)

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together, by Chan, Golub and LeVeque's formula."""
        num_rows = self.num_rows + other.num_rows
        of_self, of_other = self.num_rows / num_rows, other.num_rows / num_rows
        shift = other.mean - self.mean
        return Moments(
            num_rows,
            self.mean + of_other * shift,
            of_self * self.variance + of_other * other.variance + of_self * of_other * shift**2,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a leaf is used as a kernel; axes in neither fan are a batch, such as stacked layers."""

    inputs: Moments
    """Of shapes that broadcast with the leaf: 1 along its fan-out axes."""
    outputs: Moments
    """Of shapes that broadcast with the leaf: 1 along its fan-in axes; before the bias."""
    fan_in: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """The axes that the product sums over."""
    fan_out: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """The axes that the product keeps."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return jnp.broadcast_shapes(self.inputs.mean.shape, self.outputs.mean.shape)

    def matrices(self, leaf: Array) -> tuple[Float[Array, "batch fan_in fan_out"], Callable]:
        """The leaf as a stack of matrices, and the way back."""
        return to_matrices(leaf, MatrixAxes("", self.fan_in, self.fan_out))

    def rms_of_inputs(self) -> Float[Array, "batch fan_in 1"]:
        """`‖X_:j‖₂ / √rows`, to be multiplied with :meth:`matrices`."""
        return self.matrices(self.inputs.rms)[0]

    def rms_of_outputs(self) -> Float[Array, "batch 1 fan_out"]:
        """`‖Y_k:‖₂` / √count, to be multiplied with :meth:`matrices`."""
        return self.matrices(self.outputs.rms)[0]


Kernels = dict[str, Kernel]


def check_mapping(name: str, value: Any) -> dict[str, Array]:
    """The arrays of a mapping from paths, in a dict of their own."""
    if not isinstance(value, Mapping) or not all(hasattr(x, "dtype") for x in value.values()):
        raise TypeError(f"{name} must be a mapping from paths to arrays, got {describe(value)}.")
    return dict(value)


def check_kernels(params: Any, kernels: Any) -> dict[str, Array]:
    """The leaves of kernels by path; an error for a path or a shape that params do not have."""
    if not isinstance(kernels, dict) or not all(isinstance(x, Kernel) for x in kernels.values()):
        raise TypeError(
            "kernels must be what record_kernels returns, a dict from paths to Kernel, or a part."
        )
    leaves = dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
    for path in kernels:
        if path not in leaves:
            raise ValueError(
                f"kernels have '{path}', which params do not: {sorted(leaves)[:6]}. Give the "
                "params that record_kernels was given."
            )
        if leaves[path].shape != kernels[path].shape:
            raise ValueError(
                f"'{path}' has shape {leaves[path].shape} in params, and {kernels[path].shape} in "
                "kernels. Give the params that record_kernels was given."
            )
    return {path: leaves[path] for path in kernels}
