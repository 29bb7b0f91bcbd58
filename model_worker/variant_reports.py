"""What the controller is told of this worker's adapters with each heartbeat: no more than what it does not know yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controller.protocol import VariantReport, VariantStatus

Statuses = Mapping[str, VariantStatus]  # by name


class VariantReports:
    """Makes the reports of one worker process; `VariantReport` says what they mean.

    A report continues the last one that the controller has answered with its own number, and is complete when there is
    none: at first, after `forget`, and when the controller answered with another number, as it does when reports were
    lost or overtook each other.
    """

    def __init__(self) -> None:
        self._number = 0
        self._sent: Statuses = {}  # as of the report with that number
        self._known: tuple[int, Statuses] | None = None  # number and content of the one that was answered

    def next(self, statuses: Iterable[VariantStatus]) -> VariantReport:
        """The report that says that the adapters are `statuses`.

        Args:
            statuses: of two with one name, one was replaced and drains; the other is reported.
        """
        self._number += 1
        self._sent = now = _one_of_each_name(statuses)
        if self._known is None:
            return VariantReport(number=self._number, variants=list(now.values()))
        since, before = self._known
        return VariantReport(
            number=self._number,
            since=since,
            variants=[status for name, status in now.items() if _differs(before.get(name), status)],
            gone=[name for name in before if name not in now],
        )

    def answered(self, number: int) -> None:
        """The controller knows the report of that number now."""
        self._known = (number, self._sent) if number == self._number else None

    def forget(self) -> None:
        """Let the next report be complete: it goes to a controller that may know nothing."""
        self._known = None


def _differs(before: VariantStatus | None, status: VariantStatus) -> bool:
    return status is not before and status != before  # most have not changed, and are the same object


def _one_of_each_name(statuses: Iterable[VariantStatus]) -> Statuses:
    found: dict[str, VariantStatus] = {}
    for status in statuses:
        if status.state != "draining" or status.name not in found:
            found[status.name] = status
    return found
