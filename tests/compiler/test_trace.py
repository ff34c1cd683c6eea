"""A graph computes what the function computes, with oneDNN and Inductor too; what cannot be one is refused."""

import pytest
import torch

from pyro_vae.compiler import CannotTrace, has_compiler
from pyro_vae.compiler.trace import trace


def matrix(rows, columns, kind):
    if kind == "transposed":
        return torch.randn(columns, rows).T
    return torch.randn(rows, 2 * columns)[:, :columns] if kind == "cut out" else torch.randn(rows, columns)


@pytest.mark.parametrize("right", ["plain", "transposed", "cut out"])
@pytest.mark.parametrize("left", ["plain", "transposed", "cut out"])
def test_large_products_are_products(left, right):
    torch.manual_seed(0)
    a, b, bias = matrix(30, 400, left), matrix(400, 300, right), torch.randn(300)
    graph = trace(lambda a, b, bias: (torch.addmm(bias, a, b), a @ b), [a, b, bias])
    expected = bias.double() + a.double() @ b.double()
    added, product = graph(a, b, bias)
    assert (added - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (product - (expected - bias)).abs().max() < 1e-5 * expected.abs().max()
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert graph.module.code.count("pyro_vae.linear") == 2


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
def test_activations_of_large_products(name):
    torch.manual_seed(0)
    f = getattr(torch, name)
    a, b, bias = torch.randn(30, 400), 0.1 * torch.randn(400, 300), torch.randn(300)

    def both(a, b, bias):
        b = b.requires_grad_()
        y = f(torch.addmm(bias, a, b))
        return y, *torch.autograd.grad(y.sum(), b)

    graph = trace(both, [a, b, bias])
    expected = both(a.double(), b.detach().double(), bias.double())
    for ours, exact in zip(graph(a, b.detach(), bias), expected, strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.mark.parametrize("kind", ["double", "small"])
def test_other_products_stay(kind):
    size = 300 if kind == "double" else 10
    a = torch.randn(size, size, dtype=torch.double if kind == "double" else torch.float)
    assert "pyro_vae.linear" not in trace(lambda a: (a @ a,), [a]).module.code


def test_a_line_without_a_source_is_named():
    """As of a pair that is typed at Python's prompt."""
    typed = {}
    exec(compile("def f(x):\n    return (x * x.sum().item(),)", "<stdin>", "exec"), typed)
    with pytest.raises(CannotTrace, match=r"at <stdin>:2$"):
        trace(typed["f"], [torch.ones(3)])


def test_what_python_reads_is_refused():
    with pytest.raises(CannotTrace, match=r"item\(\) reads the value of a tensor at test_trace"):
        trace(lambda x: (x * x.sum().item(),), [torch.ones(3)])


def written(x, weight, average):
    average.mul_(0.9).add_(x.mean(0))
    return x @ weight, average.sum()


def given_back(x, weight, average):
    return x, x[1:], x @ weight, weight.t()


def said_twice(x, weight, average):
    y = x @ weight
    return y, y, y[:1], y.t()


def of_noise(x, weight, average):
    return torch.randn_like(x) @ weight, average + torch.rand(3)


@pytest.mark.parametrize("f", [written, given_back, said_twice, of_noise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["single", "autocast"])
def test_compiled_is_what_the_function_is(f, autocast):
    """Whatever torch would have to do around what Inductor compiles: numbers, shapes, and what is written to."""
    torch.manual_seed(0)
    x, weight, average = torch.randn(5, 3), torch.nn.Parameter(torch.randn(3, 3)), torch.zeros(3)
    other = torch.randn(5, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        run = trace(lambda x: f(x, weight, average), [x]).compiled([x])
        for data in (x, other):
            weight.mul_(1.1)  # it is the graph's own, live
            twin = average.clone()
            torch.manual_seed(1)
            found = run(data)
            torch.manual_seed(1)
            for ours, exact in zip(found, f(data, weight, twin), strict=True):
                torch.testing.assert_close(ours, exact)
            torch.testing.assert_close(average, twin)
