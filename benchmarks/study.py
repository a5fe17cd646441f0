"""One way to write a study: settings, a run that gives a record, tables and figures of the record.

A study is a file with a ``STUDY`` and, at its end, ``STUDY.main()``. Its record is JSON, from which
``python benchmarks/redraw.py FILE …`` makes tables and figures again without running anything.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import pydantic
import tyro
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from records import environment, read_json, write_json

Record = dict[str, Any]
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 5.0  # of what a run says where there is no terminal


def _check_distinct(values: Sequence[Any]) -> Sequence[Any]:
    if len(set(values)) < len(values):
        raise ValueError("should not name a value twice")
    return values


def _check_ascending(values: Sequence[Any]) -> Sequence[Any]:
    if list(values) != sorted(set(values)):
        raise ValueError("should ascend")
    return values


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Some = Annotated[tuple[Item, ...], Field(min_length=1)]
Distinct = Annotated[tuple[Item, ...], Field(min_length=1), AfterValidator(_check_distinct)]
Ascending = Annotated[tuple[Item, ...], Field(min_length=1), AfterValidator(_check_ascending)]


class Settings(pydantic.BaseModel):
    """The arguments of a study, which check themselves: a docstring under each is its help."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    output_dir: Path
    """Folder for the record, the figures and finished parts of a run that was interrupted."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            first: dict[Any, Any] = {}  # of each argument: the rest follows from it
            for one in error.errors():
                first.setdefault(one["loc"][:1], one)
            raise ValueError("; ".join(map(_complaint, first.values()))) from None

    @pydantic.field_validator("output_dir")
    @classmethod
    def _check_folder(cls, path: Path) -> Path:
        if path.exists() and not path.is_dir():
            raise ValueError("should be a folder, and is a file")
        return path

    def arguments(self) -> Record:
        """As plain numbers, without the folders of this machine."""
        arguments = self.model_dump(mode="json")
        return {name: value for name, value in arguments.items() if not name.endswith("_dir")}


def _complaint(error: Any) -> str:
    """A sentence about an argument, by its name on the command line."""
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not error["loc"]:
        return said
    name = str(error["loc"][0]).replace("_", "-")
    return f"--{name} {said}, got {error['input']}"


class Work:
    """How far a run is: says what happens, and keeps its finished parts on disk.

    Args:
        console: Where it is said: as a bar on a terminal, line by line in a file.
        folder: Where finished parts lie.
        identity: What every part is made from. A part that was made from something else is refused.
    """

    def __init__(self, console: Console, folder: Path, identity: Record):
        self._console, self._folder, self._identity = console, folder, identity
        self._start, self._last = time.monotonic(), -SECONDS_BETWEEN_LINES
        self._bar = Progress(
            TextColumn("{task.description:<50}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "Work":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, amount: float) -> None:
        """Says how much there is to do, in any unit: seconds are a good one."""
        self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) + amount)

    def say(self, text: str, done: float = 0) -> None:
        """Says what happens now, and how much of the expected is done since it was last said."""
        self._bar.update(self._task, description=text, advance=done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last, task = now, self._bar.tasks[0]
            part = f"{task.percentage:3.0f} %" if task.total else "     "
            line = f"{now - self._start:6.0f} s  {part}  {text}"
            print(line, file=self._console.file, flush=True)

    def track(self, items: Iterable[Item], text: str) -> Iterator[Item]:
        """Goes through items, each of which counts 1."""
        items = list(items)
        self.expect(len(items))
        for i, item in enumerate(items):
            self.say(f"{text} ({i + 1} of {len(items)})")
            yield item
            self.say(text, done=1)

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, from disk if this part was finished in an earlier run.

        Raises:
            SystemExit: If it was made from other arguments, saying which.
        """
        path = self._folder / f"{name}.json"
        if path.exists():
            saved = read_json(path)
            differing = {
                key: (saved["identity"].get(key), self._identity.get(key))
                for key in {*saved["identity"], *self._identity}
                if saved["identity"].get(key) != self._identity.get(key)
            }
            if differing:
                said = "; ".join(f"{key} was {a}, is {b}" for key, (a, b) in differing.items())
                raise SystemExit(
                    f"{path} was made with other arguments ({said}). Give another --output-dir, or "
                    "delete that folder."
                )
            return saved["result"]
        write_json(path, {"identity": self._identity, "result": make()})
        return read_json(path)["result"]


S = TypeVar("S", bound=Settings)


@dataclasses.dataclass(frozen=True)
class Study(Generic[S]):
    """A command of its own, and how its record is shown."""

    name: str
    """Of its file, its record and, with what `figures` says, its figures."""
    settings: type[S]
    run: Callable[[S, Work], Record]
    """Measures, and returns plain numbers."""
    tables: Callable[[Record], Iterable[Table | str]]
    """Of a record as it is read from JSON, in which None is what was not finite."""
    figures: Callable[[Record], Mapping[str, Figure]]
    """Likewise; by what their names say after the study's, "" for a single one."""
    extending: tuple[str, ...] = ()
    """Settings that add parts and change none: a later run with more of them goes on."""

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Runs the study that the command line describes."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        settings = tyro.cli(self.settings, args=given)
        console, folder = Console(), settings.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        made = {
            "study": self.name,
            "command": _command(self.name, given),
            "settings": settings.arguments(),
            "environment": environment(),
        }
        identity = {k: v for k, v in made["settings"].items() if k not in self.extending}
        with Work(console, folder / "parts", identity) as work:
            results = self.run(settings, work)
        write_json(folder / f"{self.name}.json", made | results)
        self.show(folder / f"{self.name}.json", console)

    def show(self, path: Path, console: Console) -> None:
        """Prints the tables of a record and draws its figures beside it."""
        record = read_json(path)
        for table in self.tables(record):
            console.print(table, highlight=False)
        written = [path.name]
        for name, figure in self.figures(record).items():
            picture = path.with_name(f"{'_'.join(filter(None, (self.name, name)))}.png")
            figure.savefig(picture, dpi=110)
            written.append(picture.name)
        console.print(
            f"Written to {path.parent}: {', '.join(written)}", highlight=False, soft_wrap=True
        )


def _command(name: str, given: Sequence[str]) -> str:
    """What makes the record again, without the folders of this machine."""
    kept, words = [], iter(given)
    for word in words:
        if not word.split("=")[0].endswith("-dir"):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return shlex.join(["python", f"benchmarks/{name}.py", *kept, "--output-dir", "results"])
