"""A linear VAE on 1000 MNIST images, against the maximum likelihood of probabilistic PCA (Lucas et al. 2019).

p(x|z) = N(Wz + b, σ²I) with z in 200 dimensions, q(z|x) = N(Vx + c, diag s²), and all of them learned. The
ELBO has no spurious local maxima, and at its maximum the gap is 0, so that no unit collapses but those whose
eigenvalue of the data covariance is below σ². `examples/linear_vae.py` has the formulas.

The paper's notebook prints 941.654 nats per image as the maximum likelihood, and a trained ELBO of up to
941.950, and explains an ELBO above the maximum by rounding. The cause is another: it takes the covariance
with the divisor N − 1. With N, the maximum of the likelihood is 942.047.

The images are those of the notebook: the first 1000 of `mnist:1.0.0` in TensorFlow Datasets, which wrote the
images in turn to 10 files, shuffled each file in turn with numpy's RandomState(42), and read them side by
side; grey values 0 … 1. Subtracting their mean moves b only.

Adam trains decoder and encoder, by :func:`pyro_vae.train` with the "sticking the landing" gradient, whose
noise vanishes where the guide is exact. It is slow: gradients hardly turn z (Bao et al. 2020), and p(x) is
the same for W and WR, though only where the columns of W are orthogonal does its posterior have independent
units. So L-BFGS goes on in double precision with the decoder alone: for each decoder the best encoder of the
family is known, V = (WᵀW + σ²I)⁻¹Wᵀ and sⱼ² = σ² / (‖wⱼ‖² + σ²), and so is the ELBO there:
E_q‖x − Wz‖² = ‖x − WVx‖² + Σⱼ sⱼ² ‖wⱼ‖². `docs/papers.md` says how near both come.

    python examples/papers/linear_vae_mnist.py --data-dir DIR --out FOLDER     # writes linear_vae_mnist.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.optim import CosineAnnealingLR
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import conditionals, exact, infer, nets, priors

NUM_PIXELS, NUM_UNITS, NUM_FILES = 784, 200, 10
PUBLISHED = 941.9504  # the highest ELBO that the notebook prints


def load_images(data_dir):
    """The images of the notebook, centred, ``(1000, 784)`` in double precision."""
    train, _ = pv.load("mnist", data_dir=data_dir)
    random, order = np.random.RandomState(42), []
    for first in range(NUM_FILES):
        of_file = np.arange(first, len(train), NUM_FILES)
        random.shuffle(of_file)
        order.append(of_file[:100])
    x = train.x[np.concatenate(order)].flatten(1).double()
    return x - x.mean(0)


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(NUM_UNITS),
        decoder=conditionals.Normal(nets.MLP(NUM_UNITS, ()), event_shape=NUM_PIXELS, scale="isotropic"),
        encoder=conditionals.Normal(nets.MLP(NUM_PIXELS, ()), event_shape=NUM_UNITS, scale="learned"),
    )


def closed_form_elbo(vae, x):
    """The ELBO of each datum, without draws."""
    q = vae.encode(x)
    p = vae.decode(q.mean)
    spread = q.variance @ (vae.model.decoder.readout["loc"].layer.weight ** 2).sum(0) / (2 * p.variance[0, 0])
    return p.log_prob(x) - spread - kl_divergence(q.base_dist, vae.model.prior().base_dist).sum(-1)


def train_by_adam(vae, x, best, num_steps):
    """Returns the distance of the ELBO to the maximum, by step."""
    optim = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 3e-3}, "T_max": num_steps})
    every, gaps = max(1, num_steps // 50), {}
    for epoch in pv.train(
        vae.model, vae.guide, x.float(), loss=infer.STL(), optim=optim, num_epochs=num_steps, batch_size=None
    ):
        if epoch.epoch % every == 0:
            with torch.no_grad():
                gaps[epoch.epoch] = best - closed_form_elbo(vae, x.float()).double().mean().item()
    return gaps


def best_encoder(weight, variance):
    """V and s² of the best encoder for a decoder N(Wz, σ²I)."""
    gram = weight.mT @ weight
    precision = gram + variance * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(precision, weight.mT), variance / precision.diagonal()


def elbo_with_best_encoder(weight, variance, covariance):
    """The mean ELBO over the data, which depends on them by their covariance."""
    v, s2 = best_encoder(weight, variance)
    of_means = v @ covariance @ v.mT
    gram = weight.mT @ weight
    distance = (
        covariance.trace() - 2 * (weight * (covariance @ v.mT)).sum() + ((of_means + s2.diag()) * gram).sum()
    )
    log_likelihood = -(NUM_PIXELS * torch.log(2 * torch.pi * variance) + distance / variance) / 2
    return log_likelihood - (s2 + of_means.diagonal() - 1 - s2.log()).sum() / 2


def train_by_lbfgs(vae, covariance, best, num_steps):
    """Move the decoder, and then set the best encoder. Returns the distance to the maximum, by step."""
    decoder, encoder = vae.model.decoder, vae.guide.encoder
    layer, to_latent = decoder.readout["loc"].layer, encoder.readout["loc"].layer
    weight = layer.weight.detach().clone().requires_grad_()
    log_scale = vae.decode(weight.new_zeros(NUM_UNITS)).variance[0].sqrt().log().detach().requires_grad_()
    every = min(100, num_steps)
    optim = torch.optim.LBFGS(
        [weight, log_scale],
        max_iter=every,
        history_size=100,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optim.zero_grad()
        value = -elbo_with_best_encoder(weight, (2 * log_scale).exp(), covariance)
        value.backward()
        return value

    gaps = {0: best + loss().item()}
    print(f"with the best encoder: {gaps[0]:.4f} nats below the maximum", flush=True)
    for step in range(every, num_steps + 1, every):
        optim.step(loss)
        gaps[step] = best + loss().item()
        print(f"L-BFGS step {step}: {gaps[step]:.4f}", flush=True)
    with torch.no_grad():
        v, s2 = best_encoder(weight, (2 * log_scale).exp())
        layer.weight.copy_(weight)
        to_latent.weight.copy_(v)
        for bias in (layer.bias, to_latent.bias):  # of centred data
            bias.zero_()
        decoder.log_scale.copy_((log_scale.exp() - decoder.min_scale).log())
        encoder.log_scale.copy_((s2.sqrt() - encoder.min_scale).log())
    return gaps


def draw(gaps, eigenvalues, learned, noise):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    done = 0
    for name, of_part in gaps.items():
        left.semilogy([done + step for step in of_part], of_part.values(), ".-", label=name)
        done += max(of_part)
    left.axhline(0.01, color="k", ls="--", label="0.01 nats")
    left.set(xlabel="steps", ylabel="nats per image", title="ELBO below the maximum likelihood of PPCA")
    right.semilogy(range(1, len(eigenvalues) + 1), eigenvalues.clamp_min(1e-6), "k", label="data covariance")
    right.semilogy(range(1, len(learned) + 1), learned, "C0", lw=5, alpha=0.4, label="W Wᵀ + σ² I, k = 200")
    right.axhline(noise, color="C0", ls="--", label="σ²")
    right.set(xlabel="j", ylabel="eigenvalue", xlim=(0, 450), ylim=(3e-4, 10), title="Learned eigenvalues")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="by default the environment variable PYRO_VAE_DATA, or ./data")
    parser.add_argument("-n", "--num-steps", type=int, default=1500, help="of Adam, and of L-BFGS")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--smoke-test", action="store_true", help="five steps of each")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    x, num_steps = load_images(args.data_dir), 5 if args.smoke_test else args.num_steps
    ppca = exact.LinearGaussian.ppca(x, NUM_UNITS)
    best = ppca.log_evidence(x).mean().item()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    print(f"maximum log-likelihood of PPCA {best:.4f} nats per image; highest published ELBO {PUBLISHED:.4f}")

    vae = make_vae()
    gaps = {"Adam": train_by_adam(vae, x, best, num_steps)}
    print(f"Adam step {num_steps}: {list(gaps['Adam'].values())[-1]:.4f} nats below the maximum", flush=True)
    vae.double()
    covariance = torch.cov(x.mT, correction=0)
    gaps["L-BFGS, best encoder"] = train_by_lbfgs(vae, covariance, best, num_steps)

    with torch.no_grad():
        elbo = closed_form_elbo(vae, x).mean().item()
        loc = vae.model.decoder.readout["loc"].layer
        noise = vae.decode(x.new_zeros(NUM_UNITS)).variance[0].item()
        learned = torch.linalg.svdvals(loc.weight) ** 2 + noise
        active = int((vae.encode(x).mean.var(0) > 0.01).sum())
    drawn = pv.evaluate(vae.model, vae.guide, x, batch_size=None).elbo.mean()
    print(
        f"ELBO {elbo:.4f} nats per image, {best - elbo:.4f} below the maximum; by one draw each {drawn:.4f}"
    )
    above = int((eigenvalues[:NUM_UNITS] > noise).sum())
    print(
        f"{active} active units of {NUM_UNITS}; {above} of the first {NUM_UNITS} eigenvalues are above "
        f"σ² = {noise:.6f}, PPCA {ppca.noise_scale[0].item() ** 2:.6f}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    draw(gaps, eigenvalues, learned, noise).savefig(args.out / "linear_vae_mnist.png", dpi=110)
