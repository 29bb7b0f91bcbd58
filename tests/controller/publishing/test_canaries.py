from __future__ import annotations

from datetime import UTC, datetime

from controller.publishing.canaries import CanaryJudge
from controller.publishing.release_directory import Assignment, ReleaseDirectory
from registry.catalog import Alias, Canary, Release
from registry.names import ModelName

ALIAS = Alias("bot", "prod", ModelName("bot", version=1), datetime.now(UTC), Canary(2, 0.5))


def note(judge: CanaryJudge, version: int, num_ok: int, num_failed: int) -> None:
    for failed, count in ((False, num_ok), (True, num_failed)):
        for _ in range(count):
            judge.note("bot", "prod", version, failed=failed)


def test_a_canary_that_fails_more_than_the_stable_version_is_aborted() -> None:
    judge = CanaryJudge(margin=0.1, min_requests=10)
    note(judge, 1, 90, 10)
    note(judge, 2, 7, 2)
    assert judge.reason_to_abort(ALIAS) is None  # too few
    note(judge, 2, 1, 0)
    assert judge.reason_to_abort(ALIAS) is None  # exactly the margin
    note(judge, 2, 0, 1)
    assert judge.reason_to_abort(ALIAS) == "3 of its 11 requests failed, 10 of 100 of v1"
    judge.begin("bot", "prod")
    assert judge.reason_to_abort(ALIAS) is None


def test_failures_of_both_are_nobodys_fault() -> None:
    judge = CanaryJudge(margin=0.05, min_requests=5)
    note(judge, 1, 5, 5)
    note(judge, 2, 5, 5)
    assert judge.reason_to_abort(ALIAS) is None


def test_people_stay_with_their_version_while_the_weight_grows() -> None:
    people = [f"person {i}" for i in range(2000)]
    before: set[str] = set()
    for weight in (0.0, 0.1, 0.5, 1.0):
        chosen = {who for who in people if Assignment("bot", 1, "prod", 2, weight).choose(who) == 2}
        assert before <= chosen
        assert abs(len(chosen) / len(people) - weight) < 0.04
        before = chosen
    others = {who for who in people if Assignment("bot", 1, "prod", 3, 0.5).choose(who) == 3}
    assert (
        0.1
        < len(others & {who for who in people if Assignment("bot", 1, "prod", 2, 0.5).choose(who) == 2}) / 2000
        < 0.4
    )


def test_names_of_a_release() -> None:
    directory = ReleaseDirectory()
    directory.refresh([Release("bot", datetime.now(UTC), (), (ALIAS,))])
    found = directory.assignment("bot")
    assert found == directory.assignment("bot@prod") == Assignment("bot", 1, "prod", 2, 0.5)
    assert found.name_of(2) == "bot@v2"
    for name in ("bot@staging", "bot@v1", "other", "not a name", "bot@sha256:" + "1" * 64):
        assert directory.assignment(name) is None
