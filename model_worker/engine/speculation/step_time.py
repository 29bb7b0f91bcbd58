"""What a step of decoding costs as a function of its rows, fitted to the latest steps."""

from __future__ import annotations

_FORGET = 1.0 / 512.0  # share of the past that each step lets go
_MAX_OUTLIER = 3.0  # a step that took longer than this many times the expected time counts as so long
_MIN_SPREAD = 2.0  # steps that must differ from the others, for their difference to be told from noise


class StepTime:
    """seconds(rows) = fixed + row_s * rows, by least squares with exponential forgetting.

    Weights are read once a step and rows are computed one by one, so a straight line fits well within the range of rows
    that a batch meets. Sequences that come and go vary the rows; where they do not, `Speculator` has to.

    Attributes:
        mean_rows: of the latest steps.
        row_s: seconds for each row, at least 0.
    """

    __slots__ = ("_covariance", "_mean_s", "_variance", "_weight", "mean_rows")

    def __init__(self) -> None:
        self.mean_rows = 0.0
        self._mean_s = 0.0
        self._weight = 0.0
        self._variance = 0.0  # sum of weight * (rows - mean) ** 2
        self._covariance = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step that computed `num_rows` tokens, none of them of a prompt, took so long."""
        if self._weight:
            seconds = min(seconds, _MAX_OUTLIER * self.seconds(num_rows))
        keep = 1.0 - _FORGET
        self._weight = self._weight * keep + 1.0
        from_mean = num_rows - self.mean_rows
        self.mean_rows += from_mean / self._weight
        self._mean_s += (seconds - self._mean_s) / self._weight
        self._variance = self._variance * keep + from_mean * (num_rows - self.mean_rows)
        self._covariance = self._covariance * keep + from_mean * (seconds - self._mean_s)

    @property
    def row_s(self) -> float:
        if self._variance == 0.0:
            return 0.0
        most = self._mean_s / self.mean_rows  # more would make the fixed part negative
        return min(max(self._covariance / self._variance, 0.0), most)

    def seconds(self, num_rows: int) -> float:
        return self._mean_s + self.row_s * (num_rows - self.mean_rows)

    def tells_apart(self, num_rows: int) -> bool:
        """Whether steps have lately differed enough to know what `num_rows` more rows cost."""
        return self._variance >= _MIN_SPREAD * num_rows**2
