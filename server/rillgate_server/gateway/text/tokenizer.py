"""A checkpoint's tokenizer: text to ids, as transformers' AutoTokenizer gives them.

Owns the reading of tokenizer.json, tokenizer_config.json and special_tokens_map.json. Does not know
chat templates' meaning, reasoning, or models. Uses `tokenizers` alone: transformers brings torch.

tokenizer.json is the authority, its post-processor (which adds <s>, say) included; transformers 5
ignores `add_bos_token` of tokenizer_config.json beside it. What transformers does change is done
here too: special tokens that the config names are added. One thing is not: for some model types
transformers 5 throws the file's normalizer and pre-tokenizer away for ones that it knows (for Qwen2
its own regular expression and NFC). Where those differ from the file, the file wins: it is what
the model was trained with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from rillgate_server.errors import CheckpointError, InvalidRequest
from rillgate_server.gateway.text.token_pieces import TokenPieces

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_FIRST_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA_NAMES = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a checkpoint's folder says about its tokenizer."""

    tokenizer_json: bytes
    config: Mapping[str, object]
    """tokenizer_config.json and special_tokens_map.json; empty when there is neither."""
    chat_template: str | None

    @classmethod
    def read(cls, model_dir: Path) -> "TokenizerFiles":
        """Read the files; raises CheckpointError for a missing or broken one."""
        try:
            tokenizer_json = (model_dir / TOKENIZER_FILE).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{model_dir / TOKENIZER_FILE}: {error.strerror}") from error
        config = read_json(model_dir / _CONFIG_FILE)
        if "added_tokens_decoder" not in config:  # older checkpoints
            config |= read_json(model_dir / _SPECIAL_TOKENS_FILE)
        template_file = model_dir / _TEMPLATE_FILE
        if template_file.is_file():
            return cls(tokenizer_json, config, template_file.read_text(encoding="utf-8"))
        return cls(tokenizer_json, config, _default_template(config.get("chat_template")))


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in a file; empty when there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


class TextTokenizer:
    """Text to ids, and the bytes behind ids. Immutable once loaded; any thread."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Build from the files' contents; raises CheckpointError for ones it cannot use."""
        try:
            self._tokenizer = Tokenizer.from_buffer(files.tokenizer_json)
        except ValueError as error:
            raise CheckpointError(f"{TOKENIZER_FILE}: {error}") from error
        decoder = json.loads(files.tokenizer_json).get("decoder")
        self.digest = sha256(files.tokenizer_json).hexdigest()
        """Hex digest of tokenizer.json."""
        named = _named_entries(files.config)
        self.special_tokens = {name: _content(entry) for name, entry in named.items()}
        """{`bos_token`: "<s>", …}"""
        self.special_token_ids = _configure(self._tokenizer, files.config)
        tokens = {index: token for token, index in self._tokenizer.get_vocab().items()}
        self.all_pieces = TokenPieces.compile(decoder, tokens)
        """The bytes behind each id, special tokens included."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self.all_pieces.pieces)

    def token_id(self, token: str) -> int | None:
        """Return a token's id, if there is such a token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def encode(self, text: str, *, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        """Return the ids of a text. Releases the interpreter lock while it works.

        Raises InvalidRequest, for the request's `field`, for text that is no Unicode (lone
        surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest.of(
                field, f"text with {error.reason} at character {error.start}", "Unicode text"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def _default_template(value: object) -> str | None:
    """Return the template of a `chat_template` entry: a string, or a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default":
                return str(entry.get("template", ""))
    return None


def _content(token: object) -> str:
    """Return the text of a special token's entry: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _named_entries(config: Mapping[str, object]) -> dict[str, object]:
    """Return the special tokens that the config names, as it spells them: `…_token` all.

    transformers' own names come first, since tokens that are new get their ids in this order.
    """
    named = {name: config[name] for name in _FIRST_NAMES if name in config} | dict(config)
    for extra in _extra_entries(config):
        named |= extra if isinstance(extra, dict) else {}
    return {
        name: entry for name, entry in named.items() if name.endswith("_token") and _content(entry)
    }


def _extra_entries(config: Mapping[str, object]) -> list[object]:
    """Return the lists (and objects) of further special tokens in the config."""
    return [config[name] for name in _EXTRA_NAMES if name in config]


def _configure(tokenizer: Tokenizer, config: Mapping[str, object]) -> frozenset[int]:
    """Do to a fresh tokenizer what transformers does; return the ids of its special tokens."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    entries = list(_named_entries(config).values())
    for extra in _extra_entries(config):
        entries += filter(_content, extra) if isinstance(extra, list) else []
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for entry in entries:
        token = known.get(_content(entry)) or _added_token(entry)
        tokenizer.add_special_tokens([token])
    added = tokenizer.get_added_tokens_decoder()
    flagged: set[int | None] = {token_id for token_id, token in added.items() if token.special}
    named = {tokenizer.token_to_id(_content(entry)) for entry in entries}
    return frozenset(token_id for token_id in flagged | named if token_id is not None)


def _added_token(entry: object) -> AddedToken:
    """Return an entry, a string or an object with flags, as the library's type."""
    flags = entry if isinstance(entry, dict) else {}
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(
        _content(entry), special=True, **{name: bool(flags.get(name, False)) for name in names}
    )
