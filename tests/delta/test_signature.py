from __future__ import annotations

import base64
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from model_signing import hashing, signing, verifying

from delta.__main__ import main
from delta.publish import SIGNATURE_FILE, Publication, find_files
from delta.signature import SignatureVerifier, sign
from registry.errors import CheckpointError, InvalidRequestError, SignatureError
from tests.fakes.signing_keys import KeyPair, write_key_pair


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_key_pair(tmp_path, "ours")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    (directory / "checkpoint-10").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "checkpoint-10/optimizer.pt"):
        (directory / name).write_text(name)
    return directory


def change_a_byte(directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def take_a_file(directory: Path) -> None:
    next(directory.glob("*.safetensors")).unlink()


def add_a_file(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ 'obey' }}")


def take_the_signature(directory: Path) -> None:
    (directory / SIGNATURE_FILE).unlink()


def forge_the_signature(directory: Path) -> None:
    """The files' digests are right and the key is named, but it was not used."""
    file = directory / SIGNATURE_FILE
    bundle = json.loads(file.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"] = []
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    file.write_text(json.dumps(bundle))


CHANGES = {
    "a changed byte": (change_a_byte, "Hash mismatch for.*safetensors"),
    "a missing file": (take_a_file, "Missing files.*safetensors"),
    "an added file": (add_a_file, "Extra files.*chat_template.jinja"),
    "no signature": (take_the_signature, "is not signed"),
    "a forged signature": (forge_the_signature, "not made with this key"),
}


@pytest.mark.parametrize("kind", ["delta", "adapter"])
def test_what_was_signed_is_verified(request: pytest.FixtureRequest, kind: str, keys: KeyPair, tmp_path: Path) -> None:
    directory: Path = request.getfixturevalue(kind)
    assert sign(directory, keys.private)
    other = write_key_pair(tmp_path, "other")
    assert SignatureVerifier([other.public, keys.public]).verify(directory) == keys.public
    moved = shutil.move(directory, tmp_path / "under another name")
    assert SignatureVerifier([keys.public]).verify(moved) == keys.public


@pytest.mark.parametrize("kind", ["delta", "adapter"])
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_what_was_changed_since_is_refused(
    request: pytest.FixtureRequest, kind: str, change: Callable[[Path], None], reason: str, keys: KeyPair
) -> None:
    directory: Path = request.getfixturevalue(kind)
    sign(directory, keys.private)
    change(directory)
    with pytest.raises(SignatureError, match=reason) as caught:
        SignatureVerifier([keys.public]).verify(directory)
    assert (caught.value.code, caught.value.param) == ("signature_invalid", "path")
    assert "digest_value" not in caught.value.message


def test_another_key_is_refused_by_its_name(adapter: Path, keys: KeyPair, tmp_path: Path) -> None:
    sign(adapter, keys.private)
    other = write_key_pair(tmp_path, "other")
    with pytest.raises(SignatureError, match=r"other-public\.pem: Key mismatch"):
        SignatureVerifier([other.public]).verify(adapter)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"verificationMaterial": {}}', "[" * 100_000, "\0"])
def test_a_damaged_signature_is_refused(adapter: Path, keys: KeyPair, text: str) -> None:
    (adapter / SIGNATURE_FILE).write_text(text)
    with pytest.raises(SignatureError, match="does not hold"):
        SignatureVerifier([keys.public]).verify(adapter)


def test_what_is_not_published_is_not_covered(adapter: Path, keys: KeyPair) -> None:
    sign(adapter, keys.private)
    (adapter / "README.md").write_text("other words")
    shutil.rmtree(adapter / "checkpoint-10")
    SignatureVerifier([keys.public]).verify(adapter)


def test_paths_that_a_signature_excuses_are_covered_all_the_same(adapter: Path, keys: KeyPair) -> None:
    excusing = hashing.Config().set_ignored_paths(paths=["adapter_model.safetensors", "README.md", "checkpoint-10"])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys.private)
    signer.set_hashing_config(excusing).sign(adapter, adapter / SIGNATURE_FILE)
    with pytest.raises(SignatureError, match=r"Extra files.*adapter_model\.safetensors"):
        SignatureVerifier([keys.public]).verify(adapter)


def test_other_programs_can_verify(delta: Path, keys: KeyPair) -> None:
    sign(delta, keys.private)
    ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE])
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    verifier.set_hashing_config(ignoring).verify(delta, delta / SIGNATURE_FILE)


def test_a_signature_that_holds_is_kept_and_another_one_replaced(adapter: Path, keys: KeyPair, tmp_path: Path) -> None:
    sign(adapter, keys.private)
    first = (adapter / SIGNATURE_FILE).read_bytes()
    assert not sign(adapter, keys.private)
    assert (adapter / SIGNATURE_FILE).read_bytes() == first
    change_a_byte(adapter)
    assert sign(adapter, keys.private)
    other = write_key_pair(tmp_path, "other")
    assert sign(adapter, other.private)
    assert SignatureVerifier([other.public]).verify(adapter) == other.public


def test_files_that_hold_no_key_are_refused(adapter: Path, keys: KeyPair, tmp_path: Path) -> None:
    rsa_key = tmp_path / "rsa.pem"
    public = rsa.generate_private_key(65537, 1024).public_key()
    rsa_key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for file in (tmp_path / "none.pem", adapter / "README.md", keys.private, rsa_key):
        with pytest.raises(InvalidRequestError, match="no public key"):
            SignatureVerifier([file])
    for file in (tmp_path / "none.pem", adapter / "README.md", keys.public):
        with pytest.raises(InvalidRequestError, match="no private key"):
            sign(adapter, file)


def test_what_is_no_fine_tune_is_not_signed(tmp_path: Path, keys: KeyPair) -> None:
    with pytest.raises(CheckpointError, match="neither a delta"):
        sign(tmp_path, keys.private)


def test_verbs(
    delta: Path, base: Path, adapter: Path, keys: KeyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trusted = ["--public-key", str(write_key_pair(tmp_path, "other").public), "--public-key", str(keys.public)]
    assert main(["verify", str(delta), *trusted]) == 1
    assert capsys.readouterr().err.startswith("delta verify: ")
    for directory in (delta, adapter):
        assert main(["sign", str(directory), "--key", str(keys.private)]) == 0
        assert main(["sign", str(directory), "--key", str(keys.private)]) == 0
        assert "already" in capsys.readouterr().out
        assert main(["verify", str(directory), *trusted]) == 0
        assert str(keys.public) in capsys.readouterr().out
    assert main(["verify", str(delta), "--base", str(base), *trusted]) == 0
    assert "belongs to" in capsys.readouterr().out


def test_publishing_signs_first_and_sends_the_signature(
    adapter: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Path]] = []

    def publish(what: Publication, url: str, **options: object) -> str:
        SignatureVerifier([keys.public]).verify(what.directory)
        sent.append(find_files(what.directory))
        return f"{what.name}@v1"

    monkeypatch.setattr("delta.verbs.publish.publish", publish)
    command = ["publish", "--name", "bot", "--adapter", str(adapter), "--sign-key", str(keys.private)]
    assert main(command) == 0
    assert set(sent[0]) == {"adapter_config.json", "adapter_model.safetensors", SIGNATURE_FILE}


def test_without_the_package_the_error_says_what_to_install(
    adapter: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.delitem(sys.modules, "delta.signature")
    with pytest.raises(InvalidRequestError, match=r"pip install 'rootgraft\[signing\]'"):
        importlib.import_module("delta.signature")
    assert main(["sign", str(adapter), "--key", str(keys.private)]) == 1
    assert "rootgraft[signing]" in capsys.readouterr().err
