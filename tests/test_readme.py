"""The Python of the README and of the documentation that the site does not execute runs as it stands, from
the top of each page to its end."""

import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, evidence, infer, nets, plots, priors
from tests.support import plain

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if "_build" not in page.parts
    and re.search(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE)
)
SLOW = {"README.md"}
OWN_TESTS = {"docs/objectives.md", "CONTRIBUTING.md"}


def run_snippets(page, names):
    """Run the Python of a page, and return how many snippets it has."""
    text = (ROOT / page).read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    return len(snippets)


def own_pair():
    """A pair of plain functions, and data, which a page does not define."""
    return {"pv": pv, "my_model": plain.model, "my_guide": plain.guide, "data": torch.randn(60, 3)}


def own_vae():
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.MLP(2, (8,)), event_shape=(8, 8)),
        conditionals.Normal(nets.MLP(64, (8,)), event_shape=2),
    )
    train, test = (part.head(100) for part in pv.load("digits", binarize="threshold"))
    return {"pv": pv, "vae": vae, "train": train, "test": test}


def own_files():
    from pyarrow import table
    from pyarrow.parquet import write_table

    rows = "\n".join(f"{i % 7},{i % 3},{'ab'[i % 2]}" for i in range(50))
    Path("counts.csv").write_text(f"gene0,gene1,cell_type\n{rows}\n")
    for name in ("train", "test"):
        np.save(f"{name}.npy", np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))
    x = torch.randn(300, 3)
    np.save("x.npy", x.numpy())
    write_table(table({f"x{i}": column for i, column in enumerate(x.numpy().T)}), "x.parquet")
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (8,)), event_shape=3),
        conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    )
    return {"pv": pv, "vae": vae, "my_simulator": lambda n: torch.randn(n, 3)}


# what a page takes from its reader, or from the cells that the site executes
GIVEN = {
    "docs/own_data.md": own_files,
    "docs/tutorials/own_pair.md": own_pair,
    "docs/tutorials/processes.md": lambda: own_vae() | {"infer": infer, "evidence": evidence, "plots": plots},
    "docs/tutorials/resuming.md": own_vae,
    "docs/tutorials/saving.md": lambda: own_pair() | {"checkpoint": pv.checkpoint},
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in (str(page.relative_to(ROOT)) for page in PAGES)
        if name not in OWN_TESTS
    ],
)
def test_every_snippet_of_a_page_runs_after_those_before_it(page, tmp_path, monkeypatch):
    if page == "docs/own_data.md":
        pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    if page == "docs/tutorials/processes.md":
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    with pyro.get_param_store().scope():
        assert run_snippets(page, GIVEN.get(page, dict)()) > 0


def test_snippets_of_the_page_about_objectives_do_what_it_says():
    names = {}
    with pyro.get_param_store().scope():
        assert run_snippets("docs/objectives.md", names) == 3
    assert "IWAE(num_particles=5, estimator='dreg')" in str(names["history"])
    assert (names["terms"].bound >= names["terms"].elbo).all()  # by Jensen's inequality, at the same draws
    assert names["loss"] > 0


def test_classes_of_the_page_for_contributors_work():
    names = {}
    run_snippets("CONTRIBUTING.md", names)
    likelihood = names["Geometric"](nets.MLP(2, (4,)), event_shape=3)(torch.zeros(5, 2))
    assert likelihood.sample().shape == (5, 3)
    guide = names["Planar"](nets.MLP(2, (4,)), event_shape=3)(torch.zeros(5, 2))
    assert guide.rsample().shape == (5, 3)
    model, x = names["NormalNormal"](2.0), torch.tensor([0.3, -1.0])
    z = torch.randn(7, 1)
    constant = model.log_joint(x, z) - model.posterior(x).log_prob(z)
    torch.testing.assert_close(constant, model.log_evidence(x).expand(7, 2))
