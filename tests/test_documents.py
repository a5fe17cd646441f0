"""README and the pages of the documentation: code runs, links lead, numbers hold.

A block of Python that begins with an import starts anew, as a reader does who copies it; others go
on from the block above. The tutorials, which are notebooks, run while the site is built.
"""

import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NOTEBOOK = re.compile(r"\A---\n.*?kernelspec:.*?^---\n", re.M | re.S)
PAGES = sorted(ROOT.glob("docs/**/*.md"))
WRITTEN = [README, *(page for page in PAGES if "docs/_" not in page.as_posix())]
# Pages whose code uses names of a test of their own, which runs it.
OTHERS = "".join(
    path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")
)
OWN_TEST = {page.name for page in PAGES if f'"{page.name}"' in OTHERS}


def examples(page):
    """The code of a page, each example with those that go on from it."""
    text, found = page.read_text(encoding="utf-8"), []
    if NOTEBOOK.match(text) or page.name in OWN_TEST:
        return []
    for code in re.findall(r"^```python\n(.+?)^```", text, re.M | re.S):
        if code.startswith(("import ", "from ")):
            found.append(code)
        else:
            found[-1] += code
    return found


EXAMPLES = [
    pytest.param(
        page.name, code, id=f"{page.stem}-{i}", marks=[pytest.mark.deep] * (page != README)
    )
    for page in WRITTEN
    for i, code in enumerate(examples(page))
]


def test_readme_is_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_example_is_found():
    assert len(examples(README)) == README.read_text(encoding="utf-8").count("```python") == 2
    assert len(EXAMPLES) > 15


@pytest.mark.parametrize(("name", "code"), EXAMPLES)
def test_the_examples_run(name, code):
    namespace = {}
    exec(compile(code, name, "exec"), namespace)
    if "losses" in namespace:
        losses = namespace["losses"]
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_sessions_say_what_they_show(page):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    for session in re.findall(
        r"^```pycon\n(.+?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        runner.run(doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0))
    assert not runner.summarize(verbose=False).failed


def anchors(page):
    """As MyST and repositories make them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}."
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}."


def test_every_record_has_a_page_or_gets_one():
    for path in ROOT.glob("benchmarks/results/*/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert (ROOT / "benchmarks" / f"{record['study']}.py").exists()


def test_the_numbers_of_readme_are_those_of_the_record():
    path = ROOT / "benchmarks" / "results" / "fashion" / "compare.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    at = record["settings"]["budgets"]
    methods = {"Muon": "muon", "Drop-Muon, time-aware": "drop_muon_time_aware"}
    methods["optax.contrib.muon"] = "optax_muon"
    rows = [
        f"| seconds of … full steps of Muon | {' | '.join(map(str, at))} |",
        "|---" * (len(at) + 1) + "|",
    ]
    for title, method in methods.items():
        errors = [
            np.median(
                [
                    run["test"][-1]
                    for run in record["runs"]
                    if (run["method"], run["budget"]) == (method, b)
                ]
            )
            for b in at
        ]
        rows.append(f"| {title} | {' | '.join(f'{100 * (1 - e):.1f}' for e in errors)} |")
    table = "\n".join(rows)
    assert table in README.read_text(encoding="utf-8"), f"The table of README should be\n{table}"
