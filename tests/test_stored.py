"""Data is read once per content, by one process of a node, and stays on disk."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from sftlib.data import convert, tables, write_jsonl
from sftlib.data.records import lines_in
from sftlib.data.stored import AT_ONCE, StoredRows, convert_once, convert_records_once
from sftlib.data.tables import key_of, table
from sftlib.finetune.arguments import FinetuneArguments, check, parse
from sftlib.finetune.checkpoints import digest
from sftlib.finetune.data import Data, hold_out, load_data, refuse_unshown
from sftlib.training import encode_dataset

import datasets
import pyarrow
import pytest
from pyarrow import parquet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "sftlib"


def pairs(count, name="a"):
    return [{"question": f"{name} {n}? é", "answer": f"{n}."} for n in range(count)]


def called(tool, arguments):
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    messages = [{"role": "user", "content": tool}, {"role": "assistant", "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"name": tool, "parameters": arguments}]}


def entry(cache):
    (found,) = (path for path in cache.iterdir() if path.is_dir() and path.name[0] != ".")
    return found


def test_stored_rows_are_those_of_convert(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    rows = [called("f", {"a": 0.1234567890123456789}), called("g", {"b": [2**70], "c": None})]
    write_jsonl(path, [*pairs(AT_ONCE + 5), *rows, {"text": "?"}, *pairs(3)])
    found, plain = convert_once(path), convert(path)
    assert isinstance(found.rows, StoredRows) and found.rows == plain.rows
    assert found.rejects == plain.rejects and [r["line"] for r in found.rejects] == [AT_ONCE + 8]
    assert [found.rows[-1], found.rows[3:5], list(found.rows)] == [
        *(plain.rows[-1], plain.rows[3:5], plain.rows),
    ]
    assert digest(found.rows) == digest(plain.rows) != digest(found.rows.select([1, 0]))


def test_data_is_read_once_whatever_its_place_and_time(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, pairs(5))
    rows = convert_once(path).rows
    before = (entry(cache) / "table.arrow").stat().st_ino
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other/data.jsonl")
    os.utime(path, (1, 1))
    for same in (path, tmp_path / "other/data.jsonl"):
        assert convert_once(same).rows == rows
    assert (entry(cache) / "table.arrow").stat().st_ino == before


def test_other_content_of_the_same_name_size_and_time_is_read_anew(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, pairs(5, "a"))
    os.utime(path, (1, 1))
    before, rows = path.stat(), convert_once(path).rows
    write_jsonl(path, pairs(5, "b"))
    os.utime(path, (1, 1))
    assert (path.stat().st_size, path.stat().st_mtime) == (before.st_size, before.st_mtime)
    assert convert_once(path).rows[0]["messages"][0]["content"] == "b 0? é" != rows[0]


def test_other_keys_and_another_reader_are_another_entry(tmp_path, cache, monkeypatch):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"question": "Q", "a": "A", "b": "B"}])
    keys = ({"answer_key": "a", "ignore_keys": ["b"]}, {"answer_key": "b", "ignore_keys": ["a"]})
    answers = [convert_once(path, **one).rows[0]["messages"][1]["content"] for one in keys]
    assert answers == ["A", "B"]
    (tmp_path / "data").mkdir()
    found = set()
    for text in ("x = 1", "x = 2"):
        (tmp_path / "data/read.py").write_text(text)
        monkeypatch.setattr(tables, "__file__", str(tmp_path / "data/tables.py"))
        tables._version.cache_clear()
        found.add(key_of("a", files=[path]))
    monkeypatch.undo()
    tables._version.cache_clear()
    assert len(found) == 2


@pytest.mark.integration
@pytest.mark.parametrize("damage", ["cut", "flip", "no notes", "half notes", "empty", "left over"])
def test_a_damaged_entry_is_made_again(damage, tmp_path, cache):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [*pairs(3 * AT_ONCE), {"text": "?"}])
    found = convert_once(path)
    rows, folder = list(found.rows), entry(cache)
    data, notes = folder / "table.arrow", folder / "notes.json"
    whole = data.read_bytes()
    if damage == "cut":  # where a batch ends: what is left could be read
        stream = pyarrow.ipc.open_stream(whole)
        first = stream.read_next_batch()
        with pyarrow.ipc.new_stream(data, first.schema) as short:
            short.write_batch(first)
    elif damage == "flip":
        data.write_bytes(whole.replace(b"a 7?", b"a 8?", 1))
    elif damage == "no notes":
        notes.unlink()
    elif damage == "half notes":
        notes.write_text(notes.read_text()[:30])
    elif damage == "empty":
        data.write_bytes(b"")
    else:
        shutil.rmtree(folder)
        folder.with_name(f".{folder.name}-0").mkdir()
        (folder.with_name(f".{folder.name}-0") / "table.arrow").write_bytes(whole[:500])
    again = convert_once(path)
    assert list(again.rows) == rows and again.rejects == found.rejects
    assert data.read_bytes() == whole and json.loads(notes.read_text())
    assert not [left for left in cache.iterdir() if left.name.startswith(".")]


def test_where_nothing_can_be_written_the_data_stay_in_memory(tmp_path, cache):
    cache.parent.write_text("a file, where a folder should be")
    write_jsonl(tmp_path / "data.jsonl", pairs(30))
    data = load_data(FinetuneArguments(data=str(tmp_path / "data.jsonl")))
    assert len(data.train) + len(data.held_out) == 30
    said = [note for note in data.notes if "cannot be used (" in note]
    assert len(said) == 1 and str(cache) in said[0] and "each start reads the data again" in said[0]


@pytest.mark.integration
def test_a_full_disk_is_no_error(tmp_path):
    """A limit on the size of a file stands for the full disk: writing fails in the middle."""
    write_jsonl(tmp_path / "data.jsonl", pairs(9000))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18));"
        "from sftlib.data.stored import convert_once; rows = convert_once(sys.argv[1]).rows;"
        "print(len(rows), rows[8999]['messages'][1]['content'], rows.unsaved)"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", code, tmp_path / "data.jsonl"]
    said = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("9000 8999. ") and "File too large" in said.stdout
    assert [path.suffix for path in (tmp_path / "cache/sftlib").iterdir()] == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, pairs(5))

    def make(notes):
        for batch in original(notes):
            path.write_text(path.read_text() + '{"question": "new", "answer": "new"}\n')
            yield batch

    original = None

    def meanwhile(key, found):
        nonlocal original
        original = found
        return table(key, make)

    from sftlib.data import stored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "table", meanwhile)
        with pytest.raises(ValueError, match="found that they have changed meanwhile"):
            convert_once(path)
    assert not list(cache.glob("*/table.arrow"))
    assert len(convert_once(path).rows) == 6


def test_what_json_cannot_hold_is_a_reject(tmp_path, cache):
    row = called("f", {"since": datetime(2020, 1, 1)})
    parquet.write_table(
        pyarrow.Table.from_pylist([row, called("f", {"since": None})]), tmp_path / "data.parquet"
    )
    found = convert_once(tmp_path / "data.parquet")
    assert len(found.rows) == 1 and [reject["line"] for reject in found.rejects] == [1]
    assert "cannot be written as JSON" in found.rejects[0]["reason"]


def test_a_dataset_is_read_once_too(tmp_path, cache):
    write_jsonl(tmp_path / "data.jsonl", pairs(5))
    dataset = datasets.load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train")
    assert list(convert_records_once(dataset).rows) == convert(tmp_path / "data.jsonl").rows
    before = (entry(cache) / "table.arrow").stat().st_ino
    convert_records_once(dataset)
    assert (entry(cache) / "table.arrow").stat().st_ino == before


@pytest.mark.parametrize(("rank", "shown"), [("", True), ("0", True), ("1", False)])
def test_a_bar_shows_the_reading_on_the_first_rank_alone(
    rank, shown, tmp_path, cache, somebody_comes, monkeypatch, capsys
):
    somebody_comes()
    monkeypatch.setenv("LOCAL_RANK", rank or "0")
    write_jsonl(tmp_path / "data.jsonl", pairs(20))
    assert lines_in(tmp_path / "data.jsonl") == 20
    convert_once(tmp_path / "data.jsonl")
    assert ("Reading data.jsonl" in capsys.readouterr().out) == shown


# --- Two processes, and memory -------------------------------------------------------------------


@pytest.mark.integration
def test_two_processes_at_once_read_once(tmp_path):
    """Each prints the file that it has mapped: had both written one, the first would be deleted."""
    write_jsonl(tmp_path / "data.jsonl", pairs(20_000))
    code = (
        "import sys, time; from sftlib.data.stored import convert_once;"
        "import datasets, filelock, pyarrow, numpy; print('ready', flush=True); input();"
        "rows = convert_once(sys.argv[1]).rows; print(len(list(rows)), flush=True); input();"
        "print([line for line in open('/proc/self/maps') if 'table.arrow' in line])"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-c", code, str(tmp_path / "data.jsonl")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(words, env=env, cwd=ROOT, **pipes) for _ in range(2)]
    for answer in ("ready\n", "20000\n"):
        assert [one.stdout.readline() for one in both] == [answer] * 2
        for one in both:
            one.stdin.write("\n")
            one.stdin.flush()
    maps = [one.communicate()[0] for one in both]
    inodes = {line.split()[4] for line in maps}
    assert len(inodes) == 1 and "deleted" not in "".join(maps)


MEMORY = """
import re, sys
from pathlib import Path
import numpy, pyarrow, datasets
from sftlib.finetune.arguments import parse
from sftlib.finetune.data import load_data, refuse_unshown
from sftlib.finetune.checkpoints import digest
status = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
args, training = parse(["--data", sys.argv[1]])
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = status("VmRSS")
data = refuse_unshown(load_data(args), args, training)
digest(data.train)
print(len(data.train) + len(data.held_out), status("VmHWM") - before)
"""  # noqa: E501


@pytest.mark.integration
@pytest.mark.parametrize("length", [330, pytest.param(1500, marks=pytest.mark.nightly)])
def test_reading_takes_at_most_twice_the_size_of_the_file(length, tmp_path):
    path, count = tmp_path / "data.jsonl", 30_000_000 // length
    with open(path, "w") as file:
        for n in range(count):
            start = f'{{"instruction": "Question {n}: what is {n} times {n}?", "output": "'
            file.write(f"{start:x<{length - 3}}" + '"}\n')
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "CI": "1"}
    for _ in ("first", "second"):
        words = [sys.executable, "-c", MEMORY, str(path)]
        said = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        rows, taken = map(int, said.stdout.split())
        assert rows == count and taken <= 2 * path.stat().st_size, taken / path.stat().st_size


# --- Tokens --------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_are_those_of_a_list(tmp_path, cache, tokenizer):
    write_jsonl(tmp_path / "data.jsonl", pairs(AT_ONCE + 20))
    rows = convert_once(tmp_path / "data.jsonl").rows
    _, training = parse(["--output_dir", str(tmp_path)])
    found, plain = (encode_dataset(one, tokenizer, training) for one in (rows, list(rows)))
    for name in ("input_ids", "labels"):
        assert list(found[name]) == list(plain[name])
    (file,) = (one["filename"] for one in found.cache_files)
    again = encode_dataset(rows, tokenizer, training)
    assert [one["filename"] for one in again.cache_files] == [file]
    assert len(list(cache.glob("*/table.arrow"))) == 2
    _, on_all = parse(["--output_dir", str(tmp_path), "--assistant_only_loss", "false"])
    every = encode_dataset(rows, tokenizer, on_all)
    assert every["labels"][0] == every["input_ids"][0] != found["labels"][0]
    fewer = encode_dataset(rows.select([5, 1, 5]), tokenizer, training)
    assert list(fewer["input_ids"]) == [plain["input_ids"][n] for n in (5, 1, 5)]


def test_stored_rows_that_a_template_cannot_show_are_taken_out(tmp_path, cache):
    write_jsonl(tmp_path / "data.jsonl", [*pairs(40), called("f", {"a": 1})])
    args, training = parse(["--data", str(tmp_path / "data.jsonl"), "--held_out", "0"])
    args.model = "tiny-base"
    data = refuse_unshown(load_data(args), args, training)
    assert isinstance(data.train, StoredRows) and len(data.train) == 40
    assert len(data.rejects) == 1 and data.rejects[0]["source"] == str(tmp_path / "data.jsonl")


# --- Several sources -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("a.jsonl", ("a.jsonl", 1.0)),
        ("a.jsonl:0.5", ("a.jsonl", 0.5)),
        ("org/set:2", ("org/set", 2.0)),
        ("org/set:.25", ("org/set", 0.25)),
        (r"C:\data\a.jsonl", (r"C:\data\a.jsonl", 1.0)),
        (r"C:\data\a.jsonl:3", (r"C:\data\a.jsonl", 3.0)),
        ("a:b.jsonl", ("a:b.jsonl", 1.0)),
        ("a.jsonl:2:3", ("a.jsonl:2", 3.0)),
    ],
)
def test_a_number_after_the_last_colon_is_a_weight(word, found):
    args, training = parse(["--data", word])
    check(args, training)
    assert args.sources == [found]


def test_a_file_whose_name_ends_in_a_number_is_no_weight(tmp_path):
    (tmp_path / "a:2").write_text("")
    assert FinetuneArguments(data=str(tmp_path / "a:2")).sources == [(str(tmp_path / "a:2"), 1.0)]


@pytest.mark.parametrize("word", ["a.jsonl:0", "a.jsonl:-1"])
def test_a_weight_that_is_not_above_0_is_refused(word):
    args, _ = parse(["--data", "b.jsonl", word])
    with pytest.raises(ValueError, match=r"number above 0 as the weight of a\.jsonl"):
        load_data(args)


def test_a_file_of_settings_may_name_one_source_or_several(tmp_path):
    for text, found in (("data: a.jsonl", 1), ("data: [a.jsonl:0.5, b.jsonl]", 2)):
        (tmp_path / "my.yaml").write_text(text)
        assert len(parse(["--config", str(tmp_path / "my.yaml")])[0].sources) == found


def openings(rows):
    return [row["messages"][0]["content"] for row in rows]


def test_weights_draw_rows_and_repeat_those_to_train_on(tmp_path, cache):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(a, [*pairs(200, "a"), {"text": "?"}])
    write_jsonl(b, pairs(100, "b"))
    args = FinetuneArguments(data=[f"{a}:0.5", f"{b}:2.5"], held_out="0.1")
    data = load_data(args)
    train, held = openings(data.train), openings(data.held_out)
    assert len(set(held)) == len(held) and not set(train) & set(held)
    of_a, of_b = ([q for q in train if q.startswith(name)] for name in "ab")
    held_b = sum(q.startswith("b") for q in held)
    assert len(of_a) == len(set(of_a)) == 100 - (len(held) - held_b)
    assert len(of_b) == 2 * (100 - held_b) + round(0.5 * (100 - held_b))
    assert len(set(of_b)) == 100 - held_b and 16 <= len(held) <= 24
    assert f"100 of 200 of {a} are used (weight 0.5)." in data.notes
    assert f"Of {b}, those to train on are taken 2.5 times." in data.notes
    assert data.read == 301 and [reject["source"] for reject in data.rejects] == [str(a)]
    assert load_data(args).train == data.train  # the same rows are drawn


def test_rows_that_stand_in_two_sources_are_on_one_side(tmp_path, cache):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_jsonl(a, pairs(60))
    write_jsonl(b, pairs(60))
    data = load_data(FinetuneArguments(data=[str(a), f"{b}:2"], held_out="0.2"))
    assert not set(openings(data.train)) & set(openings(data.held_out))
    assert len(data.train) == 3 * (60 - len(data.held_out) // 2)


def test_held_out_rows_of_a_file_are_there_once_beside_weights(tmp_path, cache):
    write_jsonl(tmp_path / "a.jsonl", pairs(20))
    write_jsonl(tmp_path / "exam.jsonl", pairs(5, "exam"))
    args = FinetuneArguments(
        data=[f"{tmp_path / 'a.jsonl'}:3"], held_out=str(tmp_path / "exam.jsonl")
    )
    data = load_data(args)
    assert (len(data.train), len(data.held_out), data.read) == (60, 5, 25)
    assert isinstance(data, Data) and hold_out(data.train, 0.2)[0]


def test_weights_that_leave_nothing_are_refused(tmp_path, cache):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    with pytest.raises(ValueError, match="weights that leave some rows, found none left: 0 of 3"):
        load_data(FinetuneArguments(data=f"{tmp_path / 'a.jsonl'}:0.1"))
