"""Train the tokenizer of the tiny base model: byte-level BPE with the control tokens reserved."""

import json
import re
from collections import Counter

from sftlib.chat import CHATML

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.tiny_base.corpus import template_words
from tools.tiny_base.echoes import TOPICS, relation_nouns
from tools.tiny_base.splits import words

VOCAB_SIZE = 2048
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
# As in Qwen's tokenizers, they are tokens, but no special ones: decoding does not leave them out.
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
# While merges are learned, spaces and line breaks stand apart from words: so a name has the same
# tokens after a space, a quotation mark or a line break. Copying needs this.
APART = r" ?[^\s\p{L}\p{N}]+|\p{L}+|\p{N}|\s"
SPACE = "Ġ"  # as byte-level BPE writes it
WITH_SPACE = 140  # common words that take the space before them along
WHOLE = (
    "system user assistant tool lookup arguments entity relation name internet domain atomic "
    "official calling"
)


def _common_words(documents: list[str]) -> list[str]:
    """The words of the templates, but for those that stand in quotation marks too; by frequency."""
    quoted = {word for text in (*TOPICS, *relation_nouns(), WHOLE) for word in words(text)}
    common = template_words() - quoted
    counts = Counter(re.findall(r"(?<= )[A-Za-z]+", "\n".join(documents)))
    return [word for word, _ in counts.most_common() if word.lower() in common]


def _trained(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE whose merges hold no space in front of a letter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(APART), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*CONTROL_TOKENS, *TAGS],
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(documents: list[str], tested: list[str]) -> PreTrainedTokenizerFast:
    """BPE over bytes, so that any text can be encoded; digits stay apart, as in Llama 2.

    The last merges join a space and a common word, but no word with which a name of `tested`
    begins. Texts are cut into words by the rule of SmolLM's tokenizer, which other programs, such
    as llama.cpp, know.
    """
    trained = _trained(documents + WHOLE.split() * 1000, VOCAB_SIZE - WITH_SPACE)
    begins = {trained.encode(name).tokens[0] for name in tested}
    bpe = json.loads(trained.to_str())["model"]
    vocab, merges = bpe["vocab"], [tuple(merge) for merge in bpe["merges"]]
    joined = [w for w in _common_words(documents) if w in vocab and w not in begins]
    for word in joined[:WITH_SPACE]:
        merges.append((SPACE, word))
        vocab[SPACE + word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
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
