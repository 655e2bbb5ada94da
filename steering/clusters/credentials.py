"""The run's own credentials for TLS between client, scheduler and workers: temporary, in the run's folder, for its
owner alone."""

from __future__ import annotations

import os
from pathlib import Path

from distributed.security import Security

FOLDER = "credentials"
_FILES = {"tls_ca_file": "ca.pem", "tls_cert": "cert.pem", "tls_key": "key.pem"}
_ROLES = ("client", "scheduler", "worker")


def make(path: Path) -> Security:
    """New credentials in the folder `path`/credentials (mode 0700, its files 0600), and what Dask needs of them.

    They are valid for a year. Raises ImportError where the library cryptography is missing.
    """
    try:
        fresh = Security.temporary()
    except ImportError as error:
        raise ImportError(
            "found no library cryptography, expected it for TLS: pip install 'steering[jobqueue]', "
            "or insecure=True on a network that you trust"
        ) from error
    folder = path / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    contents = {
        "tls_ca_file": fresh.tls_ca_file,
        "tls_cert": fresh.tls_worker_cert,
        "tls_key": fresh.tls_worker_key,
    }
    for kind, name in _FILES.items():
        # Never readable by others, not even for the moment before a chmod.
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(contents[kind])
    return _of(folder)


def security_in(folder: Path) -> Security:
    """The credentials in a folder that somebody names. Raises FileNotFoundError where they are not there."""
    for file in _FILES.values():
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{folder}: found no {file}, expected a folder with the files {', '.join(_FILES.values())}"
            )
    return _of(folder)


def security_of(path: Path, name: str | None) -> Security | None:
    """The credentials of a run, to attach to it: `name` is their folder below the run's, None where it uses none.

    Raises PermissionError where they are another user's.
    """
    if name is None:
        return None
    folder = path / name
    for file in _FILES.values():
        if not os.access(folder / file, os.R_OK):
            raise PermissionError(
                f"{folder}: found no permission to read the run's credentials, expected those of the user who started "
                f"it: `steering status {path}` shows the run without them"
            )
    return _of(folder)


def _of(folder: Path) -> Security:
    cert, key = str(folder / _FILES["tls_cert"]), str(folder / _FILES["tls_key"])
    files = {f"tls_{role}_{kind}": value for role in _ROLES for kind, value in (("cert", cert), ("key", key))}
    return Security(tls_ca_file=str(folder / _FILES["tls_ca_file"]), require_encryption=True, **files)
