"""Tokenizer and text encoder of the embedded world: umT5's interface at a size of 100 thousand weights."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidkv.models.bounce.prompts import VOCABULARY
from vidkv.models.families.bounce import BOUNCE


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar, closed by </s> as T5 does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = VOCABULARY.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=BOUNCE.text_tokens,
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A two-layer umT5 encoder of width 64 with random weights."""
    return UMT5EncoderModel(UMT5Config(**BOUNCE.text))
