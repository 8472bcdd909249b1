"""A checkpoint's tokenizer: text to ids, as transformers' AutoTokenizer gives them.

Owns the reading of tokenizer.json, tokenizer_config.json and special_tokens_map.json. Does not know
chat templates' meaning, reasoning, or models. Uses `tokenizers` alone: transformers brings torch.

tokenizer.json is the authority. What transformers changes in it when it loads is done here too:
named special tokens are added, and `add_bos_token`/`add_eos_token`, where the config has them,
replace the post-processor. One thing is not: for some model types transformers 5 throws the file's
normalizer and pre-tokenizer away for ones that it knows (Qwen2's NFC, say). Where those differ from
the file, the file wins: it is what the model was trained with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, processors

from rillgate_server.errors import CheckpointError, InvalidRequest
from rillgate_server.gateway.text.token_pieces import TokenPieces

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""Names that templates may print and that are special by being named."""
_EXTRA_SPECIAL_TOKEN_NAMES = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a checkpoint's folder says about its tokenizer."""

    tokenizer_json: bytes
    config: Mapping[str, object]
    """tokenizer_config.json, with special_tokens_map.json under it; empty when there is neither."""
    chat_template: str | None

    @classmethod
    def read(cls, model_dir: Path) -> "TokenizerFiles":
        """Read the files; raises CheckpointError for a missing or broken one."""
        try:
            tokenizer_json = (model_dir / TOKENIZER_FILE).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{model_dir / TOKENIZER_FILE}: {error.strerror}") from error
        config = {
            **read_json(model_dir / _SPECIAL_TOKENS_FILE),
            **read_json(model_dir / _CONFIG_FILE),
        }
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
        self.special_tokens = _special_tokens(files.config)
        """{`bos_token`: "<s>", …}"""
        _configure(self._tokenizer, files.config, self.special_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
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

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text. Releases the interpreter lock while it works.

        Raises InvalidRequest for text that is no Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest.of(
                "prompt", f"text with {error.reason} at character {error.start}", "Unicode text"
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


def _content(token: object) -> str | None:
    """Return the text of a special token's entry: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Return the named special tokens that the config sets."""
    named = {name: _content(config.get(name)) for name in _SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in named.items() if text is not None}


def _configure(
    tokenizer: Tokenizer, config: Mapping[str, object], special_tokens: Mapping[str, str]
) -> None:
    """Do to a fresh tokenizer what transformers' TokenizersBackend does."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    entries = [config[name] for name in _SPECIAL_TOKEN_NAMES if config.get(name) is not None]
    for name in _EXTRA_SPECIAL_TOKEN_NAMES:
        extra = config.get(name)
        entries += extra if isinstance(extra, list) else []
    tokenizer.add_special_tokens([_added_token(entry) for entry in entries if _content(entry)])
    if "add_bos_token" in config or "add_eos_token" in config or tokenizer.post_processor is None:
        bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
        eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
        tokenizer.post_processor = _surrounding(tokenizer, bos, eos)


def _added_token(entry: object) -> AddedToken:
    """Return a special token's entry as the library's type."""
    flags = entry if isinstance(entry, dict) else {}
    return AddedToken(
        _content(entry) or "",
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", False)),
        special=True,
    )


def _surrounding(
    tokenizer: Tokenizer, bos: str | None, eos: str | None
) -> processors.TemplateProcessing:
    """Return the post-processor that puts bos before and eos after a text."""
    single: Sequence[str] = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    return processors.TemplateProcessing(
        single=list(single),
        pair=[*single, "$B:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token],
    )
