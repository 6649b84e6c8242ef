"""Settings of the documentation site: `bash run.sh docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_extensions"), str(Path(__file__).parents[1])]

project = "Kernel flows"
author = "the authors of kernel-flows"
html_title = "Kernel flows"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
extensions = [
    "mathml",
    "myst_nb",
    "plain_docstrings",
    "repository_pages",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "requirements.txt"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # has tables
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
smartquotes = False
python_maximum_signature_line_length = 64
toc_object_entries_show_parents = "hide"
