"""Who may look at a page and who may command the run: tokens that carry a name."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["reader", "operator"]


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Somebody whom the page knows."""

    name: str
    role: Role


class Access:
    """Tokens of visitors; only their digests are kept, and they are compared in constant time."""

    def __init__(self) -> None:
        self._known: list[tuple[bytes, Visitor]] = []

    def invite(self, visitor: Visitor) -> str:
        """A new token for a visitor. It is shown once, here."""
        token = secrets.token_urlsafe(24)
        self._known.append((_digest(token), visitor))
        return token

    def visitor(self, token: str | None) -> Visitor | None:
        """Whose token it is; None for nobody's."""
        given, found = _digest(token or ""), None
        for digest, visitor in self._known:  # all of them, so that the time does not tell which was near
            if hmac.compare_digest(given, digest):
                found = visitor
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def allowed(value: str, hosts: Iterable[str]) -> bool:
    """Whether a Host header, or the host of an Origin, is one of those that the page is served under."""
    return value.lower() in {host.lower() for host in hosts}
