"""A random model of two layers: enough for plumbing, which learns nothing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def random_model(
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    rows: int = 0,
    tied: bool = True,
    width: int = 32,
) -> LlamaForCausalLM:
    """Of the tiny base's kind, for its tokenizer, a twentieth of its size.

    Args:
        rows: of the embeddings; 0: one for each token.
        tied: whether the output head is the table of embeddings.
        width: hidden size. Weights in four bits need a multiple of 64, their block, on a CPU with
            bfloat16 instructions: bitsandbytes 0.50 packs them by block there.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()
