"""What the study leaves behind: tables and plain numbers."""

import dataclasses
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from stacked_study.programs import Case
from stacked_study.settings import Policy, Settings
from stacked_study.verdicts import (
    STATISTICS,
    UNMASKED,
    Measurements,
    Statistic,
    lines,
    verdicts,
)


def record(measured: Measurements, settings: Settings) -> dict[str, Any]:
    """Everything as plain numbers."""
    rows = []
    for case, flops in measured.flops.items():
        row = dataclasses.asdict(case) | {"flops": flops}
        for found in (measured.times.get(case), measured.counts.get(case)):
            row |= {} if found is None else dataclasses.asdict(found)
        if case in measured.num_programs:
            row["num_programs_of_all_depths"] = measured.num_programs[case]
        rows.append(row)
    return {
        "programs": rows,
        "lines": [
            {"part": part, "policy": policy, "statistic": statistic, **line._asdict()}
            for (part, policy, statistic), line in lines(measured, settings).items()
        ],
        "compilations": [dataclasses.asdict(found) for found in measured.compilations],
        "verdicts": list(verdicts(measured, settings)),
    }


def print_tables(console: Console, measured: Measurements, settings: Settings) -> None:
    """Times at each depth, counts, compilations, and what they say."""
    statistics = {statistic for _, _, statistic in lines(measured, settings)}
    for policy in settings.policies:
        for statistic in ("seconds", "processor_seconds"):
            if statistic in statistics:
                console.print(_times(measured, settings, policy, statistic))
    console.print(_counts(measured))
    console.print(_compilations(measured))
    for sentence in verdicts(measured, settings):
        console.print(sentence, highlight=False, soft_wrap=True)


def _times(
    measured: Measurements, settings: Settings, policy: Policy, statistic: Statistic
) -> Table:
    def milliseconds(case: Case) -> str:
        if case not in measured.times:
            return ""
        return f"{1000 * getattr(measured.times[case], statistic):.1f}"

    num_blocks, found = settings.num_blocks, lines(measured, settings)
    table = Table(
        title=f"Blocks save {policy}: {STATISTICS[statistic]}, in ms\n"
        "in brackets against the line through first and last block",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("from layer", no_wrap=True)
    for heading in ("gradient", "static", "step", "static", "update"):
        table.add_column(heading, justify="right", no_wrap=True)
    for depth in range(num_blocks + 2):
        cells = []
        for part in ("gradient", "step"):
            dynamic, static = (
                milliseconds(Case(part, form, policy, depth)) for form in ("dynamic", "static")
            )
            if dynamic and depth:
                dynamic += f" ({found[part, policy, statistic].deviations[depth]:+.1%})"
            cells += [dynamic, static]
        cells.append(milliseconds(Case("update", "dynamic", None, depth)))
        table.add_row(_layer(depth, num_blocks), *cells)
    table.add_section()
    table.add_row("lax.scan", milliseconds(Case("gradient", "lax.scan", policy, 1)))
    for form, name in UNMASKED.items():
        table.add_row(name, *[""] * 4, milliseconds(Case("update", form, None, 0)))
    return table


def _layer(depth: int, num_blocks: int) -> str:
    if depth == 0:
        return "0 embeddings"
    return f"{depth} head" if depth == num_blocks + 1 else f"{depth} block {depth - 1}"


def _counts(measured: Measurements) -> Table:
    table = Table(title="Programs", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for heading in ("", "saves", "depth"):
        table.add_column(heading, no_wrap=True)
    headings = ("temporary\nMiB", "thousand\ncharacters", "compiled for\nall depths")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for case, counts in measured.counts.items():
        dynamic = case.form == "dynamic"
        programs = [n for c, n in measured.num_programs.items() if _family(c) == _family(case)]
        table.add_row(
            case.part,
            case.policy or "",
            f"{case.form} {case.depth}" if case.form == "static" else case.form,
            f"{counts.temporary_bytes / 2**20:.2f}",
            f"{counts.characters / 1000:.0f}",
            str(programs[0]) if dynamic and programs else "",
        )
    return table


def _family(case: Case) -> tuple[Any, ...]:
    return case.part, case.form, case.policy


def _compilations(measured: Measurements) -> Table:
    table = Table(
        title="All depths of narrow networks", box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1)
    )
    for heading in ("", "depth"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "blocks",
        "depths",
        "programs",
        "seconds",
        "processor\nseconds",
        "thousand\ncharacters",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in measured.compilations:
        table.add_row(
            found.part,
            found.form,
            str(found.num_blocks),
            str(found.num_depths),
            str(found.num_programs),
            f"{found.seconds:.1f}",
            f"{found.processor_seconds:.1f}",
            f"{found.characters / 1000:.0f}",
        )
    return table
