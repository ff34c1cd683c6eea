"""2. The pointwise identity behind every bound, and its correction term.

    log p(x) = log p(x, z) − log p(z|x)                                        for every z
             = [log p(x, z) − log q(z|x)] + [log q(z|x) − log p(z|x)]          for every z and every q

The first bracket is the log-weight, which is computable. The second is the correction, which requires the
posterior. The correction is positive or negative, depending on z. Its mean under q is KL(q‖p) ≥ 0, so the
mean log-weight is a lower bound; its mean under p is −KL(p‖q) ≤ 0. Here z has one dimension and the decoder
is |z| with noise, so the posterior has two modes. q covers one of them.

    python examples/walkthrough/02_pointwise_identity.py      # writes 02_pointwise_identity.png
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

from pyro_vae import exact
from pyro_vae.diagnostics import pointwise_identity

X = torch.tensor([[1.2, 1.2]], dtype=torch.double)


def make_model():
    """x = (|z|, |z|) + noise, with two ReLU units."""
    one = torch.ones(2, dtype=torch.double)
    return exact.ReluDecoder(
        torch.tensor([1.0, -1.0]).double(), 0 * one, torch.ones(2, 2).double(), noise_scale=0.6
    )


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x[:, :1], 0.6).to_event(1))


def corrections(model, x, num_draws):
    """log q(z|x) − log p(z|x) at samples of q and at samples of p."""
    q = dist.Normal(0.5 * x[:, :1], 0.6).to_event(1)
    draws = q.sample((num_draws,)), model.posterior(x).sample((num_draws,))
    return [pointwise_identity(model, guide, x, z=z).correction[:, 0] for z in draws]


def draw(model, x):
    z = torch.linspace(-2.2, 2.2, 500, dtype=torch.double)
    identity = pointwise_identity(model, guide, x, z=z.reshape(-1, 1, 1))
    log_p = model.posterior(x).log_prob(z.reshape(-1, 1, 1))[:, 0]
    weight, correction, evidence = (
        part[:, 0] for part in (identity.log_weight, identity.correction, identity.log_evidence)
    )
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
    top.fill_between(z, log_p.exp(), color="0.75", label="p(z|x)")
    top.plot(z, (log_p + correction).exp(), color="C0", label="q(z|x)")
    top.set(ylabel="density", title="A guide that covers one of two modes")
    bottom.plot(z, evidence, "k-", label="log p(x, z) − log p(z|x) = log p(x)")
    bottom.plot(z, weight, color="C0", label="log p(x, z) − log q(z|x)")
    bottom.fill_between(
        z, weight, evidence, where=weight < evidence, color="C2", alpha=0.3, label="correction > 0"
    )
    bottom.fill_between(
        z, weight, evidence, where=weight > evidence, color="C3", alpha=0.3, label="correction < 0"
    )
    level = evidence[0].item()
    bottom.set(xlabel="z", ylabel="nats", ylim=(level - 4.5, level + 7))
    for ax in (top, bottom):
        ax.legend(frameon=False)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="02_pointwise_identity.png")
    args = parser.parse_args()
    mpl.use("Agg")

    torch.manual_seed(0)
    model = make_model()
    z = 3 * torch.randn(1000, 1, 1, dtype=torch.double)
    identity = pointwise_identity(model, guide, X, z=z).log_evidence
    print(f"log p(x) = {model.log_evidence(X).item():.6f} nats per datum")
    print(f"log p(x, z) − log p(z|x) at 1000 random z: {identity.min():.6f} … {identity.max():.6f}")
    under_q, under_p = corrections(model, X, 100_000)
    for name, values in {"q,  KL(q‖p)": under_q, "p, −KL(p‖q)": under_p}.items():
        error = values.std() / len(values) ** 0.5
        positive = (values > 0).double().mean()
        print(f"mean correction under {name}: {values.mean():.4f} ± {error:.4f}; {positive:.0%} positive")
    draw(model, X).savefig(args.out, dpi=150)
