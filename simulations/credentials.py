"""Credentials for a federation on this machine: a CA of its own, the SuperLink's certificate, the SuperNodes' keys.

For trying things out. In a deployment they come from whoever runs your PKI, and no private key ever leaves its machine.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFETIME = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """Files of a federation's credentials.

    Attributes:
        ca: The CA's certificate, which everyone trusts.
        certificate: The SuperLink's, for 127.0.0.1 and localhost.
        key: Its private key.
        nodes: A private key for each SuperNode, its public key beside it with the ending `.pub`.
    """

    ca: Path
    certificate: Path
    key: Path
    nodes: tuple[Path, ...]


def create_credentials(folder: Path, *, nodes: int) -> Credentials:
    """Writes new credentials into a folder and returns where they are."""
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fl_privacy demonstration CA")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    ca = (
        _certificate(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = (
        _certificate(server_name, ca_name, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    credentials = Credentials(
        ca=_written(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM)),
        certificate=_written(folder / "server.pem", server.public_bytes(serialization.Encoding.PEM)),
        key=_written(folder / "server.key", _private(server_key)),
        nodes=tuple(folder / f"supernode-{index}" for index in range(nodes)),
    )
    for path in credentials.nodes:
        key = ec.generate_private_key(ec.SECP384R1())  # Flower takes elliptic curve keys, not ed25519
        _written(path, _private(key, serialization.PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _written(path.with_suffix(".pub"), public)
    return credentials


def _certificate(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - LIFETIME)
        .not_valid_after(now + LIFETIME)
    )


def _private(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.TraditionalOpenSSL,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _written(path: Path, data: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path
