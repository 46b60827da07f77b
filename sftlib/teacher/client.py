"""Ask an LLM through the `openai` client; every failure becomes an error that says what to do.

The client itself waits and asks again after a 429, a 5xx, a time-out or a broken connection. It
does not handle everything (openai 3.54). This module does: a body that is cut off or is not JSON, a
web page with status 200, `choices` that are null, a quota that no waiting will refill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SOURCES = ("openai", "server", "local", "recording")
LONGEST_WAIT = 60.0  # seconds: if a server asks for a longer wait, do not try again


class TeacherError(RuntimeError):
    """The teacher cannot be asked: what happened, and what to do. It never shows the key."""


class Unreadable(TeacherError):
    """A response came, but it is no completion: cut off, not JSON, a web page, no choices."""


@dataclass(frozen=True)
class Completion:
    """What a teacher wrote, and how many tokens it cost.

    `text` is empty if the teacher refused. `finish_reason` is `stop` when the text ended by itself,
    `length` when it was cut off, `content_filter` when it was censored. Tokens are None if the
    server does not count them.
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Teacher:
    """An LLM behind the OpenAI protocol: `client` is an ordinary `openai.OpenAI`.

    Args:
        source: `openai` (needs OPENAI_API_KEY), `server` (needs OPENAI_BASE_URL: Ollama, vLLM,
            llama.cpp …), `local` (after `make teacher`), or `recording`. By default SFT_TEACHER
            names it. If that is not set: `server` or `openai` if its variable is set, `local` if it
            is installed, else `recording`. The variables may be in a file `.env`.
        model: the model's name. By default OPENAI_MODEL; if that is not set, `gpt-4o-mini` from
            OpenAI, or the only model that the server has.
        timeout: seconds to wait for an answer.
        max_retries: how often the client asks again after a failure that may pass.

    Raises:
        TeacherError: the source is not there, or a setting is missing.
    """

    def __init__(
        self,
        source: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
    ) -> None:
        from dotenv import find_dotenv, load_dotenv

        load_dotenv(find_dotenv(usecwd=True))
        self.source = source or os.environ.get("SFT_TEACHER") or _first_source()
        if self.source not in SOURCES:
            raise TeacherError(
                f"Expected one of {', '.join(SOURCES)} as the teacher, found {self.source!r}. "
                "Correct SFT_TEACHER, or leave it empty."
            )
        url, self._key = _address(self.source)
        self.client = _client(self.source, url, self._key, timeout, max_retries)
        self.model = model or self._find_model()

    def __repr__(self) -> str:
        where = {"recording": "recorded, no server is asked"}.get(
            self.source, f"asked at {self.client.base_url}"
        )
        return f"Teacher({self.source}: {self.model}, {where})"

    def ask(
        self,
        messages: Sequence[dict[str, str]],
        schema: dict[str, Any] | None = None,
        temperature: float = 0.7,
        seed: int | None = None,
        max_tokens: int = 256,
    ) -> Completion:
        """One completion.

        Args:
            messages: dicts with `role` and `content`, the last one from the user.
            schema: a JSON schema that the completion must follow ("Structured Outputs").
            temperature: 0 for the likeliest text, higher for more variety.
            seed: with the same seed, most servers write the same text again.
            max_tokens: the completion is cut off at this length.

        Raises:
            Unreadable: the response is no completion.
            TeacherError: no response came, and asking again now would not help.
        """
        return self.send(self.request(messages, schema, temperature, seed, max_tokens))

    def send(self, request: dict[str, Any]) -> Completion:
        """One completion, for a request as `request` makes it; raises what `ask` raises."""
        return self._with_clear_errors(
            lambda: _completion(self.client.chat.completions.create(**request))
        )

    def request(
        self,
        messages: Sequence[dict[str, str]],
        schema: dict[str, Any] | None,
        temperature: float,
        seed: int | None,
        max_tokens: int,
    ) -> dict[str, Any]:
        """What `ask` sends, as keyword arguments of `client.chat.completions.create`."""
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            request["seed"] = seed
        if schema is not None:
            named = {"name": "answer", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        return request

    def _with_clear_errors(self, call: Callable[[], Any]) -> Any:
        """The result of `call`; every failure becomes a TeacherError without the key."""
        import openai

        try:
            return call()
        except Unreadable:
            raise
        except (ValueError, openai.APIResponseValidationError) as error:
            # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
            problem = Unreadable(self._message("The response is no valid JSON", error))
        except openai.OpenAIError as error:
            problem = TeacherError(self._message(_advice(error), error))
        raise problem from None  # the original error holds the request, whose headers hold the key

    def _message(self, advice: str, error: Exception) -> str:
        details = " ".join(str(error).split())[:300]
        text = f"{advice} ({type(error).__name__}: {details})"
        return text.replace(self._key, "[key]") if self._key else text

    def _find_model(self) -> str:
        from sftlib.teacher.local import MODEL

        if self.source in ("local", "recording"):
            return MODEL
        if named := os.environ.get("OPENAI_MODEL"):
            return named
        if self.source == "openai":
            return "gpt-4o-mini"
        names = self._with_clear_errors(
            lambda: [str(model.id) for model in self.client.models.list()]
        )
        if len(names) != 1:
            raise TeacherError(
                f"Expected one model at OPENAI_BASE_URL, found {len(names)}: "
                f"{', '.join(names[:12]) or 'none'}. Name one of them with OPENAI_MODEL."
            )
        return names[0]


def _first_source() -> str:
    from sftlib.teacher.local import installed

    if os.environ.get("OPENAI_BASE_URL"):
        return "server"
    if os.environ.get("OPENAI_API_KEY"):
        return "openai"
    return "local" if installed() else "recording"


def _address(source: str) -> tuple[str | None, str]:
    """The address (None means OpenAI's own) and the key."""
    from sftlib.teacher import local

    key, url = os.environ.get("OPENAI_API_KEY", "").strip(), os.environ.get("OPENAI_BASE_URL")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise TeacherError(
            "OPENAI_API_KEY holds characters that no key has, such as spaces or curly quotes. Copy "
            "the key again, without anything around it."
        )
    if source == "openai":
        if not key:
            raise TeacherError(
                "Expected a key in OPENAI_API_KEY, found none. Put it into .env (see "
                ".env.example), or leave SFT_TEACHER empty to work without one."
            )
        return None, key
    if source == "server":
        if urlsplit(url or "").scheme not in ("http", "https"):
            raise TeacherError(
                f"Expected an address such as http://127.0.0.1:11434/v1 in OPENAI_BASE_URL, "
                f"found {url!r}."
            )
        return url, key
    if source == "local":
        try:
            return local.start()
        except RuntimeError as error:
            raise TeacherError(str(error)) from None
    return "http://recording.invalid/v1", ""


def _client(source: str, url: str | None, key: str, timeout: float, max_retries: int):
    from sftlib.teacher import recording

    import openai

    options: dict[str, Any] = {}
    if source == "recording":
        options["transport"] = recording.Replay()
    if source == "local":
        options["trust_env"] = False  # no proxy: it could not reach this machine's 127.0.0.1
    hooks = [_do_not_retry_in_vain]
    if record := os.environ.get("SFT_RECORD"):
        hooks.append(recording.Recorder(record))
    return openai.OpenAI(
        api_key=key or "none",  # the client demands a key; servers without keys ignore it
        base_url=url or "https://api.openai.com/v1",
        timeout=timeout,
        max_retries=max_retries,
        http_client=openai.DefaultHttpxClient(event_hooks={"response": hooks}, **options),
    )


def _do_not_retry_in_vain(response: Any) -> None:
    """A response hook: do not try again if the account is empty or the wait would be too long.

    The client obeys the header `x-should-retry` (openai-python, `_base_client._should_retry`).
    """
    if response.status_code != 429:
        return
    response.read()
    wait = response.headers.get("retry-after", "")
    too_long = wait.replace(".", "", 1).isdigit() and float(wait) > LONGEST_WAIT
    if b"insufficient_quota" in response.content or too_long:
        response.headers["x-should-retry"] = "false"


def _advice(error: Exception) -> str:
    """What happened and what to do, for the failures of the `openai` client."""
    import openai

    code = str(getattr(error, "code", None))
    status = getattr(error, "status_code", None)
    headers = getattr(getattr(error, "response", None), "headers", {})
    if code == "not_recorded":
        return "Nothing to replay."
    if code == "insufficient_quota":
        return "The account has no credit left. Add some, or use another teacher."
    if isinstance(error, openai.APITimeoutError):
        return "The teacher did not answer in time. Try again, or give a longer timeout."
    if isinstance(error, openai.APIConnectionError):
        return "The teacher cannot be reached. Is its server running, and its address right?"
    if status in (401, 403):
        return "The teacher does not accept the key. Correct OPENAI_API_KEY in .env."
    if status == 404:
        return "The teacher has no such model or address. Check OPENAI_MODEL and OPENAI_BASE_URL."
    if status == 429:
        wait = headers.get("retry-after")
        return "Too many requests. Try again " + (f"in {wait} s." if wait else "later.")
    if status is not None and status >= 500:
        return "The teacher's server fails. Try again later; what was accepted is kept."
    return "The teacher does not accept this request."


def _completion(response: Any) -> Completion:
    """Read a response. The client does not validate it, so any part of it may be missing."""
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices:
        shown = response if isinstance(response, str) else _as_text(response)
        raise Unreadable(
            f"Expected a chat completion with choices, found {' '.join(shown[:120].split())!r}. "
            "Does the address lead to a chat API?"
        )
    message = getattr(choices[0], "message", None)
    text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    if text is not None and not isinstance(text, str):
        raise Unreadable(f"Expected text as the message's content, found {type(text).__name__}.")
    usage = getattr(response, "usage", None)
    return Completion(
        text=text or "",
        finish_reason=getattr(choices[0], "finish_reason", None),
        refusal=refusal if isinstance(refusal, str) else None,
        prompt_tokens=_count(getattr(usage, "prompt_tokens", None)),
        completion_tokens=_count(getattr(usage, "completion_tokens", None)),
    )


def _count(number: Any) -> int | None:
    return number if isinstance(number, int) and number >= 0 else None


def _as_text(response: Any) -> str:
    try:
        return json.dumps(response.model_dump(warnings=False), default=str)
    except Exception:
        return repr(response)
