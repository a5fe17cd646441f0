"""Where each parameter leaf meets the data, read off the traced program of a loss function.

Layers run in the order in which their parameters meet the data. It is not the order in which the
program first touches the parameters: weights are cast, transposed and normalised up front, often in
alphabetical order. So the program is interpreted with a summary of every value's origin in the
value's place (`_Origin`), and a use is an operation that combines a value made of parameters alone
with a value that derives from the data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.ref import AbstractRef


class LeafUses(NamedTuple):
    """Where one parameter leaf meets the data, as positions in program order."""

    first: int  # the smallest of `positions`
    last: int  # the largest of `positions`
    positions: tuple[int, ...]  # ascending, at least one


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


def leaf_uses(closed_jaxpr: Any, num_leaves: int) -> list[LeafUses | None]:
    """Finds where each parameter leaf meets the data in a traced program.

    A position counts the operations of the program in the order in which they were traced, through
    nested programs; the body of a loop and each branch of a conditional count once. Positions are
    to be compared with each other, nothing else.

    A use counts if its result reaches an output, so dead code and debug printing use nothing. The
    data are the inputs after the parameters, random keys and scalars included, and the arrays the
    program has closed over. A scalar it has closed over counts as a literal.

    A leaf that reaches an output without meeting the data (the program may have none) gets one
    position: of the first operation that combines it with another leaf or with an array made in
    the program, as in `ones @ W1`; the end of the program if there is none.

    Args:
        closed_jaxpr: the program, from `jax.make_jaxpr(loss_fn)(params, *args)`.
        num_leaves: how many of its first inputs are parameter leaves. The others are data.

    Returns:
        For each parameter leaf its uses, or None if it reaches no output.

    Examples:
        >>> import jax
        >>> from jax import numpy as jnp
        >>> def loss_fn(params, x):
        ...     params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        ...     return jnp.sum(jnp.tanh(x @ params["stem"]) @ params["head"])
        >>> params = {"head": jnp.ones((3, 2)), "stem": jnp.ones((4, 3))}
        >>> head, stem = leaf_uses(jax.make_jaxpr(loss_fn)(params, jnp.ones((5, 4))), 2)
        >>> stem.first < head.first
        True
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
    return [LeafUses(min(p), max(p), tuple(sorted(p))) if p else None for p in positions]


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
        inner = list(jaxprs_in_params(eqn.params))
        name = eqn.primitive.name
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
            if len(inner) == 1 and _is_call(eqn, inner[0]):
                return self.run(inner[0], inputs)
        self.position += 1
        if name in _OPERAND_BY_OPERAND:
            return [self._combine([operand]) for operand in inputs]
        # A scalar without origin rescales a leaf, which does not place it in the network.
        pairs = zip(eqn.invars, inputs, strict=True)
        operands = [origin for atom, origin in pairs if _shape(atom) or origin != _NO_ORIGIN]
        return [self._combine(operands)] * len(eqn.outvars)

    def _scan(self, eqn: JaxprEqn, inputs: list[_Origin]) -> list[_Origin]:
        # The sizes of the three parts of the operands are stored differently from one JAX version
        # to the next. Shapes tell them too: the body keeps those of the constants and of the carry,
        # and takes the leading axis off the operands and results that are scanned over.
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

        carry, _ = self._loop(carry, step)
        return carry  # not the outputs of `step`, as the loop may end before it begins

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


def _is_call(eqn: JaxprEqn, jaxpr: Jaxpr) -> bool:
    """Whether the equation applies `jaxpr` to its operands: jit, checkpoint, custom_vjp and so on.

    By form and not by name, as the names differ between versions of JAX. What has another form
    (linear solves, Pallas kernels) is one operation.
    """
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _open(jaxpr: Any) -> Jaxpr:
    # Some equations hold open programs, some closed ones; from JAX 0.12 on they are one class.
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shape(atom) -> tuple[int, ...] | None:
    return getattr(atom.aval, "shape", None)  # tokens have none


def _same_shape(one, other) -> bool:
    return _shape(one) == _shape(other)


def _is_ref(atom) -> bool:
    return isinstance(atom.aval, AbstractRef)
