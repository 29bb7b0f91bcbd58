"""Aliases that move while clients ask: rollback, canary, shadow. No request is lost."""

from __future__ import annotations

import re

import pytest

from registry.published_files import PublishedFiles
from tests.e2e.processes import wait_until
from tests.e2e.publishing.fleet import RELEASE, WAIT_S, Fleet

pytestmark = pytest.mark.e2e


def test_rollbacks_under_load_lose_no_request(fleet: Fleet) -> None:
    current, serving = fleet.current(), fleet.serving
    other, other_codec = fleet.other_version(), fleet.other_codec()
    fleet.admin("PUT", "/aliases/prod", version=other)
    fleet.admin("PUT", "/aliases/prod", version=current)
    with fleet.clients() as clients:
        for _ in range(4):
            assert fleet.admin("POST", "/aliases/prod/rollback")["version"] == other
            clients.wait_for(other_codec)
            fleet.admin("PUT", "/aliases/prod", version=current)
            clients.wait_for(serving)


def test_canaries_move_under_load_and_keep_their_users(fleet: Fleet) -> None:
    canary, other = fleet.other_version(), fleet.other_codec()
    users = [f"user {number}" for number in range(12)]

    names = {text: codec for codec, text in fleet.answers.items()}
    digests = {version["digest"].removeprefix("sha256:") for version in fleet.versions().values()}
    fingerprints = {f"fp_{digest[:12]}" for digest in digests}

    def versions_of_users() -> dict[str, str]:
        replies = {user: fleet.complete(user=user).json() for user in users}
        assert {reply["system_fingerprint"] for reply in replies.values()} <= fingerprints
        return {user: names[reply["choices"][0]["text"]] for user, reply in replies.items()}

    with fleet.clients() as clients:
        fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=0.5)
        half = versions_of_users()
        assert set(half.values()) == {fleet.serving, other}
        assert versions_of_users() == half
        fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=0.8)
        most = versions_of_users()
        assert all(most[user] == other for user, codec in half.items() if codec == other)
        fleet.admin("PUT", "/aliases/prod/canary", version=canary, weight=1.0)
        clients.wait_for(other)
        assert set(versions_of_users().values()) == {other}
        fleet.admin("DELETE", "/aliases/prod/canary")
        clients.wait_for(fleet.serving)
        assert set(versions_of_users().values()) == {fleet.serving}


def test_a_shadow_is_compared_and_clients_see_nothing_of_it(fleet: Fleet) -> None:
    shadow, serving = fleet.other_version(), fleet.serving
    before = fleet.current()
    differs = shadow_answers(fleet, shadow, "differs")
    with fleet.clients() as clients:
        fleet.admin("PUT", "/aliases/prod/shadow", version=shadow)
        wait_until(lambda: shadow_answers(fleet, shadow, "differs") >= differs + 5, WAIT_S, "compared answers")
        assert set(clients.outcomes()) == {serving}
        _, alike = fleet.new_delta(serving)
        fleet.publish(alike, "--no-alias")
        alike_version = max(fleet.versions())
        fleet.admin("PUT", "/aliases/prod/shadow", version=alike_version)
        wait_until(lambda: shadow_answers(fleet, alike_version, "agrees") >= 5, WAIT_S, "answers that agree")
        assert set(clients.outcomes()) == {serving}
    assert shadow_answers(fleet, alike_version, "differs") == 0
    assert shadow_answers(fleet, shadow, "agrees") == 0
    fleet.admin("DELETE", "/aliases/prod/shadow")
    assert fleet.current() == before


def test_what_is_removed_leaves_the_disks_of_the_workers(fleet: Fleet) -> None:
    """While it is removed, and what went while a worker was away, when that is started."""
    _, delta = fleet.new_delta()
    fleet.publish(delta, "--no-alias")
    fleet.wait_until_served(max(fleet.versions()))
    fleet.kill_worker(1)
    with fleet.clients() as clients:
        fleet.remove_old_versions()
        needed = {PublishedFiles(version["files"]).manifest_digest for version in fleet.versions().values()}
        fleet.wait_until_clean(0)
        assert fleet.cached(1) > needed
        fleet.start_worker(1)
        fleet.wait_until_clean(1)
        fleet.wait_until_served(fleet.current())
        assert set(clients.outcomes()) == {fleet.serving}
    fleet.check_stores()


def shadow_answers(fleet: Fleet, version: int, comparison: str) -> int:
    reply = fleet.cluster.get("/metrics")
    assert reply is not None
    labels = f'{{comparison="{comparison}",release="{RELEASE}",version="v{version}"}}'
    lines = re.findall(r"^rootgraft_release_shadow_answers_total(\{.*\}) ([0-9.]+)$", reply.text, flags=re.MULTILINE)
    return sum(int(float(value)) for found, value in lines if sorted(found[1:-1].split(",")) == labels[1:-1].split(","))
