"""What docstrings write for people is made what reStructuredText and KaTeX read."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def mend_docstring(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """A plural behind code, `Layers`s, and the star of a dual norm, ‖·‖*, are no markup."""
    for i, line in enumerate(lines):
        line = line.replace("‖*", r"‖\*")
        lines[i] = re.sub(r"(?<!`)`([^`]+)`s\b", r"`\1`\\ s", line)


def before_napoleon(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """Keeps the docstring of an attribute, a sentence, of which Napoleon takes colons for types."""
    if kind in ("attribute", "data", "property"):
        app.sentences = {name: list(lines)}


def after_napoleon(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    """Puts it back."""
    if kind in ("attribute", "data", "property"):
        lines[:] = app.sentences[name]


def align_formulas(app: Sphinx, doctree: nodes.document) -> None:
    """Formulas of several lines stand in an environment, as Sphinx has it for MathJax."""
    for formula in doctree.findall(nodes.math_block):
        said = formula.astext()
        if r"\\" in said and r"\begin" not in said:
            formula.children = [nodes.Text(rf"\begin{{aligned}}{said}\end{{aligned}}")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("autodoc-process-docstring", mend_docstring, priority=700)
    app.connect("doctree-read", align_formulas)
    return {"parallel_read_safe": True}
