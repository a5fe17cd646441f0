"""One way to count what a program does, and to time it beside others."""

import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from counting.collectives import read_traffic
from matrix_products import product_flops
from study import Work

Row = dict[str, Any]
SECONDS_OF_A_SAMPLE = 0.02

# What XLA prints about the source: it says where the code lies, not what it does.
_METADATA = re.compile(r', metadata=\{(?:[^"}]|"[^"]*")*\}')
_SOURCE_TABLES = re.compile(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", re.M)
_LOOP = re.compile(r"\bwhile\(")


class Program:
    """A jitted function with its arguments, of which it overwrites the first ones.

    Args:
        head: Its "subject", "network", "program" and "sizes", and the "reference" of comparisons.
        function: Returns the new values of `kept`, and more.
        kept: Arguments that it overwrites; programs may share this list.
        given: The other arguments.
        trace: Traces the same program, if not `function.trace` does.

    Attributes:
        row: The head, then what was counted, and the seconds of each round.
        kept: The arguments that the next call will overwrite.
    """

    def __init__(
        self,
        head: Row,
        function: Any,
        kept: list[Any],
        *given: Any,
        trace: Callable[..., Any] | None = None,
    ):
        self.row = head
        self._function, self.kept, self._given = function, kept, given
        self._trace, self._calls_of_a_sample = trace or function.trace, 1

    @functools.cached_property
    def _traced(self) -> Any:
        return self._trace(*self.kept, *self._given)

    @functools.cached_property
    def compiled(self) -> Any:
        """The executable, which `run` does not compile again."""
        return self._traced.lower().compile()

    @functools.cached_property
    def text(self) -> str:
        """Of the executable, without what XLA prints about the source."""
        return _SOURCE_TABLES.sub("", _METADATA.sub("", self.compiled.as_text()))

    def count(self, num_devices: int = 1) -> Row:
        """The row, with what XLA says: no FLOPs and bytes where loops count once."""
        costs = {} if _LOOP.search(self.text) else self.compiled.cost_analysis()
        collectives, received = read_traffic(self.text, num_devices)
        products = product_flops(self._traced, self.kept, self._given).values()
        self.row |= {
            "flops": costs.get("flops"),
            "matmul_flops": sum(products) if num_devices == 1 else None,
            "temporary_bytes": int(self.compiled.memory_analysis().temp_size_in_bytes),
            "bytes_accessed": costs.get("bytes accessed"),
            "characters": len(self.text),
            "executables": 1,
            "collectives": dict(collectives),
            "collective_bytes": received,
            "seconds": [],
        }
        return self.row

    def run(self) -> float:
        """The seconds of a call, of which there are as many as take long enough to be timed."""
        start = time.perf_counter()
        for _ in range(self._calls_of_a_sample):
            out = jax.block_until_ready(self._function(*self.kept, *self._given))
            self.kept[:] = out[: len(self.kept)]
        return (time.perf_counter() - start) / self._calls_of_a_sample

    def warm_up(self) -> None:
        """Compiles it, and finds how many calls a sample needs."""
        self.run()
        self._calls_of_a_sample = math.ceil(SECONDS_OF_A_SAMPLE / self.run())


def measure(programs: Sequence[Program], repetitions: int, work: Work, text: str) -> list[Row]:
    """The rows of programs that take turns.

    In each round the depths come in another order, and so do the programs of a depth, one after
    another: what else the machine does meets all that are compared.
    """
    for program in work.track(programs, f"{text}: counting"):
        program.count()
    groups: dict[Any, list[Program]] = {}
    for program in work.track(programs if repetitions else (), f"{text}: warming up"):
        program.warm_up()
        groups.setdefault(program.row["sizes"]["depth"], []).append(program)
    rng = np.random.default_rng(0)
    work.expect(repetitions * len(programs))
    for repetition in range(repetitions):
        for key in rng.permutation(list(groups)):
            for i in rng.permutation(len(groups[key])):
                work.say(f"{text}: round {repetition + 1} of {repetitions}")
                groups[key][i].row["seconds"].append(round(groups[key][i].run(), 8))
                work.say(text, done=1)
    return [program.row for program in programs]
