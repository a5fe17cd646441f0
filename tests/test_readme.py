"""The Python code of the README runs as it stands, each example on its own."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^### (.+?)$.*?^```python\n(.+?)^```", README, re.M | re.S)


def test_every_python_block_of_the_readme_is_an_example():
    assert len(EXAMPLES) == README.count("```python")


@pytest.mark.parametrize(
    ("title", "code"),
    [
        pytest.param(*example, id=example[0], marks=pytest.mark.deep if number > 1 else ())
        for number, example in enumerate(EXAMPLES)
    ],
)
def test_the_examples_of_the_readme_run(title, code):
    namespace = {}
    exec(compile(code, f"README.md, {title}", "exec"), namespace)
    losses = namespace["losses"]
    assert losses[-1] < 0.7 * losses[0]
