"""Configuration of the documentation site, which ``make -C docs html`` builds without network access."""

import os
import sys
from pathlib import Path

import pyro_vae

project = author = "pyro_vae"
copyright = "the authors of pyro_vae"
release = version = pyro_vae.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pyro_vae {release}"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_show_sphinx = False
pygments_style = "friendly"

myst_enable_extensions = ["colon_fence", "tasklist"]
myst_heading_anchors = 3

# executed cells
nb_execution_mode = "cache"
nb_execution_in_temp = True  # cells leave no files in the sources
nb_execution_timeout = 300  # seconds for a cell
nb_execution_raise_on_error = True
nb_merge_streams = True
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pyro-vae
os.environ["COLUMNS"] = "100"  # of `pyro-vae --help`
os.environ["PYRO_VAE_EXAMPLES"] = str(Path(__file__).parent.parent / "examples")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm draws its bars as text

# reference
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
add_module_names = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyro_vae).*")]  # names of other libraries have no page here


def find_entry(app, env, node, contnode):
    """Resolve a name at the top level, ``pyro_vae.fit``, by its entry, ``pyro_vae.infer.fit``."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if module != "pyro_vae" or name not in pyro_vae._SUBMODULE_OF:
        return None
    target = f"pyro_vae.{pyro_vae._SUBMODULE_OF[name]}.{name}"
    domain = env.domains["py"]
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, contnode)


def setup(app):
    app.connect("missing-reference", find_entry)
