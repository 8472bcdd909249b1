"""Makes the demo model's tokenizer and chat template: one token for each byte, and R1's marks.

Owns the vocabulary (fixed: the weights in models/demo depend on the order of the ids) and the
template's text. Knows nothing of tasks, tensors or training. The shape follows DeepSeek-R1: special
tokens with full-width bars, `<think>` and `</think>` as added tokens that decode as text, a
generation prompt that opens the reasoning.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
END_OF_TURN = "<|EOT|>"
THINK = "<think>"
END_THINK = "</think>"

# 256 bytes and these eight make 264, which divides by 8: the vocabulary splits evenly over 2, 4 or
# 8 ranks and has no id that the tokenizer cannot decode. END_OF_TURN, as in R1, is unused; it is
# there for that reason alone.
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, END_OF_TURN)
PLAIN_ADDED_TOKENS = (THINK, END_THINK)

# The longest context that the model may be asked for, in tokens; config.json says the same.
MAX_CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = """\
{%- set state = namespace(previous='') -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- if not loop.first -%}
{{- raise_exception('A system message is only allowed as the first message.') -}}
{%- endif -%}
{{- message['content'] -}}
{%- elif message['role'] == 'user' -%}
{%- if state.previous == 'user' -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set state.previous = 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- if state.previous != 'user' -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set state.previous = 'assistant' -%}
{%- set answer = message['content'].split('</think>')[-1].strip() -%}
{{- '<｜Assistant｜>' + answer + '<｜end▁of▁sentence｜>' -}}
{%- else -%}
{{- raise_exception('Only the roles system, user and assistant are supported.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if state.previous != 'user' -%}
{{- raise_exception('The last message must come from the user.') -}}
{%- endif -%}
{{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""


def byte_symbols() -> list[str]:
    """Return the 256 symbols of the byte-level alphabet, in the order of their bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), 256),
    ]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return [symbols[byte] for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer: id b for byte b, the special tokens, `<think>` and `</think>`."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=False) for text in PLAIN_ADDED_TOKENS]
    )
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": MAX_CONTEXT_TOKENS,
        "pad_token": PAD,
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
