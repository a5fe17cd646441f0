#!/usr/bin/env bash
# Whether Sphinx's warning of a toctree pattern that matches nothing can be suppressed.
#
# Guess: yes, by `suppress_warnings = ["toc.empty_glob"]`, as its configuration page lists it.
# Seen: no. The warning has a subtype and no type, so that no entry matches it, and `-W` ends the build.
exec "$(dirname "$0")/python_with" sphinx==9.0.4 <<'PY'
import pathlib
import subprocess
import sys
import tempfile

with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, "source")
    source.mkdir()
    (source / "conf.py").write_text('suppress_warnings = ["toc.empty_glob"]\n')
    (source / "index.rst").write_text("Title\n=====\n\n.. toctree::\n   :glob:\n\n   nothing*\n")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", str(source), folder + "/out"],
        capture_output=True,
        text=True,
    )
print(built.returncode, built.stderr.strip().splitlines()[0])
assert built.returncode != 0
assert "didn't match any documents" in built.stderr
PY
