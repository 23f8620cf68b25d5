"""Prompts are cut, masked and padded as stock code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import UMT5EncoderModel

from tests.tiny import randomise, relative_l2
from vidkv.errors import InputError
from vidkv.models.bounce.text import build_text_encoder, build_tokenizer
from vidkv.models.text import clean_prompt, encode_prompts, encode_with_notes, tokenize_prompts

SHORT, LONG = "a red circle bouncing", "a blue square resting and a red circle bouncing"


def build_encoder() -> UMT5EncoderModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_text_encoder().eval().requires_grad_(False)
    randomise(encoder, spread=0.1)
    return encoder


class TestCleaning:
    @pytest.mark.parametrize(
        ("raw", "wanted"),
        [
            ("  a\tred \n\n circle\u00a0", "a red circle"),
            ("salt &amp; pepper", "salt & pepper"),
            ("salt &amp;amp; pepper", "salt & pepper"),
            ("a&nbsp;&nbsp;b", "a b"),
            ("", ""),
            (" \n ", ""),
        ],
    )
    def test_html_and_whitespace(self, raw: str, wanted: str) -> None:
        assert clean_prompt(raw) == wanted

    def test_repairs_as_stock_code_does(self) -> None:
        assert clean_prompt("a caf\u00c3\u00a9 \u2018sign\u2019\uff0clit") == "a café 'sign',lit"


class TestTokens:
    def test_cut_prompts_are_told_apart_from_those_that_just_fit(self) -> None:
        tokenizer = build_tokenizer()
        words = SHORT.split()
        found = tokenize_prompts(tokenizer, [SHORT, " ".join(words[:3]), LONG, ""], tokens=len(words) + 1)
        assert found.truncated == (False, False, True, False)
        assert found.mask.sum(1).tolist() == [5, 4, 5, 1]
        end = tokenizer.eos_token_id
        assert found.ids[0, -1] == end and found.ids[1, 3] == end

    def test_a_cut_prompt_is_cut_as_by_the_tokenizer_alone(self) -> None:
        tokenizer = build_tokenizer()
        wanted = tokenizer([LONG], truncation=True, max_length=6, padding="max_length")
        found = tokenize_prompts(tokenizer, [LONG], tokens=6)
        assert found.ids.tolist() == wanted["input_ids"] and found.truncated == (True,)

    def test_a_length_is_needed(self) -> None:
        tokenizer = build_tokenizer()
        assert tokenize_prompts(tokenizer, [SHORT]).ids.shape == (1, 32)
        tokenizer.model_max_length = 10**30
        with pytest.raises(InputError, match="no limit; give"):
            tokenize_prompts(tokenizer, [SHORT])
        assert tokenize_prompts(tokenizer, [SHORT], 8).ids.shape == (1, 8)


class TestEmbeddings:
    def test_padding_is_masked_and_zero(self) -> None:
        """The rows of a prompt are those that the encoder gives for the prompt without any padding."""
        tokenizer, encoder = build_tokenizer(), build_encoder()
        states, found = encode_with_notes(tokenizer, encoder, [SHORT, LONG], 16)
        for row, length in enumerate(found.mask.sum(1).tolist()):
            alone = encoder(input_ids=found.ids[row : row + 1, :length]).last_hidden_state[0]
            assert relative_l2(states[row, :length], alone) < 1e-5
            padding = states[row, length:]
            assert padding.numel() and not padding.view(torch.int32).any()

    def test_infinite_states_of_padding_do_not_come_through(self) -> None:
        encoder = build_encoder()

        def spoil(module: Any, arguments: Any, output: Any) -> Any:
            output.last_hidden_state[:, -1] = float("inf")
            return output

        handle = encoder.register_forward_hook(spoil)
        states = encode_prompts(build_tokenizer(), encoder, [SHORT])
        handle.remove()
        assert states.isfinite().all()

    def test_prompts_are_cleaned(self) -> None:
        tokenizer, encoder = build_tokenizer(), build_encoder()
        spelled = encode_prompts(tokenizer, encoder, ["a red circle bouncing"])
        assert torch.equal(spelled, encode_prompts(tokenizer, encoder, ["a&nbsp;red  circle\nbouncing "]))
        assert not torch.equal(spelled, encode_prompts(tokenizer, encoder, ["a blue circle bouncing"]))
