"""SVI with Lightning: ``pip install -e '.[lightning]'``.

``Trace_ELBO()(model, guide)`` is a ``torch.nn.Module`` whose ``forward`` returns the loss. It works with
the training loop, loggers and DistributedDataParallel of Lightning. ``pv.fit`` does not need Lightning.
"""

import argparse
import logging
import warnings

import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors

warnings.filterwarnings("ignore", module="lightning")  # advice on num_workers
import lightning  # noqa: E402


class SVI(lightning.LightningModule):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.loss = Trace_ELBO()(vae.model, vae.guide)

    def training_step(self, batch):
        (x,) = batch
        return self.loss(x) / len(x)  # mean over the minibatch

    def configure_optimizers(self):
        return torch.optim.Adam(self.vae.parameters(), lr=3e-3)


def main(args):
    lightning.seed_everything(0, verbose=False)
    train, test = pv.load("digits")
    vae = pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.ContinuousBernoulli(nets.MLP(2, (200,)), event_shape=(8, 8)),
        encoder=conditionals.Normal(nets.MLP(64, (200,)), event_shape=2),
    )
    logging.getLogger("lightning").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_epochs=1 if args.smoke_test else 50,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(SVI(vae), DataLoader(TensorDataset(train.x), batch_size=100, shuffle=True))
    print(f"held-out: {pv.evaluate(vae.model, vae.guide, test)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
