"""`CausalVideoPipeline`: text in, chunks of video out, with diffusers' conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.conditioning import as_pixels, encode_pixels, usable_frames
from vidkv.embeddings import PromptEncoder
from vidkv.errors import Cancelled, CheckpointError, InputError
from vidkv.loading import LoadOptions, find_model, keeps_text, load_parts, prompts_on_demand
from vidkv.memory import MemoryPlan, latent_size, pixel_size, plan_loaded, spatial_stride
from vidkv.models.checkpoints.empty import BUILDING
from vidkv.models.families.base import ModelEntry
from vidkv.models.lora import LoraPipelineMixin
from vidkv.models.registry import MODELS, canonical_prompt, contrast_prompt
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.vae import pixel_frames
from vidkv.models.vae_decoders import streaming_decoder
from vidkv.models.vae_tiles import Tiling
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.noise import StockNoise
from vidkv.prompts import PromptLike, PromptSchedule, Switch
from vidkv.rollout import Chunk, EditStep, OnStep, Rollout
from vidkv.schedule import FlowSchedule
from vidkv.sharing import Pools, PrefixCache, TextCache
from vidkv.stream import VideoStream, awaken, chunks_for, latents_before

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


class CausalVideoPipeline(DiffusionPipeline, LoraPipelineMixin):
    """Rolls a causal video DiT out chunk by chunk over a KV cache.

        pipe = CausalVideoPipeline.from_pretrained("bounce")
        video = pipe("a red circle bouncing", num_frames=81, seed=7).frames[0]
        for chunk in pipe.stream("a red circle bouncing"):      # endless; break to stop
            show(chunk.frames)

    Args:
        transformer, vae, text_encoder, tokenizer: the parts; without the last two, embeddings are given or
            `prompt_encoder` makes them.
        model: registry name of the architecture and its defaults.
        steps, shift, warp, first_chunk_steps, sampler, guidance, first_chunk_guidance, guided_down_to: see
            `FlowSchedule`; by default the model's own.
        prompt_grammar: how prompts are checked and respelled; None for free text.

    Attributes:
        tiling: how the picture is cut for decoding, for small cards.
        graphs: whether a GPU replays recorded passes (`Rollout.record_passes`).
        prompt_encoder: turns prompts into embeddings.
        pools: where rollouts that are started from now on lie together; None: each in pools of its own.
        prefixes: beginnings of streams that later ones may take over; needs `pools`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        vae: AutoencoderKLWan | TinyVideoDecoder,
        text_encoder: UMT5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: str = "bounce",
        steps: list[int] | None = None,
        shift: float | None = None,
        warp: bool | None = None,
        first_chunk_steps: list[int] | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        first_chunk_guidance: float | None = None,
        guided_down_to: float | None = None,
        prompt_grammar: str | None = None,
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise InputError(f"model {model!r} is unknown; the registry has {', '.join(MODELS)}")
        settings: dict[str, Any] = {
            "steps": steps, "shift": shift, "warp": warp, "first_chunk_steps": first_chunk_steps,
            "sampler": sampler, "guidance": guidance, "first_chunk_guidance": first_chunk_guidance,
            "guided_down_to": guided_down_to,
        }  # fmt: skip
        own = MODELS[model].schedule
        for name, value in settings.items():
            chosen = own.get(name, getattr(FlowSchedule(), name)) if value is None else value
            settings[name] = list(chosen) if isinstance(chosen, list | tuple) else chosen
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            model=model,
            **settings,
            prompt_grammar=prompt_grammar,
        )
        self.tiling, self.graphs = Tiling(), False
        self.prompt_encoder: PromptEncoder | None = None
        self.pools: Pools | None = None
        self.prefixes: PrefixCache | None = None
        self._contexts = TextCache()
        # settings that cannot be used are refused now, not in the middle of a video
        canonical_prompt(prompt_grammar), self.schedule
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "bounce",
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        weights: str = "full",
        text_weights: str | None = None,
        text: str = "auto",
        vae_path: str | Path | None = None,
        **kwargs: Any,
    ) -> CausalVideoPipeline:
        """Load by registry name or from a folder that `save_pretrained` or `vidkv convert` wrote.

        Args:
            model: a known model's name, or a folder.
            dtype: of the networks; float32 by default.
            device: where they are loaded to, tensor by tensor.
            weights, text_weights: `full`, `fp8` or `int8` storage of the transformer's linear layers and of
                the text encoder's, by default the same.
            text: `resident` keeps the text encoder loaded, `on_demand` loads it for new prompts alone and
                keeps their embeddings on disk; `auto` is resident for the embedded model only.
            vae_path: a safetensors file with another decoder, such as TAEHV or LightVAE.
            **kwargs: as for diffusers, parts among them.

        Raises:
            InputError: no such model or folder.
            CheckpointError: files missing, damaged or of the wrong shape.
        """
        dtype = dtype or kwargs.pop("torch_dtype", None) or torch.float32
        folder = find_model(model)
        other = Path(vae_path) if vae_path else None
        options = LoadOptions(dtype, device, weights, text_weights or weights, text, other)
        with BUILDING:
            parts = load_parts(folder, options, set(kwargs))
            try:
                pipe: CausalVideoPipeline = super().from_pretrained(
                    str(folder), **{"dtype": dtype, "local_files_only": True} | parts | kwargs
                )
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                raise CheckpointError(f"cannot load the model in {folder}: {_first_line(error)}") from None
        if pipe.text_encoder is None and not keeps_text(folder, options):
            pipe.prompt_encoder = prompts_on_demand(folder, options, torch.device(device))
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
            guidance=self.config.guidance,
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
            self.entry.chunk_frames, batch, text_tokens=self.entry.text_tokens,
            guidance=self.schedule.guidance,
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
        image: Any = None,
        video: Any = None,
        prompt_switch: Switch | None = None,
        noise: Literal["counter", "stock"] = "counter",
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
            guidance_scale: classifier-free guidance, 1 for none, instead of the model's own. A model that is
                guided throughout has a second cache for the negative prompt; for the others it holds for the
                first chunk alone, since later ones follow their history.
            negative_prompt: what guidance leads away from; by default the model's own, or a contrast to the
                prompt. With `prompt_embeds` it must be given to a model that is guided throughout.
            generator, seed: the seed; of a generator its initial seed is taken.
            prompt_embeds: (batch, tokens, width) instead of a prompt.
            latents: initial noise (batch, latent frames, c, h, w) of all generated chunks instead of the
                seed's.
            image, video: a picture to start from, or a video to go on from, whose end is used: PIL images or
                uint8 (frames, height, width, 3). They are part of the result and of `num_frames`.
            prompt_switch: what becomes of the history when a schedule changes the prompt (`Rollout.switch`),
                instead of the model's own way; a `lerp` takes four chunks.
            noise: `stock` draws as the stock code does, from one generator in its order.
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
            seed, prompt_embeds, cache, output_type != "latent", negative_prompt,
        )  # fmt: skip
        start = self._start(rollout, image, video, num_frames, noise, latents)
        edit = self._after_step(rollout, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._interrupt = False
        rows, columns = pixel_size(self.entry, height, width)
        if output_type == "latent":
            none = torch.empty(len(rollout.seeds), 0, *rollout.latent_size, dtype=rollout.dtype)
        else:
            none = torch.empty(len(rollout.seeds), 0, rows, columns, 3, dtype=torch.uint8)
        chunks: list[Chunk] = []
        try:
            stream = VideoStream(
                self, rollout, prompts, negative_prompt, num_frames, latents, start, prompt_switch, edit=edit
            )
            for chunk in stream:
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
        image: Any = None,
        video: Any = None,
        prompt_switch: Switch | None = None,
        noise: Literal["counter", "stock"] = "counter",
        decode: bool = True,
        on_step: OnStep | None = None,
        overlap: bool = False,
    ) -> VideoStream:
        """Chunks as they are finished, to iterate over; memory does not grow with the video.

        Arguments as for `__call__`; without `num_frames` the stream is endless. The last chunk is cut to
        the frames asked for. Closing the iterator ends the rollout.

        Args:
            overlap: on a GPU, decode a chunk on a second stream while the next one is denoised; every chunk
                but the first comes one later.
        """
        prompts, rollout = self._begin(
            prompt, height, width, num_frames, self._schedule(num_inference_steps, guidance_scale), generator,
            seed, prompt_embeds, cache, decode, negative_prompt,
        )  # fmt: skip
        start = self._start(rollout, image, video, num_frames, noise, latents)
        return VideoStream(
            self, rollout, prompts, negative_prompt, num_frames, latents, start, prompt_switch, on_step,
            overlap=overlap and decode and rollout.device.type == "cuda" and not rollout.recompute_context,
        )  # fmt: skip

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
        entry, spec = self.entry, self._spec(cache)
        rows, columns = latent_size(entry, *pixel_size(entry, height, width))
        seeds = [seed + i for i in range(batch)] if seeds is None else seeds
        pools = None
        if self.pools is not None:
            config = self.transformer.config
            geometry = CacheGeometry.of_model(config, rows, columns, entry.chunk_frames, len(seeds))
            pools = self.pools.of(spec, geometry, self._execution_device, self.transformer.dtype)
        return Rollout(
            self.transformer,
            TextContext([], []),
            spec,
            schedule or self.schedule,
            (self.transformer.config.in_channels, rows, columns),
            seeds,
            entry.chunk_frames,
            streaming_decoder(self.vae, self.tiling) if decode else None,
            first_chunk_frames=entry.first_chunk_frames,
            recompute_context=entry.recompute_context,
            context_encoder=self._context_encoder() if entry.recompute_context and decode else None,
            device=self._execution_device,
            graphs=self.graphs,
            pools=pools,
        )

    @torch.no_grad()
    def encode_prompt(self, prompts: Sequence[str]) -> TextContext:
        """Cross-attention context of one prompt per batch element."""
        return self.text_context(self._encoder().encode(prompts))

    def set_prompt(
        self,
        rollout: Rollout,
        prompts: Sequence[str],
        negative_prompt: str | None = None,
        switch: Switch = "keep",
    ) -> None:
        """Give a rollout one prompt per batch element from its next chunk on.

        Args:
            prompts: spelled as the model wants them.
            negative_prompt: what guidance leads away from, if the schedule guides the next chunk; by
                default the model's own contrast to each prompt.
            switch: what becomes of the history.
        """
        negative = None
        if rollout.schedule.guidance_at(rollout.chunk, 1.0) != 1:
            negative = self.encode_prompt(self._contrasts(prompts, negative_prompt))
        rollout.switch(self.encode_prompt(prompts), negative, switch, at_once=self.entry.recache_at_once)

    def _contrasts(self, prompts: Sequence[str], negative_prompt: str | None) -> list[str]:
        """What guidance leads away from, for each prompt."""
        grammar = self.config.prompt_grammar
        if negative_prompt is not None:
            return [self._spelled(negative_prompt)] * len(prompts)
        if grammar is None and self.entry.negative_prompt:
            return [self.entry.negative_prompt] * len(prompts)
        return [contrast_prompt(grammar)(prompt) for prompt in prompts]

    def _spelled(self, negative_prompt: str) -> str:
        """A negative prompt as the model wants it; without a grammar it may be empty."""
        return spelled_negative(negative_prompt, self.config.prompt_grammar)

    def _encoder(self) -> PromptEncoder:
        """What turns prompts into embeddings; of a text encoder that is a part of this pipeline, it."""
        if self.prompt_encoder is None:
            if self.text_encoder is None:
                raise InputError("this pipeline has no text encoder; give prompt_embeds")
            self.prompt_encoder = PromptEncoder(
                lambda: (self.tokenizer, self.text_encoder),
                self.entry.text_tokens,
                dtype=self.text_encoder.dtype,
                keep_loaded=True,
            )
        self.prompt_encoder.device = self._execution_device
        return self.prompt_encoder

    @torch.no_grad()
    def text_context(self, embeds: Tensor) -> TextContext:
        """Cross-attention context of embeddings (batch, tokens, width); equal ones share it."""
        width = self.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise InputError(
                f"prompt_embeds are {tuple(embeds.shape)}; this model takes (batch, tokens, {width})"
            )
        awaken(self.transformer)
        embeds = embeds.to(self._execution_device)
        return self._contexts.get(self.transformer, embeds, lambda: self.transformer.encode_text(embeds))

    def chunk_second(self, chunk: int) -> float:
        """When the first frame of a chunk is shown."""
        return (
            pixel_frames(latents_before(chunk, self.entry.chunk_frames, self.entry.first_chunk_frames))
            / self.fps
        )

    def _begin(
        self, prompt: PromptLike | list[str] | None, height: int | None, width: int | None,
        num_frames: int | None, schedule: FlowSchedule, generator: torch.Generator | None,
        seed: int | None, prompt_embeds: Tensor | None, cache: CacheSpec | str | None, decode: bool,
        negative_prompt: str | None = None,
    ) -> tuple[list[PromptSchedule], Rollout]:  # fmt: skip
        """The prompts of every batch element and a rollout before its first chunk."""
        if num_frames is not None and (not isinstance(num_frames, Integral) or num_frames < 1):
            raise InputError(f"num_frames={num_frames!r}: give a whole number, at least 1")
        prompts = _schedules(prompt, prompt_embeds, canonical_prompt(self.config.prompt_grammar))
        rollout = self.rollout(
            height, width, schedule=schedule, seed=_seed(seed, generator),
            batch=len(prompts) if prompts else _batch(prompt_embeds), cache=cache, decode=decode,
        )  # fmt: skip
        negative_prompts = [] if negative_prompt is None else [self._spelled(negative_prompt)]
        if prompt_embeds is not None:
            negative = None
            guided = rollout.schedule.guidance_at(0, 1.0) != 1
            if rollout.schedule.guidance != 1 or (guided and negative_prompts):
                wanted = negative_prompts or [self.entry.negative_prompt]
                negative = self.encode_prompt(wanted * len(rollout.seeds))
            rollout.set_text(self.text_context(prompt_embeds), negative)
        elif self.prompt_encoder is not None and not self.prompt_encoder.keep_loaded:
            # all at once, so that the text encoder is loaded once
            texts = [text for schedule in prompts for _, text in schedule.entries]
            guided = rollout.schedule.guidance_at(0, 1.0) != 1
            self.prompt_encoder.encode(texts + (self._contrasts(texts, negative_prompt) if guided else []))
        return prompts, rollout

    def _start(
        self, rollout: Rollout, image: Any, video: Any, num_frames: int | None, noise: str,
        latents: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Latents (1, f, c, h, w) of what the video begins with; the rest is checked against them."""
        start = None
        if image is not None or video is not None:
            start = self._encode_start(rollout, image, video, num_frames)
        if noise not in ("counter", "stock"):
            raise InputError(f"noise={noise!r}; choose counter or stock")
        if num_frames is None:
            if noise == "stock":
                raise InputError("stock noise is drawn for the whole video at once; give num_frames")
            if latents is not None:
                raise InputError("latents need num_frames: an endless stream has no whole noise")
            return start
        chunks = chunks_for(num_frames, rollout.chunk_frames, first=rollout.first_chunk_frames)
        frames = latents_before(chunks, rollout.chunk_frames, rollout.first_chunk_frames)
        # less than the first chunk is held inside it
        frames -= start.shape[1] if start is not None and start.shape[1] >= rollout.first_chunk_frames else 0
        wanted = (len(rollout.seeds), frames, *rollout.latent_size)
        if latents is not None and tuple(latents.shape) != wanted:
            raise InputError(f"latents are {tuple(latents.shape)}; {num_frames} frames need {wanted}")
        if noise == "stock":
            rollout.noise = StockNoise(
                rollout.seeds[0], frames, wanted[0], rollout.latent_size, rollout.device, rollout.dtype
            )
        return start

    def _encode_start(self, rollout: Rollout, image: Any, video: Any, num_frames: int | None) -> Tensor:
        if image is not None and video is not None:
            raise InputError("give either an image or a video to start from, not both")
        if len(rollout.seeds) != 1:
            raise InputError(f"an image or a video starts one video, not a batch of {len(rollout.seeds)}")
        rows, columns = rollout.latent_size[1:]
        stride = spatial_stride(self.entry)
        pixels = as_pixels(image if video is None else video, rows * stride, columns * stride)
        if image is not None and pixels.shape[1] != 1:
            raise InputError(f"image has {pixels.shape[1]} frames; a video to go on from is video=")
        if image is not None and not self.entry.image_held:
            # a chunk of its own, as for models with an independent first frame
            rollout.first_chunk_frames = 1
        if video is not None:
            # what has left the window is not worth encoding
            most = rollout.cache.spec.window
            used = usable_frames(pixels.shape[1], rollout.first_chunk_frames, rollout.chunk_frames, most)
            pixels = pixels[:, -used:]
        if num_frames is not None and num_frames <= pixels.shape[1]:
            raise InputError(
                f"num_frames={num_frames} counts the {pixels.shape[1]} frames that are given; ask for more"
            )
        awaken(self.vae)
        return encode_pixels(self.vae, pixels, rollout.device).to(rollout.dtype)

    def _context_encoder(self) -> Callable[[Tensor], Tensor] | None:
        """Pixels (b, h, w, 3) uint8 to latents (b, c, h, w), where the VAE has an encoder."""
        if not isinstance(self.vae, AutoencoderKLWan):
            return None
        return lambda pixels: encode_pixels(self.vae, pixels[:, None], pixels.device)[:, 0]

    def _spec(self, cache: CacheSpec | str | None) -> CacheSpec:
        if cache is None:
            return self.default_cache()
        return CacheSpec.parse(cache) if isinstance(cache, str) else cache

    def _schedule(self, num_inference_steps: int | None, guidance_scale: float | None) -> FlowSchedule:
        schedule = self.schedule
        if num_inference_steps is not None:
            schedule = schedule.with_steps(num_inference_steps)
        if guidance_scale is not None:
            if schedule.guidance == 1:
                schedule = replace(schedule, first_chunk_guidance=guidance_scale)
            else:
                schedule = replace(schedule, guidance=guidance_scale)
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


def spelled_negative(text: str, grammar: str | None) -> str:
    """A negative prompt as a model with this grammar wants it; free text may be empty.

    Raises:
        PromptError: nothing that the grammar knows.
    """
    return text if grammar is None and not text.strip() else canonical_prompt(grammar)(text)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
