"""The directive `record`: a study's command, tables and figures, made from its JSON by the build.

```{record} fashion/compare.json
:figures: frontier
```
"""

import importlib
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from rich.table import Table
from rich.text import Text
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from records import read_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def plain(cell: Any) -> str:
    """What a cell of a table on the terminal says, for a table of Markdown."""
    text = Text.from_markup(str(cell or ""))
    said = text.plain.replace("|", r"\|").replace("*", r"\*").strip()
    bold = any("bold" in str(span.style) for span in text.spans)
    return f"**{said}**" if bold and said else said


def as_markdown(table: Table | str) -> str:
    """A table as Markdown; text in the order of the terminal stays text."""
    if isinstance(table, str):
        return Text.from_markup(table).plain
    columns = [[plain(cell) for cell in column.cells] for column in table.columns]
    head = [" ".join(plain(column.header).split("\n")) for column in table.columns]
    align = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [head, align, *zip(*columns, strict=True)]
    title = " ".join(str(table.title or "").split("\n"))
    return f"**{plain(title)}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


class RecordDirective(SphinxDirective):
    """Shows what a record says; `figures` and `tables` choose, by default all are shown."""

    required_arguments = 1
    option_spec: ClassVar = {
        "figures": directives.unchanged,  # after the name of the study, "curves" for none; "-"
        "tables": directives.unchanged,  # numbers, counted from 1; "-"
        "plain": directives.flag,  # without command, date and link
    }

    def run(self) -> list[nodes.Node]:
        """The nodes of its Markdown."""
        path = RESULTS / self.arguments[0]
        self.env.note_dependency(str(path))
        record = read_json(path)
        study = importlib.import_module(record["study"]).STUDY
        parts = [*self._figures(study, record, path), *self._tables(study, record)]
        if "plain" not in self.options:
            name = f"benchmarks/results/{self.arguments[0]}"
            parts += [*_made(record), f"All tables: `python benchmarks/redraw.py {name}`"]
            parts.append(f"All numbers: [{name}](/../{name})")
        return self.parse_text_to_nodes("\n\n".join(parts))

    def _tables(self, study: Any, record: Any) -> list[str]:
        tables = list(study.tables(record))
        chosen = self.options.get("tables")
        if chosen is None:
            return [as_markdown(table) for table in tables]
        numbers = [int(number) for number in chosen.split() if number != "-"]
        if numbers and max(numbers) > len(tables):
            raise self.error(f"{self.arguments[0]} has {len(tables)} tables, not {max(numbers)}.")
        return [as_markdown(tables[number - 1]) for number in numbers]

    def _figures(self, study: Any, record: Any, path: Path) -> list[str]:
        chosen, shown = self.options.get("figures"), []
        for name, figure in study.figures(record).items():
            if chosen is not None and (name or "curves") not in chosen.split():
                continue
            picture = f"{path.parent.name}_{'_'.join(filter(None, (study.name, name)))}.png"
            drawn = Path(self.env.srcdir) / "_drawn" / picture
            drawn.parent.mkdir(exist_ok=True)
            figure.savefig(drawn, dpi=160)
            shown.append(f"![{study.name}: {name or 'curves'}](/_drawn/{picture})")
        return shown


def _made(record: Any) -> list[str]:
    """With which command, where and when."""
    made = record["environment"]
    packages = made["packages"]
    cores = f"{made['cpu_count']} cores" if made["jax_platform"] == "cpu" else made["device_kind"]
    where = f"{made['date'][:10]}, {cores}, jax {packages['jax']}, optax {packages['optax']}"
    return [f"```sh\n{record['command']}\n```", f"Made on {where}."]


def write_missing_pages(app: Sphinx) -> None:
    """A record that no page shows gets one."""
    folder = Path(app.srcdir) / "results"
    for path in folder.glob("new_*.md"):
        path.unlink()
    shown = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.md"))
    for path in sorted(RESULTS.glob("*/*.json")):
        name = f"{path.parent.name}/{path.name}"
        if f"{{record}} {name}" not in shown:
            about = importlib.import_module(read_json(path)["study"]).__doc__ or ""
            title = f"{path.parent.name.replace('_', ' ').capitalize()}: {path.stem}"
            text = f"# {title}\n\n{about.splitlines()[0]}\n\n```{{record}} {name}\n```\n"
            page = folder / f"new_{path.parent.name}_{path.stem}.md"
            page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("record", RecordDirective)
    app.connect("builder-inited", write_missing_pages)
    return {"parallel_read_safe": False}
