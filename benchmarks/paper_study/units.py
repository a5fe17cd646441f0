"""Finished parts of a study, kept on disk, so that an interrupted one goes on."""

import json
from pathlib import Path
from typing import Any

from records import environment, to_json


class Units:
    """A folder of finished parts, each with what it was made from.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, name: str, identity: dict[str, Any]) -> Any:
        """What a part has found, or None if it is not finished.

        Raises:
            SystemExit: If it was made from something else, saying from what.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            unit = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise SystemExit(f"{path} is no JSON: delete it to make it anew.") from None
        expected = json.loads(json.dumps(identity))
        differing = {
            key: (unit["identity"].get(key), expected.get(key))
            for key in sorted({*unit["identity"], *expected})
            if unit["identity"].get(key) != expected.get(key)
        }
        if differing:
            said = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in differing.items())
            raise SystemExit(
                f"{path} was made with other arguments ({said}). Give another --output-dir, or "
                "delete that file to make it anew."
            )
        return unit["result"]

    def save(self, name: str, identity: dict[str, Any], result: Any) -> None:
        """Keeps what a part has found; a program that is ended meanwhile leaves no half of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unit = {"identity": identity, "environment": environment(), "result": result}
        unfinished = self.folder / f"{name}.unfinished"
        unfinished.write_text(to_json(unit), encoding="utf-8")
        unfinished.rename(self.folder / f"{name}.json")
