"""The same training on two processes, started by four launchers: ``pip install -e '.[launchers]'``.

    python -m torch.distributed.run --nproc-per-node 2 examples/launchers.py torchrun
    python examples/launchers.py fabric
    python examples/launchers.py accelerate
    python examples/launchers.py ray

Each of them makes a process group of torch, which ``pv.fit`` uses: there is nothing to wrap, and a script is
the same on one process.
"""

import argparse

import pyro
import torch
import torch.distributed

import pyro_vae as pv
from pyro_vae import checkpoint, conditionals, infer, nets, priors


def train(num_epochs, out):
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    train, test = pv.load("digits", binarize="stochastic")
    vae = pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Bernoulli(nets.MLP(2, (200,)), event_shape=(8, 8)),
        encoder=conditionals.Normal(nets.MLP(64, (200,)), event_shape=2),
    )
    pv.fit(vae.model, vae.guide, train, num_epochs=num_epochs, progress=False)
    with infer.across_processes():  # each process evaluates a part of the data
        elbo = pv.evaluate(vae.model, vae.guide, test)
    if infer.Group().rank == 0:
        print(f"{infer.Group().size} processes, held-out: {elbo}")
        if out is not None:
            checkpoint.save(out, vae)


def torchrun(*options):
    with infer.process_group("cpu"):
        train(*options)


def fabric(*options):
    from lightning import Fabric

    # lightning starts the second process by running this script again
    Fabric(accelerator="cpu", devices=2, strategy="ddp").launch()
    train(*options)
    torch.distributed.destroy_process_group()


def accelerate(*options):
    from accelerate import notebook_launcher  # on GPUs: accelerate launch

    notebook_launcher(accelerated, options, num_processes=2)


def accelerated(*options):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    train(*options)
    accelerator.end_training()


def ray(*options):
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        lambda: train(*options),
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    launchers = {f.__name__: f for f in (torchrun, fabric, accelerate, ray)}
    parser.add_argument("launcher", nargs="?", default="torchrun", choices=launchers)
    parser.add_argument("--num-epochs", type=int, default=20)
    parser.add_argument("--out", help="folder for the trained pair")
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    launchers[args.launcher](2 if args.smoke_test else args.num_epochs, args.out)
