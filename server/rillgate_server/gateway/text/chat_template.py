"""Renders a conversation with a checkpoint's chat template, as transformers renders it.

Owns the sandbox: templates are strangers' code. Does not know tokens or models. Follows
transformers' `_compile_jinja_template` and `render_jinja_template` (utils/chat_template_utils.py),
which cannot be imported here since it brings torch along; the tests compare the two.

One difference on purpose: `strftime_now` prints the request's own time in UTC, so that a
continuation on another day or machine renders the same prompt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from rillgate_server.errors import CheckpointError, InvalidRequest

MAX_TEMPLATE_CHARACTERS = 1 << 20
"""The longest known templates have some 20,000; compiling grows with the length."""
MAX_RENDERED_CHARACTERS = 1 << 25
"""Eight times what fits into a request of the default size limit; ends runaway templates."""
MAX_MESSAGES = 4096
MAX_ROLE_BYTES = 64

_FIELD = "chat.messages"


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: a mark for training, and here its body alone."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body alone, in a scope of its own as transformers' call block has."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=lineno)]


class _NewDict:
    """`dict` for templates: makes one, and offers no attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # the template's own values
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a dict of these keys."""
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """`namespace` for templates, without the underscored names that reach Python's internals."""

    def __init__(
        *args: Any, **kwargs: Any
    ) -> None:  # like its base, so that `self=` is a name, too
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:  # the template's own values
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without jinja2's HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _new_environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _NewDict()
    environment.globals["namespace"] = _SafeNamespace
    return environment


class ChatTemplate:
    """A compiled template; may be rendered from several threads at once."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile; `special_tokens`: {`bos_token`: "<s>", …}, which templates print.

        Raises CheckpointError for a template that is too long or no jinja2.
        """
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS}"
            )
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _new_environment().from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error

    def render(self, turns: Sequence[ChatTurn], template_time_ms: int) -> str:
        """Return the prompt for the next assistant message.

        `template_time_ms`: what `strftime_now` prints, Unix milliseconds. Raises InvalidRequest, in
        the template's own words, for what it refuses.
        """
        _check_turns(turns)
        now = datetime.fromtimestamp(template_time_ms / 1000, tz=UTC)
        context = {
            **self._special_tokens,
            "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": now.strftime,
        }
        parts: list[str] = []
        num_characters = 0
        try:
            for part in self._template.generate(context):
                parts.append(part)
                num_characters += len(part)
                if num_characters > MAX_RENDERED_CHARACTERS:
                    _raise_exception(f"more than {MAX_RENDERED_CHARACTERS} characters")
        except Exception as error:
            # The template is foreign code that runs on the caller's data: whatever it raises (a
            # TypeError for a sum of unlike things, say) means that it cannot render this.
            raise _refused(turns, error) from error
        return "".join(parts)


def _check_turns(turns: Sequence[ChatTurn]) -> None:
    """Refuse what no template should see."""
    if not 1 <= len(turns) <= MAX_MESSAGES:
        raise InvalidRequest.of(_FIELD, f"{len(turns)} messages", f"1 to {MAX_MESSAGES} messages")
    for index, turn in enumerate(turns):
        num_bytes = len(turn.role.encode(errors="surrogatepass"))
        if not 1 <= num_bytes <= MAX_ROLE_BYTES:
            raise InvalidRequest.of(
                f"{_FIELD}[{index}].role", f"{num_bytes} bytes", f"1 to {MAX_ROLE_BYTES} bytes"
            )


def _refused(turns: Sequence[ChatTurn], error: Exception) -> InvalidRequest:
    """Say the roles (never the contents) and the template's words."""
    roles = ", ".join(turn.role for turn in turns[:20])
    words = (str(error) or type(error).__name__)[:500]
    return InvalidRequest.of(
        _FIELD,
        f"a conversation of roles {roles}",
        f"what the chat template takes; it says: {words}",
    )
