"""Rendered conversations against what transformers renders, and what a sandbox must refuse."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from rillgate_server.errors import CheckpointError, InvalidRequest
from rillgate_server.gateway.text import chat_template
from rillgate_server.gateway.text.chat_template import ChatTemplate, ChatTurn
from tests.gateway.text.checkpoints import DEMO

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NOON_MS = int(datetime(2026, 3, 5, 12, tzinfo=UTC).timestamp() * 1000)

DEMO_TEMPLATE = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")

R1_LIKE = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, system_prompt='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

QWEN2_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if loop.last and message.role == 'assistant' %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3_LIKE = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL_LIKE = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ message['content'] + eos_token }}
    {%- else -%}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif -%}
{%- endfor -%}
"""

FEATURES = """{% macro say(who, what='-') %}<{{ who }}: {{ what }}>{% endmacro %}
  {# a comment #}
{% set box = namespace(count=0) %}
{% set pairs = dict(a=1) %}{{ dict.fromkeys('ab', 2) }}
  {% for message in messages %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
    {% set box.count = box.count + 1 %}
{% generation %}{% set inner = 'x' %}{{ say(message.role, message.content) }}{% endgeneration %}
{{ inner is defined }} {{ message | tojson }} {{ message.content | tojson(indent=2) }}
    {{- loop.index }} {{ message.get('name', 'no name') }} {{ message.name is defined }}
  {% endfor %}
{{ box.count }} {{ pairs.a }} {{ tools is none }} {{ documents is none }} {{ unknown is defined }}
{{ messages | map(attribute='role') | join(',') }} {{ 'é<&>' }} {{ messages[-1].content[:2] }}
"""

TEMPLATES = {
    "demo": DEMO_TEMPLATE,
    "r1": R1_LIKE,
    "qwen2": QWEN2_LIKE,
    "llama3": LLAMA3_LIKE,
    "mistral": MISTRAL_LIKE,
    "features": FEATURES,
}

conversations = st.lists(
    st.builds(
        ChatTurn,
        role=st.sampled_from(["system", "user", "assistant", "tool"]),
        content=st.one_of(
            st.sampled_from(["skip", "<think>\na\n</think>\n\nb", "{{ 1 }}", 'é & "<b>" \'', ""]),
            st.text(max_size=10),
        ),
    ),
    min_size=1,
    max_size=5,
)


def reference(source: str, turns: list[ChatTurn]) -> str | None:
    """Return what transformers renders, None where the template refuses.

    Its `strftime_now` asks the machine's clock, so noon is written into the template instead.
    """
    noon = datetime.fromtimestamp(NOON_MS / 1000, tz=UTC)
    try:
        rendered, _ = render_jinja_template(
            [[{"role": turn.role, "content": turn.content} for turn in turns]],
            chat_template=source.replace('strftime_now("%d %b %Y")', f"'{noon:%d %b %Y}'"),
            add_generation_prompt=True,
            **SPECIAL_TOKENS,
        )
    except (jinja2.TemplateError, TypeError):
        return None
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80, deadline=None)
@given(turns=conversations)
def test_a_conversation_renders_as_transformers_renders_it(
    name: str, turns: list[ChatTurn]
) -> None:
    """Every role order: the same text, or both refuse."""
    expected = reference(TEMPLATES[name], turns)
    template = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS)
    if expected is None:
        with pytest.raises(InvalidRequest):
            template.render(turns, NOON_MS)
    else:
        assert template.render(turns, NOON_MS) == expected


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move this machine 14 hours east of Greenwich."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EAST-14")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_the_date_is_the_requests_own_in_utc() -> None:
    """A continuation on another day, or in another time zone, renders the same prompt."""
    template = ChatTemplate(LLAMA3_LIKE, SPECIAL_TOKENS)
    turns = [ChatTurn("user", "hi")]
    assert "Today Date: 05 Mar 2026" in template.render(turns, NOON_MS)
    assert "Today Date: 01 Jan 1970" in template.render(turns, 12 * 3600 * 1000)


def test_a_refusal_has_the_templates_own_words() -> None:
    """And the field and the roles, but not the contents."""
    template = ChatTemplate(MISTRAL_LIKE, SPECIAL_TOKENS)
    with pytest.raises(InvalidRequest, match="Conversation roles must alternate") as caught:
        template.render([ChatTurn("user", "secret"), ChatTurn("user", "secret")], NOON_MS)
    (violation,) = caught.value.violations
    assert violation.field == "chat.messages"
    assert violation.value == "a conversation of roles user, user"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content / 0 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ strftime_now.__self__.year }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'_Namespace__attrs': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set n = namespace(a=1) %}{% set n.__class__ = 2 %}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_invalid_request(source: str) -> None:
    """Python's internals stay out of reach, and no exception of another kind gets out."""
    with pytest.raises(InvalidRequest, match="it says: "):
        ChatTemplate(source, {}).render([ChatTurn("user", "a")], 0)


def test_a_template_that_runs_away_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested loops each within the sandbox's limit."""
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 1000)
    source = "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        ChatTemplate(source, {}).render([ChatTurn("user", "a")], 0)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% generation %}", "{% nonsense %}"])
def test_a_template_that_does_not_compile_is_the_operators_error(source: str) -> None:
    """Found at load, not at the first request."""
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate(source, {})


def test_a_template_past_the_limit_is_refused() -> None:
    """Both numbers are given."""
    with pytest.raises(CheckpointError, match=r"1048577 characters, at most 1048576"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1), {})


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"chat\.messages is 0 messages; allowed: 1 to 4096"),
        ([ChatTurn("user", "a")] * 4097, r"chat\.messages is 4097 messages"),
        ([ChatTurn("", "a")], r"chat\.messages\[0\]\.role is 0 bytes; allowed: 1 to 64"),
        ([ChatTurn("user", "a"), ChatTurn("é" * 33, "a")], r"messages\[1\]\.role is 66 bytes"),
    ],
)
def test_what_no_template_should_see_is_refused_with_numbers(
    turns: list[ChatTurn], message: str
) -> None:
    """Too few or too many messages, and roles of impossible length."""
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(DEMO_TEMPLATE, {}).render(turns, 0)
