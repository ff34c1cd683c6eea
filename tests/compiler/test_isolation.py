"""The compiler is optional: everything else works if it cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
WITHOUT_COMPILER = """
import sys
sys.modules["pyro_vae.compiler"] = None  # its import raises
import logging
logging.basicConfig(level=logging.WARNING)
import pyro, torch
import pyro_vae as pv
from pyro_vae import conditionals, evidence, nets, priors
pyro.set_rng_seed(0)
vae = pv.VAE(
    priors.StandardNormal(2),
    conditionals.Normal(nets.MLP(2, (8,)), event_shape=6),
    conditionals.Normal(nets.MLP(6, (8,)), event_shape=2),
)
x = torch.randn(40, 6)
svi = pv.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO(), compile="trace")
losses = [svi.step(x) for _ in range(3)]
history = pv.fit(vae.model, vae.guide, x, num_epochs=2, batch_size=10, compile="trace", progress=False)
assert torch.tensor([*losses, history.epochs[-1].train.elbo]).isfinite().all()
weights = pv.log_weights(vae.model, vae.guide, x, num_particles=50_000, max_bytes=2**20)
assert weights[:, 0].isfinite().all()
assert pv.evaluate(vae.model, vae.guide, x).elbo.isfinite().all()
annealing = evidence.Annealing(30, num_chains=2)
assert evidence.ais(vae.model, x[:2], annealing=annealing, progress=False).log_evidence.isfinite().all()
print(svi.explain())
"""


def test_everything_runs_without_the_compiler_and_one_warning_is_logged():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pyro_vae.compiler cannot be imported, 3 steps" in done.stdout
    assert done.stderr.count("cannot be imported") == 1


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_other_module_imports_the_compiler_at_import_time(path):
    """Except infer/step.py, which is imported with the compiler."""
    if path.is_relative_to(PACKAGE / "compiler") or path == PACKAGE / "infer" / "step.py":
        return
    assert not re.search(r"^(from|import) pyro_vae\.(compiler|infer\.step)", path.read_text(), re.MULTILINE)


def test_private_names_of_torch_are_in_one_file():
    for path in (PACKAGE / "compiler").glob("*.py"):
        if path.name != "internals.py":
            private = r"\btorch\._\w+|from torch\.\S*\._|_inductor|_functorch|_subclasses"
            assert not re.findall(private, path.read_text()), path.name
