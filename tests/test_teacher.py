"""Whatever a teacher's server does, it ends in clear words or in a count, and nothing is lost.

The real `openai` client talks over a real socket to a server on 127.0.0.1 that does wrong on
purpose (pytest-httpserver).
"""

import fcntl
import json
import logging
import os
import random
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from sftlib.data import read_jsonl, write_jsonl
from sftlib.teacher import (
    Completion,
    PairError,
    Prices,
    Refused,
    Teacher,
    TeacherError,
    Unreadable,
    generate_pairs,
    local,
    parse_pairs,
)
from sftlib.teacher.client import _is_this_machine
from sftlib.teacher.errors import PARAMETERS, do_not_retry_in_vain
from sftlib.teacher.recording import Recorder, Replay

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

KEY = "sk-planted-0123456789abcdefghij"
PAIR = {"question": "What is the capital of Kenya?", "answer": "The capital of Kenya is Nairobi."}
ASK = [{"role": "user", "content": "Write a pair."}]
PATH = "/v1/chat/completions"


def chat(content, finish_reason="stop", refusal=None, usage=(7, 5), **message) -> dict:
    """The body of a chat completion."""
    said = {"role": "assistant", "content": content, "refusal": refusal} | message
    counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": said}],
        "usage": counted,
    }


def numbered(i: int) -> dict:
    return chat(json.dumps({"question": f"Question {i}?", "answer": f"Answer number {i}."}))


def error(status: int, code: str = "c", message: str = "x", **headers: str) -> Response:
    body = json.dumps({"error": {"message": message, "type": code, "code": code}})
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(body, status, headers=headers, content_type="application/json")


def raw(body: bytes | str, kind: str = "application/json") -> Response:
    return Response(body, 200, content_type=kind)


@pytest.fixture
def settled(monkeypatch, tmp_path):
    """No setting of this machine, no `.env`, no proxy."""
    monkeypatch.chdir(tmp_path)
    for name in ("SFT_TEACHER", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "SFT_RECORD"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture(scope="module")
def make_httpserver():
    """The server behind pytest-httpserver's fixture `httpserver`, here with a thread a request."""
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def serve(httpserver, settled):
    """Make the server give these answers, one a request, the last one for ever; returns a teacher.

    `serve.log` holds the requests that came.
    """

    def start(*steps, **options) -> Teacher:
        waiting = list(steps)

        def answer(request: Request) -> Response:
            serve.log.append(request.get_json())
            step = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            step = step(request) if callable(step) and not isinstance(step, Response) else step
            return step if isinstance(step, Response) else raw(json.dumps(step))

        httpserver.clear()
        httpserver.expect_request(PATH, method="POST").respond_with_handler(answer)
        settled.setenv("OPENAI_BASE_URL", httpserver.url_for("/v1"))
        settled.setenv("OPENAI_API_KEY", KEY)
        settled.setenv("OPENAI_MODEL", "m")
        return Teacher(**{"timeout": 5.0, "max_retries": 2} | options)

    def serve(*steps, **options):
        return start(*steps, **options)

    serve.log = []
    return serve


# --- One request ---------------------------------------------------------------------------------


def test_an_answer_comes_with_its_tokens(serve):
    found = serve(chat("Hello.")).ask(ASK, temperature=0.2, seed=3, max_tokens=9)
    assert found == Completion("Hello.", "stop", None, 7, 5)
    assert serve.log == [
        {"model": "m", "messages": ASK, "temperature": 0.2, "seed": 3, "max_tokens": 9}
    ]


@pytest.mark.integration
def test_a_short_wait_is_waited_for(serve):
    teacher = serve(error(429, Retry_After="1"), chat("ok"))
    started = time.monotonic()
    assert teacher.ask(ASK).text == "ok"
    assert len(serve.log) == 2 and time.monotonic() - started >= 1


@pytest.mark.parametrize("wait", ["61", "600", "1e9", "99999999999"])
def test_an_absurd_wait_ends_the_tries_at_once(serve, wait):
    teacher = serve(error(429, Retry_After=wait))
    with pytest.raises(TeacherError, match=f"Too many requests. Try again in {wait} s."):
        teacher.ask(ASK)
    assert len(serve.log) == 1


def test_an_empty_account_is_not_asked_again(serve):
    teacher = serve(error(429, "insufficient_quota", Retry_After_Ms="1"))
    with pytest.raises(TeacherError, match="no credit left. Add some"):
        teacher.ask(ASK)
    assert len(serve.log) == 1


def test_a_server_error_that_passes_is_not_noticed(serve):
    broken = error(500, Retry_After_Ms="1")
    assert serve(broken, broken, chat("ok")).ask(ASK).text == "ok"
    assert len(serve.log) == 3


@pytest.mark.parametrize("status", [500, 502, 503, 529])
def test_a_server_error_that_stays_is_said(serve, status):
    with pytest.raises(TeacherError, match="server fails. Try again later"):
        serve(error(status, Retry_After_Ms="1")).ask(ASK)
    assert len(serve.log) == 3


@pytest.mark.integration
def test_a_server_that_does_not_answer_in_time(serve):
    def slow(request):
        time.sleep(1)
        return raw("{}")

    with pytest.raises(TeacherError, match="did not answer in time"):
        serve(slow, timeout=0.2, max_retries=1).ask(ASK)


class Cutting(socketserver.StreamRequestHandler):
    """Promises a whole answer, sends its beginning, and hangs up; answers the third request."""

    asked = 0

    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline().strip().lower()) not in (b"", b"\r\n"):
            length = int(line.split()[1]) if line.startswith(b"content-length") else length
        self.rfile.read(length)
        type(self).asked += 1
        body = json.dumps(chat("ok")).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        whole = body if self.asked >= 3 else body[:40]
        self.wfile.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + whole)


@pytest.mark.integration
def test_a_connection_cut_in_the_middle_is_tried_again(settled):
    settled.setattr(Cutting, "asked", 0)
    with socketserver.TCPServer(("127.0.0.1", 0), Cutting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settled.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        settled.setenv("OPENAI_MODEL", "m")
        with pytest.raises(TeacherError, match="cannot be reached"):
            Teacher(max_retries=0).ask(ASK)
        assert Teacher(max_retries=1).ask(ASK).text == "ok"
        assert Cutting.asked == 3
        server.shutdown()


def test_nobody_listens(settled):
    settled.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    settled.setenv("OPENAI_MODEL", "m")
    with pytest.raises(TeacherError, match="cannot be reached. Is its server running"):
        Teacher(max_retries=0).ask(ASK)


NOT_COMPLETIONS = {
    "truncated": raw(json.dumps(chat("hello"))[:80]),
    "invalid UTF-8": raw(json.dumps(chat("caf@")).encode().replace(b"@", b"\xe9")),
    "a web page": raw("<html>Log in to the Wi-Fi</html>", "text/html"),
    "a web page that says it is JSON": raw("<html></html>"),
    "nothing": raw(""),
    "null": raw("null"),
    "a list": raw("[]"),
    "another protocol": raw('{"result": "hi"}'),
    "choices null": raw(json.dumps(chat("x") | {"choices": None})),
    "choices empty": raw(json.dumps(chat("x") | {"choices": []})),
    "choices of text": raw(json.dumps(chat("x") | {"choices": "x"})),
    "content a number": raw(json.dumps(chat(7))),
}


@pytest.mark.parametrize("name", NOT_COMPLETIONS)
def test_a_response_that_is_no_completion_is_unreadable(serve, name):
    with pytest.raises(Unreadable, match="Expected|no valid JSON"):
        serve(NOT_COMPLETIONS[name]).ask(ASK)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"usage": None}, Completion("x", "stop")),
        ({"usage": {"prompt_tokens": "many"}}, Completion("x", "stop")),
        ({"usage": {"prompt_tokens": 0}}, Completion("x", "stop", None, 0)),
        (
            {"choices": [{"index": 0, "message": {"content": None}}]},
            Completion("", None, None, 7, 5),
        ),
        ({"choices": [{}]}, Completion("", None, None, 7, 5)),
    ],
)
def test_what_a_completion_lacks_is_none(serve, change, found):
    assert serve(chat("x") | change).ask(ASK) == found


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401), "does not accept the key. Correct OPENAI_API_KEY"),
        (error(403), "knows the key, but does not allow this"),
        (error(404), "no such model or address. Check OPENAI_MODEL"),
        (error(400), "does not accept this request"),
        (error(422), "does not accept this request"),
    ],
)
def test_a_refused_request_says_what_to_correct(serve, answer, words):
    with pytest.raises(TeacherError, match=words):
        serve(answer).ask(ASK)
    assert len(serve.log) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Rate limit reached: limit 3 / min. Please try again in 20s.", "20"),
        ("Limit 100, used 99. Please try again in 1m26.4s. Visit us.", "86.4"),
        ("Please try again in 120ms", "0.12"),
        ("Please retry after 26 seconds. See https://x/y.", "26"),
        ("Please wait 2 minutes and 5 seconds", "125"),
        ('"retryDelay": "38s"', "38"),
        ("Try again in 1h2m0s", "3720"),
        ("Slow down. You may send 20 requests a minute.", None),
    ],
)
def test_a_wait_that_only_the_text_names_is_heeded(text, seconds):
    response = httpx2.Response(429, text=text)
    do_not_retry_in_vain(response)
    assert response.headers.get("retry-after") == seconds
    in_vain = seconds is not None and float(seconds) > 60
    assert (response.headers.get("x-should-retry") == "false") == in_vain


def test_the_wait_in_the_text_is_waited_for_or_said(serve):
    teacher = serve(error(429, message="Please try again in 120ms."), chat("ok"))
    assert teacher.ask(ASK).text == "ok"
    with pytest.raises(TeacherError, match=r"Too many requests. Try again in 1200 s\."):
        serve(error(429, message="Please try again in 20m0s.")).ask(ASK)


LONG = "Sorry, " + "because of a long reason " * 20 + "the end."
BODIES = {
    "OpenAI": {"error": {"message": LONG, "code": "c"}},
    "a text": {"error": LONG},
    "FastAPI": {"detail": [{"loc": ["body", "messages"], "msg": LONG}]},
    "vLLM": {"object": "error", "message": LONG},
    "Google": [{"error": {"message": LONG, "status": "INVALID_ARGUMENT"}}],
    "OpenRouter": {"error": {"message": "Provider returned error", "metadata": {"raw": LONG}}},
    "no JSON": LONG,
}


@pytest.mark.parametrize("name", BODIES)
def test_the_servers_own_words_are_shown_whole(serve, name):
    body = BODIES[name] if name == "no JSON" else json.dumps(BODIES[name])
    with pytest.raises(Refused) as problem:
        serve(Response(body, 400, content_type="application/json")).ask(ASK)
    assert LONG in str(problem.value)


@pytest.mark.parametrize("body", [{"error": {"message": LONG, "code": 502}}, {"error": LONG}])
def test_an_error_with_status_200_is_said(serve, body):
    with pytest.raises(Unreadable, match="answers with an error") as problem:
        serve(body).ask(ASK)
    assert LONG in str(problem.value)
    broken = {"choices": [{"message": {"content": ""}} | body]}
    with pytest.raises(Unreadable, match="answers with an error"):
        serve(chat("") | broken).ask(ASK)


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", None),
        (["a", {"type": "output_text", "text": "b"}, {"type": "image_url"}], "ab", None),
        ([{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "b"}], "b", "hm"),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"text": "b"}],
            "b",
            "hm",
        ),
        ([], "", None),
    ],
)
def test_text_in_parts_is_joined(serve, content, text, reasoning):
    found = serve(chat(content)).ask(ASK)
    assert (found.text, found.reasoning) == (text, reasoning)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_apart_from_the_text_is_kept(serve, key):
    found = serve(chat("b", **{key: "hm"})).ask(ASK)
    assert (found.text, found.reasoning) == ("b", "hm")


# What servers say when they do not know a parameter, as users have reported it.
UNKNOWN = [
    ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
     "'max_completion_tokens' instead."),
    ("temperature", "Unsupported value: 'temperature' does not support 0.7 with this model. Only "
     "the default (1) value is supported."),
    ("temperature", "`temperature` is deprecated for this model."),
    ("seed", "property 'seed' is unsupported"),
    ("seed", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'),
    ("seed", [{"type": "extra_forbidden", "loc": ["body", "seed"],
               "msg": "Extra inputs are not permitted", "input": 3}]),
    ("response_format", "This response_format type is unavailable now"),
    ("response_format", "This model does not support response format `json_schema`."),
    ("response_format", "'response_format.type' must be 'text' or 'json_object'"),
    ("response_format", "Invalid value: 'json_schema'. Supported values are: 'json_object'."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), UNKNOWN)
def test_a_refused_parameter_is_left_out_once_and_said(serve, caplog, name, words):
    def answer(request):
        if name in request.get_json():
            body = {"detail": words} if isinstance(words, list) else {"error": {"message": words}}
            return Response(json.dumps(body), 422 if isinstance(words, list) else 400)
        return raw(json.dumps(chat("ok")))

    teacher = serve(answer)
    for seed in (1, 2, 3):
        assert teacher.ask(ASK, {"type": "object"}, seed=seed, max_tokens=9).text == "ok"
    assert [name in request for request in serve.log] == [True, False, False, False]
    kept = serve.log[-1].keys() - {"max_completion_tokens"}
    assert kept == {"model", "messages", *PARAMETERS} - {name}
    assert (serve.log[-1].get("max_completion_tokens") == 9) == (name == "max_tokens")
    assert len([r for r in caplog.records if f"refuses {name}" in r.getMessage()]) == 1


def test_several_refused_parameters_are_left_out_one_after_the_other(serve):
    names = {"max_tokens", "temperature", "seed"}

    def answer(request):
        found = sorted(names & request.get_json().keys())
        words = f"Unsupported parameter: '{found[0]}'" if found else ""
        return error(400, message=words) if found else raw(json.dumps(chat("ok")))

    assert serve(answer).ask(ASK, seed=1).text == "ok"
    assert len(serve.log) == 4


@pytest.mark.parametrize(
    "words",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 8000. This model's maximum context "
        "length is 4096 tokens and your request has 30 input tokens.",
        "temperature must be in [0, 2], got 3.0",
        "Invalid schema for response_format 'answer': 'x' is not supported.",
        "The seeds of pumpkins are not allowed here.",
    ],
)
def test_a_wrong_value_is_no_unknown_parameter(serve, words):
    with pytest.raises(Refused):
        serve(error(400, message=words)).ask(ASK, {"type": "object"}, seed=1)
    assert len(serve.log) == 1


def test_a_parameter_that_was_not_the_cause_is_not_left_out_for_ever(serve):
    filtered = error(400, message="Filtered. The seed is not allowed here.")
    teacher = serve(filtered, filtered, chat("ok"))
    with pytest.raises(Refused):
        teacher.ask(ASK, seed=1)
    assert teacher.ask(ASK, seed=2).text == "ok" and "seed" in serve.log[-1]


# --- Which teacher, and its key ------------------------------------------------------------------


def test_the_first_source_that_is_there_is_taken(settled):
    settled.setattr("sftlib.teacher.local.installed", lambda: False)
    assert Teacher().source == "recording"
    settled.setattr("sftlib.teacher.local.installed", lambda: True)
    settled.setattr("sftlib.teacher.local.start", lambda: ("http://127.0.0.1:9/v1", "k"))
    assert repr(Teacher()) == (
        "Teacher(local: smollm2-135m-instruct, asked at http://127.0.0.1:9/v1/)"
    )
    settled.setenv("OPENAI_API_KEY", KEY)
    assert repr(Teacher()) == ("Teacher(openai: gpt-4o-mini, asked at https://api.openai.com/v1/)")
    settled.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    settled.setenv("OPENAI_MODEL", "m")
    assert Teacher().source == "server"
    settled.setenv("SFT_TEACHER", "recording")
    assert Teacher().source == "recording"
    assert Teacher("openai").source == "openai"


def test_settings_may_stand_in_a_file(settled, tmp_path):
    lines = "OPENAI_BASE_URL=http://127.0.0.1:9/v1\nOPENAI_MODEL=m\n"
    (tmp_path / ".env").write_text(lines + f"OPENAI_API_KEY={KEY}\n")
    teacher = Teacher()
    assert (teacher.source, teacher.model, teacher.client.api_key) == ("server", "m", KEY)
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        settled.delenv(name)


def test_the_only_model_of_a_server_is_taken(httpserver, settled):
    settled.setenv("OPENAI_BASE_URL", httpserver.url_for("/v1"))
    one = {"object": "list", "data": [{"id": "a", "object": "model"}]}
    httpserver.expect_request("/v1/models").respond_with_json(one)
    assert Teacher().model == "a"
    httpserver.clear()
    two = {"object": "list", "data": [{"id": "a"}, {"id": "b"}]}
    httpserver.expect_request("/v1/models").respond_with_json(two)
    with pytest.raises(TeacherError, match="one model .* found 2: a, b. Name one"):
        Teacher()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"SFT_TEACHER": "openai"}, "Expected a key in OPENAI_API_KEY, found none"),
        ({"SFT_TEACHER": "openai", "OPENAI_API_KEY": "“sk-1”"}, "characters that no key has"),
        ({"SFT_TEACHER": "openai", "OPENAI_API_KEY": "sk-1\nsk-2"}, "characters that no key has"),
        ({"SFT_TEACHER": "server"}, "Expected an address such as"),
        ({"SFT_TEACHER": "server", "OPENAI_BASE_URL": "localhost:8"}, "Expected an address such"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:x/v1"}, "Expected an address such"),
        ({"OPENAI_BASE_URL": "http://[::1/v1"}, "Expected an address such"),
        ({"SFT_TEACHER": "gpt"}, "Expected one of openai, server, local, recording"),
    ],
)
def test_a_setting_that_cannot_be_is_said(settled, settings_, words):
    for name, value in settings_.items():
        settled.setenv(name, value)
    with pytest.raises(TeacherError, match=words) as problem:
        Teacher()
    assert settings_.get("OPENAI_API_KEY", "-") not in str(problem.value)


@pytest.mark.parametrize("end", ["", "/", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_an_address_is_mended(serve, settled, httpserver, end):
    serve(chat("ok"))
    settled.setenv("OPENAI_BASE_URL", httpserver.url_for("/").rstrip("/") + end)
    assert Teacher(max_retries=0).ask(ASK).text == "ok"


def test_another_path_is_left_alone(settled):
    settled.setenv("OPENAI_MODEL", "m")
    for url, base in {
        "http://127.0.0.1:9/api/v3": "http://127.0.0.1:9/api/v3/",
        "http://127.0.0.1:9/chat/completions": "http://127.0.0.1:9",
    }.items():
        settled.setenv("OPENAI_BASE_URL", url)
        assert str(Teacher().client.base_url) == base


def test_no_proxy_stands_before_this_machine(serve, settled):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        settled.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        settled.delenv(name, raising=False)
    assert serve(chat("ok"), max_retries=0).ask(ASK).text == "ok"
    assert all(map(_is_this_machine, ["localhost", "127.1.2.3", "::1", "0.0.0.0"]))
    assert not any(map(_is_this_machine, ["example.org", "10.0.0.1", "localhost.org", ""]))


def test_a_secret_in_the_address_shows_nowhere(serve, settled, httpserver):
    serve(error(404), max_retries=0)
    url = httpserver.url_for("/v1").replace("//", "//me:hunter2@") + "?api-key=hunter2"
    settled.setenv("OPENAI_BASE_URL", url)
    settled.setenv("OPENAI_MODEL", "m")
    with pytest.raises(TeacherError) as problem:
        Teacher().ask(ASK)
    assert "hunter2" not in repr(Teacher()) + str(problem.value)
    settled.setenv("OPENAI_BASE_URL", KEY)
    with pytest.raises(TeacherError, match="found another text") as problem:
        Teacher()
    assert KEY not in str(problem.value)


def test_a_teacher_that_is_not_installed_says_how(settled):
    settled.setattr(local, "installed", lambda: False)
    settled.setattr(local, "start", local.start.__wrapped__)  # another test may have started it
    with pytest.raises(TeacherError, match="Run `make teacher`"):
        Teacher("local")


def test_the_key_shows_nowhere(serve, settled, caplog, capfd, tmp_path):
    """Not even where the server says it aloud, or somebody turns the client's logging on."""
    settled.setenv("OPENAI_LOG", "debug")
    with caplog.at_level(logging.DEBUG):
        teacher = serve(chat(json.dumps(PAIR)))
        generate_pairs(["Kenya"], 1, tmp_path / "pairs.jsonl", teacher)
        with pytest.raises(TeacherError, match=r"\[key\]") as problem:
            serve(error(401, message=f"Incorrect API key provided: {KEY}")).ask(ASK)
        for answer in (raw(f"<html>{KEY}", "text/html"), {"error": f"not {KEY}"}):
            with pytest.raises(Unreadable, match=r"\[key\]"):
                serve(answer).ask(ASK)
        for before in (0, 9, 18):  # wherever the text is cut, no half of a key is left
            with pytest.raises(TeacherError) as cut:
                serve(error(401, message="x" * before + (KEY + " ") * 200)).ask(ASK)
            assert KEY[:9] not in str(cut.value)
            with pytest.raises(Unreadable) as cut:
                serve(raw("x" * before + (KEY + " ") * 200, "text/html")).ask(ASK)
            assert KEY[:9] not in str(cut.value)
        refusal = error(400, message=f"seed is not supported for {KEY}")
        serve(refusal, chat("ok")).ask(ASK, seed=1)
    shown = repr(teacher) + str(problem.value) + caplog.text + "".join(capfd.readouterr())
    shown += repr(problem.value.__context__) + repr(problem.value.__cause__)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert KEY not in shown + "".join(path.read_text() for path in files)


@pytest.mark.parametrize(("server", "file"), [(True, None), (False, Path("model.gguf"))])
def test_half_of_the_local_teacher_is_none(settled, server, file):
    settled.setattr("sftlib.deploy.serving.installed", lambda: server)
    settled.setattr("sftlib.teacher.local.smollm2_gguf", lambda: file)
    assert not local.installed()


# --- A recording ---------------------------------------------------------------------------------


def test_a_recording_answers_as_the_server_did(serve, settled, tmp_path):
    path = tmp_path / "recording.jsonl"
    settled.setenv("SFT_RECORD", str(path))
    live = serve(chat("first"), error(500, Retry_After_Ms="1"), chat("second"))
    said = [live.ask(ASK, seed=1), live.ask(ASK, seed=2)]
    settled.delenv("SFT_RECORD")
    assert len(read_jsonl(path)) == 2 and KEY not in path.read_text()
    settled.setattr("sftlib.teacher.recording.Replay", lambda: Replay(path))
    replayed = Teacher("recording", model="m")
    assert [replayed.ask(ASK, seed=1), replayed.ask(ASK, seed=2)] == said
    with pytest.raises(TeacherError, match="not in the recording.*make teacher"):
        replayed.ask(ASK, seed=3)


def test_a_recorded_request_is_found_in_whatever_order_its_keys_come(tmp_path):
    path = tmp_path / "recording.jsonl"
    write_jsonl(path, [{"request": {"model": "m", "seed": 1}, "response": {"id": "x"}}])
    asked = httpx2.Request("POST", "http://t/v1", json={"seed": 1, "model": "m"})
    assert Replay(path).handle_request(asked).json() == {"id": "x"}


def test_the_shipped_recording_is_readable_and_its_teacher_named(settled):
    from sftlib.teacher.recording import RECORDING

    rows = read_jsonl(RECORDING)
    assert len(rows) > 50
    assert {row["request"]["model"] for row in rows} == {"smollm2-135m-instruct"}
    assert {row["response"]["object"] for row in rows} == {"chat.completion"}


def test_the_recorder_keeps_no_failures(serve, settled, tmp_path):
    settled.setenv("SFT_RECORD", str(tmp_path / "recording.jsonl"))
    with pytest.raises(TeacherError):
        serve(error(400)).ask(ASK)
    assert not (tmp_path / "recording.jsonl").exists()
    assert Recorder(tmp_path).path == tmp_path


# --- Reading pairs -------------------------------------------------------------------------------

ONE, TWO = {"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (json.dumps(ONE), [ONE]),
        (json.dumps([ONE, TWO]), [ONE, TWO]),
        (json.dumps({"examples": [ONE, TWO]}), [ONE, TWO]),
        (json.dumps({"pairs": [[ONE], [TWO]]}), [ONE, TWO]),
        (json.dumps({"instruction": "a?", "response": "b"}), [ONE]),
        (json.dumps(ONE | {"difficulty": 3}), [ONE]),
        ("```json\n" + json.dumps([ONE], indent=2) + "\n```", [ONE]),
        ("```\n" + json.dumps(ONE) + "\n```\nI hope this helps!", [ONE]),
        ("Sure! Here it is: " + json.dumps(ONE) + " Anything else?", [ONE]),
        (json.dumps(ONE) + "\n" + json.dumps(TWO), [ONE, TWO]),
        (json.dumps({"question": " a?\n", "answer": "\tb "}), [ONE]),
        ("[" + json.dumps(ONE) + ', {"question": "c?", "ans', [ONE]),
        ("[sic] {not JSON} " + json.dumps(ONE), [ONE]),
    ],
)
def test_pairs_are_found_however_they_are_wrapped(text, found):
    assert [pair.model_dump() for pair in parse_pairs(text)] == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("I would rather not.", "no JSON"),
        ("{'question': 'a?', 'answer': 'b'}", "broken JSON"),
        ('{"question": "a?", "answer": "b', "broken JSON"),
        ("[" * 50_000, "broken JSON"),
        ('{"a":' * 15_000, "broken JSON"),
        ('{"question": ' + "9" * 6000 + "}", "broken JSON"),
        ("[]", "no pair"),
        ("{}", "wrong keys"),
        ('{"q": "a?", "a": "b"}', "wrong keys"),
        ('{"question": "a?"}', "wrong keys"),
        ("[1, 2]", "wrong keys"),
        ('{"question": "a?", "answer": 42}', "not text"),
        ('{"question": "a?", "answer": null}', "not text"),
        ('{"question": "a?", "question": "b?", "answer": "c"}', "duplicate keys"),
        ('{"question": "a?", "answer": ""}', "the answer is empty"),
        ('{"question": "\\u200b", "answer": "b"}', "the question is empty"),
        ('{"question": "a?", "answer": "A"}', "the answer only repeats the question"),
        ('{"question": "a?", "answer": "b\\ud800"}', "the answer has half a character ('\\ud800')"),
        (
            '{"question": "a?", "answer": "b<|im_end|>"}',
            "the answer holds the control token '<|im_end|>'",
        ),
        ("x" * 10_000_000, "too long"),
        (json.dumps({"question": "a?", "answer": "b" * 10_000_000}), "too long"),
        (None, "not text"),
    ],
)
def test_what_is_no_pair_has_a_reason(text, reason):
    with pytest.raises(PairError) as problem:
        parse_pairs(text)
    assert problem.value.reason == reason


def written(answer: str) -> str:
    """A pair as a model writes it: `answer` stands in the JSON as it is."""
    return '{"question": "q?", "answer": "' + answer + '"}'


DRAFT = json.dumps({"question": "Draft?", "answer": "Not this one."})


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{json.dumps(ONE)}",
        f"<think>\n<think>{DRAFT}</think>{DRAFT}</think>{json.dumps(ONE)}",
        f"<THINKING>{DRAFT}</THINKING> Here it is: {json.dumps(ONE)}",
        f"<seed:think>{DRAFT}</seed:think>{json.dumps(ONE)}",
        f"[THINK]{DRAFT}[/THINK]{json.dumps(ONE)}",
        f"◁think▷{DRAFT}◁/think▷{json.dumps(ONE)}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final"
        f"<|message|>{json.dumps(ONE)}",
        f"Hm. {DRAFT}</think>{json.dumps(ONE)}",  # the template has opened it
        f"{'{ [' * 300} {DRAFT}</think>{json.dumps(ONE)}",
        f"{json.dumps(ONE)}<think>Another one: {DRAFT}",
    ],
)
def test_a_draft_is_no_pair(text):
    assert [pair.model_dump() for pair in parse_pairs(text)] == [ONE]


@pytest.mark.parametrize("text", [f"<think>{DRAFT}", f"{DRAFT}</think>", f"Well.\n<think> {DRAFT}"])
def test_reasoning_alone_is_no_pair(text):
    with pytest.raises(PairError) as problem:
        parse_pairs(text)
    assert problem.value.reason == "only reasoning"


def test_a_pair_about_the_tags_is_a_pair():
    text = json.dumps(ONE | {"answer": "<think> opens and </think> closes it."})
    assert parse_pairs(text)[0].answer == "<think> opens and </think> closes it."


@pytest.mark.parametrize(
    "latex",
    [
        r"\frac{1}{2} and \forall x, \beta and \binom{n}{k}",
        r"\theta, \times, \tau, \tfrac12, \textbf{a}, \therefore",
        r"\nabla f \neq 0, x\notin A, the frequency \nu, $\nu$ and (\nu)",
        r"\rho and \right) and \rangle",
        r"\alpha, \(x\), \[y\], \{z\}, 5\%, \underline{x}, \upsilon",
        r"$x \to y$, \tan x, 5\text{ m}",
        r"\begin{pmatrix} a & b \\ c & d \\\hline \end{pmatrix}",
        r"a regex: \bword\b, \d+\s*",
        r"\alpha\ne 0 and 2\nu",
        r"\noindent $a \nmid b$ and \(a \nless b\)",
    ],
)
def test_latex_with_single_backslashes_is_kept(latex):
    assert parse_pairs(written(latex))[0].answer == latex
    assert parse_pairs(json.dumps({"question": latex, "answer": "b"}))[0].question == latex


@pytest.mark.parametrize(
    "text",
    [
        "First.\nnot now\n\nTo do:\n- it is\nno\r\nnext",
        "Solve:\nu + v = 3\nu - v = 1",
        "a\tan apple\textra\to\top",
        "Poem,\nexists and\nless\nnu",
        "$$\ne^{i\\pi} + 1 = 0\n$$ and \\frac{1}{2}",  # two backslashes in JSON: it is proper
        "\\alpha: \nu is \\theta",
        'A "quote", a café, a / and a \\ alone',
        "C:\\new\\table\\frac",
        "\\begin{pmatrix} a \\\\ b \\end{pmatrix}",
    ],
)
def test_proper_json_is_read_as_it_is(text):
    for ascii_ in (True, False):
        found = parse_pairs(json.dumps({"question": "q?", "answer": text}, ensure_ascii=ascii_))
        assert found[0].answer == text


def test_a_model_may_double_some_backslashes_only():
    found = parse_pairs(written(r"\\lim_{x \to 0} \frac{a}{b} 5\text{ m}\nu"))[0].answer
    assert found == "\\lim_{x \\to 0} \\frac{a}{b} 5\\text{ m}\nu"


def test_a_line_may_begin_with_a_variable():
    found = parse_pairs(written(r"\alpha:\nu + v = 3.\nu - v = 1, $$\nu = 2$$"))[0].answer
    assert found == "\\alpha:\nu + v = 3.\nu - v = 1, $$\nu = 2$$"


def test_line_breaks_and_apostrophes_need_no_escape():
    assert parse_pairs(written("one\ntwo, it\\'s"))[0].answer == "one\ntwo, it's"


def test_a_broken_escape_of_unicode_is_no_pair():
    with pytest.raises(PairError, match="broken JSON"):
        parse_pairs(written(r"caf\u00zz"))


def test_other_keys_of_any_kind_do_not_hide_a_pair():
    extra = {"sources": ["x", {"page": 3}], "more": [TWO | {"tags": []}]}
    rejected: list[PairError] = []
    assert [pair.model_dump() for pair in parse_pairs(json.dumps(ONE | extra), rejected)] == [
        ONE,
        TWO,
    ]
    assert not rejected


def test_a_bad_pair_does_not_hide_a_good_one():
    rejected: list[PairError] = []
    text = json.dumps([ONE, {"question": "c?", "answer": " "}, 7])
    assert [pair.model_dump() for pair in parse_pairs(text, rejected)] == [ONE]
    assert [e.reason for e in rejected] == ["the answer is empty", "wrong keys"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["question", "answer", "pairs"]) | st.text(), inner)
        | st.fixed_dictionaries({"question": inner, "answer": inner})
        | st.fixed_dictionaries({"instruction": inner, "response": inner})
    ),
)


@given(st.text() | JSON.map(json.dumps) | st.lists(JSON.map(json.dumps) | st.text()).map("".join))
@settings(suppress_health_check=list(HealthCheck))
def test_whatever_is_read_gives_pairs_with_text_or_the_documented_error(text):
    try:
        pairs = parse_pairs(text)
    except PairError as problem:
        assert problem.reason
        return
    assert pairs
    for pair in pairs:
        assert pair.question.strip() and pair.answer.strip()
        json.dumps(pair.model_dump(), ensure_ascii=False).encode()


# --- Generating ----------------------------------------------------------------------------------

COUNTED = {
    "refusal": (chat(None, refusal="I cannot help with that."), "refused"),
    "length": (chat('{"question": "a?", "ans', finish_reason="length"), "cut off"),
    "content_filter": (chat("", finish_reason="content_filter"), "filtered"),
    "no text": (chat(None), "no JSON"),
    "reasoning apart": (
        chat("", "length", reasoning_content=json.dumps(PAIR)),
        "only reasoning",
    ),
    "hidden reasoning": (chat("", "length"), "only reasoning"),
    "unfinished reasoning": (chat("<think>" + json.dumps(PAIR), "length"), "only reasoning"),
    "too long a prompt": (error(400, "context_length_exceeded"), "refused by the server"),
    "a filtered prompt": (error(422, "content_filter"), "refused by the server"),
    "a flagged prompt": (error(403, message="Your input was flagged."), "refused by the server"),
    "prose": (chat("What is the capital of Kenya? Nairobi."), "no JSON"),
    "wrong keys": (chat('{"q": "a?", "a": "b"}'), "wrong keys"),
    "duplicate keys": (chat('{"question": "a", "question": "b", "answer": "c"}'), "duplicate keys"),
    "10 MB": (chat("x" * 10_000_000), "too long"),
    "control token": (
        chat('{"question": "a?", "answer": "<|im_start|>"}'),
        "the answer holds the control token '<|im_start|>'",
    ),
} | {name: (response, "unreadable response") for name, response in NOT_COMPLETIONS.items()}


@pytest.mark.parametrize("name", COUNTED)
def test_a_bad_answer_is_counted_and_the_next_one_taken(serve, tmp_path, name):
    answer, reason = COUNTED[name]
    teacher = serve(numbered(1), answer, numbered(2))
    done = generate_pairs(["x"], 2, tmp_path / "pairs.jsonl", teacher, concurrency=1)
    assert done.rejected == {reason: 1} and done.attempts == 3 and len(done.rows) == 2
    assert read_jsonl(tmp_path / "pairs.jsonl") == done.rows


def test_pairs_are_saved_as_conversations_with_their_origin(serve, tmp_path):
    teacher = serve(chat("```json\n" + json.dumps(PAIR) + "\n```"))
    done = generate_pairs([{"entity": "Kenya"}], 1, tmp_path / "new/pairs.jsonl", teacher)
    [row] = read_jsonl(tmp_path / "new/pairs.jsonl")
    assert row.pop("request") and done.attempts == done.parsed == 1 and done.cost == 12
    assert row == {
        "messages": [
            {"role": "user", "content": PAIR["question"]},
            {"role": "assistant", "content": PAIR["answer"]},
        ],
        "topic": {"entity": "Kenya"},
        "teacher": "m",
    }


def test_doubles_and_what_the_check_refuses_are_counted(serve, tmp_path):
    teacher = serve(numbered(1), numbered(1), numbered(2), numbered(3))

    def accept(topic, pair):
        return "about 2" if "2" in pair.answer else None

    done = generate_pairs(["x"], 2, tmp_path / "pairs.jsonl", teacher, accept=accept, concurrency=1)
    assert done.rejected == {"duplicate": 1, "about 2": 1}
    assert [reject["reason"] for reject in done.rejects] == ["duplicate", "about 2"]


def test_the_attempts_end(serve, tmp_path):
    teacher = serve(chat("no"))
    done = generate_pairs(["x"], 2, tmp_path / "pairs.jsonl", teacher, max_attempts=5)
    assert (done.attempts, done.stopped) == (5, "all attempts are used")
    assert len({request["seed"] for request in serve.log}) == 5


def test_a_failure_in_the_middle_loses_nothing(serve, tmp_path):
    out = tmp_path / "pairs.jsonl"
    teacher = serve(numbered(1), numbered(2), error(401))
    with pytest.raises(TeacherError, match="2 accepted pairs are in .*pairs.jsonl; run the same"):
        generate_pairs(["x"], 4, out, teacher, concurrency=1)
    assert len(read_jsonl(out)) == 2
    teacher = serve(numbered(3), numbered(4))
    serve.log.clear()
    assert len(generate_pairs(["x"], 4, out, teacher, concurrency=1).rows) == 4
    assert [request["seed"] for request in serve.log] == [2, 3]


def test_a_server_that_never_answers_properly_ends_it(serve, tmp_path):
    teacher = serve(raw("<html>Log in</html>", "text/html"))
    with pytest.raises(TeacherError, match="does the address lead to a chat API"):
        generate_pairs(["x"], 50, tmp_path / "pairs.jsonl", teacher, concurrency=1)
    assert len(serve.log) == 5


def test_what_is_there_is_not_asked_again(serve, tmp_path):
    out = tmp_path / "pairs.jsonl"
    teacher = serve(*map(numbered, range(9)))
    first = generate_pairs(["x", "y"], 3, out, teacher, concurrency=1)
    asked = len(serve.log)
    again = generate_pairs(["x", "y"], 3, out, teacher, concurrency=1)
    assert len(serve.log) == asked and again == first
    more = generate_pairs(["x", "y", "z"], 5, out, teacher, concurrency=1)
    assert len(more.rows) == 5 and more.rows[:3] == first.rows == read_jsonl(out)[:3]


def test_a_stricter_check_asks_for_nothing_twice(serve, tmp_path):
    teacher = serve(*map(numbered, range(9)))
    generate_pairs(["x"], 3, tmp_path / "a.jsonl", teacher, concurrency=1)
    (tmp_path / "a.raw.jsonl").rename(tmp_path / "b.raw.jsonl")
    asked = len(serve.log)
    done = generate_pairs(
        ["x"], 2, tmp_path / "b.jsonl", teacher, accept=lambda t, p: "0" in p.answer and "zero"
    )
    assert len(done.rows) == 2 and len(serve.log) == asked


def test_pairs_that_somebody_edited_are_not_overwritten(serve, tmp_path):
    out = tmp_path / "pairs.jsonl"
    teacher = serve(*map(numbered, range(9)))
    generate_pairs(["x"], 2, out, teacher, concurrency=1)
    edited = out.read_text().replace("Answer number", "A better answer, number")
    out.write_text(edited)
    with pytest.raises(ValueError, match="edited, or made otherwise"):
        generate_pairs(["x"], 3, out, teacher)
    assert out.read_text() == edited


def test_a_line_torn_at_any_byte_is_made_whole(serve, tmp_path):
    out, raw_ = tmp_path / "pairs.jsonl", tmp_path / "pairs.raw.jsonl"
    teacher = serve(*map(numbered, range(3)))
    generate_pairs(["x"], 3, out, teacher, concurrency=1)
    whole, pairs = raw_.read_bytes(), out.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    serve.log.clear()
    for cut in range(start, len(whole), 7):  # the last completion is lost, and asked for again
        raw_.write_bytes(whole[:cut])
        out.write_bytes(pairs[: pairs.rstrip(b"\n").rfind(b"\n") + 1])
        assert len(generate_pairs(["x"], 3, out, teacher, concurrency=1).rows) == 3
    asked = len(serve.log)
    raw_.write_bytes(whole)
    for cut in range(0, len(pairs), 7):  # nothing is lost: the pairs follow from the completions
        out.write_bytes(pairs[:cut])
        generate_pairs(["x"], 3, out, teacher, concurrency=1)
        assert out.read_bytes() == pairs and len(serve.log) == asked


def test_two_generations_do_not_write_one_file(serve, tmp_path):
    teacher = serve(numbered(1))
    with open(tmp_path / "pairs.raw.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TeacherError, match="Another generation is writing"):
            generate_pairs(["x"], 1, tmp_path / "pairs.jsonl", teacher)


@pytest.mark.parametrize("prices", [None, Prices(prompt=2.0, completion=10.0)])
@pytest.mark.parametrize("usage", [(40, 60), None])
def test_the_budget_is_never_exceeded(serve, tmp_path, prices, usage):
    def answer(request):
        body = numbered(len(serve.log))
        counted = usage and {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        return raw(json.dumps(body | {"usage": counted}))

    budget = 2000 if prices is None else 0.02
    limits = {"prices": prices, "budget": budget, "max_tokens": 100, "concurrency": 4}
    done = generate_pairs(["x"], 500, tmp_path / "pairs.jsonl", serve(answer), **limits)
    assert "exceed the budget" in done.stopped
    assert budget / 2 < done.cost <= budget
    if usage:
        tokens = 100 if prices is None else (40 * 2 + 60 * 10) / 1e6
        assert done.cost == pytest.approx(len(serve.log) * tokens)
    asked = len(serve.log)
    generate_pairs(["x"], 500, tmp_path / "pairs.jsonl", serve(answer), **limits)
    assert len(serve.log) == asked  # what an earlier run spent counts


def by_topic(answers):
    """Answers by the topic that a prompt names; without one, a new pair each time."""

    def answer(request):
        body = request.get_json()
        words = body["messages"][-1]["content"]
        found = next((value for topic, value in answers.items() if topic in words), None)
        return found or raw(json.dumps(numbered(body["seed"])))

    return answer


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_refused_topic_ends_nothing_and_is_not_asked_again(serve, tmp_path, status, concurrency):
    teacher = serve(by_topic({"too-long": error(status, message="Context length exceeded.")}))
    arguments = [["a", "too-long", "b"], 5, tmp_path / "pairs.jsonl", teacher]
    done = generate_pairs(*arguments, concurrency=concurrency)
    assert len(done.rows) >= 5 and done.rejected.keys() == {"refused by the server"}
    refused = done.rejected.total()  # the next request about it may be under way already
    assert refused == 1 if concurrency == 1 else refused <= 2
    assert "Context length exceeded." in done.rejects[0]["text"]
    assert done.cost == 12 * len(done.rows)
    asked = len(serve.log)
    assert asked == len(done.rows) + refused
    again = generate_pairs(arguments[0], 8, *arguments[2:], concurrency=concurrency)
    assert again.rejected == done.rejected and len(serve.log) == len(again.rows) + refused


def test_a_refused_topic_is_remembered_after_a_failure(serve, tmp_path):
    out, topics = tmp_path / "pairs.jsonl", ["too-long", "a", "b"]
    with pytest.raises(TeacherError, match="the key"):
        generate_pairs(topics, 2, out, serve(error(400), numbered(1), error(401)), concurrency=1)
    serve.log.clear()
    generate_pairs(topics, 3, out, serve(numbered(2), numbered(3)), concurrency=1)
    assert [request["seed"] for request in serve.log] == [2, 4]


def test_a_topic_that_was_answered_before_is_asked_again(serve, tmp_path):
    teacher = serve(numbered(1), error(400), numbered(2), numbered(3))
    done = generate_pairs(["x"], 3, tmp_path / "pairs.jsonl", teacher, concurrency=1)
    assert len(done.rows) == 3 and done.attempts == 4


@pytest.mark.parametrize("topics", [["x"], list(map(str, range(500)))])
def test_a_server_that_refuses_everything_ends_it_with_its_words(serve, tmp_path, topics):
    out = tmp_path / "pairs.jsonl"
    teacher = serve(error(400, message="Model is closed."))
    with pytest.raises(TeacherError, match="Model is closed.*0 accepted pairs"):
        generate_pairs(topics, 300, out, teacher)
    assert len(serve.log) == min(20, len(topics)) or topics == ["x"] and len(serve.log) <= 2
    teacher = serve(lambda request: raw(json.dumps(numbered(request.get_json()["seed"]))))
    assert len(generate_pairs(topics, 3, out, teacher).rows) >= 3  # mended, it asks them all


def test_refusals_that_only_came_at_the_end_are_not_held_against_the_topics(serve, tmp_path):
    teacher = serve(numbered(1), numbered(2), error(400, message="Maintenance."))
    out, topics = tmp_path / "pairs.jsonl", list(map(str, range(99)))
    with pytest.raises(TeacherError, match="Maintenance.*2 accepted pairs"):
        generate_pairs(topics, 99, out, teacher, concurrency=1)
    assert len(serve.log) == 22
    serve.log.clear()
    generate_pairs(topics, 3, out, serve(numbered(3)), concurrency=1)
    assert [request["seed"] for request in serve.log] == [2]


@pytest.mark.parametrize(
    "answer",
    [
        error(400, message="Your credit balance is too low to access the API."),
        error(402, message="Insufficient Balance"),
        error(403, message="Sorry, your account balance is insufficient"),
    ],
)
def test_an_empty_account_is_no_topics_fault(serve, tmp_path, answer):
    with pytest.raises(TeacherError, match="no credit left"):
        generate_pairs(["a", "b"], 9, tmp_path / "pairs.jsonl", serve(answer), concurrency=1)
    assert len(serve.log) == 1


USELESS = {
    "prose": (chat("I would rather not."), "no JSON: 20.*Look at `rejects`"),
    "reasoning": (chat("", reasoning_content="hm " * 99), "only reasoning: 20.*thinking off"),
    "cut off": (chat('{"question": "a', "length"), "cut off: 20.*higher `max_tokens`"),
    "the same pair": (numbered(1), "duplicate: 20.*more topics"),
    "a refusal": (chat(None, refusal="No."), "refused: 20.*other topics"),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", USELESS)
def test_it_stops_early_with_advice_when_nothing_useful_comes(serve, tmp_path, name):
    answer, advice = USELESS[name]
    arguments = [list("abcdefg"), 30, tmp_path / "pairs.jsonl", serve(answer)]
    done = generate_pairs(*arguments, concurrency=4)
    assert re.search(advice.replace(" 20", r" \d\d"), done.stopped)
    assert done.attempts == len(serve.log) <= 25 and len(done.rows) <= 1
    asked = len(serve.log)  # a restart asks no more, but for the order in which answers came
    assert re.search(advice.replace(" 20", r" \d\d"), generate_pairs(*arguments).stopped)
    assert len(serve.log) <= asked + 4
    more = generate_pairs(*arguments, patience=None, max_attempts=30)
    assert more.attempts == 30
    # another prompt begins anew
    prompt = {"prompt": lambda topic: ASK}
    serve(lambda request: raw(json.dumps(numbered(request.get_json()["seed"] + 9))))
    assert len(generate_pairs(*arguments, **prompt).rows) >= 30


def test_duplicates_are_no_bad_luck(serve, tmp_path):
    teacher = serve(*[chat("no")] * 8, numbered(1))
    done = generate_pairs(["x"], 30, tmp_path / "pairs.jsonl", teacher, concurrency=1)
    assert (done.attempts, done.rejected) == (29, {"no JSON": 8, "duplicate": 20})


def test_a_low_yield_is_no_reason_to_stop(serve, tmp_path):
    """With every sixth completion useful, a gap of thirty may be chance."""

    def answer(request):
        seed = request.get_json()["seed"]
        good = seed % 6 == 5 and not 30 < seed < 65
        return raw(json.dumps(numbered(seed) if good else chat("no")))

    done = generate_pairs(["x"], 8, tmp_path / "pairs.jsonl", serve(answer), max_attempts=90)
    assert len(done.rows) == 8


@pytest.mark.parametrize("usage", [(0, 0), (40, 0), (0, 60)])
def test_a_server_that_counts_nothing_does_not_spend_without_end(serve, tmp_path, usage):
    def answer(request):
        return raw(json.dumps(numbered(request.get_json()["seed"]) | {"usage": counted}))

    counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    limits = {"budget": 2000, "max_tokens": 100}
    done = generate_pairs(["x"], 500, tmp_path / "pairs.jsonl", serve(answer), **limits)
    assert "exceed the budget" in done.stopped and 1000 < done.cost <= 2000
    assert done.cost > 300 * done.attempts  # 100 at most for the completion, and all of the prompt


def test_no_more_requests_at_once_than_allowed(serve, tmp_path):
    lock, under_way, most = threading.Lock(), [0], [0]

    def answer(request):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with lock:
            under_way[0] -= 1
        return raw(json.dumps(numbered(request.get_json()["seed"])))

    generate_pairs(["x"], 24, tmp_path / "pairs.jsonl", serve(answer), concurrency=3)
    assert most[0] == 3


@pytest.mark.parametrize("wrong", [{"n": 0}, {"topics": []}, {"concurrency": 0}, {"patience": 0}])
def test_arguments_out_of_range_are_refused(serve, tmp_path, wrong):
    arguments = {"topics": ["x"], "n": 1, "out": tmp_path / "pairs.jsonl"} | wrong
    with pytest.raises(ValueError, match="Expected topics, and n, concurrency and patience >= 1"):
        generate_pairs(**arguments, teacher=serve(numbered(1)))


def test_an_interrupt_keeps_what_is_under_way(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("sftlib.teacher.generation.wait", interrupted)
    teacher = serve(lambda request: raw(json.dumps(numbered(request.get_json()["seed"]))))
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(["x"], 9, tmp_path / "pairs.jsonl", teacher, concurrency=3)
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == len(serve.log) > 0


def test_a_check_that_fails_loses_no_completion(serve, tmp_path):
    def accept(topic, pair):
        raise KeyError("my mistake")

    teacher = serve(lambda request: raw(json.dumps(numbered(request.get_json()["seed"]))))
    with pytest.raises(KeyError, match="my mistake"):
        generate_pairs(["x"], 9, tmp_path / "pairs.jsonl", teacher, accept=accept, concurrency=3)
    kept = len(read_jsonl(tmp_path / "pairs.raw.jsonl"))
    assert kept == len(serve.log) > 0
    done = generate_pairs(["x"], kept, tmp_path / "pairs.jsonl", teacher)  # the check corrected
    assert len(done.rows) == kept == len(serve.log)


def test_a_check_that_fails_at_once_leaves_the_files_free(serve, tmp_path):
    out, teacher = tmp_path / "pairs.jsonl", serve(numbered(1), numbered(2))
    generate_pairs(["x"], 1, out, teacher)
    with pytest.raises(TypeError) as kept:  # as a kernel keeps the last error
        generate_pairs(["x"], 1, out, teacher, accept=lambda pair: None)
    assert len(generate_pairs(["x"], 2, out, teacher).rows) == 2
    assert "takes 1 positional argument" in str(kept.value)


def test_topics_that_cannot_be_saved_are_refused_before_anything_is_paid(serve, tmp_path):
    with pytest.raises(ValueError, match="topics that JSON can hold"):
        generate_pairs([{1, 2}], 1, tmp_path / "pairs.jsonl", serve(numbered(1)))
    assert serve.log == []


def interrupted(futures, **_):
    time.sleep(0.3)
    raise KeyboardInterrupt


CHILD = """
import sys
from sftlib.teacher import generate_pairs
generate_pairs(["x", "y", "z"], int(sys.argv[2]), sys.argv[1], concurrency=3)
"""


@pytest.mark.integration
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_it_loses_and_doubles_nothing(kills, serve, tmp_path):
    asked: list[str] = []

    def answer(request):
        body = request.get_json()
        asked.append(sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16])
        time.sleep(0.01)
        good = body["seed"] % 3 != 2  # every third answer is of no use
        return raw(json.dumps(numbered(body["seed"]) if good else chat("no")))

    serve(answer)
    out, raw_ = tmp_path / "pairs.jsonl", tmp_path / "pairs.raw.jsonl"
    chance, kept = random.Random(0), []

    def start(n):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen([sys.executable, "-c", CHILD, out, str(n)], env=environment)

    for _ in range(kills):
        before = len(asked)
        child = start(100_000)
        while len(asked) == before:
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not set(asked[before:]) & set(kept)  # nothing that was there is asked for again
        whole = raw_.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1].splitlines()
        now = [json.loads(line)["request"] for line in whole]
        assert now[: len(kept)] == kept  # nothing that was there is lost
        kept = now
    assert start(len(kept)).wait() == 0
    rows, completions = read_jsonl(out), read_jsonl(raw_)
    assert len(kept) > kills and len(rows) >= len(kept)
    assert max(Counter(row["request"] for row in completions).values()) == 1
    assert max(Counter(row["messages"][0]["content"] for row in rows).values()) == 1
    assert len(rows) == sum("Answer" in row["text"] for row in completions)
