"""Where a model's files are published, and whether the local Hugging Face cache has them. No network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from vidkv.errors import InputError
from vidkv.models.families.base import ModelEntry

TEXT_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors")
TOKENIZER = "google/umt5-xxl"


def base_files(entry: ModelEntry) -> tuple[str, ...]:
    """The other parts' files in the base repository, the VAE's first."""
    vae = "Wan2.2_VAE.pth" if entry.vae.get("is_residual") else "Wan2.1_VAE.pth"
    return (vae, TEXT_FILES[0], f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer_config.json")


def download_commands(entry: ModelEntry) -> list[str]:
    """What to type to get a model's files: the transformer's, then the other parts'."""
    if entry.source is None:
        return []
    source = entry.source
    files = " ".join((*source.files, *((source.lora,) if source.lora else ())))
    return [
        f"hf download {source.repository} {files}",
        f"hf download {source.base} {' '.join(base_files(entry))}",
    ]


def cached(repository: str, name: str) -> Path | None:
    """A file of a repository in the local cache."""
    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def cached_weights(entry: ModelEntry) -> tuple[Path, ...]:
    """The transformer's files in the local Hugging Face cache.

    Raises:
        InputError: they are not there, with the command that gets them.
    """
    if entry.source is None:
        raise InputError(f"{entry.name} has no published weights; name the files to convert")
    found = [cached(entry.source.repository, name) for name in entry.source.files]
    if not all(found):
        commands = " && ".join(download_commands(entry))
        raise InputError(f"the weights of {entry.name} are not in the local Hugging Face cache: {commands}")
    return tuple(path for path in found if path)
