from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from controller.protocol import AddVariantRequest, ProbePassed
from model_worker import variants as variants_module
from model_worker.adapter_root import AdapterRoot
from model_worker.config import GivenVariant
from model_worker.variants import Variants
from registry.errors import (
    CheckpointError,
    InsufficientMemoryError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    ProbeFailedError,
    RootgraftError,
)
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_loras import FakeLoras
from tests.fakes.load_plans import make_plan

PIRATE = "{% for message in messages %}Arr, {{ message.content }}{% endfor %}"
POET = "{% for message in messages %}O {{ message.content }}!{% endfor %}"


@pytest.fixture
def engine() -> FakeLoras:
    return FakeLoras()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path.resolve()
    for name in ("pirate", "poet", "plain"):
        (root / name).mkdir()
    (root / "pirate" / "chat_template.jinja").write_text(PIRATE)
    (root / "pirate" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))
    (root / "poet" / "chat_template.jinja").write_text(POET)
    return root


Probe = Callable[[str, Path], Awaitable[ProbePassed | None]]


def make(engine: FakeLoras, root: Path | None, *, with_templates: bool = True, probe: Probe | None = None) -> Variants:
    return Variants(
        engine,
        make_plan(),
        ByteTokenizer(),
        parent="base",
        root=AdapterRoot(root),
        with_templates=with_templates,
        probe=probe,
    )


@pytest.fixture
def variants(engine: FakeLoras, root: Path) -> Variants:
    return make(engine, root)


def addition(name: str, path: str | None = None, *, parent: str = "base", pinned: bool = False) -> AddVariantRequest:
    return AddVariantRequest(name=name, parent=parent, path=path or name, pinned=pinned)


async def states(variants: Variants) -> dict[str, str]:
    return {status.name: status.state for status in await variants.statuses()}


async def test_an_adapter_is_added_changed_and_removed(variants: Variants) -> None:
    assert await variants.statuses() == []
    added = await variants.add(addition("pirate", pinned=True))
    assert (added.name, added.parent, added.path) == ("pirate", "base", "pirate")
    assert (added.pinned, added.rank, added.from_command_line) == (True, 8, False)
    assert not (await variants.unpin("pirate")).pinned
    assert (await variants.pin("pirate")).pinned
    assert (await variants.activate("pirate")).state == "active"
    assert (await variants.evict("pirate")).state == "on_disk"
    assert await states(variants) == {"pirate": "on_disk"}
    assert (await variants.remove("pirate")).state == "draining"
    assert await states(variants) == {}


async def test_a_status_says_whether_it_is_a_delta(
    variants: Variants, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "is_delta", lambda directory: directory.name == "poet")
    await variants.add(addition("pirate"))
    await variants.load([GivenVariant("--delta", "poet", root / "poet", pinned=False)], print)
    assert {status.name: status.kind for status in await variants.statuses()} == {"pirate": "lora", "poet": "delta"}


async def test_paths_of_adapters_that_are_gone_are_forgotten(variants: Variants, root: Path) -> None:
    for name in ("pirate", "poet", "plain"):
        await variants.add(addition(name))
    for name in ("pirate", "poet"):
        await variants.remove(name)
    assert await states(variants) == {"plain": "in_host_memory"}
    assert {path: source.given_path for path, source in variants._sources.items()} == {str(root / "plain"): "plain"}


@pytest.mark.parametrize("change", ["remove", "pin", "unpin", "activate", "evict"])
async def test_an_unknown_name_is_refused_everywhere(variants: Variants, change: str) -> None:
    with pytest.raises(ModelNotFoundError, match="pirate"):
        await getattr(variants, change)("pirate")
    with pytest.raises(ModelNotFoundError, match="pirate"):
        variants.prompt_format(["pirate"])


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (addition("pirate", parent="other"), ModelNotFoundError),
        (addition("base", "pirate"), InvalidRequestError),
        (addition("a b", "pirate"), InvalidRequestError),
        (addition("pirate@v1", "pirate"), InvalidRequestError),
        (addition("pirate", "../x"), PermissionDeniedError),
        (addition("pirate", "parrot"), CheckpointError),
    ],
)
async def test_what_cannot_be_added_leaves_nothing(
    variants: Variants, engine: FakeLoras, request_: AddVariantRequest, kind: type[RootgraftError]
) -> None:
    with pytest.raises(kind):
        await variants.add(request_)
    assert engine.added == []
    assert await variants.statuses() == []


async def test_what_the_engine_or_the_template_refuses_leaves_nothing(
    variants: Variants, engine: FakeLoras, root: Path
) -> None:
    engine.refuse_with = CheckpointError("It holds NaN.")
    with pytest.raises(CheckpointError, match="NaN"):
        await variants.add(addition("pirate"))
    engine.refuse_with = None
    (root / "plain" / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="Jinja"):
        await variants.add(addition("plain"))
    assert engine.added == []
    for name in ("pirate", "plain"):
        with pytest.raises(ModelNotFoundError):
            variants.prompt_format([name])


async def test_a_replacement_that_is_refused_leaves_the_old_one(variants: Variants, engine: FakeLoras) -> None:
    await variants.add(addition("x", "pirate"))
    before = variants.prompt_format(["x"])
    engine.refuse_with = CheckpointError("It holds NaN.")
    with pytest.raises(CheckpointError):
        await variants.add(addition("x", "poet"))
    assert variants.prompt_format(["x"]) == before
    engine.refuse_with = None
    await variants.add(addition("x", "poet"))
    assert variants.prompt_format(["x"]) != before


@pytest.fixture
def deltas(engine: FakeLoras, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All directories hold deltas, and different ones."""
    monkeypatch.setattr(variants_module, "is_delta", lambda directory: True)
    for number, directory in enumerate(("pirate", "poet", "plain")):
        engine.digests[root / directory] = f"sha256:{number}"


async def test_a_delta_is_asked_its_probe_before_it_replaces_another(
    engine: FakeLoras, root: Path, deltas: None
) -> None:
    asked: list[tuple[str, str]] = []
    served: list[tuple[str, str]] = []
    variants: Variants

    async def probe(name: str, path: Path) -> None:
        asked.append((name, path.name))
        served.extend((status.name, status.path) for status in await variants.statuses())
        if path.name == "poet":
            raise ProbeFailedError("It fails.")

    variants = make(engine, root, probe=probe)
    await variants.add(addition("x", "pirate"))
    served.clear()
    with pytest.raises(ProbeFailedError):
        await variants.add(addition("x", "poet"))
    await variants.add(addition("x", "plain"))
    assert asked == [("x", "pirate"), ("x@trial", "poet"), ("x@trial", "plain")]
    assert served == [("x", "pirate")] * 2  # while the probes of the others ran
    assert [(status.name, status.path) for status in await variants.statuses()] == [("x", "plain")]
    assert [status.name for status in await engine.list()] == ["x"]


async def test_a_delta_for_which_there_is_no_room_beside_the_one_it_replaces(
    engine: FakeLoras, root: Path, deltas: None
) -> None:
    asked: list[tuple[str, str]] = []

    async def probe(name: str, path: Path) -> None:
        asked.append((name, path.name))
        if name != "x":
            raise InsufficientMemoryError("No place beside those that are pinned.")
        if path.name == "plain":
            raise ProbeFailedError("It fails.")

    variants = make(engine, root, probe=probe)
    await variants.add(addition("x", "pirate"))
    await variants.add(addition("x", "poet"))
    assert [(status.name, status.path) for status in await variants.statuses()] == [("x", "poet")]
    with pytest.raises(ProbeFailedError):
        await variants.add(addition("x", "plain"))
    assert asked == [("x", "pirate"), ("x@trial", "poet"), ("x", "poet"), ("x@trial", "plain"), ("x", "plain")]
    assert await engine.list() == []


async def test_without_a_root_there_are_only_those_of_the_command_line(engine: FakeLoras, root: Path) -> None:
    variants = make(engine, None)
    lines: list[str] = []
    given = [
        GivenVariant("--lora", "pirate", root / "pirate", pinned=True),
        GivenVariant("--lora", "plain", root / "plain", pinned=False),
    ]
    await variants.load(given, lines.append)
    assert await states(variants) == {"pirate": "active", "plain": "in_host_memory"}
    assert all(status.from_command_line for status in await variants.statuses())
    assert [line.split(",")[0] for line in lines] == ["Adapter pirate: rank 8", "Adapter plain: rank 8"]
    assert "1.0 MiB" in lines[0]
    assert lines[0].endswith("pinned.")
    with pytest.raises(PermissionDeniedError, match="--adapter-root"):
        await variants.add(addition("poet", str(root / "poet")))


async def test_what_the_command_line_gave_is_neither_replaced_nor_removed(variants: Variants, root: Path) -> None:
    await variants.load([GivenVariant("--lora", "pirate", root / "pirate", pinned=False)], print)
    with pytest.raises(PermissionDeniedError, match="command line"):
        await variants.add(addition("pirate", "poet"))
    with pytest.raises(PermissionDeniedError, match="command line"):
        await variants.remove("pirate")
    assert (await variants.pin("pirate")).pinned


async def test_a_bad_adapter_of_the_command_line_is_named(variants: Variants, engine: FakeLoras, root: Path) -> None:
    engine.refuse_with = CheckpointError("It holds NaN.")
    with pytest.raises(CheckpointError, match=r"--lora pirate=.*pirate: It holds NaN\."):
        await variants.load([GivenVariant("--lora", "pirate", root / "pirate", pinned=False)], print)
    with pytest.raises(CheckpointError, match=r"--delta pirate=.*no delta"):
        await variants.load([GivenVariant("--delta", "pirate", root / "pirate", pinned=False)], print)
    with pytest.raises(InvalidRequestError, match=r"--lora base=.*own name"):
        await variants.load([GivenVariant("--lora", "base", root / "pirate", pinned=False)], print)


async def test_the_prompts_of_an_adapter_are_its_own(variants: Variants) -> None:
    for name in ("pirate", "plain"):
        await variants.add(addition(name))
    assert variants.prompt_format([]).chat_template is None
    assert variants.prompt_format(["plain"]).chat_template is None
    for names in (["pirate"], ["plain", "pirate"], ["pirate", "pirate"]):
        prompts = variants.prompt_format(names)
        assert prompts.chat_template is not None
        assert prompts.chat_template.source == PIRATE
        assert prompts.stop_token_ids == (ord("!"),)


async def test_adapters_whose_templates_differ_are_not_used_together(engine: FakeLoras, root: Path) -> None:
    variants = make(engine, root)
    for name in ("pirate", "poet"):
        await variants.add(addition(name))
    with pytest.raises(InvalidRequestError, match="pirate, poet") as caught:
        variants.prompt_format(["pirate", "poet"])
    assert caught.value.param == "loras"
    variants = make(engine, root, with_templates=False)
    for name in ("pirate", "poet"):
        await variants.add(addition(name))
    assert variants.prompt_format(["pirate", "poet"]).chat_template is None


async def test_a_report_does_not_wait_for_a_long_step_nor_ask_a_dead_engine(
    variants: Variants, engine: FakeLoras, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "REPORT_TIMEOUT_S", 0.01)
    await variants.add(addition("pirate"))
    before = await variants.report()
    engine.gate.clear()
    assert await variants.report() == before
    engine.gate.set()
    engine.refuse_with = InternalError("The engine has died.")
    assert await variants.report() == before
    engine.refuse_with = None
    await variants.activate("pirate")
    assert [status.state for status in await variants.report()] == ["active"]


async def test_a_report_that_cannot_wait_knows_what_has_changed_since_the_last(
    variants: Variants, engine: FakeLoras, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "REPORT_TIMEOUT_S", 0.01)
    await variants.add(addition("pirate"))
    await variants.report()
    await variants.remove("pirate")
    await variants.add(addition("plain"))
    engine.gate.clear()
    usable = [status.name for status in await variants.report() if status.state != "draining"]
    assert usable == ["plain"]


async def test_a_report_that_came_too_early_has_its_answer_in_the_next(
    variants: Variants, engine: FakeLoras, monkeypatch: pytest.MonkeyPatch
) -> None:
    await variants.add(addition("pirate"))
    monkeypatch.setattr(variants_module, "REPORT_TIMEOUT_S", 0.0)
    engine.gate.clear()
    change = asyncio.create_task(engine.activate("pirate"))
    await asyncio.sleep(0)
    assert [status.state for status in await variants.report()] == ["in_host_memory"]
    engine.gate.set()
    await change
    await asyncio.sleep(0.01)
    assert [status.state for status in await variants.report()] == ["active"]


async def test_an_addition_that_fails_is_in_no_later_report(
    variants: Variants, engine: FakeLoras, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_module, "REPORT_TIMEOUT_S", 0.01)
    await variants.add(addition("plain"))
    engine.reading.clear()
    engine.is_read.clear()
    adding = asyncio.create_task(variants.add(addition("pirate")))
    await engine.is_read.wait()
    assert len(await variants.report()) == 2
    engine.refuse_with = CheckpointError("It holds NaN.")
    engine.reading.set()
    with pytest.raises(CheckpointError):
        await adding
    engine.refuse_with = None
    engine.gate.clear()
    assert [status.name for status in await variants.report()] == ["plain"]


async def test_additions_take_turns(variants: Variants, engine: FakeLoras) -> None:
    engine.gate.clear()
    tasks = [asyncio.create_task(variants.add(addition("x", path))) for path in ("pirate", "plain")]
    removal = asyncio.create_task(variants.remove("x"))
    await asyncio.sleep(0.05)
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert engine.added == ["x", "x"]
    with pytest.raises(ModelNotFoundError):  # it came before there was anything to remove
        await removal
