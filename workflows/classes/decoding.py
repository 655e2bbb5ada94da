"""One image file to pixels of a fixed size, as networks for ImageNet are trained and tested.

Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (arXiv 1409.4842), section 6: a random part of the
image, of 8 to 100 % of its area and a ratio of its sides from 3/4 to 4/3, mirrored in half of the cases.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
BROKEN = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that holds no whole image."""
Box = tuple[float, float, float, float]


def decode(path: Path, size: int, rng: np.random.Generator | None) -> NDArray[np.uint8]:
    """(3, size, size): a random part of the image, mirrored at random; without rng its middle, 7/8 of its shorter side.

    Raises FileNotFoundError, PermissionError, and one of BROKEN for a file that holds no whole image.
    """
    with Image.open(path) as image:
        width, height = image.size
        box = _middle(width, height) if rng is None else random_box(width, height, rng)
        if image.format == "JPEG":  # the decoder leaves out what is not needed: up to four times faster
            share = max(size / (box[2] - box[0]), size / (box[3] - box[1]))
            image.draft(None, (int(width * share), int(height * share)))
            x, y = image.size[0] / width, image.size[1] / height
            box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        part = colour(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(part)
    if rng is not None and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def colour(image: Image.Image) -> Image.Image:
    """The image as RGB, 8 bits: grey ones three times the same, transparent ones before white, 16 bits by their upper
    half, which Pillow itself would clip."""
    if image.mode.startswith("I"):
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image.convert("RGB")


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Left, top, right and bottom of a random part; after ten that do not fit, of the largest in the middle."""
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    across, down = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _middle(width: int, height: int) -> Box:
    side = min(width, height) * 7 / 8  # 224 of 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
