"""What meets each kernel of a network: running moments of its inputs and outputs.

A function is traced and its program run once more, with a note of which values are a leaf of the
parameters, cast or transposed. Where a product contracts such a value with the data, the leaf is a
kernel, the axes that are contracted are its fan-in, and the moments of both sides are taken. The
model is not changed, and knows nothing of it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from dropmuon_jax._checks import check_parameters
from dropmuon_jax.contrib.pruning.kernels import Kernel, Kernels, Moments
from dropmuon_jax.layers.trees import leaf_paths


def record_kernels(
    function: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]
) -> Kernels:
    r"""Runs a network on batches, and keeps the moments of what goes in and out of each kernel.

    Kernels are found in the program: leaves that a product contracts with something that is no
    parameter, as they are, cast or transposed, through `jit`, `checkpoint`, `scan` and custom
    derivatives. Layers that are stacked on an axis and scanned over are one leaf with moments of
    each layer; a kernel that is used twice has the moments of both uses. Convolutions, and what is
    used inside `cond` and `while_loop`, are not recorded.

    Memory is that of one forward pass and two numbers for each input and output of a kernel,
    whatever the number of batches.

    Args:
        function: A function of `(params, batch)`. Of Linen `lambda params, x:
            model.apply({"params": params}, x)`, of NNX `lambda params, x: nnx.merge(graphdef,
            params)(x)`, of Equinox `lambda params, x: jax.vmap(eqx.combine(params, static))(x)`.
        params: The parameters.
        batches: Calibration data, each a pytree of arrays. Batches of one shape compile once.

    Returns:
        A mapping from the path of each kernel to a :class:`Kernel`, in the order of the
        leaves. What is not to be pruned is left out of it, such as the head::

            kernels = {path: of for path, of in kernels.items() if "head" not in path}

    Raises:
        TypeError: For a leaf of `params` that is no trainable floating-point parameter.
        ValueError: Without batches, if no kernel is found, if what one makes of the batches is not
            finite, or if one is used in two layouts, such as a table that is multiplied from both
            sides, naming it.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"stem": jnp.eye(2), "head": jnp.ones((1, 2)), "bias": jnp.zeros((1, 1))}
        >>> network = lambda p, x: jnp.tanh(x @ p["stem"]) @ p["head"].T + p["bias"]
        >>> batches = [jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[0.0, 1.0]])]
        >>> kernels = dm.contrib.pruning.record_kernels(network, params, batches)
        >>> print(list(kernels), kernels["head"].fan_in)
        ['head', 'stem'] (1,)
        >>> print((3 * kernels["stem"].inputs.rms ** 2).round().astype(int).T)  # 3² + 4², and 1²
        [[25 1]]
    """
    check_parameters(params)
    paths = leaf_paths(params)

    @jax.jit
    def moments_of(params: Any, batch: Any) -> dict[int, Kernel]:
        closed = jax.make_jaxpr(function)(params, batch)
        recorder = _Recorder(paths)
        leaves = [
            _Value(x, _Leaf(i, x.ndim, tuple(range(x.ndim))))
            for i, x in enumerate(jax.tree.leaves(params))
        ]
        data = [_Value(x) for x in jax.tree.leaves(batch)]
        recorder.run(closed.jaxpr, closed.consts, leaves + data)
        return recorder.found

    total: dict[int, Kernel] = {}
    for batch in batches:
        found = moments_of(params, batch)
        total = {i: merged(total[i], of, paths[i]) if i in total else of for i, of in found.items()}
    if not total:
        raise ValueError(
            "No kernel was found: give at least one batch, and a function in whose program leaves "
            f"of params are multiplied with data, of {paths[:6]}."
        )
    for i, of in total.items():
        if not isinstance(of.inputs.mean, Tracer) and not np.isfinite(of.outputs.variance).all():
            raise ValueError(
                f"What '{paths[i]}' makes of the batches is not finite: one has no rows, or there "
                "is NaN in it or in params. No score means anything then."
            )
    return {paths[i]: total[i] for i in sorted(total)}


class _Leaf(NamedTuple):
    """That a value is a leaf of the parameters, cast or transposed."""

    number: int
    ndim: int
    axes: tuple[int, ...]
    """The axis of the leaf that each axis of the value is; a scan has taken the others away."""


class _Value(NamedTuple):
    array: Any
    leaf: _Leaf | None = None


# Of one operand, whose entries stay where they are.
_KEEPS_ENTRIES = {"convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient"}


class _Recorder:
    """Runs a program, and keeps the moments of both sides of each kernel by the leaf's index."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.found: dict[int, Kernel] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
        """The outputs of a program."""
        values: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, list(map(read, eqn.invars)))
            values.update(zip(eqn.outvars, outputs, strict=True))
        return list(map(read, jaxpr.outvars))

    def _equation(self, eqn: JaxprEqn, inputs: list[_Value]) -> list[_Value]:
        inner, name = _programs(eqn), eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, inner[0], inputs)
        # jit, checkpoint, custom_vjp and so on apply a program to their operands.
        if [_form(program) for program, _ in inner] == [_form(eqn)] and name != "shard_map":
            return self.run(*inner[0], inputs)
        params = eqn.primitive.get_bind_params(eqn.params)
        arrays = eqn.primitive.bind(*(x.array for x in inputs), **params)
        outputs = list(map(_Value, arrays if eqn.primitive.multiple_results else [arrays]))
        if name == "dot_general":
            self._product(eqn.params["dimension_numbers"], inputs, outputs[0].array)
        elif inputs and (leaf := inputs[0].leaf):
            if name == "transpose":
                axes = tuple(leaf.axes[axis] for axis in eqn.params["permutation"])
                return [outputs[0]._replace(leaf=leaf._replace(axes=axes))]
            if name in _KEEPS_ENTRIES:
                return [outputs[0]._replace(leaf=leaf)]
        return outputs

    def _product(self, numbers: Any, operands: list[_Value], product: Array) -> None:
        """Records a product of a leaf and of something that is none."""
        for side in (0, 1):
            leaf, data = operands[side].leaf, operands[1 - side]
            if leaf is None or data.leaf is not None:
                continue
            contracted, batch = numbers[0][side], numbers[1][side]
            free = [i for i in range(len(leaf.axes)) if i not in (*contracted, *batch)]
            # Which axis of the leaf each axis of the data and of the product belongs to; None are
            # the rows, over which moments are taken.
            of_data: list[int | None] = [None] * data.array.ndim
            for mine, axes in ((contracted, numbers[0][1 - side]), (batch, numbers[1][1 - side])):
                for i, axis in zip(mine, axes, strict=True):
                    of_data[axis] = leaf.axes[i]
            of_rows = [None] * (data.array.ndim - len(contracted) - len(batch))
            kept = [leaf.axes[i] for i in free]
            sides = [kept, of_rows] if side == 0 else [of_rows, kept]
            of_product = [leaf.axes[i] for i in batch] + sides[0] + sides[1]
            self._add(
                leaf.number,
                Kernel(
                    _moments(data.array, of_data, leaf.ndim),
                    _moments(product, of_product, leaf.ndim),
                    tuple(sorted(leaf.axes[i] for i in contracted)),
                    tuple(sorted(kept)),
                ),
            )

    def _add(self, index: int, kernel: Kernel) -> None:
        known = self.found.get(index)
        self.found[index] = kernel if known is None else merged(known, kernel, self.paths[index])

    def _scan(self, eqn: JaxprEqn, program: Any, inputs: list[_Value]) -> list[_Value]:
        """A scan whose body returns the moments that it finds as well."""
        body, consts = program
        # Sizes tell the parts of the operands in every version: the body keeps the shapes of the
        # constants and of the carry, and takes an axis off what is scanned over.
        num_carry = sum(map(_same_shape, eqn.outvars, body.outvars))
        num_constants = sum(map(_same_shape, eqn.invars, body.invars)) - num_carry
        constants, rest = inputs[:num_constants], inputs[num_constants:]
        carry, xs = rest[:num_carry], rest[num_carry:]
        sliced = [x.leaf and x.leaf._replace(axes=x.leaf.axes[1:]) for x in xs]

        def step(carry: Any, slices: Any) -> Any:
            inner = _Recorder(self.paths)
            of_slices = list(map(_Value, slices, sliced))
            outputs = inner.run(body, consts, [*constants, *map(_Value, carry), *of_slices])
            arrays = [x.array for x in outputs]
            return arrays[:num_carry], (arrays[num_carry:], inner.found)

        arrays, (ys, found) = jax.lax.scan(
            step,
            [x.array for x in carry],
            [x.array for x in xs],
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        stacked_along = {x.leaf.number: x.leaf.axes[0] for x in xs if x.leaf}
        for index, kernels in found.items():
            if index in stacked_along:
                self._add(index, _stacked(kernels, stacked_along[index]))
            else:  # the same kernel in every turn
                for turn in range(eqn.params["length"]):
                    self._add(index, jax.tree.map(lambda x, turn=turn: x[turn], kernels))
        return list(map(_Value, [*arrays, *ys]))


def _moments(x: Array, of_axes: Sequence[int | None], ndim: int) -> Moments:
    """Of the rows of an array, with the axes of a leaf, of size 1 where the array has none."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    rows = tuple(i for i, axis in enumerate(of_axes) if axis is None)
    kept = [(axis, x.shape[i]) for i, axis in enumerate(of_axes) if axis is not None]
    sizes = dict(kept)

    def placed(feature: Array) -> Array:
        order = np.argsort([axis for axis, _ in kept])
        return feature.transpose(order).reshape([sizes.get(axis, 1) for axis in range(ndim)])

    num_rows = jnp.asarray(np.prod([x.shape[i] for i in rows], initial=1.0), wide.dtype)
    return Moments(num_rows, placed(wide.mean(rows)), placed(wide.var(rows)))


def _stacked(kernel: Kernel, axis: int) -> Kernel:
    """Moments of every turn of a scan, with the turns along the axis of the leaf."""

    def placed(x: Array) -> Array:
        return jnp.moveaxis(x.squeeze(axis + 1), 0, axis)

    def of_side(side: Moments) -> Moments:
        return Moments(side.num_rows[0], placed(side.mean), placed(side.variance))

    return Kernel(of_side(kernel.inputs), of_side(kernel.outputs), kernel.fan_in, kernel.fan_out)


def merged(one: Kernel, other: Kernel, path: str) -> Kernel:
    """What is known of a kernel from two uses; an error if they differ in its layout."""
    if (one.fan_in, one.fan_out) != (other.fan_in, other.fan_out):
        raise ValueError(
            f"'{path}' is multiplied along axes {one.fan_in} and, elsewhere, {other.fan_in}: what "
            "goes in and what comes out is not the same in both. Leave it out, by closing the "
            "function over it."
        )
    return Kernel(
        one.inputs.merged(other.inputs),
        one.outputs.merged(other.outputs),
        one.fan_in,
        one.fan_out,
    )


def _programs(eqn: JaxprEqn) -> list[tuple[Jaxpr, Sequence[Any]]]:
    """Each program that an equation holds by itself, with its constants."""
    held = (of for of in eqn.params.values() if hasattr(of, "eqns"))
    # Some equations hold open programs, some closed ones; from JAX 0.12 on they are one class.
    return [(getattr(of, "jaxpr", of), getattr(of, "consts", ())) for of in held]


def _form(program: Any) -> tuple[Any, ...]:
    """The shapes and dtypes that go in and come out."""
    return tuple(
        tuple((_shape(atom), getattr(atom.aval, "dtype", None)) for atom in atoms)
        for atoms in (program.invars, program.outvars)
    )


def _shape(atom: Any) -> Any:
    return getattr(atom.aval, "shape", None)


def _same_shape(one: Any, other: Any) -> bool:
    return _shape(one) == _shape(other)
