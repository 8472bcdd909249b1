"""Tokenizers of the shapes that real checkpoints have, trained on a few lines in a second.

Each function writes the text files of a checkpoint into a folder that it is given. Nothing is
downloaded, and no weights are made.
"""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

DEMO = Path(__file__).parents[3] / "models" / "demo"

CORPUS = (
    "How many r's are in strawberry? There are 3 r's in the word strawberry.",
    "9.11 is smaller than 9.9, isn't it? Let me think: 9.9 = 9.90 and 90 > 11.",
    "Die Straßenbahn fährt um 7 Uhr; wir müssen uns beeilen, sonst verpassen wir sie!",
    "Ce n'était pas la première fois qu'il voyait la mer, mais c'était l'été.",
    "Привет, как дела? Сегодня хорошая погода, и мы идём гулять.",
    "今天天气很好，我们去公园散步吧。明天可能会下雨。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "👋 hello 👨‍👩‍👧 family 🇩🇪 flag",
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts a text into words."""


def qwen2_like(folder: Path) -> None:
    """Byte-level BPE, NFC, no token before the text, as R1's Qwen distillations have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(CORPUS, _byte_level_trainer(400))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    _write(
        folder,
        tokenizer,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
        "qwen2",
    )


def llama3_like(folder: Path) -> None:
    """Byte-level BPE with a token before the text, which the post-processor adds."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, _byte_level_trainer(380))
    tokenizer.add_special_tokens(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    _write(
        folder,
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
        },
        "llama",
    )


def llama2_like(folder: Path) -> None:
    """BPE over ▁ with single bytes for what it lacks, as SentencePiece models are converted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        [line for line in CORPUS if line.isascii()],
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
            show_progress=False,
        ),
    )
    _make_bytes_ordinary(tokenizer, byte_tokens, folder)
    _write_config(
        folder,
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
            "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
            "unk_token": "<unk>",
        },
        "llama",
    )


def unigram_like(folder: Path) -> None:
    """Unigram with a Metaspace decoder: the first token loses its ▁."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    _write(
        folder,
        tokenizer,
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        "mistral",
    )


def word_like(folder: Path) -> None:
    """Whole words and no decoder: `decode` joins them by spaces."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _write(folder, tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"}, "llama")


KINDS: dict[str, Callable[[Path], None]] = {
    # name -> writer
    "qwen2": qwen2_like,
    "llama3": llama3_like,
    "llama2": llama2_like,
    "unigram": unigram_like,
    "word": word_like,
}


def _byte_level_trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _make_bytes_ordinary(tokenizer: Tokenizer, byte_tokens: list[str], folder: Path) -> None:
    """Write tokenizer.json with the byte tokens in the vocabulary alone, as converters leave it."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in byte_tokens
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, object], model_type: str) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, config, model_type)


def _write_config(folder: Path, config: dict[str, object], model_type: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
