"""Rows of the data that depend on each other: what is per datum, or for a minibatch, is refused; what is
joint is right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoLaplaceApproximation, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import pyro_vae as pv
from pyro_vae import evidence
from pyro_vae.data.batches import as_batches
from pyro_vae.diagnostics import latent_usage, posterior_draws
from pyro_vae.pairs.log_weights import joint_log_weights

X = torch.tensor([1.0, 2.0, 3.0, 3.5])


def make_model(mix):
    """x ~ N(mix(z), 1), z ~ N(0, 1) for each row."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(mix(z), 1.0), obs=x)

    return model


def make_guide():
    """z ~ N(a x, 1), a new function at each call, since a fit marks those that it trained."""

    def guide(x):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 1.0))

    return guide


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def log_evidence(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


MIXES = {
    "random walk": lambda z: z.cumsum(-1),
    "random walk from the end": lambda z: z.flip(-1).cumsum(-1).flip(-1),
    "mean": lambda z: z + z.mean(-1, keepdim=True),
    "pairs": lambda z: (
        z + z.reshape(*z.shape[:-1], -1, 2).flip(-1).reshape(z.shape) if z.shape[-1] % 2 == 0 else z
    ),
    "one draw at a time": lambda z: z + z.sum() if z.dim() == 1 else 1 / 0,
}
VERBS = {
    "log_weights": lambda model, x: pv.log_weights(model, make_guide(), x),
    "importance": lambda model, x: evidence.importance(model, make_guide(), x, num_particles=10),
    "elbo": lambda model, x: evidence.elbo(model, make_guide(), x),
    "prior_monte_carlo": lambda model, x: evidence.prior_monte_carlo(model, x, num_particles=10),
    "ais": lambda model, x: evidence.ais(
        model, x, annealing=evidence.Annealing(num_chains=2, num_temperatures=3)
    ),
    "diagnose": lambda model, x: pv.diagnose(model, make_guide(), x),
    "posterior_draws": lambda model, x: posterior_draws(model, make_guide(), x),
    "latent_usage": lambda model, x: latent_usage(model, make_guide(), x),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mix", MIXES)
def test_latents_that_other_rows_depend_on_leave_no_evidence_per_datum(mix, verb):
    with pytest.raises(ValueError, match=r"when the latents of another row are replaced.*joint=True"):
        VERBS[verb](make_model(MIXES[mix]), X)


def test_the_joint_evidence_of_a_random_walk():
    covariance = torch.ones(4, 4).tril() @ torch.ones(4, 4).tril().T + torch.eye(4)
    truth = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(X)

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8, 1.0).expand([len(x)]))

    found = evidence.importance(make_model(MIXES["random walk"]), wide, X, num_particles=50_000, joint=True)
    assert abs(float(found.log_evidence) - truth) < 4 * float(found.log_evidence_se)


@pytest.mark.parametrize("mix", ["random walk", "random walk from the end", "mean"])
def test_rows_that_depend_on_each_other_are_taken_all_at_once(mix):
    model = make_model(MIXES[mix])
    for verb in (
        lambda: pv.fit(model, make_guide(), X, batch_size=2, num_epochs=1, progress=False),
        lambda: pv.evaluate(model, make_guide(), X, batch_size=2),
    ):
        with pytest.raises(ValueError, match=r"minibatches of 2 of the 4 data.*batch_size=None"):
            verb()
    pv.fit(model, make_guide(), X, batch_size=None, num_epochs=1, progress=False)
    # x = M z + noise under q(z|x) = N(x/2, 1)
    m = MIXES[mix](torch.eye(4)).T
    likelihood = -0.5 * (4 * math.log(2 * math.pi) + ((X - m @ X / 2) ** 2).sum() + m.square().sum())
    elbo = likelihood - (X / 2).square().sum() / 2
    draws = joint_log_weights(model, make_guide(), X, num_particles=2000).log_weights
    assert (draws.mean() - elbo).abs() < 4 * draws.std() / 2000**0.5
    found = pv.evaluate(model, make_guide(), X, batch_size=None, num_particles=2000)
    assert (found.elbo.sum() - elbo).abs() < 4 * draws.std() / 2000**0.5


def by_position(x):
    loc = pyro.param("loc", torch.zeros(4))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[: len(x)], 1.0))


def by_batch_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * (x - x.mean()), 1.0))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.loc[: len(x)]


def by_module(x, table=Table()):  # noqa: B008
    pyro.module("table", table)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(table(x), 1.0))


@pytest.mark.parametrize("of_position", [by_position, by_batch_mean, by_module])
def test_terms_that_follow_the_other_rows_of_a_minibatch_are_refused_in_training(of_position):
    """Also where all entries of a table of parameters start equal."""
    model = make_model(lambda z: z)
    with pytest.raises(ValueError, match="change when other rows are left out"):
        pv.fit(model, of_position, X, batch_size=2, num_epochs=1, progress=False)
    with pyro.get_param_store().scope():
        pv.fit(model, of_position, X, batch_size=None, num_epochs=1, progress=False)


def test_to_look_at_rows_moves_no_parameter():
    table = Table()
    before = table.loc.detach().clone()
    with pytest.raises(ValueError, match="left out"):
        pv.fit(
            make_model(lambda z: z),
            lambda x: by_module(x, table),
            X,
            batch_size=2,
            num_epochs=1,
            progress=False,
        )
    assert torch.equal(table.loc, before)
    assert not pyro.get_param_store().keys()


def test_a_shared_prior_that_depends_on_the_size_of_the_batch_is_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0 / len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))

    for verb in (
        lambda: pv.fit(model, guide, X, batch_size=2, num_epochs=1, progress=False),
        lambda: pv.evaluate(model, guide, X, batch_size=2),
    ):
        with pytest.raises(ValueError, match=r"len\(x\)"):
            verb()


def test_a_table_indexed_by_a_column_of_the_data_divides():
    def model(x, i):
        make_model(lambda z: z)(x)

    def guide(x, i):
        loc = pyro.param("loc", torch.zeros(4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[i], 0.5**0.5))

    optim = pyro.optim.SGD({"lr": 0.05})
    history = pv.fit(
        model, guide, (X, torch.arange(4)), batch_size=2, num_epochs=200, optim=optim, progress=False
    )
    with history.scope():  # each entry goes to the posterior mean of its own row
        torch.testing.assert_close(pyro.param("loc").detach(), X / 2, atol=0.25, rtol=0)


def test_batch_normalization_is_trained_in_minibatches():
    """It couples the rows in training on purpose, and not in evaluation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 1.0))

    with pyro.get_param_store().scope():
        pv.fit(make_model(lambda z: z), guide, torch.randn(20), batch_size=5, num_epochs=1, progress=False)
        assert (
            pv.evaluate(make_model(lambda z: z), guide, torch.randn(20), batch_size=5).elbo.isfinite().all()
        )


def test_noise_of_its_own_is_not_taken_for_other_rows():
    def model(x):
        x = x + 0.01 * torch.rand_like(x)
        make_model(lambda z: z)(x)

    assert pv.evaluate(model, make_guide(), X, batch_size=2).elbo.isfinite().all()
    assert pv.log_weights(model, make_guide(), X).isfinite().all()


def test_a_site_in_two_plates_of_the_datas_size_has_no_evidence_per_datum():
    """The pair runs on these rows alone, so which of the plates are the data is not known."""
    x = torch.randn(3, 3)

    def model(x):
        with pyro.plate("features", 3, dim=-2), pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, 3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", 3, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.raises(ValueError, match="which both have 3 rows"):
        pv.log_weights(model, guide, x)
    found = evidence.importance(model, guide, x, joint=True)
    torch.testing.assert_close(float(found.log_evidence), dist.Normal(0.0, 2**0.5).log_prob(x).sum().item())


def test_data_plates_may_have_other_names_in_model_and_guide():
    def other(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / pyro.param("two", torch.tensor(2.0)), 0.5**0.5))

    model, truth = make_model(lambda z: z), log_evidence(X)
    torch.testing.assert_close(pv.log_weights(model, other, X, num_particles=3), truth.expand(3, 4))
    torch.testing.assert_close(pv.evaluate(model, other, X).elbo, truth)
    assert not pv.check_pair(model, other, X).problems


def test_a_masked_site_outside_the_data_plate_has_no_part_in_the_evidence():
    def model(x):
        make_model(lambda z: z)(x)
        with poutine.mask(mask=False):
            pyro.sample("s", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    w = pv.log_weights(model, exact_guide, X)
    torch.testing.assert_close(w[0], log_evidence(X))


def test_points_beside_auxiliary_sites_of_something_else_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def mixed(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(len(x)), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))
            pyro.sample("w", dist.Delta(torch.zeros(len(x))))

    for verb in (pv.evaluate, pv.log_weights, lambda *args: pv.fit(*args, num_epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"'w' is a point .* not computed from the auxiliary site 'u'"):
            verb(model, mixed, X)


@pytest.mark.parametrize("autoguide", [AutoDiagonalNormal, AutoNormal])
def test_autoguides_and_their_lists_have_points_of_their_own_auxiliary_sites(autoguide):
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, b), obs=x)

    both = AutoGuideList(model)
    both.append(autoguide(poutine.block(model, expose=["a"])))
    both.append(autoguide(poutine.block(model, expose=["b"])))
    for guide in (autoguide(model), both):
        with pyro.get_param_store().scope():
            assert joint_log_weights(model, guide, X, num_particles=3).log_weights.isfinite().all()


def test_a_site_that_the_model_sums_out_needs_a_loss_that_does():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(4 * k, 1.0), obs=x)

    def guide(x):
        pass

    with pytest.raises(ValueError, match=r"'k' out.*TraceEnum_ELBO"):
        pv.evaluate(model, guide, X)
    mixture = [math.log(p) + dist.Normal(loc, 1.0).log_prob(X) for p, loc in ((0.7, 0.0), (0.3, 4.0))]
    found = pv.evaluate(model, guide, X, loss=TraceEnum_ELBO(max_plate_nesting=1))
    torch.testing.assert_close(found.elbo.sum(), torch.logaddexp(*mixture).sum())


def test_weights_of_the_data_are_said_to_be_left_out(caplog):
    def weighted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with poutine.scale(scale=torch.tensor([1.0, 2.0, 1.0, 1.0])[: len(x)]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = pv.evaluate(weighted, exact_guide, X)
    torch.testing.assert_close(found.elbo, log_evidence(X))
    assert "the weights of 'x' in the model" in caplog.text


def test_a_misspelt_optional_argument_is_said_to_be_left_out(caplog):
    def model(x, weights=None):
        make_model(lambda z: z)(x)

    def guide(x, weights=None):
        exact_guide(x)

    pv.log_weights(model, guide, {"x": X, "weight": torch.ones(4), "label": torch.ones(4)})
    assert "takes 'weight', so it is left out; they take 'weights'" in caplog.text
    assert "label" not in caplog.text


@pytest.mark.parametrize(
    "collate", [lambda items: torch.cat([i[0] for i in items]), lambda items: items[0][0][:1]]
)
def test_a_collate_function_that_gives_other_than_one_row_per_item_is_refused(collate):
    data = TensorDataset(torch.randn(6, 3))
    with pytest.raises(ValueError, match="2 items of its data set"):
        list(as_batches(DataLoader(data, batch_size=2, collate_fn=collate), None).epoch(shuffle=True))


@pytest.mark.parametrize("num_samples", [4, 10, 25])
def test_samplers_with_replacement_count_the_data_set(num_samples):
    data = TensorDataset(torch.randn(10, 3))
    batches = as_batches(
        DataLoader(data, 2, sampler=WeightedRandomSampler(torch.ones(10), num_samples)), None
    )
    assert batches.num_rows == 10
    assert sum(batch.num_rows for batch in batches.epoch(shuffle=True)) == num_samples


def lag(k):
    return lambda z: z + nn.functional.pad(z, (k, 0))[..., : z.shape[-1]]


@pytest.mark.parametrize(("k", "n"), [(1, 6), (2, 6), (3, 6), (4, 6), (1, 40), (3, 40), (7, 40), (20, 40)])
def test_rows_that_depend_on_rows_at_a_distance_are_found(k, n):
    with pytest.raises(ValueError, match="latents of another row"):
        pv.log_weights(make_model(lag(k)), make_guide(), torch.randn(n))


def with_columns(mix):
    """A pair whose rows depend on other arguments with a row for each datum."""

    def model(x, column):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(mix(z, column), 1.0), obs=x)

    def guide(x, column):
        exact_guide(x)

    return model, guide


def group_mean(z, group):
    same = (group[:, None] == group).float()
    return (z.unsqueeze(-2) * same).sum(-1) / same.sum(-1)


COLUMNS = {
    "groups": (group_mean, torch.tensor([0, 0, 1, 1, 1, 0])),
    "neighbours by index": (lambda z, neighbour: z + z[..., neighbour], torch.tensor([1, 2, 3, 4, 5, 0])),
    "adjacency": (lambda z, a: z @ a.T, torch.eye(6) + torch.eye(6).flip(0)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_coupled_by_a_column_of_the_data_are_found(name):
    mix, column = COLUMNS[name]
    model, guide = with_columns(mix)
    x = torch.randn(6)
    with pytest.raises(ValueError, match="latents of another row"):
        pv.log_weights(model, guide, (x, column))
    assert (
        evidence.importance(model, guide, (x, column), joint=True, num_particles=5)
        .log_evidence.isfinite()
        .all()
    )


def test_a_scalar_tensor_among_the_arguments_does_not_switch_the_checks_off():
    def model(x, beta):
        make_model(lambda z: z)(x)

    def by_mean(x, beta):
        by_batch_mean(x)

    options = {"batch_size": 2, "num_epochs": 1, "progress": False}
    with pytest.raises(ValueError, match="other rows are left out"):
        pv.fit(model, by_mean, (X, torch.tensor(0.5)), **options)

    net = nn.Linear(1, 4)  # of as many entries as a minibatch has rows

    def by_network(x, beta):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).mean(-1), 1.0))

    pv.fit(model, by_network, (torch.randn(16), torch.tensor(0.5)), **(options | {"batch_size": 4}))


def planar_guide(condition=lambda x: x):
    transform = dist.transforms.Planar(1)

    def guide(x):
        pyro.module("transform", transform)
        with pyro.plate("data", len(x)):
            base = dist.Normal(0.5 * condition(x).unsqueeze(-1), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return guide


def test_the_model_is_tested_where_the_guide_knows_its_own_draws_only():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0].cumsum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match="latents of another row"):
        pv.log_weights(model, planar_guide(), X)
    with pytest.raises(ValueError, match="other rows are left out"):
        pv.evaluate(model, planar_guide(), X, batch_size=2)

    def points(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    with pytest.raises(ValueError, match="latents of another row"):
        pv.log_weights(make_model(MIXES["random walk"]), points, X)


def test_noise_outside_of_sites_does_not_hide_coupled_rows():
    def model(x):
        noise = 1e-3 * torch.rand(())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.cumsum(-1) + noise, 1.0), obs=x)

    with pytest.raises(ValueError, match="latents of another row"):
        pv.log_weights(model, make_guide(), X)


def test_a_last_row_of_its_own_kind_is_found():
    def model(x):
        scale = torch.ones(len(x)).index_fill(0, torch.tensor(len(x) - 1), 0.1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    with pytest.raises(ValueError, match="other rows are left out"):
        pv.evaluate(model, exact_guide, torch.randn(40), batch_size=5)


class PositiveTable(Table):
    """With a positive parameter near 0, which noise must not make negative."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.01))


def test_noise_on_parameters_keeps_positive_ones_positive():
    table = PositiveTable()

    def guide(x):
        pyro.module("table", table)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table(x), table.scale.min()))

    with pytest.raises(ValueError, match="other rows are left out"):
        pv.fit(make_model(lambda z: z), guide, X, batch_size=2, num_epochs=1, progress=False)


def test_transforms_with_buffers_run_in_evaluation_mode_and_are_restored():
    norm = dist.transforms.BatchNorm(3)
    x = 3 * torch.randn(60, 3) + 1

    def model(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1e-4))
            base = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [norm]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1e-4))

    whole, part = (pv.log_weights(model, guide, rows)[0, :3] for rows in (x, x[:10]))
    torch.testing.assert_close(whole, part, rtol=0, atol=0.02)  # z has a deviation of 1e-4
    pv.evaluate(model, guide, x)
    assert torch.equal(norm.moving_mean, torch.zeros(3))
    assert norm.training


def test_a_mask_of_one_side_is_refused():
    keep = torch.arange(4) % 2 == 0

    def masked(program):
        def run(x):
            with poutine.mask(mask=keep[: len(x)]):
                program(x)

        return run

    model = make_model(lambda z: z)
    for pair in ((masked(model), exact_guide), (model, masked(exact_guide))):
        with pytest.raises(ValueError, match="'z' is masked differently"):
            evidence.importance(*pair, X)
    torch.testing.assert_close(
        pv.log_weights(masked(model), masked(exact_guide), X)[0], log_evidence(X) * keep.float()
    )


def ragged_pair():
    """One series for each row, of its own length: sites up to the longest series of the batch."""

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for i in range(int(lengths.max())):
                with poutine.mask(mask=i < lengths):
                    z = pyro.sample(f"z{i}", dist.Normal(0.5 * z, 1.0))
                    pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            for i in range(int(lengths.max())):
                with poutine.mask(mask=i < lengths):
                    pyro.sample(f"z{i}", dist.Normal(0.5 * x[:, i], 0.8))

    return model, guide


@pytest.mark.parametrize("descending", [False, True])
def test_series_of_different_lengths(descending):
    """log p(x) of a row depends on its own entries only: x = A z + noise."""
    lengths = torch.tensor([5, 3, 4, 2, 5, 1, 3, 2, 2, 2]).sort(descending=descending).values
    x = torch.randn(10, 5)
    model, guide = ragged_pair()
    found = evidence.importance(model, guide, (x, lengths), num_particles=20_000)
    mixing = torch.tensor([[0.5 ** (i - j) if j <= i else 0.0 for j in range(5)] for i in range(5)])
    covariance = mixing @ mixing.T + torch.eye(5)
    truth = torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(n), covariance[:n, :n]).log_prob(row[:n])
            for row, n in zip(x, lengths.tolist(), strict=True)
        ]
    )
    assert ((found.log_evidence - truth).abs() < 4 * found.log_evidence_se + 1e-6).all()
    assert pv.evaluate(model, guide, (x, lengths), batch_size=4).elbo.isfinite().all()


def test_rounding_of_networks_on_batches_of_other_sizes_is_not_taken_for_dependence():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    c = torch.randn(600, 10)
    with torch.no_grad():
        net[-1].weight *= 100
        y = net(c)
    y = y + 1e-3 * torch.randn_like(y)

    def model(c, y):
        pyro.module("net", net)
        with pyro.plate("data", len(c)):
            pyro.sample("y", dist.Normal(net(c), 1e-3).to_event(1), obs=y)

    assert pv.evaluate(model, lambda c, y: None, (c, y), batch_size=100).elbo.isfinite().all()


def test_the_laplace_approximation_is_trained():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    guide = AutoLaplaceApproximation(model)
    optim = pyro.optim.Adam({"lr": 0.1})
    with pyro.get_param_store().scope():
        history = pv.fit(model, guide, X, num_epochs=200, batch_size=None, optim=optim, progress=False)
        with history.scope():
            torch.testing.assert_close(guide.loc.detach(), X.sum().reshape(1) / 5, rtol=0, atol=1e-3)


def test_points_per_datum_are_said_to_have_no_density(caplog):
    def points(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    model = make_model(lambda z: z)
    w = pv.log_weights(model, points, X)
    torch.testing.assert_close(w[0], dist.Normal(0.0, 1.0).log_prob(X / 2) * 2)
    assert "points (Delta), which have no density" in caplog.text
    assert "has Delta distributions, which have no density" in str(
        pv.diagnose(model, points, X, num_simulations=0)
    )


def test_a_pair_that_fails_with_noise_on_its_parameters_is_tested_without_noise(caplog):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        if 0 < abs(loc) < 0.05:
            raise ValueError("a forbidden value")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), 1.0))

    caplog.set_level("INFO", "pyro_vae")
    adam = pyro.optim.Adam({"lr": 0.2})
    history = pv.fit(model, guide, torch.randn(20) + 3, optim=adam, num_epochs=1, batch_size=10)
    assert len(history.epochs) == 1
    assert any("without noise on the parameters" in message for message in caplog.messages)
