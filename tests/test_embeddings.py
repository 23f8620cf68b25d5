"""Embeddings from the cache are those of the encoder, bit for bit; the encoder is there only when needed."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_text import build_encoder
from tests.tiny import noise
from vidkv.embeddings import (
    REMEMBERED,
    Embedding,
    EmbeddingCache,
    PromptEncoder,
    folder_fingerprint,
    model_fingerprint,
)
from vidkv.errors import InputError, OutputError
from vidkv.models.bounce.text import build_tokenizer
from vidkv.models.text import encode_prompts

PROMPTS = ["a red circle bouncing", "a blue square resting", ""]
TOKENS = 12


class Loader:
    """Gives an encoder anew each time, and knows how often and which."""

    def __init__(self) -> None:
        self.loads = 0
        self.last: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        self.loads += 1
        encoder = build_encoder()
        self.last = weakref.ref(encoder)
        return build_tokenizer(), encoder


def direct(prompts: list[str]) -> Tensor:
    tokenizer, encoder = build_tokenizer(), build_encoder()
    return torch.cat([encode_prompts(tokenizer, encoder, [prompt], TOKENS) for prompt in prompts])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def rows(seed: int, length: int = 5) -> Embedding:
    return Embedding(noise(length, 64, seed=seed), False)


class TestEncoder:
    def test_is_loaded_for_what_is_new_and_then_released(self, tmp_path: Path) -> None:
        load, cache = Loader(), EmbeddingCache(tmp_path)
        wanted = bits(direct(PROMPTS))
        first = PromptEncoder(load, TOKENS, cache, "f")
        assert load.loads == 0
        assert torch.equal(bits(first.encode(PROMPTS)), wanted)
        assert load.loads == 1 and not first.loaded
        gc.collect()
        assert load.last() is None, "nothing holds the encoder any more"
        assert torch.equal(bits(first.encode(PROMPTS[::-1])), wanted.flip(0)) and load.loads == 1
        second = PromptEncoder(load, TOKENS, cache, "f")
        assert torch.equal(bits(second.encode([PROMPTS[1], PROMPTS[1]])), wanted[[1, 1]])
        assert load.loads == 1, "another run finds them on disk"
        second.encode(["a green triangle spinning"])
        assert load.loads == 2 and not second.loaded

    def test_without_a_cache_it_remembers(self) -> None:
        load = Loader()
        encoder = PromptEncoder(load, TOKENS)
        schedule = encoder.encode(PROMPTS)
        for index, prompt in enumerate(PROMPTS):
            assert torch.equal(encoder.encode([prompt])[0], schedule[index])
        assert load.loads == 1

    def test_a_prompt_does_not_depend_on_its_company(self) -> None:
        alone = PromptEncoder(Loader(), TOKENS).encode(PROMPTS[:1])
        assert torch.equal(bits(PromptEncoder(Loader(), TOKENS).encode(PROMPTS)[:1]), bits(alone))

    def test_what_is_remembered_is_bounded(self) -> None:
        load = Loader()
        encoder = PromptEncoder(load, TOKENS, keep_loaded=True)
        encoder.encode([f"a red circle {'bouncing ' * n}" for n in range(REMEMBERED + 3)])
        assert len(encoder._remembered) == REMEMBERED

    def test_kept_loaded(self) -> None:
        load = Loader()
        encoder = PromptEncoder(load, TOKENS, keep_loaded=True)
        for prompt in PROMPTS:
            encoder.encode([prompt])
        assert load.loads == 1 and encoder.loaded
        encoder.release()
        encoder.release()
        assert not encoder.loaded

    def test_is_released_when_encoding_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load = Loader()
        encoder = PromptEncoder(load, TOKENS)

        def fail(*arguments: object) -> None:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr("vidkv.embeddings.encode_with_notes", fail)
        with pytest.raises(torch.OutOfMemoryError):
            encoder.encode(PROMPTS)
        assert load.loads == 1 and not encoder.loaded

    def test_tells_which_prompts_were_cut(self, tmp_path: Path) -> None:
        long = "a red circle bouncing and a blue square resting and a green triangle spinning"
        cache = EmbeddingCache(tmp_path)
        for _ in range(2):
            encoder = PromptEncoder(Loader(), TOKENS, cache, "f")
            encoder.encode([PROMPTS[0], long])
            assert encoder.truncated == {long}, "from the encoder and from the cache"

    def test_only_what_a_prompt_uses_is_stored(self, tmp_path: Path) -> None:
        cache = EmbeddingCache(tmp_path)
        encoder = PromptEncoder(Loader(), TOKENS, cache, "f")
        encoder.encode(PROMPTS[:1])
        found = cache.get(encoder.key(PROMPTS[0]))
        assert found is not None and found.rows.shape == (5, 64)
        assert found.rows.untyped_storage().nbytes() == 5 * 64 * 4

    def test_at_bfloat16(self, tmp_path: Path) -> None:
        cache = EmbeddingCache(tmp_path)
        once, again = (
            PromptEncoder(Loader(), TOKENS, cache, "f", dtype=torch.bfloat16).encode(PROMPTS)
            for _ in range(2)
        )
        assert once.dtype == torch.bfloat16 and torch.equal(once, again)
        assert torch.equal(once, direct(PROMPTS).bfloat16())

    def test_the_same_text_spelled_otherwise_is_the_same(self, tmp_path: Path) -> None:
        load, cache = Loader(), EmbeddingCache(tmp_path)
        for prompt in (PROMPTS[0], "  a&nbsp;red circle\n bouncing"):
            PromptEncoder(load, TOKENS, cache, "f").encode([prompt])
        assert load.loads == 1

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="needs the text encoder's fingerprint"):
            PromptEncoder(Loader(), TOKENS, EmbeddingCache(tmp_path))
        with pytest.raises(InputError, match="no prompt to encode"):
            PromptEncoder(Loader(), TOKENS).encode([])


class TestKey:
    def test_names_everything_that_changes_an_embedding(self) -> None:
        load = Loader()
        base: dict[str, Any] = {"tokens": TOKENS, "fingerprint": "f", "dtype": torch.float32, "device": "cpu"}
        changes: list[dict[str, Any]] = [
            {},
            {"tokens": 13},
            {"fingerprint": "g"},
            {"dtype": torch.bfloat16},
            {"device": "cuda"},
        ]
        keys = {PromptEncoder(load, **(base | change)).key("a") for change in changes}
        keys.add(PromptEncoder(load, **base).key("b"))
        assert len(keys) == 6

    def test_fingerprint_of_a_model(self) -> None:
        tokenizer, encoder = build_tokenizer(), build_encoder()
        base = model_fingerprint(tokenizer, encoder)
        assert base == model_fingerprint(build_tokenizer(), build_encoder())
        encoder.encoder.block[1].layer[0].SelfAttention.q.weight.data[3, 3] += 1e-3
        assert model_fingerprint(tokenizer, encoder) != base
        other = build_encoder()
        other.config.num_heads = 2
        assert model_fingerprint(tokenizer, other) != base
        tokenizer.add_tokens(["hexagon"])
        assert model_fingerprint(tokenizer, build_encoder()) != base

    def test_fingerprint_of_folders(self, tmp_path: Path) -> None:
        build_encoder().save_pretrained(tmp_path / "text_encoder")
        build_tokenizer().save_pretrained(tmp_path / "tokenizer")
        folders = (tmp_path / "text_encoder", tmp_path / "tokenizer")
        seen = {folder_fingerprint(*folders)}
        assert folder_fingerprint(*folders) in seen
        weights = folders[0] / "model.safetensors"
        os.utime(weights, ns=(1, 1))
        seen.add(folder_fingerprint(*folders))
        (folders[0] / "config.json").write_text((folders[0] / "config.json").read_text() + " ")
        seen.add(folder_fingerprint(*folders))
        (folders[1] / "tokenizer.json").write_text("{}")
        seen.add(folder_fingerprint(*folders))
        assert len(seen) == 4


class TestCache:
    def test_returns_what_was_put(self, tmp_path: Path) -> None:
        cache = EmbeddingCache(tmp_path / "new" / "folder")
        assert cache.get("k") is None
        stored = Embedding(noise(5, 8).bfloat16(), True)
        cache.put("k", stored)
        found = cache.get("k")
        assert found is not None and torch.equal(found.rows, stored.rows) and found.truncated
        padded = found.padded(7)
        assert torch.equal(padded[:5], stored.rows) and not padded[5:].any()

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other"])
    def test_a_damaged_file_is_encoded_anew(self, tmp_path: Path, damage: str) -> None:
        load, cache = Loader(), EmbeddingCache(tmp_path)
        wanted = PromptEncoder(load, TOKENS, cache, "f").encode(PROMPTS[:1])
        (path,) = tmp_path.glob("*.safetensors")
        whole = path.read_bytes()
        if damage == "other":
            cache.put("k", Embedding(rows(0).rows.half(), False))
            os.replace(tmp_path / "k.safetensors", path)
        else:
            flipped = bytearray(whole)
            flipped[-3] ^= 4
            path.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "text": b"{}"}[damage])
        assert torch.equal(PromptEncoder(load, TOKENS, cache, "f").encode(PROMPTS[:1]), wanted)
        assert load.loads == 2, "the damaged file did not count"
        assert torch.equal(PromptEncoder(load, TOKENS, cache, "f").encode(PROMPTS[:1]), wanted)
        assert load.loads == 2, "a whole one has taken its place"

    def test_forgets_what_was_not_used_for_longest(self, tmp_path: Path) -> None:
        cache = EmbeddingCache(tmp_path)
        for index, key in enumerate("abc"):
            cache.put(key, rows(index))
            os.utime(tmp_path / f"{key}.safetensors", ns=(index, index))
        assert cache.get("a") is not None
        small = EmbeddingCache(tmp_path, max_bytes=cache.nbytes)
        small.put("d", rows(3))
        assert {key for key in "abcd" if small.get(key)} == {"a", "c", "d"}
        assert small.nbytes <= small.max_bytes

    def test_what_is_larger_than_the_limit_is_not_kept(self, tmp_path: Path) -> None:
        cache = EmbeddingCache(tmp_path, max_bytes=2000)
        cache.put("a", rows(0, 1))
        cache.put("b", rows(1, 50))
        assert cache.get("a") is not None and cache.get("b") is None

    def test_a_limit_of_nothing_keeps_nothing(self, tmp_path: Path) -> None:
        load = Loader()
        for _ in range(2):
            PromptEncoder(load, TOKENS, EmbeddingCache(tmp_path, max_bytes=0), "f").encode(PROMPTS[:1])
        assert load.loads == 2 and not list(tmp_path.iterdir())
        with pytest.raises(InputError, match="max_bytes=-1"):
            EmbeddingCache(tmp_path, max_bytes=-1)

    def test_leaves_no_half_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(source: object, target: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vidkv.embeddings.os.replace", fail)
        with pytest.raises(OutputError, match="No space left on device; choose another folder"):
            EmbeddingCache(tmp_path).put("a", rows(0))
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"embedding cache .*file"):
            EmbeddingCache(tmp_path / "file").put("a", rows(0))
