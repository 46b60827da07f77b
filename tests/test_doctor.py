"""`make doctor` finds what is wrong with a machine, says what to do, and changes nothing."""

import ast
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools import doctor, environment
from tools.doctor import Finding

ROOT = Path(__file__).parents[1]


def said(finding: Finding, fine: bool | None, *words: str) -> None:
    assert finding.fine is fine
    assert all(word in finding.text for word in words), finding.text


def test_little_memory_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: 1.5)
    said(doctor.memory(), False, "1.5 GB", "4 are needed", "Close other programs")
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: 9.0)
    said(doctor.memory(), True, "9.0 GB")
    monkeypatch.setattr(doctor, "free_memory_gb", lambda: None)
    said(doctor.memory(), None, "unknown")


def test_free_memory_is_that_of_the_machine():
    free = doctor.free_memory_gb()
    assert free is None or 0.1 < free < 10_000


def test_a_full_disk_is_found(monkeypatch):
    usage = type("Usage", (), {"free": 0.2e9})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    said(doctor.disk(), False, "0.2 GB", "needed")


def test_a_taken_port_is_found(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("PORT", str(taken.getsockname()[1]))
        said(doctor.port(), False, "is used by another program", "make lab PORT=")


def test_no_display_is_no_fault(monkeypatch):
    monkeypatch.setattr(doctor.lab, "has_display", lambda environ, platform: False)
    said(doctor.browser(), None, "open the address")


@pytest.mark.parametrize("tool", [doctor, doctor.lab, environment])
def test_what_an_old_python_runs_it_can_read(tool):
    text = Path(tool.__file__).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))
    assert "from __future__ import annotations" in text  # or `list[str]` would be computed


def test_an_unfinished_environment_is_found(monkeypatch):
    todo = environment.Plan("make", "there is none yet")
    monkeypatch.setattr(environment, "plan", lambda root: todo)
    said(doctor.packages(), False, "there is none yet", "make setup")
    said(doctor.training(), None, "after make setup")


def test_other_versions_are_found(monkeypatch):
    monkeypatch.setattr(environment, "plan", lambda root: environment.Plan("keep"))
    monkeypatch.setattr(doctor, "inside", lambda code: "trl 0.9.0, expected 1.16.0\n")
    said(doctor.packages(), False, "trl 0.9.0, expected 1.16.0", "rm -rf .venv && make setup")
    monkeypatch.setattr(doctor, "inside", lambda code: None)
    said(doctor.packages(), False, "does not start")


def test_an_old_python_is_found(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    said(doctor.python(), False, "Python 3.11 to 3.14")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "no kernel started"),
        ("noise", "no kernel started"),
        ('{"kernel": 1, "step": 2, "error": "OSError: no weights"}', "OSError: no weights"),
    ],
)
def test_a_kernel_that_fails_is_found(monkeypatch, answer, words):
    monkeypatch.setattr(environment, "plan", lambda root: environment.Plan("keep"))
    monkeypatch.setattr(doctor, "inside", lambda code: answer)
    said(doctor.training(), False, words)


def test_a_check_that_raises_is_a_finding():
    def broken() -> Finding:
        raise OSError("no such device")

    (finding,) = doctor.findings((broken,))
    said(finding, False, "broken: OSError: no such device")


def test_the_program_counts_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: [Finding(True, "a"), Finding(False, "b")])
    assert doctor.main() == 1
    assert "✗ b\n1 to repair" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "findings", lambda: [Finding(True, "a"), Finding(None, "c")])
    assert doctor.main() == 0
    assert "○ c\nReady for class" in capsys.readouterr().out


@pytest.mark.integration
def test_this_machine_is_examined_and_a_step_is_trained():
    """The kernel is started and trains, as `make doctor` does it; other findings may differ."""
    done = subprocess.run(
        [sys.executable, "tools/doctor.py"], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1 and not done.stderr
    assert "✓ packages as pinned" in lines
    assert any(re.match(r"✓ a kernel started \(\d+ s\) and finetuned a step", x) for x in lines)
