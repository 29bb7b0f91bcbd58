"""The page: layout, and which event does what."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from webui.chat import Chat, Serving
from webui.client import ApiClient, SamplingOptions
from webui.conversation import Conversation, Message, ask, edited, for_display, until_last_question
from webui.theme import CSS, make_theme

POLL_INTERVAL_S = 5.0
QUEUE_POLL_S = 0.05
"""How often Gradio looks for events; with its own 0.001 an idle page server takes 7 % of a core from the model."""
_DOT = '<span class="dot {}"></span>'
CLOSE_SIDEBAR_ON_TELEPHONES = """() => {
  if (window.innerWidth < 768) document.querySelector(".sidebar .toggle-button")?.click();
}"""
PLACEHOLDER = "## What would you like to know?\nThe model that answers is chosen in the sidebar."


def create_app(client: ApiClient) -> FastAPI:
    """The web UI as an ASGI application; it closes `client` when it ends.

    Its `state.end_streams` is a function that ends the connections that open pages hold, for the server to call before
    it waits for connections to close.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        _Page(Chat(client), client.url).blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=make_theme(),
        css=CSS,
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    assert isinstance(mount.app, gr.routes.App)
    app.state.end_streams = mount.app.stop_event.set
    return app


class _Page:
    """The components of the page and their handlers.

    The conversation is kept in a `gr.State`, because `gr.Chatbot` changes texts while showing them; the display is made
    from it, bubble by bubble, so that indices in events are those of the conversation.
    """

    def __init__(self, chat: Chat, url: str) -> None:
        self._chat = chat
        self._url = url
        with gr.Blocks(title="rootgraft", analytics_enabled=False, fill_height=True) as self.blocks:
            self._conversation = gr.State([])
            self._serving = gr.State(None)
            self._timer = gr.Timer(POLL_INTERVAL_S)
            with gr.Sidebar(width=330):
                self._layout_sidebar()
            self._layout_chat()
            self._connect()
        # One answer a tab is enforced by Chat; how many tabs are answered at once is the controller's business.
        self.blocks.queue(default_concurrency_limit=None, api_open=False)
        self.blocks._queue.sleep_when_free = QUEUE_POLL_S

    # ---------------------------------------------------------------------------------------- layout

    def _layout_sidebar(self) -> None:
        gr.Markdown("# rootgraft\nChat with a served model.", elem_id="title")
        with gr.Group():
            self._model = gr.Dropdown([], label="Model", allow_custom_value=True, elem_id="model")
            self._refresh = gr.Button("Refresh models", size="sm", elem_id="refresh")
        self._status = gr.Markdown("Looking for the controller …", elem_id="serving")
        self._new = gr.Button("New chat", size="md", elem_id="new")
        self._system = gr.Textbox(
            "",
            elem_id="system",
            label="System prompt",
            lines=3,
            max_lines=8,
            placeholder="You are a helpful assistant.",
        )
        defaults = SamplingOptions()
        with gr.Accordion("Sampling", open=True, elem_classes="sampling"):
            temperature = gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0 is greedy")
            top_p = gr.Slider(0.01, 1, defaults.top_p, step=0.01, label="Top p")
            max_tokens = gr.Slider(1, 4096, defaults.max_tokens, step=1, label="Max tokens", elem_id="max-tokens")
        with gr.Accordion("More sampling", open=False, elem_classes="sampling"):
            top_k = gr.Number(defaults.top_k, label="Top k", info="0 is off", precision=0, minimum=0)
            min_p = gr.Slider(0, 1, defaults.min_p, step=0.01, label="Min p", info="0 is off")
            repetition = gr.Slider(0.5, 2, defaults.repetition_penalty, step=0.01, label="Repetition penalty")
            presence = gr.Slider(-2, 2, defaults.presence_penalty, step=0.05, label="Presence penalty")
            frequency = gr.Slider(-2, 2, defaults.frequency_penalty, step=0.05, label="Frequency penalty")
            seed = gr.Number(None, label="Seed", info="the same seed gives the same answer", precision=0)
            stop = gr.Textbox("", label="Stop strings", info="one a line", lines=1, max_lines=4)
        self._sampling = [
            temperature, top_p, max_tokens, top_k, min_p, repetition, presence, frequency, seed, stop,
        ]  # fmt: skip

    def _layout_chat(self) -> None:
        self._chatbot = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            min_height=320,
            height="100%",
            layout="bubble",
            editable="all",
            buttons=["copy", "copy_all"],
            placeholder=PLACEHOLDER,
            group_consecutive_messages=False,
            allow_tags=False,
            reasoning_tags=[("<think>", "</think>")],
        )
        self._speed = gr.Markdown("", elem_id="speed")
        self._question = gr.Textbox(
            "",
            elem_id="question",
            show_label=False,
            container=False,
            placeholder="Ask something …",
            lines=1,
            max_lines=12,
            autofocus=True,
            submit_btn=True,
        )

    # ---------------------------------------------------------------------------------------- events

    def _connect(self) -> None:
        self.blocks.load(js=CLOSE_SIDEBAR_ON_TELEPHONES)
        private: dict[str, Any] = {"api_visibility": "private"}
        quick: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        shown = [self._chatbot, self._conversation, self._speed, self._question]
        settings = [self._model, self._system, *self._sampling]
        streaming: dict[str, Any] = {**private, "outputs": shown, "show_progress": "minimal"}

        self._question.submit(
            self._on_send, [self._question, self._conversation, *settings], show_progress_on=self._chatbot, **streaming
        )
        self._chatbot.retry(
            self._on_retry, [self._conversation, *settings], show_progress_on=self._chatbot, **streaming
        )
        self._chatbot.edit(self._on_edit, [self._conversation, *settings], show_progress_on=self._chatbot, **streaming)
        self._chatbot.undo(self._on_undo, [self._conversation], shown, **quick)
        gr.on(
            [self._chatbot.clear, self._new.click],
            self._on_clear,
            None,
            shown,
            **quick,
        )
        self._question.stop(self._on_stop, None, None, **quick)
        self.blocks.unload(self._on_stop)

        known = [self._model, self._serving]
        found = [self._model, self._status, self._serving]
        self._refresh.click(self._on_refresh, [self._model], found, **private, show_progress="minimal")
        gr.on([self.blocks.load, self._timer.tick], self._on_poll, known, found, **private, show_progress="hidden")

    async def _on_send(
        self, request: gr.Request, question: str, conversation: Conversation, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        if not question.strip():
            yield (gr.skip(),) * 4
            return
        asked = ask(conversation, question)
        yield for_display(asked), asked, "", gr.Textbox(value="", submit_btn=False, stop_btn=True)
        async with aclosing(self._answer(request, asked, settings)) as steps:
            async for step in steps:
                yield step

    async def _on_retry(
        self, request: gr.Request, conversation: Conversation, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        asked = until_last_question(conversation)
        yield for_display(asked), asked, "", gr.Textbox(submit_btn=False, stop_btn=True)
        async with aclosing(self._answer(request, asked, settings)) as steps:
            async for step in steps:
                yield step

    async def _on_edit(
        self, request: gr.Request, edit: gr.EditData, conversation: Conversation, *settings: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        index = edit.index if isinstance(edit.index, int) else edit.index[0]
        changed, asks = edited(conversation, index, str(edit.value))
        if not asks:
            yield for_display(changed), changed, gr.skip(), gr.skip()
            return
        yield for_display(changed), changed, "", gr.Textbox(submit_btn=False, stop_btn=True)
        async with aclosing(self._answer(request, changed, settings)) as steps:
            async for step in steps:
                yield step

    async def _answer(
        self, request: gr.Request, asked: Conversation, settings: tuple[Any, ...]
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        model, system_prompt, *sampling = settings
        conversation, speed = asked, ""
        answers = self._chat.answer(_tab(request), asked, model, system_prompt, _options(*sampling))
        async with aclosing(answers) as steps:
            async for conversation, speed in steps:
                yield for_display(conversation), conversation, speed, gr.skip()
        yield for_display(conversation), conversation, speed, gr.Textbox(submit_btn=True, stop_btn=False)

    def _on_stop(self, request: gr.Request) -> None:
        self._chat.stop(_tab(request))

    def _on_undo(self, request: gr.Request, conversation: Conversation) -> tuple[Any, ...]:
        """Take the last question back into the input field."""
        self._chat.stop(_tab(request))
        asked = until_last_question(conversation)
        question = asked[-1].text if asked else ""
        return for_display(asked[:-1]), asked[:-1], "", gr.Textbox(value=question)

    def _on_clear(self, request: gr.Request) -> tuple[Any, ...]:
        self._chat.forget(_tab(request))
        empty: list[Message] = []
        return for_display(empty), empty, "", gr.Textbox(submit_btn=True, stop_btn=False)

    async def _on_poll(self, model: str | None, known: Serving | None) -> tuple[Any, Any, Serving]:
        serving = await self._chat.serving()
        if serving == known:
            return gr.skip(), gr.skip(), serving
        return (*self._found(model, serving), serving)

    async def _on_refresh(self, model: str | None) -> tuple[Any, Any, Serving]:
        serving = await self._chat.serving()
        return (*self._found(model, serving), serving)

    def _found(self, model: str | None, serving: Serving) -> tuple[Any, str]:
        """The model list and the line below it."""
        if serving.error is not None:
            return gr.skip(), f"{_DOT.format('away')} {serving.error}"
        if not serving.models:
            return gr.Dropdown(choices=[]), (
                f"{_DOT.format('empty')} The controller at {self._url} serves no model yet; start a worker."
            )
        chosen = model if model in serving.models else serving.models[0]
        count = f"{len(serving.models)} model" + ("s" if len(serving.models) > 1 else "")
        return gr.Dropdown(choices=list(serving.models), value=chosen), f"{_DOT.format('ready')} {count} at {self._url}"


def _tab(request: gr.Request) -> str:
    assert request.session_hash is not None
    return request.session_hash


def _options(
    temperature: float,
    top_p: float,
    max_tokens: float,
    top_k: float | None,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    seed: float | None,
    stop: str,
) -> SamplingOptions:
    """Sampling options from the values of the components; an emptied number is off."""
    return SamplingOptions(
        temperature=temperature,
        top_p=top_p,
        max_tokens=int(max_tokens),
        top_k=int(top_k or 0),
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=None if seed is None else int(seed),
        stop=tuple(line for line in stop.splitlines() if line),
    )
