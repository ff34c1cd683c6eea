"""The Python of the README and of the pages in docs runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pyro
import pytest
import torch

from tests.support import plain

ROOT = Path(__file__).parent.parent


def run_snippets(page, names):
    """Run the Python of a page, and return how many snippets it has."""
    text = (ROOT / page).read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return len(snippets)


@pytest.mark.slow
def test_every_snippet_runs_after_those_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what a reader brings: a pair of plain functions, and data
    names = {"my_model": plain.model, "my_guide": plain.guide, "data": torch.randn(60, 3)}
    assert run_snippets("README.md", names) > 5
    assert {path.name for path in tmp_path.iterdir()} >= {
        "guides.png",
        "calibration.png",
        "checkpoints",
        "my-vae",
        "my-pair",
    }


def test_snippets_of_the_page_about_objectives_run():
    names = {}
    with pyro.get_param_store().scope():
        assert run_snippets("docs/objectives.md", names) == 3
    assert "IWAE(num_particles=5, estimator='dreg')" in str(names["history"])
    assert (names["terms"].bound >= names["terms"].elbo).all()  # by Jensen's inequality, at the same draws
    assert names["loss"] > 0
