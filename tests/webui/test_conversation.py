from __future__ import annotations

from webui.conversation import Message, answer, ask, edited, for_display, for_request, notice, until_last_question

TALK = answer(ask(answer(ask([], "one"), "1"), "two"), "2")


def test_asking_and_answering_make_new_lists() -> None:
    start = ask([], "one")
    assert answer(start, "1") == [Message("user", "one"), Message("assistant", "1")]
    assert start == [Message("user", "one")]


def test_until_last_question() -> None:
    assert until_last_question(TALK) == TALK[:3]
    assert until_last_question(notice(TALK, "failed")) == TALK[:3]
    assert until_last_question(TALK[:3]) == TALK[:3]
    assert until_last_question([]) == []
    assert until_last_question([Message("assistant", "hi")]) == []


def test_a_changed_question_drops_what_followed_and_asks_again() -> None:
    assert edited(TALK, 0, "uno") == ([Message("user", "uno")], True)
    assert edited(TALK, 2, "dos") == ([*TALK[:2], Message("user", "dos")], True)


def test_a_changed_answer_stays_in_its_place() -> None:
    assert edited(TALK, 1, "I") == ([TALK[0], Message("assistant", "I"), *TALK[2:]], False)


def test_an_edit_of_nothing_changes_nothing() -> None:
    assert edited(TALK, 9, "x") == (TALK, False)


def test_the_model_sees_the_system_prompt_and_no_notices() -> None:
    talk = notice(ask([], "one"), "failed")
    assert for_request(talk, " ") == [{"role": "user", "content": "one"}]
    assert for_request(talk, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
    ]


def test_one_bubble_for_each_entry() -> None:
    shown = for_display(notice(TALK, "failed"))
    assert [bubble["role"] for bubble in shown] == ["user", "assistant", "user", "assistant", "assistant"]
    assert shown[-1]["content"] == "⚠ failed"
