"""The Python code of the pages on contrib runs as it stands, from the top of a page to its end."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["pruning", "broximal", "allocation"])
def test_the_examples_of_a_page_run(name):
    blocks = re.findall(r"^```python\n(.+?)^```", (DOCS / f"{name}.md").read_text(), re.M | re.S)
    assert blocks
    namespace = {}
    for code in blocks:
        exec(compile(code, name, "exec"), namespace)
