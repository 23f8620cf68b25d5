"""Prompt embeddings, kept on disk, so that a card need not hold the text encoder beside the transformer.

    encoder = PromptEncoder(load, tokens=512, cache=EmbeddingCache(folder), fingerprint=folder_fingerprint(…))
    encoder.encode(every_prompt_of_the_schedule)    # loads the text encoder if a prompt is new, then drops it
    embeds = encoder.encode([prompt])               # from memory

A prompt is encoded alone, never in a batch, so that its embedding does not depend on its company.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vidkv.errors import InputError, OutputError
from vidkv.models.text import clean_prompt, encode_with_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

Load = Callable[[], "tuple[PreTrainedTokenizerBase, UMT5EncoderModel]"]
VERSION = "1"
"""Raised when the same prompt and weights would give other embeddings."""
DEFAULT_BYTES = 10**9
REMEMBERED = 64
"""Prompts kept in memory by one `PromptEncoder`; umT5-xxl's take at most 4 MB each."""


@dataclass(frozen=True)
class Embedding:
    """One encoded prompt without its padding.

    Attributes:
        rows: (used tokens, width), on the CPU.
        truncated: the prompt was longer than the encoder takes and has lost its end.
    """

    rows: Tensor
    truncated: bool

    def padded(self, tokens: int) -> Tensor:
        """(tokens, width), zero past the prompt's end."""
        states = self.rows.new_zeros(tokens, self.rows.shape[1])
        states[: len(self.rows)] = self.rows
        return states


class EmbeddingCache:
    """A folder of embeddings that forgets what was not used for longest.

    Several processes may share it. A file that cannot be read, or whose digest is wrong, counts as absent and
    is replaced when the prompt is encoded again.

    Args:
        max_bytes: of all files together.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 0:
            raise InputError(f"max_bytes={max_bytes} of the embedding cache must not be negative")
        self.folder, self.max_bytes = folder, max_bytes

    def get(self, key: str) -> Embedding | None:
        """What was stored under a key; None if nothing whole is there."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                about, rows = file.metadata() or {}, file.get_tensor("rows")
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError):
            return None
        if rows.ndim != 2 or about.get("sha256") != _digest(rows):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return Embedding(rows, about.get("truncated") == "1")

    def put(self, key: str, embedding: Embedding) -> None:
        """Store; the file appears whole or not at all.

        Raises:
            OutputError: the folder cannot be written.
        """
        rows = embedding.rows.detach().cpu().contiguous()
        about = {"sha256": _digest(rows), "truncated": str(int(embedding.truncated))}
        data = save({"rows": rows}, about)
        if len(data) > self.max_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, self._path(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise OutputError(
                f"cannot write to the embedding cache {self.folder}: {error.strerror}; choose another folder"
            ) from None
        self._forget_oldest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path), least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            # another process may have removed it since it was listed
            with contextlib.suppress(OSError):
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        return sorted(found)

    def _forget_oldest(self) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


class PromptEncoder:
    """Prompts to embeddings, with the text encoder in memory only while a new one is encoded.

    Args:
        load: gives tokenizer and encoder; called when a prompt is neither remembered nor in the cache.
        tokens: length of the embeddings.
        cache: where they are kept between runs; None keeps them for this object's life.
        fingerprint: names the encoder's and tokenizer's weights and settings for the cache, see
            `folder_fingerprint` and `model_fingerprint`; required with one.
        device: where prompts are encoded and embeddings are returned.
        dtype: of the embeddings.
        keep_loaded: leave the encoder loaded after use; for small ones, where memory is no matter.
        park: on release move the encoder to the CPU; for an encoder that others hold too, which would
            otherwise stay on the device.
    """

    def __init__(
        self,
        load: Load,
        tokens: int,
        cache: EmbeddingCache | None = None,
        fingerprint: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keep_loaded: bool = False,
        park: bool = False,
    ) -> None:
        if cache is not None and not fingerprint:
            raise InputError("an embedding cache needs the text encoder's fingerprint")
        self._load, self.tokens, self.cache, self.fingerprint = load, tokens, cache, fingerprint
        self.device, self.dtype = torch.device(device), dtype
        self.keep_loaded, self.park = keep_loaded, park
        self._networks: tuple[PreTrainedTokenizerBase, UMT5EncoderModel] | None = None
        self._remembered: OrderedDict[str, Embedding] = OrderedDict()
        self.truncated: set[str] = set()
        """Prompts given so far that were longer than `tokens`; what was cut off has no effect."""

    @property
    def loaded(self) -> bool:
        """Whether the text encoder is in memory on this object's account."""
        return self._networks is not None

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(prompts, tokens, width) on the device; rows past each prompt's end are zero.

        Prompts are cleaned as stock code does. The encoder is released before this returns, unless
        `keep_loaded`.
        """
        if not prompts:
            raise InputError("there is no prompt to encode")
        found: dict[str, Embedding] = {}
        try:
            for prompt in dict.fromkeys(prompts):
                found[prompt] = self._embedding(clean_prompt(prompt))
                if found[prompt].truncated:
                    self.truncated.add(prompt)
        finally:
            if not self.keep_loaded:
                self.release()
        return torch.stack([found[prompt].padded(self.tokens) for prompt in prompts]).to(self.device)

    def release(self) -> None:
        """Let go of the text encoder and give its memory back to the device."""
        if self._networks is None:
            return
        if self.park:
            self._networks[1].to("cpu")
        self._networks = None
        # the modules of a network refer to each other: without this they wait for the next collection
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def key(self, prompt: str) -> str:
        """The cache's name for a cleaned prompt."""
        parts = (VERSION, self.fingerprint, self.tokens, str(self.dtype), self.device.type, prompt)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _embedding(self, prompt: str) -> Embedding:
        found = self._remembered.pop(prompt, None)
        if found is None and self.cache is not None:
            found = self.cache.get(self.key(prompt))
            if found is not None and not self._fits(found):
                found = None
        if found is None:
            found = self._encode(prompt)
            if self.cache is not None:
                self.cache.put(self.key(prompt), found)
        self._remembered[prompt] = found
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _fits(self, found: Embedding) -> bool:
        return len(found.rows) <= self.tokens and found.rows.dtype == self.dtype

    def _encode(self, prompt: str) -> Embedding:
        if self._networks is None:
            tokenizer, encoder = self._load()
            # kept first: if the encoder does not fit on the device, release() still lets go of it
            self._networks = tokenizer, encoder
            encoder.to(self.device)
        states, found = encode_with_notes(*self._networks, [prompt], self.tokens)
        used = int(found.mask.sum())
        # a slice would keep the padding's memory
        return Embedding(states[0, :used].to("cpu", self.dtype, copy=True), found.truncated[0])


def folder_fingerprint(*folders: Path) -> str:
    """Identity of model or tokenizer folders by their files, without reading the weights.

    Small files count with their content, weights with their size, header and time of change: copying them
    with a new time makes the cache miss, never wrong.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            state = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0".encode())
            if path.suffix in WEIGHT_SUFFIXES:
                digest.update(str(state.st_mtime_ns).encode())
                with path.open("rb") as file:
                    digest.update(file.read(1 << 16))
            else:
                digest.update(path.read_bytes())
    return digest.hexdigest()


WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth"))


def model_fingerprint(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module) -> str:
    """Identity of a loaded tokenizer and encoder by their settings and every weight; reads all of them."""
    digest = hashlib.sha256()
    digest.update(json.dumps(_tokenizer_settings(tokenizer), sort_keys=True, default=str).encode())
    config: Any = encoder.config
    digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_digest(tensor.detach()).encode())
    return digest.hexdigest()


def _tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return {
        "kind": type(tokenizer).__name__,
        "words": hashlib.sha256(json.dumps(words).encode()).hexdigest(),
        "special": tokenizer.special_tokens_map,
    }


def _digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return "".join(_digest(getattr(tensor, name)) for name in names)
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()
