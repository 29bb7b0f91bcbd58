"""The variants of a worker as its reports tell them. Pure Python."""

from __future__ import annotations

from controller.protocol import VariantReport, VariantStatus


class ReportedVariants:
    """What one worker process has reported, report after report; the rule is that of `VariantReport`.

    A report that is lost, repeated or late changes nothing, for it does not continue what is known here. The worker
    learns from the answer which report that is, and makes the next one complete.

    Attributes:
        number: of the report that is known; 0: none yet.
        by_name: the variants as of that report.
    """

    def __init__(self) -> None:
        self.number = 0
        self.by_name: dict[str, VariantStatus] = {}

    def take(self, report: VariantReport) -> None:
        if report.since is None and report.number > self.number:
            self.by_name = _by_name(report)
        elif report.since == self.number:
            self.by_name.update(_by_name(report))
            for name in report.gone:
                self.by_name.pop(name, None)
        else:
            return
        self.number = report.number


def _by_name(report: VariantReport) -> dict[str, VariantStatus]:
    return {status.name: status for status in report.variants}
