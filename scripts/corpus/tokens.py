"""The tokenizer of the embedded models, their chat template, and the packing of documents into training windows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from finetune.arguments import width_of

VOCAB_SIZE = 2048  # half of what is allowed: on a CPU the output layer is the largest cost of a model this small
CONTEXT = 1024
PAD, END_OF_TEXT, START, END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
IGNORE = -100  # label of a token that carries no loss
WIDTHS = 16  # tokens; a padded batch is as wide as a multiple of it: bfloat16 kernels are compiled for each shape

# The generation tags enclose all that the assistant emits, its end token included, and not the newline after it.
# An answer begins with a space, as in Llama 2's template: words after a space and words at the start of a line are
# different tokens, and a small model that has learned the first does not know the second (measured: it named 43% of the
# headings of unseen clauses before it was tuned to answer at the start of a line, and 11% after).
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role must be system, user or assistant, not ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}
        {%- endif %}
        {{- (' ' + message.content if message.content else '') + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text: single digits, no normalisation, no BOS.

    The think tags are added tokens but not special ones, so that they survive `skip_special_tokens=True` and a format
    reward can see them.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        special_tokens=[PAD, END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (THINK, END_THINK)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, END_OF_TEXT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def render(tokenizer: PreTrainedTokenizerFast, document: str | list[dict[str, Any]]) -> str:
    """A document as text: plain text ends with the end-of-text token, a chat is rendered by the template."""
    if isinstance(document, str):
        return document + END_OF_TEXT
    text: str = tokenizer.apply_chat_template(document, tokenize=False)
    return text


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Any]) -> list[list[int]]:
    """Token ids of each document."""
    encoded: list[list[int]] = tokenizer([render(tokenizer, document) for document in documents])["input_ids"]
    return encoded


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]
) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each chat row; only tokens inside the generation tags keep their label."""
    pairs = []
    for row in rows:
        made = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = made["input_ids"], made["assistant_masks"]
        pairs.append((ids, [token if trained else IGNORE for token, trained in zip(ids, mask, strict=True)]))
    return pairs


def pack(documents: Sequence[list[int]], window: int) -> torch.Tensor:
    """Concatenate documents and cut them into windows of shape (n, window); the last part of a window is dropped."""
    flat = torch.tensor([token for document in documents for token in document], dtype=torch.int16)
    return flat[: len(flat) // window * window].view(-1, window)


def pad_batch(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels), both of shape (batch, longest, rounded up to WIDTHS)."""
    longest = width_of(max(len(ids) for ids, _ in pairs), WIDTHS)
    ids = [ids + [pad_id] * (longest - len(ids)) for ids, _ in pairs]
    labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in pairs]
    return torch.tensor(ids), torch.tensor(labels)


def batches_by_length(
    pairs: Sequence[tuple[list[int], list[int]]], tokens: int, rng: random.Random
) -> list[list[tuple[list[int], list[int]]]]:
    """Batches of rows of like length holding about `tokens` tokens with padding, in random order."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + rng.random() * 16)
    batches: list[list[tuple[list[int], list[int]]]] = [[]]
    for pair in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * width_of(len(pair[0]), WIDTHS) > tokens:
            batches.append([])
        batches[-1].append(pair)
    rng.shuffle(batches)
    return batches
