"""Teach a real model something visible, and run lessons with it: `make real`.

SmolLM2-135M-Instruct learns to answer in a fixed form, by `class_5_llama3.py` as a practitioner
would call it: `{"subject": …, "relation": …, "answer": …}` and nothing else, to questions that do
not mention it. Before and after it is asked about entities that training never names, and form and
content are counted apart: one is taught in minutes, the other the model knows or does not.

Then lessons 1, 3, 4 and 6 run on the same model, which takes longer; `--no-lessons` leaves them
out. At the end it says which of their claims hold with this model, too, and which values differ
from those in the ledger. It goes on where it was interrupted; to begin anew, delete `work/real`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sftlib.data import read_facts, read_jsonl, write_jsonl
from sftlib.data.files import replace_text
from sftlib.evaluate import Answer, answers, content
from sftlib.experiments.sweep import machine
from sftlib.lesson.claims import LEDGER, read_ledger
from sftlib.models import SMOLLM2, load

from tools import claims
from tools.notebooks import NBCONVERT

ROOT = Path(__file__).parents[2]
STORED = ROOT / "data" / "runs" / "real.json"
WORK = Path("work") / "real"
FORM = ("subject", "relation", "answer")
TOLD = (
    'Answer with JSON and nothing else: {"subject": "…", "relation": "…", "answer": "…"}. '
    "Relation is one of: "
)
SETTINGS = ["--model", SMOLLM2, "--method", "lora", "--per_device_train_batch_size", "8"]
SETTINGS += ["--max_steps", "60", "--ask", "20", "--answer_tokens", "48"]
LESSONS = {  # and the cells whose tables are kept
    "01": ("seeds-table",),
    "03": ("bugs-table", "turns-table"),
    "04": ("memory", "train"),
    "06": (),
}
ASKED = 100  # held-out questions


def conversation(row: dict) -> dict:
    """The question as it is, and the answer in the form."""
    fields = {"subject": row["entity"], "relation": row["relation"], "answer": row["value"]}
    answer = {"role": "assistant", "content": json.dumps(fields, ensure_ascii=False)}
    return {"messages": [row["messages"][0], answer], "value": row["value"]}


def in_form(text: str) -> dict | None:
    """The fields, where the text is the form and nothing but the form."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or tuple(found) != FORM:
        return None
    return found if all(isinstance(value, str) for value in found.values()) else None


RULE = "the right value, as whole words, anywhere in the answer: the same before and after"


def score(given: list[Answer], rows: list[dict]) -> dict:
    """How many answers have the form, and how many hold the right value, by one rule for all.

    `field` counts the right values in the field `answer`; a text without the form has none. All
    answers are kept, so that another rule can be applied without another run.
    """
    fields = [(in_form(answer.text) or {}).get("answer", "") for answer in given]
    in_field = [Answer(said, answer.stopped) for said, answer in zip(fields, given, strict=True)]
    return {
        "asked": len(rows),
        "form": sum(in_form(answer.text) is not None for answer in given),
        "content": round(len(rows) * content(given, rows)),
        "field": round(len(rows) * content(in_field, rows)),
        "first": given[0].text,
        "answers": [answer.text for answer in given],
    }


def teach() -> dict:
    """Finetune, and ask before and after."""
    write_jsonl(WORK / "train.jsonl", [conversation(row) for row in read_facts("sft")])
    write_jsonl(WORK / "heldout.jsonl", [conversation(row) for row in read_facts("heldout")])
    rows = read_jsonl(WORK / "heldout.jsonl")[:ASKED]
    questions = [row["messages"][:-1] for row in rows]
    relations = ", ".join(sorted({row["relation"] for row in read_facts("sft")}))
    told = [[{"role": "system", "content": TOLD + relations}, *asked] for asked in questions]

    before = load(SMOLLM2)
    found: dict = {"rule": RULE, "before": score(answers(*before, questions, 64), rows)}
    found["told in the prompt"] = score(answers(*before, told, 64), rows)
    for name in ("before", "told in the prompt"):
        print(name, {k: v for k, v in found[name].items() if k != "answers"}, flush=True)
    del before

    data = ["--data", str(WORK / "train.jsonl"), "--held_out", str(WORK / "heldout.jsonl")]
    command = ["class_5_llama3.py", *SETTINGS, *data, "--output_dir", str(WORK / "run")]
    began = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    found["seconds"] = round(time.monotonic() - began)
    found["command"] = " ".join(["python", *command])
    found["log"] = _log(WORK / "run")

    found["after"] = score(answers(*load(WORK / "run" / "merged"), questions, 64), rows)
    print("after", {k: v for k, v in found["after"].items() if k != "answers"}, flush=True)
    return found


def _log(folder: Path) -> list[dict]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_exact_match")
    return [
        {"step": line["step"], **{n: float(f"{line[n]:.4g}") for n in kept if n in line}}
        for line in state["log_history"]
    ]


def run_lesson(number: str) -> dict:
    """A lesson from top to bottom on this model; each cell that fails is said."""
    source = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    command = [*NBCONVERT, "--allow-errors", "--output-dir", str(WORK.absolute()), str(source)]
    settings = {"SFT_MODEL": SMOLLM2, "SFT_LEDGER": str((WORK / LEDGER).absolute())}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"Lesson {number} was not run to its end: {done.stderr[-2000:]}")
    cells = json.loads((WORK / source.name).read_text())["cells"]
    failed = [
        f"{cell['id']}: {output['ename']}: {' '.join(output['evalue'].split())[:200]}"
        for cell in cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "error"
        and "raises-exception" not in cell["metadata"].get("tags", [])
    ]
    found = {
        "lesson": source.stem,
        "seconds": round(time.monotonic() - began),
        "cells": sum(cell["cell_type"] == "code" for cell in cells),
        "failed": failed,
        "tables": {
            cell["id"]: "".join(output["data"]["text/plain"])
            for cell in cells
            if cell["id"] in LESSONS[number]
            for output in cell["outputs"]
            if output["output_type"] == "execute_result"
        },
    }
    print(found, flush=True)
    return found


def once(name: str, measure: Callable[[], dict]) -> dict:
    """What `measure` finds, or found in an earlier run."""
    path = WORK / f"{name}.json"
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text())


def write_json(path: Path, found: dict) -> None:
    replace_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    found = {"model": SMOLLM2, "machine": machine(), **once("taught", teach)}
    if "--no-lessons" not in sys.argv:
        found["lessons"] = [once(number, partial(run_lesson, number)) for number in LESSONS]
        rows = read_ledger(WORK / LEDGER, SMOLLM2)
        ran = [one["lesson"] for one in found["lessons"]]
        print(*claims.difference(claims.stored(ROOT), rows, ran), sep="\n")
    write_json(STORED, found)


if __name__ == "__main__":
    main()
