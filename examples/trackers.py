"""Training with an experiment tracker: TensorBoard, Weights & Biases, or MLflow.

    python examples/trackers.py tensorboard && tensorboard --logdir runs/tracked

A tracker is any object with the methods ``log``, ``figure`` and ``close``.
"""

import argparse

import matplotlib.pyplot as plt

import pyro_vae as pv
from pyro_vae import conditionals, infer, nets, plots, priors


class WeightsAndBiases:
    """``pip install wandb``. Pass ``id=`` and ``resume="allow"`` to continue a run."""

    def __init__(self, **options):
        import wandb

        self.wandb, self.run = wandb, wandb.init(**options)

    def log(self, metrics, step):
        self.run.log(dict(metrics), step=step)

    def figure(self, name, figure, step):
        self.run.log({name: self.wandb.Image(figure)}, step=step)

    def close(self):
        self.run.finish()


class MLflow:
    """``pip install mlflow``. Pass ``run_id=`` to continue a run."""

    def __init__(self, **options):
        import mlflow

        self.mlflow = mlflow
        mlflow.start_run(**options)

    def log(self, metrics, step):
        self.mlflow.log_metrics(dict(metrics), step=step)

    def figure(self, name, figure, step):
        self.mlflow.log_figure(figure, f"{name}-{step}.png")

    def close(self):
        self.mlflow.end_run()


TRACKERS = {
    "tensorboard": lambda: infer.TensorBoard("runs/tracked"),
    "wandb": lambda: WeightsAndBiases(project="pyro_vae"),
    "mlflow": MLflow,
}


def main(args):
    train, test = pv.load("digits", binarize="stochastic")
    vae = pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Bernoulli(nets.MLP(2, (200,)), event_shape=(8, 8)),
        encoder=conditionals.Normal(nets.MLP(64, (200,)), event_shape=2),
    )
    tracker = TRACKERS[args.tracker]()
    options = {"validation": test, "num_epochs": 2 if args.smoke_test else 20, "tracker": tracker}
    steps_per_epoch = -(-len(train) // 100)
    for epoch in pv.train(vae.model, vae.guide, train, **options):
        figure = plots.plot_samples(vae, 36).figure
        tracker.figure("samples", figure, epoch.epoch * steps_per_epoch)
        plt.close(figure)
    tracker.close()
    print(epoch.validation)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tracker", nargs="?", default="tensorboard", choices=TRACKERS)
    parser.add_argument("--smoke-test", action="store_true")
    main(parser.parse_args())
