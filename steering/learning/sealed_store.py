"""A store of torch.distributed whose entries only those who know the run's token can write.

Through the store the ranks tell one another where they listen. Whoever reaches its port can read and write it: a false
entry would lead a rank's traffic elsewhere. So every entry carries a code over its name and value (HMAC-SHA256), and
one without the right code is refused. What ranks then send one another is not encrypted: gloo and NCCL cannot.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


class SealedStore(dist.Store):
    """Another store with a code on every value. Keep a reference for as long as a group uses it: torch keeps none."""

    def __init__(self, inner: dist.Store, token: str) -> None:
        super().__init__()
        self._inner = inner
        self._token = token.encode()

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value with its code."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._inner.set(key, self._code(key, data) + data)

    def get(self, key: str) -> bytes:
        """Wait for a value. Raises RuntimeError where somebody else has written it."""
        found = self._inner.get(key)
        code, data = found[: hashlib.sha256().digest_size], found[hashlib.sha256().digest_size :]
        if not hmac.compare_digest(code, self._code(key, data)):
            raise RuntimeError(
                f"found the entry {key!r} of the ranks' meeting point without the run's token, expected entries of "
                "this run's ranks only: another program writes to its port, see who else is on this network"
            )
        return bytes(data)

    def add(self, key: str, amount: int) -> int:
        """Count; a false count makes a group fail, and leads nobody elsewhere."""
        return int(self._inner.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are there."""
        return bool(self._inner.check(list(keys)))

    def wait(self, keys: Sequence[str], *timeout: timedelta) -> None:
        """Wait until all are there."""
        self._inner.wait(list(keys), *timeout)

    def delete_key(self, key: str) -> bool:
        """Forget one."""
        return bool(self._inner.delete_key(key))

    def num_keys(self) -> int:
        """How many there are."""
        return int(self._inner.num_keys())

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `get` and `wait` wait."""
        self._inner.set_timeout(timeout)

    def _code(self, key: str, data: bytes) -> bytes:
        return hmac.new(self._token, key.encode() + b"\0" + data, hashlib.sha256).digest()
