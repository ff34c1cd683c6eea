"""The documentation is complete: public names, commands, exit codes, internal links. CI builds the site by
``make -C docs html``, which executes its cells."""

import importlib
import inspect
import re
import zlib
from pathlib import Path

import pytest

import pyro_vae
from pyro_vae.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("the package is installed without its sources", allow_module_level=True)
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")) if "_build" not in path.parts)
MODULES = [name for name in pyro_vae.__all__ if inspect.ismodule(getattr(pyro_vae, name))]


def read(page):
    return page.read_text(encoding="utf-8")


def public_names(module):
    """``__all__``, or the names without an underscore that a module defines: what autodoc takes."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_module_has_a_page_on_which_all_its_names_have_an_entry(name):
    page = read(DOCS / "reference" / f"{name}.md")
    assert re.search(rf"^\.\. automodule:: pyro_vae\.{name}$", page, re.MULTILINE)
    module = importlib.import_module(f"pyro_vae.{name}")
    for each in public_names(module):
        value = getattr(module, each)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"pyro_vae.{name}.{each} has no docstring, so autodoc leaves it out"
        else:
            assert f".. py:data:: {each}" in page


def test_every_public_name_is_in_the_inventory_of_the_site():
    """After ``make -C docs html``."""
    inventory = DOCS / "_build" / "html" / "objects.inv"
    changed = max(path.stat().st_mtime for path in (ROOT / "pyro_vae").rglob("*.py"))
    if not inventory.is_file() or inventory.stat().st_mtime < changed:
        pytest.skip("the site is not built from these sources")
    content = inventory.read_bytes().split(b"\n", 4)[4]  # after four lines of header
    entries = {line.split()[0] for line in zlib.decompress(content).decode().splitlines()}
    assert [
        f"pyro_vae.{module}.{name}"
        for module in MODULES
        for name in public_names(importlib.import_module(f"pyro_vae.{module}"))
        if f"pyro_vae.{module}.{name}" not in entries
    ] == []


def test_every_name_at_the_top_level_is_in_the_table_of_the_reference():
    listed = re.findall(r"\{(?:class|func)\}`pyro_vae\.(\w+)`", read(DOCS / "reference" / "index.md"))
    assert sorted(listed) == sorted(set(pyro_vae.__all__) - set(MODULES))


def test_every_command_is_on_the_page_of_the_command_line():
    commands = {command.name or command.callback.__name__ for command in app.app.registered_commands}
    page = read(DOCS / "reference" / "command_line.md")
    assert set(re.findall(r"^## pyro-vae (\w+)$", page, re.MULTILINE)) == commands
    assert set(re.findall(r"^!pyro-vae (\w+) --help$", page, re.MULTILINE)) == commands


def test_the_table_of_exit_codes_has_those_of_main():
    codes = set(re.findall(r"\b\d+\b", app.main.__doc__.partition("Exit codes:")[2]))
    rows = re.findall(r"^\| ([\d, ]+) \|", read(DOCS / "reference" / "command_line.md"), re.MULTILINE)
    assert {code for row in rows for code in row.split(", ")} == codes


def headings(page):
    """The anchors of a page's headings, as GitHub and MyST name them."""
    titles = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_to_pages_and_headings_that_are_there(page):
    text = re.sub(r"^(```|~~~).*?^\1", "", read(page), flags=re.MULTILINE | re.DOTALL)  # no code
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        assert words, f"the link to {target} has no text, which only the site would fill in"
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(linked), f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 150
