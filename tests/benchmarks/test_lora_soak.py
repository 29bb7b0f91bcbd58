from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def checks(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("soak_checks")


def test_while_a_name_changes_both_of_its_states_are_possible(checks: ModuleType) -> None:
    change = checks.Change
    history = checks.History([change(1, "a", 2), change(5, "b", 6), change(9, None)])
    assert history.possible(0, 0.5) == {None}
    assert history.possible(0, 1.5) == history.possible(1.5, 1.6) == {None, "a"}
    assert history.possible(3, 4) == {"a"}
    assert history.possible(3, 7) == {"a", "b"}
    assert history.possible(7, 8) == {"b"}
    assert history.possible(7, 20) == {"b", None}
    assert history.version is None
    assert history.may_be_loading(1.5, 3)
    assert not history.may_be_loading(3, 20)


def test_attempts_with_bad_files_change_nothing(checks: ModuleType) -> None:
    absent = checks.History([checks.Change(1, None, 2)])
    assert absent.possible(0, 3) == {None}
    assert absent.may_be_loading(1.5, 1.6)
    loaded = checks.History([checks.Change(1, "a", 2), checks.Change(3, "a", 4)])
    assert loaded.possible(2.5, 9) == {"a"}
    assert not loaded.may_be_loading(2.5, 9)


@pytest.mark.parametrize(
    ("fields", "reply", "wrong"),
    [
        ({}, {"tokens": "xyz"}, None),
        ({"num_tokens": 2}, {"tokens": "xy"}, None),
        ({}, {"tokens": "xy"}, "2 tokens instead of 3"),
        ({}, {"tokens": "xyw"}, "not one of"),
        ({"seed": 1}, {"tokens": "xyw"}, None),
        ({}, {"tokens": "xyz", "complete": False}, "no end"),
        ({"leaves": "at once"}, {"tokens": "x", "complete": False}, None),
        ({"leaves": "at once"}, {"status": None}, None),
        ({}, {"status": None, "error": "timed out"}, "no answer"),
        ({}, {"tokens": "xyz", "error": "engine died"}, "engine died"),
        ({}, {"status": 404, "error": "gone"}, "404 for what is loaded"),
        ({"name": "other"}, {"status": 404, "error": "gone"}, None),
        ({"name": "other"}, {"status": 404}, "without a message"),
        ({"name": "other"}, {"tokens": "xyz"}, "although it is not loaded"),
        ({}, {"status": 503, "error": "later"}, "503"),
        ({"name": "loading"}, {"status": 503, "error": "later"}, None),
        ({}, {"status": 500, "error": "a bug"}, "a bug"),
    ],
)
def test_outcomes(checks: ModuleType, fields: dict[str, object], reply: dict[str, object], wrong: str | None) -> None:
    histories = {
        "name": checks.History([checks.Change(0, "a", 1)]),
        "other": checks.History(),
        "loading": checks.History([checks.Change(4, "a")]),
    }
    fields = {"num_tokens": 3, **fields}
    request = checks.Request(loras=((fields.pop("name", "name"), 1.0),), prompt=0, **fields)
    tokens = [(text, -1.0) for text in str(reply.pop("tokens", ""))]
    answered = checks.Reply(sent_s=5, answered_s=6, tokens=tokens, **{"status": 200, "complete": True, **reply})
    expected = {((("name", "a", 1.0),), 0): [(text, -1.0) for text in "xyz"]}
    found = checks.fault(request, answered, histories, expected)
    assert found is None if wrong is None else wrong in found


def test_the_same_text_with_other_log_probabilities_is_another_answer(checks: ModuleType) -> None:
    assert checks.same_tokens([("a", -1.0)], [("a", -1.00001)])
    assert not checks.same_tokens([("a", -1.0)], [("a", -1.001)])
    assert not checks.same_tokens([("a", -1.0)], [])


@pytest.mark.e2e
def test_a_short_soak(
    load_script: Callable[[str], ModuleType], smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    sizes = ["--num-adapters", "6", "--ranks", "1,4", "--combinations", "1", "--max-loras", "4", "--max-cpu-loras", "5"]
    arguments = ["--model-path", str(smollm2_dir), *sizes, "--num-requests", "30", "--clients", "6"]
    status = load_script("lora_soak").main([*arguments, "--json", str(report)])
    assert status == 0, capsys.readouterr()
    found = json.loads(report.read_text())
    assert found["num_violations"] == 0
    assert found["num_different_answers"] == found["num_recorded_answers"] == 6 * 2 * 2 + 4 + 2
    assert sum(found["requests"].values()) == 30
    assert found["requests"]["200"] > 0
