"""The documentation site; `.ci/docs` builds it with warnings as errors."""

import inspect
import re
import warnings

import matplotlib as mpl

import ehrfuse

mpl.use("Agg")

project = "ehrfuse"
author = copyright = "The ehrfuse developers"
version = release = ehrfuse.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
default_role = "py:obj"  # `Name` links where it can
autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
suppress_warnings = ["config.cache"]  # the gallery's settings hold a function

html_theme = "pydata_sphinx_theme"
html_title = "ehrfuse"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"contributing": []}  # a page without pages below it
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "remove_config_comments": True,
    "min_reported_time": 60,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
}
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")


def to_site(app, docname, source):
    """Pages link to examples and source files by path, which serves readers of the repository."""
    up = "../" * (docname.count("/") + 1)
    depth = docname.count("/")
    gallery = "../" * depth + "auto_examples/"
    source[0] = re.sub(
        rf"\]\({re.escape(up)}examples/(plot_\w+)\.py\)", rf"]({gallery}\1.rst)", source[0]
    )
    for name in ("README.md", "CHANGELOG.md"):
        source[0] = re.sub(rf"\[([^\]]+)\]\({re.escape(up)}{name}\)", r"\1", source[0])


def without_signature_noise(app, what, name, obj, options, signature, return_annotation):
    """Show defaults only: types stand in the docstring."""
    if what == "class" and signature and inspect.isclass(obj):
        return signature, None
    return None


def setup(app):
    """Hooks of this site."""
    app.connect("source-read", to_site)
    app.connect("autodoc-process-signature", without_signature_noise)
