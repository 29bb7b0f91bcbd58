from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from controller.protocol import AddVariantRequest
from delta.publish import SIGNATURE_FILE, find_files
from delta.signature import sign
from model_worker.__main__ import main
from model_worker.adapter_root import AdapterRoot
from model_worker.config import GivenVariant, SignatureConfig
from model_worker.published_variants import PublishedVariants
from model_worker.signature_check import SignatureCheck, make_signature_check
from model_worker.variants import Variants
from registry.errors import InvalidRequestError, SignatureError
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_loras import FakeLoras
from tests.fakes.load_plans import make_plan
from tests.fakes.signing_keys import KeyPair, write_key_pair
from tests.fakes.stored_blobs import put

Add = Callable[[Variants, Path], Awaitable[None]]


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_key_pair(tmp_path, "ours")


@pytest.fixture
def bot(tmp_path: Path, keys: KeyPair) -> Path:
    """A signed adapter below the root, which is `tmp_path`."""
    directory = tmp_path / "bot"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text("weights")
    sign(directory, keys.private)
    return directory


def make(engine: FakeLoras, root: Path, check: SignatureCheck | None) -> Variants:
    return Variants(
        engine, make_plan(), ByteTokenizer(), parent="base", root=AdapterRoot(root), with_templates=True,
        published=PublishedVariants(root / "cache", None, None), check_signature=check,
    )  # fmt: skip


async def add_below_the_root(variants: Variants, bot: Path) -> None:
    await variants.add(AddVariantRequest(name="bot", parent="base", path="bot"))


async def add_published(variants: Variants, bot: Path) -> None:
    store = Store(bot.parent / "cache" / "store")
    digests = {name: put(store, file.read_bytes()).digest for name, file in find_files(bot).items()}
    digest = PublishedFiles(digests).manifest_digest
    await variants.add(AddVariantRequest(name="bot@v1", parent="base", path=digest, files=digests))


async def add_from_the_command_line(variants: Variants, bot: Path) -> None:
    await variants.load([GivenVariant("--lora", "bot", bot, pinned=False)], print)


def change_a_byte(bot: Path) -> None:
    (bot / "adapter_model.safetensors").write_text("weighty")


def take_a_file(bot: Path) -> None:
    (bot / "adapter_model.safetensors").unlink()


def add_a_file(bot: Path) -> None:
    (bot / "added_tokens.json").write_text("{}")


def take_the_signature(bot: Path) -> None:
    (bot / SIGNATURE_FILE).unlink()


def sign_with_another_key(bot: Path) -> None:
    sign(bot, write_key_pair(bot.parent, "other").private)


SOURCES = [add_below_the_root, add_published, add_from_the_command_line]
CHANGES = [change_a_byte, take_a_file, add_a_file, take_the_signature, sign_with_another_key]


@pytest.mark.parametrize("add", SOURCES)
async def test_what_is_signed_is_served(add: Add, bot: Path, keys: KeyPair, tmp_path: Path) -> None:
    engine = FakeLoras()
    check = make_signature_check(SignatureConfig("require", (keys.public,)))
    await add(make(engine, tmp_path, check), bot)
    assert len(engine.added) == 1


@pytest.mark.parametrize("add", SOURCES)
@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_not_is_refused_or_logged_or_not_looked_at(
    add: Add,
    change: Callable[[Path], None],
    bot: Path,
    keys: KeyPair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(bot)
    engine = FakeLoras()
    require = make_signature_check(SignatureConfig("require", (keys.public,)))
    with pytest.raises(SignatureError) as caught:
        await add(make(engine, tmp_path, require), bot)
    assert (caught.value.code, engine.added) == ("signature_invalid", [])
    with caplog.at_level(logging.WARNING):
        await add(make(engine, tmp_path, make_signature_check(SignatureConfig())), bot)
    assert (len(engine.added), caplog.messages) == (1, [])
    warn = make_signature_check(SignatureConfig("warn", (keys.public,)))
    await add(make(engine, tmp_path, warn), bot)
    (message,) = caplog.messages
    assert len(engine.added) == 2
    assert message.endswith("--signatures warn lets it be served all the same")


async def test_it_is_checked_before_it_is_read_and_not_on_the_event_loop(tmp_path: Path) -> None:
    (tmp_path / "bot").mkdir()
    (tmp_path / "bot" / "tokenizer_config.json").write_text("{")
    checked: list[tuple[Path, bool]] = []

    def check(directory: Path) -> None:
        checked.append((directory, threading.current_thread() is threading.main_thread()))
        raise SignatureError("is not signed")

    with pytest.raises(SignatureError):
        await add_below_the_root(make(FakeLoras(), tmp_path, check), tmp_path / "bot")
    assert checked == [(tmp_path / "bot", False)]


def test_off_needs_no_package_and_other_policies_need_keys_that_can_be_read(tmp_path: Path) -> None:
    assert make_signature_check(SignatureConfig()) is None
    with pytest.raises(InvalidRequestError, match="no public key"):
        make_signature_check(SignatureConfig("warn", (tmp_path / "none.pem",)))


def test_a_delta_that_is_applied_at_load_is_checked_too(
    bot: Path, keys: KeyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--signatures", "require", "--signature-key", str(keys.public), "--apply-delta", str(bot)]
    take_the_signature(bot)
    assert main(["--no-controller", "--port", "0", "--model-path", "none", *flags], {"HOME": "/nowhere"}) == 1
    assert "is not signed" in capsys.readouterr().err
