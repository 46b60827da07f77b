"""The templates that TRL brings along, and conversations to compare templates on."""

from __future__ import annotations

import random
from pathlib import Path


def trl_templates() -> dict[str, str]:
    """The chat templates in the installed TRL: file name without its ending → text.

    TRL recognises a model by its template. Of many it also has a version for training, whose name
    ends with `_training`.
    """
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def random_conversation(rng: random.Random) -> list[dict[str, str]]:
    """One to four rounds, with or without a system message, of texts that are awkward to cut."""
    pieces = ["Hi", " ", "\n", "42", "é", "東京", "🙂", "a < b", "|", "# x\n", "the end", "'"]

    def say(role: str) -> dict[str, str]:
        content = "x" + "".join(rng.choices(pieces, k=rng.randint(1, 12))) + "."
        return {"role": role, "content": content}

    rounds = [say(role) for _ in range(rng.randint(1, 4)) for role in ("user", "assistant")]
    return [say("system")] * rng.randint(0, 1) + rounds
