"""Passes change neither the results of a graph, nor where they are in memory, nor what is written."""

import pytest
import torch
import torch.nn.functional as F

from pyro_vae.compiler.trace import trace


def of_numbers(x):
    one, none = torch.ones_like(x), torch.zeros(3, 4, dtype=x.dtype)
    return one * x, x / one, x - none, none + x, none - x, -one / x, none * x, (2 * one).exp() * x, x**one, one.sum() + x


def of_other_shapes(x):
    row, column = torch.ones(1, 4, dtype=x.dtype), x.new_zeros(3, 1)
    return row * x[:, :1], column + x[:1], torch.ones((), dtype=x.dtype) * x, x[0] + torch.zeros_like(x), row.expand(3, 4) * x


def of_other_dtypes(x):
    single = torch.ones(3, 4)
    return single * x, x.float() * torch.ones_like(x), (x > 0) * single, (x > 0) + torch.zeros_like(x), single * 3, single / 3


def with_options(x):
    none = torch.zeros_like(x)
    return torch.add(x, none, alpha=2), torch.sub(none, x, alpha=3), torch.div(x, torch.ones_like(x), rounding_mode="floor")


def of_copies(x):
    turned = x.t().clone() * 1
    return torch.cat([x]) * 2, torch.cat([x.t()]) * 2, turned + turned.t().clone().t(), x.t().contiguous().sum(0)


def that_repeats(x):
    return x.sin() * x.sin() + (x * 1).sin() / (x.sin() + 0), x.t().sum(0) + x.t().sum(0), x.unsqueeze(0) + x.unsqueeze(0)


def that_writes(x):
    y, filled, other = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    before = y * 2
    y.add_(1)
    after = y * 2
    filled[0] = 1
    view = other.view(4, 3)
    view.fill_(3)
    kept = y * 1
    y.mul_(0)
    return before, after, filled * x, filled + 0, other * x, kept, y * 1


def that_writes_unsaid(x):
    """Where the schema of an operation does not say that it writes, or that its results are parts of what it is given."""
    copy, wave = x.clone(), x.sin()
    one, other = copy.unsafe_chunk(2, 1)
    part, _ = wave.unsafe_split(2, 1)
    one.add_(1)
    part.add_(1)
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    before = mean.clone()
    normed = F.batch_norm(x.cos(), mean, var, None, None, training=True)
    return one * 2, other * 2, x.sin() * 2, part * 1, normed * 1, (mean - before) * 1


def that_writes_to_out(x):
    y, out = x.exp(), torch.empty_like(x)
    view = out.view(-1)
    result = torch.mul(y, 2, out=out)
    before = result * 3
    copied = result.clone()
    view.add_(1)
    return before * 1, result * 3, copied * 2


def of_many_results(x):
    mantissa, exponent = torch.frexp(torch.ones_like(x) * 2)
    images = x.reshape(1, 3, 4)
    weight = torch.ones(2, 3, 2, dtype=x.dtype)
    norm = F.group_norm(images, 3).sum(), F.layer_norm(x, (4,)).sum()
    return mantissa * x, exponent * x, *norm, F.conv1d(images, weight).exp() * 1, x.max(0).values * 1, x.conj().sum()


def of_complex(x):
    z = torch.complex(x, x)
    return z.conj().clone().abs(), torch.view_as_real(z.conj() * 1), z * 1, z.conj().imag * 1


FUNCTIONS = [of_numbers, of_other_shapes, of_other_dtypes, with_options, of_copies, that_repeats, that_writes]
FUNCTIONS += [that_writes_unsaid, that_writes_to_out, of_many_results, of_complex]


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_same_numbers(f, caplog):
    caplog.set_level("DEBUG", logger="pyro_vae")
    x = torch.randn(3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x[0] = torch.tensor([0.0, torch.inf, torch.nan, -1.0])
    graph = trace(f, [x.clone()])
    given = x.clone()
    for ours, exact in zip(graph(given), f(x.clone()), strict=True):
        assert (ours.dtype, ours.stride()) == (exact.dtype, exact.stride())
        assert torch.allclose(ours, exact, rtol=1e-15, atol=0, equal_nan=True)
    assert torch.equal(given.nan_to_num(), x.nan_to_num())
    assert "without passes" not in caplog.text


def test_results_are_the_callers_own():
    p = torch.randn(3, 4)

    def f(x):
        y = x.exp()
        return x * 1, x + 0, p / 1, p.clone(), y, y * 1, (y - 0).view(4, 3), torch.cat([y])

    found = trace(f, [torch.randn(3, 4)])(x := torch.randn(3, 4))
    places = [part.data_ptr() for part in (x, p, *found)]
    assert len(set(places)) == len(places)


def test_what_was_there_before_is_read_when_it_is_read():
    """Two names of one memory: what is written by the first is another at the second."""
    kept = torch.ones(3)
    other = kept[:2]

    def f(x):
        before = other * 2
        kept.add_(x)
        return before, other * 2, other * 1 + before

    graph = trace(f, [torch.zeros(3)])
    kept.fill_(1.0)
    before, after, total = graph(torch.ones(3))
    assert [part.tolist() for part in (before, after, total)] == [[2, 2], [4, 4], [4, 4]]


def test_noise_is_drawn_each_time_it_is_drawn():
    def f(x):
        a, b = torch.randn_like(x), torch.randn_like(x)
        return a * 1 - b * 1, torch.bernoulli(0.5 * torch.ones_like(x)) + 0, torch.dropout(torch.ones_like(x), 0.5, True) * 1

    graph = trace(f, [torch.zeros(1000)])
    difference, coin, dropped = graph(torch.zeros(1000))
    assert abs(difference.var() - 2) < 5 * (8 / 1000) ** 0.5  # five standard errors
    assert abs(coin.mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert set(dropped.tolist()) == {0.0, 2.0}


def test_tensors_are_held_as_they_are():
    """What is looked up once is the tensor, not its numbers."""
    p = torch.nn.Parameter(torch.ones(3))
    graph = trace(lambda x: (x * p,), [torch.ones(3)])
    with torch.no_grad():
        p.mul_(2)
        assert graph(torch.ones(3))[0].tolist() == [2, 2, 2]
        p.data = torch.full((3,), 5.0)
        assert graph(torch.ones(3))[0].tolist() == [5, 5, 5]


def test_a_copy_of_statistics_is_a_copy():
    mean, var, weight = torch.zeros(6), torch.ones(6), torch.ones(6)

    def f(x):
        before = mean.clone()
        y = F.batch_norm(x, mean, var, weight, weight * 0, training=True)
        return y * 1, (mean - before) * 1

    graph = trace(f, [torch.randn(4, 6)])
    mean.zero_()
    x = torch.randn(4, 6)
    assert torch.allclose(graph(x)[1], 0.1 * x.mean(0), atol=1e-6)


def test_operations_of_like_names_are_told_apart():
    def made(name, number):
        def add(x: torch.Tensor) -> torch.Tensor:
            return x + number

        op = torch.library.custom_op(name, add, mutates_args=())
        op.register_fake(torch.empty_like)
        return op

    one, other = made("one::of_both", 10), made("one_of::both", 20)
    graph = trace(lambda x: (one(x) * 1, other(x) * 1), [torch.zeros(3)])
    assert [part.tolist() for part in graph(torch.zeros(3))] == [[10] * 3, [20] * 3]
