"""Lesson 7's stored runs."""

import json
import os
import time
from pathlib import Path

from sftlib.data import drop_torn_line

import nbformat
import pandas as pd

from tools import notebooks


def test_the_runs_of_lesson_7_go_on_where_they_were_interrupted(tmp_path: Path, monkeypatch):
    [lesson] = [path for path in notebooks.find("07") if path.parent == notebooks.FOLDER]
    [record] = [c.source for c in nbformat.read(lesson, 4).cells if c.get("id") == "record"]
    stored = tmp_path / "runs.jsonl"
    whole = '{"seed": 0, "method": "A", "seconds": 9.0}\n'
    stored.write_text(whole + '{"seed": 0, "meth', encoding="utf-8")
    none, log = (lambda *_: None), pd.DataFrame({"loss": [0.5, 0.25]})
    names = {"json": json, "os": os, "time": time, "pd": pd, "drop_torn_line": drop_torn_line}
    names |= dict.fromkeys(("sft", "preference_pairs", "judge_of", "train_reward_model"), none)
    names |= {"load": lambda _: [None], "asked": {"train": []}, "answer_groups": none}
    names |= {"methods": lambda *_: dict.fromkeys("AB", lambda: (None, log))}
    names |= {"STORED": stored, "best_of": lambda *_: log}
    monkeypatch.setenv("SFT_PREFERENCES", "record")
    exec(record, names)
    assert stored.read_text(encoding="utf-8").startswith(whole)
    done = list(zip(names["runs"].seed, names["runs"].method, strict=True))
    assert done == [(seed, method) for seed in range(3) for method in ("A", "B", "best of 16")]
