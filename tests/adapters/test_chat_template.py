"""Rendering equals transformers' own; whatever a template does, rendering ends and says what happened."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from adapters.chat_template import ChatTemplate
from adapters.template_library import load_named_template
from adapters.template_sandbox import Limits
from registry.errors import CheckpointError, InvalidRequestError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = [{"role": "user", "content": "hi"}]

# What templates in the wild use: namespaces, macros, loop controls, filters, slices, tests, generation marks, tools.
RICH = """
{%- macro show(value, depth=0) -%}
{%- if value is mapping -%}{%- for key, item in value | dictsort -%}{{ key }}={{ show(item, depth + 1) }};{%- endfor -%}
{%- elif value is iterable and value is not string -%}[{{ value | join(',') }}]{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{% set ns = namespace(count=0, last='') %}
{{- bos_token -}}
{% if tools %}{{ tools | tojson(indent=2) }}{{ show(tools[0]) }}{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'stop' %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% if message['content'] is string %}
        {% generation %}
        [{{ loop.index }}/{{ loop.length }}:{{ message.role | upper }}]{{ message.content | trim }}
        {% endgeneration %}

    {% else %}
        {% for part in message.content if part.type == 'text' %}{{ part.text }}|{% endfor %}
    {% endif %}
    {% if message.tool_calls is defined and message.tool_calls is not none %}
{{ message.tool_calls | tojson }} {{ "%s has %d" | format(message.role, 3) }} {{ '-' * 3 }}
    {% endif %}
    {% if message.reasoning_content %}
        <{{ message.reasoning_content.split('\\n') | last | replace('a', 'bb') }}>
    {%- endif %}
    {% set ns.last = message.role ~ loop.index0 %}
{% endfor %}
{{ ns.count }} {{ ns.last }} {{ messages[::-1] | map(attribute='role') | join(' ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{% if add_generation_prompt %}<go>{% endif %}
"""

text = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="\r", categories=("L", "N", "P", "Z", "S")), max_size=20
)
tool_call = st.fixed_dictionaries({"name": text, "arguments": st.dictionaries(text, st.integers(), max_size=2)})
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "skip", "stop"]), "content": text},
    optional={"tool_calls": st.lists(tool_call, max_size=2) | st.none(), "reasoning_content": text, "name": text},
)


def oracle(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    # As PreTrainedTokenizerBase.apply_chat_template calls it: null fields are dropped first.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    rendered, _ = render_jinja_template([chat], chat_template=source, **{**TOKENS, **kwargs})
    return rendered[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(message, min_size=1, max_size=6), st.booleans(), st.none() | st.just([{"type": "f", "n": [1, 2.5]}]))
def test_rich_template_equals_transformers(messages, add_generation_prompt, tools) -> None:
    template = ChatTemplate("rich", RICH, special_tokens=TOKENS)
    assert template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools) == oracle(
        RICH, messages, add_generation_prompt=add_generation_prompt, tools=tools
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(text, min_size=1, max_size=5), st.sampled_from(["llama-2", "gemma", "chatml", "phi-3", "qwen-3"]))
def test_library_templates_equal_transformers(contents, name) -> None:
    template = load_named_template(name, special_tokens=TOKENS)
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    assert template.render(messages) == oracle(template.source, messages, add_generation_prompt=True)


@settings(max_examples=80, deadline=None)
@given(st.lists(text, min_size=1, max_size=4), text, st.sampled_from(["llama-2", "gemma", "chatml", "llama-3"]))
def test_continuing_equals_transformers(contents, last, name) -> None:
    template = load_named_template(name, special_tokens=TOKENS)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate([*contents, last])
    ]
    try:
        expected = oracle(template.source, messages, continue_final_message=True)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="cannot be continued"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    else:
        assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_continuing_excludes_a_generation_prompt_and_needs_text() -> None:
    template = load_named_template("chatml")
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        template.render(USER, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="needs text"):
        template.render([{"role": "user"}], add_generation_prompt=False, continue_final_message=True)


def test_null_content_is_as_if_absent() -> None:
    template = ChatTemplate("t", "{{ messages[0].content is defined }}")
    assert template.render([{"role": "assistant", "content": None}]) == "False"


def test_variables_reach_the_template_and_win_over_special_tokens() -> None:
    template = ChatTemplate("t", "{{ bos_token }}{{ enable_thinking }}{{ tools }}", special_tokens=TOKENS)
    assert template.render(USER, enable_thinking=False) == "<s>FalseNone"
    assert template.render(USER, bos_token="X") == "XNone"


def test_text_parts_are_joined_for_templates_that_cannot_read_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert load_named_template("raw").render(parts) == "a\nb"
    reads_parts = ChatTemplate(
        "t", "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    )
    assert reads_parts.render(parts) == "<a><b>"
    assert reads_parts.render(parts, add_generation_prompt=False, continue_final_message=True) == "<a><b"


def test_parts_that_are_no_text_are_refused() -> None:
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(InvalidRequestError, match="text only"):
        load_named_template("raw").render(parts)


def test_tools_are_refused_where_the_template_would_drop_them() -> None:
    with pytest.raises(InvalidRequestError, match="takes no tools"):
        load_named_template("chatml").render(USER, tools=[{"type": "function"}])


def test_only_json_values_reach_the_template() -> None:
    class Colour(str, enum.Enum):  # noqa: UP042  (the point is a str with more methods)
        RED = "red"

    template = ChatTemplate("t", "{{ colour }} {{ colour.name is defined }}")
    assert template.render(USER, colour=Colour.RED) == "red False"
    with pytest.raises(InvalidRequestError, match="JSON values"):
        template.render(USER, colour=object())


@pytest.mark.parametrize(("messages", "match"), [([], "is empty"), (["x"], "must be an object")])
def test_bad_messages_are_refused(messages, match) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        load_named_template("chatml").render(messages)


def test_the_template_refuses_a_conversation_with_its_own_words() -> None:
    template = ChatTemplate("t", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="refuses this conversation: roles must alternate"):
        template.render(USER)


def test_a_fault_of_the_template_is_the_requests_error() -> None:
    with pytest.raises(InvalidRequestError, match=r"cannot render this conversation: .*[Uu]ndefined"):
        ChatTemplate("t", "{{ messages[0].absent.name }}").render(USER)


def test_no_valid_template() -> None:
    with pytest.raises(CheckpointError, match=r"no valid Jinja template.*line 2.*--chat-template"):
        ChatTemplate("broken.jinja", "a\n{% for %}")
    with pytest.raises(CheckpointError, match="limit is 10"):
        ChatTemplate("t", "x" * 11, limits=Limits(max_source_chars=10))


ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{{ namespace(__init__=1) }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "type of dict": "{{ dict.__class__.mro() }}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_the_sandbox_holds(source) -> None:
    with pytest.raises(InvalidRequestError, match=r"SecurityError|unsafe|underscore|takes no keyword"):
        ChatTemplate("t", source).render(USER)


BIG = "{% set x = 'a' * 1000000 %}"
BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [[1]] recursive %}{{ loop(i if i is iterable else [i]) }}{% endfor %}",
    "recursive macro": "{% macro f(x) %}{{ f(x) ~ f(x) }}{% endmacro %}{{ f(1) }}",
    "doubling": "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 60,
    "adding": "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x + x %}" * 60,
    "multiplication": "{{ 'x' * 10 ** 9 }}",
    "list multiplication": "{{ ([0] * 10 ** 9) | length }}",
    "power": "{% set x = 9 ** 99 %}{% set x = x ** 99 %}{{ x ** 99999 }}",
    "padding": "{{ 'a'.ljust(10 ** 9) }}",
    "centre": "{{ 'a' | center(1000000000) }}",
    "printf width": "{{ '%0999999999d' % 1 }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "computed format width": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace filter": BIG + "{{ x | replace('a', x) }}",
    "join": BIG + "{{ (range(100000) | list) | join(x) }}",
    "lazy join": BIG + "{{ range(100000) | map('replace', '0', x) | join(x) }}",
    "json indent": "{{ [[[[1]]]] | tojson(indent=1000000000) }}",
    "output": BIG + "{% for i in range(100000) %}{{ x }}{% endfor %}",
    "captured output": BIG + "{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
    "captured text": "{% set y %}{% for i in range(100000) %}" + "a" * 100_000 + "{% endfor %}{% endset %}",
    "mapped work": BIG + "{{ range(100000) | map('upper') | list | length }}" * 30,
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_rendering_is_bounded(source) -> None:
    limits = Limits(max_steps=50_000)
    with pytest.raises(InvalidRequestError, match=r"was stopped on this conversation|RecursionError"):
        ChatTemplate("t", source, limits=limits).render(USER)


def test_limits_are_per_rendering_and_output_is_counted() -> None:
    template = ChatTemplate("t", "{{ messages[0].content }}", limits=Limits(max_output_chars=10, max_steps=5))
    for _ in range(20):
        assert template.render([{"role": "user", "content": "0123456789"}]) == "0123456789"
    with pytest.raises(InvalidRequestError, match="more than 10 characters"):
        template.render([{"role": "user", "content": "0123456789a"}])


def test_large_numbers_as_values_are_no_widths() -> None:
    template = ChatTemplate("t", "{{ messages[0].n | tojson }} {{ 10 ** 12 + 1 }} {{ messages | tojson }}")
    assert template.render([{"role": "user", "n": 10**15}]).startswith(f"{10**15} {10**12 + 1} ")


def test_time_is_bounded() -> None:
    template = ChatTemplate("t", "{% for i in range(9) %}{% endfor %}", limits=Limits(max_seconds=-1.0))
    with pytest.raises(InvalidRequestError, match="runs for more than"):
        template.render(USER)
