"""The obvious way to do what the text stages do, for a whole text at once."""

import re

from rillgate_server.gateway.text.reasoning import SplitText


def split_whole(text: str, *, starts_in_reasoning: bool) -> SplitText:
    """Split a whole text with one search per tag."""
    opening = re.match(r"\s*<think>", text)
    if opening is None and not starts_in_reasoning:
        return SplitText("", text)
    rest = text[opening.end() if opening else 0 :]
    reasoning, tag, answer = rest.partition("</think>")
    if tag:
        return SplitText(reasoning.strip("\n"), answer.lstrip("\n"))
    return SplitText(reasoning.lstrip("\n"), "")
