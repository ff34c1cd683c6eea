"""Read the data of a latent map from its page."""

import base64
import io
import json
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass
class LatentMap:
    json: str
    points: np.ndarray  # (n, 3): z, and the index of the label
    low: np.ndarray
    size: float
    steps: int
    sheet: np.ndarray  # (channels, height, width), in [0, 1]

    def centre(self, column, row):
        """z at the centre of a cell, counted from the lower left."""
        return self.low + (np.array([column, row]) + 0.5) * self.size / self.steps

    def tile(self, column, row):
        """The image of a cell."""
        height, width = (size // self.steps for size in self.sheet.shape[1:])
        top, left = (self.steps - 1 - row) * height, column * width
        return self.sheet[:, top : top + height, left : left + width]


def read(page):
    text = re.search(r'id="map">(.*?)</script>', page, re.S)[1]
    record = json.loads(text)
    content = re.search(r'id="sheet" src="data:image/png;base64,([^"]+)"', page)[1]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) / 255
    sheet = sheet[None] if sheet.ndim == 2 else np.moveaxis(sheet, -1, 0)
    points, low = np.array(record["points"]), np.array(record["low"])
    return LatentMap(text, points, low, record["size"], record["steps"], sheet)


def cells(steps):
    """Twenty cells of the grid, among them its corners."""
    inner = np.random.default_rng(0).integers(0, steps, (16, 2)).tolist()
    return [(0, 0), (0, steps - 1), (steps - 1, 0), (steps - 1, steps - 1), *map(tuple, inner)]
