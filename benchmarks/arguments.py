"""Sentences that end a program whose arguments make no sense."""

from pathlib import Path


def require(condition: bool, argument: str, complaint: str) -> None:
    """Ends the program with a complaint about an argument, by its name on the command line."""
    if not condition:
        raise SystemExit(f"--{argument.replace('_', '-')} {complaint}.")


def require_folder(argument: str, path: Path) -> None:
    """Ends the program if a folder to be written to is a file."""
    require(not path.exists() or path.is_dir(), argument, "must be a folder, and is a file")
