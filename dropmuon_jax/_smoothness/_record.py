"""What a run's samples of the smoothness are collected in, on the host."""

import collections
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from dropmuon_jax._layers import leaf_paths
from dropmuon_jax._smoothness._tracking import SmoothnessState

# A sample is read from the device so many later ones on, when the device has long been done with
# it: reading the newest would make the host wait, and end asynchronous dispatch.
_LAG = 16


class SmoothnessSamples(NamedTuple):
    """The samples of one leaf, in the order in which they were taken."""

    steps: Int[np.ndarray, " samples"]
    """In which step."""
    dual_norms: Float[np.ndarray, " samples"]
    """‖g‖*."""
    smoothness: Float[np.ndarray, " samples"]
    """L̂."""


class SmoothnessRecord:
    """Collects the samples of :func:`track_smoothness` along a run.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dropmuon_jax as dm
        >>> tx = optax.chain(dm.track_smoothness(dm.euclidean_norm(), every=4), optax.sgd(0.1))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> opt_state, record, update = tx.init(params), dm.SmoothnessRecord(), jax.jit(tx.update)
        >>> for step in range(10):
        ...     updates, opt_state = update(jax.tree.map(jnp.square, params), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     record.append(opt_state)
        >>> print(record.samples()["w"].steps)
        [1 5 9]
    """

    def __init__(self):
        self._samples: dict[str, list[tuple[int, float, float]]] = {}
        self._last_steps: dict[tuple[str, ...], int] = {}
        self._unread: collections.deque[tuple[tuple[str, ...], list[jax.Array]]] = (
            collections.deque()
        )

    def append(self, opt_state: Any) -> None:
        """Takes the samples of an optimizer state, unless they have been taken already.

        Call it after every step, or after every n-th: a sample stays in the state until the next.
        It does not wait for the device, and what it keeps survives the donation of the state.

        Args:
            opt_state: The state of an optimizer with :func:`track_smoothness` anywhere in it, once
                or in several subtrees.

        Raises:
            TypeError: If the state is traced.
            ValueError: If :func:`track_smoothness` is not in it, or tracks a leaf twice, or the
                state is a stack of several.
        """
        states = _smoothness_states(opt_state)
        paths = [tuple(leaf_paths(state.remembered.params)) for state in states]
        repeated = [path for path, n in collections.Counter(sum(paths, ())).items() if n > 1]
        if repeated:
            raise ValueError(
                f"Leaf '{repeated[0]}' is tracked twice: keep a record for each tracker, and hand "
                "it that tracker's part of the state."
            )
        for state, of_state in zip(states, paths, strict=True):
            arrays = (*state.sample, state.leaf_of_matrix)
            self._unread.append((of_state, [jnp.copy(array) for array in arrays]))
        while len(self._unread) > _LAG * len(states):
            self._read(*self._unread.popleft())

    def samples(self) -> dict[str, SmoothnessSamples]:
        """All samples, by leaf path; a leaf that never had one has empty arrays."""
        while self._unread:
            self._read(*self._unread.popleft())
        samples = {}
        for path in sorted(self._samples, key=_in_reading_order):
            columns = np.array(self._samples[path], float).reshape(-1, 3).T
            samples[path] = SmoothnessSamples(columns[0].astype(int), columns[1], columns[2])
        return samples

    def _read(self, paths: tuple[str, ...], arrays: list[jax.Array]) -> None:
        for path in paths:
            self._samples.setdefault(path, [])
        step, dual_norms, smoothness, leaf_of_matrix = map(np.asarray, arrays)
        if step == self._last_steps.get(paths, -1):
            return
        self._last_steps[paths] = int(step)
        for i in np.flatnonzero((smoothness >= 0) & np.isfinite(dual_norms + smoothness)):
            entry = int(step), float(dual_norms[i]), float(smoothness[i])
            self._samples[paths[leaf_of_matrix[i]]].append(entry)


def _in_reading_order(path: str) -> list[str | int]:
    """A key that sorts `layer_2` before `layer_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _smoothness_states(opt_state: Any) -> list[SmoothnessState]:
    """Every state of a tracker; an error if there is none that can be read."""

    def is_state(node: Any) -> bool:
        return isinstance(node, SmoothnessState)

    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not states:
        raise ValueError(
            "There is no SmoothnessState in this optimizer state: put dm.track_smoothness first "
            "into the chain."
        )
    for state in states:
        if isinstance(state.sample.step, Tracer):
            raise TypeError("A SmoothnessRecord is on the host: call append outside of jax.jit.")
        if state.sample.step.ndim:
            raise ValueError(
                f"This optimizer state is a stack of {len(state.sample.step)}: append one at a "
                "time, such as jax.tree.map(lambda leaf: leaf[i], opt_state)."
            )
    return states
