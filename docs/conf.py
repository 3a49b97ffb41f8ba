"""Settings of the documentation site: ``make docs`` builds it."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(Path(__file__).parents[1])]

import conclugen_jax  # noqa: E402 (found once the path is set)

project = "conclugen_jax"
author = "the conclugen_jax authors"
release = version = conclugen_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "figures",
    "mathml",
    "reference",
    "tutorials",
]
exclude_patterns = ["_build", "_ext", "understand/reliability_table.md"]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # docs/_ext/tutorials.py runs them
nb_render_markdown_format = "gfm"
highlight_language = "text"
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
nitpicky = True
INTERNAL = (
    "system",
    "data.corpora",
    "evaluate.task",
    "extract.(media|preparation|outcome|utterance)",
    "pipeline.source",
)
nitpick_ignore_regex = [
    ("py:.*", r"(?!conclugen_jax).*"),  # other packages: their inventories need the network
    ("py:.*", rf"conclugen_jax\.({'|'.join(INTERNAL)})\..*"),  # in signatures, but nothing that users call
]

html_theme = "sphinx_book_theme"
html_title = f"conclugen_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "navbar_persistent": []}
