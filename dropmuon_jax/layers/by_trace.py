"""`trace_layers`: layers in the order in which a traced loss uses them.

Layers run in the order in which their parameters meet the data. It is not the order in which the
program first touches the parameters: weights are cast, transposed and normalised up front, often in
alphabetical order. So the program is interpreted with a summary of every value's origin in the
value's place (`_Origin`), and a use is an operation that combines a value made of parameters alone
with a value that derives from the data.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.ref import AbstractRef
from jax.tree_util import GetAttrKey, KeyPath

from dropmuon_jax._checks import check_parameters, static_int
from dropmuon_jax.layers.layers import Layers, make_layers
from dropmuon_jax.layers.trees import leaf_paths


def trace_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    level: int | None = None,
    **kwargs: Any,
) -> Layers:
    """Finds the layers and their forward order from the program of the loss.

    The loss is traced, never run. The leaves of an innermost container (the kernel and the bias of
    a Flax module) form a layer; a leaf at the root, or beside other containers, is a layer of its
    own. With `level` all leaves of a larger container do: `blocks/0` of `blocks/0/norm/scale` for
    `level=2`.

    Layers are ordered by the first operation in which one of their leaves meets the data, through
    `jit`, `checkpoint`, `scan`, `while_loop`, `cond` and custom derivatives; work on parameters
    alone, such as casts, does not count. A leaf that is used again after a later layer began (a
    tied head) belongs to its shallowest use and is reported in the printed table. Layers that are
    stacked and scanned count as one; :func:`stacked` in :func:`layers_by_path` tells them apart.

    Args:
        loss_fn: A function of `(params, *args, **kwargs)`, as given to `jax.grad`.
        params: The parameters: any pytree of floating-point arrays or of `jax.ShapeDtypeStruct`s.
        *args: Example data, arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
        level: How many keys lead from the root to the container of a layer, at least 1; None for
            innermost containers, which leaves of shorter paths have with a level too.
        **kwargs: Further arguments, passed as they are, not traced.

    Returns:
        The :class:`Layers`. Print them once before a long run.

    Raises:
        TypeError: For a leaf of `params` that is no trainable floating-point parameter.
        ValueError: If the output of `loss_fn` does not depend on some leaf.

    Examples:
        >>> import jax.numpy as jnp, dropmuon_jax as dm
        >>> params = {"a_head": jnp.zeros((4, 1)), "z_stem": jnp.zeros((3, 4))}
        >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["z_stem"]) @ p["a_head"])
        >>> dm.trace_layers(loss_fn, params, jnp.zeros((8, 3))).names
        ('z_stem', 'a_head')
    """
    if level is not None:
        hint = "If it is meant for loss_fn, give it with functools.partial."
        level = static_int("level", level, minimum=1, hint=hint)
    check_parameters(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    # Static arguments (a module, `train=True`) are in kwargs, which the trace must not touch.
    jaxpr = jax.make_jaxpr(functools.partial(loss_fn, **kwargs))(params, *args)
    found = leaf_uses(jaxpr, len(paths))
    uses = [use for use in found if use is not None]
    if len(uses) < len(found):
        unused = [path for path, use in zip(leaf_paths(params), found, strict=True) if use is None]
        raise ValueError(
            f"The output of loss_fn does not depend on the leaves {unused}, so they have no place "
            "in the forward order. Remove them from params, or name every layer yourself with "
            "dm.layers_by_path."
        )

    containers = _containers(paths, level)
    first: dict[KeyPath, int] = {}
    for container, use in zip(containers, uses, strict=True):
        first[container] = min(first.get(container, use[0]), use[0])
    order = sorted(first, key=first.__getitem__)
    starts = [first[container] for container in order]
    layer_of_leaf = [order.index(container) for container in containers]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in order]

    # A place where every layer is used at once is a penalty on the parameters, not a depth.
    layers_at: dict[int, set[int]] = {}
    for layer, use in zip(layer_of_leaf, uses, strict=True):
        for position in use:
            layers_at.setdefault(position, set()).add(layer)
    places = []
    for layer, use in zip(layer_of_leaf, uses, strict=True):
        # A use lies at the depth of the last layer that has begun by then.
        begun = [bisect_right(starts, p) - 1 for p in use if len(layers_at[p]) < len(order)]
        depths = tuple(sorted({layer, *begun}))
        places.append(((layer,), None, depths if len(depths) > 1 else ()))
    return make_layers(params, names, places)


def _containers(paths: Sequence[KeyPath], level: int | None) -> list[KeyPath]:
    """The path of each leaf's layer: of its container if that holds only leaves, or the leaf's."""
    # The array inside an NNX variable is no leaf of a container; the variable is.
    paths = [p[:-1] if len(p) > 1 and p[-1] == GetAttrKey("value") else p for p in paths]
    parents = {path[:-1] for path in paths}
    outer = {parent[:n] for parent in parents for n in range(len(parent))} | {()}
    innermost = [path if path[:-1] in outer else path[:-1] for path in paths]
    pairs = zip(paths, innermost, strict=True)
    return [path[:level] if level and len(path) > level else inner for path, inner in pairs]


class _Origin(NamedTuple):
    """Where a value comes from. A literal, or what is computed from literals, has no origin."""

    # The leaves in it that have not met the data yet. With each, the first position at which it
    # was combined with something else, `_ALONE` before that.
    leaves: dict[int, int]
    data: bool  # whether it derives from the data
    uses: frozenset[tuple[int, int]]  # the (leaf, position) of every use it depends on


_ALONE = 2**62  # later than every position, for `min`
_NO_ORIGIN = _Origin({}, False, frozenset())
_DATA = _Origin({}, True, frozenset())

# One equation for a whole tree of operands; output i depends on operand i only.
_OPERAND_BY_OPERAND = {"device_put", "optimization_barrier"}


def leaf_uses(closed_jaxpr: Any, num_leaves: int) -> list[tuple[int, ...] | None]:
    """The positions where each parameter leaf meets the data, or None if it reaches no output.

    A position counts the operations of the program in the order in which they were traced, through
    nested programs; the body of a loop and each branch of a conditional count once. Dead code and
    debug printing use nothing. The data are the inputs after the first `num_leaves`, random keys
    and scalars included, and arrays that the program has closed over; closed-over scalars are not.

    A leaf that reaches an output without meeting the data (the program may have none) gets the
    position of the first operation that combines it with another leaf or with an array made in the
    program, as in `ones @ W1`, or the end of the program.
    """
    jaxpr = _open(closed_jaxpr)
    leaves = [_Origin({leaf: _ALONE}, False, frozenset()) for leaf in range(num_leaves)]
    interpreter = _Interpreter()
    outputs = interpreter.run(jaxpr, leaves + [_DATA] * (len(jaxpr.invars) - num_leaves))
    program = _either(outputs) if outputs else _NO_ORIGIN
    positions: list[set[int]] = [set() for _ in range(num_leaves)]
    for leaf, position in program.uses:
        positions[leaf].add(position)
    for leaf, position in program.leaves.items():
        if not positions[leaf]:
            positions[leaf].add(min(position, interpreter.position + 1))
    return [tuple(sorted(of_leaf)) or None for of_leaf in positions]


class _Interpreter:
    """Runs a program on origins instead of arrays."""

    def __init__(self):
        self.position = 0  # of the latest operation; the first one is at 1

    def run(self, jaxpr: Jaxpr, inputs: Sequence[_Origin]) -> list[_Origin]:
        """Origins of the outputs of `jaxpr`, from those of its inputs."""
        origins: dict[Any, _Origin] = {
            var: _DATA if _shape(var) else _NO_ORIGIN for var in jaxpr.constvars
        }
        origins.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom) -> _Origin:
            return _NO_ORIGIN if isinstance(atom, Literal) else origins[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            origins.update(zip(eqn.outvars, outputs, strict=True))
            for var in filter(_is_ref, eqn.invars):  # the equation may have written to it
                origins[var] = self._combine([read(atom) for atom in eqn.invars])
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, inputs: list[_Origin]) -> list[_Origin]:
        inner, name = list(jaxprs_in_params(eqn.params)), eqn.primitive.name
        # Writes to a ref are not followed into nested programs: what writes is one operation.
        if not any(map(_is_ref, eqn.invars)):
            if name == "scan":
                return self._scan(eqn, inputs)
            if name == "while":
                return self._while(eqn, inputs)
            if name == "cond":
                branches = [self.run(branch, inputs[1:]) for branch in inner]
                outputs = [_either(alternatives) for alternatives in zip(*branches, strict=True)]
                self.position += 1  # the choice between them
                return [self._choose(inputs[0], output) for output in outputs]
            # jit, checkpoint, custom_vjp and so on apply a program to their operands. Their names
            # differ between versions of JAX, their form does not. What has another form (linear
            # solves, Pallas kernels) is one operation.
            if [_form(program) for program in inner] == [_form(eqn)]:
                return self.run(inner[0], inputs)
        self.position += 1
        if name in _OPERAND_BY_OPERAND:
            return [self._combine([operand]) for operand in inputs]
        # A scalar without origin rescales a leaf, which does not place it in the network.
        pairs = zip(eqn.invars, inputs, strict=True)
        operands = [origin for atom, origin in pairs if _shape(atom) or origin != _NO_ORIGIN]
        return [self._combine(operands)] * len(eqn.outvars)

    def _scan(self, eqn: JaxprEqn, inputs: list[_Origin]) -> list[_Origin]:
        # JAX versions store the sizes of the three parts of the operands differently. Shapes tell
        # them too: the body keeps those of the constants and of the carry, and takes the leading
        # axis off the operands and results that are scanned over.
        body = _open(eqn.params["jaxpr"])
        num_carry = sum(map(_same_shape, eqn.outvars, body.outvars))
        num_constants = sum(map(_same_shape, eqn.invars, body.invars)) - num_carry
        constants, inputs = inputs[:num_constants], inputs[num_constants:]
        carry, slices = inputs[:num_carry], inputs[num_carry:]
        _, outputs = self._loop(carry, lambda carry: self.run(body, [*constants, *carry, *slices]))
        return outputs

    def _while(self, eqn: JaxprEqn, inputs: list[_Origin]) -> list[_Origin]:
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond_constants, inputs = inputs[:num_cond], inputs[num_cond:]
        body_constants, carry = inputs[:num_body], inputs[num_body:]

        def step(carry: list[_Origin]) -> list[_Origin]:
            (go_on,) = self.run(_open(eqn.params["cond_jaxpr"]), [*cond_constants, *carry])
            outputs = self.run(_open(eqn.params["body_jaxpr"]), [*body_constants, *carry])
            return [self._choose(go_on, output) for output in outputs]

        return self._loop(carry, step)[0]  # not its outputs: the loop may end before it begins

    def _loop(
        self, carry: list[_Origin], step: Callable[[list[_Origin]], list[_Origin]]
    ) -> tuple[list[_Origin], list[_Origin]]:
        """Carry and outputs of `step`, repeated at the same positions until they are stable."""
        start = self.position
        while True:
            self.position = start
            outputs = step(carry)
            # Iterations add to the carry: its first value may be a leaf, its second data.
            new_carry = [_either(pair) for pair in zip(carry, outputs, strict=False)]
            if new_carry == carry:
                return carry, outputs
            carry = new_carry

    def _choose(self, condition: _Origin, output: _Origin) -> _Origin:
        """The origin of `output`, computed because of `condition`."""
        if condition.data and output.leaves and not output.data:
            # Data that choose between two weights have not met either of them.
            return output._replace(uses=output.uses | condition.uses)
        return output if condition == _NO_ORIGIN else self._combine([condition, output])

    def _combine(self, operands: Sequence[_Origin]) -> _Origin:
        """The origin of what one operation computes from `operands`."""
        result = _either(operands)
        if result.data and result.leaves:
            met = ((leaf, self.position) for leaf in result.leaves)
            return _Origin({}, True, result.uses.union(met))
        # w / ‖w‖ combines a leaf with itself only; A B combines two.
        if any(operand.leaves.keys() != result.leaves.keys() for operand in operands):
            leaves = {leaf: min(first, self.position) for leaf, first in result.leaves.items()}
            return result._replace(leaves=leaves)
        return result


def _either(origins: Sequence[_Origin]) -> _Origin:
    """The origin of a value that may be any of several; it can be both leaves and data."""
    if len(origins) == 1:
        return origins[0]
    leaves: dict[int, int] = {}
    for origin in origins:
        for leaf, first in origin.leaves.items():
            leaves[leaf] = min(first, leaves.get(leaf, _ALONE))
    data = any(origin.data for origin in origins)
    return _Origin(leaves, data, frozenset().union(*(origin.uses for origin in origins)))


def _open(jaxpr: Any) -> Jaxpr:
    # Some equations hold open programs, some closed ones; from JAX 0.12 on they are one class.
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shape(atom) -> tuple[int, ...] | None:
    return getattr(atom.aval, "shape", None)  # tokens have none


def _same_shape(one, other) -> bool:
    return _shape(one) == _shape(other)


def _form(program: Jaxpr | JaxprEqn) -> tuple[int, int]:
    return len(program.invars), len(program.outvars)


def _is_ref(atom) -> bool:
    return isinstance(atom.aval, AbstractRef)
