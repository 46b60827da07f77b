"""What importing `sftlib` does: it makes other libraries quiet, and loads none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = (
    *("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS"),
    *("HF_HUB_DISABLE_PROGRESS_BARS", "CI", "SFT_NO_BARS", "PYTEST_CURRENT_TEST"),
)
NAMES = "datasets, transformers, transformers.utils.logging, huggingface_hub"
ORDERS = [f"import sftlib, {NAMES}", f"import {NAMES}, sftlib"]


def printed(code: str, **own: str) -> subprocess.CompletedProcess:
    """What a program says in an environment in which nobody has set anything but `own`."""
    env = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"OMP_NUM_THREADS": "1"} | own,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


# A warning of Transformers, a bar of Datasets, one of the Hub's client, one of Transformers
SPEAK = """
from transformers.utils import logging
logging.get_logger("transformers.x").warning("a warning")
logging.get_logger("transformers.x").error("an error")
datasets.Dataset.from_dict({"a": [1]}).map(lambda row: row, desc="bar of datasets")
list(huggingface_hub.utils.tqdm([1], desc="bar of the hub"))
list(logging.tqdm([1], desc="bar of transformers"))
"""
SAID = ["a warning", "an error", "bar of datasets", "bar of the hub", "bar of transformers"]
BARS = SAID[2:]


@pytest.mark.integration
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"SFT_NO_BARS": "1"}, ["an error"]),
        ({"TRANSFORMERS_VERBOSITY": "warning"}, ["a warning", "an error", *BARS]),
        *(
            pytest.param(own, expected, marks=pytest.mark.nightly)
            for own, expected in (
                ({}, ["an error", *BARS]),
                ({"TRANSFORMERS_VERBOSITY": "critical"}, BARS),
                (
                    {"SFT_NO_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "0"},
                    ["an error", "bar of datasets"],
                ),
                (
                    {"SFT_NO_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"},
                    ["an error", "bar of the hub", "bar of transformers"],
                ),
            )
        ),
    ],
)
def test_what_is_printed_does_not_depend_on_the_order_of_imports(order, own, expected):
    said = printed(order + SPEAK, **own).stderr
    assert [one for one in SAID if one in said] == expected, said


@pytest.mark.integration
def test_without_sftlib_all_of_it_is_printed():
    said = printed(f"import {NAMES}" + SPEAK, SFT_NO_BARS="1").stderr
    assert [one for one in SAID if one in said] == SAID


def test_the_hubs_client_alone_shows_no_bars_either():
    code = "from huggingface_hub import utils; {}list(utils.tqdm([1], desc='bar of the hub'))"
    assert "bar of the hub" in printed(code.format(""), SFT_NO_BARS="1").stderr
    assert printed(code.format("import sftlib; "), SFT_NO_BARS="1").stderr == ""


@pytest.mark.integration
def test_a_level_that_a_student_has_set_in_code_stays():
    code = "from transformers.utils import logging; logging.set_verbosity_info(); import sftlib; "
    assert printed(code + "print(logging.get_verbosity() == logging.INFO)").stdout == "True\n"


THREADS = """
import os
tokenizer = tokenizers.Tokenizer.from_file("data/tiny-base/tokenizer.json")
tokenizer.encode_batch(["one", "two"] * 1000)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import tokenizers", "3"),
        ("import sftlib, tokenizers", "1"),
        ("import tokenizers, sftlib", "1"),
    ],
)
def test_the_tokenizer_starts_no_threads(imports, expected):
    said = printed(imports + THREADS, RAYON_NUM_THREADS="2")
    assert said.stdout.strip() == expected


@pytest.mark.parametrize(
    ("imports", "not_needed"),
    [
        (
            "from sftlib.data import read_jsonl, convert",
            "numpy rapidfuzz torch datasets",
        ),
        ("from sftlib.chat import render, encode", "torch transformers rapidfuzz numpy"),
        ("from sftlib.experiments import table, diagnose", "torch transformers peft"),
        ("from sftlib import lesson", "ipywidgets IPython torch transformers numpy pandas"),
        ("from sftlib.models import load", "torch transformers deepspeed"),
        ("from sftlib.teacher import Teacher", "torch transformers"),
    ],
)
def test_importing_one_function_loads_nothing_that_it_does_not_need(imports, not_needed):
    code = f"import sys; {imports}; print(*(set({not_needed.split()}) & set(sys.modules)))"
    assert printed(code).stdout.strip() == ""
