"""Error feedback (EF21): workers send what is new, compressed, and all keep one estimate of it."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, UInt32

from dropmuon_jax.compression.compressors import Compressor, Matrices, check_contractive, check_seed
from dropmuon_jax.compression.exchange import WorkerState, gather, mean_over_workers, worker_place
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers, check_dimension_numbers
from dropmuon_jax.layers.layers import Layers
from dropmuon_jax.layers.matrices import MatrixAxes, matrix_axes, vector_axes
from dropmuon_jax.layers.trees import is_static, leaf_paths
from dropmuon_jax.optimizers.composition import as_momentum, row_by_row, rows_of
from dropmuon_jax.sampling.record import seed_words
from dropmuon_jax.transforms.masked import masked_transformation
from dropmuon_jax.transforms.momentum import wide_dtype

Momentum = float | jax.Array | optax.Schedule | optax.GradientTransformation


class EF21State(NamedTuple):
    """State of :func:`ef21`."""

    worker: WorkerState
    """M_j and G_j, of each worker its own."""
    estimate: optax.Updates
    """G, the mean of all G_j, which all workers have; of a leaf that is inactive as it was."""
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The number of all steps."""
    settings: UInt32[Array, " 2"]
    """The seed, and a checksum of the compressor, which all processes must share."""


def ef21(
    compressor: Compressor,
    *,
    momentum: Momentum = 0.9,
    axis: str | None = "workers",
    norm: str = "frobenius",
    seed: int | jax.Array = 0,
    layers: Layers | None = None,
    dimension_numbers: DimensionNumbers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each worker's gradient by the estimate G of the mean momentum, sent compressed.

    Every worker j keeps its momentum M_j and an estimate G_j that all could compute, and

    .. math::
        M_j &\leftarrow \text{decay}\, M_j + (1 - \text{decay})\, \nabla f_j(W; \xi_j) \\
        R_j &= C_j(M_j - G_j), \qquad G_j \leftarrow G_j + R_j \\
        G &\leftarrow G + \tfrac1n \textstyle\sum_j R_j

    of which the payload of R_j alone travels: each worker gathers the payloads of all, and adds
    them up by itself, in one order. So G is the mean of the G_j in every step. What follows in the
    chain sees the same G on all workers: LMOs, Adam or any other optimizer; give it no momentum of
    its own. An inactive layer sends no byte and keeps every bit of M_j, G_j and G.

    With :class:`Identity` a worker sends M_j as it is, and G_j is M_j, bit for bit: with one worker
    this is the momentum alone, and with several the mean of their momenta.

    It starts from M_j = G_j = G = 0. The theory starts from the first gradients, sent as they are:
    :func:`start_from_gradients`.

    Args:
        compressor: C, the same for all workers, such as :class:`RankK` or :class:`TopK`.
        momentum: The decay of M_j, a number or a schedule; or a transformation, such as
            :func:`mvr_momentum`; 0.0 for the gradient itself.
        axis: The axis of workers, of `jax.shard_map`, `jax.vmap` or :func:`on_workers`. None for a
            single worker.
        norm: A norm in which `compressor` must be contractive. The theory of EF21-Muon has the dual
            norm of the step, the nuclear one for Muon, or the Frobenius norm with constants.
        seed: Of the compressors that draw. What a worker draws depends on it, the path of the leaf,
            the step and the worker.
        layers: The layers over the whole parameters, needed if some are stacked. The flags of a
            stack must be known while the step is compiled: a payload has a static shape.
        dimension_numbers: Which axes are rows and columns, for compressors of matrices, as in
            :func:`norm_lmo`. The rows are the fan-in.

    Returns:
        A transformation whose `update` takes the extra argument `layer_mask` (by default all
        active). The state is an :class:`EF21State`, :func:`worker_specs` says what of it is each
        worker's own.

    Raises:
        TypeError: If `compressor` is none; in `update`, for a mask that is traced.
        ValueError: If it is not contractive in the norm; at `init`, if it does not fit a leaf,
            naming its path; in `update`, outside of the axis, or for gradients that `jax.shard_map`
            has summed over the workers already.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.compression.ef21(dm.compression.TopK(1), momentum=0.0, axis=None)
        >>> grads, state = {"w": jnp.array([4.0, 3.0])}, tx.init({"w": jnp.zeros(2)})
        >>> for _ in range(2):  # the largest entry first, then what is still missing
        ...     updates, state = tx.update(grads, state)
        ...     print(updates["w"])
        [4. 0.]
        [4. 3.]

    References:
        Gruntkowska, Maziane, Qu, Richtárik and others, *EF21-Muon*, 2025, arXiv:2510.00643, as it
        is told by secondary sources: the authors' code and constants are not public. The layers
        that are left out are ours, and no theory is known of both together.
    """
    check_contractive(compressor, norm)
    check_dimension_numbers(dimension_numbers)
    check_seed(seed)
    inner = optax.with_extra_args_support(row_by_row(as_momentum(momentum, layers), layers))
    checksum = np.uint32(zlib.crc32(str(compressor).encode()))

    def init(params: optax.Params) -> EF21State:
        cuts = cuts_of(compressor, params, layers, dimension_numbers)
        memory = [compressor.init(cut.shape, cut.dtype) for cut in cuts]
        memory = jax.tree.structure(params).unflatten(memory)
        worker = WorkerState(inner.init(params), wide_zeros(params), memory)
        settings = jnp.stack([seed_words(seed)[1], checksum])
        return EF21State(worker, wide_zeros(params), jnp.zeros((), jnp.int32), settings)

    def update(updates: Any, state: EF21State, params: Any, layer_mask: Any, extra_args: Any):
        index = worker_place(axis, updates)
        flags, treedef = jax.tree.flatten(layer_mask)
        momenta, inner_state = inner.update(
            updates, state.worker.inner_state, params, layer_mask=layer_mask, **extra_args
        )
        grads, own = map(jax.tree.leaves, (momenta, state.worker.estimate))
        estimates, of_params = jax.tree.flatten(state.estimate)
        memory = of_params.flatten_up_to(state.worker.memory)
        cuts = cuts_of(compressor, updates, layers, dimension_numbers)
        rows = [cut.active(flag) for cut, flag in zip(cuts, flags, strict=True)]
        sending = [i for i, of in enumerate(rows) if of is not None]
        new: dict[int, Matrices] = {}
        payloads: dict[int, Any] = {}
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        for i in sending:
            cut, of = cuts[i], rows[i]
            new[i] = cut.take(grads[i], of)
            if not compressor.is_exact:
                new[i] = new[i] - cut.take(own[i], of)
            of_worker = jax.random.fold_in(cut.key(key), 1 + index)
            remembered = jax.tree.map(lambda x, of=of: x[of], memory[i])
            payloads[i] = compressor.compress(new[i], of_worker, remembered)
            fresh = compressor.remember(payloads[i], new[i])
            memory[i] = jax.tree.map(lambda x, y, of=of: x.at[of].set(y), memory[i], fresh)
        sent = {i: compressor.is_sent(cuts[i].key(key)) for i in sending}
        gathered = exchange(payloads, sent, axis)

        def arrived(of_worker: dict[int, Any]) -> dict[int, Matrices]:
            return {i: compressor.decompress(x, new[i]) for i, x in of_worker.items()}

        def only_sent(found: dict[int, Matrices]) -> dict[int, Matrices]:
            return {
                i: x if (flag := sent[i]) is None else jnp.where(flag, x, 0)
                for i, x in found.items()
            }

        of_own = only_sent(arrived(payloads))
        mean: dict[int, Matrices] = {}
        if sending:
            zeros = {i: jnp.full(x.shape, -0.0, x.dtype) for i, x in new.items()}
            mean = only_sent(mean_over_workers(arrived, gathered, zeros))
        steps = [jnp.zeros_like(g) for g in grads]
        for i in sending:
            cut, of = cuts[i], rows[i]
            own[i] = cut.advance(own[i], of, of_own[i], replace=compressor.is_exact)
            estimates[i] = cut.advance(estimates[i], of, mean[i], replace=compressor.is_exact)
            steps[i] = cut.put(steps[i], of, cut.take(estimates[i], of))
        worker = WorkerState(inner_state, treedef.unflatten(own), of_params.unflatten(memory))
        estimate, count = treedef.unflatten(estimates), optax.safe_increment(state.count)
        new_state = EF21State(worker, estimate, jnp.asarray(count), state.settings)
        return treedef.unflatten(steps), new_state

    return masked_transformation(init, update, takes_rows=True)


def wide_zeros(params: optax.Params) -> optax.Updates:
    """Zeros like the parameters, in float32 at least: of many small steps none is lost."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p)), params)


def exchange(payloads: dict[int, Any], sent: dict[int, Any], axis: str | None) -> dict[int, Any]:
    """The payloads of all workers; what no worker sends in this step is not exchanged."""
    gathered = gather({i: x for i, x in payloads.items() if sent[i] is None}, axis)
    for i, flag in sent.items():
        if flag is not None:
            gathered[i] = jax.lax.cond(
                flag,
                lambda x: gather(x, axis),
                lambda x: jax.tree.map(
                    jnp.zeros_like, jax.eval_shape(lambda y: gather(y, axis), x)
                ),
                payloads[i],
            )
    return {i: gathered[i] for i in payloads}


class Cut(NamedTuple):
    """A leaf as the matrices that are compressed, (layers, batch, rows, cols), and back.

    A leaf that is no stack is one layer. `rows` are the layers that are meant.
    """

    path: str
    leaf: jax.ShapeDtypeStruct
    row_axis: int | None
    axes: MatrixAxes
    """Of one layer."""

    @property
    def dtype(self) -> np.dtype:
        """In which is computed: float32 at least."""
        return wide_dtype(self.leaf)  # pyright: ignore[reportArgumentType]

    @property
    def _moved(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The order of the axes of one layer, and its sizes in that order."""
        sizes = [n for axis, n in enumerate(self.leaf.shape) if axis != self.row_axis]
        sides = self.axes.fan_in + self.axes.fan_out
        order = (*(axis for axis in range(len(sizes)) if axis not in sides), *sides)
        return order, tuple(sizes[axis] for axis in order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all matrices."""
        _, sizes = self._moved
        num_in, num_out = len(self.axes.fan_in), len(self.axes.fan_out)
        of_batch = len(sizes) - num_in - num_out
        groups = sizes[:of_batch], sizes[of_batch : of_batch + num_in], sizes[of_batch + num_in :]
        layers = 1 if self.row_axis is None else self.leaf.shape[self.row_axis]
        return (layers, *(math.prod(group) for group in groups))

    def active(self, flag: Any) -> Any:
        """The active layers, None if there are none."""
        if is_static(flag):
            return slice(None) if flag else None
        if isinstance(flag, jax.Array):
            raise TypeError(
                f"layer_mask is an array at '{self.path}'. What is sent has a static shape, so the "
                "active layers must be known when the step is compiled: give a depth that is a "
                "Python integer, jax.jit(step, static_argnames='depth')."
            )
        indices = np.flatnonzero(flag)
        return indices if indices.size else None

    def take(self, leaf: Array, rows: Any) -> Matrices:
        """The matrices of the meant layers."""
        x = leaf[None] if self.row_axis is None else jnp.moveaxis(leaf, self.row_axis, 0)
        order, _ = self._moved
        x = x[rows].transpose(0, *(1 + axis for axis in order))
        return x.reshape(x.shape[0], *self.shape[1:]).astype(self.dtype)

    def put(self, leaf: Array, rows: Any, matrices: Matrices) -> Array:
        """The leaf with other matrices in the meant layers."""
        order, sizes = self._moved
        x = matrices.reshape(-1, *sizes).transpose(0, *(1 + i for i in np.argsort(order)))
        x = x.astype(leaf.dtype)
        if self.row_axis is None:
            return x[0]
        if isinstance(rows, np.ndarray):
            x = jnp.moveaxis(leaf, self.row_axis, 0).at[rows].set(x)
        return jnp.moveaxis(x, 0, self.row_axis)

    def advance(self, leaf: Array, rows: Any, step: Matrices, *, replace: bool) -> Array:
        """The leaf plus a step of the meant layers, or these replaced by it."""
        return self.put(leaf, rows, step if replace else self.take(leaf, rows) + step)

    def key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key of the leaf, whatever other leaves there are."""
        return jax.random.fold_in(key, np.uint32(zlib.crc32(self.path.encode())))


def cuts_of(
    compressor: Compressor,
    tree: Any,
    layers: Layers | None,
    dimension_numbers: DimensionNumbers | None,
) -> list[Cut]:
    """How each leaf is compressed; an error for one that the compressor does not take."""
    row_axes: list[int | None] = [None] * len(jax.tree.leaves(tree))
    if layers is not None and layers.stacks:
        row_axes = layers.row_axes_of(tree)
    if compressor.of_matrices:
        all_axes = matrix_axes(rows_of(tree, layers), dimension_numbers, vectors=True)
    else:
        all_axes = vector_axes(rows_of(tree, layers))
    leaves = zip(leaf_paths(tree), jax.tree.leaves(tree), row_axes, all_axes, strict=True)
    cuts = [
        Cut(path, jax.ShapeDtypeStruct(x.shape, x.dtype), row_axis, axes)
        for path, x, row_axis, axes in leaves
    ]
    for cut in cuts:
        compressor.check(cut.path, cut.shape)
    return cuts
