"""What a contract leaves to the parts that fulfil it: a class that inherits the contract does not have it by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def optional(method: Method) -> Method:
    """Marks a method of a contract that only describes what a part may have."""
    method.__dict__["optional"] = True
    return method


def offers(part: object, name: str) -> bool:
    """Whether a part has this optional method itself, and not only the description that its contract gives of it."""
    method = getattr(part, name, None)
    return method is not None and not getattr(method, "optional", False)
