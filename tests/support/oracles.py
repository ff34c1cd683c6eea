"""Closed forms and quadratures for tests, by other formulas than those of the library."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_vae import exact


def seeded(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def covariance(d, seed=0):
    """A well-conditioned covariance matrix."""
    a = seeded(d, d, seed=seed)
    return a @ a.mT / d + 0.5 * torch.eye(d, dtype=torch.double)


def make_models():
    """One instance of each exact model, in double precision."""
    tril = torch.linalg.cholesky
    locs = torch.tensor([[-2.0, 0.5], [1.0, 1.0], [0.3, -1.5]], dtype=torch.double)
    trils = torch.stack([tril(covariance(2, seed)) for seed in range(3)])
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    transition = torch.tensor([[0.9, 0.2], [-0.1, 0.8]]).double()
    models = {
        "NormalNormal": exact.NormalNormal(5, noise_scale=0.7, prior_loc=1.3, prior_scale=2.0),
        "factor analysis": exact.LinearGaussian(
            seeded(6, 3), noise_scale=seeded(6, seed=1).exp(), bias=seeded(6, seed=2)
        ),
        "LinearGaussian with prior parameters": exact.LinearGaussian(
            seeded(4, 2), noise_scale=0.5, prior_loc=seeded(2, seed=3), prior_scale=seeded(2, seed=4).exp()
        ),
        "BayesianLinearRegression": exact.BayesianLinearRegression(
            seeded(9, 3), prior_precision=0.4, noise_precision=2.5
        ),
        "BetaBernoulli": exact.BetaBernoulli(6, concentration1=1.5, concentration0=2.5),
        "GammaPoisson": exact.GammaPoisson(4, concentration=2.5, rate=0.8),
        "FiniteMixture": exact.FiniteMixture(weights, locs, trils),
        "MixturePrior": exact.MixturePrior(
            weights, locs, trils, weight=seeded(5, 2), noise_scale=0.8, bias=0.3
        ),
        "ReluDecoder": exact.ReluDecoder(
            seeded(4), seeded(4, seed=1), seeded(3, 4, seed=2), noise_scale=0.4, bias=0.1
        ),
        "Funnel": exact.Funnel(4, scale=1.5),
        "Banana": exact.Banana(scale=1.3, curvature=0.4),
        "LinearGaussianStateSpace": exact.LinearGaussianStateSpace(
            transition, covariance(2), seeded(3, 2), covariance(3, 1), covariance(2, 2), num_steps=4
        ),
        "SigmoidBeliefNet": exact.SigmoidBeliefNet(seeded(5, 4), bias=0.2, prior_logits=seeded(4, seed=1)),
    }
    return {name: model.double() for name, model in models.items()}


def guide_of(q):
    """A guide that samples z from ``q(x)``."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return guide


def diagonal(model, shift=0.0, factor=1.0):
    """A guide: the mean-field Gaussian of a model with its means shifted and its scales multiplied."""

    def q(x):
        best = model.mean_field(x).base_dist
        return dist.Normal(best.loc + shift, best.scale * factor).to_event(1)

    return guide_of(q)


def log_integral(f, low, high, n=40_001):
    """log ∫ exp f(t) dt from ``low`` to ``high`` by the trapezoid rule. f: ``(n,)`` → ``(n, batch)``."""
    t = torch.linspace(low, high, n, dtype=torch.double)
    return f(t).logsumexp(0) + math.log((high - low) / (n - 1))


def log_evidence(name, model, x):
    """log p(x) from the joint Gaussian, by enumeration or by dense quadrature."""
    if isinstance(model, exact.LinearGaussian):
        prior_covariance = torch.diag(model.prior_scale**2)
        marginal = model.weight @ prior_covariance @ model.weight.mT + torch.diag(model.noise_scale**2)
        return dist.MultivariateNormal(model.weight @ model.prior_loc + model.bias, marginal).log_prob(x)
    if name == "BetaBernoulli":
        prior = dist.Beta(model.concentration1, model.concentration0)

        def on_logits(t):
            z = torch.sigmoid(t).unsqueeze(-1)
            jacobian = torch.nn.functional.logsigmoid(t) + torch.nn.functional.logsigmoid(-t)
            likelihood = dist.Bernoulli(logits=t[:, None, None]).log_prob(x).sum(-1)
            return prior.log_prob(z.clamp(1e-300, 1 - 1e-16)) + jacobian.unsqueeze(-1) + likelihood

        return log_integral(on_logits, -30, 30)
    if name == "GammaPoisson":
        prior = dist.Gamma(model.concentration, model.rate)
        return log_integral(
            lambda t: prior.log_prob(t.exp()[:, None]) + t[:, None] + _poisson(t.exp(), x), -40, 8
        )
    if name == "FiniteMixture":
        components = [
            dist.MultivariateNormal(m, scale_tril=s).log_prob(x)
            for m, s in zip(model.locs, model.scale_trils, strict=True)
        ]
        return (model.weights.unsqueeze(-1) * torch.stack(components).exp()).sum(0).log()
    if name == "MixturePrior":
        parts = []
        for weight, m, s in zip(model.weights, model.locs, model.scale_trils, strict=True):
            marginal = model.weight @ s @ s.mT @ model.weight.mT + torch.diag(model.noise_scale**2)
            parts.append(
                weight.log() + dist.MultivariateNormal(model.weight @ m + model.bias, marginal).log_prob(x)
            )
        return torch.stack(parts).logsumexp(0)
    if name == "ReluDecoder":
        # the integrand has kinks, so the Gauss–Legendre rule is applied to each smooth piece
        nodes, weights = _gauss_legendre(60)
        edges = torch.cat([torch.arange(-12.0, 12.5, 0.5).double(), model.edges[1:-1]]).unique().sort().values
        low, high = edges[:-1], edges[1:]
        z = (low + (high - low) * (nodes.unsqueeze(-1) + 1) / 2).reshape(-1, 1, 1)
        w = (weights.unsqueeze(-1) * (high - low) / 2).reshape(-1, 1)
        return (model.log_joint(x, z) + w.log()).logsumexp(0)
    if name == "LinearGaussianStateSpace":
        return _state_space(model, x)
    if name == "SigmoidBeliefNet":
        total = 0.0
        for state in model.states:
            total = total + (model.prior().log_prob(state) + model.decoder(state).log_prob(x)).exp()
        return total.log()
    return torch.zeros(len(x), dtype=torch.double)  # models without data


def _poisson(rate, x):
    return (x * rate.log()[:, None, None] - rate[:, None, None] - torch.lgamma(x + 1)).sum(-1)


def _gauss_legendre(n):
    """Nodes and weights on [−1, 1] by the Golub–Welsch algorithm."""
    k = torch.arange(1, n, dtype=torch.double)
    off = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, 2 * vectors[0] ** 2


def _state_space(model, x):
    """log p(x) from the joint Gaussian of all observations."""
    a, c = model.transition, model.observation
    marginal, steps = [model.initial_covariance], model.num_steps
    for _ in range(steps - 1):
        marginal.append(a @ marginal[-1] @ a.mT + model.transition_covariance)
    rows = []
    for s in range(steps):
        row = []
        for t in range(steps):
            low, high = min(s, t), max(s, t)
            block = torch.linalg.matrix_power(a, high - low) @ marginal[low]  # Cov(z_high, z_low)
            row.append(c @ (block if s >= t else block.mT) @ c.mT + (s == t) * model.observation_covariance)
        rows.append(torch.cat(row, 1))
    joint = torch.cat(rows)
    return dist.MultivariateNormal(torch.zeros(len(joint), dtype=torch.double), joint).log_prob(x.flatten(1))
