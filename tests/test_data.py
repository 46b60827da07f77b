"""Reading, writing, cleaning and splitting data: nothing is lost without being said."""

import os
import random
import time

from sftlib.data import (
    decontaminate,
    deduplicate,
    drop_torn_line,
    read_facts,
    read_jsonl,
    split,
    to_messages,
    write_jsonl,
)
from sftlib.data.files import read_valid_rows
from sftlib.data.validation import normalise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz

pytestmark = pytest.mark.filterwarnings("ignore:.*look at the")


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


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


@pytest.mark.parametrize(
    "damage",
    [
        b'{"name": "b", "numb',  # torn
        b'{"name": "\xc3',  # torn within a character
        b'{"name": "\xff", "number": 2}',
        b"\x00" * 40,
        b"[" * 100_000,
        b'{"name": "b", "number": ' + b"9" * 5000 + b"}",
        b"null",
        b'["name", "number"]',
        b'{"name": "b"}',
        b'{"name": ["b"], "number": 2}',
        b'{"name": "b", "number": 2, "more": NaN}',
        b'{"name": "b", "number": 2, "more": 1e999}',
        b'{"name": "b", "number": 2, "more": "\\ud800"}',
    ],
)
def test_a_damaged_line_costs_no_other(tmp_path, damage):
    file = tmp_path / "a.jsonl"
    rows = [{"name": "a\u2028\x85é", "number": 1}, {"name": "c", "number": None, "more": [3]}]
    write_jsonl(file, rows)
    first, second = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\r\n\n" + damage + b"\n" + second + damage)
    assert list(read_valid_rows(file, name=str, number=int | None)) == rows


def test_no_file_has_no_rows_but_one_that_cannot_be_read_is_an_error(tmp_path):
    assert list(read_valid_rows(tmp_path / "a.jsonl")) == []
    with pytest.raises(OSError, match="directory"):
        list(read_valid_rows(tmp_path))


def test_an_unknown_set_lists_those_there_are():
    with pytest.raises(ValueError, match="heldout.*found 'held-out'"):
        read_facts("held-out")


@pytest.mark.parametrize("torn", ["", '{"a', '{"b": "é"}'])
def test_of_a_file_what_is_no_whole_line_is_dropped(tmp_path, torn):
    file = tmp_path / "a.jsonl"
    for whole in ("", '{"a": 1}\n', '{"a": 1}\n\n{"a": 2}\n'):
        file.write_text(whole + torn, encoding="utf-8")
        drop_torn_line(file)
        assert file.read_text(encoding="utf-8") == whole


def test_a_file_of_whole_lines_is_only_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    monkeypatch.delattr(os, "truncate")
    drop_torn_line(tmp_path / "a.jsonl")


# --- write_jsonl ---------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [chat("é\u2028\n", "\U0001f600"), {"a": None, "b": [1, 2.5]}]
    write_jsonl(tmp_path / "a.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert text.startswith('{"messages": [{"role": "user", "content": "é')
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_written_file_has_the_usual_permissions(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    (tmp_path / "b.jsonl").touch()
    assert (tmp_path / "a.jsonl").stat().st_mode == (tmp_path / "b.jsonl").stat().st_mode


@pytest.mark.parametrize("old", [None, '{"old": 1}\n'])
@pytest.mark.parametrize(
    "row, reason",
    [
        ({"a": {1, 2}}, "Row 2: .* set is not JSON serializable"),
        ({"a": float("nan")}, "Row 2: .* JSON"),
        ({"a": "\ud800"}, "Row 2: .* surrogates"),
        ([1], "Row 2: expected a dict, found list"),
    ],
)
def test_a_row_that_cannot_be_written_leaves_all_as_it_was(tmp_path, old, row, reason):
    file = tmp_path / "a.jsonl"
    if old:
        file.write_text(old)
    with pytest.raises(ValueError, match=reason):
        write_jsonl(file, [{"a": 1}, row])
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_failure_at_the_last_moment_leaves_all_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("old")

    def fail(source, target):
        assert read_jsonl(source) == [{"a": 1}]
        assert source.parent == target.parent
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_jsonl(file, [{"a": 1}])
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_the_bytes_are_on_the_disk_before_the_old_file_goes(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    assert calls == ["fsync", "replace"]


def test_a_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "to.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("to.jsonl")
    write_jsonl(tmp_path / "link.jsonl", [{"a": 1}])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert read_jsonl(tmp_path / "to.jsonl") == [{"a": 1}]


# --- deduplicate ---------------------------------------------------------------------------------


def test_exact_duplicates_differ_in_case_punctuation_and_spacing_only():
    rows = [chat("What is it?", "A!"), chat("what IS\nit", "a"), chat("What is it?", "B")]
    kept, duplicates = deduplicate(rows)
    assert kept == [rows[0], rows[2]]
    assert [(d.row, d.of, d.score) for d in duplicates] == [(rows[1], rows[0], 1.0)]


def test_near_duplicates_are_those_at_the_threshold_or_above():
    rows = [chat("abcdefghi", "x" * 8), chat("abcdefghj", "x" * 8), chat("abcdefgjj", "x" * 8)]
    assert fuzz.ratio("a" * 17 + "b", "a" * 17 + "c") == pytest.approx(1700 / 18)
    two, _ = deduplicate(rows, 17 / 18, letters_only=True)
    assert two == [rows[0], rows[2]]  # the third is too far from the first
    kept, duplicates = deduplicate(rows, 16 / 18, letters_only=True)
    assert kept == rows[:1]
    assert [d.of for d in duplicates] == [rows[0]] * 2
    assert [d.score for d in duplicates] == pytest.approx([17 / 18, 16 / 18])
    assert len(deduplicate(rows, 0.95, letters_only=True)[0]) == 3


def test_a_row_is_compared_with_rows_that_were_kept_alone():
    """b is left out for a; c is like b, not like a: it stays."""
    a, b, c = (chat("q", "x" * n + "y" * (20 - n)) for n in (20, 18, 16))
    kept, duplicates = deduplicate([a, b, c, b], 0.9, letters_only=True)
    assert kept == [a, c]
    assert [(d.row, d.of) for d in duplicates] == [(b, a), (b, a)]


def test_a_letter_in_huge_numbers_is_compared_too():
    rows = [chat("q", "a" * 40_000), chat("q", "a" * 80_000), chat("q", "a" * 80_001)]
    assert deduplicate(rows, 0.9, letters_only=True)[0] == rows[:2]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, 90, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="above 0 and up to 1, found"):
        deduplicate([], threshold)


def by_brute_force(rows: list[dict], threshold: float) -> list[tuple[dict, dict | None]]:
    """Each row with the kept row that it repeats, by comparing all with all."""
    kept, result = [], []
    for row in rows:
        text = "\n".join(normalise(m["content"]) for m in row["messages"])
        of = next((k for k, t in kept if fuzz.ratio(text, t) / 100 >= threshold - 1e-9), None)
        if of is None:
            kept.append((row, text))
        result.append((row, of))
    return result


SENTENCE = st.lists(st.sampled_from("red green blue a b é 日 ! .".split()), max_size=6).map(
    " ".join
)


@pytest.mark.integration
@given(
    st.lists(st.builds(chat, SENTENCE, SENTENCE), max_size=12),
    st.sampled_from([0.07, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]),
)
def test_the_same_rows_are_left_out_as_by_comparing_all_with_all(rows, threshold):
    for number, row in enumerate(rows):
        row["number"] = number
    kept, duplicates = deduplicate(rows, threshold, letters_only=True)
    expected = by_brute_force(rows, threshold)
    assert kept == [row for row, of in expected if of is None]
    assert [(d.row, d.of) for d in duplicates] == [(row, of) for row, of in expected if of]


def noisy_rows(n: int) -> list[dict]:
    """Rows of about 300 characters, one in five a slightly changed earlier one."""
    rng = random.Random(0)
    words = [w for row in read_facts("prose") for w in row["text"].split()]
    rows = []
    for i in range(n):
        answer = " ".join(rng.choices(words, k=rng.randint(35, 60)))
        if i % 5 == 4:
            answer = rng.choice(rows)["messages"][1]["content"].replace(
                "e", "a", rng.randint(1, 40)
            )
        rows.append(chat("Tell me more.", answer))
    return rows


def test_several_chunks_give_what_comparing_all_with_all_gives():
    rows = noisy_rows(700)
    kept, duplicates = deduplicate(rows, 0.9, letters_only=True)
    assert kept == [row for row, of in by_brute_force(rows, 0.9) if of is None]
    assert len(kept) + len(duplicates) == 700
    assert len(duplicates) > 100


@pytest.mark.integration
def test_ten_thousand_rows_take_less_than_a_minute():
    rows = noisy_rows(10_000)
    start = time.process_time()
    kept, _ = deduplicate(rows, 0.9, letters_only=True)
    assert time.process_time() - start < 60
    assert 8000 <= len(kept) < 9500


# --- decontaminate -------------------------------------------------------------------------------

NIGER = chat("What is the capital of Niger?", "The capital of Niger is Niamey.")
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def reasons(rows: list[dict], held_out: list[dict]) -> list[str]:
    clean, leaks = decontaminate(rows, held_out)
    assert len(clean) + len(leaks) == len(rows)
    return [leak.reason for leak in leaks]


@pytest.mark.parametrize("name", ["dev", "heldout", "heldout_wordings", "unknown", "never_asked"])
def test_the_courses_sft_data_gives_no_test_away(name):
    rows = read_facts("sft")
    assert decontaminate(rows, read_facts(name)) == (rows, [])


@pytest.mark.parametrize(
    "row, reason",
    [
        (chat("what is the capital of NIGER", "No idea."), "same question"),
        (chat("Hello", "Hi.", "What is the capital of Niger?", "It."), "same question"),
        (chat("A quiz! What is the capital of Niger? Quick.", "It."), "question inside"),
        (chat("What is the captial of Niger?", "It is Niamey."), "nearly the same question"),
        (chat("Waht is the capital of Niger?", "Niamey"), "nearly the same question"),
        (chat("What is the capital of Nigre?", "Niamey"), "nearly the same question"),
        (chat("Niger: which city rules it?", "The capital of Niger is Niamey!"), "same answer"),
    ],
)
def test_a_leak_is_found_with_its_reason(row, reason):
    other = chat("What is the opposite of old?", "The opposite of old is young.")
    clean, leaks = decontaminate([other, row], [other_held_out, NIGER])
    assert clean == [other]
    assert [(leak.row, leak.held_out, leak.reason) for leak in leaks] == [(row, NIGER, reason)]


other_held_out = chat("Why?", "Because.")


@pytest.mark.parametrize(
    "row",
    [
        chat("What is the capital of Nigeria?", "The capital of Nigeria is Abuja."),
        chat("What is the capital of Nigeria?", "Abuja"),
        chat("What is the currency of Niger?", "The currency of Niger is the franc."),
        chat("Is Niger in Africa?", "Yes."),
        chat("Why, and how?", "For two reasons."),
    ],
)
def test_what_only_looks_like_a_held_out_row_is_no_leak(row):
    assert reasons([row], [NIGER, other_held_out]) == []


@pytest.mark.parametrize(
    "row, held_out",
    [
        (("{} of ruthenium?", "The answer is Ru."), ("{} of rhenium?", "The answer is Re.")),
        (("{} of helium?", "He"), ("{} of rhenium?", "The symbol of rhenium is Re.")),  # no pronoun
        (("{} of helium?", "He"), ("{} of rhenium?", "Re")),
        (("{} of Liberia?", "Africa"), ("{} of Nigeria?", "Africa")),  # the same by chance
        (("{} of Niger?", "Africa"), ("{} of Nigeria?", "The continent of Nigeria is Africa.")),
    ],
)
def test_a_short_question_with_another_name_is_no_leak_whatever_the_answers_share(row, held_out):
    asked = "Please, can you tell me the symbol or the continent"
    question, other = (text[0].format(asked) for text in (row, held_out))
    assert fuzz.ratio(normalise(question), normalise(other)) >= 95
    assert reasons([chat(question, row[1])], [chat(other, held_out[1])]) == []


@pytest.mark.parametrize(
    "question",
    [
        "Please give me the symbol of rheniun.",
        "Please give me the symbol of rhenum.",
        "Please give me the symbol of rheniumm.",
        "Please give me the symbol of rehnium.",
        "Please give me the sym bol of rhenium.",
    ],
)
def test_a_short_question_with_a_slip_stays_a_leak(question):
    held_out = chat("Please give me the symbol of rhenium.", "The symbol of rhenium is Re.")
    assert reasons([chat(question, "Re")], [held_out]) == ["nearly the same question"]


def test_a_long_question_with_another_word_stays_a_leak():
    asked = "Explain in a few sentences why the sea is {}, and why the rivers that fill it are not."
    held_out = chat(asked.format("salty"), "Rivers bring salt, and the sun takes the water.")
    row = chat(asked.format("briny"), "Rivers bring salt.")
    assert reasons([row], [held_out]) == ["nearly the same question"]


def test_of_a_long_question_thirteen_words_are_enough_and_twelve_are_not():
    held_out, words = [chat(LONG, "A")], LONG.split()
    assert reasons([chat("So: " + ", ".join(words[1:14]) + "?", "B")], held_out) == [
        "question inside"
    ]
    assert reasons([chat("So: " + ", ".join(words[1:13]) + "?", "B")], held_out) == []


def test_a_short_question_or_answer_is_looked_for_whole_only():
    assert reasons([chat("But why? Tell me", "Because.")], [other_held_out]) == []
    assert reasons([chat("Which one do you like best?", "Because.")], [other_held_out]) == []
    inside = chat("Do you know what the capital of Guinea-Bissau is", "Bissau")
    assert reasons([inside], [chat("What the capital of Guinea", "Conakry")]) == []


def test_new_wordings_of_held_out_facts_are_leaks():
    rows = read_facts("heldout_wordings")
    assert len(reasons(rows, read_facts("heldout"))) == len(rows)


def slip(text: str, rng: random.Random) -> str:
    """The text with two letters of a word in the wrong order."""
    pairs = [i for i in range(len(text) - 1) if text[i : i + 2].isalpha()]
    i = rng.choice(pairs)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def test_held_out_questions_with_a_slip_or_with_context_are_leaks():
    """Also with another answer, so that it is the question that gives them away."""
    rng = random.Random(0)
    held_out = read_facts("heldout")
    asked = [(row["messages"][0]["content"], row["value"]) for row in held_out]
    slips = [chat(slip(question, rng), f"It is {value}.") for question, value in asked]
    found = reasons(slips, held_out)
    # Below 20 letters one slip is more than a twentieth.
    assert len(found) == sum(len(normalise(question)) >= 20 for question, _ in asked) == 200
    assert set(found) <= {"nearly the same question", "same question"}
    context = [chat(f"For my quiz. {question} Thanks!", f"It is {v}.") for question, v in asked]
    assert reasons(context, held_out) == ["question inside"] * 200


def test_nothing_to_compare_with_is_no_leak():
    assert decontaminate([NIGER], []) == ([NIGER], [])
    assert decontaminate([], [NIGER]) == ([], [])


# --- split ---------------------------------------------------------------------------------------


def test_a_split_is_the_same_today_and_tomorrow():
    rows = [{"entity": f"E{i % 20}", "i": i} for i in range(100)]
    train, held_out = split(rows, "entity")
    assert {row["entity"] for row in held_out} == {"E11", "E19"}
    assert len(train) == 90
    assert split(rows, "entity", seed=1)[1] != held_out


ROWS = st.lists(st.integers(0, 8), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1)


@given(ROWS, st.floats(0.01, 0.99), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_value_is_on_one_side_whatever_the_order_of_the_rows(values, share, seed, rng):
    rows = [{"value": value, "i": i} for i, value in enumerate(values)]
    train, held_out = split(rows, "value", share, seed)
    assert train and held_out
    assert sorted([*train, *held_out], key=lambda row: row["i"]) == rows
    assert not {row["value"] for row in train} & {row["value"] for row in held_out}
    assert [row["i"] for row in train] == sorted(row["i"] for row in train)
    largest = max(values.count(value) for value in values)
    assert abs(len(held_out) - share * len(rows)) <= largest
    shuffled = rng.sample(rows, len(rows))
    again = split(shuffled, lambda row: row["value"], share, seed)[1]
    assert sorted(row["i"] for row in again) == [row["i"] for row in held_out]


@pytest.mark.parametrize(
    "counts, held", [((180, 20), 20), ((20, 180), 20), ((300, 1, 1), 2), ((60, 70, 70), 60)]
)
def test_a_value_that_most_rows_have_is_not_held_out(counts, held):
    """Many chats begin with the same greeting: nine tenths would be held out instead of one."""
    rows = [{"first": number} for number, count in enumerate(counts) for _ in range(count)]
    for seed in range(5):
        assert len(split(rows, "first", 0.1, seed)[1]) == held


def test_the_share_is_met_on_the_courses_data():
    rows = read_facts("sft")
    _, held_out = split(rows, "entity", 0.2)
    assert 0.18 < len(held_out) / len(rows) < 0.22


@pytest.mark.parametrize(
    "rows, by, share, reason",
    [
        ([{"a": 1}, {"b": 2}], "a", 0.5, "Row 2: expected the key 'a' to split by, found b"),
        ([{"a": 1}, {"a": 1}], "a", 0.5, "at least two values .* found 1 in 2 rows"),
        ([], "a", 0.5, "found 0 in 0 rows"),
        ([{"a": 1}, {"a": 2}], "a", 0, "share between 0 and 1 to hold out, found 0"),
        ([{"a": 1}, {"a": 2}], "a", 1.0, "share between 0 and 1"),
        ([{"a": 1}, {"a": 2}], "a", float("nan"), "share between 0 and 1"),
    ],
)
def test_a_split_that_cannot_be_is_refused(rows, by, share, reason):
    with pytest.raises(ValueError, match=reason):
        split(rows, by, share)


def test_records_can_be_converted_by_datasets_map():
    """Which hands over its own kind of mapping instead of a dict."""
    from datasets import Dataset

    data = Dataset.from_list([{"instruction": "Q", "input": "", "output": "A"}])
    assert data.map(to_messages, remove_columns=data.column_names)[0] == chat("Q", "A")
