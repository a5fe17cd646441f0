"""What a compiled program moves between devices, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(%[\w.\-]+|\{[^}]*\})")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]+)\})?")
_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}")


def read_traffic(text: str, num_devices: int) -> tuple[Counter[str], float]:
    """How many collectives of each kind run, and the bytes that a device receives by them.

    The program is one for a processor, where none is asynchronous. What is in a loop counts at
    every turn, and every branch of a conditional.

    Raises:
        ValueError: For a collective that cannot be read, or in a loop of unknown length.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in map(str.strip, re.sub(r"/\*.*?\*/", "", text).splitlines()):
        header = _COMPUTATION.match(line)
        if header:
            lines = computations[header[1]] = []
            entry = header[1] if line.startswith("ENTRY") else entry
        lines.append(line)
    numbers, received = Counter(), 0.0
    for kind, times, size in _run(entry, computations, num_devices):
        numbers[kind] += times
        received += times * size
    return numbers, received


def _run(
    name: str, computations: Mapping[str, Sequence[str]], num_devices: int
) -> Iterator[tuple[str, int, float]]:
    """The kind of each collective, how often it runs, and the bytes that a device receives."""
    for line in computations[name]:
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        result, opcode = instruction.groups()
        if opcode.removesuffix("-start") in KINDS:
            size = _received(opcode, result, line, num_devices)
            if size:
                yield opcode, 1, size
            continue
        turns = _TURNS.search(line)
        for called in re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(line))):
            for kind, times, size in _run(called, computations, num_devices):
                if opcode == "while" and not turns:
                    raise ValueError(f"A loop with collectives has no known length: {line}")
                yield kind, times * (int(turns[1]) if turns else 1), size


def _received(kind: str, result: str, line: str, num_devices: int) -> float:
    """Bytes that each device receives; none if it is alone in its group."""
    bits = 0  # of an array, or of a tuple of arrays
    for letters, digits, sides in _ARRAY.findall(result):
        width = 8 if letters == "pred" else int(digits or 0)
        bits += width * math.prod(int(side) for side in sides.split(",") if side)
    if kind == "collective-permute":
        return bits / 8
    group = _group_size(line, num_devices)
    if kind == "reduce-scatter":  # the result is the part of one device
        return bits / 8 * (group - 1)
    # An all-reduce is a reduce-scatter and an all-gather.
    return bits / 8 * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _group_size(line: str, num_devices: int) -> int:
    if "-start(" in line:
        raise ValueError(f"Asynchronous collectives are not counted: {line}")
    if named := _NAMED.search(line):
        sizes = dict(pair.strip().split("=") for pair in named[1].split(","))
        # An axis, or a part of one: 'a', or 'a':(1)4.
        axes = (axis.strip().partition(":") for axis in named[2].split(","))
        return math.prod(int(part.split(")")[1] if part else sizes[axis]) for axis, _, part in axes)
    if tiled := _TILED.search(line):
        return int(tiled[1])
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1 if listed[1] else num_devices
    raise ValueError(f"The groups of devices cannot be read: {line}")
