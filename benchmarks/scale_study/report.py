"""What the study leaves behind: tables and plain numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from scale_study.model import BARS, NOTE, ModelledStep
from scale_study.networks import NETWORKS
from scale_study.programs import Case, Counts
from scale_study.settings import Arrangement, Settings
from scale_study.tables import Question
from scale_study.verdicts import Measurements, bytes_over_least, verdicts

QUESTIONS: dict[Question, tuple[str, Callable[[Case], int]]] = {
    "matrices": ("number of matrices", lambda case: case.num_matrices),
    "shapes": ("number of shapes", lambda case: case.num_shapes),
    "num_steps": ("steps of the iteration", lambda case: case.num_steps),
    "depth": ("first active layer", lambda case: case.depth),
}
RULES = {
    "received": "bytes that a device receives, by collective of g devices: (g-1)/g of the result "
    "of an all-gather, (g-1)/g of the operand of an all-to-all, 2 (g-1)/g of an all-reduce, "
    "(g-1)/g of the operand of a reduce-scatter, all of a collective-permute; loops times their "
    "turns",
    "least_bytes": "each active matrix meets on one device and returns: 2 (D-1)/D of its bytes, "
    "summed over D devices, and here for one of them on average; 0 where matrices are whole",
    "planned_bytes": "what dm.sharding.plan_layouts says of the busiest device",
    "flops": "of a device, by XLA, which counts loops once and every branch of conditionals",
}
MODELLED = {
    "note": NOTE,
    "gradient": "FSDP over all devices; operations 2 a parameter and token forward, 4 backward in "
    "active layers, of a frozen head 2; parameters gathered before forward and backward pass, "
    "gradients scattered; the longer of operations and bytes. The token table, which is the head "
    "too, is layer 0",
    "optimizer": "operations and bytes of dm.sharding.plan_layouts, one after the other, of the "
    "busiest device of each shape, added up",
    "optax": "each step of the iteration, of each matrix: XX^T all-reduced if it is oblong "
    "(sharded along its longer side); if it is square, X gathered twice and XX^T once. As counted",
    "left_out": "attention scores, elementwise work, latency, links that are shared",
}


def record(measured: Measurements, settings: Settings) -> dict[str, Any]:
    """Everything as plain numbers."""
    rows = [
        {"question": question, **dataclasses.asdict(case), **_counted(measured.counts[case])}
        for question, cases in measured.cases.items()
        for case in cases
    ]
    networks = {
        name: {**NETWORKS[name]._asdict(), "parameters": NETWORKS[name].num_parameters}
        | {"matrices_of_a_block": NETWORKS[name].shapes()}
        for name in settings.networks
    }
    modelled = [
        {
            **dataclasses.asdict(step),
            "seconds": step.seconds,
            "optimizer_share_of_step": step.optimizer_share,
            "transfer_share_of_optimizer": step.transfer_share,
        }
        for step in measured.modelled
    ]
    return {
        "rules": RULES,
        "counts": rows,
        "agreement_with_one_device": [
            {
                **dataclasses.asdict(it.case),
                "max_abs_difference": it.max_abs_difference,
                "max_abs_update": it.max_abs_update,
            }
            for it in measured.agreements
        ],
        "model": {**MODELLED, "networks": networks, "steps": modelled},
        "verdicts": list(verdicts(measured, settings)),
    }


def _counted(counts: Counts) -> dict[str, Any]:
    return {
        **dataclasses.asdict(counts.traffic),
        "num_collectives": counts.traffic.num_collectives,
        "num_bytes": counts.traffic.num_bytes,
        "least_bytes": counts.least_bytes,
        "bytes_over_least": bytes_over_least(counts),
        "planned_bytes": counts.planned_bytes,
        "flops": counts.flops,
    }


def print_tables(console: Console, measured: Measurements, settings: Settings) -> None:
    """Collectives and bytes for each question, the model, and what they say."""
    for arrangement in settings.arrangements:
        for question in QUESTIONS:
            if any(case.arrangement == arrangement for case in measured.cases[question]):
                console.print(_counts(measured, settings, arrangement, question))
    console.print(_model(measured.modelled))
    for sentence in verdicts(measured, settings):
        console.print(sentence, highlight=False, soft_wrap=True)


def _counts(
    measured: Measurements, settings: Settings, arrangement: Arrangement, question: Question
) -> Table:
    title, key = QUESTIONS[question]
    unit = "bytes received ÷ least"
    own = {
        (case.method, key(case), case.is_traced): measured.counts[case]
        for case in measured.cases[question]
        if case.arrangement == arrangement
    }
    if all(counts.least_bytes == 0 for counts in own.values()):
        unit = "kB received"
    table = Table(
        title=f"{arrangement}: collectives, {unit}\nby {title}",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("", no_wrap=True)
    values = sorted({value for _, value, is_traced in own if not is_traced})
    has_traced = any(is_traced for *_, is_traced in own)
    for value in values:
        table.add_column(str(value), justify="right", no_wrap=True)
    if has_traced:
        table.add_column("any, in a turn", justify="right", no_wrap=True)
    for method in settings.methods:
        cells = [_cell(own.get((method, value, False))) for value in values]
        if has_traced:
            cells.append(_turn(own.get((method, 0, True))))
        table.add_row(method, *cells)
    return table


def _cell(counts: Counts | None) -> str:
    if counts is None:
        return ""
    ratio = bytes_over_least(counts)
    if ratio is None:
        moved = f"{counts.traffic.num_bytes / 1e3:.0f}"
    else:
        moved = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.3g}"
    return f"{counts.traffic.num_collectives}, {moved}"


def _turn(counts: Counts | None) -> str:
    if counts is None:
        return ""
    traffic = counts.traffic
    number = sum(traffic.collectives_per_turn.values())
    return f"{number}, {sum(traffic.received_per_turn.values()) / 1e3:.0f} kB"


def _model(steps: list[ModelledStep]) -> Table:
    table = Table(
        title=f"Milliseconds of a step on a pod ({NOTE});\nbelow the optimizer's part of them, and "
        "of that the part of what moves",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("devices", no_wrap=True)
    for optimizer, _, title in BARS:
        title = "optax" if title == "optax" else f"{optimizer},\n{title}"
        table.add_column(title, justify="right", no_wrap=True)
    by_key = {(it.network, it.devices, it.optimizer, it.sharing): it for it in steps}
    for network, devices in dict.fromkeys((step.network, step.devices) for step in steps):
        cells = [
            f"{1000 * it.seconds:.0f}\n{it.optimizer_share:.0%}, {it.transfer_share:.0%}"
            for it in (by_key[network, devices, *bar[:2]] for bar in BARS)
        ]
        table.add_row(f"{network}, {devices}", *cells)
    return table
