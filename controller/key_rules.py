"""What a request may ask for, by its API key: an urgent priority, and ever new combinations of adapters.

Pure Python, an injected clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from controller.auth import Principal
from controller.config import LimitsConfig
from controller.protocol import LoraWeight
from registry.errors import PermissionDeniedError, RateLimitError

COMBINATIONS_WINDOW_S = 300.0
"""For how long after its last use a combination counts."""

_Combination = tuple[str, frozenset[tuple[str, float]]]  # base model, names and scales


class KeyRules:
    """Callers without a key, where none is asked for, may give any priority, and share one count of combinations.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, config: LimitsConfig, clock: Callable[[], float]) -> None:
        self._min_priority = config.min_priority
        self._max_combinations = config.max_lora_combinations_per_key
        self._clock = clock
        # By key: when each was used last, the one that has not been used for longest first.
        self._combinations: dict[str | None, OrderedDict[_Combination, float]] = {}

    def check(self, principal: Principal | None, model: str, loras: Sequence[LoraWeight], priority: int) -> None:
        """Count a request.

        Raises:
            PermissionDeniedError: the key may not ask for that priority.
            RateLimitError: the key has used too many combinations lately; `retry_after_s` is set.
        """
        if principal is not None and not principal.admin and priority < self._min_priority:
            raise PermissionDeniedError(
                f"this API key may ask for a priority of {self._min_priority} or more (less urgent), not {priority}; "
                "leave it out, or ask an operator (--min-priority, or an admin key)",
                param="priority",
            )
        if loras and not (len(loras) == 1 and loras[0].scale == 1.0):
            combination = model, frozenset((lora.name, lora.scale) for lora in loras)
            self._count(None if principal is None else principal.key_id, combination)

    def _count(self, key_id: str | None, combination: _Combination) -> None:
        now = self._clock()
        used = self._combinations.setdefault(key_id, OrderedDict())
        while used and now - next(iter(used.values())) > COMBINATIONS_WINDOW_S:
            used.popitem(last=False)
        if combination not in used and len(used) >= self._max_combinations:
            retry_after_s = next(iter(used.values())) + COMBINATIONS_WINDOW_S - now
            raise RateLimitError(
                f"{len(used)} combinations of adapters and scales were used with this API key within the last "
                f"{COMBINATIONS_WINDOW_S:.0f} seconds, the most that one may; use one of them again, or wait",
                param="loras",
                retry_after_s=retry_after_s,
            )
        used[combination] = now
        used.move_to_end(combination)
