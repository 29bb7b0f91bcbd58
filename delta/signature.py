"""Sign the files of a fine-tune with a key, and verify who signed them: the file `model.sig` (docs/formats/delta.md).

Covered is what `delta.publish.find_files` finds: every file that is published or served, so that one that was changed,
added or taken away is noticed. What lies beside them, such as a trainer's checkpoints, is not covered, and not read.

The package that does it is optional; to import this module without it is an InvalidRequestError. Source of the format:
https://github.com/sigstore/model-transparency, version 1.1.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from delta.publish import SIGNATURE_FILE, find_files
from registry.atomic_file import write_file
from registry.errors import CheckpointError, InvalidRequestError, SignatureError

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
    from model_signing import hashing, signing, verifying
except ImportError as error:
    raise InvalidRequestError(
        f"signatures need packages that are not installed ({error}); pip install 'rootgraft[signing]'"
    ) from error

if TYPE_CHECKING:
    from model_signing.manifest import Manifest

_MAX_SIGNATURE_BYTES = 1 << 20  # some hundred for each file
_KEY_ERRORS = (OSError, ValueError, TypeError, AttributeError, UnsupportedAlgorithm)
_DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, InvalidSignature)
_DIGESTS = re.compile(r": Expected .*?Digest\(.*?\)\\?', Actual .*?Digest\(.*?\)\\?'")
"""Of a file that was changed, as bytes that tell nobody anything."""


def sign(directory: Path, private_key: Path) -> bool:
    """Sign the files of a delta or a LoRA adapter.

    A signature of this key that holds is kept: every new one has other bytes, and other files are another version.

    Args:
        private_key: PEM file of an elliptic curve's key (P-256, P-384 or P-521) without a password.

    Returns:
        Whether the signature is new.

    Raises:
        CheckpointError: the directory holds no fine-tune, or a file cannot be read.
        InvalidRequestError: the file holds no such key.
        InternalError: the signature cannot be written.
    """
    with TemporaryDirectory(prefix="rootgraft-") as temporary:
        public_key, signature = Path(temporary) / "public.pem", Path(temporary) / SIGNATURE_FILE
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
            public_key.write_bytes(_public_part(private_key))
        except _KEY_ERRORS as error:
            raise _no_key(private_key, "private key without a password", error) from error
        if (directory / SIGNATURE_FILE).is_file():
            try:
                SignatureVerifier((public_key,)).verify(directory)
                return False
            except SignatureError:
                pass  # it is another key's, or of other files: replaced
        try:
            signer.set_hashing_config(_CoveredFiles()).sign(directory, signature)
        except OSError as error:
            raise _unreadable(error) from error
        write_file(directory / SIGNATURE_FILE, signature.read_bytes())
    return True


class SignatureVerifier:
    """Accepts what was signed with one of some keys.

    Args:
        public_keys: PEM files, each with the public key of an elliptic curve's key pair; read once.

    Raises:
        InvalidRequestError: a file holds no such key.
    """

    def __init__(self, public_keys: Sequence[Path]) -> None:
        self._verifiers: dict[Path, verifying.Config] = {}
        for key in public_keys:
            try:
                self._verifiers[key] = verifying.Config().use_elliptic_key_verifier(public_key=key)
            except _KEY_ERRORS as error:
                raise _no_key(key, "public key", error) from error

    def verify(self, directory: Path) -> Path:
        """Read all covered files and return the key that they were signed with.

        Raises:
            SignatureError: there is no signature, it is of no key that is trusted, or the files are not those signed.
            CheckpointError: the directory holds no fine-tune, or a file cannot be read.
        """
        signature = directory / SIGNATURE_FILE
        if not signature.is_file():
            raise SignatureError(
                f"{directory} is not signed: it has no {SIGNATURE_FILE}; ask its maker for one "
                "(python -m delta sign DIR --key FILE)",
                param="path",
            )
        if signature.stat().st_size > _MAX_SIGNATURE_BYTES:
            raise SignatureError(f"{signature} is too large to be a signature", param="path")
        reasons = []
        for key, verifier in self._verifiers.items():
            try:
                copy.copy(verifier).set_hashing_config(_CoveredFiles()).verify(directory, signature)
            except OSError as error:
                raise _unreadable(error) from error
            except _DAMAGED as error:
                reasons.append(f"by {key}: {_reason(error)}")
            else:
                return key
        raise SignatureError(f"The signature of {directory} does not hold, {'; '.join(reasons)}", param="path")


class _CoveredFiles(hashing.Config):
    """Which files are hashed, by SHA-256: the same when signing and verifying, whatever a signature excuses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.use_file_serialization(max_workers=1)  # a worker serves meanwhile
        self.set_ignored_paths(paths=(), ignore_git_paths=False)
        self.set_allow_symlinks(True)  # their content counts

    def hash(
        self, model_path: hashing.PathLike, *, files_to_hash: Iterable[hashing.PathLike] | None = None
    ) -> Manifest:
        assert files_to_hash is None
        found = find_files(Path(os.fsdecode(model_path)))
        return super().hash(model_path, files_to_hash=[path for name, path in found.items() if name != SIGNATURE_FILE])

    def add_ignored_paths(self, *, model_path: hashing.PathLike, paths: Iterable[hashing.PathLike]) -> None:
        """Paths that a signature says to leave out are hashed all the same, for they would be read."""


def _public_part(private_key: Path) -> bytes:
    key = load_pem_private_key(private_key.read_bytes(), password=None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise TypeError(f"it is a {type(key).__name__}")
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _no_key(file: Path, what: str, error: Exception) -> InvalidRequestError:
    return InvalidRequestError(
        f"{file} is no {what} in PEM of the elliptic curve P-256, P-384 or P-521 ({' '.join(str(error).split())[:200]})"
    )


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(f"{error.filename} cannot be read ({error.strerror})")


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidSignature):
        return "it was not made with this key"
    if isinstance(error, KeyError | IndexError | TypeError | AttributeError):
        return f"it is damaged ({type(error).__name__}: {error})"[:300]
    return " ".join(_DIGESTS.sub("", str(error)).split())[:300]
