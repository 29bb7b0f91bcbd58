"""Elliptic curve key pairs as PEM files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


class KeyPair(NamedTuple):
    private: Path
    public: Path


def write_key_pair(directory: Path, name: str) -> KeyPair:
    pair = KeyPair(directory / f"{name}-private.pem", directory / f"{name}-public.pem")
    key = ec.generate_private_key(ec.SECP256R1())
    pair.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return pair
