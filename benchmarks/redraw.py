"""Makes the tables and figures of records again, without running anything.

python benchmarks/redraw.py benchmarks/results/*/*.json
"""

import importlib
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from records import read_json


def main(paths: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Draws each record beside itself.

    Args:
        paths: JSON files that studies have written.
    """
    console = Console()
    for path in paths:
        try:
            study = read_json(path)["study"]
        except (OSError, ValueError, KeyError, TypeError):
            raise SystemExit(f"{path} is no record of a study.") from None
        importlib.import_module(study).STUDY.show(path, console)


if __name__ == "__main__":
    tyro.cli(main)
