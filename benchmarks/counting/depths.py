"""Training steps and gradients of small networks at each depth; orthogonalizations of leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import dropmuon_jax as dm
from counting.by_hand import step_by_hand
from counting.problems import Problem, make_problem
from counting.programs import Program, Row, measure
from counting.settings import Counts, NetworkName
from study import Work


def count_depths(settings: Counts, network: NetworkName, work: Work) -> list[Row]:
    """The step of the package, by its call and by its parts, beside the step by hand."""
    problem, programs = make_problem(network, settings), []
    head = {"subject": "depths", "network": network, "reference": "by hand"}
    for depth in range(problem.layers.num_layers):
        of_depth = head | {"sizes": {"depth": depth}}
        programs += [*problem.steps(depth, of_depth), step_by_hand(problem, depth, of_depth)]
    return measure(programs, settings.repetitions, work, f"{network}, steps")


def count_two_gradients(settings: Counts, network: NetworkName, work: Work) -> list[Row]:
    """Two gradients of a batch, as in variance reduction, beside one."""
    problem = make_problem(network, settings)
    head = {"subject": "two_gradients", "network": network, "reference": "one"}
    programs = [
        Program(head | {"program": name, "sizes": {"depth": depth}}, jax.jit(function), [], *given)
        for depth in range(problem.layers.num_layers)
        for name, (function, *given) in _gradients(problem, depth).items()
    ]
    return measure(programs, settings.repetitions, work, f"{network}, gradients")


def _gradients(problem: Problem, depth: int) -> dict[str, tuple[Any, ...]]:
    """One gradient, and two: in turn, as the package takes them, and as one of a stack."""
    mask = problem.layers.mask(depth)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return problem.loss(params, batch, depth)

    def one(now: Any, batch: Any) -> Any:
        return dm.masked_value_and_grad(loss_fn)(now, batch, layer_mask=mask)

    def in_turn(now: Any, old: Any, batch: Any) -> Any:
        return dm.masked_value_and_grad_pair(loss_fn)(now, old, batch, layer_mask=mask)

    def stacked(now: Any, old: Any, batch: Any) -> Any:
        both = jax.tree.map(lambda on, *of: jnp.stack(of) if on else of[0], mask, now, old)
        axes = jax.tree.map(lambda on: 0 if on else None, mask)
        values, grads = jax.vmap(lambda at: one(at, batch), in_axes=(axes,))(both)
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], grads) for i in (0, 1))
        return values[0], (first, second)

    now, batch = problem.params, problem.batch
    both = now, jax.tree.map(lambda leaf: 0.9 * leaf, now), batch
    return {"one": (one, now, batch), "in turn": (in_turn, *both), "stacked": (stacked, *both)}


def count_leaves(settings: Counts, shape: str, work: Work) -> list[Row]:
    """`newton_schulz_lmo` beside what `optax.contrib.muon` does, both of five steps."""
    programs, reference = [], "optax.contrib.muon"
    for number in settings.leaf_counts:
        leaves = [jax.ShapeDtypeStruct(tuple(map(int, shape.split("x"))), jnp.float32)] * number
        optax_muon = optax.contrib.scale_by_muon(
            beta=0.0,
            nesterov=False,
            weight_dimension_numbers=[optax.contrib.MuonDimensionNumbers(0, 1)] * number,
        )
        for name, tx in (("newton_schulz_lmo", dm.newton_schulz_lmo()), (reference, optax_muon)):
            head = {"subject": "leaves", "network": shape, "program": name, "reference": reference}
            head |= {"sizes": {"leaves": number}}
            programs.append(Program(head, jax.jit(_orthogonalize(tx)), [], leaves))
    return measure(programs, 0, work, f"leaves of {shape}")


def _orthogonalize(tx: optax.GradientTransformation) -> Any:
    # The state is made inside, where XLA sees that it is zero, and with a decay of 0 the momentum
    # of optax is folded away: what is compiled is its orthogonalization, which has no public name.
    return lambda updates: jax.tree.leaves(tx.update(updates, tx.init(updates))[0])
