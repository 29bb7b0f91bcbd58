from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from controller.protocol import (
    AddVariantRequest,
    ChatMessage,
    ChatPrompt,
    DeltaEvent,
    DetokenizeRequest,
    DoneEvent,
    GenerateRequest,
    LoraWeight,
    Prompt,
    PromptEvent,
    Sampling,
    ServedModel,
    TextPrompt,
    TokenizeRequest,
    TokensPrompt,
)
from model_worker import prompt as prompt_module
from model_worker.engine.outputs import RequestOutput, SequenceDelta, TokenLogprobs
from model_worker.engine.sampling_params import SamplingParams
from model_worker.events import Event, EventBuilder, TokenNames
from model_worker.service import WorkerService
from registry.errors import (
    ContextLengthError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    RootgraftError,
)
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.load_plans import make_plan


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(ByteTokenizer())


@pytest.fixture
def service(engine: FakeEngine) -> WorkerService:
    return WorkerService(engine, make_plan(), "fake")


def request(
    prompt: Prompt | str, *, model: str = "fake", echo: bool = False, loras: tuple[str, ...] = (), **sampling: object
) -> GenerateRequest:
    if isinstance(prompt, str):
        prompt = TextPrompt(text=prompt)
    return GenerateRequest(
        request_id="r",
        model=model,
        loras=[LoraWeight(name=name) for name in loras],
        prompt=prompt,
        sampling=Sampling.model_validate(sampling),
        return_prompt_text=echo,
    )


def chat(*messages: tuple[str, str], **options: object) -> ChatPrompt:
    chat = [{"role": role, "content": content} for role, content in messages]
    return ChatPrompt.model_validate({"messages": chat, **options})


async def events_of(service: WorkerService, request: GenerateRequest) -> list[Event]:
    return [event async for step in service.generate(request) for event in step]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, DeltaEvent))


async def test_a_stream_is_one_prompt_event_deltas_and_one_done_event(service: WorkerService) -> None:
    events = await events_of(service, request("abc"))
    assert events == [
        PromptEvent(num_prompt_tokens=3),
        DeltaEvent(index=0, text="a", num_tokens=1),
        DeltaEvent(index=0, text="b", num_tokens=1),
        DeltaEvent(index=0, text="c", num_tokens=1, finish_reason="stop"),
        DoneEvent(num_prompt_tokens=3, num_cached_tokens=0, num_completion_tokens=3),
    ]


async def test_each_step_comes_as_one_list(service: WorkerService) -> None:
    steps = [step async for step in service.generate(request("ab", n=2))]
    assert [[event.kind for event in step] for step in steps] == [
        ["prompt", "delta", "delta"],
        ["delta", "delta", "done"],
    ]


async def test_chat_is_rendered_without_further_special_tokens_and_stops_where_the_template_says(
    engine: FakeEngine,
) -> None:
    service = WorkerService(engine, make_plan(stop=("user:", "x")), "fake")
    await events_of(service, request(chat(("user", "hi")), stop=["x", "y"]))
    _, token_ids, sampling = engine.requests[0]
    assert bytes(token_ids) == b"user: hi\nassistant: "
    assert sampling.stop == ("x", "y", "user:")


async def test_a_text_prompt_does_not_get_the_chat_templates_stop_strings(engine: FakeEngine) -> None:
    service = WorkerService(engine, make_plan(stop=("user:",)), "fake")
    await events_of(service, request("hi"))
    assert engine.requests[0][2].stop == ()


async def test_a_message_can_be_continued(service: WorkerService, engine: FakeEngine) -> None:
    prompt = chat(("user", "hi"), ("assistant", "Hel"), add_generation_prompt=False, continue_final_message=True)
    await events_of(service, request(prompt))
    assert bytes(engine.requests[0][1]) == b"user: hi\nassistant: Hel"


async def test_chat_without_a_template_is_refused_with_the_remedy(engine: FakeEngine) -> None:
    service = WorkerService(engine, make_plan(chat=False), "fake")
    assert not service.model.chat
    with pytest.raises(InvalidRequestError, match="--chat-template") as caught:
        await events_of(service, request(chat(("user", "hi"))))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "continue_final_message"])
async def test_template_variables_cannot_replace_fields(service: WorkerService, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        await events_of(service, request(chat(("user", "hi"), chat_template_kwargs={name: True})))


async def test_the_engines_complaint_about_a_chat_names_messages(service: WorkerService) -> None:
    with pytest.raises(ContextLengthError) as caught:
        await events_of(service, request(chat(("user", "x" * 300))))
    assert caught.value.param == "messages"
    with pytest.raises(ContextLengthError) as caught:
        await events_of(service, request("x" * 300))
    assert caught.value.param == "prompt"


async def test_long_texts_are_tokenized_off_the_event_loop(
    service: WorkerService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    threads: list[str] = []
    encode = engine.tokenizer.encode

    def spy(text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(engine.tokenizer, "encode", spy)
    await service.tokenize(TokenizeRequest(model="fake", prompt=TextPrompt(text="short")))
    long = "x" * (prompt_module.MAX_INLINE_CHARS + 1)
    await service.tokenize(TokenizeRequest(model="fake", prompt=TextPrompt(text=long)))
    await service.tokenize(TokenizeRequest(model="fake", prompt=chat(("user", long))))
    assert threads[0] == threading.main_thread().name
    assert all(name.startswith("tokenize") for name in threads[1:])
    assert len(threads) == 3


@pytest.mark.parametrize("token_id", [-1, 258, 2**40])
async def test_ids_outside_the_vocabulary_are_refused(service: WorkerService, token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=str(token_id)):
        await events_of(service, request(TokensPrompt(token_ids=[1, token_id])))
    with pytest.raises(InvalidRequestError, match=str(token_id)):
        await service.detokenize(DetokenizeRequest(model="fake", token_ids=[token_id]))


async def test_prompt_text_for_echo(service: WorkerService) -> None:
    for prompt in (TextPrompt(text="hé"), TokensPrompt(token_ids=list("hé".encode()))):
        first = (await events_of(service, request(prompt, echo=True)))[0]
        assert isinstance(first, PromptEvent)
        assert first.prompt_text == "hé"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A root with two adapters, of which one has prompts of its own."""
    (tmp_path / "plain").mkdir()
    pirate = tmp_path / "pirate"
    pirate.mkdir()
    (pirate / "chat_template.jinja").write_text("{% for message in messages %}Arr, {{ message.content }}{% endfor %}")
    (pirate / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    return tmp_path


async def with_adapters(engine: FakeEngine, root: Path) -> WorkerService:
    service = WorkerService(engine, make_plan(), "fake", adapter_root=root)
    for name in ("plain", "pirate"):
        await service.variants.add(AddVariantRequest(name=name, parent="fake", path=name))
    return service


async def test_an_adapter_that_the_worker_has_not_is_not_answered_by_the_base(
    service: WorkerService, engine: FakeEngine
) -> None:
    with pytest.raises(ModelNotFoundError, match="pirate"):
        await events_of(service, request("a", loras=("pirate",)))
    assert not engine.requests


async def test_adapters_reach_the_engine_with_their_scales(engine: FakeEngine, adapters: Path) -> None:
    service = await with_adapters(engine, adapters)
    for loras in ((), ("plain",), ("plain", "pirate")):
        await events_of(service, request("a", loras=loras))
    wanted = request("a").model_copy(update={"loras": [LoraWeight(name="plain", scale=0.5)]})
    await events_of(service, wanted)
    assert engine.requested_loras == [(), (("plain", 1.0),), (("plain", 1.0), ("pirate", 1.0)), (("plain", 0.5),)]


async def test_a_chat_is_rendered_by_the_adapters_own_template_and_ends_where_it_says(
    engine: FakeEngine, adapters: Path
) -> None:
    service = await with_adapters(engine, adapters)
    hi = chat(("user", "hi"))
    await events_of(service, request(hi, loras=("pirate",), stop_token_ids=[3]))
    await events_of(service, request(hi, loras=("pirate",), stop_token_ids=[3], ignore_eos=True))
    await events_of(service, request(hi, loras=("plain",)))
    await events_of(service, request(hi))
    assert [bytes(token_ids) for _, token_ids, _ in engine.requests] == [
        b"Arr, hi",
        b"Arr, hi",
        b"user: hi\nassistant: ",
        b"user: hi\nassistant: ",
    ]
    assert [sampling.stop_token_ids for _, _, sampling in engine.requests] == [(3, ord("!")), (3,), (), ()]
    asked = TokenizeRequest(model="fake", loras=[LoraWeight(name="pirate")], prompt=hi)
    assert bytes((await service.tokenize(asked)).token_ids) == b"Arr, hi"


async def test_a_fine_tunes_own_tokens_are_its_own(engine: FakeEngine, adapters: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.backend.add_special_tokens(["<parrot>"])
    tokenizer.backend.save(str(adapters / "plain" / "tokenizer.json"))
    (adapters / "plain" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    service = await with_adapters(engine, adapters)
    prompt = TextPrompt(text="a<parrot>")
    await events_of(service, request(prompt, loras=("plain",)))
    await events_of(service, request(prompt))
    assert [token_ids for _, token_ids, _ in engine.requests] == [[ord("a"), 258], list(b"a<parrot>")]
    assert [tokenizer is None for tokenizer in engine.requested_tokenizers] == [False, True]
    plain = [LoraWeight(name="plain")]
    reply = await service.tokenize(TokenizeRequest(model="fake", loras=plain, prompt=prompt, return_token_strs=True))
    assert reply.token_strs == ["a", "<parrot>"]
    assert (await service.detokenize(DetokenizeRequest(model="fake", loras=plain, token_ids=[258]))).text == "<parrot>"
    with pytest.raises(InvalidRequestError, match="258"):
        await service.detokenize(DetokenizeRequest(model="fake", token_ids=[258]))
    with pytest.raises(InvalidRequestError, match="tokens of its own"):
        await events_of(service, request(prompt, loras=("plain", "pirate")))


async def test_an_adapter_may_bring_a_template_to_a_base_without(engine: FakeEngine, adapters: Path) -> None:
    service = WorkerService(engine, make_plan(chat=False), "fake", adapter_root=adapters)
    await service.variants.add(AddVariantRequest(name="pirate", parent="fake", path="pirate"))
    await events_of(service, request(chat(("user", "hi")), loras=("pirate",)))
    with pytest.raises(InvalidRequestError, match="--chat-template"):
        await events_of(service, request(chat(("user", "hi"))))


async def test_another_models_name_is_refused(service: WorkerService) -> None:
    with pytest.raises(ModelNotFoundError, match="fake"):
        await events_of(service, request("a", model="other"))
    with pytest.raises(ModelNotFoundError):
        await service.tokenize(TokenizeRequest(model="other", prompt=TextPrompt(text="a")))
    with pytest.raises(ModelNotFoundError):
        await service.detokenize(DetokenizeRequest(model="other", token_ids=[1]))


def test_protocol_and_engine_have_the_same_sampling_fields_and_defaults() -> None:
    theirs = {field.name for field in dataclasses.fields(SamplingParams)}
    assert theirs == Sampling.model_fields.keys()
    engine, wire = SamplingParams(), Sampling()
    for name in theirs:
        value = getattr(wire, name)
        assert getattr(engine, name) == (tuple(value) if isinstance(value, list) else value)


async def test_sampling_parameters_reach_the_engine(service: WorkerService, engine: FakeEngine) -> None:
    given = {"n": 2, "temperature": 0.5, "seed": 7, "stop_token_ids": [3], "logit_bias": {"5": -1.0}, "max_tokens": 2}
    await events_of(service, request("abc", **given))
    assert engine.requests[0][2] == SamplingParams(
        n=2, temperature=0.5, seed=7, stop_token_ids=(3,), logit_bias={5: -1.0}, max_tokens=2
    )


async def test_bad_sampling_parameters_name_their_field(service: WorkerService, engine: FakeEngine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await events_of(service, request("a", top_p=0.0))
    assert caught.value.param == "top_p"
    assert not engine.requests


async def test_logprobs_carry_text_and_bytes_of_partial_characters(service: WorkerService) -> None:
    events = await events_of(service, request("é", logprobs=1, prompt_logprobs=1))
    first = events[0]
    assert isinstance(first, PromptEvent)
    assert first.prompt_token_strs == ["\ufffd", "\ufffd"]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert first.prompt_logprobs[1] is not None
    assert first.prompt_logprobs[1].bytes == [0xA9]
    deltas = [event for event in events if isinstance(event, DeltaEvent)]
    assert [delta.logprobs[0].bytes for delta in deltas if delta.logprobs] == [[0xC3], [0xA9]]
    assert deltas[0].logprobs is not None
    assert [top.token_id for top in deltas[0].logprobs[0].top] == [0xC3]


async def test_minus_infinity_becomes_a_number_and_nan_an_error() -> None:
    def build(logprob: float) -> list[Event]:
        builder = EventBuilder(TokenNames(ByteTokenizer()), [65], prompt_text=None)
        delta = SequenceDelta(0, "A", (65,), (TokenLogprobs(65, logprob, ()),))
        return builder.build(RequestOutput("r", 1, 0, (delta,)))

    delta = build(-math.inf)[1]
    assert isinstance(delta, DeltaEvent)
    assert delta.logprobs is not None
    assert delta.logprobs[0].logprob == -9999.0
    with pytest.raises(InternalError):
        build(math.nan)


async def test_an_error_before_the_first_token_is_raised_and_a_later_one_is_an_event(
    service: WorkerService, engine: FakeEngine
) -> None:
    engine.fail_after = (0, InternalError("broken"))
    with pytest.raises(InternalError, match="broken"):
        await events_of(service, request("abc"))
    engine.fail_after = (2, InternalError("broken"))
    events = await events_of(service, request("abc"))
    assert [event.kind for event in events] == ["prompt", "delta", "delta", "error"]


async def test_an_engine_that_ends_without_a_word_is_an_error(service: WorkerService, engine: FakeEngine) -> None:
    engine.reply = lambda prompt: []
    with pytest.raises(RootgraftError, match="broke off"):
        await events_of(service, request("abc"))


async def test_closing_the_iterator_aborts_the_request(service: WorkerService, engine: FakeEngine) -> None:
    stream = service.generate(request("abc"))
    await anext(stream)
    assert service.stats().num_running == 1
    await stream.aclose()
    assert service.stats().num_running == 0
    assert len(engine.aborted) == 1


async def test_the_same_request_id_may_run_twice(service: WorkerService, engine: FakeEngine) -> None:
    first, second = service.generate(request("abc")), service.generate(request("abc"))
    await anext(first)
    await anext(second)
    assert len(engine.running) == 2
    await first.aclose()
    await second.aclose()


async def test_tokenize_and_detokenize(service: WorkerService) -> None:
    reply = await service.tokenize(TokenizeRequest(model="fake", prompt=TextPrompt(text="a b"), return_token_strs=True))
    assert reply.token_ids == [97, 32, 98]
    assert reply.token_strs == ["a", "\u0120", "b"]
    assert reply.max_model_len == 256
    assert (await service.tokenize(TokenizeRequest(model="fake", prompt=TextPrompt(text="")))).token_ids == []
    messages = ChatPrompt(messages=[ChatMessage(role="user", content="x")], add_generation_prompt=False)
    assert bytes((await service.tokenize(TokenizeRequest(model="fake", prompt=messages))).token_ids) == b"user: x\n"
    assert (await service.detokenize(DetokenizeRequest(model="fake", token_ids=[256, 97]))).text == "<s>a"


def test_what_is_served(service: WorkerService) -> None:
    assert service.model == ServedModel(name="fake", family="fake", max_model_len=256, chat=True, dtype="float32")
