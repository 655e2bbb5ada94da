"""The run's own credentials for TLS between client, scheduler and workers: temporary, in the run's folder, for its
owner alone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from distributed.security import Security

FOLDER = "credentials"
_FILES = {"tls_ca_file": "ca.pem", "tls_cert": "cert.pem", "tls_key": "key.pem"}
_ROLES = ("client", "scheduler", "worker")
_BEFORE, _AFTER = timedelta(days=1), timedelta(days=365)
"""How long before and after now credentials are valid. Dask's own begin with this very moment: a node whose clock is
behind would refuse them, and say that they do not match."""


def make(path: Path) -> Security:
    """New credentials in the folder `path`/credentials (mode 0700, its files 0600), and what Dask needs of them.

    They are valid for a year, and since a day ago, so that clocks may disagree. Raises ImportError where the library
    cryptography is missing.
    """
    try:
        key, certificate = _self_signed()
    except ImportError as error:
        raise ImportError(
            "found no library cryptography, expected it for TLS: pip install 'steering[jobqueue]', "
            "or insecure=True on a network that you trust"
        ) from error
    folder = path / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    contents = {"tls_ca_file": certificate, "tls_cert": certificate, "tls_key": key}
    for kind, name in _FILES.items():
        # Never readable by others, not even for the moment before a chmod.
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents[kind])
    return _of(folder)


def _self_signed() -> tuple[bytes, bytes]:
    """A new key and its certificate, as PEM. Raises ImportError."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "steering")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("steering")]), critical=False)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + _AFTER)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, *form), certificate.public_bytes(serialization.Encoding.PEM)


def security_in(folder: Path) -> Security:
    """The credentials in a folder that somebody names. Raises FileNotFoundError where they are not there."""
    for file in _FILES.values():
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{folder}: found no {file}, expected a folder with the files {', '.join(_FILES.values())}"
            )
    return _of(folder)


def security_of(path: Path, name: str | None) -> Security | None:
    """The credentials of a run, to attach to it: `name` is their folder below the run's, or one of its own cluster's by
    its whole path, None where it uses none.

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


def folder_of(security: Security) -> Path | None:
    """The folder that credentials come from, see `security_in`; None for others, such as those of Dask's
    configuration: whoever attaches has them from there, too."""
    files = [getattr(security, f"tls_{kind}", None) for kind in ("ca_file", "client_cert", "client_key")]
    if not all(isinstance(file, str) and "\n" not in file for file in files):
        return None  # Dask takes their contents, too
    paths = [Path(str(file)).absolute() for file in files]
    named = [path.name for path in paths] == list(_FILES.values())
    return paths[0].parent if named and len({path.parent for path in paths}) == 1 else None


def as_client(security: Security) -> Security:
    """The credentials of a worker, by which a client within it reaches its scheduler too."""
    files = {f"tls_client_{kind}": getattr(security, f"tls_worker_{kind}") for kind in ("cert", "key")}
    return Security(tls_ca_file=security.tls_ca_file, require_encryption=security.require_encryption, **files)


def lacks(address: str, security: Security | None) -> bool:
    """Whether an address asks for TLS, and neither these credentials nor Dask's configuration have any for it."""
    given = Security() if security is None else security
    return address.startswith("tls://") and given.get_connection_args("client").get("ssl_context") is None


def _of(folder: Path) -> Security:
    cert, key = str(folder / _FILES["tls_cert"]), str(folder / _FILES["tls_key"])
    files = {f"tls_{role}_{kind}": value for role in _ROLES for kind, value in (("cert", cert), ("key", key))}
    return Security(tls_ca_file=str(folder / _FILES["tls_ca_file"]), require_encryption=True, **files)
