"""A graph, plain or compiled, returns the results of its function; what cannot be traced is refused."""

import pytest
import torch
import torch.nn.functional as F

from pyro_vae.compiler import CannotTrace, has_compiler
from pyro_vae.compiler.trace import trace

HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith(
    "AVX512"
)
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


def writes(x):
    y, filled, other = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    before = y * 2
    y.add_(1)
    after = y * 2
    filled[0] = 1
    view = other.view(4, 3)
    view.fill_(3)
    copy = y * 1
    y.mul_(0)
    return before, after, filled * x, filled + 0, other * x, copy, y * 1


def writes_that_no_schema_states(x):
    """Results that are views of the arguments, and running statistics."""
    y, z = x.clone(), x.sin()
    left, right = y.unsafe_chunk(2, 1)
    part, _ = z.unsafe_split(2, 1)
    left.add_(1)
    part.add_(1)
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    before = mean.clone()
    F.batch_norm(x.cos(), mean, var, None, None, training=True)
    return left * 2, right * 2, x.sin() * 2, part * 1, mean - before


def returns_several(x):
    mantissa, exponent = torch.frexp(torch.ones_like(x) * 2)
    images = x.reshape(1, 3, 4)
    norms = F.group_norm(images, 3).sum(), F.layer_norm(x, (4,)).sum()
    return mantissa * x, exponent * x, *norms, x.max(0).values * 1, x.conj().sum()


@pytest.mark.parametrize("f", [writes, writes_that_no_schema_states, returns_several])
def test_values_dtypes_and_strides_equal_those_of_the_function(f):
    x = torch.randn(3, 4, dtype=torch.double)
    x[0] = torch.tensor([0.0, torch.inf, torch.nan, -1.0])
    argument = x.clone()
    for ours, exact in zip(trace(f, [x.clone()])(argument), f(x.clone()), strict=True):
        assert (ours.dtype, ours.stride()) == (exact.dtype, exact.stride())
        assert torch.allclose(ours, exact, rtol=1e-15, atol=0, equal_nan=True)
    assert torch.equal(argument.nan_to_num(), x.nan_to_num())


def test_noise_is_new_at_each_draw():
    def f(x):
        a, b, ones = torch.randn_like(x), torch.randn_like(x), torch.ones_like(x)
        return a - b, torch.bernoulli(0.5 * ones), torch.dropout(ones, 0.5, True)

    difference, coin, dropped = trace(f, [torch.zeros(1000)])(torch.zeros(1000))
    assert abs(difference.var() - 2) < 5 * (8 / 1000) ** 0.5  # five standard errors
    assert abs(coin.mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert set(dropped.tolist()) == {0.0, 2.0}


def test_captured_tensors_are_read_at_each_call():
    p = torch.nn.Parameter(torch.ones(3))
    graph = trace(lambda x: (x * p,), [torch.ones(3)])
    with torch.no_grad():
        p.mul_(2)
        assert graph(torch.ones(3))[0].tolist() == [2, 2, 2]
        p.data = torch.full((3,), 5.0)
        assert graph(torch.ones(3))[0].tolist() == [5, 5, 5]


def matrix(rows, columns, kind):
    if kind == "transposed":
        return torch.randn(columns, rows).T
    return torch.randn(rows, 2 * columns)[:, :columns] if kind == "sliced" else torch.randn(rows, columns)


@pytest.mark.parametrize("right", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("left", ["contiguous", "transposed", "sliced"])
def test_large_products_by_onednn_are_exact_to_rounding(left, right):
    """Also in a graph that writes to the result of a product."""
    a, b, bias = matrix(30, 400, left), matrix(400, 300, right), torch.randn(300)
    graph = trace(lambda a, b, bias: (torch.addmm(bias, a, b).mul_(2), a @ b), [a, b, bias])
    product = a.double() @ b.double()
    for ours, exact in zip(graph(a, b, bias), (2 * (bias.double() + product), product), strict=True):
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    if HAS_ONEDNN:
        assert graph.module.code.count("pyro_vae.linear") == 2


@pytest.mark.parametrize(("size", "dtype"), [(300, torch.double), (10, torch.float)])
def test_double_and_small_products_do_not_use_onednn(size, dtype):
    a = torch.randn(size, size, dtype=dtype)
    assert "pyro_vae.linear" not in trace(lambda a: (a @ a,), [a]).module.code


def test_dead_code_is_eliminated_but_writes_and_noise_stay():
    mean, var = torch.zeros(4), torch.ones(4)

    def f(x):
        x.exp()
        torch.rand(3)
        F.batch_norm(x, mean, var, training=True)
        return (torch.rand(3),)

    x = torch.randn(5, 4)
    graph = trace(f, [x])
    assert "exp" not in graph.module.code
    mean.zero_()
    torch.manual_seed(1)
    (noise,) = graph(x)
    torch.testing.assert_close(mean, 0.1 * x.mean(0))
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(noise, torch.rand(3))


@pytest.mark.parametrize("filename", ["<stdin>", "pair.py"])
def test_a_read_of_a_value_is_refused_with_its_line(filename):
    """Also at Python's prompt, where the line has no source text."""
    code = compile("def f(x):\n    return (x * x.sum().item(),)", filename, "exec")
    namespace = {}
    exec(code, namespace)
    with pytest.raises(CannotTrace, match=rf"item\(\) reads the value of a tensor at {filename}:2$"):
        trace(namespace["f"], [torch.ones(3)])


def writes_a_captured_tensor(x, weight, average):
    average.mul_(0.9).add_(x.mean(0))
    return x @ weight, average.sum()


def returns_its_input(x, weight, average):
    return x, x[1:], x @ weight, weight.t()


def returns_an_output_twice(x, weight, average):
    y = x @ weight
    return y, y, y[:1], y.t()


def draws_noise(x, weight, average):
    return torch.randn_like(x) @ weight, average + torch.rand(3)


@needs_compiler
@pytest.mark.parametrize(
    "f", [writes_a_captured_tensor, returns_its_input, returns_an_output_twice, draws_noise]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_graph_returns_and_writes_what_the_function_does(f, autocast):
    x, weight, average = torch.randn(5, 3), torch.nn.Parameter(torch.randn(3, 3)), torch.zeros(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        run = trace(lambda x: f(x, weight, average), [x]).compiled([x])
        for argument in (x, torch.randn(5, 3)):
            weight.mul_(1.1)
            expected_average = average.clone()
            torch.manual_seed(1)
            outputs = run(argument)
            torch.manual_seed(1)
            for ours, exact in zip(outputs, f(argument, weight, expected_average), strict=True):
                torch.testing.assert_close(ours, exact)
            torch.testing.assert_close(average, expected_average)
