"""Files of any kind are read by their content, record by record; several make a mixture."""

import bz2
import codecs
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

from sftlib.data import convert

import pyarrow
import pytest
from pyarrow import parquet


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


RECORDS = [{"question": f"Qé{i}", "answer": f"A\n{i}", "id": i} for i in range(3)]
ROWS = [chat(f"Qé{i}", f"A\n{i}") for i in range(3)]


def lines(records: list, **layout) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, **layout) + "\n" for record in records)


def table(delimiter: str) -> str:
    return (
        delimiter.join(RECORDS[0])
        + "\n"
        + "".join(
            delimiter.join((r["question"], f'"{r["answer"]}"', str(r["id"]))) + "\n"
            for r in RECORDS
        )
    )


TEXTS = {
    "lines": lines(RECORDS),
    "lines with gaps": "\n\n" + lines(RECORDS).replace("\n", "\r\n\n"),
    "pretty objects": lines(RECORDS, indent=2),
    "array": json.dumps(RECORDS),
    "pretty array": json.dumps(RECORDS, indent=4),
    "array of lines": "[" + lines(RECORDS).rstrip().replace("\n", ",\n") + "]",
    "wrapped": json.dumps({"data": RECORDS}),
    "pretty wrapped": json.dumps({"train": RECORDS}, indent=2),
    "wrapped, indent 0": json.dumps({"rows": RECORDS}, indent=0),
    "wrapped under any key, with a version": json.dumps(
        {"version": "1.0", "questions": RECORDS, "count": 3}
    ),
    "wrapped chats": json.dumps({"conversations": ROWS}),
    "lists of messages": lines([row["messages"] for row in ROWS]),
    "array of lists of messages": json.dumps([row["messages"] for row in ROWS]),
    "pretty objects by hand": "".join(
        f'{{"messages": [\n{lines(row["messages"]).rstrip().replace(chr(10), "," + chr(10))}\n]}}\n'
        for row in ROWS
    ),
    "csv": table(","),
    "tsv": table("\t"),
    "semicolons": table(";"),
    "csv in capitals": table(",").replace("question,answer", "Question,Answer"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a"])
@pytest.mark.parametrize("kind", TEXTS)
def test_the_content_of_a_file_decides_what_it_is(tmp_path, kind, name):
    (tmp_path / name).write_text(TEXTS[kind], encoding="utf-8", newline="")
    found = convert(tmp_path / name)
    assert (found.rows, found.rejects) == (ROWS, [])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS[0]),
        json.dumps(ROWS[0], indent=2),
        json.dumps(ROWS[0]["messages"]),
        json.dumps(ROWS[0]["messages"], indent=1),
        json.dumps({"conversation": [{"input": "Qé0", "output": "A\n0"}]}),
        json.dumps({"tools": [], "history": [], **RECORDS[0]}, indent=2),
        json.dumps({"prompt": ROWS[0]["messages"][:1], "completion": ROWS[0]["messages"][1:]}),
    ],
)
def test_a_file_of_one_record_is_one_record(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = convert(tmp_path / "a.json")
    assert (found.rows, found.rejects) == (ROWS[:1], [])


def packed_zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("pack", [gzip.compress, packed_zstd, bz2.compress, lzma.compress])
@pytest.mark.parametrize("kind", ["lines", "pretty array", "csv"])
def test_a_packed_file_is_known_by_its_first_bytes(tmp_path, kind, pack, name):
    (tmp_path / name).write_bytes(pack(TEXTS[kind].encode()))
    assert convert(tmp_path / name).rows == ROWS


@pytest.mark.parametrize("pack", [gzip.compress, packed_zstd, bz2.compress, lzma.compress])
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path, pack):
    noise = [{"question": f"{hash((i, 'q'))}", "answer": "A"} for i in range(2000)]
    data = pack(lines(noise).encode())
    (tmp_path / "a").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged data in .*fetch it again"):
        convert(tmp_path / "a")


@pytest.mark.parametrize(
    "encoding, mark",
    [
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
    ],
)
@pytest.mark.parametrize("kind", ["lines", "pretty array", "csv"])
def test_the_byte_order_mark_tells_the_encoding(tmp_path, kind, encoding, mark):
    (tmp_path / "a").write_bytes(mark + TEXTS[kind].encode(encoding))
    assert convert(tmp_path / "a").rows == ROWS


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "a.json").write_text(" \n")
    found = convert(tmp_path / "a.json")
    assert (found.rows, found.rejects) == ([], [])


def test_parquet_is_read_without_the_nulls_of_other_rows(tmp_path):
    message = {"role": "assistant", "content": "A", "tool_calls": None}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    other = call | {"function": {"name": "g", "arguments": {"x": None, "y": 2}}}
    rows = [chat("Q", "A"), chat("Q", "A")]
    for row, one in zip(rows, (call, other), strict=True):
        row["messages"][1] = message | {"content": "", "tool_calls": [one]}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = convert(tmp_path / "a.parquet").rows
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert calls == [{"x": 1}, {"y": 2}]


# --- Lines of what is broken ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (lines(RECORDS).replace("Qé1", 'Q"'), [2]),
        (lines(RECORDS).replace("Qé0", 'Q"'), [1]),
        ("nonsense, more nonsense\n" + lines(RECORDS), [1]),
        (lines([row["messages"] for row in ROWS]).replace("Qé0", 'Q"'), [1]),
        (json.dumps(RECORDS, indent=1).replace("Q\\u00e90", 'Q"'), [2]),
        (lines(RECORDS, indent=1).replace("Qé0", 'Q"'), [1]),
        (json.dumps({"data": RECORDS}, indent=1).replace("Q\\u00e91", 'Q"'), [8]),
        (json.dumps({"data": RECORDS}).replace("Q\\u00e91", 'Q"'), [1]),
        (lines(RECORDS, indent=1).replace("Qé1", 'Q"'), [6]),
        (table(",").replace("Qé1,", "Qé1,x,"), [4]),
        (table(",").replace("Qé1", ""), [4]),
        (json.dumps({"data": RECORDS}, indent=1)[:-5], [17]),
        (json.dumps({"data": RECORDS, "system": "Answer in rhyme."}), [1]),
        (json.dumps({"train": RECORDS, "test": RECORDS}), [1]),
    ],
)  # fmt: skip
def test_what_is_broken_is_listed_with_its_line(tmp_path, text, expected):
    (tmp_path / "a").write_text(text, encoding="utf-8")
    found = convert(tmp_path / "a")
    assert [reject["line"] for reject in found.rejects] == expected
    assert all(row in ROWS for row in found.rows) and len(found.rows) >= 2


def test_records_longer_than_what_is_read_at_once_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sftlib.data.records.CHUNK", 64)
    monkeypatch.setattr("sftlib.data.records.HEAD", 32)
    records = [{"question": f"Q{i}", "answer": f'{"é{" * (i % 7 * 40)} "{i}"'} for i in range(60)]
    rows = [chat(r["question"], r["answer"].strip()) for r in records]
    for text in (json.dumps(records), json.dumps({"data": records}), json.dumps(records, indent=2)):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        found = convert(tmp_path / "a.json")
        assert (found.rows, found.rejects) == (rows, [])
        broken = text.replace('"Q31"', '"Q31')
        (tmp_path / "a.json").write_text(broken, encoding="utf-8")
        found = convert(tmp_path / "a.json")
        assert found.rows == rows[:31] + rows[32:]
        line = broken[: broken.index("Q31")].count("\n") + 1
        assert [r["line"] for r in found.rejects] == [line - 1 if line > 1 else 1]


# --- Folders and mixtures ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text(lines(RECORDS[1:2] + [{"question": "Q"}]))
    (tmp_path / "a.csv").write_text('question,answer\nQé0,"A\n0"\n')
    (tmp_path / "sub/c.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS[2:]).encode()))
    (tmp_path / "README.md").write_text("# Data")
    (tmp_path / ".b.jsonl").write_text("{")
    return tmp_path


def test_a_folder_is_all_its_data_files_in_order(folder):
    found = convert(folder)
    assert found.rows == ROWS
    assert [(Path(r["file"]).name, r["line"]) for r in found.rejects] == [("b.jsonl", 2)]


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("#")
    with pytest.raises(ValueError, match="Expected files of .jsonl.* found notes.md"):
        convert(tmp_path)


def test_a_mixture_takes_a_share_of_each(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(
            lines([{"question": f"{name}{i}", "answer": "A"} for i in range(10)])
        )
    a, b = tmp_path / "a", str(tmp_path / "b")
    whole = convert([a, b]).rows
    assert len(whole) == 20
    half = convert([(a, 1.0), (b, 0.5)]).rows
    assert half[:10] == whole[:10] and len(half) == 15
    assert [row for row in whole if row in half] == half  # in the files' order
    assert half == convert([(a, 1.0), (b, 0.5)]).rows
    assert half != convert([(a, 1.0), (b, 0.5)], seed=1).rows
    twice = convert([(b, 2.3)]).rows
    assert len(twice) == 23 and twice[:20] == whole[10:] * 2


def test_a_mixture_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a path, or \(path, weight\), in a mixture, found 0.5"):
        convert(("a.jsonl", 0.5))


def test_a_table_keeps_texts_of_many_lines(tmp_path):
    text = 'One,\n\n"two"\n{\n' + "x" * 200_000
    cells = f'"{text.replace(chr(34), chr(34) * 2)}"'
    file = tmp_path / "a.csv"
    file.write_text(f"question,answer,input\r\n{cells},A,\r\n\r\nQ,,\r\nQ,{cells},\r\n", newline="")
    found = convert(file)
    assert found.rows == [chat(text, "A"), chat("Q", text)]
    assert [reject["line"] for reject in found.rejects] == [8]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), "1", True, None])
def test_a_weight_that_is_no_share_is_refused(tmp_path, weight):
    (tmp_path / "a").write_text(TEXTS["lines"])
    with pytest.raises(ValueError, match="number above 0 as the weight"):
        convert([(tmp_path / "a", weight)])


# --- Memory --------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from sftlib.data import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(convert(sys.argv[1]).rows) == int(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_reading_takes_less_than_twice_the_size_of_a_file(tmp_path, kind):
    records = [
        {"id": i, "messages": chat(f"{i} why? " * 50, f"{i} so. " * 150)["messages"]}
        for i in range(20_000)
    ]
    file = tmp_path / "a"
    file.write_text(lines(records) if kind == "lines" else json.dumps(records))
    command = [sys.executable, "-c", MEASURE, file, str(len(records))]
    kilobytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kilobytes * 1024 < 2 * file.stat().st_size
