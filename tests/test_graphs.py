"""Graphs: what they compute is what the function computes, whatever product is used."""

import pytest
import torch

from pyro_vae.graphs import CannotTrace, compiled, has_compiler, trace_graph


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


compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
SIDES = [(1, 1, 1), (1, 700, 65), (3, 5, 130), (20, 40, 50), (40, 513, 7), (65, 1, 64), (129, 1100, 31), (200, 17, 200)]
LAYOUTS = [("plain", "plain"), ("plain", "transposed"), ("transposed", "plain"), ("cut out", "cut out")]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiler
@pytest.mark.parametrize("layouts", LAYOUTS, ids="·".join)
def test_compiled_products_of_all_sizes(layouts, set_threads):
    """Tiles that are cut short, sums in parts, and sides of one, shared out among threads."""
    torch.manual_seed(0)
    left, right = layouts
    given = [part for m, k, n in SIDES for part in (matrix(m, k, left), matrix(k, n, right), torch.randn(n))]

    def products(*given):
        triples = [given[i : i + 3] for i in range(0, len(given), 3)]
        return *(a @ b for a, b, _ in triples), *(torch.addmm(bias, a, b) for a, b, bias in triples)

    run = compiled(trace_graph(products, given), given)
    exact = products(*(part.double() for part in given))
    scales = products(*(part.double().abs() for part in given))
    for threads in (1, 2, 3):
        set_threads(threads)
        for ours, truth, scale in zip(run(*given), exact, scales, strict=True):
            assert ours.shape == truth.shape
            assert ((ours - truth).abs() <= 1e-6 * scale).all()  # rounding errors, at worst


@compiler
@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
def test_compiled_activations(name):
    """To some last bits of a single-precision number, large, small, zero or not finite."""
    f = getattr(torch, name)
    numbers = torch.cat([torch.linspace(-12, 12, 2001), torch.logspace(-30, 30, 2001), -torch.logspace(-30, 30, 2001)])
    numbers = torch.cat([numbers, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])

    def both(x, bias):
        return f(x @ torch.ones(1, 1)), f(torch.addmm(bias, torch.zeros(3, 1), torch.ones(1, len(numbers))))

    given = numbers[:, None], numbers
    found = compiled(trace_graph(both, list(given)), given)(*given)
    exact = f(numbers.double())
    eps = torch.finfo(torch.float).eps
    for ours in (found[0].flatten(), *found[1]):
        torch.testing.assert_close(ours.double(), exact, rtol=5 * eps, atol=1e-37, equal_nan=True)
        assert name == "relu" or ours[:-1].abs().max() <= 1


@compiler
def test_compiled_products_of_parts_of_one_tensor():
    torch.manual_seed(0)
    x = torch.randn(8, 6, 6)

    def products(x):
        return x[0] @ x[0], x[1] @ x[2].T, torch.addmm(x[3, 1], x[3], x[4]), x[5:].reshape(-1, 6) @ x[6], x[:0, 0] @ x[1]

    for ours, exact in zip(compiled(trace_graph(products, [x]), [x])(x), products(x.double()), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["double", "small"])
def test_other_products_stay(kind):
    size = 300 if kind == "double" else 10
    a = torch.randn(size, size, dtype=torch.double if kind == "double" else torch.float)
    assert "pyro_vae.product" not in trace_graph(lambda a: (a @ a,), [a]).code


def shared(h, a, b, c):
    """A mean, a scale and a third output, as of Student's t."""
    return a(h).tanh() * b(h).exp() + c(h)


def one_gives_the_other(h, a, b, c):
    return b(h) * a(h).detach() + c(h + a(h).mean())


def twice(h, a, b, c):
    return a(h) * a(h) + b(h) - c(h)


def of_two_inputs(h, a, b, c):
    return a(h) + b(h).exp() + a(h.tanh()) * c(h.tanh())


def a_penalty_first(h, a, b, c):
    return (b.weight.norm() + a.weight.sum()) * a(h) * b(h) + c(h).exp()


def changed_on_the_way(h, a, b, c):
    h = h.clone()
    with torch.no_grad():
        y = a(h)
    h.mul_(2)
    return y + b(h) * c(h) + a(h)


SHAPES = [shared, one_gives_the_other, twice, of_two_inputs, a_penalty_first, changed_on_the_way]


@pytest.mark.parametrize("f", SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [(7,), (3, 5), (1,)], ids=str)
@pytest.mark.parametrize("trained", ["all", "features not", "a not"])
def test_layers_of_the_same_features_are_as_they_were(f, batch, trained):
    torch.manual_seed(0)
    below, *layers = [torch.nn.Linear(6, 5), *(torch.nn.Linear(5, 4) for _ in range(3))]
    nets = torch.nn.ModuleList([below, *layers]).double()
    (below if trained == "features not" else layers[0]).requires_grad_(trained == "all")
    params = [p for p in nets.parameters() if p.requires_grad]

    def loss_and_gradients(x):
        y = f(below(x).sigmoid(), *layers)
        return y.sum().detach(), *torch.autograd.grad(y.square().sum(), params)

    x = torch.randn(*batch, 6, dtype=torch.double)
    graph = trace_graph(loss_and_gradients, [x])
    for other in (x, torch.randn_like(x)):
        with torch.no_grad():
            ours = graph(other)
        for ours_, plain in zip(ours, loss_and_gradients(other), strict=True):
            torch.testing.assert_close(ours_, plain, rtol=1e-12, atol=1e-12)


def test_layers_of_the_same_features_are_one_product():
    below, *layers = [torch.nn.Linear(6, 5), *(torch.nn.Linear(5, 4) for _ in range(3))]
    params = [p for net in (below, *layers) for p in net.parameters()]
    graph = trace_graph(lambda x: torch.autograd.grad(shared(below(x).tanh(), *layers).sum(), params), [torch.randn(7, 6)])
    assert graph.code.count("addmm.default(") == 2  # below, and the three above it
    assert graph.code.count(".mm.default(") == 3  # the gradients of their weights and of the features


def test_a_line_without_a_source_is_named():
    """As of a pair that is typed at Python's prompt."""
    typed = {}
    exec(compile("def f(x):\n    return (x * x.sum().item(),)", "<stdin>", "exec"), typed)
    with pytest.raises(CannotTrace, match=r"at <stdin>:2$"):
        trace_graph(typed["f"], [torch.ones(3)])


def test_what_python_reads_is_refused():
    with pytest.raises(CannotTrace, match=r"item\(\) takes the value out of a tensor at test_graphs"):
        trace_graph(lambda x: (x * x.sum().item(),), [torch.ones(3)])


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
        run = compiled(trace_graph(lambda x: f(x, weight, average), [x]), [x])
        for data in (x, other):
            weight.mul_(1.1)  # it is the graph's own, live
            twin = average.clone()
            torch.manual_seed(1)
            found = run(data)
            torch.manual_seed(1)
            for ours, exact in zip(found, f(data, weight, twin), strict=True):
                torch.testing.assert_close(ours, exact)
            torch.testing.assert_close(average, twin)
