"""Pruning without training: what each weight is worth, and what is left of a network.

`record_kernels` runs a network on a little data, a score says what each weight is worth,
`make_masks` or `n_of_m_masks` which are kept, `dsnot` exchanges some of them, and `apply_masks`
prunes. `keep_pruned` goes around an optimizer that trains what is left.

Examples:
    >>> import jax, jax.numpy as jnp, dropmuon_jax as dm
    >>> pruning, key = dm.contrib.pruning, jax.random.key(0)
    >>> params = {"w": jax.random.normal(key, (8, 4))}
    >>> kernels = pruning.record_kernels(lambda p, x: x @ p["w"], params, [jnp.ones((16, 8))])
    >>> masks = pruning.make_masks(pruning.wanda(params, kernels), kernels, 0.75)
    >>> params = pruning.apply_masks(params, masks)
    >>> print((params["w"] != 0).sum(0))
    [2 2 2 2]
"""

from dropmuon_jax.contrib.pruning.exchange import dsnot, r2_dsnot
from dropmuon_jax.contrib.pruning.kernels import Kernel, Moments
from dropmuon_jax.contrib.pruning.masks import (
    KeepPrunedState,
    apply_masks,
    keep_pruned,
    make_masks,
    n_of_m_masks,
)
from dropmuon_jax.contrib.pruning.record import record_kernels
from dropmuon_jax.contrib.pruning.scores import (
    magnitude,
    owanda,
    ria,
    stochastic_ria,
    symwanda,
    wanda,
)

__all__ = [
    "KeepPrunedState",
    "Kernel",
    "Moments",
    "apply_masks",
    "dsnot",
    "keep_pruned",
    "magnitude",
    "make_masks",
    "n_of_m_masks",
    "owanda",
    "r2_dsnot",
    "record_kernels",
    "ria",
    "stochastic_ria",
    "symwanda",
    "wanda",
]
