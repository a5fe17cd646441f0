"""What XLA says of programs without running them, and how often it compiles them."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from stacked_study.programs import Case, DepthForm, DepthPart, Problem, Program
from stacked_study.settings import Settings, narrow


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one program, by XLA."""

    temporary_bytes: int
    """Without arguments and results."""
    characters: int
    """Of its text."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What a gradient or a step takes to compile for every depth of a network."""

    part: DepthPart
    form: DepthForm
    num_blocks: int
    num_depths: int
    num_programs: int
    """That were compiled until each depth had run."""
    seconds: float
    """Of tracing and compiling them, together."""
    processor_seconds: float
    """Likewise, of all cores, without what other processes take meanwhile."""
    characters: int
    """Of their texts together."""


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """A list that grows by its seconds whenever XLA compiles a program."""
    found: list[float] = []

    def listener(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def count(programs: Mapping[Case, Program], console: Console) -> dict[Case, Counts]:
    """The counts of each program; of the dynamic ones at depth 1, for all their depths are one."""
    first = {
        case: program
        for case, program in programs.items()
        if case.form != "dynamic" or case.depth == 1
    }
    counts = {}
    for case, program in track(first.items(), "counting", console=console):
        compiled = program.compile()
        memory = compiled.memory_analysis()
        counts[case] = Counts(int(memory.temp_size_in_bytes), len(compiled.as_text()))
    return counts


def warm_up(programs: Mapping[Case, Program], console: Console) -> dict[Case, int]:
    """Runs each program once, and counts what is compiled for all depths of a case together.

    Returns:
        The counts, each with the first of the cases.
    """
    first_of: dict[Any, Case] = {}
    found: dict[Case, int] = {}
    for case, program in track(programs.items(), "compiling", console=console):
        first = first_of.setdefault((case.part, case.form, case.policy), case)
        with compilations() as compiled:
            program.run()
        found[first] = found.get(first, 0) + len(compiled)
    return found


def count_compilations(settings: Settings, console: Console) -> list[Compilation]:
    """Of the step, or of the gradient alone, in both forms and for every narrow network."""
    part: DepthPart = "gradient" if settings.gradient_only else "step"
    forms: tuple[DepthForm, ...] = ("dynamic", "static")
    cases = itertools.product(settings.compile_blocks, forms)
    found = []
    for num_blocks, form in track(list(cases), "all depths of narrow networks", console=console):
        problem = Problem(narrow(settings, num_blocks))
        depths = range(1 if part == "gradient" else 0, num_blocks + 2)
        programs = problem.by_depth(part, form, settings.policies[0], depths).values()
        with compilations() as compiled:
            start, processor_start = time.perf_counter(), time.process_time()
            executables = [program.compile() for program in programs]
            seconds = time.perf_counter() - start
            processor_seconds = time.process_time() - processor_start
            for program in programs:
                program.run()
        distinct = {id(e.runtime_executable()): len(e.as_text()) for e in executables}
        found.append(
            Compilation(
                part,
                form,
                num_blocks,
                len(depths),
                len(compiled),
                seconds,
                processor_seconds,
                sum(distinct.values()),
            )
        )
    return found
