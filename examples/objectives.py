"""One pair trained by each objective: the ELBO and log p(x) of held-out digits, and the time of a step.

The distance of the two is KL(q(z|x)‖p(z|x)), how far the guide is from the posterior. Two pairs: 8 Gaussian
latents on grey digits, where log p(x) is the importance-weighted bound of 1000 draws, and 8 binary latents on
binarized digits, where it is a sum over all 256 states. ``docs/objectives.md`` discusses the result.

    python examples/objectives.py      # writes objectives.png
"""

import argparse
from statistics import mean, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, evidence, infer, nets, priors

HIDDEN, LATENT_DIM, K = (100,), 8, 5
CONTINUOUS = {
    "ELBO": Trace_ELBO(),
    "STL": infer.STL(),
    f"IWAE, K = {K}": infer.IWAE(K),
    f"DReG, K = {K}": infer.IWAE(K, "dreg"),
    f"Rényi α = ½, K = {K}": infer.Renyi(0.5, K),
    "wake-sleep": infer.WakeSleep(),
    f"RWS, K = {K}": infer.ReweightedWakeSleep(K),
}
DISCRETE = {
    "ELBO (score function)": Trace_ELBO(),
    f"VIMCO, K = {K}": infer.VIMCO(K),
    "wake-sleep": infer.WakeSleep(),
    f"RWS, K = {K}": infer.ReweightedWakeSleep(K),
    f"RWS, K = {K}, half sleep": infer.ReweightedWakeSleep(K, wake_phi=0.5, sleep_phi=0.5),
}


class BernoulliPrior(conditionals.Conditional):
    """Independent binary latents with learned probabilities."""

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.logits = torch.nn.Parameter(torch.zeros(self.event_shape))

    def forward(self, *_):
        return dist.Bernoulli(logits=self.logits).to_event(1)


def make_vae(discrete):
    prior = BernoulliPrior if discrete else priors.StandardNormal
    likelihood = conditionals.Bernoulli if discrete else conditionals.ContinuousBernoulli
    family = conditionals.Bernoulli if discrete else conditionals.Normal
    return pv.VAE(
        prior=prior(LATENT_DIM),
        decoder=likelihood(nets.MLP(LATENT_DIM, HIDDEN), event_shape=(8, 8)),
        encoder=family(nets.MLP(64, HIDDEN), event_shape=LATENT_DIM),
    )


@torch.no_grad()
def log_evidence(vae, x, discrete):
    """log p(x) in nats, averaged over data."""
    if not discrete:
        return evidence.importance(vae.model, vae.guide, x, num_particles=1000).mean
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * LATENT_DIM)
    log_joint = vae.decode(states).log_prob(x.unsqueeze(1)) + vae.model.prior().log_prob(states)
    return log_joint.logsumexp(1).mean().item()


def train(loss, discrete, seed, num_epochs):
    """ELBO and log p(x) on held-out data in nats per datum, and milliseconds of a step."""
    pyro.set_rng_seed(seed)
    data, test = pv.load("digits", binarize="stochastic" if discrete else "none")
    vae = make_vae(discrete)
    history = pv.fit(
        vae.model, vae.guide, data, loss=loss, optim=Adam({"lr": 2e-3}), num_epochs=num_epochs, progress=False
    )
    x = test.fixed().x
    elbo = pv.evaluate(vae.model, vae.guide, x, num_particles=20).mean().elbo
    # the fastest epoch: other programs on the machine only slow a step down
    seconds = min(epoch.seconds for epoch in history.epochs) / -(-len(data) // 100)
    return elbo, log_evidence(vae, x, discrete), 1e3 * seconds


def draw(ax, rows, title):
    """For each objective the ELBO and log p(x) of each seed, and a line between their means."""
    for y, results in enumerate(rows.values()):
        elbo, log_p = (mean(column) for column in list(zip(*results, strict=True))[:2])
        ax.plot([elbo, log_p], [y, y], color="0.75", linewidth=4, zorder=1)
        ax.scatter([r[0] for r in results], [y] * len(results), color="C0", label="ELBO" if not y else None)
        ax.scatter([r[1] for r in results], [y] * len(results), color="C1", label=None if y else "log p(x)")
        ax.annotate(f"KL {log_p - elbo:.1f}", ((elbo + log_p) / 2, y - 0.18), ha="center", fontsize=8)
    ax.set(title=title, xlabel="held-out nats per datum", yticks=range(len(rows)), yticklabels=rows)
    ax.invert_yaxis()
    ax.grid(alpha=0.3, axis="x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--out", default="objectives.png")
    parser.add_argument("--smoke-test", action="store_true", help="one epoch, one seed")
    args = parser.parse_args()
    mpl.use("Agg")
    num_epochs, num_seeds = (1, 1) if args.smoke_test else (args.num_epochs, args.num_seeds)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    print(f"{'held out, nats per datum':32}{'ELBO':>16}{'log p(x)':>16}{'KL':>7}{'ms a step':>11}")
    for ax, discrete, objectives in zip(axes, (False, True), (CONTINUOUS, DISCRETE), strict=True):
        kind = "binary latents, binarized digits" if discrete else "Gaussian latents, grey digits"
        title = f"{LATENT_DIM} {kind}"
        print(title)
        rows = {}
        for name, loss in objectives.items():
            rows[name] = [train(loss, discrete, seed, num_epochs) for seed in range(num_seeds)]
            elbos, log_ps, times = zip(*rows[name], strict=True)
            columns = [
                f"{mean(part):9.2f}" + (f" ± {stdev(part):4.2f}" if num_seeds > 1 else "")
                for part in (elbos, log_ps)
            ]
            gap = mean(log_ps) - mean(elbos)
            print(f"  {name:30}{''.join(columns)}{gap:7.2f}{min(times):11.2f}", flush=True)
        draw(ax, rows, title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(args.out, dpi=110)
