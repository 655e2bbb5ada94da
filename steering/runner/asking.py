"""How an actor is asked."""

from __future__ import annotations

from typing import Any


async def asked(actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """The answer of an actor. Where its worker is known to be gone, already the name of the method raises: here that
    is an answer like any other."""
    return await getattr(actor, method)(*arguments, **named)
