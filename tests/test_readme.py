"""The Python code of the README runs as it stands, each example on its own."""

import re
from pathlib import Path

import pytest

# Each example runs for seconds, and compiles for longer.
pytestmark = pytest.mark.usefixtures("quick_compilation")

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"^### (.+?)$.*?^```python\n(.+?)^```", README.read_text(), re.M | re.S)


def test_every_python_block_of_the_readme_is_an_example():
    assert len(EXAMPLES) == README.read_text().count("```python")


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_examples_of_the_readme_run(title, code):
    namespace = {}
    exec(compile(code, f"README.md, {title}", "exec"), namespace)
    losses = namespace["losses"]
    assert losses[-1] < 0.7 * losses[0]
