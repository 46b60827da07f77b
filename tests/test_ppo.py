"""Each formula of PPO against numbers worked out by hand, and that the whole earns more reward."""

import copy
import math

from sftlib import ppo
from sftlib.chat import encode_batch, end_of_turn_id
from sftlib.data import read_facts
from sftlib.models import load
from sftlib.training import tune

import pytest
import torch
from datasets import Dataset
from torch import tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from tests.random_model import random_model

ROWS = [
    {"prompt": row["messages"][:1], "value": row["value"]} for row in read_facts("sft")[480:544]
]


@pytest.fixture(scope="module")
def tuned():
    """The tiny base, which TRL has trained a little: some of its answers end by themselves."""
    torch.manual_seed(0)
    model, tokenizer = load()
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:200]]
    tune(model, tokenizer, Dataset.from_list(rows), per_device_train_batch_size=8)
    return model, tokenizer


def fresh(tuned):
    """The tuned model again: a deep copy's `generate` would still ask the one that TRL patched."""
    model, _ = load()
    model.load_state_dict(tuned[0].state_dict())
    return model


def of_capitals(completions, **_):
    """A reward that is easy to earn: whatever is asked, speak of a capital."""
    return [1.0 * ("The capital" in completion[0]["content"]) for completion in completions]


def small(**changes):
    settings = {"steps": 1, "batch_size": 8, "mini_batch_size": 8, "max_new_tokens": 12}
    return ppo.PPOConfig(**(settings | changes))


def test_what_is_not_set_is_as_it_was_in_trl():
    """Of TRL 0.24, https://huggingface.co/docs/trl/v0.24.0/ppo_trainer#trl.PPOConfig."""
    default = ppo.PPOConfig()
    clips = (default.cliprange, default.cliprange_value)
    assert (default.kl_coef, default.vf_coef, *clips) == (0.05, 0.1, 0.2, 0.2)
    assert (default.gamma, default.lam) == (1.0, 0.95)


# --- The formulas --------------------------------------------------------------------------------


def test_each_token_pays_for_its_distance_and_the_last_one_earns_the_score():
    logprobs = tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    ref = tensor([[-1.5, -1.0, -3.5], [-2.0, -1.0, -0.5]])
    mask = tensor([[1, 1, 0], [1, 1, 1]])  # the first answer has two tokens
    found = ppo.token_rewards(tensor([2.0, -1.0]), logprobs, ref, mask, kl_coef=0.1)
    # −0.1 · 0.5, −0.1 · −1 + 2, nothing; −0.1 · 1, 0, −0.1 · −0.5 − 1
    assert_close(found, tensor([[-0.05, 2.1, 0.0], [-0.1, 0.0, -0.95]]))


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        # as in the last line, with γλ = 0.855: 0.03 + 0.855 · 0.3, 0.04 + 0.855 · 0.2865
        (0.9, 0.95, [0.2849575, 0.2865, 0.3]),
        # surprises from the end: 1 − 0.7 = 0.3, 0.7 − 0.6 = 0.1, 0.6 − 0.5 = 0.1
        (1.0, 0.5, [0.1 + 0.5 * (0.1 + 0.5 * 0.3), 0.1 + 0.5 * 0.3, 0.3]),
        (1.0, 1.0, [1 - 0.5, 1 - 0.6, 1 - 0.7]),  # λ = 1: the reward to come, less the value
        (0.9, 0.0, [0.9 * 0.6 - 0.5, 0.9 * 0.7 - 0.6, 0.3]),  # λ = 0: one step ahead
    ],
)
def test_advantages_by_hand(gamma, lam, expected):
    rewards, values = tensor([[0.0, 0.0, 1.0, 0.0]]), tensor([[0.5, 0.6, 0.7, 9.0]])
    mask = tensor([[1, 1, 1, 0]])  # what stands after the end counts for nothing
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    assert_close(advantages, tensor([[*expected, 0.0]]))
    assert_close(returns, advantages + tensor([[0.5, 0.6, 0.7, 0.0]]))


def test_whitening_looks_at_the_mask_alone():
    found = ppo.whiten(tensor([[1.0, 3.0, 99.0]]), tensor([[1, 1, 0]]))
    assert_close(found[0, :2], tensor([-1.0, 1.0]))


def test_the_clip_holds_back_only_what_has_gone_far_enough():
    ratios = tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 7.0]])
    advantages = tensor([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = tensor([[1, 1, 1, 1, 1, 0]])
    logprobs = ratios.log().requires_grad_()
    loss, held = ppo.policy_loss(logprobs, torch.zeros(1, 6), advantages, mask, cliprange=0.2)
    # 1.2 (held back), 0.5, −1.5, −0.8 (held back), 1.1
    assert_close(loss.detach(), tensor(-(1.2 + 0.5 - 1.5 - 0.8 + 1.1) / 5))
    assert_close(held, tensor(2 / 5))
    loss.backward()
    assert (logprobs.grad[0] != 0).tolist() == [False, True, True, False, True, False]
    assert logprobs.grad[0, 1] < 0 < logprobs.grad[0, 2]  # towards gain, away from loss


def test_the_value_may_not_run_from_the_old_one():
    values, old = tensor([[1.0, 0.6, 5.0]]), tensor([[0.5, 0.5, 0.5]])
    returns, mask = tensor([[2.0, 0.0, 0.0]]), tensor([[1, 1, 0]])
    # clipped to 0.7: max(1², 1.3²); not clipped: 0.6²
    expected = 0.5 * (1.3**2 + 0.6**2) / 2
    assert_close(ppo.value_loss(values, old, returns, mask, 0.2), tensor(expected))


# --- The model and the rollout -------------------------------------------------------------------


def test_log_probabilities_are_the_model_s_own_whatever_the_padding(tokenizer):
    model = random_model(tokenizer)
    policy = ppo.PolicyWithValue(model)
    (ids,) = encode_batch([read_facts("heldout")[0]["messages"]], tokenizer)["input_ids"]
    answer, temperature = 6, 0.7
    with torch.no_grad():
        logits = model(input_ids=tensor([ids])).logits[0]
        expected = [
            (logits[at - 1] / temperature).log_softmax(-1)[ids[at]].item()
            for at in range(len(ids) - answer, len(ids))
        ]
        for padding in (0, 5):
            padded = tensor([[tokenizer.pad_token_id] * padding + ids])
            attention = tensor([[0] * padding + [1] * len(ids)])
            logprobs, values, _ = policy(padded, attention, answer, temperature)
            assert_close(logprobs[0], tensor(expected), atol=1e-4, rtol=0)
            assert values.shape == (1, answer) and not values.any()  # the new head says 0


def test_absolute_positions_are_counted_from_the_first_real_token():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    policy = ppo.PolicyWithValue(GPT2LMHeadModel(config).eval())
    plain, padded = tensor([[5, 6, 7, 8]]), tensor([[0, 0, 0, 5, 6, 7, 8]])
    one, _, _ = policy(plain, torch.ones_like(plain), 2)
    other, _, _ = policy(padded, (padded > 0) * 1, 2)
    assert_close(one, other)


def test_the_entropy_of_chance_is_the_logarithm_of_the_vocabulary(tokenizer):
    model = random_model(tokenizer)
    model.get_output_embeddings().weight.data.zero_()
    ids = tensor([[5, 6, 7, 8]])
    _, _, entropy = ppo.PolicyWithValue(model)(ids, torch.ones_like(ids), 2)
    assert_close(entropy, torch.full((1, 2), math.log(model.config.vocab_size)))


@pytest.mark.integration
def test_a_rollout_ends_each_answer_where_the_model_ended_it(tuned):
    model, tokenizer = tuned
    policy, seen = ppo.PolicyWithValue(model), {}

    def reward(**arguments):
        seen.update(arguments)
        return [1.0] * len(arguments["completions"])

    torch.manual_seed(0)
    config = small(max_new_tokens=12)  # too short for some
    batch = ppo.rollout(policy, policy, tokenizer, ROWS, reward, config)
    end, ended = end_of_turn_id(tokenizer), []
    for ids, mask, score in zip(batch["ids"], batch["mask"], batch["scores"], strict=True):
        answer = ids[-len(mask) :][mask.bool()].tolist()
        ended.append(answer[-1] == end)
        assert end not in answer[:-1] and (ended[-1] or len(answer) == 12)
        assert score == (1.0 if ended[-1] else 1.0 - config.missing_eos_penalty)
    assert 0 < sum(ended) < len(ROWS)
    assert_close(batch["logprobs"], batch["ref_logprobs"])
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["value"] == [row["value"] for row in ROWS]
    (message,) = seen["completions"][0]
    assert message["role"] == "assistant" and "<|im_end|>" not in message["content"]


def test_a_control_token_in_a_prompt_stays_text(tokenizer):
    policy = ppo.PolicyWithValue(random_model(tokenizer))
    rows = [{"prompt": [{"role": "user", "content": "What is <|im_end|>?"}]}]
    batch = ppo.rollout(policy, policy, tokenizer, rows, of_capitals, small(batch_size=1))
    width = len(batch["mask"][0])
    prompt = batch["ids"][0, :-width].tolist()
    assert prompt.count(end_of_turn_id(tokenizer)) == 1  # the template's own


def test_a_reward_function_must_score_each_answer(tokenizer):
    policy = ppo.PolicyWithValue(random_model(tokenizer))
    with pytest.raises(ValueError, match="Expected 4 scores .* found 1"):
        ppo.rollout(policy, policy, tokenizer, ROWS[:4], lambda **_: [1.0], small())


def test_no_rows_are_an_error_not_an_endless_loop(tokenizer):
    with pytest.raises(ValueError, match="at least one row"):
        ppo.train(random_model(tokenizer), tokenizer, [], of_capitals, small())


# --- Training ------------------------------------------------------------------------------------


def of_letters(completions, **_):
    """A reward that random answers earn a part of: the share of their letters up to m."""
    texts = ["".join(filter(str.isalpha, one[0]["content"])).lower() for one in completions]
    return [sum(letter <= "m" for letter in text) / max(1, len(text)) for text in texts]


def trained(tokenizer, reward=of_letters, **changes):
    """What the training of a random model says, step by step."""
    return ppo.train(random_model(tokenizer), tokenizer, ROWS, reward, small(**changes))


@pytest.mark.integration
def test_training_earns_more_reward(tuned):
    shape = {"steps": 8, "batch_size": 32, "mini_batch_size": 16, "max_new_tokens": 24}
    settings = small(learning_rate=3e-4, **shape)  # the longest answer about a capital: 22 tokens
    history = ppo.train(fresh(tuned), tuned[1], ROWS, of_capitals, settings)
    keys = {"reward", "kl", "length", "clipped", "value_loss", "entropy"}
    assert len(history) == 8 and all(set(line) == keys for line in history)
    assert abs(history[0]["kl"]) < 1e-3  # nothing has moved yet
    first, last = (sum(line["reward"] for line in part) / 2 for part in (history[:2], history[-2:]))
    assert first < 0.4 and last > first + 0.3


@pytest.mark.integration
def test_a_price_keeps_the_model_near_the_reference(tokenizer):
    settings = {"steps": 6, "batch_size": 16, "max_new_tokens": 6, "learning_rate": 2e-2}
    free, bound = (trained(tokenizer, kl_coef=kl, **settings)[-2:] for kl in (0.0, 2.0))
    assert sum(line["kl"] for line in free) > 0.5
    assert sum(line["kl"] for line in bound) < 0.5 * sum(line["kl"] for line in free)


def test_only_the_differences_of_rewards_count(tokenizer):
    settings = {"steps": 2, "kl_coef": 0.0, "vf_coef": 0.0, "lam": 1.0, "learning_rate": 1e-2}
    one, other = (
        trained(tokenizer, reward, **settings)
        for reward in (of_letters, lambda **given: [5 + x for x in of_letters(**given)])
    )
    assert other[1]["entropy"] == pytest.approx(one[1]["entropy"], abs=1e-3)
    assert other[1]["reward"] == pytest.approx(one[1]["reward"] + 5)


def test_the_seed_decides(tokenizer):
    one, other, third = (trained(tokenizer, steps=2, seed=seed) for seed in (0, 0, 1))
    assert one == other != third


def test_people_see_how_far_it_is(tokenizer, somebody_comes, capsys):
    somebody_comes()
    trained(tokenizer, steps=1)
    assert "0/1" in capsys.readouterr().out


def test_a_value_stands_before_its_token():
    model, _ = load()
    policy = ppo.PolicyWithValue(model)
    torch.nn.init.ones_(policy.value_head.weight)
    ids = tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        _, values, _ = policy(ids, torch.ones_like(ids), 2)
    assert_close(values[0], hidden[2:4].sum(-1))


def test_a_deep_copy_of_what_trl_trained_samples_from_the_original(tuned):
    """Lesson 7 warns of it: when this fails, TRL has changed, and the warning goes."""
    model, tokenizer = tuned
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter)
    ids = tensor(
        [encode_batch([ROWS[0]["prompt"]], tokenizer, add_generation_prompt=True)["input_ids"][0]]
    )
    written = [m.generate(ids, max_new_tokens=4, do_sample=False).tolist() for m in (copied, model)]
    assert written[0] == written[1]
