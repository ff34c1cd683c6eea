"""Write a pair and checkpoints of this version for compatibility tests: ``python -m
tests.checkpoint.make_golden``."""

from pathlib import Path

import pyro_vae as pv
from tests.faults import small

FOLDER = Path(__file__).parent / "golden"


def main():
    folder = FOLDER / pv.__version__
    folder.mkdir(parents=True)  # raises if this version has a golden folder
    vae, _ = small.train(num_epochs=2, every=50, checkpoint=folder / "checkpoints")
    pv.checkpoint.save(folder / "pair", vae)
    (folder / "sum").write_text(small.checksum(vae.parameters()))


if __name__ == "__main__":
    main()
