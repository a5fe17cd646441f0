"""Systems beside the core, which depend on it and on which it does not: reach them by name.

`pruning` takes weights out of trained networks.
"""

from dropmuon_jax.contrib import pruning

__all__ = ["pruning"]
