from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controller.protocol import VariantReport, VariantStatus
from controller.reported_variants import ReportedVariants
from model_worker.variant_reports import VariantReports

NAMES = st.sampled_from("abcd")


def status(name: str, **values: object) -> VariantStatus:
    return VariantStatus.model_validate({"name": name, "parent": "m", "path": name, "state": "active", **values})


def test_only_what_has_changed_is_said() -> None:
    reports = VariantReports()
    first = reports.next([status("a"), status("b"), status("c")])
    assert (first.since, [s.name for s in first.variants]) == (None, ["a", "b", "c"])
    reports.answered(first.number)
    second = reports.next([status("a"), status("c", num_running=1), status("d")])
    assert second.since == first.number
    assert ([s.name for s in second.variants], second.gone) == (["c", "d"], ["b"])
    reports.answered(second.number)
    third = reports.next([status("a"), status("c", num_running=1), status("d")])
    assert (third.since, third.variants, third.gone) == (second.number, [], [])


def test_a_report_is_complete_until_one_is_answered_and_after_another_answer() -> None:
    reports = VariantReports()
    assert reports.next([]).since is None
    last = reports.next([])
    assert last.since is None
    reports.answered(last.number)
    assert reports.next([]).since == last.number
    reports.answered(last.number)  # the controller did not take the one that was sent after it
    assert reports.next([]).since is None


def test_one_that_drains_is_not_reported_beside_its_successor() -> None:
    old, new = status("a", state="draining", digest="A"), status("a", digest="B")
    assert VariantReports().next([old, new]).variants == VariantReports().next([new, old]).variants == [new]
    assert VariantReports().next([old]).variants == [old]


class Membership(RuleBasedStateMachine):
    """A worker process and a controller with a network between them that loses, repeats, delays and reorders.

    `messages` and `answers` are on their way; a message stays there after its delivery, to be delivered again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process = 0
        self.variants: dict[str, VariantStatus] = {}
        self.reports = VariantReports()
        self.sent: dict[tuple[int, int], dict[str, VariantStatus]] = {}  # by process and number: what it meant
        self.known: dict[int, ReportedVariants] = {}  # of the controller, by process
        self.messages: list[tuple[bool, int, VariantReport]] = []  # with whether it is a registration
        self.answers: list[int | None] = []  # to this process; None: it must register

    # The worker

    @rule(name=NAMES, num_running=st.integers(0, 3), state=st.sampled_from(["active", "on_disk", "draining"]))
    def change(self, name: str, num_running: int, state: str) -> None:
        self.variants[name] = status(name, num_running=num_running, state=state)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.variants.pop(name, None)

    @rule()
    def heartbeat(self) -> None:
        self.send(registers=False)

    @rule()
    def register(self) -> None:
        self.reports.forget()
        self.send(registers=True)

    @rule()
    def restart_worker(self) -> None:
        self.process += 1
        self.variants = {}
        self.reports = VariantReports()
        self.answers = []

    def send(self, *, registers: bool) -> None:
        report = self.reports.next(self.variants.values())
        self.sent[self.process, report.number] = dict(self.variants)
        self.messages.append((registers, self.process, report))

    # The network

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.receive(data.draw(st.integers(0, len(self.messages) - 1)))

    @precondition(lambda self: self.messages)
    @rule()
    def deliver_newest(self) -> None:
        self.receive(len(self.messages) - 1)

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        answer = self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1)))
        if answer is None:
            self.register()
        else:
            self.reports.answered(answer)

    @rule()
    def lose_everything(self) -> None:
        self.messages.clear()
        self.answers.clear()

    # The controller

    @rule()
    def restart_controller(self) -> None:
        self.known.clear()

    def receive(self, index: int) -> None:
        registers, process, report = self.messages[index]
        report = VariantReport.model_validate_json(report.model_dump_json(exclude_defaults=True))
        if registers:
            self.known[process] = ReportedVariants()
        if process in self.known:
            self.known[process].take(report)
        if process == self.process:
            self.answers.append(self.known[process].number if process in self.known else None)

    @invariant()
    def what_is_known_is_what_was_said(self) -> None:
        for process, known in self.known.items():
            assert known.by_name == self.sent[process, known.number]

    def teardown(self) -> None:
        """Once messages arrive, three heartbeats are enough, whatever has happened before."""
        self.lose_everything()
        for _ in range(3):
            self.heartbeat()
            self.deliver_newest()
            if self.answers.pop() is None:
                self.register()
                self.deliver_newest()
                self.answers.pop()
            else:
                self.reports.answered(self.known[self.process].number)
        assert self.known[self.process].by_name == self.variants


TestMembership = Membership.TestCase
TestMembership.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
