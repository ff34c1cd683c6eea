"""Small pairs with the structure of Pyro's examples and tutorials: plates, enumeration, auxiliary sites,
subsampling.

Each function returns an :class:`Example`. Sizes are toy sizes, parameters are new at each call, data and
parameters come from a fixed seed.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softmax, softplus
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

N, LATENT, LABELS = 24, 2, 3


class Example(NamedTuple):
    """``model(*args, **kwargs)`` and ``guide`` alike; ``loss`` is the one that the example trains with."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    loss: Any
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    @property
    def data(self) -> tuple[Any, ...] | dict[str, Any]:
        """As the verbs take them: a tuple, or by name where some of them are."""
        names = inspect.signature(self.model).parameters
        return dict(zip(names, self.args, strict=False)) | self.kwargs if self.kwargs else self.args


def _mlp(n_in: int, n_out: int, *, norm: bool = False) -> nn.Sequential:
    layers = [nn.Linear(n_in, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Softplus(), nn.Linear(8, n_out)]
    return nn.Sequential(*layers)


def _gaussian(features: torch.Tensor) -> dist.TorchDistribution:
    loc, scale = features.chunk(2, -1)
    return dist.Normal(loc, 0.01 + softplus(scale)).to_event(1)


def _join(*parts: torch.Tensor) -> torch.Tensor:
    """Concatenated, where enumerated values have further batch dimensions."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)


def _images(n: int = N) -> torch.Tensor:
    return torch.rand(n, 4, 4, generator=torch.Generator().manual_seed(1)).round()


def _labels(n: int = N) -> torch.Tensor:
    return torch.eye(LABELS)[torch.arange(n) % LABELS]


def vae(*, grey: bool = False) -> Example:
    """``examples/vae``: networks registered by ``pyro.module``; a Bernoulli that is not validated, as grey
    images need."""
    encoder, decoder = _mlp(16, 2 * LATENT), _mlp(LATENT, 16)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            probs = decoder(z).sigmoid()
            pyro.sample("obs", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=x.reshape(-1, 16))

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", _gaussian(encoder(x.reshape(-1, 16))))

    x = _images()
    return Example(model, guide, ((0.1 + 0.8 * x) if grey else x,), Trace_ELBO())


def vae_grey() -> Example:
    return vae(grey=True)


class _SSVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_y, self.encoder_z = _mlp(16, LABELS), _mlp(16 + LABELS, 2 * LATENT)
        self.decoder = _mlp(LATENT + LABELS, 16)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), LATENT), 1.0).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(len(xs), LABELS) / LABELS), obs=ys)
            probs = self.decoder(_join(zs, ys)).sigmoid()
            pyro.sample("x", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.encoder_y(xs)))
            pyro.sample("z", _gaussian(self.encoder_z(_join(xs, ys))))

    def model_classify(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            if ys is not None:
                with poutine.scale(scale=46.0):
                    pyro.sample("y_aux", dist.OneHotCategorical(logits=self.encoder_y(xs)), obs=ys)

    def guide_classify(self, xs, ys=None):
        pass


def ss_vae_unsupervised() -> Example:
    """``examples/vae/ss_vae_M2`` without labels: ``pyro.plate("data")`` without a size, labels enumerated in
    the guide."""
    net = _SSVAE()
    return Example(
        net.model,
        config_enumerate(net.guide, "parallel", expand=True),
        (_images().reshape(-1, 16),),
        _enum(1),
    )


def ss_vae_supervised() -> Example:
    net = _SSVAE()
    args = _images().reshape(-1, 16), _labels()
    return Example(net.model, config_enumerate(net.guide, "parallel", expand=True), args, _enum(1))


def ss_vae_classify() -> Example:
    """Its auxiliary loss: a scaled classifier as model, and a guide that does nothing."""
    net = _SSVAE()
    return Example(
        net.model_classify, net.guide_classify, (_images().reshape(-1, 16), _labels()), Trace_ELBO()
    )


def _enum(nesting: int) -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)


def cvae() -> Example:
    """``examples/cvae``: a frozen baseline under ``no_grad``, half of each image observed, a learned prior
    p(z|x)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.baseline, self.prior = _mlp(16, 16), _mlp(32, 2 * LATENT)
            self.generation, self.recognition = _mlp(LATENT, 16), _mlp(32, 2 * LATENT)

        def model(self, xs, ys=None):
            pyro.module("generation_net", self)
            hidden = xs == -1
            with pyro.plate("data"):
                with torch.no_grad():
                    guess = self.baseline(xs.flatten(1)).sigmoid()
                zs = pyro.sample("z", _gaussian(self.prior(_join(xs.flatten(1), guess))))
                probs = self.generation(zs).sigmoid().reshape(xs.shape)
                ours = dist.Bernoulli(probs[hidden].reshape(len(xs), -1), validate_args=False).to_event(1)
                pyro.sample("y", ours, obs=ys[hidden].reshape(len(xs), -1))

        def guide(self, xs, ys=None):
            with pyro.plate("data"):
                pyro.sample("z", _gaussian(self.recognition(_join(xs.flatten(1), ys.flatten(1)))))

    net, ys = Net(), _images()
    xs = ys.clone()
    xs[:, :2] = -1
    return Example(net.model, net.guide, (xs, ys), Trace_ELBO())


def scanvi(*, norm: bool = False) -> Example:
    """``examples/scanvi``: a common ``poutine.scale``, a hierarchy of latents, ``pyro.factor`` in the
    guide."""
    genes, alpha = 5, 0.1
    gen = torch.Generator().manual_seed(2)
    x, y = torch.poisson(3 * torch.rand(N, genes, generator=gen), generator=gen), _labels()
    decoders = nn.ModuleDict(
        {"z2": _mlp(LATENT + LABELS, 2 * LATENT, norm=norm), "x": _mlp(LATENT, 2 * genes, norm=norm)}
    )
    encoders = nn.ModuleDict(
        {
            "z2l": _mlp(genes, 2 * LATENT + 2, norm=norm),
            "z1": _mlp(LATENT + LABELS, 2 * LATENT),
            "y": _mlp(LATENT, LABELS),
        }
    )
    scale = 1 / (len(x) * genes)

    def model(x, y=None):
        pyro.module("decoders", decoders)
        theta = pyro.param("inverse_dispersion", 10.0 * x.new_ones(genes), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=scale):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(LABELS)), obs=y)
            z2 = pyro.sample("z2", _gaussian(decoders["z2"](_join(z1, y))))
            size = pyro.sample("l", dist.LogNormal(x.new_zeros(1), 1.0).to_event(1))
            gate, mu = decoders["x"](z2).chunk(2, -1)
            logits = (size * softmax(mu, -1) + 1e-6).log() - (theta + 1e-6).log()
            counts = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(x, y=None):
        pyro.module("encoders", encoders)
        with pyro.plate("batch", len(x)), poutine.scale(scale=scale):
            z2_features, l_features = encoders["z2l"](x.log1p()).split([2 * LATENT, 2], -1)
            loc, log_scale = l_features.chunk(2, -1)
            pyro.sample("l", dist.LogNormal(loc, 0.01 + softplus(log_scale)).to_event(1))
            z2 = pyro.sample("z2", _gaussian(z2_features))
            classes = dist.OneHotCategorical(logits=encoders["y"](z2))
            if y is None:
                y = pyro.sample("y", classes)
            else:
                pyro.factor("classification_loss", -alpha * classes.log_prob(y), has_rsample=False)
            pyro.sample("z1", _gaussian(encoders["z1"](_join(z2, y))))

    return Example(model, config_enumerate(guide, "parallel", expand=True), (x, y), _enum(1))


def scanvi_batch_norm() -> Example:
    return scanvi(norm=True)


def scanvi_unlabelled() -> Example:
    labelled = scanvi()
    return labelled._replace(args=labelled.args[:1])


def prodlda() -> Example:
    """``tutorial/prodlda``: Multinomial word counts whose ``total_count`` is the longest document of the
    minibatch."""
    words = 6
    encoder, decoder = _mlp(words, 2 * LABELS), nn.Linear(LABELS, words, bias=False)
    gen = torch.Generator().manual_seed(3)
    docs = torch.poisson(2 * torch.rand(N, words, generator=gen), generator=gen)
    docs[:, 0] += 1
    docs[-1] += 9  # longer than all others, and in the last minibatch

    def model(docs):
        pyro.module("decoder", decoder)
        with pyro.plate("documents", docs.shape[0]):
            logtheta = pyro.sample(
                "logtheta", dist.Normal(docs.new_zeros(len(docs), LABELS), 1.0).to_event(1)
            )
            probs = softmax(decoder(softmax(logtheta, -1)), -1)
            pyro.sample("obs", dist.Multinomial(int(docs.sum(-1).max()), probs), obs=docs)

    def guide(docs):
        pyro.module("encoder", encoder)
        with pyro.plate("documents", docs.shape[0]):
            pyro.sample("logtheta", _gaussian(encoder(docs)))

    return Example(model, guide, (docs,), TraceMeanField_ELBO())


def cevae(*, shared_name: bool = False) -> Example:
    """``contrib/cevae``: treatment t and outcome y are observed in the guide too, as auxiliary sites."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.x_nn, self.p_t, self.y_nn = _mlp(LATENT, 6), _mlp(LATENT, 1), _mlp(LATENT + 1, 2)

        def forward(self, x, t=None, y=None, size=None):
            with pyro.plate("data", len(x) if size is None else size, subsample=x):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT]).to_event(1))
                pyro.sample("x", _gaussian(self.x_nn(z)), obs=x)
                t = pyro.sample("t", dist.Bernoulli(logits=self.p_t(z)[..., 0]), obs=t)
                pyro.sample("y", _scalar(self.y_nn(_join(z, t[..., None]))), obs=y)

    class SameName(Model):
        def __init__(self):
            super().__init__()
            self.t_nn = self.p_t
            del self.p_t

        @property
        def p_t(self):
            return self.t_nn

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.t_nn, self.q_y, self.z_nn = _mlp(3, 1), _mlp(4, 2), _mlp(5, 2 * LATENT)

        def forward(self, x, t=None, y=None, size=None):
            with pyro.plate("data", len(x) if size is None else size, subsample=x):
                auxiliary = {"is_auxiliary": True}
                t = pyro.sample("t", dist.Bernoulli(logits=self.t_nn(x)[..., 0]), obs=t, infer=auxiliary)
                y = pyro.sample("y", _scalar(self.q_y(_join(x, t[..., None]))), obs=y, infer=auxiliary)
                pyro.sample("z", _gaussian(self.z_nn(_join(x, t[..., None], y[..., None]))))

    gen = torch.Generator().manual_seed(4)
    x = torch.randn(N, 3, generator=gen)
    t = (torch.rand(N, generator=gen) > 0.5).float()
    return Example((SameName if shared_name else Model)(), Guide(), (x, t, x[:, 0] + t), Trace_ELBO())


def cevae_shared_name() -> Example:
    """Both networks are called ``t_nn``, as in Pyro's own, so Pyro's param store knows one of them only."""
    return cevae(shared_name=True)


def _scalar(features: torch.Tensor) -> dist.TorchDistribution:
    return dist.Normal(features[..., 0], 0.01 + softplus(features[..., 1]))


def lda() -> Example:
    """``examples/lda``: documents along dimension 1, global topics, words enumerated, an inner plate that
    subsamples."""
    topics, vocabulary, length = 2, 5, 6
    predictor = nn.Sequential(nn.Linear(vocabulary, topics), nn.Softmax(-1))
    words = torch.randint(vocabulary, (length, N), generator=torch.Generator().manual_seed(5))

    def model(data, batch_size=None):
        with pyro.plate("topics", topics):
            weights = pyro.sample("topic_weights", dist.Gamma(1.0 / topics, 1.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(vocabulary) / vocabulary))
        with pyro.plate("documents", data.shape[1]) as ind:
            data = data[:, ind]
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", length):
                word_topics = pyro.sample(
                    "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
                )
                pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)

    def guide(predictor, data, batch_size=None):
        weights = pyro.param(
            "topic_weights_posterior", lambda: torch.ones(topics), constraint=constraints.positive
        )
        topic_words = pyro.param(
            "topic_words_posterior",
            lambda: torch.ones(topics, vocabulary),
            constraint=constraints.greater_than(0.5),
        )
        with pyro.plate("topics", topics):
            pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
            pyro.sample("topic_words", dist.Dirichlet(topic_words))
        pyro.module("predictor", predictor)
        with pyro.plate("documents", data.shape[1], batch_size) as ind:
            data = data[:, ind]
            counts = torch.zeros(vocabulary, len(ind)).scatter_add(0, data, torch.ones(data.shape))
            pyro.sample("doc_topics", dist.Delta(predictor(counts.T), event_dim=1))

    return Example(model, functools.partial(guide, predictor), (words,), _enum(2), {"batch_size": 8})


def _sequences() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(6)
    return torch.rand(N, 4, 3, generator=gen).round(), torch.randint(2, 5, (N,), generator=gen)


def hmm_1() -> Example:
    """``examples/hmm``, model 1: states enumerated along the chain, global probabilities under an
    ``AutoDelta``."""
    states = 2

    def model(sequences, lengths, batch_size=None):
        n, length, tones = sequences.shape
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(states) + 0.1).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([states, tones]).to_event(2))
        tones_plate = pyro.plate("tones", tones, dim=-1)
        with pyro.plate("sequences", n, batch_size, dim=-2) as batch:
            x = 0
            for t in pyro.markov(range(length)):
                with poutine.mask(mask=(t < lengths[batch]).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                    with tones_plate:
                        pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])

    guide = AutoDelta(poutine.block(model, expose=["probs_x", "probs_y"]))
    return Example(model, guide, _sequences(), _enum(2))


def hmm_6() -> Example:
    """Model 6: a second-order chain, its transition probabilities a parameter, ``pyro.markov(history=2)``."""
    states = 2

    def model(sequences, lengths, batch_size=None):
        n, length, tones = sequences.shape
        probs_x = pyro.param("probs_x", torch.full((states,) * 3, 1 / states), constraint=constraints.simplex)
        probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([states, tones]).to_event(2))
        tones_plate = pyro.plate("tones", tones, dim=-1)
        with pyro.plate("sequences", n, batch_size, dim=-2) as batch:
            now, before = torch.tensor(0), torch.tensor(0)
            for t in pyro.markov(range(length), history=2):
                with poutine.mask(mask=(t < lengths[batch]).unsqueeze(-1)):
                    probs = Vindex(probs_x)[before, now]
                    before, now = (
                        now,
                        pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"}),
                    )
                    with tones_plate:
                        pyro.sample(
                            f"y_{t}", dist.Bernoulli(probs_y[now.squeeze(-1)]), obs=sequences[batch, t]
                        )

    return Example(model, AutoDelta(poutine.block(model, expose=["probs_y"])), _sequences(), _enum(2))


def eight_schools() -> Example:
    """``examples/eight_schools/svi``: no plate at all, the schools are a batch dimension that nothing
    declares."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Example(*_schools(declared=False), (torch.stack([y, sigma], 1),), Trace_ELBO())


def eight_schools_declared() -> Example:
    """The same model, its schools declared as an event."""
    return eight_schools()._replace(**dict(zip(("model", "guide"), _schools(declared=True), strict=True)))


def _schools(*, declared: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def event(fn):
        return fn.to_event(1) if declared else fn

    def model(data):
        y, sigma = data.T
        eta = pyro.sample("eta", event(dist.Normal(torch.zeros(len(y)), 1.0)))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(25.0)))
        pyro.sample("obs", event(dist.Normal(mu + tau * eta, sigma)), obs=y)

    def guide(data):
        def normal(name, shape):
            scale = pyro.param(f"scale_{name}", torch.full(shape, 0.1), constraint=constraints.positive)
            return dist.Normal(pyro.param(f"loc_{name}", torch.zeros(shape)), scale)

        pyro.sample("eta", event(normal("eta", (len(data),))))
        pyro.sample("mu", normal("mu", ()))
        pyro.sample("tau", dist.TransformedDistribution(normal("tau", ()), [T.ExpTransform()]))

    return model, guide


def dmm(*, num_iafs: int = 0) -> Example:
    """``examples/dmm``: a deep Markov model, its reversed sequences a ``PackedSequence``, masks, an annealing
    factor."""
    x, lengths = _sequences()
    lengths = lengths.sort(descending=True).values
    mask = (torch.arange(4) < lengths[:, None]).float()
    x = x * mask[..., None]

    class DMM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emitter, self.trans, self.combiner = (
                _mlp(LATENT, 3),
                _mlp(LATENT, 2 * LATENT),
                nn.Linear(LATENT, 5),
            )
            self.readout, self.rnn = nn.Linear(5, 2 * LATENT), nn.RNN(3, 5, batch_first=True)
            self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(LATENT)), nn.Parameter(torch.zeros(LATENT))
            self.iafs = nn.ModuleList(
                T.affine_autoregressive(LATENT, hidden_dims=[4]) for _ in range(num_iafs)
            )

        def model(self, x, reversed_x, mask, lengths, annealing_factor=1.0):
            pyro.module("dmm", self)
            z = self.z_0.expand(len(x), LATENT)
            with pyro.plate("z_minibatch", len(x)):
                for t in pyro.markov(range(x.size(1))):
                    prior = _gaussian(self.trans(z)).base_dist
                    with poutine.scale(scale=annealing_factor):
                        z = pyro.sample(f"z_{t}", prior.mask(mask[:, t : t + 1].bool()).to_event(1))
                    emission = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t : t + 1].bool())
                    pyro.sample(f"x_{t}", emission.to_event(1), obs=x[:, t])

        def guide(self, x, reversed_x, mask, lengths, annealing_factor=1.0):
            pyro.module("dmm", self)
            h, _ = pad_packed_sequence(self.rnn(reversed_x)[0], batch_first=True, total_length=x.size(1))
            z = self.z_q_0.expand(len(x), LATENT)
            with pyro.plate("z_minibatch", len(x)):
                for t in pyro.markov(range(x.size(1))):
                    back = (lengths - 1 - t).clamp(min=0)
                    normal = _gaussian(
                        self.readout(self.combiner(z).tanh() + h[torch.arange(len(x)), back])
                    ).base_dist
                    q: Any = normal.mask(mask[:, t : t + 1].bool()).to_event(1)
                    if num_iafs:
                        q = dist.TransformedDistribution(normal, list(self.iafs)).mask(mask[:, t].bool())
                    with poutine.scale(scale=annealing_factor):
                        z = pyro.sample(f"z_{t}", q)

    net = DMM()
    return Example(net.model, net.guide, (x, _reversed(x, lengths), mask, lengths), Trace_ELBO())


def dmm_iaf() -> Example:
    """With an inverse autoregressive flow in the guide."""
    return dmm(num_iafs=1)


def _reversed(x: torch.Tensor, lengths: torch.Tensor) -> PackedSequence:
    turned = torch.stack(
        [torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(x, lengths.tolist(), strict=True)]
    )
    return pack_padded_sequence(turned, lengths, batch_first=True)


def flow_prior() -> Example:
    """The tutorial on flow priors: p(z) is a normal distribution under Pyro's transforms, registered in the
    model."""
    encoder, decoder = _mlp(16, 2 * LATENT), _mlp(LATENT, 16)
    flows = nn.ModuleList(T.affine_coupling(LATENT, hidden_dims=[4]) for _ in range(2))

    def model(x):
        pyro.module("decoder", decoder)
        pyro.module("flows", flows)
        base = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.TransformedDistribution(base, list(flows)))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", _gaussian(encoder(x)))

    return Example(model, guide, (_images().reshape(-1, 16),), Trace_ELBO())


def svi_part_i() -> Example:
    """The first tutorial on SVI: a coin, its tosses a list of tensors, each a site of its own."""
    data = [torch.tensor(float(i < 6)) for i in range(10)]

    def model(data):
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data):
        a = pyro.param("alpha_q", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("beta_q", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("latent_fairness", dist.Beta(a, b))

    return Example(model, guide, (data,), Trace_ELBO())


EXAMPLES: dict[str, Callable[[], Example]] = {
    f.__name__: f
    for f in (
        vae,
        vae_grey,
        ss_vae_unsupervised,
        ss_vae_supervised,
        ss_vae_classify,
        cvae,
        scanvi,
        scanvi_batch_norm,
        scanvi_unlabelled,
        prodlda,
        cevae,
        cevae_shared_name,
        lda,
        hmm_1,
        hmm_6,
        eight_schools,
        eight_schools_declared,
        dmm,
        dmm_iaf,
        flow_prior,
        svi_part_i,
    )
}


def build(name: str) -> Example:
    """The example with parameters that are the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EXAMPLES[name]()
