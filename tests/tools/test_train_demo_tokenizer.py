"""The demo model's tokenizer and chat template: every byte, R1's marks, the ids of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tools.train_demo import examples, tasks, tokenizer

MODEL = Path(__file__).parents[2] / "models" / "demo"
SHIPPED = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Render the shipped template the way a server does."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((MODEL / "chat_template.jinja").read_text(encoding="utf-8"))
    return template.render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=tokenizer.BOS
    )


def user(content: str) -> dict[str, str]:
    """Make a user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """Make an assistant's message."""
    return {"role": "assistant", "content": content}


def test_the_shipped_files_are_what_the_code_makes(tmp_path: Path) -> None:
    """The tokenizer, its config and the template in models/demo come from tools/train_demo."""
    tokenizer.save_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (MODEL / name).read_bytes() == (tmp_path / name).read_bytes()
    assert SHIPPED.to_str() == tokenizer.build_tokenizer().to_str()


def test_each_byte_is_one_token_whose_id_is_the_byte() -> None:
    """All 256 bytes are in the vocabulary, and text becomes the ids of its UTF-8 bytes."""
    symbols = tokenizer.byte_symbols()
    assert len(set(symbols)) == 256
    assert [SHIPPED.token_to_id(symbol) for symbol in symbols] == list(range(256))
    for code in (*range(0x250), 0x20AC, 0xFFFD, 0x1F600):
        ids = SHIPPED.encode(chr(code), add_special_tokens=False).ids
        assert bytes(ids) == chr(code).encode()


@given(text=st.text(max_size=60))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    """Decoding the ids of a text gives the text, spaces, control characters and all."""
    ids = SHIPPED.encode(text, add_special_tokens=False).ids
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text


def test_think_marks_decode_as_text_and_special_marks_do_not() -> None:
    """`<think>` survives skip_special_tokens, as in R1; the turn marks are dropped."""
    text = f"{tokenizer.ASSISTANT}{tokenizer.THINK}\nx\n{tokenizer.END_THINK}\n\ny{tokenizer.EOS}"
    ids = SHIPPED.encode(text, add_special_tokens=False).ids
    assert len(ids) == 4 + len("\nx\n\n\ny")
    assert SHIPPED.decode(ids, skip_special_tokens=True) == "<think>\nx\n</think>\n\ny"
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text


def test_the_vocabulary_has_no_gap_and_fits_the_network() -> None:
    """Each id of the network's output layer is a token, so nothing undecodable can be sampled."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert SHIPPED.get_vocab_size() == config["vocab_size"]
    assert sorted(SHIPPED.get_vocab().values()) == list(range(config["vocab_size"]))
    assert config["eos_token_id"] == SHIPPED.token_to_id(tokenizer.EOS)
    assert config["max_position_embeddings"] == tokenizer.MAX_CONTEXT_TOKENS


def test_the_template_opens_the_reasoning_and_strips_earlier_reasoning() -> None:
    """The whole conversation in R1's shape; what an earlier turn thought is left out."""
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            user("1+1"),
            assistant("<think>\nhm\n</think>\n\n1 + 1 = 2"),
            user("2+2"),
        ]
    )
    assert text == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1<｜Assistant｜>1 + 1 = 2<｜end▁of▁sentence｜>"
        "<｜User｜>2+2<｜Assistant｜><think>\n"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), user("b")],
        [assistant("a")],
        [user("a"), {"role": "system", "content": "b"}],
        [{"role": "system", "content": "a"}],
        [user("a"), {"role": "tool", "content": "b"}],
        [user("a"), assistant("b")],
    ],
)
def test_the_template_refuses_a_wrong_role_order(messages: list[dict[str, str]]) -> None:
    """Two users in a row, a late system message, an unknown role and no question are refused."""
    with pytest.raises(jinja2.TemplateError):
        render(messages)


def test_training_uses_the_ids_that_the_template_gives() -> None:
    """Every training example in the template's shape equals the shipped template and tokenizer."""
    rng = random.Random(5)
    shares = dict.fromkeys(tasks.TASKS, 1.0)
    seen = 0
    for _ in range(300):
        example = examples.draw_example(rng, shares)
        text = SHIPPED.decode(example.token_ids, skip_special_tokens=False)
        assert SHIPPED.encode(text, add_special_tokens=False).ids == example.token_ids
        if tokenizer.USER not in text:
            continue
        system, *turns = text.removeprefix(tokenizer.BOS).split(tokenizer.USER)
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns[:-1]:
            asked, answered = turn.split(tokenizer.ASSISTANT)
            messages += [user(asked), assistant(answered.removesuffix(tokenizer.EOS))]
        messages.append(user(turns[-1].split(tokenizer.ASSISTANT)[0]))
        prompt = SHIPPED.encode(render(messages), add_special_tokens=False).ids
        assert prompt == example.token_ids[: example.learned_from]
        seen += 1
    assert seen > 200


def test_what_is_learned_is_the_reasoning_and_the_answer() -> None:
    """The learned part of each example ends with the answer and the end mark, once."""
    rng = random.Random(6)
    for _ in range(100):
        example = examples.draw_example(rng, {"addition": 1.0})
        learned = SHIPPED.decode(example.token_ids[example.learned_from :], False)
        assert learned.count(tokenizer.EOS) == 1
        assert learned.endswith(tokenizer.EOS)
        assert learned.count(tokenizer.END_THINK) == 1
