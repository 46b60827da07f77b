"""Break the course in a copy, in ways that a loss curve does not show: its tests must notice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MASK = "message['role'] == 'assistant'"
BREAKAGES = {  # name: files, text, its replacement, a test that must fail
    "the loss mask is inverted": (
        ("sftlib/chat/encoding.py", "data/tiny-base/chat_template.jinja"),
        MASK,
        MASK.replace("==", "!="),
        "test_training.py::test_the_trainer_learns_exactly_the_assistants_tokens",
    ),
    "the labels are shifted by one": (
        ("sftlib/training.py",),
        "    trainer.train()\n",
        "    collate = trainer.data_collator\n"
        "    def shifted(rows):\n"
        "        batch = collate(rows)\n"
        "        return batch | {'labels': batch['labels'].roll(1, 1)}\n"
        "    trainer.data_collator = shifted\n"
        "    trainer.train()\n",
        "test_training.py::test_the_loss_is_that_of_the_next_token",
    ),
    "the wrong template is used at inference": (
        ("sftlib/evaluate.py",),
        "return answers_to_text(model, tokenizer, prompts, max_new_tokens, batch_size, **sampling)",
        "prompts = ['### Instruction:\\n' + c[-1]['content'] + '\\n\\n### Response:\\n' "
        "for c in conversations]\n"
        "    return answers_to_text(model, tokenizer, prompts, max_new_tokens, **sampling)",
        "test_training.py::test_sft_turns_the_base_into_a_model_that_answers_and_stops",
    ),
    "of LoRA only B is counted": (
        ("sftlib/scale/memory.py",),
        "r * (inputs + outputs) for",
        "r * outputs for",
        "test_memory.py::test_gpt3_counts_as_in_the_lora_paper",
    ),
    "ZeRO-1 divides no optimizer": (
        ("sftlib/scale/memory.py",),
        "share(whole.optimizer + copy, 1)",
        "share(whole.optimizer + copy, 2)",
        "test_memory.py::test_zero_bytes_are_those_of_the_papers_table",
    ),
    "PPO rewards the distance from the reference": (
        ("sftlib/ppo.py",),
        "rewards = -kl_coef *",
        "rewards = kl_coef *",
        "test_ppo.py::test_each_token_pays_for_its_distance_and_the_last_one_earns_the_score",
    ),
    "a key of a record is dropped": (
        ("sftlib/data/fields.py",),
        "if is_harmless(name, value) or",
        "if True or",
        "test_layouts.py::test_whatever_is_added_under_any_key_is_read_or_refused_by_name",
    ),
    "what a message holds is not escaped": (
        ("sftlib/chat/encoding.py",),
        'controls.escape(m["content"])',
        'm["content"]',
        "test_control_tokens.py::test_no_text_becomes_a_control_token",
    ),
}


def run_tests(copy: Path, test: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def copy(tmp_path):
    for folder in ("sftlib", "data", "tests", "tools"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.nightly
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_breakage_makes_a_test_fail(copy, breakage):
    files, text, replacement, test = BREAKAGES[breakage]
    for file in files:
        source = (copy / file).read_text()
        assert text in source, f"{file} has changed: adapt this test"
        (copy / file).write_text(source.replace(text, replacement))
    done = run_tests(copy, test)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILED tests/{test}" in done.stdout
    assert "AssertionError" in done.stdout or "assert " in done.stdout


@pytest.mark.nightly
def test_the_unbroken_copy_passes(copy):
    done = run_tests(copy, "test_training.py::test_the_loss_is_that_of_the_next_token")
    assert done.returncode == 0, done.stdout + done.stderr
