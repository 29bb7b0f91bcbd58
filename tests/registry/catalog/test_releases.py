from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.catalog import Canary, Catalog, VersionRecord
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, parse_name
from registry.published_files import PublishedFiles


def files(text: str) -> PublishedFiles:
    """Other files for each text."""
    digest = f"sha256:{text.encode().hex():0<64}"[:71]
    return PublishedFiles({"adapter_config.json": digest, "adapter_model.safetensors": digest})


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.sqlite3") as catalog:
        yield catalog


def publish(catalog: Catalog, text: str, *, ready: bool = True, release: str = "bot") -> VersionRecord:
    version = catalog.add_version(release, parent="base", files=files(text), actor="ann", quality={"kl": 0.25})
    if ready:
        version = catalog.set_version_state(parse_name(version.name), "ready", actor="controller")
    return version


def point(catalog: Catalog, number: int, alias: str = "prod") -> None:
    catalog.set_alias("bot", alias, ModelName("bot", version=number), actor="ann")


def stands_for(catalog: Catalog, name: str) -> str:
    return catalog.resolve(parse_name(name)).name


def test_a_version_is_a_variant_that_is_wanted(catalog: Catalog) -> None:
    version = publish(catalog, "one", ready=False)
    assert (version.name, version.state, version.kind, version.created_by) == ("bot@v1", "rolling_out", "lora", "ann")
    assert (version.digest, version.quality) == (files("one").artifact_digest, {"kl": 0.25})
    (variant,) = catalog.list_variants()
    assert (variant.name, variant.parent, variant.digest) == ("bot@v1", "base", None)
    assert (variant.files, variant.path) == (files("one").digests, files("one").manifest_digest)
    assert catalog.pin_variant("bot@v1", True, actor="ann").pinned
    identified = catalog.set_variant_digest(catalog.get_variant("bot@v1"), version.digest, actor="controller")
    assert identified.digest == version.digest
    with pytest.raises(InvalidRequestError, match="a version of a release"):
        catalog.remove_variant("bot@v1", actor="ann")


def test_the_same_files_are_the_same_version(catalog: Catalog) -> None:
    first = publish(catalog, "one")
    assert publish(catalog, "one") == first
    assert publish(catalog, "two").number == 2
    assert [version.number for version in catalog.get_release("bot").versions] == [1, 2]
    assert catalog.published_digests() == {*files("one").digests.values(), *files("two").digests.values()}


def test_a_failed_version_is_wanted_no_more_until_it_is_published_again(catalog: Catalog) -> None:
    publish(catalog, "one", ready=False)
    name = parse_name("bot@v1")
    failed = catalog.set_version_state(name, "failed", actor="controller", error="its probe fails")
    assert (failed.state, failed.error) == ("failed", "its probe fails")
    assert catalog.list_variants() == []
    assert catalog.set_version_state(name, "ready", actor="controller").state == "failed"
    with pytest.raises(InvalidRequestError, match=r"has failed \(its probe fails\)"):
        point(catalog, 1)
    with pytest.raises(ModelNotFoundError):
        catalog.resolve(name)
    assert publish(catalog, "one").state == "ready"
    assert [variant.name for variant in catalog.list_variants()] == ["bot@v1"]


def test_an_alias_points_to_versions_that_are_ready(catalog: Catalog) -> None:
    publish(catalog, "one", ready=False)
    with pytest.raises(InvalidRequestError, match="still being rolled out"):
        point(catalog, 1)
    catalog.set_version_state(parse_name("bot@v1"), "ready", actor="controller")
    point(catalog, 1)
    publish(catalog, "two")
    assert [stands_for(catalog, name) for name in ("bot", "bot@prod", "bot@v1", "bot@v2")] == [
        "bot@v1", "bot@v1", "bot@v1", "bot@v2",
    ]  # fmt: skip
    assert stands_for(catalog, f"bot@{files('two').artifact_digest}") == "bot@v2"
    with pytest.raises(ModelNotFoundError):
        catalog.resolve(parse_name(f"bot@{files('three').artifact_digest}"))
    publish(catalog, "one", release="other")
    with pytest.raises(InvalidRequestError, match="versions of bot only"):
        catalog.set_alias("bot", "prod", ModelName("other", version=1), actor="ann")
    with pytest.raises(ModelNotFoundError, match="no version 'bot@v3'"):
        point(catalog, 3)


def test_rolling_back_step_by_step(catalog: Catalog) -> None:
    for number, text in enumerate(("one", "two", "three"), start=1):
        publish(catalog, text)
        point(catalog, number)
    catalog.rollback_alias("bot", "prod", actor="bob")
    assert stands_for(catalog, "bot") == "bot@v2"
    catalog.rollback_alias("bot", "prod", actor="bob")
    assert stands_for(catalog, "bot") == "bot@v1"
    with pytest.raises(InvalidRequestError, match="nothing before bot@v1"):
        catalog.rollback_alias("bot", "prod", actor="bob")
    point(catalog, 3)
    catalog.rollback_alias("bot", "prod", actor="bob")
    assert stands_for(catalog, "bot") == "bot@v1"
    history = [(entry.actor, entry.detail["from"], entry.detail["to"]) for entry in
               catalog.alias_history("bot", "prod")]  # fmt: skip
    assert history[::-1] == [
        ("ann", None, "bot@v1"), ("ann", "bot@v1", "bot@v2"), ("ann", "bot@v2", "bot@v3"),
        ("bob", "bot@v3", "bot@v2"), ("bob", "bot@v2", "bot@v1"),
        ("ann", "bot@v1", "bot@v3"), ("bob", "bot@v3", "bot@v1"),
    ]  # fmt: skip


def test_a_rollback_leaves_out_versions_that_are_gone(catalog: Catalog) -> None:
    for number, text in enumerate(("one", "two", "three"), start=1):
        publish(catalog, text)
        point(catalog, number)
    catalog.remove_version(parse_name("bot@v2"), actor="ann")
    catalog.rollback_alias("bot", "prod", actor="bob")
    assert stands_for(catalog, "bot") == "bot@v1"


def test_canary_and_shadow(catalog: Catalog) -> None:
    for text in ("one", "two", "three"):
        publish(catalog, text)
    point(catalog, 1)
    alias = catalog.set_canary("bot", "prod", Canary(2, 0.25), actor="ann")
    assert alias.canary == Canary(2, 0.25)
    assert catalog.set_shadow("bot", "prod", 3, actor="ann").shadow == 3
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidRequestError, match="from 0 to 1"):
            catalog.set_canary("bot", "prod", Canary(2, weight), actor="ann")
    with pytest.raises(InvalidRequestError, match="points to v1 already"):
        catalog.set_canary("bot", "prod", Canary(1, 0.5), actor="ann")
    catalog.abort_canary("bot", "prod", 3, actor="controller", reason="not this one")
    aborted = catalog.abort_canary("bot", "prod", 2, actor="controller", reason="5 of 20 requests failed")
    assert (aborted.canary, aborted.shadow) == (Canary(2, 0.0), 3)
    catalog.abort_canary("bot", "prod", 2, actor="controller", reason="once is enough")
    newest = catalog.alias_history("bot", "prod")[0]
    assert (newest.action, newest.actor) == ("aliases.canary_abort", "controller")
    assert newest.detail == {"from": "v2 0.25", "to": "v2 0", "reason": "5 of 20 requests failed"}
    point(catalog, 3)
    (alias,) = catalog.get_release("bot").aliases
    assert (alias.canary, alias.shadow) == (None, None)
    catalog.set_canary("bot", "prod", Canary(2, 1.0), actor="ann")
    assert catalog.set_canary("bot", "prod", None, actor="ann").canary is None


def test_a_version_in_use_is_not_removed(catalog: Catalog) -> None:
    for text in ("one", "two", "three"):
        publish(catalog, text)
    point(catalog, 1)
    catalog.set_canary("bot", "prod", Canary(2, 0.0), actor="ann")
    catalog.set_shadow("bot", "prod", 3, actor="ann")
    for number in (1, 2, 3):
        with pytest.raises(InvalidRequestError, match="used by the alias bot@prod"):
            catalog.remove_version(ModelName("bot", version=number), actor="ann")
    catalog.remove_alias("bot", "prod", actor="ann")
    for number in (3, 2, 1):
        catalog.remove_version(ModelName("bot", version=number), actor="ann")
    assert catalog.list_releases() == catalog.list_variants() == []


def test_a_number_is_never_used_again(catalog: Catalog) -> None:
    publish(catalog, "one")
    publish(catalog, "two")
    catalog.remove_version(parse_name("bot@v2"), actor="ann")
    assert publish(catalog, "two").number == 3


def test_names_are_of_one_thing(catalog: Catalog) -> None:
    catalog.upsert_model("base", family="llama", digest="sha256:" + "1" * 64, path="/m", actor="ann")
    catalog.add_variant("sql", parent="base", path="sql", actor="ann")
    publish(catalog, "one")
    for name in ("base", "sql"):
        with pytest.raises(InvalidRequestError, match=f"{name} is the name of a"):
            publish(catalog, "one", release=name)
    with pytest.raises(InvalidRequestError, match="bot is the name of a release"):
        catalog.add_variant("bot", parent="base", path="sql", actor="ann")
    with pytest.raises(InvalidRequestError, match="bot is the name of a release"):
        catalog.upsert_model("bot", family="llama", digest="sha256:" + "1" * 64, path="/m", actor="ann")
    for name in ("a@b", "", "x" * 199):
        with pytest.raises(InvalidRequestError):
            publish(catalog, "one", release=name)
