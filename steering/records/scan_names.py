"""Names of scans: folders, files and groups are called so, whatever a detector, a file or a program calls the scan."""

from __future__ import annotations

import hashlib

_MOST_BYTES = 100
"""Of a name in UTF-8: file systems take 255, and names of files are made of it."""
_MARK = 8
"""Letters of the mark by which two names stay two that would become one."""


def scan_name(name: str) -> str:
    """A name that a folder can have: the name itself if it is one, else what is left of it, and a mark that follows
    from the whole. It has 1 to 100 bytes in UTF-8, no slash, no leading dot, and nothing that cannot be printed."""
    kept = "".join(letter if letter.isprintable() and letter not in "/\\" else "_" for letter in name).lstrip(".")
    if name and kept == name and len(name.encode()) <= _MOST_BYTES:
        return name
    mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_MARK]
    return f"{kept.encode()[: _MOST_BYTES - _MARK - 1].decode(errors='ignore') or 'scan'}-{mark}"
