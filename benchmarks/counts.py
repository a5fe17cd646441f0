"""Counts what programs do, beside others that do the same: operations, memory, bytes, text.

And their time, where there are --repetitions:

python benchmarks/counts.py --output-dir results
python benchmarks/counts.py --subjects depths --repetitions 50 --output-dir results
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

from matplotlib.figure import Figure
from rich.table import Table

from counting import mesh, ratios
from counting.depths import count_depths, count_leaves, count_two_gradients
from counting.programs import Row
from counting.settings import Counts
from counting.stacked import count_stacked, sentences
from study import Record, Study, Work


def run(settings: Counts, work: Work) -> Record:
    """The rows of all subjects."""
    counts: dict[str, tuple[Callable[..., list[Row]], Iterable[str]]] = {
        "depths": (count_depths, settings.networks),
        # Of loops neither XLA nor a program's text says what two gradients share.
        "two_gradients": (count_two_gradients, (n for n in settings.networks if n != "gpt")),
        "stacked": (count_stacked, (*settings.policies, "updates", "all depths")),
        "mesh": (mesh.count_mesh, settings.arrangements),
        "leaves": (count_leaves, settings.leaf_shapes),
    }
    rows = []
    for subject in settings.subjects:
        count, names = counts[subject]
        for name in names:
            make = functools.partial(count, settings, name, work)
            rows += work.part(f"{subject}_{name}".replace(" ", "_"), make)
    return {"rows": rows}


def tables(record: Record) -> Iterator[Table | str]:
    """Of each network its rows against their reference, and what they come to."""
    for subject, rows in ratios.by("subject", record["rows"]).items():
        if subject == "mesh":
            yield from mesh.tables(rows, record["settings"])
            continue
        networks = ratios.by("network", rows)
        for network, of_one in networks.items():
            yield ratios.table(subject, network, of_one)
        for network, of_one in networks.items():
            yield from ratios.summaries(subject, network, of_one)
            yield from sentences(network, of_one) if subject == "stacked" else ()


def figures(record: Record) -> Mapping[str, Figure]:
    """One for each subject."""
    found = ratios.by("subject", record["rows"])
    if "mesh" in found:
        moving = [row for row in found["mesh"] if row["least_bytes"]]
        found["mesh"] = mesh.varied(moving or found["mesh"], record["settings"], "matrices")
    return {subject: ratios.figure(subject, rows) for subject, rows in found.items()}


STUDY = Study("counts", Counts, run, tables, figures)

if __name__ == "__main__":
    STUDY.main()
