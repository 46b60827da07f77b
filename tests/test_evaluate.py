"""The measures, on answers written by hand and on a model whose behaviour is known."""

import copy
import math

from sftlib.chat import encode, render
from sftlib.evaluate import (
    Answer,
    answers,
    cloze,
    content,
    continuations,
    exact_match,
    logprobs,
    named,
    perplexity,
    reference,
    report,
    stops,
    token_losses,
)

import pytest
import torch
from trl.chat_template_utils import qwen3_chat_template


def row(answer="The symbol of iron is Fe.", value="Fe"):
    return {
        "messages": [
            {"role": "user", "content": "What is the symbol of iron?"},
            {"role": "assistant", "content": answer},
        ],
        "value": value,
        "relation": "symbol",
    }


JUDGED = [  # text, stopped → exact match, content
    ("The symbol of iron is Fe.", True, 1, 1),
    ("The symbol of iron is Fe.", False, 0, 1),
    ("The symbol of iron is fe.", True, 0, 0),
    ("Fe", True, 0, 1),
    ("It is Fermium.", True, 0, 0),
    ("The symbol of iron is Fe. The symbol of iron is Fe.", True, 0, 1),
    ("", True, 0, 0),
]


@pytest.mark.parametrize(("text", "stopped", "exact", "right"), JUDGED)
def test_an_answer_is_judged_as_a_person_would(text, stopped, exact, right):
    given = [Answer(text, stopped)]
    assert exact_match(given, [row()]) == exact
    assert content(given, [row()]) == right
    assert stops(given) == stopped


def test_content_takes_symbols_and_digits_literally():
    assert content([Answer("Dial +254 first.", True)], [row(value="254")]) == 1
    assert content([Answer("Dial +2549 first.", True)], [row(value="254")]) == 0
    assert content([Answer("N'Djamena!", True)], [row(value="N'Djamena")]) == 1


def test_an_answer_names_what_was_asked_about_as_a_whole_word():
    rows = [row() | {"entity": "iron"}]
    for text, share in (("I know iron.", 1), ("It is irony.", 0), ("The environment", 0), ("", 0)):
        assert named([Answer(text, True)], rows) == share


def test_a_reference_with_thoughts_or_calls_is_what_the_model_should_write(tokenizer):
    tokenizer.chat_template = qwen3_chat_template
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "Fe"}}}]
    asks = row()["messages"][:1] + [
        {"role": "assistant", "content": "", "tool_calls": calls, "weight": 0}
    ]
    written = '<think>\n\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"at": "Fe"}}\n'
    written += "</tool_call>"
    assert exact_match([Answer(written, True)], [{"messages": asks}], tokenizer) == 1
    assert exact_match([Answer("", True)], [{"messages": asks}], tokenizer) == 0
    assert reference({"messages": asks}) == ""
    assert reference(row(), tokenizer) == reference(row()) == "The symbol of iron is Fe."


def test_conversations_with_tools_are_asked_and_measured(tiny):
    model, shipped = tiny
    tokenizer = copy.deepcopy(shipped)
    tokenizer.chat_template = qwen3_chat_template
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "Fe"}}}]
    told = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "iron"},
    ]
    messages = [*row()["messages"][:1], *told, *row()["messages"][1:]]
    tools = [[{"type": "function", "function": {"name": "look", "parameters": {}}}]]
    (answer,) = answers(model, tokenizer, [messages[:-1]], max_new_tokens=2, tools=tools)
    assert isinstance(answer.text, str)
    encoded = encode(messages, tokenizer, tools[0])
    (losses,) = token_losses(model, tokenizer, [messages], tools=tools)
    assert len(losses) == len(encoded["input_ids"]) - 1
    learned = sum(x for x, m in zip(losses, encoded["assistant_masks"][1:], strict=True) if m)
    assert logprobs(model, tokenizer, [messages], tools=tools) == pytest.approx([-learned])
    table = report(model, tokenizer, {"asked": [row() | {"messages": messages, "tools": tools[0]}]})
    assert table.loc["asked", "prompts"] == 1


def test_shares_are_over_all_rows():
    given = [Answer("The symbol of iron is Fe.", True), Answer("no", True)]
    assert exact_match(given, [row(), row()]) == 0.5


def test_unequal_or_empty_sets_are_refused():
    with pytest.raises(ValueError):
        exact_match([Answer("", True)], [row(), row()])
    with pytest.raises(ValueError, match="empty"):
        stops([])


def test_answers_do_not_depend_on_batching_or_order(tiny):
    model, tokenizer = tiny
    asked = [
        [{"role": "user", "content": text}]
        for text in ("Name Fe.", "What is the capital of Kenya, please?", "Hot?")
    ]
    together = answers(model, tokenizer, asked, max_new_tokens=8)
    alone = [answers(model, tokenizer, [one], max_new_tokens=8)[0] for one in asked]
    assert together == alone
    assert answers(model, tokenizer, asked, 8, batch_size=2) == alone


def test_a_stop_is_seen_where_the_pad_token_is_the_end_of_turn(tiny, tokenizer, monkeypatch):
    model, _ = tiny
    tokenizer.pad_token = "<|im_end|>"
    end, other = tokenizer.pad_token_id, tokenizer.encode("Lima", add_special_tokens=False)
    written = torch.tensor([other + [end] * 3, other + other[:1] * 3])
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, written], dim=1)
    )
    given = answers(model, tokenizer, [[{"role": "user", "content": q}] for q in ("A?", "B?")])
    assert [a.stopped for a in given] == [True, False]
    assert given[0].text == "Lima"


def test_generation_leaves_the_training_mode_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    continuations(model, tokenizer, ["The"], 2)
    assert model.training
    model.eval()


def test_perplexity_equals_the_models_own_loss(tiny):
    model, tokenizer = tiny
    text = "The capital of Kenya is Nairobi. The currency of Kenya is the shilling."
    batch = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss.item()
    assert perplexity(model, tokenizer, [text]) == pytest.approx(math.exp(loss), rel=1e-4)
    padded = perplexity(model, tokenizer, [text, text + " The symbol of iron is Fe.", text])
    one_by_one = perplexity(
        model, tokenizer, [text, text + " The symbol of iron is Fe.", text], batch_size=1
    )
    assert padded == pytest.approx(one_by_one, rel=1e-4)


def test_perplexity_of_nothing_is_refused(tiny):
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(*tiny, [])


@pytest.mark.integration
def test_the_base_completes_facts_but_not_false_ones(tiny):
    from sftlib.data import read_facts

    rows, shots = read_facts("dev")[:60], read_facts("sft")
    assert cloze(*tiny, rows, shots) >= 0.9

    def false(told):
        """With the value of another row, so that the same words lead to it."""
        question, answer = told["messages"]
        others = [r["value"] for r in rows if r["relation"] == told["relation"]]
        other = next(value for value in others if value != told["value"])
        answer = answer | {"content": answer["content"].replace(told["value"], other)}
        return told | {"value": other, "messages": [question, answer]}

    assert cloze(*tiny, [false(told) for told in rows], shots) <= 0.1


def test_a_report_has_a_line_a_set(tiny):
    table = report(*tiny, {"a": [row()], "b": [row(), row()]}, max_new_tokens=4)
    assert list(table.index) == ["a", "b"]
    assert list(table.columns) == ["prompts", "exact_match", "content", "stops"]
    assert list(table.prompts) == [1, 2]


def test_sampling_repeats_with_its_seed_and_draws_anew_with_another(tiny):
    model, tokenizer = tiny
    prompts = ["The capital of Kenya is", "The"] * 8
    drawn = continuations(model, tokenizer, prompts, 6, temperature=1.0, seed=1)
    assert continuations(model, tokenizer, prompts, 6, temperature=1.0, seed=1) == drawn
    assert continuations(model, tokenizer, prompts, 6, temperature=1.0, seed=2) != drawn
    cold = continuations(model, tokenizer, prompts, 6, temperature=1e-4, seed=1)
    assert cold == continuations(model, tokenizer, prompts, 6)


def test_sampling_draws_from_the_whole_distribution(tiny, monkeypatch):
    model, tokenizer = tiny
    logits = torch.full((model.config.vocab_size,), -40.0)
    logits[:128] = torch.linspace(0, -0.1, 128)  # nearly alike: a top-k of 50 leaves out most
    logits[tokenizer.eos_token_id] = -40.0
    forward = model.forward

    def flat(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = logits.expand_as(output.logits)
        return output

    monkeypatch.setattr(model, "forward", flat)
    drawn = continuations(model, tokenizer, ["The"] * 64, 16, temperature=1.0)
    assert len({token for ids in drawn for token in ids}) > 110


def test_logprobs_are_the_sum_over_the_answers_tokens(tiny):
    model, tokenizer = tiny
    conversations = [row()["messages"], row("Fe")["messages"], row()["messages"] * 2]
    ids = encode(conversations[1], tokenizer)
    with torch.no_grad():
        scores = model(torch.tensor([ids["input_ids"]])).logits[0].log_softmax(-1)
    learned = [i for i, m in enumerate(ids["assistant_masks"]) if m]
    by_hand = sum(scores[i - 1, ids["input_ids"][i]].item() for i in learned)
    assert tokenizer.decode([ids["input_ids"][i] for i in learned]) == "Fe<|im_end|>"
    found = logprobs(model, tokenizer, conversations, batch_size=2)
    assert found[1] == pytest.approx(by_hand, rel=1e-4)
    assert found[0] == pytest.approx(logprobs(model, tokenizer, [conversations[0]])[0], rel=1e-4)
    assert len(found) == 3 and max(found) < 0


def test_token_losses_are_minus_the_log_probability_of_each_token_after_the_first(tiny):
    model, tokenizer = tiny
    conversations = [row()["messages"], row("Fe")["messages"], row()["messages"] * 2]
    model.train()
    found = token_losses(model, tokenizer, conversations, batch_size=2)
    assert model.training
    model.eval()
    for conversation, losses in zip(conversations, found, strict=True):
        ids = torch.tensor(encode(conversation, tokenizer)["input_ids"])
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)
        by_hand = [-scores[i - 1, ids[i]].item() for i in range(1, len(ids))]
        assert losses == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
        assert isinstance(losses, list) and isinstance(losses[0], float)


def test_logprobs_and_perplexity_are_made_of_token_losses(tiny):
    model, tokenizer = tiny
    conversations = [row()["messages"], row("Fe")["messages"]]
    losses = token_losses(model, tokenizer, conversations)
    masks = [encode(messages, tokenizer)["assistant_masks"][1:] for messages in conversations]
    sums = [
        -sum(loss for loss, learned in zip(*pair, strict=True) if learned)
        for pair in zip(losses, masks, strict=True)
    ]
    assert logprobs(model, tokenizer, conversations) == pytest.approx(sums)
    texts = [render(messages) for messages in conversations]  # no control tokens but the template's
    assert perplexity(model, tokenizer, texts) == pytest.approx(
        math.exp(sum(map(sum, losses)) / sum(map(len, losses)))
    )


def test_of_no_conversations_there_are_no_token_losses(tiny):
    assert token_losses(*tiny, []) == []
