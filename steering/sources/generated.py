"""Generated images of sparse content: thickness 0..1, which `sample` turns into a sample."""

from __future__ import annotations

import numpy as np
import skimage
from numpy.typing import NDArray


def line_field(size: int, *, lines: int, seed: int) -> NDArray[np.float64]:
    """(size, size) with straight lines of 4 to 9 pixels' width and a fifth to almost a half of the side's length."""
    rng = np.random.default_rng(seed)
    image = np.zeros((size, size))
    for _ in range(lines):
        middle, angle = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0, np.pi)
        along = np.array([np.sin(angle), np.cos(angle)]) * rng.uniform(0.2, 0.45) * size / 2
        across = np.array([along[1], -along[0]]) / np.hypot(*along) * rng.uniform(2, 4.5)
        corners = [middle - along - across, middle - along + across, middle + along + across, middle + along - across]
        inside = skimage.draw.polygon(*np.transpose(corners), shape=image.shape)
        image[inside] = np.maximum(image[inside], rng.uniform(0.6, 1))
    return np.asarray(skimage.filters.gaussian(image, 0.8))


def particle_field(size: int, *, particles: int, seed: int) -> NDArray[np.float64]:
    """(size, size) with ellipses of 12 to 30 pixels, each with a texture of grains of 3 pixels."""
    rng = np.random.default_rng(seed)
    grains = skimage.filters.gaussian(rng.normal(size=(size, size)), 1.5)
    texture = 0.7 + 0.12 * grains / grains.std()
    image = np.zeros((size, size))
    for _ in range(particles):
        y, x = rng.uniform(0.15, 0.85, 2) * size
        a, b = rng.uniform(6, 15, 2)
        inside = skimage.draw.ellipse(y, x, a, b, shape=image.shape, rotation=rng.uniform(0, np.pi))
        image[inside] = texture[inside].clip(0.3, 1)
    return np.asarray(skimage.filters.gaussian(image, 0.8))
