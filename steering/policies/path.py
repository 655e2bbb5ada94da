"""A short path through chosen positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def short_path(start: NDArray[np.float64] | None, where: NDArray[np.float64]) -> NDArray[np.int64]:
    """The order (n,) of positions (n, 2) along a short path from `start` (None: from the first of them) through all.

    Nearest neighbour first; then parts of the path are reversed for as long as that makes it shorter (2-opt;
    Croes, Oper. Res. 6, 791 (1958)). The distance is the larger of the two along the axes, which move at once.
    """
    points = where if start is None else np.concatenate([np.asarray(start, np.float64)[None], where])
    if len(points) < 3:
        return np.arange(len(where))
    distance = np.abs(points[:, None] - points[None]).max(-1)
    order = _without_crossings(_nearest_neighbour(distance), distance)
    return order if start is None else order[1:] - 1


def _nearest_neighbour(distance: NDArray[np.float64]) -> NDArray[np.int64]:
    order = np.zeros(len(distance), np.int64)
    free = distance.copy()
    free[:, 0] = np.inf
    for i in range(1, len(order)):
        order[i] = free[order[i - 1]].argmin()
        free[:, order[i]] = np.inf
    return order


def _without_crossings(order: NDArray[np.int64], distance: NDArray[np.float64]) -> NDArray[np.int64]:
    """The path with its crossings removed; its first point stays."""
    n = len(order)
    first, last = np.triu_indices(n - 1, 1)  # the part first + 1 .. last is reversed; after last == n - 1 the path ends
    first, last = np.concatenate([first, np.arange(n - 2)]), np.concatenate([last, np.full(n - 2, n - 1)])
    for _ in range(10 * n):
        step = distance[order[:-1], order[1:]]
        onward = np.append(step, 0.0)
        a, b = order[first], order[last]
        c, d = order[first + 1], order[np.minimum(last + 1, n - 1)]
        joined = np.where(last + 1 < n, distance[c, d], 0.0)
        gain = onward[first] + onward[last] - distance[a, b] - joined
        best = int(gain.argmax())
        if gain[best] <= 1e-12 * distance.max():
            break
        i, j = first[best] + 1, last[best] + 1
        order[i:j] = order[i:j][::-1]
    return order
