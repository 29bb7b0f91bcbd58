"""The adapters of one worker as its outside sees them: where they come from, how they are prompted, their states."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.load_plan import LoadPlan
from adapters.prompt_format import PromptFormat, read_prompt_format
from adapters.tokenizer import Tokenizer
from controller.protocol import AddVariantRequest, ProbePassed, VariantKind, VariantStatus
from delta.fine_tune_files import is_delta
from model_worker.adapter_root import AdapterRoot
from model_worker.config import GivenVariant
from model_worker.engine.lora import variant_status
from model_worker.engine_loras import EngineLoras
from model_worker.published_variants import PublishedVariants
from model_worker.shared_prompt_format import shared_prompt_format
from model_worker.signature_check import SignatureCheck
from registry.errors import (
    CheckpointError,
    InsufficientMemoryError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    RootgraftError,
)
from registry.names import is_name, is_variant_name
from registry.published_files import PublishedFiles

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 0.1
"""How long a report of all adapters waits for the end of a step; a heartbeat must not come late."""

_TRIAL = "@trial"  # after a variant's name: of what is to replace it, until it has passed its probe

CLEAN_AGAIN_S = 10.0  # after the files of old versions could not be removed

Change = Callable[[str], Awaitable[variant_status.VariantStatus]]


@dataclass(frozen=True, slots=True)
class _Adapter:
    path: str  # that the engine reads
    prompts: PromptFormat
    from_command_line: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a variant was read from, as the outside sees it."""

    given_path: str
    kind: VariantKind


class Variants:
    """Adds, removes and lists the adapters of one base model.

    Args:
        parent: public name of the base model.
        root: below which adapters that are named over HTTP must be.
        published: where published versions are fetched to; None: there can be none.
        with_templates: adapters' own chat templates are used; False: the operator chose one for all.
        check_signature: blocks while it reads a fine-tune's directory; raises RootgraftError if it may not be served.
            None: all may.
        probe: asks what was read, a name and a directory, whether it works; raises RootgraftError if not.
    """

    def __init__(
        self,
        engine: EngineLoras,
        plan: LoadPlan,
        tokenizer: Tokenizer,
        *,
        parent: str,
        root: AdapterRoot,
        published: PublishedVariants | None = None,
        with_templates: bool,
        check_signature: SignatureCheck | None = None,
        probe: Callable[[str, Path], Awaitable[ProbePassed | None]] | None = None,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._tokenizer = tokenizer
        self._parent = parent
        self._root = root
        self._published = published
        self._with_templates = with_templates
        self._check_signature = check_signature
        self._probe = probe
        self._probing: str | None = None  # a name: it is read, but nobody may count on it yet
        self._proven: dict[str, ProbePassed | None] = {}  # by digest; None: there was nothing to ask
        self._adapters: dict[str, _Adapter] = {}
        self._sources: dict[str, _Source] = {}  # by the path that the engine reads; `statuses` forgets old ones
        self._adding: str | None = None  # such a path: of the addition under way, or of the last one
        self._messages: dict[variant_status.VariantStatus, VariantStatus] = {}  # those of the last report
        self._listing: asyncio.Task[list[VariantStatus]] | None = None  # begun by a report, and not over yet
        self._used = False  # there is an adapter, or was one
        self._found: Counter[Path] = Counter()  # directories of published versions that are being added
        self._cleaning: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # adding and removing take turns, so that both sides keep the same names

    # ------------------------------------------------------------------------------------------ operators

    async def load(self, given: Sequence[GivenVariant], report: Callable[[str], None]) -> None:
        """Load the adapters of the command line, and activate those that are pinned.

        Raises:
            RootgraftError: one of them is refused; the message names it.
        """
        for adapter in given:
            start_s = time.perf_counter()
            try:
                self._check_name(adapter.name)
                if adapter.flag == "--delta" and not is_delta(adapter.path):
                    raise CheckpointError("It holds no delta, since delta_config.json is missing; check the path.")
                status = await self._add(
                    adapter.name,
                    adapter.path.resolve(),
                    str(adapter.path),
                    pinned=adapter.pinned,
                    from_command_line=True,
                )
                if adapter.pinned:
                    status = await self._message(self._engine.activate(adapter.name))
            except RootgraftError as error:
                raise type(error)(f"{adapter.flag} {adapter.name}={adapter.path}: {error.message}") from error
            mib = max(status.host_bytes, status.active_bytes) / 2**20
            state = "pinned" if status.pinned else status.state.replace("_", " ")
            seconds = time.perf_counter() - start_s
            noun = _noun(status).capitalize()
            report(f"{noun} {status.name}: rank {status.rank}, {mib:.1f} MiB, {seconds:.2f} s, {state}.")

    async def add(self, request: AddVariantRequest) -> VariantStatus:
        """Read an adapter below the root, or a published version, and serve it. One that is refused is forgotten.

        Raises:
            RootgraftError: why it is refused.
        """
        self._check_parent(request.parent)
        self._check_name(request.name, is_version=request.files is not None)
        known = self._adapters.get(request.name)
        if known is not None and known.from_command_line:
            raise PermissionDeniedError(
                f"This worker has {request.name} from its command line; choose another name, or start it without that.",
                param="name",
            )
        with self._finding(request):
            path = await asyncio.to_thread(self._find, request)
            status = await self._add(request.name, path, request.path, pinned=request.pinned, from_command_line=False)
        logger.info("%s %s: rank %d, read from %r", _noun(status), status.name, status.rank, request.path)
        return status

    async def remove(self, name: str) -> VariantStatus:
        """Serve it no more; requests that have it already go on."""
        async with self._changing:
            if self._known(name).from_command_line:
                raise PermissionDeniedError(
                    f"This worker has {name} from its command line; start it without that to remove it.",
                    param="name",
                )
            status = await self._message(self._engine.remove(name))
            del self._adapters[name]
            logger.info("%s removed", name)
            return status

    async def pin(self, name: str) -> VariantStatus:
        return await self._change(self._engine.pin, name)

    async def unpin(self, name: str) -> VariantStatus:
        return await self._change(self._engine.unpin, name)

    async def activate(self, name: str) -> VariantStatus:
        return await self._change(self._engine.activate, name)

    async def evict(self, name: str) -> VariantStatus:
        return await self._change(self._engine.evict, name)

    async def statuses(self) -> list[VariantStatus]:
        """Of all adapters that have a name, or had one and still have requests.

        Raises:
            InternalError: the engine has died.
        """
        if not self._used:
            return []
        statuses = [status for status in await self._engine.list() if not status.name.endswith(_TRIAL)]
        in_use = {status.path for status in statuses} | {adapter.path for adapter in self._adapters.values()}
        self._sources = {
            path: source for path, source in self._sources.items() if path in in_use or path == self._adding
        }
        self._release(in_use)
        messages = {status: self._messages.get(status) for status in statuses}
        self._messages = {status: message or self._to_message(status) for status, message in messages.items()}
        return list(self._messages.values())

    async def clean(self) -> None:
        """Remove the files of published versions that nobody needs any more, as soon as that can be done."""
        if self._published is None:
            return
        while True:
            if await asyncio.to_thread(self._published.clean):
                return
            await asyncio.sleep(CLEAN_AGAIN_S)

    async def report(self) -> list[VariantStatus]:
        """As `statuses`, but those of the last time when the engine is in the middle of a long step, or has died.

        The question stays asked, so that the next report has an answer that is at most one step older.
        """
        if self._listing is None:
            self._listing = asyncio.create_task(self.statuses())
            self._listing.add_done_callback(lambda task: task.cancelled() or task.exception())  # asked for or not
        await asyncio.wait({self._listing}, timeout=REPORT_TIMEOUT_S)
        if self._listing.done():
            with suppress(InternalError):
                self._listing.result()
            self._listing = None
        return list(self._messages.values())

    # ------------------------------------------------------------------------------------------ requests

    def prompt_format(self, names: Iterable[str]) -> PromptFormat:
        """How a request is prompted that names these adapters together.

        Raises:
            ModelNotFoundError: one is not there.
            InvalidRequestError: their chat templates or tokenizers differ.
        """
        return shared_prompt_format({name: self._known(name).prompts for name in names})

    # ------------------------------------------------------------------------------------------ internal

    async def _add(
        self, name: str, path: Path, given_path: str, *, pinned: bool, from_command_line: bool
    ) -> VariantStatus:
        async with self._changing:
            self._adding = str(path)
            source = _Source(given_path, "delta" if is_delta(path) else "lora")
            self._sources[self._adding] = source
            if self._check_signature is not None:
                await asyncio.to_thread(self._check_signature, path)
            prompts = await asyncio.to_thread(
                read_prompt_format, path, self._plan, self._tokenizer, with_template=self._with_templates
            )
            try:
                if name in self._adapters and source.kind == "delta":
                    await self._try_out(name, path)
                added = self._engine.add(
                    name, path, parent=self._parent, pinned=pinned, from_command_line=from_command_line
                )
                status = await self._message(self._proved(name, path, added))
            except RootgraftError:
                if name not in self._adapters:  # a report may have seen it being read
                    self._messages = {known: other for known, other in self._messages.items() if other.name != name}
                raise
            self._adapters[name] = _Adapter(self._adding, prompts, from_command_line)
            self._used = True
            return status

    async def _proved(
        self, name: str, path: Path, added: Awaitable[variant_status.VariantStatus]
    ) -> variant_status.VariantStatus:
        """What was added, once it has passed its probe. One that fails is removed again."""
        if self._probe is None:
            return await added
        if name not in self._adapters:
            self._probing = name
        try:
            status = await added
            if status.digest is None or status.digest in self._proven:
                return status
            try:
                self._proven[status.digest] = await self._probe(name, path)
            except BaseException:
                self._adapters.pop(name, None)
                await self._engine.remove(name)
                raise
            return status
        finally:
            self._probing = None
            # What a report has said of it meanwhile is said no more.
            self._messages = {known: other for known, other in self._messages.items() if other.name != name}

    async def _try_out(self, name: str, path: Path) -> None:
        """Ask the probe of a delta that is to replace another, under a name that no request can have.

        Where there is no room for both, it is asked once it has replaced the other (`_proved`).

        Raises:
            RootgraftError: it cannot be read, or fails; what it was to replace goes on.
        """
        if self._probe is None:
            return
        trial = name + _TRIAL
        try:
            status = await self._engine.add(trial, path, parent=self._parent, pinned=False, from_command_line=False)
            if status.digest is not None and status.digest not in self._proven:
                self._proven[status.digest] = await self._probe(trial, path)
        except InsufficientMemoryError:
            logger.warning("%s is replaced before its probe is asked: there is no room for both", name)
        finally:
            with suppress(ModelNotFoundError):  # it could not be read
                await self._engine.remove(trial)

    @contextmanager
    def _finding(self, request: AddVariantRequest) -> Iterator[None]:
        """While it lasts the directory of a published version is not released."""
        if self._published is None or request.files is None:
            yield
            return
        path = self._published.path(PublishedFiles(request.files))
        self._found[path] += 1
        self._used = True
        try:
            yield
        finally:
            self._found[path] -= 1
            self._found += Counter()  # forgets those that are 0

    def _release(self, in_use: Collection[str]) -> None:
        """Give up the directories of published versions that are in use no more, and remove them in the background."""
        if self._published is None:
            return
        unused = [path for path in self._published.held if str(path) not in in_use and not self._found[path]]
        if unused:
            self._published.release(unused)
            if self._cleaning is not None:
                self._cleaning.cancel()  # it would clean later than this one
            self._cleaning = asyncio.create_task(self.clean(), name="clean-published-versions")

    async def _change(self, change: Change, name: str) -> VariantStatus:
        self._known(name)
        return await self._message(change(name))

    async def _message(self, change: Awaitable[variant_status.VariantStatus]) -> VariantStatus:
        """What a change came to, which a report that has to repeat the last one must not contradict."""
        status = await change
        message = self._to_message(status)
        others = {known: other for known, other in self._messages.items() if other.name != message.name}
        self._messages = {**others, status: message}
        return message

    def _to_message(self, status: variant_status.VariantStatus) -> VariantStatus:
        message = VariantStatus.model_validate(status, from_attributes=True)
        source = self._sources[status.path]
        update: dict[str, object] = {
            "kind": source.kind,
            "path": source.given_path,
            "probe": self._proven.get(status.digest or ""),
        }
        if status.name == self._probing and status.state != "draining":
            update["state"] = "registered"
        return message.model_copy(update=update)

    def _known(self, name: str) -> _Adapter:
        adapter = self._adapters.get(name)
        if adapter is None:
            raise ModelNotFoundError(
                f"This worker has no adapter {name}; GET /v1/models lists what is served.", param="model"
            )
        return adapter

    def _check_parent(self, parent: str) -> None:
        if parent != self._parent:
            raise ModelNotFoundError(f"This worker serves {self._parent}, not {parent}.", param="parent")

    def _find(self, request: AddVariantRequest) -> Path:
        if request.files is None:
            return self._root.find(request.path)
        files = PublishedFiles(request.files)
        if request.path != files.manifest_digest:
            raise InvalidRequestError(f"{request.path[:80]!r} is not the digest of these files.", param="path")
        if self._published is None:
            raise PermissionDeniedError("This worker serves no published versions.", param="files")
        return self._published.fetch(files)

    def _check_name(self, name: str, *, is_version: bool = False) -> None:
        if not (is_variant_name(name) if is_version else is_name(name)):
            raise InvalidRequestError(
                f"{name!r} is no name for an adapter; take letters, digits and . _ - in segments joined by /.",
                param="name",
            )
        if name == self._parent:
            raise InvalidRequestError(f"{name} is the base model's own name; choose another.", param="name")


def _noun(status: VariantStatus) -> str:
    """As people call it."""
    return "delta" if status.kind == "delta" else "adapter"
