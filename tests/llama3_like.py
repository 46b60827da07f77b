"""A small model built as Llama 3.2 is, with a tokenizer that cuts and marks text as Llama 3's does.

Random weights; grouped-query attention, scaled rotary positions and tied embeddings as in
`meta-llama/Llama-3.2-1B/config.json`; the words are learned from the course's own facts.
"""

from pathlib import Path

from sftlib.data import read_facts
from sftlib.deploy.export import _LLAMA3

import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
]
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "llama3.jinja"
"""Meta's, as TRL keeps it to recognise the model."""


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [m["content"] for row in read_facts("sft") for m in row["messages"]]
    made.train_from_iterator([*texts, "system", "user\n\n", "assistant\n\n", "1234 56"], trainer)
    bos = CONTROL_TOKENS[0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        additional_special_tokens=CONTROL_TOKENS[2:],
        chat_template=TEMPLATE.read_text(),
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, seed: int = 0) -> Path:
    """Write the model's folder; returns it."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,  # or it would only repeat what it reads
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
