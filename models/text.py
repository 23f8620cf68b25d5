"""Text embeddings as Wan takes them: umT5 states of fixed length, zero past the end of the prompt.

Stock code (Wan 2.1, Self-Forcing) repairs and unescapes a prompt, collapses its whitespace, cuts or pads it
to 512 tokens, masks the padding inside the encoder, sets the rows past the prompt to zero, and lets
cross-attention read those rows too.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

from vidkv.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

LONGEST = 1_000_000
"""A tokenizer that names a longer text knows no limit: transformers' mark for that is 10**30."""


@dataclass(frozen=True)
class PromptTokens:
    """Prompts as token ids.

    Attributes:
        ids, mask: (prompts, tokens) int64; the mask is 1 up to each prompt's end and 0 after it.
        truncated: whether each prompt was longer and has lost its end.
    """

    ids: Tensor
    mask: Tensor
    truncated: tuple[bool, ...]


def clean_prompt(text: str) -> str:
    """A prompt as stock tokenizers see it.

    Mis-decoded and full-width characters and curly quotes are made plain by ftfy, then HTML entities are
    unescaped twice and every run of whitespace becomes one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int | None = None
) -> PromptTokens:
    """Token ids of prompts, cut or padded to one length.

    Args:
        prompts: cleaned already, see `clean_prompt`.
        tokens: the length; the tokenizer's own by default.

    Raises:
        InputError: no length given, and the tokenizer has none.
    """
    length = int(tokenizer.model_max_length) if tokens is None else tokens
    if length > LONGEST:
        raise InputError(f"the tokenizer's model_max_length={length:.0e} is no limit; give the text's tokens")
    ids, mask = _encode(tokenizer, prompts, length)
    full = [row for row, used in enumerate(mask.sum(1).tolist()) if used == length]
    longer = set()
    if full:
        # one more token shows whether there was more, without the warning that the whole text would raise
        _, beyond = _encode(tokenizer, [prompts[row] for row in full], length + 1)
        longer = {row for row, used in zip(full, beyond.sum(1).tolist(), strict=True) if used > length}
    return PromptTokens(ids, mask, tuple(row in longer for row in range(len(ids))))


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    batch = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of cleaned prompts, (prompts, tokenizer.model_max_length) each."""
    found = tokenize_prompts(tokenizer, [clean_prompt(prompt) for prompt in prompts])
    return found.ids, found.mask


def embed(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(prompts, tokens, width) encoder states; rows past the prompt's end are zero (Wan 2.1)."""
    states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states.masked_fill(mask[..., None].to(states.device) == 0, 0)


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    tokens: int | None = None,
) -> Tensor:
    """Embeddings of whole prompts, (prompts, tokens, width), on the encoder's device.

    Args:
        tokens: length; the tokenizer's own by default.
    """
    return encode_with_notes(tokenizer, encoder, prompts, tokens)[0]


@torch.no_grad()
def encode_with_notes(
    tokenizer: PreTrainedTokenizerBase,
    encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    tokens: int | None = None,
) -> tuple[Tensor, PromptTokens]:
    """As `encode_prompts`, with the tokens: how long each prompt is and whether it was cut."""
    found = tokenize_prompts(tokenizer, [clean_prompt(prompt) for prompt in prompts], tokens)
    where = encoder.device
    return embed(encoder, found.ids.to(where), found.mask.to(where)), found
