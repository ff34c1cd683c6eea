"""Write what this version of pyro_vae stores, for all later ones to read: ``python -m tests.checkpoint.make_golden``."""

from pathlib import Path

import pyro_vae as pv
from tests.faults import small

FOLDER = Path(__file__).parent / "golden"


def main():
    folder = FOLDER / pv.__version__
    folder.mkdir(parents=True)  # what was written once is not written again
    vae, _ = small.train(num_epochs=2, every=50, checkpoint=folder / "checkpoints")
    pv.checkpoint.save(folder / "pair", vae)
    (folder / "sum").write_text(small.sum_of(vae.parameters()))


if __name__ == "__main__":
    main()
