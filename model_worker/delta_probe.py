"""A delta's probe, asked of this worker's own engine as ordinary requests, so that it holds for every way of computing.

A delta that was read without an error can still be computed wrongly here: by another version of a kernel, on another
processor, beside a base that is rounded to few bits. Its maker's questions tell (docs/formats/delta.md).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from controller.protocol import ProbePassed
from delta.delta_config import CONFIG_FILE, read_delta_config
from delta.probe_check import check_probe
from delta.quality_record import Probe, ProbeCase
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import RequestOutput
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import InternalError, OverloadedError, ProbeFailedError

logger = logging.getLogger(__name__)

TIMEOUT_S = 120.0
_NUM_MORE_LOGPROBS = 8  # than a case names: what the engine holds for likeliest may be in another order
_MAX_LOGPROBS = 20  # of the engine

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


class DeltaProbe:
    """Args:
    generate: `AsyncLLMEngine.generate`.
    max_model_len: longer cases are not asked.
    weights: of the base as it is served: "int8", "int4" or a dtype.
    """

    def __init__(self, generate: Generate, *, max_model_len: int, weights: str) -> None:
        self._generate = generate
        self._max_model_len = max_model_len
        self._weights = weights
        self._numbers = itertools.count()

    async def __call__(self, name: str, directory: Path) -> ProbePassed | None:
        """Ask the probe of the variant `name`, which the engine has read from `directory`. -> None: it has none

        Raises:
            ProbeFailedError: it answers otherwise than its maker measured.
            OverloadedError: the engine had no time for it.
        """
        probe = await asyncio.to_thread(_read_probe, directory)
        if probe is None:
            return None
        cases = tuple(case for case in probe.cases if len(case.token_ids) < self._max_model_len)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answers = await asyncio.gather(*(self._ask(name, case) for case in cases))
        except TimeoutError:
            raise OverloadedError(
                f"The probe of {name} was not answered within {TIMEOUT_S:.0f} s; it is tried again.",
                retry_after_s=TIMEOUT_S,
            ) from None
        result = check_probe(Probe(cases, probe.tolerance), answers, self._weights)
        if result.failures:
            raise ProbeFailedError(
                f"{name} fails {len(result.failures)} of the {len(cases)} cases of its probe: {result.failures[0]}",
                param="files",
            )
        logger.info("%s passes its probe of %d cases", name, len(cases))
        return ProbePassed(num_cases=len(cases), max_difference=result.max_difference, tolerance=result.tolerance)

    async def _ask(self, name: str, case: ProbeCase) -> dict[int, float]:
        """Log probability of the likeliest next tokens, by id."""
        num_top = min(len(case.top_token_ids) + _NUM_MORE_LOGPROBS, _MAX_LOGPROBS)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=num_top, ignore_eos=True)
        request_id = f"probe-{next(self._numbers)}"
        stream = self._generate(request_id, list(case.token_ids), sampling, loras=(LoraWeight(name, 1.0),))
        async with aclosing(stream) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                for delta in output.deltas:
                    if delta.logprobs:
                        return {top.token_id: top.logprob for top in delta.logprobs[0].top}
        raise InternalError(f"The engine gave no answer to the probe of {name}.")


def _read_probe(directory: Path) -> Probe | None:
    return read_delta_config(directory).probe if (directory / CONFIG_FILE).is_file() else None
