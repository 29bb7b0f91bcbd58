"""Models that are divided among ranks, whose processes start in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adapters.load_plan import LoadPlan
from model_worker.engine.config import EngineConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.adapters_of_model import make_lora_manager
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.parallel.ranks import Ranks, RunningRank
from model_worker.engine.parallel.shared_variants import SharedVariants
from model_worker.engine.parallel.start import start_ranks
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.rank_launcher import fork_rank


@contextmanager
def divided_runner(
    plan: LoadPlan, config: EngineConfig, *, launch: Callable[[], RunningRank] = fork_rank
) -> Iterator[ModelRunner]:
    """Of `config.tensor_parallel_size` ranks, which end with the context."""
    runner, ranks = start_ranks(plan, config, launch=launch)
    try:
        yield runner
    finally:
        ranks.close()


@contextmanager
def engine_of(
    plan: LoadPlan, config: EngineConfig, *, launch: Callable[[], RunningRank] = fork_rank
) -> Iterator[LLMEngine]:
    """An engine with variants over a model that is divided, or whole if its size is 1."""
    ranks: Ranks | None = None
    if config.tensor_parallel_size > 1:
        runner, ranks = start_ranks(plan, config, launch=launch)
    else:
        runner = ModelRunner(plan, config)
    binder = None if ranks is None else SharedVariants(runner.model, ranks)
    engine = LLMEngine(
        config,
        runner,
        ByteTokenizer(),
        stop_token_ids=(),
        max_model_len=plan.max_model_len,
        loras=make_lora_manager(config.lora, runner.model, base_digest="", binder=binder),
        ranks=ranks,
    )
    try:
        yield engine
    finally:
        engine.close()
