"""The layers as a table, to be printed and read once before a long run."""

from collections.abc import Sequence


def layer_table(
    names: Sequence[str], num_leaves: Sequence[int], sizes: Sequence[int], total_leaves: int
) -> str:
    """A line for each layer, shallow to deep, and their sum.

    Args:
        names: Of each layer.
        num_leaves: Likewise.
        sizes: Parameters, likewise.
        total_leaves: Of the network, in which those that layers share count once.
    """
    total = sum(sizes)
    rows = [("depth", "layer", "leaves", "parameters", "share")]
    for depth, (name, leaves, size) in enumerate(zip(names, num_leaves, sizes, strict=True)):
        share = f"{size / total:.1%}" if total else "-"
        rows.append((str(depth), name, str(leaves), f"{size:,}", share))
    rows.append(("", "total", str(total_leaves), f"{total:,}", "100.0%"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
