"""From a CSV file of counts to a diagnosed VAE: likelihood, encoder and decoder for counts.

    python examples/own_data.py counts.csv      # without a path, it first writes counts.csv

The same by commands, without code:

    pyro-vae train counts.csv --out runs/counts
    pyro-vae evaluate runs/counts
    pyro-vae diagnose runs/counts
"""

import argparse
from pathlib import Path

import pyro
import torch

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors


def write_counts(path, num_rows=2000, num_columns=12):
    """Counts whose log-rates are linear in two factors."""
    factors, loadings = torch.randn(num_rows, 2), torch.randn(2, num_columns)
    counts = torch.poisson((1 + 0.7 * factors @ loadings).exp()).int().tolist()
    header = ",".join(f"gene{i}" for i in range(num_columns))
    Path(path).write_text("\n".join([header, *(",".join(map(str, row)) for row in counts)]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", default="counts.csv")
    parser.add_argument("-n", "--num-epochs", type=int, default=50)
    parser.add_argument("--smoke-test", action="store_true", help="two epochs")
    args = parser.parse_args()

    pyro.set_rng_seed(0)
    if not Path(args.path).exists():
        write_counts(args.path)
    print(pv.data.read(args.path).summary())
    train, test = pv.load(args.path, holdout=0.1, seed=0)
    d = train.x.shape[1]
    vae = pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.NegativeBinomial(nets.MLP(2, (64,)), event_shape=d),
        encoder=conditionals.Normal(nets.Preprocess(nets.Log1p(), nets.MLP(d, (64,))), event_shape=2),
    )
    num_epochs = 2 if args.smoke_test else args.num_epochs
    print(pv.fit(vae.model, vae.guide, train, validation=test, num_epochs=num_epochs))
    print(pv.diagnose(vae.model, vae.guide, test))
