"""PPO for language models, to be read from top to bottom: TRL removed its own in version 1.13.

One step: *roll out* (the model answers prompts, a reward function scores the answers), spread each
score over the tokens that earned it, then move the model a little, and never far, towards tokens
that did better than expected.

Sources: Schulman et al. 2017, arXiv 1707.06347 (PPO); Schulman et al. 2016, arXiv 1506.02438 (GAE);
Ziegler et al. 2019, arXiv 1909.08593, and Ouyang et al. 2022, arXiv 2203.02155 (language models);
Huang et al. 2024, arXiv 2403.17031 (details of implementation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftlib import progress_bar

import torch
from torch.nn.functional import log_softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[..., Sequence[float]]
"""As TRL's reward functions: `reward(prompts=…, completions=…, **columns)` gives a score each."""


@dataclass(frozen=True)
class PPOConfig:
    """Settings, named as in TRL's former `PPOConfig`.

    Args:
        steps: rollouts; each is used for `num_ppo_epochs` passes in mini-batches.
        batch_size: prompts in a rollout, one answer each.
        kl_coef: β, the price of a nat of distance from the reference.
        cliprange: ε, how far a token's probability may move, as a ratio, before its gain is cut.
        cliprange_value: the same for values, as a difference.
        vf_coef: weight of the value loss.
        gamma: discount per token; answers are short, so 1.
        lam: λ of GAE: 0 trusts the value head, 1 the rewards that came.
        missing_eos_penalty: taken from the score of an answer that did not end by itself.
    """

    steps: int = 20
    batch_size: int = 64
    mini_batch_size: int = 64
    num_ppo_epochs: int = 2
    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    kl_coef: float = 0.05
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    max_new_tokens: int = 32
    max_grad_norm: float = 1.0
    missing_eos_penalty: float = 1.0
    seed: int = 0


class PolicyWithValue(torch.nn.Module):
    """A language model with a second head, which guesses at each token what reward is to come."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.value_head = torch.nn.Linear(model.config.hidden_size, 1, device=model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(
        self, ids: torch.Tensor, attention: torch.Tensor, answer: int, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the last `answer` tokens, values before each, and the entropy.

        `ids` and `attention` are (batch, prompt + answer), prompts padded on the left; what comes
        back is (batch, answer).
        """
        hidden = self.model.base_model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        ).last_hidden_state[:, -answer - 1 : -1]  # a token is predicted at the place before it
        scores = log_softmax(self.model.get_output_embeddings()(hidden).float() / temperature, -1)
        chosen = scores.gather(-1, ids[:, -answer:, None])[..., 0]
        values = self.value_head(hidden.to(self.value_head.weight.dtype))[..., 0]
        with torch.no_grad():  # to be looked at, not trained
            entropy = -(scores.exp() * scores).sum(-1)
        return chosen, values, entropy


def token_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """Each token pays for its distance from the reference; the last one earns the score.

    r_t = −β (log π(a_t) − log π_ref(a_t)), plus the score at the answer's last token: Ziegler et
    al. 2019, equation 2, token by token. All (batch, answer), but `scores` (batch,).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(-1).long() - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: (advantages, returns), each (batch, answer).

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}: Schulman et al. 2016, equations 10, 16.
    Where the mask is 0 rewards are 0 (`token_rewards`), and so are the values here. Returns,
    A_t + V_t, are what the value head should say.
    """
    values, advantages = values * mask, torch.zeros_like(rewards)
    following = ahead = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * ahead - values[:, t]
        following = surprise + gamma * lam * following
        advantages[:, t], ahead = following, values[:, t]
    return advantages, advantages + values


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the places where the mask is 1."""
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the mask: the step's size no longer depends on the reward's."""
    centred = x - masked_mean(x, mask)
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped objective, to be made small, and the share of tokens that the clip holds back.

    −min(ρA, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π / π_old: Schulman et al. 2017, equation 7.
    """
    ratio = (logprobs - old_logprobs).exp()
    free = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -masked_mean(torch.min(free, clipped), mask), masked_mean((clipped < free) * 1.0, mask)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
) -> torch.Tensor:
    """Half the squared error, with the move from the old value clipped: Huang et al. 2024, 3.6."""
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (near - returns) ** 2), mask)


@torch.no_grad()
def rollout(
    policy: PolicyWithValue,
    reference: PolicyWithValue,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    reward: Reward,
    config: PPOConfig,
) -> dict[str, torch.Tensor]:
    """Sample an answer to each row's `prompt` (messages), score it, and keep what PPO needs.

    The tensors are (batch, answer), but `ids` and `attention` (batch, prompt + answer) and `scores`
    (batch,). The other columns of the rows go to the reward function.
    """
    from sftlib.chat import encode_batch, end_of_turn_id

    end = end_of_turn_id(tokenizer)
    prompts = encode_batch([r["prompt"] for r in rows], tokenizer, add_generation_prompt=True)
    batch = tokenizer.pad(
        {"input_ids": prompts["input_ids"]}, return_tensors="pt", padding_side="left"
    ).to(policy.model.device)
    generate: Any = policy.model.generate  # PreTrainedModel does not declare it
    ids = generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=config.max_new_tokens,
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = ids[:, batch["input_ids"].shape[1] :]
    ends = (answers == end).long()
    mask = (ends.cumsum(-1) - ends == 0).long()  # up to the first end, and with it
    attention = torch.cat([batch["attention_mask"], mask], 1)
    texts = tokenizer.batch_decode(
        [a[m.bool()].tolist() for a, m in zip(answers, mask, strict=True)], skip_special_tokens=True
    )
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        **columns,
    )
    if len(scores) != len(rows):
        raise ValueError(f"Expected {len(rows)} scores from the reward, found {len(scores)}.")
    scores = torch.tensor(scores, dtype=torch.float32, device=ids.device)
    width = answers.shape[1]
    logprobs, values, _ = policy(ids, attention, width, config.temperature)
    return {
        "ids": ids,
        "attention": attention,
        "mask": mask,
        "logprobs": logprobs,
        "ref_logprobs": reference(ids, attention, width, config.temperature)[0],
        "values": values,
        "scores": scores - config.missing_eos_penalty * (ends.sum(-1) == 0),
    }


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    reward: Reward,
    config: PPOConfig = PPOConfig(),
) -> list[dict[str, float]]:
    """Train `model` in place to earn more reward, near to what it was; return one line per step.

    Args:
        model: a causal language model that already follows the template (after SFT), loaded from
            where it was saved: in a deep copy of a model that TRL has trained, `generate` still
            asks the original. No PEFT adapter.
        rows: each with a `prompt` (messages that end with the user's), and the columns that the
            reward function asks for.
        reward: see `Reward`; the same function works with TRL's `RLOOTrainer` and `GRPOTrainer`.

    Returns:
        A dictionary per step: `reward` (mean score, after the penalty), `kl` (nats per answer, from
        the model as it was), `entropy` (nats per token), `clipped` (share of tokens held back),
        `value_loss`, `length` (tokens).

    Raises:
        ValueError: there are no rows, or the reward function does not score each answer.
    """
    if not rows:
        raise ValueError("Expected at least one row with a prompt, found none.")
    torch.manual_seed(config.seed)
    model.eval()  # no dropout: the ratio compares the same network before and after
    policy = PolicyWithValue(model)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "lr": config.learning_rate},
            {"params": policy.value_head.parameters(), "lr": config.value_learning_rate},
        ],
        weight_decay=0.0,
    )
    history = []
    batches = _batches(len(rows), config.batch_size, config.steps)
    for chosen in progress_bar(batches, total=config.steps, unit="step"):
        batch = rollout(policy, reference, tokenizer, [rows[i] for i in chosen], reward, config)
        history.append(_summary(batch) | _update(policy, optimizer, batch, config))
    return history


def _batches(rows: int, size: int, count: int) -> Iterator[list[int]]:
    order: list[int] = []
    for _ in range(count):
        while len(order) < size:
            order += torch.randperm(rows).tolist()
        yield order[:size]
        order = order[size:]


def _summary(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    distance = (batch["logprobs"] - batch["ref_logprobs"]) * batch["mask"]
    return {
        "reward": batch["scores"].mean().item(),
        "kl": distance.sum(-1).mean().item(),
        "length": batch["mask"].sum(-1).float().mean().item(),
    }


def _update(
    policy: PolicyWithValue,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    config: PPOConfig,
) -> dict[str, float]:
    mask = batch["mask"]
    rewards = token_rewards(
        batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, config.kl_coef
    )
    batch["advantages"], batch["returns"] = gae(
        rewards, batch["values"], mask, config.gamma, config.lam
    )
    batch["advantages"] = whiten(batch["advantages"], mask)
    measured = []
    for _ in range(config.num_ppo_epochs):
        for rows in torch.randperm(len(mask), device=mask.device).split(config.mini_batch_size):
            part = {name: x[rows] for name, x in batch.items()}
            logprobs, values, entropy = policy(
                part["ids"], part["attention"], mask.shape[1], config.temperature
            )
            loss, clipped = policy_loss(
                logprobs, part["logprobs"], part["advantages"], part["mask"], config.cliprange
            )
            error = value_loss(
                values, part["values"], part["returns"], part["mask"], config.cliprange_value
            )
            (loss + config.vf_coef * error).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            entropy = masked_mean(entropy, part["mask"])
            measured.append((clipped.item(), error.item(), entropy.item()))
    means = [sum(column) / len(column) for column in zip(*measured, strict=True)]
    return dict(zip(("clipped", "value_loss", "entropy"), means, strict=True))
