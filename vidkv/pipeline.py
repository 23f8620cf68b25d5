"""`CausalVideoPipeline`: text in, chunks of video out, with diffusers' conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from vidkv.cache import CacheSpec
from vidkv.errors import Cancelled, CheckpointError, InputError
from vidkv.memory import MemoryPlan, latent_size, pixel_size, plan_loaded
from vidkv.models.checkpoints.folders import read_json, require_tokenizer, verify
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS, canonical_prompt, contrast_prompt, weights_folder
from vidkv.models.text import encode_prompts
from vidkv.models.vae import StreamingDecoder, pixel_frames
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.prompts import PromptLike, PromptSchedule
from vidkv.rollout import Chunk, EditStep, OnStep, Rollout
from vidkv.schedule import FlowSchedule

MAX_SECONDS = 24 * 3600.0

Callback = Callable[[Any, int, int, dict[str, Any]], Mapping[str, Any] | None]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, tensors) to changed tensors."""


@dataclass
class CausalVideoOutput(BaseOutput):
    """Result of a call.

    Attributes:
        frames: (batch, frames, height, width, 3): numpy float in [0, 1] (`np`), torch uint8 (`pt`),
            nested lists of PIL images (`pil`), or latents (batch, frames, c, h, w) (`latent`).
    """

    frames: Any


class CausalVideoPipeline(DiffusionPipeline):
    """Rolls a causal video DiT out chunk by chunk over a KV cache.

        pipe = CausalVideoPipeline.from_pretrained("bounce")
        video = pipe("a red circle bouncing", num_frames=81, seed=7).frames[0]
        for chunk in pipe.stream("a red circle bouncing"):      # endless; break to stop
            show(chunk.frames)

    Args:
        transformer, vae, text_encoder, tokenizer: the parts.
        model: registry name of the architecture and its defaults.
        steps, shift, warp, first_chunk_steps, sampler, first_chunk_guidance, guided_down_to: see
            `FlowSchedule`.
        prompt_grammar: how prompts are checked and respelled; None for free text.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        model: str = "bounce",
        steps: list[int] | None = None,
        shift: float = 5.0,
        warp: bool = True,
        first_chunk_steps: list[int] | None = None,
        sampler: str = "renoise",
        first_chunk_guidance: float = 1.0,
        guided_down_to: float = 0.0,
        prompt_grammar: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            model=model,
            steps=list(steps or FlowSchedule().steps),
            shift=shift,
            warp=warp,
            first_chunk_steps=list(first_chunk_steps) if first_chunk_steps else None,
            sampler=sampler,
            first_chunk_guidance=first_chunk_guidance,
            guided_down_to=guided_down_to,
            prompt_grammar=prompt_grammar,
        )
        if model not in MODELS:
            raise InputError(f"model {model!r} is unknown; the registry has {', '.join(MODELS)}")
        # settings that cannot be used are refused now, not in the middle of a video
        canonical_prompt(prompt_grammar), self.schedule
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, model: str | Path = "bounce", **kwargs: Any) -> CausalVideoPipeline:
        """Load by registry name or from a folder that `save_pretrained` wrote.

        Args:
            model: a name whose weights ship with the package, or a folder.
            **kwargs: as for diffusers, e.g. `dtype`; float32 by default.

        Raises:
            InputError: no such model or folder.
            CheckpointError: files missing, damaged or of the wrong shape.
        """
        folder = find_model(model)
        verify(folder / "transformer", CausalWanTransformer3DModel)
        verify(folder / "vae", AutoencoderKLWan)
        verify(folder / "text_encoder", UMT5EncoderModel)
        require_tokenizer(folder / "tokenizer")
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
        kwargs.setdefault("local_files_only", True)
        try:
            pipe: CausalVideoPipeline = super().from_pretrained(str(folder), **kwargs)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"cannot load the model in {folder}: {_first_line(error)}") from None
        return pipe

    @property
    def entry(self) -> ModelEntry:
        """Architecture and defaults of this pipeline's model."""
        return MODELS[self.config.model]

    @property
    def fps(self) -> int:
        return self.entry.fps

    @property
    def schedule(self) -> FlowSchedule:
        """The model's own schedule."""
        first = self.config.first_chunk_steps
        return FlowSchedule(
            steps=tuple(self.config.steps),
            shift=self.config.shift,
            warp=self.config.warp,
            first_chunk_steps=tuple(first) if first else None,
            sampler=self.config.sampler,
            first_chunk_guidance=self.config.first_chunk_guidance,
            guided_down_to=self.config.guided_down_to,
        )

    def default_cache(self) -> CacheSpec:
        """The model's window and sinks in the unquantized format of the device."""
        plain = "fp32" if self.transformer.dtype == torch.float32 else "bf16"
        entry = self.entry
        return CacheSpec.of(
            {"format": plain, "window": entry.window, "sink": entry.sink, "positions": entry.positions}
        )

    def estimate_memory(
        self, height: int | None = None, width: int | None = None, cache: CacheSpec | str | None = None,
        batch: int = 1,
    ) -> MemoryPlan:  # fmt: skip
        """Bytes that a rollout of this size needs with this pipeline's networks, before it starts."""
        latent = latent_size(self.entry, *pixel_size(self.entry, height, width))
        return plan_loaded(
            self.transformer, self.vae, self.text_encoder, self._spec(cache), latent,
            self.entry.chunk_frames, batch,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: PromptLike | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        cache: CacheSpec | str | None = None,
        output_type: Literal["np", "pt", "pil", "latent"] = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> CausalVideoOutput | tuple[Any]:
        """Generate a whole video; arguments as for diffusers' video pipelines.

        Args:
            prompt: a text, a schedule of (second, text), or one text per batch element.
            num_frames: pixel frames; the rollout runs whole chunks and the surplus is cut off.
            num_inference_steps: evenly spaced steps instead of the model's own schedule.
            guidance_scale: classifier-free guidance of the first chunk, 1 for none, instead of the model's
                own; later chunks follow their history and are not guided.
            negative_prompt: what guidance leads away from; by default a contrast to the prompt. With
                `prompt_embeds` nothing is guided.
            generator, seed: the seed; of a generator its initial seed is taken.
            prompt_embeds: (batch, tokens, width) instead of a prompt.
            latents: initial noise (batch, latent frames, c, h, w) of all chunks instead of the seed's.
            callback_on_step_end: called with (pipeline, step counted over the video, timestep, tensors) after
                each denoising step. `tensors["latents"]` are the current chunk's after that step (batch,
                latent frames, c, h, w); if it returns a dictionary with `latents`, those go on instead.
            callback_on_step_end_tensor_inputs: what `tensors` holds: `latents`, or nothing.

        `pipe._interrupt = True`, set in the callback or by another thread, ends the call after the current
        step. Chunks that are fully denoised by then are returned, cut to `num_frames`; a chunk with steps
        still to go is dropped, not decoded from noise as diffusers does, so that before the end of the
        first chunk there are no frames. Each call starts with it False; `stream` does not look at it.

        Raises:
            InputError: a value that cannot be used, named in the message.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise InputError(f"output_type={output_type!r}; choose np, pt, pil or latent")
        if num_frames is None:
            raise InputError("num_frames is missing; a video without an end is for stream()")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise InputError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; there is only 'latents'"
            )
        prompts, rollout = self._begin(
            prompt, height, width, num_frames, self._schedule(num_inference_steps, guidance_scale), generator,
            seed, prompt_embeds, latents, cache, decode=output_type != "latent",
        )  # fmt: skip
        edit = self._after_step(rollout, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._interrupt = False
        rows, columns = pixel_size(self.entry, height, width)
        if output_type == "latent":
            none = torch.empty(len(rollout.seeds), 0, *rollout.latent_size, dtype=rollout.dtype)
        else:
            none = torch.empty(len(rollout.seeds), 0, rows, columns, 3, dtype=torch.uint8)
        chunks: list[Chunk] = []
        try:
            for chunk in self._chunks(rollout, prompts, negative_prompt, num_frames, latents, edit=edit):
                chunks.append(chunk)
                if self._interrupt:
                    break
        except _Interrupted:
            # it stands before the chunk that was dropped; the chunks before it are whole
            pass
        frames = _collect(chunks, output_type, none.to(rollout.device))
        self.maybe_free_model_hooks()
        return CausalVideoOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: PromptLike | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        cache: CacheSpec | str | None = None,
        decode: bool = True,
        on_step: OnStep | None = None,
    ) -> Iterator[Chunk]:
        """Yield chunks as they are finished; memory does not grow with the video.

        Arguments as for `__call__`; without `num_frames` the stream is endless. The last chunk is cut to
        the frames asked for. Closing the iterator ends the rollout.
        """
        prompts, rollout = self._begin(
            prompt, height, width, num_frames, self._schedule(num_inference_steps, guidance_scale), generator,
            seed, prompt_embeds, latents, cache, decode,
        )  # fmt: skip
        return self._chunks(rollout, prompts, negative_prompt, num_frames, latents, on_step)

    def rollout(
        self,
        height: int | None = None,
        width: int | None = None,
        *,
        schedule: FlowSchedule | None = None,
        seed: int = 0,
        batch: int = 1,
        seeds: Sequence[int] | None = None,
        cache: CacheSpec | str | None = None,
        decode: bool = True,
    ) -> Rollout:
        """A rollout without a prompt yet; batch element i has seed `seed + i`, or `seeds[i]`."""
        entry = self.entry
        rows, columns = latent_size(entry, *pixel_size(entry, height, width))
        return Rollout(
            self.transformer,
            TextContext([], []),
            self._spec(cache),
            schedule or self.schedule,
            (self.transformer.config.in_channels, rows, columns),
            [seed + i for i in range(batch)] if seeds is None else seeds,
            entry.chunk_frames,
            StreamingDecoder(self.vae) if decode else None,
        )

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> TextContext:
        """Cross-attention context of one prompt per batch element."""
        self.text_encoder.to(self.transformer.device)
        return self.text_context(encode_prompts(self.tokenizer, self.text_encoder, prompts))

    def set_prompt(
        self, rollout: Rollout, prompts: Sequence[str], negative_prompt: str | None = None
    ) -> None:
        """Give a rollout one prompt per batch element from its next chunk on.

        Args:
            prompts: spelled as the model wants them.
            negative_prompt: what guidance leads away from, if the schedule guides the next chunk; by
                default the model's own contrast to each prompt.
        """
        negative = None
        if rollout.schedule.guidance_at(rollout.chunk, 1.0) != 1:
            grammar = self.config.prompt_grammar
            if negative_prompt is not None:
                wanted = [canonical_prompt(grammar)(negative_prompt)] * len(prompts)
            else:
                wanted = [contrast_prompt(grammar)(prompt) for prompt in prompts]
            negative = self.encode_prompt(wanted)
        rollout.set_text(self.encode_prompt(prompts), negative)

    @torch.no_grad()
    def text_context(self, embeds: Tensor) -> TextContext:
        """Cross-attention context of embeddings (batch, tokens, width)."""
        width = self.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise InputError(
                f"prompt_embeds are {tuple(embeds.shape)}; this model takes (batch, tokens, {width})"
            )
        return self.transformer.encode_text(embeds.to(self.transformer.device))

    def chunk_second(self, chunk: int) -> float:
        """When the first frame of a chunk is shown."""
        return pixel_frames(chunk * self.entry.chunk_frames) / self.fps

    def _begin(
        self, prompt: PromptLike | list[str] | None, height: int | None, width: int | None,
        num_frames: int | None, schedule: FlowSchedule, generator: torch.Generator | None,
        seed: int | None, prompt_embeds: Tensor | None, latents: Tensor | None,
        cache: CacheSpec | str | None, decode: bool,
    ) -> tuple[list[PromptSchedule], Rollout]:  # fmt: skip
        """Check all arguments; the prompts of every batch element and a rollout before its first chunk."""
        prompts = _schedules(prompt, prompt_embeds, canonical_prompt(self.config.prompt_grammar))
        rollout = self.rollout(
            height, width, schedule=schedule, seed=_seed(seed, generator),
            batch=len(prompts) if prompts else _batch(prompt_embeds), cache=cache, decode=decode,
        )  # fmt: skip
        if prompt_embeds is not None:
            rollout.set_text(self.text_context(prompt_embeds))
        _check_latents(latents, num_frames, rollout)
        return prompts, rollout

    def _chunks(
        self, rollout: Rollout, prompts: list[PromptSchedule], negative_prompt: str | None,
        num_frames: int | None, latents: Tensor | None, on_step: OnStep | None = None,
        edit: EditStep | None = None,
    ) -> Iterator[Chunk]:  # fmt: skip
        shown, texts = 0, None
        # tqdm takes infinity for unknown; diffusers takes None for a mistake
        bar = self.progress_bar(
            total=chunks_for(num_frames, rollout.chunk_frames) if num_frames else math.inf
        )
        with bar:
            while num_frames is None or shown < num_frames:
                wanted = [schedule.at(self.chunk_second(rollout.chunk)) for schedule in prompts]
                if wanted and wanted != texts:
                    self.set_prompt(rollout, wanted, negative_prompt)
                    texts = wanted
                noise = None
                if latents is not None:
                    noise = latents[:, rollout.next_frame : rollout.next_frame + rollout.chunk_frames]
                chunk = rollout.step_chunk(noise=noise, on_step=on_step, edit=edit)
                if chunk.frames is not None and num_frames is not None:
                    chunk = replace(chunk, frames=chunk.frames[:, : num_frames - shown])
                shown = pixel_frames(rollout.next_frame)
                bar.update()
                yield chunk

    def _spec(self, cache: CacheSpec | str | None) -> CacheSpec:
        if cache is None:
            return self.default_cache()
        return CacheSpec.parse(cache) if isinstance(cache, str) else cache

    def _schedule(self, num_inference_steps: int | None, guidance_scale: float | None) -> FlowSchedule:
        schedule = self.schedule
        if num_inference_steps is not None:
            schedule = schedule.with_steps(num_inference_steps)
        if guidance_scale is not None:
            schedule = replace(schedule, first_chunk_guidance=guidance_scale)
        return schedule

    def _after_step(
        self, rollout: Rollout, callback: Callback | None, tensor_inputs: Sequence[str]
    ) -> EditStep:
        """diffusers' callback and interruption as what a rollout calls after each step."""
        done = 0

        def edit(chunk: int, step: int, latents: Tensor) -> Tensor:
            nonlocal done
            sigmas = rollout.schedule.sigmas(chunk)
            if callback:
                tensors = {"latents": latents} if "latents" in tensor_inputs else {}
                changed = callback(self, done, round(1000 * sigmas[step]), tensors) or {}
                latents = changed.get("latents", latents)
                if not isinstance(latents, Tensor):
                    raise InputError(
                        f"callback_on_step_end returned latents {latents!r:.60}; return a tensor of the "
                        "shape it was given"
                    )
            done += 1
            if self._interrupt and step + 1 < len(sigmas):
                raise _Interrupted(f"interrupted after step {step} of chunk {chunk}")
            return latents

        return edit


class _Interrupted(Cancelled):
    """`_interrupt` was set in the middle of a chunk."""


def find_model(model: str | Path) -> Path:
    """The folder of a model by registry name or path.

    Raises:
        InputError: neither, with what there is.
        CheckpointError: a folder without `model_index.json`.
    """
    entry = MODELS.get(str(model))
    folder = weights_folder(entry) if entry else Path(model)
    if folder is None:
        raise InputError(f"the weights of {model} do not ship with vidkv; give the folder that holds them")
    if not folder.is_dir():
        shipped = ", ".join(name for name, known in MODELS.items() if known.weights)
        raise InputError(f"unknown model {str(model)!r}: neither a folder nor a shipped model ({shipped})")
    read_json(folder / "model_index.json")
    return folder


def frames_for(seconds: float, fps: int) -> int:
    """Pixel frames of a video of so many seconds.

    Raises:
        InputError: not finite, not positive, under one frame or over a day.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise InputError(f"seconds={seconds}: give a positive number of seconds")
    if seconds > MAX_SECONDS:
        raise InputError(f"seconds={seconds:g}: at most {MAX_SECONDS:g} (a day) at a time")
    frames = round(seconds * fps)
    if frames < 1:
        raise InputError(
            f"seconds={seconds:g} is less than one frame at {fps} fps; give at least {1 / fps:g}"
        )
    return frames


def chunks_for(num_frames: int, chunk_frames: int, temporal_scale: int = 4) -> int:
    """Chunks that hold `num_frames` pixel frames: ceil((frames + 3) / 12) for chunks of three."""
    return -(-(num_frames + temporal_scale - 1) // (temporal_scale * chunk_frames))


def _collect(chunks: list[Chunk], output_type: str, none: Tensor) -> Any:
    """Chunks behind each other; `none` is what no chunk gives."""
    if output_type == "latent":
        return torch.cat([none, *(chunk.latents for chunk in chunks)], 1)
    frames = torch.cat([none, *(chunk.frames for chunk in chunks if chunk.frames is not None)], 1).cpu()
    if output_type == "pt":
        return frames
    if output_type == "np":
        return frames.numpy().astype(np.float32) / 255
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video] for video in frames.numpy()]


def _schedules(
    prompt: PromptLike | list[str] | None, embeds: Tensor | None, canonical: Callable[[str], str]
) -> list[PromptSchedule]:
    """One schedule per batch element; none where embeddings are given instead."""
    if (prompt is None) == (embeds is None):
        raise InputError("give either a prompt or prompt_embeds")
    if prompt is None:
        return []
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
        return [PromptSchedule.of(item, canonical) for item in prompt]
    return [PromptSchedule.of(prompt, canonical)]  # type: ignore[arg-type]


def _batch(embeds: Tensor | None) -> int:
    return embeds.shape[0] if embeds is not None and embeds.ndim == 3 else 1


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None and generator is not None:
        raise InputError("give either seed or generator, not both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}; give one torch.Generator, or a seed")
    if seed is not None and not isinstance(seed, Integral):
        raise InputError(f"seed={seed!r}: give a whole number")
    if generator is not None:
        return generator.initial_seed() % 2**64
    return 0 if seed is None else seed


def _check_latents(latents: Tensor | None, num_frames: int | None, rollout: Rollout) -> None:
    if num_frames is not None and (not isinstance(num_frames, Integral) or num_frames < 1):
        raise InputError(f"num_frames={num_frames!r}: give a whole number, at least 1")
    if latents is None:
        return
    if num_frames is None:
        raise InputError("latents need num_frames: an endless stream has no whole noise")
    frames = chunks_for(num_frames, rollout.chunk_frames) * rollout.chunk_frames
    wanted = (len(rollout.seeds), frames, *rollout.latent_size)
    if tuple(latents.shape) != wanted:
        raise InputError(f"latents are {tuple(latents.shape)}; {num_frames} frames need {wanted}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
