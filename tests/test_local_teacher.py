"""The local teacher, live: a real LLM on this machine. Skipped where `make teacher` was not run."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from sftlib.data import read_facts, read_jsonl
from sftlib.teacher import PAIR_SCHEMA, Teacher, generate_pairs, local, parse_pairs

import psutil
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not local.installed(), reason="not installed: run make teacher"),
]


@pytest.fixture
def teacher(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Teacher("local")


def test_the_local_teacher_keeps_to_the_schema(teacher):
    task = [{"role": "user", "content": "Write a question about Kenya, and its answer."}]
    for seed in range(3):
        said = teacher.ask(task, PAIR_SCHEMA, temperature=0.2, seed=seed)
        assert said.prompt_tokens and said.completion_tokens
        if said.finish_reason == "stop":
            assert re.fullmatch(r'\s*\{\s*"question"[\s\S]*\}\s*', said.text)


def test_the_local_teacher_writes_pairs_that_hold_the_given_fact(teacher, tmp_path):
    facts = read_facts("sft")[:8]

    def prompt(fact):
        stated = fact["messages"][-1]["content"]
        task = f"Fact: {stated}\nWrite a question that this fact answers, and the answer."
        return [{"role": "user", "content": task}]

    def accept(fact, pair):
        return None if fact["value"] in pair.answer else "not the fact"

    out = tmp_path / "pairs.jsonl"
    done = generate_pairs(
        facts, 2, out, teacher, prompt=prompt, accept=accept, max_attempts=16, temperature=0.2
    )
    assert len(done.rows) >= 2 and read_jsonl(out) == done.rows
    assert done.cost > 100 and all(row["teacher"] == local.MODEL for row in done.rows)
    assert parse_pairs(read_jsonl(tmp_path / "pairs.raw.jsonl")[-1]["text"])


def test_the_local_teacher_listens_here_only_and_wants_its_key(teacher):
    url = str(teacher.client.base_url)
    assert url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(
        url + "chat/completions", b"{}", {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    port = int(url.split(":")[2].split("/")[0])
    listening = {
        c.laddr.ip
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_the_local_teacher_ends_with_the_process_that_started_it(end):
    code = (
        "from sftlib.teacher import Teacher; Teacher('local'); print('there', flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert parent.stdout.readline() == "there\n"
    servers = psutil.Process(parent.pid).children(recursive=True)
    assert len(servers) == 1
    if end == "kill":
        parent.kill()
    else:
        parent.stdin.write("\n")
        parent.stdin.close()
    parent.wait()
    assert not psutil.wait_procs(servers, timeout=20)[1]


def test_the_local_teacher_says_why_it_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no memory left')\n")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)did not start.*no memory left"):
        local.start.__wrapped__(timeout=30)
    assert time.monotonic() - started < 30
