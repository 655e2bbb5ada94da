"""Sends frames that are encoded beforehand at a given rate, for workflows/bench_ingest.py: `python -m`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

POOL = 64  # different frames


def frames(side: int) -> NDArray[np.uint16]:
    """(POOL, side, side) with the look of diffraction: bright in the middle, mostly empty outside, a gap."""
    y, x = np.mgrid[:side, :side] - side // 2
    expected = 2e4 * np.exp(-np.hypot(y, x) / (0.04 * side)) + 0.3
    counts = np.random.default_rng(0).poisson(expected, (POOL, side, side)).astype(np.uint16)
    counts[:, side // 4] = 65535
    return counts


def main() -> None:
    """Print the addresses, wait for a line on the standard input, send, and print how much that was."""
    options = _options()
    publisher = _publisher(options)
    encoded = [publisher.encoded(frame) for frame in frames(options.side)]
    print(json.dumps({"served": publisher.addresses}), flush=True)
    sys.stdin.readline()
    number, begun, slept = 0, time.perf_counter(), 0.0
    publisher.begin("flood")
    total = round(options.rate * options.seconds)
    while number < total:
        many = min(total - number, max(1, int((time.perf_counter() - begun) * options.rate) - number), 10)
        where = 1e-7 * np.stack([np.arange(number, number + many) % 97, np.full(many, number // 97 % 89)], axis=1)
        publisher.positions(number, where)
        for k in range(many):
            publisher.send(number + k, encoded[(number + k) % POOL])
        number += many
        ahead = begun + number / options.rate - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
            slept += ahead
    took = time.perf_counter() - begun
    publisher.end(number, last=True)
    sent = {"sent": number, "overflowed": publisher.overflowed, "seconds": took, "idle_share": slept / took}
    print(json.dumps(sent), flush=True)
    sys.stdin.readline()
    publisher.close()


def _publisher(options: argparse.Namespace):  # noqa: ANN202 - one of three, each with a library of its own
    if options.protocol == "dectris":
        from served.dectris import DectrisPublisher  # noqa: PLC0415

        return DectrisPublisher(wait=not options.overflow)
    if options.protocol == "swmr":
        from served.swmr import SwmrPublisher  # noqa: PLC0415

        return SwmrPublisher(Path(options.folder), shape=(options.side, options.side), flush=10)
    from served.pva import PvaPublisher  # noqa: PLC0415

    return PvaPublisher()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flood")
    parser.add_argument("--protocol", choices=("dectris", "pva", "swmr"), required=True)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--overflow", action="store_true", help="drop what the client does not take, and count it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
