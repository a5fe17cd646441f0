"""A GPT whose blocks are stacked: one program for every depth, beside programs of one depth."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from counting.by_hand import loss_by_hand, muon_by_hand, step_by_hand
from counting.problems import CONTEXT, Problem, make_gpt
from counting.programs import Program, Row, measure
from counting.ratios import METRICS, by, ratio, value
from counting.settings import Counts
from study import Work

TRACED, STATIC = "traced depth", "static depth"
SAVED = {"inputs": None, "everything": jax.checkpoint_policies.everything_saveable}


def count_stacked(settings: Counts, name: str, work: Work) -> list[Row]:
    """Gradients and steps that save something, "updates", or the programs of "all depths"."""
    if name == "all depths":
        cases = [(blocks, form) for blocks in settings.narrow_blocks for form in (TRACED, STATIC)]
        tracked = work.track(cases, "programs of all depths")
        return [_count_all_depths(settings, blocks, form) for blocks, form in tracked]
    width, blocks = settings.stacked_width, settings.stacked_blocks
    problem = make_gpt(width, blocks, settings.context, settings.stacked_batch_size)
    programs = _updates(problem) if name == "updates" else _gradients_and_steps(problem, name)
    return measure(programs, settings.repetitions, work, f"stacked, {name}")


def _gradients_and_steps(problem: Problem, policy: str) -> list[Program]:
    """From each layer on, by a traced depth; from some of them, by a static one; and by hand."""
    model = problem.model.clone(policy=SAVED[policy])
    problem = dataclasses.replace(problem, model=model)
    saves = "" if policy == "inputs" else f", saves {policy}"

    def gradient(params: Any, batch: Any, depth: Any) -> Any:
        # All layers but blocks are differentiated at every depth.
        return jax.value_and_grad(functools.partial(problem.loss, depth=depth))(params, batch)

    def by_lax_scan(params: Any, batch: Any) -> Any:
        return loss_by_hand(model, params, [params["blocks"]], batch)

    given, kept = (problem.params, problem.batch), problem.kept()
    head = _head(f"gradient{saves}", "lax.scan")
    function = jax.jit(jax.value_and_grad(by_lax_scan))
    found = [Program(head | {"program": "lax.scan", "sizes": {"depth": 1}}, function, [], *given)]
    some_depths = sorted({1, 1 + model.num_blocks // 2, model.num_blocks})
    for form, depths in ((TRACED, range(1, model.num_blocks + 2)), (STATIC, some_depths)):
        found += _by_depth(head, form, depths, gradient, [], *given)
    head = _head(f"step{saves}", "by hand")
    found.append(step_by_hand(problem, 0, head | {"sizes": {"depth": 0}}))
    for form, depths in ((TRACED, range(model.num_blocks + 2)), (STATIC, some_depths)):
        found += _by_depth(head, form, depths, problem.step, kept, problem.batch)
    return found


def _updates(problem: Problem) -> list[Program]:
    """Updates by parameters, taken for gradients, at every depth; and of all of them by hand."""

    def update(opt_state: Any, params: Any, grads: Any, depth: Any) -> Any:
        mask = problem.layers.mask(depth)
        return problem.tx.update(grads, opt_state, params, layer_mask=mask)[::-1]

    def update_by_hand(opt_state: Any, params: Any, grads: Any) -> Any:
        return by_hand.update(grads, opt_state, params)[::-1]

    by_hand, head, params = muon_by_hand(), _head("update", "by hand"), problem.params
    function, kept = jax.jit(update_by_hand, donate_argnums=0), [by_hand.init(params)]
    of_all = head | {"program": "by hand", "sizes": {"depth": 0}}
    found, depths = [Program(of_all, function, kept, params, params)], problem.layers.num_layers
    kept = [problem.tx.init(params)]
    return found + _by_depth(head, TRACED, range(depths), update, kept, params, params)


def _head(name: str, reference: str) -> Row:
    return {"subject": "stacked", "network": name, "reference": reference}


def _by_depth(
    head: Row, form: str, depths: Iterable[int], function: Any, kept: list[Any], *given: Any
) -> list[Program]:
    """The programs of a function of `kept`, which it overwrites, `given` and a depth."""
    static, overwritten = ("depth",) if form == STATIC else (), range(len(kept))
    jitted = jax.jit(function, donate_argnums=overwritten, static_argnames=static)
    found = []
    for depth in depths:
        of_depth = head | {"program": form, "sizes": {"depth": depth}}
        argument = depth if static else jnp.asarray(depth, jnp.int32)
        found.append(Program(of_depth, jitted, kept, *given, argument))
    return found


def _count_all_depths(settings: Counts, blocks: int, form: str) -> Row:
    """The distinct programs of a step from each layer on, and their characters together."""
    problem = make_gpt(settings.width, blocks, CONTEXT // 4, settings.batch_size)
    depths = range(problem.layers.num_layers)
    head, kept = _head("all steps", STATIC), problem.kept()
    programs = _by_depth(head, form, depths, problem.step, kept, problem.batch)
    texts = {program.text for program in programs}
    counts = {"executables": len(texts), "characters": sum(map(len, texts))}
    return head | {"program": form, "sizes": {"blocks": blocks}} | counts


def sentences(network: str, rows: Sequence[Row]) -> Iterator[str]:
    """How a traced depth compares with a static one, and with a line."""
    by_form = by("program", rows)
    if STATIC not in by_form or "depth" not in rows[0]["sizes"]:
        return
    traced = {row["sizes"]["depth"]: row for row in by_form[TRACED]}
    for metric in ("matmul_flops", "seconds"):
        costs = {depth: value(row, metric) for depth, row in traced.items()}
        if all(costs.values()):
            pairs = [ratio(traced[r["sizes"]["depth"]], r, metric) for r in by_form[STATIC]]
            gaps = line_through(costs)
            worst = max(gaps, key=lambda depth: abs(gaps[depth]))
            yield (
                f"{network}, {METRICS[metric][1]}: traced ÷ static "
                f"{', '.join(f'{times:.4g}' for times in pairs)}; the last block takes "
                f"{costs[max(costs) - 1] / costs[1]:.2f} × of the first; at most "
                f"{gaps[worst]:+.1%} (depth {worst}) off the line through both."
            )


def line_through(by_depth: Mapping[int, float]) -> dict[int, float]:
    """How far each depth is from a + b · (active blocks), through all of them and the last alone.

    Depth 0 is not on the line, for it adds the embeddings to the blocks of depth 1.
    """
    num_blocks = max(by_depth) - 1
    b = (by_depth[1] - by_depth[num_blocks]) / (num_blocks - 1)
    a = by_depth[num_blocks] - b
    lines = {depth: a + b * (num_blocks + 1 - depth) for depth in by_depth if depth}
    return {depth: by_depth[depth] / line - 1 for depth, line in lines.items()}
