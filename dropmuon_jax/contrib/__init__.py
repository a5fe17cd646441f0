"""Systems beside the core, which depend on it and on which it does not: reach them by name.

`pruning` takes weights out of trained networks; `broximal` steps to where a function is smallest in
a ball; `allocation` shares micro-batches out among workers of unequal speed.
"""

from dropmuon_jax.contrib import allocation, broximal, pruning

__all__ = ["allocation", "broximal", "pruning"]
