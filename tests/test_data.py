"""Reading the course's data: what is wrong is said with its line."""

from sftlib.data import read_facts, read_jsonl

import pytest


def test_records_come_in_order_and_empty_lines_are_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": "é"}\n', encoding="utf-8")
    assert read_jsonl(file) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize("bad", ['{"a": 1', "[1, 2]", "nonsense", '"text"'])
def test_a_bad_line_is_named(tmp_path, bad):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + bad + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected"):
        read_jsonl(file)


def test_an_unknown_set_lists_those_there_are():
    with pytest.raises(ValueError, match="heldout.*found 'held-out'"):
        read_facts("held-out")
