"""Graphs: what they compute is what the function computes, whatever product is used."""

import pytest
import torch

from pyro_vae.graphs import CannotTrace, trace_graph


def matrix(rows, columns, kind):
    if kind == "transposed":
        return torch.randn(columns, rows).T
    return torch.randn(rows, 2 * columns)[:, :columns] if kind == "cut out" else torch.randn(rows, columns)


@pytest.mark.parametrize("right", ["plain", "transposed", "cut out"])
@pytest.mark.parametrize("left", ["plain", "transposed", "cut out"])
def test_large_products_are_products(left, right):
    torch.manual_seed(0)
    a, b, bias = matrix(30, 400, left), matrix(400, 300, right), torch.randn(300)
    graph = trace_graph(lambda a, b, bias: (torch.addmm(bias, a, b), a @ b), [a, b, bias])
    expected = bias.double() + a.double() @ b.double()
    added, product = graph(a, b, bias)
    assert (added - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (product - (expected - bias)).abs().max() < 1e-5 * expected.abs().max()
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert graph.code.count("pyro_vae.product") == 2


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
def test_activations_of_large_products(name):
    torch.manual_seed(0)
    f = getattr(torch, name)
    a, b, bias = torch.randn(30, 400), 0.1 * torch.randn(400, 300), torch.randn(300)

    def both(a, b, bias):
        b = b.requires_grad_()
        y = f(torch.addmm(bias, a, b))
        return y, *torch.autograd.grad(y.sum(), b)

    graph = trace_graph(both, [a, b, bias])
    expected = both(a.double(), b.detach().double(), bias.double())
    for ours, exact in zip(graph(a, b.detach(), bias), expected, strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("kind", ["double", "small"])
def test_other_products_stay(kind):
    size = 300 if kind == "double" else 10
    a = torch.randn(size, size, dtype=torch.double if kind == "double" else torch.float)
    assert "pyro_vae.product" not in trace_graph(lambda a: (a @ a,), [a]).code


def test_what_python_reads_is_refused():
    with pytest.raises(CannotTrace, match=r"item\(\) takes the value out of a tensor at test_graphs"):
        trace_graph(lambda x: (x * x.sum().item(),), [torch.ones(3)])
