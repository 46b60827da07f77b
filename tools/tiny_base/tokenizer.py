"""Train the tokenizer of the tiny base model: byte-level BPE with the control tokens reserved."""

from sftlib.chat import CHATML

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """BPE over bytes, so that any text can be encoded; digits stay apart, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["system\n", "user\n", "assistant\n"] * 100  # each role becomes one token
    tokenizer.train_from_iterator(
        documents + roles,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(CONTROL_TOKENS),
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(CONTROL_TOKENS[2:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped
