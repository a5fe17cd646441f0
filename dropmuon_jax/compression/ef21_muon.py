"""EF21-Muon and its drop version: error feedback of workers, then Muon without momentum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from dropmuon_jax._checks import describe
from dropmuon_jax.compression.compressors import Compressor, Identity, check_contractive
from dropmuon_jax.compression.error_feedback import Momentum, cuts_of, ef21
from dropmuon_jax.compression.server_model import server_model
from dropmuon_jax.layers.dimension_numbers import DimensionNumbers
from dropmuon_jax.layers.layers import Layers, check_layers
from dropmuon_jax.layers.prefixes import given_mask, remembered_labels
from dropmuon_jax.layers.roles import Roles, as_roles, matrix_labels
from dropmuon_jax.layers.trees import resolve_whole_mask
from dropmuon_jax.optimizers.composition import rows_of
from dropmuon_jax.optimizers.muon import drop_muon, muon
from dropmuon_jax.transforms.masked import chain_subtrees

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options_of(optimizer: Callable[..., Any]) -> Callable[[Function], Function]:
    """Names the options of an optimizer in a signature, where `optax.inject_hyperparams` reads."""

    def named(function: Function) -> Function:
        own = inspect.signature(function)
        kept = [of for of in own.parameters.values() if of.kind is not of.VAR_KEYWORD]
        options = inspect.signature(optimizer).parameters.values()
        kept += [of for of in options if of.name not in own.parameters]
        vars(function)["__signature__"] = own.replace(parameters=kept)
        return function

    return named


@_with_options_of(muon)
def ef21_muon(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor,
    *,
    momentum: Momentum = 0.9,
    axis: str | None = "workers",
    norm: str = "frobenius",
    other: Compressor | None = None,
    server_compressor: Compressor | None = None,
    server_norm: str = "spectral",
    seed: int | jax.Array = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21-Muon: workers send compressed what is new in their momenta, and all take Muon's step.

    .. math::
        M_j &\leftarrow \text{decay}\, M_j + (1 - \text{decay})\, \nabla f_j(W; \xi_j), \qquad
        R_j = C_j(M_j - G_j) \\
        G_j &\leftarrow G_j + R_j, \qquad G \leftarrow G + \tfrac1n \textstyle\sum_j R_j \\
        X &\leftarrow X - \gamma_k \max(1, \tfrac{\text{fan-out}}{\text{fan-in}})^{1/2}\,
        UV^\top(G), \qquad W \leftarrow W + C(X - W)

    It is `optax.chain(ef21(compressor, …), muon(learning_rate, momentum=none))`, where leaves that
    are no matrices send their gradients by another compressor and go to the auxiliary optimizer,
    inside of :func:`server_model` if there is a `server_compressor`. Scion and Gluon are composed
    in the same way: `optax.chain(dm.compression.ef21(…), dm.scion(…, momentum=optax.identity()))`.

    With :class:`Identity` and one worker it is :func:`muon`, bit for bit; with several, Muon with
    the mean of their momenta, which is the momentum of the mean gradient but for rounding.

    Args:
        learning_rate: The radius γ of a step, or a schedule of it.
        compressor: C_j, of the matrices, such as `RankK(0.15, Natural())`.
        momentum: The decay of M_j, or a transformation, as in :func:`ef21`.
        axis: The axis of workers; None for a single one.
        norm: A norm in which `compressor` must be contractive, as in :func:`ef21`.
        other: The compressor of everything that is no matrix, by default :class:`Identity`.
        server_compressor: C, of the model; None for a model that workers have as it is.
        server_norm: A norm in which it must be contractive, as in :func:`server_model`.
        seed: Of the compressors that draw.
        **options: Those of :func:`muon`, but for `momentum`.

    Returns:
        A transformation for one worker, inside the axis; :func:`on_workers` runs it for all.

    Raises:
        TypeError: As :func:`ef21` and :func:`muon`.
        ValueError: If a compressor is not contractive in the norm asked for; at `init`, if it does
            not fit a leaf.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> tx = dm.compression.ef21_muon(0.1, dm.compression.RankK(1, method="exact"))
        >>> tx, params = dm.compression.on_workers(tx, 2), {"kernel": jnp.zeros((2, 2))}
        >>> grads = {"kernel": jnp.stack([jnp.diag(jnp.array([2.0, 1.0]))] * 2)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> print(updates["kernel"].round(1) + 0.0)  # the second direction comes later
        [[-0.1 0. ]
         [ 0.  0. ]]

    References:
        Gruntkowska, Maziane, Qu, Richtárik and others, *EF21-Muon*, 2025, arXiv:2510.00643, told by
        secondary sources; there embeddings and heads take sign steps, as in :func:`scion`.
    """
    sends = _send(compressor, other, None, options, momentum, axis, norm, seed)
    tx = optax.chain(sends, muon(learning_rate, momentum=_no_momentum(), **options))
    return _with_server(tx, server_compressor, server_norm, seed, None, options)


@_with_options_of(drop_muon)
def drop_ef21_muon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    compressor: Compressor,
    *,
    momentum: Momentum = 0.9,
    axis: str | None = "workers",
    norm: str = "frobenius",
    other: Compressor | None = None,
    server_compressor: Compressor | None = None,
    server_norm: str = "spectral",
    seed: int | jax.Array = 0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """EF21-Muon with dropped layers: a step of :func:`ef21_muon` from a depth to the output.

    A frozen layer sends no byte and stays bit for bit what it is: X, W, M_j, G_j and G. So what
    compression saves and what dropping saves multiply. No theory is known of both together.

    Args:
        learning_rate: As in :func:`ef21_muon`.
        layers: The layers, over the whole parameters.
        compressor: As in :func:`ef21_muon`, and so on.
        momentum: As there.
        axis: As there.
        norm: As there.
        other: As there.
        server_compressor: As there.
        server_norm: As there.
        seed: As there.
        **options: Those of :func:`drop_muon`, but for `momentum`.

    Returns:
        A transformation whose `update` requires `layer_mask` or `depth`, as :func:`drop_muon`. The
        depth is a Python integer, the same for all workers: what is sent has a static shape.

    Raises:
        TypeError: As :func:`ef21_muon`; in `update`, for a mask that is traced.
        ValueError: As :func:`ef21_muon`; at `init`, for a leaf in no layer.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(4, dtype="float32"), "head": jnp.eye(4, dtype="float32")}
        >>> layers, top = dm.layers_by_path(params, ["stem", "head"]), dm.compression.TopK(0.5)
        >>> [dm.compression.payload_bits(top, params, layers.mask(depth)) for depth in (0, 1)]
        [768, 384]
    """
    check_layers(layers)
    sends = _send(compressor, other, layers, options, momentum, axis, norm, seed)
    step = drop_muon(learning_rate, layers, momentum=_no_momentum(), **options)

    def update_fn(updates, state, params=None, *, layer_mask=None, depth=None, **extra_args):
        mask = given_mask(layers, updates, layer_mask, depth)
        masked = {} if mask is None else {"layer_mask": resolve_whole_mask(mask, updates)}
        to_send, to_step = state
        updates, to_send = sends.update(updates, to_send, params, **masked, **extra_args)
        updates, to_step = step.update(updates, to_step, params, **masked, **extra_args)
        return updates, (to_send, to_step)

    def init_fn(params: optax.Params) -> optax.OptState:
        return sends.init(params), step.init(params)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return _with_server(tx, server_compressor, server_norm, seed, layers, options)


def _no_momentum() -> optax.GradientTransformationExtraArgs:
    """That of the workers has been taken."""
    return optax.with_extra_args_support(optax.identity())


def _send(
    compressor: Compressor,
    other: Compressor | None,
    layers: Layers | None,
    options: dict[str, Any],
    momentum: Momentum,
    axis: str | None,
    norm: str,
    seed: int | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Error feedback of the matrices, with momentum, and of everything else, without."""
    numbers: DimensionNumbers | None = options.get("dimension_numbers")
    given: Roles | Any = options.get("roles")
    roles = as_roles(given)

    @remembered_labels
    def labels(params: optax.Params) -> Any:
        return matrix_labels(rows_of(params, layers), numbers, roles)

    of_all: dict[str, Any] = {"axis": axis, "seed": seed, "layers": layers, "norm": norm}
    other = Identity() if other is None else other
    check_contractive(other, norm, name="other")
    matrix = ef21(compressor, momentum=momentum, dimension_numbers=numbers, **of_all)
    return chain_subtrees({"matrix": matrix, "other": ef21(other, momentum=0.0, **of_all)}, labels)


def _with_server(
    optimizer: optax.GradientTransformationExtraArgs,
    compressor: Compressor | None,
    norm: str,
    seed: int | jax.Array,
    layers: Layers | None,
    options: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    if compressor is None:
        return optimizer
    numbers = options.get("dimension_numbers")
    return server_model(
        optimizer, compressor, norm=norm, seed=seed, layers=layers, dimension_numbers=numbers
    )


def payload_bits(
    compressor: Compressor,
    params: optax.Params,
    layer_mask: Any = None,
    *,
    layers: Layers | None = None,
    dimension_numbers: DimensionNumbers | None = None,
    index_bits: int | None = None,
) -> int:
    """The bits that one worker sends in a step, for all active leaves.

    Args:
        compressor: The compressor of :func:`ef21`.
        params: The parameters, or their shapes.
        layer_mask: The active leaves, by default all.
        layers: The layers, if some are stacked.
        dimension_numbers: As in :func:`ef21`.
        index_bits: What an index counts; by default the width of its dtype.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> shapes = {"kernel": jnp.zeros((100, 100), jnp.float32)}
        >>> for compressor in (dm.compression.Identity(), dm.compression.RankK(0.1)):
        ...     print(dm.compression.payload_bits(compressor, shapes))
        320000
        64000
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a compressor, got {describe(compressor)}.")
    cuts = cuts_of(compressor, params, layers, dimension_numbers)
    mask = resolve_whole_mask(layer_mask, params)
    total = 0
    for cut, flag in zip(cuts, jax.tree.leaves(mask), strict=True):
        num_layers, *shape = cut.shape
        rows = cut.active(flag)
        num_active = num_layers if isinstance(rows, slice) else 0 if rows is None else len(rows)
        bits = compressor.bits((1, *shape), cut.dtype, index_bits=index_bits)
        total += num_active * bits
    return total
