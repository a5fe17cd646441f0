"""What a compiled program moves between devices, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"),
    *("ragged-all-to-all", "collective-broadcast"),
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]+)\})?")
_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")
_PART_OF_AXIS = re.compile(r":\(\d+\)(\d+)$")


class Collective(NamedTuple):
    """An instruction that moves data between devices."""

    kind: str
    received: float
    """Bytes, by each device, whenever it runs."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one run of a program; what is in a loop counts at every turn."""

    collectives: dict[str, int]
    """How many run, by kind."""
    received: dict[str, float]
    """Bytes that each device receives by them."""
    collectives_per_turn: dict[str, int]
    """Those in loops of which XLA does not know the number of turns, once each; not in the rest."""
    received_per_turn: dict[str, float]
    """Bytes that each device receives by those."""

    @property
    def num_collectives(self) -> int:
        """Of all kinds, without loops of unknown length."""
        return sum(self.collectives.values())

    @property
    def num_bytes(self) -> float:
        """Received by each device, without loops of unknown length."""
        return sum(self.received.values())


def read_traffic(text: str, num_devices: int) -> Traffic:
    """The collectives of a program compiled for a processor, where none is asynchronous.

    Of the branches of a conditional, that counts which moves most.

    Args:
        text: As `jax.stages.Compiled.as_text` gives it.
        num_devices: On which it runs.

    Raises:
        ValueError: For a program without an entry, or a collective that it cannot read.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("The text has no ENTRY computation.")
    found = list(_run(entry, computations, num_devices))
    known = [(it, times) for it, times, is_known in found if is_known]
    unknown = [(it, times) for it, times, is_known in found if not is_known]
    return Traffic(*_by_kind(known), *_by_kind(unknown))


def _by_kind(found: list[tuple[Collective, int]]) -> tuple[dict[str, int], dict[str, float]]:
    numbers: dict[str, int] = {}
    received: dict[str, float] = {}
    for collective, times in found:
        kind = collective.kind
        numbers[kind] = numbers.get(kind, 0) + times
        received[kind] = received.get(kind, 0.0) + times * collective.received
    return numbers, received


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of each computation, without comments, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = _COMPUTATION.match(line.strip())
        if header:
            lines = computations[header[1]] = []
            entry = header[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line.strip())
    return computations, entry


def _run(
    name: str, computations: dict[str, list[str]], num_devices: int
) -> Iterable[tuple[Collective, int, bool]]:
    """Each collective, how often it runs, and whether that is known."""
    for line in computations.get(name, ()):
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        opcode = instruction[2]
        if opcode in KINDS:
            received = _received(opcode, instruction[1], line, num_devices)
            if received:
                yield Collective(opcode, received), 1, True
            continue
        if opcode.removesuffix("-start") in KINDS:
            raise ValueError(f"Asynchronous collectives are not counted: {line}")
        branches = [name for names in _BRANCHES.findall(line) for name in names.split(",")]
        branches += _BRANCH.findall(line)
        if branches:
            runs = [list(_run(b.strip(" %"), computations, num_devices)) for b in branches]
            yield from max(runs, key=lambda run: sum(times * it.received for it, times, _ in run))
        turns = _TURNS.search(line)
        factor = int(turns[1]) if turns and opcode == "while" else 1
        in_unknown = opcode == "while" and not turns
        for called in _CALLED.findall(line):
            for collective, times, is_known in _run(called, computations, num_devices):
                yield collective, factor * times, is_known and not in_unknown


def _received(kind: str, result: str, line: str, num_devices: int) -> float:
    """Bytes that each device receives; none if it is alone in its group."""
    size = _num_bytes(result)
    if kind == "collective-permute":
        return size
    group = _group_size(line, num_devices)
    others = (group - 1) / group
    if kind == "all-reduce":  # as a reduce-scatter and an all-gather
        return 2 * size * others
    if kind == "reduce-scatter":  # the result is the part of one device
        return size * (group - 1)
    return size * others


def _num_bytes(result: str) -> float:
    """Of an array, or of a tuple of arrays."""
    bits = 0
    for letters, digits, sides in _ARRAY.findall(result):
        width = 8 if letters == "pred" else int(digits or 0)
        bits += width * math.prod(int(side) for side in sides.split(",") if side)
    return bits / 8


def _group_size(line: str, num_devices: int) -> int:
    named = _NAMED.search(line)
    if named:
        pairs = (pair.split("=") for pair in named[1].split(","))
        sizes = {name.strip(): int(size) for name, size in pairs}
        return math.prod(_axis_size(axis.strip(), sizes) for axis in named[2].split(","))
    tiled = _TILED.search(line)
    if tiled:
        return int(tiled[1])
    listed = _LISTED.search(line)
    if listed:
        return listed[1].count(",") + 1 if listed[1] else num_devices
    raise ValueError(f"The groups of devices cannot be read: {line}")


def _axis_size(axis: str, sizes: dict[str, int]) -> int:
    """Of an axis, or of a part of one: 'a', or 'a':(1)4."""
    part = _PART_OF_AXIS.search(axis)
    return int(part[1]) if part else sizes[axis]
