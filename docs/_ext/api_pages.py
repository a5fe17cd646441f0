"""Writes the pages of the API: one for each namespace, and one for each public name.

A name that is at the root has one page, `dropmuon_jax.drop_muon`, to which the page of its
namespace links. A reference in a docstring says the bare name, and finds that page.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import dropmuon_jax as dm

ROOT = dm.__name__


def namespaces() -> dict[str, ModuleType]:
    """The public modules below the root, by name, but for those whose names are all at the root."""
    found = {}
    for info in pkgutil.iter_modules(dm.__path__):
        if not info.name.startswith("_"):
            found |= _with_parts(info.name)
    return {
        name: module
        for name, module in found.items()
        if not all(is_at_root(module, of) for of in public_names(module))
    }


def is_at_root(module: ModuleType, name: str) -> bool:
    """Whether a name of a module is a name of the root, of the same thing."""
    return getattr(dm, name, None) is getattr(module, name)


def _with_parts(name: str) -> dict[str, ModuleType]:
    """A module, and the modules that it offers as its parts."""
    module = importlib.import_module(f"{ROOT}.{name}")
    found = {name: module}
    for part in getattr(module, "__all__", ()):
        if inspect.ismodule(getattr(module, part)):
            found |= _with_parts(f"{name}.{part}")
    return found


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or classes and what it documents in full."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    whole = {name for name, value in own.items() if "Args:\n" in str(value.__doc__)}
    whole |= {name for name, value in own.items() if "Returns:\n" in str(value.__doc__)}
    return sorted(whole | {name for name, value in own.items() if inspect.isclass(value)})


def pages() -> dict[str, str]:
    """The full name, under which it has a page, of each name in each namespace."""
    found = {}
    for space, module in {"": dm, **namespaces()}.items():
        for name in public_names(module):
            where = ROOT if not space or is_at_root(module, name) else f"{ROOT}.{space}"
            found[f"{space}.{name}".lstrip(".")] = f"{where}.{name}"
    return found


def write(path: Path, text: str) -> None:
    """Leaves a file alone that says so already, so that Sphinx does not read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def page_of(full_name: str) -> str:
    """The page of one name, in reStructuredText, as docstrings are."""
    module, name = full_name.rsplit(".", 1)
    value = getattr(importlib.import_module(module), name)
    kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
    if type(value).__module__ in ("typing", "types"):  # an alias of types
        kind = "data"
    title = full_name.removeprefix(f"{ROOT}.") if module != ROOT else name
    return (
        f"{title}\n{'=' * len(title)}\n\n.. py:currentmodule:: {module}\n\n.. auto{kind}:: {name}\n"
    )


def page_of_namespace(space: str, module: ModuleType, listed: list[str], tree: list[str]) -> str:
    """The page of a namespace: what it is for, and a line on each name."""
    title = f"dropmuon_jax.{space}" if space else "At the root"
    about = f".. automodule:: {module.__name__}\n   :no-members:\n\n" if space else ""
    rows = "".join(f"   {name}\n" for name in listed)
    below = "".join(f"   {name.removeprefix(ROOT + '.')}\n" for name in tree)
    return (
        f"{title}\n{'=' * len(title)}\n\n{about}.. py:currentmodule:: None\n\n"
        f".. autosummary::\n   :nosignatures:\n\n{rows}\n.. toctree::\n   :hidden:\n\n{below}"
    )


def write_pages(app: Sphinx) -> None:
    """Writes all of them below `api/`, and deletes those of names that are gone."""
    folder, found = Path(app.srcdir) / "api", pages()
    written = {folder / "index.md"}
    for full_name in sorted(set(found.values())):
        path = folder / f"{full_name.removeprefix(ROOT + '.')}.rst"
        write(path, page_of(full_name))
        written.add(path)
    for space, module in {"": dm, **namespaces()}.items():
        listed = [found[f"{space}.{name}".lstrip(".")] for name in public_names(module)]
        own = [name for name in listed if name.rsplit(".", 1)[0] == module.__name__]
        path = folder / f"{'namespace.' + space if space else 'namespace'}.rst"
        write(path, page_of_namespace(space, module, listed, own))
        written.add(path)
    for path in set(folder.glob("*.*")) - written:
        path.unlink()


def resolve_bare_name(
    app: Sphinx, env: Any, node: nodes.Element, content: nodes.Element
) -> nodes.Node | None:
    """What a docstring calls `layers_by_path` or `Layers.mask` is the page of that name."""
    if node.get("refdomain") != "py":
        return None
    target, objects = node["reftarget"], env.get_domain("py").objects
    first, *rest = target.removeprefix(f"{ROOT}.").split(".")
    candidates = [full for name, full in pages().items() if name.rsplit(".", 1)[-1] == first]
    if target.startswith(ROOT) and not rest:
        rest = []
    elif target.startswith(ROOT):  # dropmuon_jax.namespace.name
        candidates = [
            full
            for name, full in pages().items()
            if target.removeprefix(f"{ROOT}.").startswith(name)
        ]
        rest = []
    for full in candidates:
        found = objects.get(".".join([full, *rest]))
        if found is not None:
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", resolve_bare_name)
    return {"parallel_read_safe": True}
