"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

from tests.support import plain

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_every_snippet_runs_after_those_before_it(tmp_path, monkeypatch):
    snippets = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) > 5
    monkeypatch.chdir(tmp_path)
    # what a reader brings: a pair of plain functions, and data
    names = {"my_model": plain.model, "my_guide": plain.guide, "data": torch.randn(60, 3)}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "guides.png",
        "calibration.png",
        "checkpoints",
        "my-vae",
        "my-pair",
    }
