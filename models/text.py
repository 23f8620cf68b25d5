"""Text embeddings as Wan takes them: umT5 states of fixed length, zero past the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (prompts, tokenizer.model_max_length) each."""
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]


def embed(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(prompts, tokens, width) encoder states; rows past the prompt's end are zero (Wan 2.1)."""
    states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states * mask[..., None].to(states.dtype)


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, prompts: Sequence[str]
) -> Tensor:
    """Embeddings of whole prompts, (prompts, tokens, width), on the encoder's device."""
    ids, mask = tokenize(tokenizer, prompts)
    return embed(encoder, ids.to(encoder.device), mask.to(encoder.device))
