"""Trunks: batch shapes, formulas, gradients, errors."""

import pytest
import torch
from torch import nn

from pyro_vae import nets

TRUNKS = {
    "mlp": (nets.MLP(12, (7, 5)), (12,)),
    "mlp on images": (nets.MLP((3, 4), (7,)), (3, 4)),
    "residual": (nets.MLP(12, (6, 6, 6), residual=True, activation=torch.relu), (12,)),
    "identity": (nets.MLP(12, ()), (12,)),
    "conv encoder": (nets.ConvEncoder((9, 7), (4, 6)), (9, 7)),
    "conv encoder, colours": (nets.ConvEncoder((3, 8, 8), (4,)), (3, 8, 8)),
    "conv decoder": (nets.ConvDecoder(5, (9, 7), (6, 4)), (5,)),
    "standardize": (nn.Sequential(nets.Standardize(3.0, 2.0), nets.MLP(12, (4,))), (12,)),
}


@pytest.mark.parametrize(("trunk", "event"), TRUNKS.values(), ids=TRUNKS.keys())
@pytest.mark.parametrize("batch", [(), (5,), (3, 5), (2, 3, 5)], ids=str)
def test_trunks_preserve_any_leading_batch_shape(trunk, event, batch):
    trunk = trunk.double()
    x = torch.randn(*batch, *event, dtype=torch.double)
    out = trunk(x)
    assert out.shape == batch + nets.out_shape(trunk)
    rows = torch.stack([trunk(row) for row in x.reshape(-1, *event)])
    torch.testing.assert_close(out.reshape(rows.shape), rows, rtol=1e-10, atol=1e-12)


def test_residual_mlp_matches_its_formula():
    mlp = nets.MLP(3, (4, 4), residual=True)
    x = torch.randn(6, 3)
    first, second = mlp.layers
    h = torch.tanh(x @ first.weight.T + first.bias)
    torch.testing.assert_close(mlp(x), h + torch.tanh(h @ second.weight.T + second.bias))


def test_several_inputs_are_broadcast_and_concatenated():
    mlp = nets.MLP(((2,), (3, 4)), (5,))
    z, c = torch.randn(7, 6, 2), torch.randn(6, 3, 4)
    joined = torch.cat([z, c.flatten(1).expand(7, 6, 12)], -1)
    torch.testing.assert_close(mlp(z, c), torch.tanh(mlp.layers[0](joined)))


def test_gradients_reach_every_pixel_and_every_latent():
    encoder = nets.ConvEncoder((9, 7), (4, 6), activation=torch.tanh)
    decoder = nets.ConvDecoder(5, (9, 7), (6, 4), activation=torch.tanh)
    x, z = torch.randn(2, 9, 7, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    encoder(x).square().sum().backward()
    decoder(z).square().sum().backward()
    assert (x.grad != 0).all()
    assert (z.grad != 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nets.MLP(0, (5,)), "positive whole numbers"),
        (lambda: nets.MLP(3, (5,), activation=nn.ReLU), r"pass ReLU\(\)"),
        (lambda: nets.MLP(3, (5,))(torch.zeros(2, 4)), "built for events of 3"),
        (lambda: nets.MLP(3, (5,))(torch.zeros(2, 3).double()), "float64"),
        (lambda: nets.MLP(3, (5,))(torch.zeros(2, 3), torch.zeros(2, 3)), "got 2 inputs"),
        (lambda: nets.ConvEncoder((9,)), "height, width"),
        (lambda: nets.ConvEncoder((8, 8), ()), "at least one layer"),
        (lambda: nets.ConvDecoder(2, (8, 8), ()), "at least one layer"),
        (lambda: nets.out_shape(nn.ReLU()), "set trunk.out_shape"),
        (
            lambda: nets.out_shape(nn.Sequential(nets.ConvEncoder((8, 8)), nn.Flatten(-3))),
            "remove a final nn.Flatten",
        ),
    ],
)
def test_invalid_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_readout_is_a_convolution_only_for_images():
    assert nets.Readout((4, 5, 2), (3, 5, 2)).convolutional
    assert not nets.Readout((4, 5, 2), (5, 2), image=False).convolutional


def test_as_shape_accepts_numpy_integers():
    assert nets.as_shape(torch.arange(5).numpy()[3]) == (3,)
