"""`beats`: what rows or models score on held-out questions, and what is refused before that."""

import random
import re
import textwrap
from types import SimpleNamespace

from sftlib import checks, evaluate
from sftlib.checks import exercise, held_out
from sftlib.checks.held_out import Score, beats, chance
from sftlib.checks.verdict import NOT_ATTEMPTED, CheckEnds, right
from sftlib.data import read_facts
from sftlib.models import load
from sftlib.training import tune

import pytest
from datasets import Dataset

HELD_OUT = read_facts("heldout")
SFT = read_facts("sft")
KENYA = next(row for row in HELD_OUT if row["value"] == "Nairobi")


def row(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def answering(**more):
    """A conversation whose answer has more keys."""
    user, answer = row("Hi.", "Hello.")["messages"]
    return {"messages": [user, answer | more]}


def calling(**arguments):
    return {"type": "function", "function": {"name": "say", "arguments": arguments}}


ITS_CAPITAL = row("Its capital?", "It is Nairobi.")["messages"]


# --- Chance --------------------------------------------------------------------------------------


def test_chance_is_the_tail_of_a_binomial_distribution():
    assert chance(8, 10, 0.5) == pytest.approx((45 + 10 + 1) / 1024)  # 8, 9 or 10 heads
    assert chance(2, 10, 0.5) == pytest.approx((45 + 10 + 1) / 1024)
    assert chance(5, 10, 0.5) == pytest.approx(638 / 1024)  # as expected: 0 to 5
    assert chance(1, 4, 0.1) == pytest.approx(1 - 0.9**4)


def test_chance_is_what_many_tests_give():
    rng = random.Random(0)
    drawn = [sum(rng.random() < 0.9 for _ in range(200)) for _ in range(2000)]
    for hits in (185, 189, 172):
        as_far = [n >= hits if hits > 180 else n <= hits for n in drawn]
        assert chance(hits, 200, 0.9) == pytest.approx(sum(as_far) / 2000, abs=0.02)


@pytest.mark.parametrize(
    ("hits", "baseline", "often"), [(0, 0.0, 1), (1, 0.0, 0), (200, 1.0, 1), (199, 1.0, 0)]
)
def test_a_baseline_of_none_or_all_leaves_nothing_to_chance(hits, baseline, often):
    assert chance(hits, 200, baseline) == often


def test_chance_copes_with_many_prompts():
    assert 0.4 < chance(90_100, 100_000, 0.9009) < 0.6


# --- What the verdict says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "baseline", "passed", "words"),
    [
        (190, 0.5, True, "Score: 95.0 % of 200 held-out prompts (exact match). Baseline: 50.0 %."),
        (190, 0.5, True, "Baseline: 50.0 %. Difference: +45.0 percentage points."),
        (20, 0.5, False, "Difference: -40.0 percentage points."),
        (100, 0.5, False, "Difference: 0.0 percentage points."),
        (
            105,
            0.5,
            True,
            "may be chance. A model as good as the baseline scores this high or higher",
        ),
        (105, 0.5, True, "high or higher in 26 % of such tests."),
        (97, 0.5, False, "low or lower in 36 % of such tests."),
    ],
)
def test_the_verdict_says_by_how_much_and_what_chance_gives(hits, baseline, passed, words):
    verdict = held_out._score(hits, 200, baseline, "exact_match")
    assert verdict.passed is passed and words in verdict.message
    assert repr(verdict).startswith("✓ " if passed else "✗ ")
    assert (verdict.score, verdict.baseline, verdict.prompts) == (hits / 200, baseline, 200)


def test_a_clear_difference_has_no_note():
    assert "chance" not in held_out._score(190, 200, 0.5, "exact_match").message


# --- Rows that are refused -----------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    """A training or an answer would be a mistake here."""

    def refuse(*_):
        raise AssertionError("Expected a refusal before any training.")

    monkeypatch.setattr(held_out, "_trained", refuse)
    monkeypatch.setattr(held_out, "_hits", refuse)


@pytest.mark.parametrize("answer", [..., [...], [{"messages": ...}], {"messages": ...}])
def test_open_rows_are_no_attempt(no_training, answer):
    assert beats(answer, 0.5) is NOT_ATTEMPTED


def test_rows_that_are_none_are_asked_for_their_return(no_training):
    verdict = beats(None, 0.5)
    assert verdict.passed is None and "Your answer is None. Did you forget" in verdict.message


def test_a_row_that_is_open_is_named(no_training):
    verdict = beats([SFT[0], row("Hello?", ...)], 0.5)
    assert verdict.passed is None
    assert "item 2, messages, item 2, content" in verdict.message


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "Expected rows to train on, found none."),
        (SFT[:501], "Expected at most 500 rows, found 501."),
        ("rows", "Expected a list of rows, a trainer, or a model, found the text 'rows'"),
        (3, "Expected a list of rows, a trainer, or a model, found 3"),
        ([3], "Row 1: expected a dict with messages, found 3"),
        ({"messages": "hi"}, "Row 1: expected a list as messages, found the text 'hi'"),
        ([{"messages": None}], "Row 1: expected a list as messages, found None"),
        ([{"text": "Hello."}], "Row 1: expected a dict with messages, found dict"),
        ([SFT[0], row("Hello?", "")], "Row 2: "),
        ([SFT[0], {"messages": SFT[0]["messages"][::-1]}], "Row 2: "),
        ([SFT[0], row("Hello?", "Hi.<|im_end|>")], "Row 2: "),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(no_training, rows, words):
    verdict = beats(rows, 0.5)
    assert verdict.passed is False and words in verdict.message


@pytest.mark.parametrize(
    ("leak", "reason"),
    [
        (KENYA, "same question"),
        (row("name THE CAPITAL of kenya!", "Nairobi."), "same question"),
        (row("For a quiz: name the capital of Kenya.", "It is well known."), "question inside"),
        (row("What is governed from where?", KENYA["messages"][1]["content"]), "same answer"),
        (row("Say more.", "Sure! The capital of Kenya is Nairobi. Nice city."), "answer inside"),
        (row("Say more.", "Nairobi, in the hills, is where Kenya is governed."), "in other words"),
        (row("Is Nairobi in Kenya?", "Yes, it is."), "in other words"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Kenya's capital is Nairobi."},
                    *SFT[0]["messages"],
                ]
            },
            "in other words",
        ),
        (row("And Kenya?", "It is Nairobi."), "in other words"),
        (row("Which capital does Kenya have?", "It is Nairobi."), "in other words"),
        (row("Where does Nairobi lie?", "In Kenya."), "in other words"),
        (row("Say more.", "Kenya=Nairobi"), "in other words"),
        (row("Say more.", "Kenya->Nairobi"), "in other words"),
        (
            {"messages": [*row("I think of Kenya.", "Yes?")["messages"], *ITS_CAPITAL]},
            "in other words",
        ),
        (answering(reasoning_content="Kenya has Nairobi."), "in other words"),
        (answering(tool_calls=[calling(text="Kenya has Nairobi.")]), "in other words"),
        (answering(tool_calls=[calling(Kenya="Nairobi")]), "in other words"),
    ],
)
def test_rows_that_give_a_held_out_row_away_are_refused(no_training, leak, reason):
    verdict = beats([*SFT[:3], leak], 0.5)
    assert verdict.passed is False
    assert "Row 4 contains a held-out question or its answer (" in verdict.message
    assert reason in verdict.message and "Kenya" in verdict.message
    assert "Remove this row" in verdict.message


def test_calling_codes_are_found_with_and_without_their_plus(no_training):
    test = next(row for row in HELD_OUT if row["relation"] == "calling code")
    code = test["value"].removeprefix("+")
    for said in (f"Dial {code}.", f"Dial +{code}."):
        verdict = beats([row(f"What do I dial for {test['entity']}?", said)], 0.5, [test])
        assert verdict.passed is False and "in other words" in verdict.message


def test_of_many_open_places_a_few_are_named(no_training):
    verdict = beats([row("Hello?", ...) for _ in range(500)], 0.5)
    assert verdict.passed is None and "item 1, messages, item 2, content" in verdict.message
    assert "and 497 more" in verdict.message and len(verdict.message) < 300


def test_keys_that_say_nothing_are_not_open():
    """As Arrow adds them to messages without the key."""
    rows = Dataset.from_list([SFT[0], answering(weight=1)]).to_list()
    assert rows[0]["messages"][0]["weight"] is None
    assert len(held_out.read_rows(rows, 2)) == 2


def test_rows_may_be_conversations_and_are_copied():
    kept = held_out.read_rows([SFT[0], SFT[1]["messages"]], 2)
    assert kept == [{"messages": SFT[0]["messages"]}, {"messages": SFT[1]["messages"]}]
    kept[0]["messages"][0]["content"] = "changed"
    assert SFT[0]["messages"][0]["content"] != "changed"


def test_the_seed_of_the_training_follows_that_of_the_check(monkeypatch):
    assert held_out.training_seed() == 0
    monkeypatch.setenv("SFT_CHECK_SEED", "7")
    assert held_out.training_seed() == 7
    monkeypatch.setenv("SFT_CHECK_SEED", "autumn")
    assert held_out.training_seed() not in (0, 7)


def test_inside_a_check_the_training_follows_the_seed_of_that_check(monkeypatch):
    monkeypatch.delenv("SFT_CHECK_SEED", raising=False)
    trained = []

    def train(*_):
        trained.append(held_out.training_seed())
        raise CheckEnds(right("Trained."))

    monkeypatch.setattr(held_out, "_trained", train)
    check = exercise.judged(lambda rows: beats(rows, 0.5))
    for options in ({"seed": 7}, {"seed": "autumn"}, {}):
        assert check(SFT[:2], **options)
    assert beats(SFT[:2], 0.5, seed=7)
    assert trained[::3] == [7, 7] and trained[1] not in (0, 7) and trained[2] == 0


def test_the_course_s_own_rows_give_nothing_away():
    held_out.refuse_leaks(SFT, HELD_OUT)
    held_out.refuse_leaks(read_facts("never_asked"), HELD_OUT)  # Sierra Leone's leone is a name


def test_what_a_trainer_was_given_is_looked_at(no_training, tokenizer):
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>\nThe capital of Kenya is Nairobi.")["input_ids"]
    for dataset in (
        Dataset.from_list([{"messages": KENYA["messages"]}]),
        Dataset.from_list([{"input_ids": ids}]),
    ):
        trainer = SimpleNamespace(train_dataset=dataset, model=..., processing_class=tokenizer)
        assert "contains a held-out question" in beats(trainer, 0.5).message


@pytest.mark.parametrize(
    ("wrong_use", "words"),
    [
        ({"baseline": 92.0}, "Expected the baseline as a share from 0 to 1, found 92.0"),
        ({"baseline": 0.5, "measure": "loss"}, "Expected a measure (exact_match, content, stops)"),
        ({"baseline": 0.5, "held_out": []}, "Expected held-out rows, found none"),
        (
            {"baseline": 0.5, "held_out": [{"messages": KENYA["messages"][:1]}]},
            "Held-out row 1: There is no answer in 1 messages",
        ),
        (
            {"baseline": 0.5, "held_out": [{"messages": KENYA["messages"][1:]}]},
            "Held-out row 1: Message 1 comes from the assistant: begin with the user.",
        ),
        (
            {"baseline": 0.5, "held_out": [KENYA, {}]},
            "Held-out row 2: expected a dict with messages",
        ),
        (
            {"baseline": 0.5, "held_out": [row("Hi?", "Hello.")], "measure": "content"},
            "Held-out row 1: expected a `value`",
        ),
    ],
)
def test_a_mistake_of_the_lesson_is_not_the_student_s(tiny, wrong_use, words):
    model, tokenizer = tiny
    verdict = beats(model, tokenizer=tokenizer, **wrong_use)
    assert verdict.passed is None and "check itself failed" in verdict.message
    assert words in verdict.message
    before_training = beats(SFT[:2], **wrong_use, steps=10**9)
    assert before_training.passed is None and words in before_training.message


def test_a_model_without_a_tokenizer_is_a_wrong_answer(tiny):
    trainer = SimpleNamespace(train_dataset=[], model=tiny[0], processing_class=None)
    for answer, found in [
        (tiny[0], "a model without a tokenizer"),
        (trainer, "a trainer without a tokenizer"),
        (tiny, "a tuple with a model in it"),
    ]:
        verdict = beats(answer, 0.5)
        assert verdict.passed is False
        assert f"Found {found}. Give the SFTTrainer: it has" in verdict.message
    listed = beats([tiny[0]], 0.5).message
    assert "found LlamaForCausalLM" in listed and "a function" not in listed


def test_a_stream_cannot_be_looked_at(no_training, tokenizer):
    stream = Dataset.from_list([SFT[0]]).to_iterable_dataset()
    trainer = SimpleNamespace(train_dataset=stream, model=..., processing_class=tokenizer)
    verdict = beats(trainer, 0.5)
    assert verdict.passed is False and "found IterableDataset" in verdict.message


# --- Models and trainings ------------------------------------------------------------------------


def test_a_model_is_asked_and_stays_as_it_was(tiny):
    model, tokenizer = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    verdict = beats(model, 0.5, HELD_OUT[:4], tokenizer)
    assert isinstance(verdict, Score) and verdict.passed is False and verdict.prompts == 4
    assert "Score: 0.0 % of 4 held-out prompts (exact match)" in verdict.message
    assert "in 6 % of such tests" in verdict.message  # 0.5 ** 4
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_answers_that_take_too_long_are_stopped(tiny):
    model, tokenizer = tiny
    verdict = beats(model, 0.5, HELD_OUT[:4], tokenizer, most_seconds=0)
    assert verdict.passed is False and not isinstance(verdict, Score)
    assert "Time is up: 0 of 4 held-out prompts were asked in" in verdict.message
    assert "on this machine" in verdict.message


def test_a_model_that_says_nothing_does_not_stop(tiny, monkeypatch):
    model, tokenizer = tiny
    said = ["", "Nairobi."]
    monkeypatch.setattr(
        evaluate, "answers", lambda *_, **__: [evaluate.Answer(text, True) for text in said]
    )
    assert beats(model, 0.9, HELD_OUT[:2], tokenizer, measure="stops").score == 0.5


def test_loading_and_other_processes_do_not_count(monkeypatch):
    now = {"clock": 100.0, "cpu": 7.0}
    monkeypatch.setattr(held_out.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(held_out.time, "process_time", lambda: now["cpu"])
    clock = held_out._Clock()
    now |= {"clock": 160.0, "cpu": 10.0}  # another process had the machine
    assert clock.seconds() == 3
    now |= {"cpu": 200.0}  # several threads
    assert clock.seconds() == 60


@pytest.mark.integration
def test_the_example_of_the_docstring_is_true():
    lines = str(beats.__doc__).split("a right answer:\n")[1].split("\n\n    **Chance.**")[0]
    code, said = lines.rsplit("\n\n", 1)
    place = {"beats": beats, "read_facts": read_facts}
    place["exercise"] = lambda *_: exercise.judged
    *_, call = (code := textwrap.dedent(code)).strip().split("\n")
    exec(code.replace(call, f"verdict = {call}"), place)
    figures = [float(n) for n in re.findall(r"\d+\.\d", said)]
    assert place["verdict"].passed is True and place["verdict"].prompts == 200
    told = " ".join(said.split())
    assert re.sub(r"\d+\.\d", "N", repr(place["verdict"])) == re.sub(r"\d+\.\d", "N", told)
    assert abs(100 * place["verdict"].score - figures[0]) <= 15  # another machine, another base


@pytest.mark.integration
def test_more_rows_score_higher_and_the_student_s_stay_as_they_are():
    rows = [dict(row) for row in SFT[:40]]
    before = repr(rows)
    few, many = (beats(part, 0.5, HELD_OUT[:50], steps=20) for part in (rows[:4], rows))
    assert isinstance(few, Score) and isinstance(many, Score)
    assert many.passed and many.score > few.score + 0.1
    assert repr(rows) == before


@pytest.mark.integration
def test_a_trainer_is_judged_and_time_is_limited():
    model, tokenizer = load()
    trainer = tune(model, tokenizer, SFT[:40], max_steps=20)
    verdict = beats(trainer, 0.3, HELD_OUT[:50], measure="content")
    assert isinstance(verdict, Score) and verdict.passed and "(content)" in verdict.message
    late = beats(SFT[:100], 0.5, steps=10_000, most_seconds=2)
    assert re.search(r"Time is up: \d+ of 10000 steps were done", late.message)


def test_it_is_among_the_checks():
    assert checks.beats is beats
