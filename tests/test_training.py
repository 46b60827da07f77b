"""What `tune` really trains on, and that it turns the base model into one that answers."""

import warnings
from types import SimpleNamespace

from sftlib import training
from sftlib.chat import encode
from sftlib.data import read_facts
from sftlib.evaluate import report
from sftlib.models import load
from sftlib.training import config, defaults, encoded, tune

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTConfig, SFTTrainer

ROWS = read_facts("sft")[:480]


def dataset(rows):
    return Dataset.from_list([{"messages": row["messages"]} for row in rows])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def tuned():
    model, tokenizer = load()
    return tune(model, tokenizer, dataset(ROWS), per_device_train_batch_size=16), tokenizer


def test_defaults_are_trls_own_type_and_each_can_be_overridden():
    assert isinstance(config(), SFTConfig)
    assert config().assistant_only_loss and not config().gradient_checkpointing
    assert (config().per_device_train_batch_size, config().num_train_epochs) == (32, 1)
    assert config(learning_rate=1.0, packing=True).learning_rate == 1.0
    with pytest.raises(TypeError, match="no_such_argument"):
        config(no_such_argument=1)


@pytest.mark.parametrize("computes", [True, False])
def test_bfloat16_is_used_where_the_gpu_computes_in_it_and_does_not_emulate_it(
    monkeypatch, computes
):
    def supported(including_emulation=True):
        return including_emulation or computes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert defaults()["bf16"] is computes


def test_the_trainer_learns_exactly_the_assistants_tokens():
    """The batch that the model gets holds our ids, and labels that spell the answer and its end."""
    model, tokenizer = load()
    trainer = tune(model, tokenizer, dataset(ROWS[:4]), max_steps=1, per_device_train_batch_size=4)
    seen = []
    trainer.compute_loss = lambda model, inputs, **_: (
        seen.append(inputs) or torch.zeros((), requires_grad=True)
    )
    trainer.train()
    by_hand = {
        tuple(encode(row["messages"], tokenizer)["input_ids"]): row["messages"][-1]["content"]
        for row in ROWS[:4]
    }
    fed = {}
    for ids, labels, keep in zip(
        seen[0]["input_ids"], seen[0]["labels"], seen[0]["attention_mask"], strict=True
    ):
        assert labels[keep == 0].eq(-100).all(), "padding must not be learned"
        learned = labels[labels != -100]
        assert ids[labels != -100].equal(learned), "a label is the id at its own position"
        fed[tuple(ids[keep == 1].tolist())] = tokenizer.decode(learned)
    assert fed == {ids: answer + "<|im_end|>" for ids, answer in by_hand.items()}


def test_what_is_learned_is_what_trl_would_learn():
    """For text without control tokens `tune` prepares a dataset as TRL does."""
    model, tokenizer = load()
    harmless = dataset(ROWS[:40]).add_column("kept", list(range(40)))
    trl = SFTTrainer(
        model=model, args=config(), train_dataset=harmless, processing_class=tokenizer
    ).train_dataset
    ours = tune(model, tokenizer, harmless, max_steps=1).train_dataset
    assert len(ours) == len(trl) == 40
    for column in ("input_ids", "labels", "kept"):
        assert list(ours[column]) == list(trl[column])
    whole = {"max_steps": 1, "assistant_only_loss": False}
    everything = tune(model, tokenizer, harmless, **whole).train_dataset
    assert list(everything["labels"]) == list(everything["input_ids"]) == list(trl["input_ids"])


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_labels_are_trls_whatever_is_to_be_learned(assistant_only_loss):
    model, tokenizer = load()
    harmless, args = dataset(ROWS[:8]), config(assistant_only_loss=assistant_only_loss)
    theirs = SFTTrainer(
        model=model, args=args, train_dataset=harmless, processing_class=tokenizer
    ).train_dataset
    ours = encoded(harmless, tokenizer, args)
    assert len(ours) == len(theirs) == 8
    for column in ("input_ids", "labels"):
        assert list(ours[column]) == list(theirs[column])
    assert (-100 in ours["labels"][0]) == assistant_only_loss


def test_a_dataset_of_plain_text_goes_to_trl_as_it_is():
    """Text that holds a control token, too: it is not a conversation that we render."""
    model, tokenizer = load()
    plain = Dataset.from_list([{"text": "Lima.<|im_end|>"}, {"text": "What is"}])
    args = config(assistant_only_loss=False)
    assert encoded(plain, tokenizer, args) is plain
    ready = dataset(ROWS[:1]).add_column("input_ids", [[51, 576]])
    assert encoded(ready, tokenizer, args) is ready
    trainer = tune(model, tokenizer, plain, max_steps=1, assistant_only_loss=False)
    expected = [tokenizer(row["text"] + tokenizer.eos_token)["input_ids"] for row in plain]
    assert list(trainer.train_dataset["input_ids"]) == expected
    assert list(trainer.train_dataset["labels"]) == expected


def test_what_max_length_cuts_or_leaves_out_is_counted():
    model, tokenizer = load()
    short = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Lima."}]
    cut = [short[0], {"role": "assistant", "content": "Lima. " * 20}]
    gone = [{"role": "user", "content": "Peru? " * 20}, short[1]]
    rows = Dataset.from_list([{"messages": messages} for messages in (short, cut, gone, short)])
    said = "2 of 4 conversations .* max_length=32 tokens: .* 1 of them, .* are left out. Raise max"
    with pytest.warns(UserWarning, match=said):
        trainer = tune(model, tokenizer, rows, max_steps=1, max_length=32)
    kept = [encode(messages, tokenizer)["input_ids"] for messages in (short, cut, short)]
    assert [len(ids) > 32 for ids in kept] == [False, True, False]
    assert list(trainer.train_dataset["input_ids"]) == [ids[:32] for ids in kept]


@pytest.mark.parametrize("max_length", [80, None])
def test_there_is_no_warning_when_nothing_is_cut(max_length):
    model, tokenizer = load()
    longest = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Lima. " * 17}]
    assert len(encode(longest, tokenizer)["input_ids"]) == 80
    rows = Dataset.from_list([{"messages": longest}] * 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_length")
        trainer = tune(model, tokenizer, rows, max_steps=1, max_length=max_length)
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [80, 80]


def test_the_loss_is_that_of_the_next_token():
    """The first loss that is logged equals cross-entropy with the labels one step ahead."""
    model, tokenizer = load()
    encoded = encode(ROWS[0]["messages"], tokenizer)
    ids, mask = (torch.tensor([encoded[k]]) for k in ("input_ids", "assistant_masks"))
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits.float().cpu()
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = -picked[mask[:, 1:] == 1].mean().item()
    trainer = tune(model, tokenizer, dataset(ROWS[:1]), max_steps=1)
    assert losses(trainer)[0] == pytest.approx(
        expected, rel=2e-2 if model.device.type != "cpu" else 1e-3
    )


def test_the_loss_is_computed_at_the_learned_positions_alone(monkeypatch):
    """If this fails after an upgrade of TRL, see `_score_learned_positions_alone`."""
    import trl.trainer.utils as utils

    scored, head = [], utils._ChunkedLogProbFunction
    spy = SimpleNamespace(apply=lambda h, *rest: (scored.append(len(h)), head.apply(h, *rest))[1])
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", spy)
    model, tokenizer = load()
    tune(model, tokenizer, dataset(ROWS[:4]), max_steps=1)
    learned = sum(sum(encode(row["messages"], tokenizer)["assistant_masks"]) for row in ROWS[:4])
    assert scored == [learned]


class Products(TorchDispatchMode):
    """Counts the matrix products inside `with`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def heads(monkeypatch):
    """TRL's own function for the output head, and the one that `prepare` puts in its place."""
    import trl.trainer.utils as utils
    from trl.kernels import ChunkedLogProbFunction

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    training._score_in_one_piece()
    return ChunkedLogProbFunction, utils._ChunkedLogProbFunction


def scored(head, tokens=5, dtype=torch.float32, bias=True, marks=None, **changed):
    """Results and gradients of a head on made-up numbers, and how many products they took."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True) if bias else None
    for parameter in filter(lambda x: x is not None, (weight, bias)):
        vars(parameter).update(marks or {})
    targets = torch.randint(0, 11, (tokens,))
    rest = {"temperature": 1.0, "chunk_size": 64, "softcap": None, "scale": 1.0}
    rest |= {"outputs": ("log_probs", "entropy", "is_top1")} | changed
    with Products() as products:
        found = head.apply(hidden, weight, bias, targets, *rest.values())
        (found[0] * torch.arange(tokens)).sum().backward()
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return [*found, *(x.grad for x in leaves)], products.count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_logits_in_one_piece_give_what_trls_tiles_give(heads, tokens, bias):
    theirs, ours = (scored(head, tokens, bias=bias)[0] for head in heads)
    for expected, found in zip(theirs, ours, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_trl_still_computes_the_logits_twice(heads):
    """If this fails after an upgrade of TRL, see whether `_score_in_one_piece` is still needed."""
    assert [scored(head)[1] for head in heads] == [4, 3]


@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 4097},
        {"chunk_size": 10},
        {"dtype": torch.bfloat16},
        {"temperature": 0.5},
        {"softcap": 30.0},
        {"scale": 2.0},
        {"outputs": ("log_probs",)},
        {"outputs": ("log_probs", "entropy", "mean_logits", "is_top1")},
    ],
)
def test_what_is_not_meant_for_one_piece_goes_to_trl_as_it_is(heads, case):
    (theirs, products), (ours, found) = (scored(head, **case) for head in heads)
    assert found == products
    for a, b in zip(theirs, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_zero_3_keeps_trls_tiles(heads):
    """ZeRO-3 may take an untied head's weight away before the backward pass; TRL fetches it."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        whole = {"ds_status": ZeroParamStatus.AVAILABLE}
        products = [scored(head, marks=whole)[1] for head in heads]
    finally:
        unset_hf_deepspeed_config()
    assert config.is_zero3() and products == [4, 4]


def test_training_with_logits_in_one_piece_logs_what_trl_logs(heads, monkeypatch):
    import trl.trainer.utils as utils

    logs = []
    for head in (SimpleNamespace(apply=heads[0].apply), heads[1]):
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", head)
        model, tokenizer = load()
        trainer = tune(
            model, tokenizer, dataset(ROWS[:24]), use_cpu=True, per_device_train_batch_size=8
        )
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for theirs, ours in zip(*logs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        model, tokenizer = load()
        runs.append(losses(tune(model, tokenizer, dataset(ROWS), max_steps=3, seed=seed)))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_sft_turns_the_base_into_a_model_that_answers_and_stops(tuned):
    trainer, tokenizer = tuned
    table = report(
        trainer.model, tokenizer, {name: read_facts(name) for name in ("dev", "unknown")}
    )
    assert table.exact_match["dev"] >= 0.9
    assert table.stops.min() >= 0.98
    assert table.exact_match["unknown"] <= 0.02


@pytest.mark.slow
def test_nothing_is_written_unless_asked_for(tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load()
    trainer = tune(model, tokenizer, dataset(ROWS[:16]), max_steps=1)
    assert isinstance(trainer, SFTTrainer)
    assert not list(tmp_path.iterdir())
    tune(
        model,
        tokenizer,
        dataset(ROWS[:16]),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        output_dir=str(tmp_path / "kept"),
    )
    assert list((tmp_path / "kept").glob("checkpoint-1/*.safetensors"))
