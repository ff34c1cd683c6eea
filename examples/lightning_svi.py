"""SVI with Lightning on two processes: ``pip install -e '.[lightning]'``.

``Trace_ELBO()(model, guide)`` is a ``torch.nn.Module`` whose ``forward`` returns the loss. It works with
the training loop, loggers and DistributedDataParallel of Lightning. ``pv.fit`` does not need Lightning.

The model has a latent m that all data share, and a local z: m ~ N(0, 10²), z ~ N(m, 1), x ~ N(z, 1). The
plate has the size of the data set, so Pyro multiplies the terms of the data by N/B, but not those of m. The
loss of each process is then an unbiased estimate of the loss of all data, and so is their mean. The posterior
of m is known: its scale is (N/2 + 1/100)^(−1/2).
"""

import argparse
import logging
import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", module="lightning")  # advice on num_workers
import lightning  # noqa: E402

N = 400


class Model(PyroModule):
    def forward(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", N, subsample=x):
            z = pyro.sample("z", dist.Normal(m, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc, self.slope = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.ones(()))
        self.m_scale = PyroParam(torch.tensor(0.2), constraints.positive)
        self.z_scale = PyroParam(torch.ones(()), constraints.positive)

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(self.loc, self.m_scale))
        with pyro.plate("data", N, subsample=x):
            pyro.sample("z", dist.Normal(m + self.slope * (x - m), self.z_scale))


class SVI(lightning.LightningModule):
    def __init__(self, model, guide):
        super().__init__()
        self.loss = Trace_ELBO(num_particles=10, vectorize_particles=False)(model, guide)

    def training_step(self, batch):
        (x,) = batch
        return self.loss(x) / N  # per datum

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main(args):
    lightning.seed_everything(0, verbose=False)
    x = 3.0 + 2**0.5 * torch.randn(N)
    svi = SVI(Model(), guide := Guide())
    svi.loss(x[:1])  # makes the parameters of the pair, which the optimizer needs
    logging.getLogger("lightning").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_epochs=2 if args.smoke_test else 100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
    )
    trainer.fit(svi, DataLoader(TensorDataset(x), batch_size=20, shuffle=True))
    if trainer.is_global_zero:
        precision = N / 2 + 1 / 100
        print(f"m: {guide.loc.item():.3f} ± {guide.m_scale.item():.4f} with {trainer.world_size} processes")
        print(f"exact: {x.sum() / 2 / precision:.3f} ± {precision**-0.5:.4f}")
        print(f"loss: {svi.loss(x).item() / N:.3f} nats per datum")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
