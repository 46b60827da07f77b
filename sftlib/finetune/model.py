"""The model with its tokenizer and chat template, and what follows from its size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sftlib.chat import CHATML, LLAMA3, end_of_turn_id, training_template
from sftlib.chat.control_tokens import ControlTokens, template_of
from sftlib.chat.templates import render_marked
from sftlib.finetune.arguments import DEFAULT_MAX_LENGTH, FinetuneArguments
from sftlib.models import load, own_template, prepare_for_chat, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig


def load_model(
    args: FinetuneArguments, training: SFTConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its weights as the method needs them, and its tokenizer with the template.

    Raises:
        ValueError: QLoRA without a GPU, or a template that does not fit (see `set_template`).
        OSError: there is no such model.
    """
    import torch

    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    if args.method == "qlora":
        options["quantization_config"] = four_bit_config()
    # Training all parameters in bfloat16 would lose small updates. DeepSpeed keeps a float32 copy.
    needs_float32 = args.method == "full" and not training.deepspeed
    dtype = torch.float32 if needs_float32 else None  # None: bfloat16 on a GPU
    model, tokenizer = load(args.model, dtype=dtype, **options)
    set_template(model, tokenizer, args)
    if training.process_index == 0:
        print(f"Chat template: {template_choice(tokenizer, args)}")
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)
    return model, tokenizer


def four_bit_config() -> Any:
    """QLoRA's base: NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ValueError(
            "Expected a GPU for --method qlora, found none: weights in 4 bits are slow on a CPU. "
            "Use --method lora."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def set_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: FinetuneArguments
) -> None:
    """Give the tokenizer the chat template that `--template` asks for.

    Raises:
        ValueError: the tokenizer lacks Llama 3's tokens, or the model's own template does not mark
            the assistant's tokens.
    """
    # `load` has already set a template: the model's own, or one of ours where it had none.
    choice, known = args.template, tokenizer.get_vocab()
    if choice == "own":
        tokenizer.chat_template = own_template(args.model)
        training_template(tokenizer)  # raises where the answers are not marked
    if choice == "auto" and "<|eot_id|>" in known:
        choice = "llama3"
    if choice == "llama3":
        if "<|eot_id|>" not in known:
            raise ValueError(
                "Expected a tokenizer with <|eot_id|> for --template llama3, found none. "
                "Use --template auto."
            )
        tokenizer.chat_template = LLAMA3
    if choice == "chatml":
        tokenizer.chat_template = CHATML
        prepare_for_chat(model, tokenizer)  # adds ChatML's tokens where they are missing


def template_choice(tokenizer: PreTrainedTokenizerBase, args: FinetuneArguments) -> str:
    """The chat template in use, why it is, and what became of the model's own: for log and card."""
    template, original = template_of(tokenizer), template_of(read_tokenizer(args.model))
    name = {CHATML: "chatml", LLAMA3: "llama3"}.get(template, "own")
    reason = {
        "llama3": "the tokenizer has <|eot_id|>",
        "chatml": "the model's own does not mark the answers" if original else "the model has none",
        "own": "the model's own marks the answers, or TRL has a version that does",
    }[name]
    if args.template != "auto":
        name, reason = args.template, "as --template says"
    elif name != "own":
        reason = f"auto: {reason}"
    if not original or original == template:
        return f"{name} ({reason})."
    return f"{name} ({reason}). {_replaced(original, template, tokenizer)}"


def _replaced(original: str, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    special = tokenizer.special_tokens_map
    try:
        (theirs,), (ours,) = (
            render_marked([[*turns, turns[0]]], one, True, **special)[0]
            for one in (original, template)
        )
    except TemplateError:
        theirs, ours = original, template
    if theirs == ours:
        return "It writes what the model's own does."
    return "It replaces the model's own, which writes other prompts; --template own keeps that one."


TWICE = re.compile(r"<think>\s*(</think>\s*)?<think>")
LOOKED_AT = 100  # conversations, of each kind


def check_thoughts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> None:
    """Raise where a template writes `<think>` itself, and the answers do not go with that.

    Templates of reasoning models open the thoughts in the prompt, or put empty ones before an
    answer. An answer with thoughts of its own then has two; one without was never asked for so.

    Args:
        rows: dicts with `messages`; those whose answers have thoughts, and others.

    Raises:
        ValueError: the model would read `<think>` twice, or is asked otherwise than it is trained.
    """
    template = template_of(tokenizer)
    if "<think>" not in template:
        return
    thoughtful = [row for row in rows if any("<think>" in m["content"] for m in row["messages"])]
    for row in thoughtful[:LOOKED_AT] + rows[:LOOKED_AT]:
        _check_thoughts(tokenizer, row["messages"])


def _check_thoughts(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> None:
    controls, special = ControlTokens.of(tokenizer), tokenizer.special_tokens_map
    # As `encode` renders it: control tokens in a message are text.
    safe = [m | {"content": controls.escape(m["content"])} for m in messages]
    text = render_marked([safe], training_template(tokenizer), False, **special)[0][0]
    prompt = render_marked([safe[:-1]], template_of(tokenizer), True, **special)[0][0]
    advice = (
        "Use --template chatml, which leaves the thoughts to the answers, or change the answers."
    )
    plain = "".join(piece for _, piece in controls.cut(text))
    if TWICE.search(plain) and not any(TWICE.search(m["content"]) for m in messages):
        raise ValueError(
            "Expected thoughts from the answers or from the chat template, found both: the "
            "template writes <think> before an answer that begins with it, "
            f"{messages[-1]['content'][:60]!r}. {advice}"
        )
    if not text.startswith(prompt):
        raise ValueError(
            "Expected answers that go on where the chat template's prompt ends, found a prompt "
            f"that ends in {prompt[-20:]!r} and the answer {messages[-1]['content'][:60]!r}, "
            f"trained without that: the model would be asked as it never was. {advice}"
        )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Stop tokens: EOS, the end-of-turn token, and those that the model already had."""
    before = model.generation_config.eos_token_id
    before = before if isinstance(before, list) else [before]
    found = dict.fromkeys([tokenizer.eos_token_id, end_of_turn_id(tokenizer), *before])
    return [token for token in found if token is not None]


def allowed_max_length(model: PreTrainedModel, training: SFTConfig) -> int:
    """Tokens of a conversation: `--max_length`, else the context, at most DEFAULT_MAX_LENGTH.

    Raises:
        ValueError: `--max_length` is above the model's context.
    """
    context = model.config.max_position_embeddings
    if (training.max_length or 0) > context:
        raise ValueError(
            f"Expected --max_length of at most {context}, the context of the model, found "
            f"{training.max_length}: the model has never read a token further away."
        )
    return training.max_length or min(context, DEFAULT_MAX_LENGTH)


def default_learning_rate(method: str, parameters: int) -> float:
    """A usual learning rate: smaller for larger models, ten times larger for adapters (lesson 4).

    Sources: Stanford Alpaca trained all of 7B with 2e-5; QLoRA's adapters on 7B and 13B used 2e-4
    (Dettmers et al. 2023, arXiv 2305.14314, table 9).
    """
    full = 5e-4 if parameters < 10e6 else 1e-4 if parameters < 1e9 else 2e-5
    return full if method == "full" else 10 * full


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, including those that ZeRO-3 has divided or that 4 bits pack."""
    divided = [getattr(p, "ds_numel", 0) for p in model.parameters()]
    return sum(divided) or model.num_parameters()
