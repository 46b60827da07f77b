"""What a chat template shows of a conversation, and the templates that TRL brings along."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from sftlib.chat.templates import Messages, Tools, render_marked

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def trl_templates() -> dict[str, str]:
    """The chat templates in the installed TRL: file name without its ending → text.

    TRL recognises a model by its template. Of many it also has a version for training, whose name
    ends with `_training`.
    """
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def shown(
    template: str, messages: Messages, words: Iterable[str], tools: Tools | None = None
) -> list[str] | None:
    """Which of the words a template writes for a conversation; None if it refuses the conversation.

    Args:
        template: it gets common names for its own tokens, such as `<s>` for `bos_token`.
        words: parts of the messages or of the tools, each of which stands in one place only.
    """
    try:
        text, _ = render_marked(messages, template, False, tools, **SPECIAL_TOKENS)
    except ValueError:
        return None
    return [word for word in words if word in text]


def random_conversation(rng: random.Random) -> list[dict[str, str]]:
    """One to four rounds, with or without a system message, of texts that are awkward to cut."""
    pieces = ["Hi", " ", "\n", "42", "é", "東京", "🙂", "a < b", "|", "# x\n", "the end", "'"]

    def say(role: str) -> dict[str, str]:
        content = "x" + "".join(rng.choices(pieces, k=rng.randint(1, 12))) + "."
        return {"role": role, "content": content}

    rounds = [say(role) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return [say("system")] * rng.randint(0, 1) + rounds
