"""The engine for an event loop: it runs in a thread of its own, and neither side ever waits for the other's work."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from adapters.tokenizer import Tokenizer
from model_worker.engine.executor import ExecutorLostError
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.async_loras import AsyncLoras, LoraCall
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import EngineStats, RequestOutput
from model_worker.engine.request_tracker import News, RequestTracker
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import InternalError, RootgraftError

logger = logging.getLogger(__name__)

_STALLED_S = 0.5  # between signs of life while all requests wait for adapters


@dataclass(frozen=True, slots=True)
class _Add:
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    loras: tuple[LoraWeight, ...]
    tokenizer: Tokenizer | None


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class _Loaded:
    """An adapter was."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """The executor is."""

    error: ExecutorLostError


class _Stop:
    pass


_Command = _Add | _Abort | LoraCall | _Loaded | _Lost | _Stop


class AsyncLLMEngine:
    """Runs an LLMEngine in a thread; requests are async generators.

    Commands travel to the thread through a queue and are carried out between steps; news travel back once a step.

    Attributes:
        failed: what ended the engine thread, if anything did; every request then gets an InternalError, and the
            process should end.
        num_steps: computed so far; while it grows, a request that gets nothing is only waiting for its turn. Grows too
            while adapters are loaded.
        loras: the LoRA adapters.
    """

    def __init__(self, engine: LLMEngine, *, on_failure: Callable[[], None] | None = None) -> None:
        self.tokenizer = engine.tokenizer
        self.max_model_len = engine.max_model_len
        self.failed: BaseException | None = None
        self.num_steps = 0
        self._engine = engine
        self._on_failure = on_failure
        self._tracker = RequestTracker()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self.loras = AsyncLoras(self._commands.put)
        engine.on_adapter_loaded(lambda: self._commands.put(_Loaded()))
        engine.on_lost(lambda error: self._commands.put(_Lost(error)))
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._stats = engine.stats()

    async def start(self) -> None:
        """Start the engine thread; its news are delivered to the running event loop."""
        assert self._thread is None
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the engine thread after the step that it is in; requests still open, and later ones, get an error."""
        self._stopped = True
        if self._thread is not None:
            self._commands.put(_Stop())
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self._tracker.fail_all(_shutting_down())
        self.loras.fail_all(_shutting_down())
        self._engine.close()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        loras: Sequence[LoraWeight] = (),
        tokenizer: Tokenizer | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the news of one request until it is finished. Closing the generator cancels the request.

        News that came while the caller was busy come as one output.

        Args:
            loras: adapters that are added to the base, all at once.
            tokenizer: turns sampled ids into text; None: the model's.

        Raises:
            ClientError: the request was not accepted (before anything was yielded).
            InternalError: the engine has died, or was stopped.
        """
        if self._stopped:  # nobody reads the commands any more
            raise _shutting_down()
        if self.failed is not None:
            raise InternalError("The engine of this model worker has failed; see its log.")
        mailbox = self._tracker.open(request_id)
        self._commands.put(_Add(request_id, prompt_token_ids, sampling, tuple(loras), tokenizer))
        finished = False
        try:
            while not finished:
                for item in await mailbox.take():
                    if isinstance(item, RootgraftError):
                        finished = True
                        raise item
                    finished = item.finished
                    yield item
                    if finished:
                        break  # whatever failed after that is no news of this request
        finally:
            self._tracker.close(request_id)
            if not finished:
                self._commands.put(_Abort(request_id))

    def stats(self) -> EngineStats:
        """The state after the last step or command."""
        return self._stats

    # ------------------------------------------------------------------------------------------ engine thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._obey_commands(loop):
                if self._engine.has_unfinished_requests:
                    self._deliver(loop, [(output.request_id, output) for output in self._engine.step()])
                    self.num_steps += 1
                else:
                    self._engine.advance_loras()
                if not self._engine.has_unfinished_requests:
                    self._engine.rest()
                    self._engine.check_idle()
                self._stats = self._engine.stats()
        except BaseException as error:  # a bug in scheduling or accounting: nothing it holds can be trusted any more
            logger.exception("The engine thread has failed.")
            self.failed = error
            failure = InternalError("The engine of this model worker has failed; see its log.")
            loop.call_soon_threadsafe(self._tracker.fail_all, failure)
            loop.call_soon_threadsafe(self.loras.fail_all, failure)
            if self._on_failure is not None:
                loop.call_soon_threadsafe(self._on_failure)
        finally:
            self._engine.profiler.close()

    def _obey_commands(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Carry out what is queued, waiting for it only when there is nothing to compute; False: stop."""
        idle = not self._engine.has_unfinished_requests
        refused: list[tuple[str, News]] = []
        while idle or self._engine.stalled or not self._commands.empty():
            try:
                command = self._commands.get(timeout=None if idle else _STALLED_S)
            except queue.Empty:
                break
            idle = False
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Loaded):
                break
            if isinstance(command, _Lost):
                raise command.error
            if isinstance(command, _Abort):
                self._engine.abort_request(command.request_id)
            elif isinstance(command, LoraCall):
                command.carry_out(self._engine)
            elif (refusal := self._add(command)) is not None:
                refused.append(refusal)
        self._deliver(loop, refused)
        return True

    def _add(self, command: _Add) -> tuple[str, News] | None:
        """None, or why a request is refused."""
        try:
            self._engine.add_request(
                command.request_id,
                command.prompt_token_ids,
                command.sampling,
                loras=command.loras,
                tokenizer=command.tokenizer,
            )
        except RootgraftError as error:
            return command.request_id, error
        return None

    def _deliver(self, loop: asyncio.AbstractEventLoop, news: list[tuple[str, News]]) -> None:
        if news:
            with self._engine.profiler.span("deliver", requests=len(news)):
                loop.call_soon_threadsafe(self._tracker.deliver, news)


def _shutting_down() -> InternalError:
    return InternalError("The model worker is shutting down; send the request again.")
