"""Certificate authorities and certificates for test servers, valid for a day."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID


def make_certificates(folder: Path) -> None:
    """Write a trusted and an untrusted authority, and certificates of both; one is expired."""
    ours = _authority(folder / "ca.pem")
    _certificate(folder / "ok.pem", ours, ["ok.example", "ok6.example", "second.example"])
    _certificate(folder / "badca.pem", _authority(folder / "strange-ca.pem"), ["badca.example"])
    _certificate(folder / "expired.pem", ours, ["expired.example"], ends=-timedelta(hours=1))


def _authority(file: Path):
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(key.public_key(), "an authority", (key, "an authority"), authority=True)
    file.write_bytes(_pem(certificate))
    return key, "an authority"


def _certificate(file: Path, issuer, names: list[str], *, ends=timedelta(days=1)) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate = _signed(key.public_key(), names[0], issuer, names=names, ends=ends)
    file.write_bytes(_pem(certificate) + private)


def _signed(
    public,
    subject: str,
    issuer,
    *,
    names: list[str] = (),
    authority: bool = False,
    ends: timedelta = timedelta(days=1),
):
    def named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    key, issuer_name = issuer
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer_name))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(key, hashes.SHA256())


def _pem(certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
