"""`make gpu`: rehearsed on a CPU; what it reads, what it keeps of a failure, the README's table."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import TrainerCallback  # here: it must see this machine, and not a played GPU

from tools import gpu, readme_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(tmp_path):
    return gpu.Check(tmp_path, gpu=False, batch=2)


@pytest.mark.nightly
def test_the_rehearsal_passes_and_stores_nothing_in_the_course(tmp_path):
    """The same steps as on a GPU, a tiny model."""
    before = gpu.STORED.read_bytes() if gpu.STORED.exists() else None
    command = [sys.executable, "-m", "tools.gpu", "--rehearse"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = Path(re.search(r"Stored in (\S+)\.$", done.stdout.strip())[1])
    assert tmp_path in stored.parents
    assert (gpu.STORED.read_bytes() if gpu.STORED.exists() else None) == before
    text = stored.read_text()
    parts = json.loads(text)["parts"]
    assert {part["status"] for part in parts.values()} == {"passed"}, parts
    assert list(parts) == ["model", *gpu.TRL, "resume", "out of memory", "merge"]
    for method in gpu.TRL:
        for run in (parts[method]["ours"], parts[method]["trl"]):
            assert len(run["losses"]) == gpu.STEPS and run["tokens_per_second"] > 0
            assert run["losses"]["20"] < run["losses"]["1"] - 0.05
    assert "exit code 1" in parts["out of memory"]["said"]
    assert str(ROOT) not in text and str(tmp_path) not in text
    (tmp_path / "data/runs").mkdir(parents=True)
    (tmp_path / "data/runs/gpu.json").write_text(text)
    assert "| qlora | 0." in readme_table.gpu(tmp_path)


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.environ", dict(gpu.os.environ))
    with pytest.raises(SystemExit, match="Expected an NVIDIA GPU, found none: make gpu ARGS="):
        gpu.main([])


def test_a_part_that_fails_is_kept_with_its_last_lines_and_the_others_go_on(check, capsys):
    def print_and_fail(found):
        found["planned_gib"] = 1.5
        check.python("-c", f"print({str(ROOT)!r}, *range(40), sep='/x\\n'); raise SystemExit(3)")

    def skipped(found):
        raise gpu.Skipped("too small")

    check.part("one", 60, print_and_fail)
    check.part("two", 60, skipped)
    check.part("three", 60, lambda found: found.update(said="so"))
    one, two, three = check.found.values()
    assert (one["status"], one["said"], one["planned_gib"]) == ("failed", "39", 1.5)
    assert len(one["last_lines"]) == 15 and str(ROOT) not in json.dumps(check.found)
    assert (two["status"], two["said"]) == ("skipped", "too small")
    assert (three["status"], three["said"]) == ("passed", "so")
    assert "three: {'status': 'passed'" in capsys.readouterr().out


def test_places_of_this_machine_are_not_kept(check, monkeypatch):
    text = f"{check.work}/lora {ROOT}/tools {Path.home()}/x {sys.prefix}/lib"
    assert check.without_places(text) == "work/lora ./tools ~/x .venv/lib"
    monkeypatch.setattr(gpu.Path, "home", lambda: Path("/"))
    assert check.without_places("a/b /c") == "a/b /c"


@pytest.mark.integration
def test_a_part_that_takes_too_long_ends_with_all_its_processes(check):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    sleeps = f"import time; print('asleep', flush=True); time.sleep(600)  # {check.work}"
    check.slow = 1
    began = time.monotonic()
    check.part("one", 1, lambda found: check.python("-c", child.format(sleeps)))
    assert time.monotonic() - began < 60
    assert check.found["one"]["said"] == "It took longer than it may"
    gone_by = time.monotonic() + 10  # a killed process still has its command line for a moment
    while left := processes_with(sleeps):
        assert time.monotonic() < gone_by, left
        time.sleep(0.1)


def processes_with(argument):
    """Processes that have the argument in their command lines, without those that have ended."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if argument in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_an_exit_code_that_was_not_expected_is_a_failure(check):
    with pytest.raises(RuntimeError, match="Exit code 0"):
        check.python("-c", "print('all went well')", fails=True)
    said, code = check.python("-c", "raise SystemExit('too large')", fails=True)
    assert (said.strip(), code) == ("too large", 1)


OUT_OF_MEMORY = "OSError: out of memory: a smaller"


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("ValueError: no such thing", False),
        (f"step 1\n{OUT_OF_MEMORY}", True),
        (f"Traceback (most recent call last):\n{OUT_OF_MEMORY}", False),
    ],
)
def test_running_out_of_memory_must_be_said_without_a_traceback(check, monkeypatch, said, passes):
    monkeypatch.setattr(check, "child", lambda *words, fails: (f"{ROOT}\n{said}\n", 2))
    check.part("one", 60, check.out_of_memory)
    if passes:
        assert check.found["one"]["said"] == f"exit code 2, “{OUT_OF_MEMORY}”"
    else:
        assert check.found["one"]["status"] == "failed"


def test_a_resumed_run_must_go_on_and_with_the_same_losses(check, monkeypatch):
    def resumed(losses, said):
        monkeypatch.setattr(check, "watched", lambda *words: ({"losses": losses}, said))
        check.part("resume", 60, check.resume)
        return check.found["resume"]

    checkpoint = check.work / "resumed/checkpoint-5"
    checkpoint.mkdir(parents=True)
    whole = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    for name in (*whole, "rng_state.pth"):
        (checkpoint / name).write_text("{}")
    monkeypatch.setattr(check, "ours", lambda *words: ["-c", "import time; time.sleep(60)"])
    check.found["lora"] = {}
    assert "needs the run of part lora" in resumed({}, "")["said"]
    check.found["lora"] = {"ours": {"losses": {"1": 3.0, "6": 2.0}}}
    goes_on = f"Going on from {checkpoint}"
    same = resumed({"1": 3.0, "6": 2.001}, goes_on)
    assert same["said"] == "killed, it went on from step 5; losses differ by 0.0010"
    assert resumed({"1": 3.0, "6": 2.1}, goes_on)["status"] == "failed"
    assert resumed({"1": 3.0}, goes_on)["status"] == "failed"
    assert "began again" in resumed({"1": 3.0, "6": 2.0}, "")["said"]


@pytest.mark.parametrize(("merged", "status"), [(2.01, "passed"), (2.9, "failed"), (1.9, "failed")])
def test_the_merged_model_must_have_the_loss_of_the_adapter(check, monkeypatch, merged, status):
    check.found["lora"] = {"ours": {}}
    folder = check.work / "lora/merged"
    folder.mkdir(parents=True)
    check.part("merge", 60, check.merge)
    assert "safetensors alone" in check.found["merge"]["said"]
    (folder / "model.safetensors").write_text("")
    said = json.dumps({"base": 3.0, "adapter": 2.0, "merged": merged})
    monkeypatch.setattr(check, "child", lambda *words: (f"noise\n{said}\n", 0))
    check.part("merge", 60, check.merge)
    assert check.found["merge"]["status"] == status


def test_the_plans_sum_is_read():
    plan = "on 1 GPU:\n        2.34 GiB  weights\n       25.11 GiB  in all, of 80.0 GiB\nIt fits."
    assert gpu.planned_gib(plan) == 25.11
    with pytest.raises(ValueError, match="found none"):
        gpu.planned_gib("It fits.")


def test_a_method_that_does_not_fit_is_skipped(check, monkeypatch):
    plan = " 99.50 GiB  in all, of 80.0 GiB\nIt does not fit: --method lora"
    monkeypatch.setattr(check, "python", lambda *words: (plan, 0))
    check.part("full", 60, lambda found: check.method("full", found))
    assert check.found["full"]["status"] == "skipped"
    assert check.found["full"]["planned_gib"] == 99.5


def test_utilisation_is_the_mean_of_the_samples_that_are_numbers():
    assert gpu.mean_percent("90\n100\n") == 95
    assert gpu.mean_percent("[N/A]\n") is None and gpu.mean_percent("") is None


def test_nvidia_smi_is_asked_about_the_gpu_that_trains_until_it_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$1"\necho 90\nexec sleep 60\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    sampler = gpu.utilisation()
    assert [sampler.stdout.readline() for _ in range(2)] == ["--id=3\n", "90\n"]
    assert sampler.poll() is None
    sampler.terminate()
    assert sampler.communicate()[0] == ""


def test_speed_and_memory_are_those_of_the_timed_steps(tmp_path, monkeypatch):
    """A GPU played by five functions: 300 tokens in each second, one second a step."""
    now, asked = [0.0], []
    played = {"is_available": lambda: True, "max_memory_allocated": lambda: 3 * 2**30}
    played |= {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: asked.append("reset"),
    }
    for name, function in played.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function)
    monkeypatch.setattr(gpu, "utilisation", lambda: None)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    watch, state = gpu.watch(tmp_path / "figures.json"), SimpleNamespace(global_step=0, max_steps=9)
    args, state.log_history = SimpleNamespace(per_device_train_batch_size=2), []
    assert isinstance(watch, TrainerCallback)
    watch.on_train_begin(args, state, None)
    for step in range(1, 10):
        watch.on_step_begin(args, state, None)
        now[0] += 1 if step > gpu.WARM_UP else 50
        state.global_step = step
        watch.on_step_end(args, state, None)
        state.log_history.append({"step": step, "loss": 5 - step / 9, "num_tokens": 300 * step})
    state.log_history.append({"step": 9, "eval_loss": 4.0})
    now[0] += 100  # an evaluation at the end
    watch.on_train_end(args, state, None)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["tokens_per_second"], found["peak_gib"], asked) == (300, 3.0, ["reset"])
    assert len(found["losses"]) == 9 and found["losses"]["9"] == 4.0


def test_without_nvidia_smi_utilisation_is_not_measured(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu.utilisation() is None


# --- The README's table --------------------------------------------------------------------------


def test_the_readmes_table_of_the_gpu_is_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    current = readme_table.updated(readme, readme_table.gpu())
    assert current == readme, "The table is not current. Run: make format"


def test_the_table_shows_what_was_measured_and_what_failed(tmp_path):
    assert "has not been run on a GPU" in readme_table.gpu(tmp_path)
    ours = {"peak_gib": 25.04, "tokens_per_second": 51234, "utilisation": 93}
    lora = {"status": "passed", "planned_gib": 25.11, "ours": ours, "trl": {"peak_gib": 26.0}}
    parts = {
        "lora": lora,
        "qlora": {"status": "failed", "said": "ImportError: a | b <c>"},
        "full": {"status": "skipped", "planned_gib": 37.6, "said": "does not fit"},
    }
    figures = {"machine": "one GPU", "gpu_gib": 80.0, "date": "2026-01-02", "steps": "20 steps"}
    figures |= {"versions": {"torch": "2.13"}, "parts": parts}
    (tmp_path / "data/runs").mkdir(parents=True)
    (tmp_path / "data/runs/gpu.json").write_text(json.dumps(figures))
    table = readme_table.gpu(tmp_path)
    assert "| lora | 25.1, 25.0, 26.0 | 51,234, – | 93 %, – |" in table
    assert "| qlora | –, –, – | –, – | –, – |" in table
    assert "- qlora: failed; ImportError: a \\| b &lt;c>" in table
    assert "- full: skipped; does not fit" in table and "one GPU, 80.0 GiB, 2026-01-02" in table
    assert "has not been run" not in table
