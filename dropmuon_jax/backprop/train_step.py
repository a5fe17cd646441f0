"""`train_step`: gradient, update and application of a step, compiled once for each depth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dropmuon_jax._checks import check_parameters, check_transformation, static_int
from dropmuon_jax._counterparts import names_counterparts
from dropmuon_jax.backprop.by_layer import ByLayer
from dropmuon_jax.backprop.calls import check_shardings, check_step, naming_what_is_static, run
from dropmuon_jax.backprop.gradients import (
    loss_of_params,
    masked_gradient,
    masked_update,
    takes_depth,
)
from dropmuon_jax.backprop.programs import (
    ChangingOnly,
    SharedGradient,
    as_returned,
    compile_all,
    shardings_of,
    without_collector,
)
from dropmuon_jax.backprop.traced_depth import check_sampler
from dropmuon_jax.layers.trees import leaf_paths
from dropmuon_jax.sampling.adaptive import AdaptiveDistribution
from dropmuon_jax.sampling.reading import PlanReader, possible_draws
from dropmuon_jax.sampling.sampler import DepthSampler
from dropmuon_jax.transforms.accumulation import check_accumulation, check_call


@names_counterparts
def train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    sampler: DepthSampler,
    *,
    has_aux: bool = False,
    donate: bool = True,
    out_shardings: tuple[Any, ...] | None = None,
    update_by_layer: bool = False,
) -> TrainStep:
    """A whole training step: gradient, update and its application, with one mask.

    The sampler draws the layers of step k on the host. The step is jitted once for each set of
    layers that is drawn, and inactive parameters come out bit for bit. What does not fit is written
    with the parts, in a jit of your own: `sampler.depth(step)`, :func:`masked_value_and_grad`,
    `optimizer.update(…, depth=depth)` and `optax.apply_updates`.

    * Variance reduction: where the state keeps previous parameters, as with :func:`mvr_momentum`,
      the gradient of the batch is taken there too.
    * Flax NNX: `params` may be a whole `nnx.Module`, with a state made by
      `optimizer.init(nnx.state(module, nnx.Param))`. `loss_fn` then takes the module; batch
      statistics and dropout counts advance, and the module is updated in place and returned.
    * Flax Linen with batch statistics: they are a further argument, and the new ones `aux`.
    * Stacked layers: one executable serves all depths. `loss_fn` must take the keyword argument
      `depth`, and give `layers.stack_depth(depth)` to :func:`scan_layers`.
    * Accumulation: the optimizer in :func:`accumulate`; `step` then counts micro-batches.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)` that returns a scalar, or
            `(scalar, aux)` with `has_aux`. Bind what is static, `partial(loss_fn, train=True)`. An
            argument `depth` gets, by keyword, the depth among all layers: an integer, or an integer
            array if layers are stacked.
        optimizer: An Optax transformation, whose `update` is given `layer_mask`. One that ignores
            it still changes its state of inactive layers, as :func:`check_optimizer` finds out.
        sampler: The sampler of the layers.
        has_aux: Whether `loss_fn` returns auxiliary data.
        donate: Whether the given parameters and state are overwritten, and so deleted, as far as
            the step changes them; those of inactive layers are handed on as they are.
        out_shardings: On a mesh, the shardings of parameters and state, and maybe of the third
            result, as in `jax.jit`. Without them XLA places results as it likes, and compiles a
            step again for arguments in a new place. What an NNX module has beside its parameters
            must be on the mesh already.
        update_by_layer: Whether the update of each layer is a program of its own, which all depths
            and equal layers share. It is less to compile, with a call more for each active layer,
            and no product of matrices of several layers. For one device, without stacked layers.

    Returns:
        A :class:`TrainStep`, a function of `(step, params, opt_state, *args, **kwargs)` that
        returns `(params, opt_state, loss)`, or `(params, opt_state, (loss, aux))`. With a
        distribution that follows the run, it serves one run. Its first call on several processes
        is an error unless all are about to draw the same layers.

    Raises:
        TypeError: For an argument of the wrong kind; if layers are stacked and `loss_fn` takes no
            `depth`; in a step, if its number is no Python integer.
        ValueError: In a step, if `opt_state` does not fit optimizer and parameters, or gathers
            micro-batches that do not share a draw, as that of `optax.MultiSteps` may; with
            `update_by_layer`, for an update that depends on other layers, as after a clip by their
            norm, or shares an inner `jax.jit` with them, as `optax.adamw` does since JAX 0.11.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(3), "head": jnp.ones((3, 2))}
        >>> layers = dm.layers_by_path(params, ["stem", "head"])
        >>> sampler = dm.DepthSampler(layers, dm.uniform_depth(), seed=0)
        >>> optimizer = dm.drop_muon(0.1, layers)
        >>> loss_fn = lambda params, x: jnp.mean((x @ params["stem"] @ params["head"]) ** 2)
        >>> step_fn = dm.train_step(loss_fn, optimizer, sampler)
        >>> opt_state, losses = optimizer.init(params), []
        >>> for step in range(20):
        ...     params, opt_state, loss = step_fn(step, params, opt_state, jnp.eye(3))
        ...     losses.append(float(loss))
        >>> losses[-1] < losses[0]
        True
    """
    return TrainStep(loss_fn, optimizer, sampler, has_aux, donate, out_shardings, update_by_layer)


class TrainStep:
    """A training step made by :func:`train_step`; `sampler` draws its layers."""

    sampler: DepthSampler

    def __init__(
        self,
        loss_fn: Any,
        optimizer: Any,
        sampler: Any,
        has_aux: Any,
        donate: Any,
        shardings: Any,
        by_layer: Any,
    ):
        check_transformation("optimizer", optimizer)
        check_sampler(sampler)
        self.sampler, self._loss_fn, self._shardings = sampler, loss_fn, shardings
        self._has_aux, self._donate, self._by_layer = has_aux, donate, by_layer
        self._optimizer = optax.with_extra_args_support(optimizer)
        self._is_stacked = bool(sampler.layers.stacks)
        self._takes_depth = takes_depth(loss_fn, self._is_stacked)
        self._next_step: int | None = None
        is_adaptive = isinstance(sampler.distribution, AdaptiveDistribution)
        self._draws = PlanReader(sampler) if is_adaptive else sampler
        self._index = {tuple(row): np.int32(i) for i, row in enumerate(sampler.subsets.tolist())}
        check_shardings(shardings)
        if by_layer and (self._is_stacked or shardings is not None):
            raise ValueError(
                "update_by_layer=True is for layers that are not stacked, whose programs differ, "
                "on one device, without out_shardings."
            )
        self._programs, self._of_layers = {}, {}
        of_draw, mask = self._gradient_of_draw, sampler.layers.subset
        self._gradient = SharedGradient(of_draw, mask, takes_depth=self._takes_depth)

    def __call__(
        self, step: int, params: Any, opt_state: optax.OptState, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.OptState, Any]:
        """Takes a step, whose number is counted from 0 in Python."""
        check_step(step)
        if step != self._next_step:  # the first one, or a jump, as of an epoch that starts from 0
            check_call(opt_state, step)
            if jax.process_count() > 1 and self._next_step is None:
                self.sampler.check_processes(step, opt_state)
        self._next_step = step + 1
        active = self._draws.active(step, opt_state)
        draw, active = (self._index[active], None) if self._is_stacked else (None, active)
        program, tree, inputs = self._program(active, params, opt_state, args, kwargs, draw)
        leaves, loss = run(program, inputs)
        new_params, new_state, rest = jax.tree.unflatten(tree, leaves)
        if inputs[-1][1] is None:
            return new_params, new_state, loss
        sys.modules["flax.nnx"].update(params, new_params, rest)
        return params, new_state, loss

    def compile(
        self,
        params: Any,
        opt_state: optax.OptState,
        /,
        *args: Any,
        progress: Callable[[int, int], None] | None = None,
        max_workers: int = 2,
        **kwargs: Any,
    ) -> None:
        """Compiles every depth that can be drawn, several at a time, so that no step has to.

        The other arguments are those of a step. Nothing is overwritten, and `jax.ShapeDtypeStruct`s
        do as well, with shardings where the arrays will have been put on devices. After each of
        `total` depths, of which `max_workers` are compiled at a time, `progress(done, total)` is
        called. With JAX's persistent cache a later start finds all there, quick ones as well.
        """
        draws: list[Any] = [(active, None) for active in possible_draws(self.sampler)]
        draws = [(None, np.int32(0))] if self._is_stacked else draws
        if self._draws is self.sampler:
            self.sampler.active(0)  # which compiles small programs of its own
        inputs = params, opt_state, args, kwargs
        compile_all(
            [partial(self._lower, active, *inputs, draw) for active, draw in draws],
            progress,
            static_int("max_workers", max_workers, minimum=1),
        )

    def trace_depth(
        self, depth: int, params: Any, opt_state: optax.OptState, /, *args: Any, **kwargs: Any
    ) -> jax.stages.Traced:
        """The program of a step at one depth, which is static where layers are stacked too."""
        program, _, inputs = self._program_at(depth, params, opt_state, args, kwargs)
        return program.trace(*inputs)

    def trace_named(self, params: Any, opt_state: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A step of all layers, as a program whose inputs have the paths that they came with."""
        _, tree, (leaves, *more) = self._program_at(0, params, opt_state, args, kwargs)
        whole: Any = jax.jit(self._train_step, static_argnums=2)
        return whole.trace(jax.tree.unflatten(tree, leaves), *more)

    def _program_at(self, depth: int, *inputs: Any) -> tuple[Any, Any, tuple[Any, Any, Any]]:
        layers = self.sampler.layers
        layers.mask(static_int("depth", depth, minimum=0))  # an error if there is no such depth
        active = tuple(layer >= depth for layer in range(layers.num_layers))
        return self._program(active, *inputs, draw=None, by_layer=False)

    def _lower(self, *step: Any) -> list[jax.stages.Lowered]:
        program, _, inputs = self._program(*step)
        return program.lower(*inputs)

    def _program(
        self,
        active: Any,
        params: Any,
        opt_state: Any,
        args: Any,
        kwargs: Any,
        draw: Any,
        *,
        by_layer: bool | None = None,
    ) -> tuple[Any, Any, tuple[Any, Any, Any]]:
        """The program of a draw, the structure of what it carries on, and its arguments."""
        by_layer = self._by_layer if by_layer is None else by_layer
        if self._takes_depth and "depth" in kwargs:
            raise TypeError("The sampler draws the depth, and loss_fn gets it: leave it out.")
        graphdef = rest = None
        nnx: Any = sys.modules.get("flax.nnx")
        if nnx is not None and isinstance(params, nnx.Module):
            graphdef, params, rest = nnx.split(params, nnx.Param, ...)
        others, static = (args, kwargs, draw), (active, graphdef)
        leaves, tree = jax.tree.flatten((params, opt_state, rest))
        leaves = as_returned(leaves, tree, others, self._shardings)
        shapes = [(np.shape(x), getattr(x, "dtype", None)) for x in leaves] if by_layer else ()
        key = tree, jax.tree.structure(others), static, tuple(shapes)
        if key not in self._programs:
            check_parameters(params)
            carried = jax.tree.unflatten(tree, leaves)
            with without_collector(), naming_what_is_static():
                make = self._make_by_layer if by_layer else self._make_whole
                self._programs[key] = make(carried, others, static)
        return self._programs[key], tree, (leaves, others, static)

    def _make_whole(self, carried: Any, *inputs: Any) -> ChangingOnly:
        options = {"donate": self._donate, "shardings": shardings_of(carried, self._shardings)}
        return ChangingOnly(self._train_step, carried, *inputs, **options)

    def _make_by_layer(self, carried: Any, *inputs: Any) -> ByLayer:
        params, layers = carried[0], self.sampler.layers
        layer_of = dict(zip(leaf_paths(params), sum(layers.rows_of(params), ()), strict=True))
        options = {"layer_of": layer_of, "programs": self._of_layers, "donate": self._donate}
        return ByLayer(self._gradient, self._update, carried, *inputs, **options)

    def _train_step(self, carried: Any, others: Any, static: Any) -> tuple[Any, Any]:
        """The step as a pure function; `rest` is what a module has beside its parameters."""
        gradients, rest, more = self._gradient(carried, others, static)
        layer_mask, _ = self._mask(others[2], static[0])
        params, state = masked_update(self._optimizer)(*carried[:2], layer_mask, gradients)
        return (params, state, rest), more

    def _gradient_of_draw(self, carried: Any, others: Any, static: Any) -> tuple[Any, Any, Any]:
        """The gradients, what a module has beside its parameters, and the loss."""
        (params, state, rest), (args, kwargs, draw), (active, graphdef) = carried, others, static
        check_accumulation(state, self.sampler)
        layer_mask, depth = self._mask(draw, active)
        kwargs = {**kwargs, "depth": depth} if self._takes_depth else kwargs
        loss_fn = loss_of_params(self._loss_fn, self._has_aux, graphdef, rest)
        gradient = masked_gradient(loss_fn, self._optimizer)
        (loss, (aux, rest)), gradients = gradient(params, state, layer_mask, *args, **kwargs)
        return gradients, rest, (loss, aux) if self._has_aux else loss

    def _update(self, gradients: Any, carried: Any, static: Any) -> Any:
        """New parameters and state, of a mask that is static."""
        layer_mask, _ = self._mask(None, static[0])
        return masked_update(self._optimizer)(*carried, layer_mask, gradients)

    def _mask(self, draw: Any, active: Any) -> tuple[Any, Any]:
        """The mask of an index of `subsets`, or of static active layers; and the shallowest one."""
        layers, last = self.sampler.layers, self.sampler.layers.num_layers - 1
        if active is not None:
            return layers.subset(active), active.index(True) if any(active) else last
        if self.sampler.draws_depths:
            return layers.mask(draw), draw
        active = jnp.asarray(self.sampler.subsets)[draw]
        return layers.subset(active), jnp.where(active.any(), jnp.argmax(active), last)
