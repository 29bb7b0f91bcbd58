"""Public names: what each stands for now, and the list of those that are served."""

from __future__ import annotations

import difflib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from controller.protocol import GenerateRequest, LoraWeight, ServedModel
from controller.variants.directory import VariantDirectory
from controller.workers import Worker, WorkerTable
from registry.errors import InvalidRequestError, ModelNotFoundError

MAX_COMPARED = 200  # names, with one that nothing is called


@dataclass(frozen=True, slots=True)
class ServedName:
    """What a public name stands for: a model that workers serve, or with `parent` a variant of that model."""

    name: str
    parent: str | None = None


ResolveName = Callable[[str], Awaitable[ServedName | None]]


@dataclass(frozen=True, slots=True)
class ServedModelInfo:
    """A model or variant that live workers serve, merged over its replicas.

    Attributes:
        root: what it is: the digest of a variant's files, a model's own name. (vLLM says a variant's path here; where
            its files are is for operators, in GET /admin/variants.)
        parent: a variant's base model, from which it has the fields below.
        created: Unix time, seconds, at which this name was first served.
        max_model_len: tokens; the least of the replicas'.
        chat: whether every replica has a chat template.
    """

    name: str
    root: str
    parent: str | None
    family: str
    max_model_len: int
    chat: bool
    dtype: str
    digest: str | None
    created: int
    num_workers: int


class ServedNames:
    """Args:
    resolve: what a public name stands for in the catalog (an alias, a version); None when it has none.
    wall_clock: Unix time, seconds.
    """

    def __init__(
        self,
        workers: WorkerTable,
        variants: VariantDirectory,
        resolve: ResolveName,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._workers = workers
        self._variants = variants
        self._resolve = resolve
        self._wall_clock = wall_clock
        self._created: dict[str, int] = {}  # models
        self._variants_seen: dict[str, int] = {}  # those of command lines: when first

    async def resolve_request(self, request: GenerateRequest) -> GenerateRequest:
        """The request with served names in place of public ones, and a variant as its base model with that variant.

        Raises:
            ModelNotFoundError: no such model or variant.
            InvalidRequestError: `loras` are not variants of the model, or one is given twice.
        """
        served = await self.resolve(request.model)
        if served.parent is not None:
            if request.loras:
                raise InvalidRequestError(
                    f"{served.name} is a variant of {served.parent}; give {served.parent} as model, and {served.name} "
                    "as one of the loras",
                    param="loras",
                )
            return request.model_copy(update={"model": served.parent, "loras": [LoraWeight(name=served.name)]})
        loras = [await self._lora(served.name, lora) for lora in request.loras]
        names = [lora.name for lora in loras]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise InvalidRequestError(f"{repeated} is given twice; add up its scales", param="loras")
        return request.model_copy(update={"model": served.name, "loras": loras})

    async def _lora(self, model: str, lora: LoraWeight) -> LoraWeight:
        served = await self.resolve(lora.name, param="loras")
        if served.parent != model:
            what = "a model" if served.parent is None else f"a variant of {served.parent}"
            raise InvalidRequestError(f"{served.name} is {what}, not a variant of {model}", param="loras")
        return LoraWeight(name=served.name, scale=lora.scale)

    async def resolve(self, name: str, *, param: str = "model") -> ServedName:
        """Raises: ModelNotFoundError, about the request field `param`."""
        if self._workers.knows(name):
            return ServedName(name)
        parent = self._variants.parent_of(name)
        if parent is not None or name in self._created:
            return ServedName(name, parent)
        resolved = await self._resolve(name)
        if resolved is None:
            models, variants = sorted(self._workers.models()), sorted(self._variants.names())
            served = [variant for found in self._served_variants().values() for variant, _ in found]
            known = ", ".join(models) or "none"
            if variants:
                known += f", and {len(variants)} variant{'s' if len(variants) > 1 else ''}, see GET /v1/models"
            # The name comes from a client: escaped and cut, so that it cannot forge a log line.
            shown = f"{name[:80]!a} does not exist{await self._suggestion(name[:80], [*models, *served])}"
            raise ModelNotFoundError(f"the model {shown}; models served now: {known}", param=param)
        return resolved

    async def _suggestion(self, name: str, served: Sequence[str]) -> str:
        """What may have been meant: a name that can be asked for."""
        by_text = {text: known for known in served[:MAX_COMPARED] for text in (known.partition("@")[0], known)}
        close = difflib.get_close_matches(name, list(by_text), n=1, cutoff=0.7)
        if not close:
            return ""
        meant, known = close[0], by_text[close[0]]
        if meant != known and await self._resolve(meant) is None:  # no alias leads to this version
            meant = known
        return f", did you mean {meant}?"

    def models(self) -> list[ServedModelInfo]:
        """The models and variants that live workers serve now, by name; each model before its variants."""
        found: list[ServedModelInfo] = []
        of_parent = self._served_variants()
        for name, replicas in sorted(self._workers.models().items()):
            model = self._info(name, replicas)
            found += [model, *(self._variant_info(model, variant, on) for variant, on in of_parent.get(name, []))]
        return found

    def note_created(self, name: str, created: int | None) -> None:
        """Remember that `name` is a model that is served, and since when (Unix time, seconds; None: since now)."""
        if created is not None:
            self._created[name] = created
        else:
            self._created.setdefault(name, int(self._wall_clock()))

    def _served_variants(self) -> dict[str, list[tuple[str, list[Worker]]]]:
        """By model: its variants by name, each with the workers that can be asked for it now; none without one."""
        serving = {model: self._workers.serving(model) for model in self._workers.models()}
        found: dict[str, list[tuple[str, list[Worker]]]] = {}
        for name in sorted(self._variants.names()):
            parent = self._variants.parent_of(name)
            able = [worker for worker in serving.get(parent or "", ()) if self._variants.can_serve(worker, [name])]
            if parent is not None and able:
                found.setdefault(parent, []).append((name, able))
        return found

    def _variant_info(self, model: ServedModelInfo, name: str, on: Sequence[Worker]) -> ServedModelInfo:
        record = self._variants.wanted.get(name)
        if record is None:
            created = self._variants_seen.setdefault(name, int(self._wall_clock()))
        else:
            created = int(record.created_at.timestamp())
        status = on[0].variants[name]
        return replace(
            model,
            name=name,
            root=status.digest or name,
            parent=model.name,
            digest=status.digest,
            created=created,
            num_workers=len(on),
        )

    def _info(self, name: str, replicas: Sequence[tuple[Worker, ServedModel]]) -> ServedModelInfo:
        models = [model for _, model in replicas]
        return ServedModelInfo(
            name=name,
            root=name,
            parent=None,
            family=models[0].family,
            max_model_len=min(model.max_model_len for model in models),
            chat=all(model.chat for model in models),
            dtype=models[0].dtype,
            digest=models[0].digest,
            created=self._created.setdefault(name, int(self._wall_clock())),
            num_workers=len(models),
        )
