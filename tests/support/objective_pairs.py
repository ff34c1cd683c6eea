"""Pairs as Pyro programs and, beside them, their log-probabilities by hand, for tests of objectives."""

import copy
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from tests.support.oracles import seeded

D, K = 3, 2  # dimensions of x and z


def normal(x, loc, scale):
    """log N(x; loc, scale²) of each entry."""
    return -(((x - loc) / scale) ** 2) / 2 - torch.as_tensor(scale).log() - math.log(2 * math.pi) / 2


class Pieces:
    """Terms of log p(x, z) and log q(z|x): ``(particles, rows)``; of latents that all data share
    ``(particles, 1)``, else 0."""

    def __init__(self, likelihood, prior, log_q, shared_prior=0.0, shared_q=0.0):
        self.likelihood, self.prior, self.log_q = likelihood, prior, log_q
        self.shared_prior, self.shared_q = shared_prior, shared_q

    def log_p_and_q(self, *, joint, scale=1.0, beta=1.0):
        """log p and log q of each datum, or with ``joint`` of all data together, with weights of the
        terms."""
        p, q = scale * (self.likelihood + beta * self.prior), scale * beta * self.log_q
        if joint:
            p, q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        return p + beta * self.shared_prior, q + beta * self.shared_q


class FactorAnalysis(nn.Module):
    """z ~ N(0, I), x ~ N(W z + b, s² I), q(z|x) = N(A x + c, diag t²)."""

    joint = False  # whether latents are shared by all data
    vectorized = True
    discrete = ()  # sites with a score-function gradient
    observes = "x"

    def __init__(self, seed=0):
        super().__init__()
        values = {"weight": (D, K), "bias": (D,), "log_noise": (), "a": (K, D), "c": (K,), "log_t": (K,)}
        for i, (name, shape) in enumerate((values | self.more()).items()):
            setattr(
                self, name, nn.Parameter(0.5 * seeded(math.prod(shape), seed=100 * seed + i).reshape(shape))
            )
        self.seen = []  # the arguments and latents of each run of the guide

    def more(self):
        """Shapes of further parameters."""
        return {}

    def arguments(self, n=5, seed=0):
        """The arguments of the pair."""
        return (seeded(n, D, seed=seed),), {}

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.q(x)
            self.saw((x,), z=pyro.sample("z", dist.Normal(loc, scale).to_event(1)))

    def saw(self, arguments, **latents):
        self.seen.append((arguments, {name: value.detach() for name, value in latents.items()}))

    def mean(self, z):
        return z @ self.weight.mT + self.bias

    def q(self, x):
        return x @ self.a.mT + self.c, self.log_t.exp()

    # by hand

    def noise(self, arguments, z):
        """The noise ε of the draws."""
        loc, scale = self.q(arguments[0])
        return {"z": (z["z"] - loc) / scale}

    def latents(self, arguments, noise):
        """The draws as functions of φ at this noise."""
        loc, scale = self.q(arguments[0])
        return {"z": loc + scale * noise["z"]}

    def pieces(self, arguments, z):
        (x,) = arguments
        likelihood = normal(x, self.mean(z["z"]), self.log_noise.exp()).sum(-1)
        return Pieces(likelihood, normal(z["z"], 0.0, 1.0).sum(-1), normal(z["z"], *self.q(x)).sum(-1))


class MaskedObservations(FactorAnalysis):
    """Data with x₀ < 0 are missing. The mean is a deterministic site."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            loc = pyro.deterministic("loc", self.mean(z), event_dim=1)
            with poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def pieces(self, arguments, z):
        pieces = super().pieces(arguments, z)
        pieces.likelihood = pieces.likelihood * (arguments[0][:, 0] > 0)
        return pieces


class MaskedData(FactorAnalysis):
    """All sites of a datum with condition y < 0 are masked."""

    def arguments(self, n=5, seed=0):
        return (seeded(n, D, seed=seed), seeded(n, seed=seed + 1)), {}

    def model(self, x, y):
        with poutine.mask(mask=y > 0):
            super().model(x)

    def guide(self, x, y):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)), poutine.mask(mask=y > 0):
            loc, scale = self.q(x)
            self.saw((x, y), z=pyro.sample("z", dist.Normal(loc, scale).to_event(1)))

    def pieces(self, arguments, z):
        pieces, is_kept = super().pieces(arguments[:1], z), arguments[1] > 0
        return Pieces(pieces.likelihood * is_kept, pieces.prior * is_kept, pieces.log_q * is_kept)


class InnerPlate(FactorAnalysis):
    """Entries of x in a plate within the data plate, those below −1 masked."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            with pyro.plate("entries", D, dim=-1), poutine.mask(mask=x > -1):
                pyro.sample("x", dist.Normal(self.mean(z).squeeze(-2), self.log_noise.exp()), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x), dim=-2):
            loc, scale = self.q(x)
            z = pyro.sample("z", dist.Normal(loc.unsqueeze(-2), scale).to_event(1))
            self.saw((x,), z=z)

    def noise(self, arguments, z):
        return super().noise(arguments, {"z": z["z"].squeeze(-2)})

    def latents(self, arguments, noise):
        return {"z": super().latents(arguments, noise)["z"].unsqueeze(-2)}

    def pieces(self, arguments, z):
        (x,), z = arguments, {"z": z["z"].squeeze(-2)}
        pieces = super().pieces(arguments, z)
        pieces.likelihood = (normal(x, self.mean(z["z"]), self.log_noise.exp()) * (x > -1)).sum(-1)
        return pieces


class InnerLatents(FactorAnalysis):
    """A latent for each entry of x, in a plate within each datum: zⱼ ~ N(0, 1), xⱼ ~ N(wⱼ zⱼ + bⱼ, s²)."""

    def more(self):
        return {"w": (D,), "aj": (D,), "cj": (D,)}

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", D, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.w * z + self.bias, self.log_noise.exp()), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", D, dim=-1):
            self.saw((x,), z=pyro.sample("z", dist.Normal(*self.q(x))))

    def q(self, x):
        return x * self.aj + self.cj, self.log_t[0].exp()

    def pieces(self, arguments, z):
        (x,), z = arguments, z["z"]
        likelihood = normal(x, self.w * z + self.bias, self.log_noise.exp()).sum(-1)
        return Pieces(likelihood, normal(z, 0.0, 1.0).sum(-1), normal(z, *self.q(x)).sum(-1))


class OuterPlate(InnerLatents):
    """As :class:`InnerLatents`, with the plate of the entries to the left of the data plate."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("entries", D, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = self.w.unsqueeze(-1) * z + self.bias.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()), obs=x.mT)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("entries", D, dim=-2), pyro.plate("data", len(x), dim=-1):
            loc, scale = self.q(x)
            self.saw((x,), z=pyro.sample("z", dist.Normal(loc.mT, scale)))

    def noise(self, arguments, z):
        return super().noise(arguments, {"z": z["z"].mT})

    def latents(self, arguments, noise):
        return {"z": super().latents(arguments, noise)["z"].mT}

    def pieces(self, arguments, z):
        return super().pieces(arguments, {"z": z["z"].mT})


class Enumerated(FactorAnalysis):
    """c ~ Categorical(softmax(π)), summed out in the model, x ~ N(W z + b_c, s² I)."""

    num_components = 3

    def more(self):
        return {"logits": (self.num_components,), "biases": (self.num_components, D)}

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            loc = z @ self.weight.mT + self.biases[c]
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def pieces(self, arguments, z):
        (x,), z = arguments, z["z"]
        locs = (z @ self.weight.mT).unsqueeze(-2) + self.biases
        log_p = normal(x.unsqueeze(-2), locs, self.log_noise.exp()).sum(-1) + self.logits.log_softmax(-1)
        return Pieces(log_p.logsumexp(-1), normal(z, 0.0, 1.0).sum(-1), normal(z, *self.q(x)).sum(-1))


class EnumeratedEntries(InnerPlate):
    """A component cⱼ ~ Bernoulli(½) for each entry of x, summed out: xⱼ ~ N((W z)ⱼ + cⱼ bⱼ, s²)."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            with pyro.plate("entries", D, dim=-1):
                infer = {"enumerate": "parallel"}
                c = pyro.sample("c", dist.Bernoulli(x.new_full((), 0.5)), infer=infer)
                loc = (z @ self.weight.mT).squeeze(-2) + c * self.bias
                pyro.sample("x", dist.Normal(loc, self.log_noise.exp()), obs=x)

    def pieces(self, arguments, z):
        (x,), z = arguments, z["z"].squeeze(-2)
        locs = torch.stack([z @ self.weight.mT, z @ self.weight.mT + self.bias])
        log_p = normal(x, locs, self.log_noise.exp()).logsumexp(0) - math.log(2)
        return Pieces(log_p.sum(-1), normal(z, 0.0, 1.0).sum(-1), normal(z, *self.q(x)).sum(-1))


class TwoViews(FactorAnalysis):
    """x and a label y ~ Categorical(softmax(V z)) are observed, and q(z|x, y) depends on both."""

    def more(self):
        return {"v": (4, K), "of_label": (4, K)}

    def arguments(self, n=5, seed=0):
        return (seeded(n, D, seed=seed), torch.arange(n) % 4), {}

    def model(self, x, y):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.log_noise.exp()).to_event(1), obs=x)
            pyro.sample("y", dist.Categorical(logits=z @ self.v.mT), obs=y)

    def guide(self, x, y):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            self.saw((x, y), z=pyro.sample("z", dist.Normal(*self.q_of(x, y)).to_event(1)))

    def q_of(self, x, y):
        loc, scale = self.q(x)
        return loc + self.of_label[y], scale

    def noise(self, arguments, z):
        loc, scale = self.q_of(*arguments)
        return {"z": (z["z"] - loc) / scale}

    def latents(self, arguments, noise):
        loc, scale = self.q_of(*arguments)
        return {"z": loc + scale * noise["z"]}

    def pieces(self, arguments, z):
        (x, y), pieces, z = arguments, super().pieces(arguments[:1], z), z["z"]
        log_p = (z @ self.v.mT).log_softmax(-1)
        log_p = log_p.gather(-1, y.unsqueeze(-1).expand(*z.shape[:-1], 1)).squeeze(-1)
        return Pieces(pieces.likelihood + log_p, pieces.prior, normal(z, *self.q_of(x, y)).sum(-1))


class Shared(FactorAnalysis):
    """v ~ N(0, I) shared by all data, x ~ N(W z + v, s² I)."""

    joint = True

    def more(self):
        return {"v_loc": (D,), "v_log_scale": (D,)}

    def model(self, x):
        pyro.module("pair", self)
        v = pyro.sample("v", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            loc = z @ self.weight.mT + v
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        v = pyro.sample("v", dist.Normal(self.v_loc, self.v_log_scale.exp()).to_event(1))
        with pyro.plate("data", len(x)):
            loc, scale = self.q(x)
            self.saw((x,), v=v, z=pyro.sample("z", dist.Normal(loc, scale).to_event(1)))

    @staticmethod
    def row(v):
        """``(particles, 1, D)``"""
        return v if v.dim() == 3 else v.unsqueeze(-2)

    def noise(self, arguments, z):
        return super().noise(arguments, z) | {"v": (z["v"] - self.v_loc) / self.v_log_scale.exp()}

    def latents(self, arguments, noise):
        return super().latents(arguments, noise) | {"v": self.v_loc + self.v_log_scale.exp() * noise["v"]}

    def pieces(self, arguments, z):
        (x,), v, z = arguments, self.row(z["v"]), z["z"]
        return Pieces(
            normal(x, z @ self.weight.mT + v, self.log_noise.exp()).sum(-1),
            normal(z, 0.0, 1.0).sum(-1),
            normal(z, *self.q(x)).sum(-1),
            normal(v, 0.0, 1.0).sum(-1),
            normal(v, self.v_loc, self.v_log_scale.exp()).sum(-1),
        )


class EnumeratedShared(Shared):
    """As :class:`Shared`, x ~ N(W z + v + b_c, s² I) with c ~ Categorical(softmax(π)), summed out."""

    def more(self):
        return super().more() | {"logits": (3,), "biases": (3, D)}

    def model(self, x):
        pyro.module("pair", self)
        v = pyro.sample("v", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"})
            loc = z @ self.weight.mT + v + self.biases[c]
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def pieces(self, arguments, z):
        pieces, (x,) = super().pieces(arguments, z), arguments
        locs = (z["z"] @ self.weight.mT + self.row(z["v"])).unsqueeze(-2) + self.biases
        log_p = normal(x.unsqueeze(-2), locs, self.log_noise.exp()).sum(-1) + self.logits.log_softmax(-1)
        pieces.likelihood = log_p.logsumexp(-1)
        return pieces


class NotVectorized(FactorAnalysis):
    """A decoder that takes one draw for each datum only."""

    vectorized = False

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            loc = self.mean(z.reshape(len(x), K))
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)


class SharedNotVectorized(Shared):
    vectorized = False

    def model(self, x):
        pyro.module("pair", self)
        v = pyro.sample("v", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            loc = z.reshape(len(x), K) @ self.weight.mT + v.reshape(D)
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)


class Hierarchical(FactorAnalysis):
    """y ~ N(0, I), z ~ N(U y, I), x ~ N(W z + b, s² I); q(z|x) = N(A x + c, diag t²),
    q(y|z, x) = N(B z + C x, r(z)²) with a scale that depends on z."""

    def more(self):
        return {"u": (K, K), "b_z": (K, K), "b_x": (K, D), "r": (K, K)}

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(y @ self.u.mT, 1.0).to_event(1))
            loc = self.mean(self.reshaped(z, x))
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def reshaped(self, z, x):
        return z

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(*self.q(x)).to_event(1))
            self.saw((x,), z=z, y=pyro.sample("y", dist.Normal(*self.q_y(z, x)).to_event(1)))

    def q_y(self, z, x):
        return z @ self.b_z.mT + x @ self.b_x.mT, (z @ self.r).tanh().exp()

    def noise(self, arguments, z):
        loc, scale = self.q_y(z["z"], *arguments)
        return super().noise(arguments, z) | {"y": (z["y"] - loc) / scale}

    def latents(self, arguments, noise):
        z = super().latents(arguments, noise)["z"]
        loc, scale = self.q_y(z, *arguments)
        return {"z": z, "y": loc + scale * noise["y"]}

    def pieces(self, arguments, z):
        (x,), y, z = arguments, z["y"], z["z"]
        return Pieces(
            normal(x, self.mean(z), self.log_noise.exp()).sum(-1),
            normal(y, 0.0, 1.0).sum(-1) + normal(z, y @ self.u.mT, 1.0).sum(-1),
            normal(z, *self.q(x)).sum(-1) + normal(y, *self.q_y(z, x)).sum(-1),
        )


class ThreeLevels(Hierarchical):
    """As :class:`Hierarchical`, with v ~ N(0, I), y ~ N(v, I) and q(v|y, z) = N(y ∘ z, r(y)²), so that a
    latent of the guide depends on another through two paths."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            y = pyro.sample("y", dist.Normal(v, 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(y @ self.u.mT, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(*self.q(x)).to_event(1))
            y = pyro.sample("y", dist.Normal(*self.q_y(z, x)).to_event(1))
            self.saw((x,), z=z, y=y, v=pyro.sample("v", dist.Normal(*self.q_v(y, z)).to_event(1)))

    def q_v(self, y, z):
        return y * z, (y @ self.r).tanh().exp()

    def noise(self, arguments, z):
        loc, scale = self.q_v(z["y"], z["z"])
        return super().noise(arguments, z) | {"v": (z["v"] - loc) / scale}

    def latents(self, arguments, noise):
        below = super().latents(arguments, noise)
        loc, scale = self.q_v(below["y"], below["z"])
        return below | {"v": loc + scale * noise["v"]}

    def pieces(self, arguments, z):
        pieces, v, y = super().pieces(arguments, z), z["v"], z["y"]
        pieces.prior = pieces.prior - normal(y, 0.0, 1.0).sum(-1) + normal(y, v, 1.0).sum(-1)
        pieces.prior = pieces.prior + normal(v, 0.0, 1.0).sum(-1)
        pieces.log_q = pieces.log_q + normal(v, *self.q_v(y, z["z"])).sum(-1)
        return pieces


class HierarchicalNotVectorized(Hierarchical):
    vectorized = False

    def reshaped(self, z, x):
        return z.reshape(len(x), K)


class Tied(FactorAnalysis):
    """The encoder and the decoder share their weight: A = Wᵀ."""

    def q(self, x):
        return x @ self.weight + self.c, self.log_t.exp()


class Keywords(FactorAnalysis):
    """Keyword arguments, one of them a number."""

    def arguments(self, n=5, seed=0):
        return (), {"x": seeded(n, D, seed=seed), "power": 2.0}

    def model(self, *, x, power):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            scale = self.log_noise.exp() ** power
            pyro.sample("x", dist.Normal(self.mean(z), scale).to_event(1), obs=x)

    def guide(self, *, x, power):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc, scale = self.q(x)
            self.saw((x, power), z=pyro.sample("z", dist.Normal(loc, scale).to_event(1)))

    def pieces(self, arguments, z):
        x, power = arguments
        pieces = super().pieces((x,), z)
        pieces.likelihood = normal(x, self.mean(z["z"]), self.log_noise.exp() ** power).sum(-1)
        return pieces


class FullCovariance(FactorAnalysis):
    """q(z|x) = N(A x + c, L Lᵀ) with L = diag t + a lower triangle."""

    def more(self):
        return {"lower": (K, K)}

    @property
    def tril(self):
        return torch.diag(self.log_t.exp()) + self.lower.tril(-1)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(self.q(x)[0], scale_tril=self.tril))
            self.saw((x,), z=z)

    def noise(self, arguments, z):
        (x,) = arguments
        return {"z": (z["z"] - self.q(x)[0]) @ self.tril.inverse().mT}

    def latents(self, arguments, noise):
        (x,) = arguments
        return {"z": self.q(x)[0] + noise["z"] @ self.tril.mT}

    def pieces(self, arguments, z):
        pieces = super().pieces(arguments, z)
        pieces.log_q = normal(self.noise(arguments, z)["z"], 0.0, 1.0).sum(-1) - self.log_t.sum()
        return pieces


class Positive(FactorAnalysis):
    """A scalar latent with log-normal prior and guide, through a transform."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 0.5))
            loc = z.unsqueeze(-1) * self.weight[:, 0] + self.bias
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            self.saw((x,), z=pyro.sample("z", dist.LogNormal(*self.q(x))))

    def q(self, x):
        return x @ self.a[0] + self.c[0], self.log_t[0].exp()

    def noise(self, arguments, z):
        return super().noise(arguments, {"z": z["z"].log()})

    def latents(self, arguments, noise):
        return {"z": super().latents(arguments, noise)["z"].exp()}

    def pieces(self, arguments, z):
        (x,), z = arguments, z["z"]
        loc = z.unsqueeze(-1) * self.weight[:, 0] + self.bias
        likelihood = normal(x, loc, self.log_noise.exp()).sum(-1)
        return Pieces(likelihood, normal(z.log(), 0.0, 0.5) - z.log(), normal(z.log(), *self.q(x)) - z.log())


class Discrete(FactorAnalysis):
    """k ~ Bernoulli(½), z ~ N(k m, I), x ~ N(W z + b, s² I); q(z|x) normal, and q(k|z, x) Bernoulli with
    logits that depend on z."""

    discrete = ("k",)

    def more(self):
        return {"m": (K,), "k_x": (D,), "k_z": (K,)}

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(x.new_full((), 0.5)))
            z = pyro.sample("z", dist.Normal(k.unsqueeze(-1) * self.m, 1.0).to_event(1))
            loc = self.mean(self.reshaped(z, x))
            pyro.sample("x", dist.Normal(loc, self.log_noise.exp()).to_event(1), obs=x)

    def reshaped(self, z, x):
        return z

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(*self.q(x)).to_event(1))
            self.saw((x,), z=z, k=pyro.sample("k", dist.Bernoulli(logits=self.k_logits(z, x))))

    def k_logits(self, z, x):
        return x @ self.k_x + z @ self.k_z

    def noise(self, arguments, z):
        return super().noise(arguments, z) | {"k": z["k"]}

    def latents(self, arguments, noise):
        return super().latents(arguments, noise) | {"k": noise["k"]}

    def score(self, arguments, z):
        """log q of the discrete latents."""
        logits, k = self.k_logits(z["z"], *arguments), z["k"]
        return k * logits - nn.functional.softplus(logits)

    def pieces(self, arguments, z):
        (x,), k, y = arguments, z["k"], z["z"]
        return Pieces(
            normal(x, self.mean(y), self.log_noise.exp()).sum(-1),
            normal(y, k.unsqueeze(-1) * self.m, 1.0).sum(-1) - math.log(2),
            normal(y, *self.q(x)).sum(-1) + self.score(arguments, z),
        )


class DiscreteNotVectorized(Discrete):
    vectorized = False

    def reshaped(self, z, x):
        return z.reshape(len(x), K)


CONTINUOUS = [
    FactorAnalysis,
    MaskedObservations,
    MaskedData,
    InnerPlate,
    InnerLatents,
    Enumerated,
    EnumeratedEntries,
    TwoViews,
    Shared,
    EnumeratedShared,
    NotVectorized,
    SharedNotVectorized,
    Hierarchical,
    ThreeLevels,
    HierarchicalNotVectorized,
    Tied,
    Keywords,
    FullCovariance,
    Positive,
]
DISCRETE = [Discrete, DiscreteNotVectorized]


# ---- gradients by the formulas of the papers


def log_mean_exp(log_w):
    return log_w.logsumexp(0) - math.log(len(log_w))


def reference(objective, pair, arguments, z, asleep=None, *, scale=1.0, beta=1.0, inside=False):
    """The objective summed over data and its gradient with respect to each parameter of the pair, at given
    draws.

    :param z: the draws by site, with particles first.
    :param asleep: arguments and latents of the sleep phase.
    :param scale: a factor of each datum, such as N/B: of its objective, or with ``inside`` of its terms.
    :param beta: the weight of latent terms.
    """
    name, parameters = type(objective).__name__, list(pair.parameters())
    weights = {"joint": pair.joint, "scale": scale if inside else 1.0, "beta": beta}
    factor = 1.0 if inside else scale
    noise = {site: value.detach() for site, value in pair.noise(arguments, z).items()}
    leaves = {site: value.detach().requires_grad_() for site, value in pair.latents(arguments, noise).items()}
    log_p, log_q = pair.pieces(arguments, leaves).log_p_and_q(**weights)
    log_w = (log_p - log_q).detach()
    k, normalized = len(log_w), log_w.softmax(0)
    alpha = objective.alpha if name == "Renyi" else 0.0
    if name in ("STL", "WakeSleep") or alpha == 1:
        value = log_w.mean(0)
    else:
        value = log_mean_exp((1 - alpha) * log_w) / (1 - alpha)
    if name == "STL" or (name == "IWAE" and objective.estimator != "iwae"):
        of_p = {"STL": torch.full_like(log_w, 1 / k), "IWAE": normalized}[name]
        of_z = of_p**2 if name == "IWAE" and objective.estimator == "dreg" else of_p
        total = (of_p * log_p).sum()
        partial = torch.autograd.grad(
            (of_z * (log_p - log_q)).sum(), list(leaves.values()), retain_graph=True
        )
        fresh = pair.latents(arguments, noise)
        total = total + sum(
            (gradient * fresh[site]).sum() for site, gradient in zip(leaves, partial, strict=True)
        )
    elif name in ("IWAE", "Renyi", "VIMCO"):
        fresh = pair.latents(arguments, noise)
        p, q = pair.pieces(arguments, fresh).log_p_and_q(**weights)
        ratios = p - q
        if alpha == 1:
            total = ratios.mean(0).sum()
        else:
            total = (log_mean_exp((1 - alpha) * ratios) / (1 - alpha)).sum()
        if pair.discrete:
            score = pair.score(arguments, fresh)
            for j in range(k):
                others = torch.cat([log_w[:j], log_w[j + 1 :]])
                replaced = torch.cat([others, others.mean(0, keepdim=True)])
                total = total + ((log_mean_exp(log_w) - log_mean_exp(replaced)) * score[j]).sum()
    elif name == "WakeSleep":
        total = log_p.mean(0).sum() + pair.pieces(*asleep).log_p_and_q(**weights)[1].sum()
    elif name == "ReweightedWakeSleep":
        total = (normalized * (log_p + objective.wake_phi * log_q)).sum()
        if objective.sleep_phi:
            total = total + objective.sleep_phi * pair.pieces(*asleep).log_p_and_q(**weights)[1].sum()
    gradients = torch.autograd.grad(factor * total, parameters, allow_unused=True)
    named = zip(dict(pair.named_parameters()), parameters, gradients, strict=True)
    return factor * value.sum().item(), {
        name: torch.zeros_like(p) if gradient is None else gradient for name, p, gradient in named
    }


def recorded_draws(traces, pair):
    """The draws of all particles, ``(particles, rows, …)``, from the traces of a step."""
    sites = [name for name, site in traces[0][1].nodes.items() if name in pair.seen[-1][1]]
    if not pair.vectorized:
        return {
            name: torch.stack([guide.nodes[name]["value"].detach() for _, guide in traces]) for name in sites
        }
    ((_, guide),) = traces
    return {name: guide.nodes[name]["value"].detach() for name in sites}


def record_steps(objective, pair):
    """Record the parameters, the batch and the draws of each step of an objective."""
    records, step = [], objective.step

    def recording(model, guide, batch, **options):
        before = copy.deepcopy(pair.state_dict())
        done = step(model, guide, batch, **options)
        arguments = tuple(part.clone() for part in batch.args)
        records.append((before, arguments, recorded_draws(done.traces, pair), pair.seen[-1]))
        return done

    objective.step = recording
    return records
