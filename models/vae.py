"""Streaming decode with diffusers' Wan VAEs: feed latent frames as they come, get pixel frames.

The first latent frame of a video becomes one pixel frame and every later one four (Wan 2.1). The
decoder is causal in time: each convolution keeps its last inputs, so feeding one frame at a time gives
what decoding the whole clip gives. diffusers' `decode` clears those caches at every call; this class
owns them instead. Both kinds work alike: Wan 2.1, and Wan 2.2 with residual blocks (a first latent frame
takes every shortcut once, later ones twice a level). `vae_decoders.streaming_decoder` picks the class for
a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanResample,
    patchify,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from einops import rearrange
from torch import Tensor

from vidkv.errors import InputError, StateError

REPLICATE = "Rep"


class StreamingDecoder:
    """Latents in, frames out, with memory that does not grow.

        decoder = StreamingDecoder(vae)
        for latents in chunks:
            frames = decoder.feed(latents)      # chunk 0 of three latent frames: 9; later ones: 12
        tail = decoder.flush()                  # this family holds nothing back: no frames

    Args:
        vae: a Wan VAE; its `latents_mean` and `latents_std` undo the model's normalisation.

    Attributes:
        finite: whether all of what `feed` decoded last was numbers, () bool on its device: as bytes NaN is a
            colour, and it stays in the memory of later frames.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae, self.finite = vae, torch.tensor(True)
        self._statistics = Statistics(vae.config.latents_mean, vae.config.latents_std)
        self.reset()

    def reset(self) -> None:
        """Forget everything fed so far: the next latent frame is the first of a video."""
        convolutions: int = self.vae._cached_conv_counts["decoder"]
        self._features: list[Tensor | str | None] = [None] * convolutions
        self._fed_frames = 0
        self._grid: tuple[int, int, int] | None = None

    @torch.no_grad()
    def feed(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: (batch, frames, channels, height, width), normalised as the transformer sees them.

        Returns:
            (batch, pixel frames, height, width, 3) uint8 on the latents' device.
        """
        pixels = self.decode(latents)
        self.finite = pixels.isfinite().all()
        return as_bytes(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `feed`, before rounding: (batch, 3, pixel frames, height, width), nothing clamped."""
        self._grid = check_latents(latents, self.vae.config.z_dim, self._grid)
        return self.pixels(self._statistics.denormalise(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode un-normalised latents (batch, frames, channels, h, w); nothing is clamped.

        Returns:
            (batch, 3, pixel frames, height, width), nominally in [-1, 1].
        """
        decoded = []
        for frame in torch.split(latents, 1, 1):
            # frame by frame from the start, so that no sum depends on how many were fed at once
            z = rearrange(frame, "b f c h w -> b c f h w").to(self.vae.dtype)
            first = self._fed_frames == 0
            z = self.vae.post_quant_conv(z)
            decoded.append(self.vae.decoder(z, feat_cache=self._features, feat_idx=[0], first_chunk=first))
            self._fed_frames += 1
        out = torch.cat(decoded, 2)
        if self.vae.config.patch_size is not None:
            out = unpatchify(out, patch_size=self.vae.config.patch_size)
        return out

    def to(self, device: torch.device) -> None:
        """Move the feature caches, not the network. To the host they go into pinned memory, unwaited for."""
        self._features = [move(f, device) if isinstance(f, Tensor) else f for f in self._features]

    def flush(self) -> Tensor:
        """The frames still held back: none in this family, (0, 0, 0, 3) uint8."""
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def state(self) -> dict[str, Tensor]:
        """The feature caches as named tensors, for safetensors."""
        tensors = {f"feature.{i}": f for i, f in enumerate(self._features) if isinstance(f, Tensor)}
        marks = [i for i, f in enumerate(self._features) if f == REPLICATE]
        tensors["replicate"] = torch.tensor(marks, dtype=torch.int64)
        tensors["fed_frames"] = torch.tensor(self._fed_frames)
        return tensors

    def copy(self) -> StreamingDecoder:
        """An independent decoder in the same state."""
        other = StreamingDecoder(self.vae)
        other.restore(self.state())
        return other

    def restore(self, state: Mapping[str, Tensor], grid: tuple[int, int, int] | None = None) -> None:
        """Go on from a `state()`.

        Args:
            grid: (batch, height, width) of the latents to come; None takes what the state has.

        Raises:
            StateError: it is of another VAE or grid, or damaged; nothing has changed.
        """
        fed, marks = state.get("fed_frames"), state.get("replicate")
        if fed is None or fed.dtype != torch.int64 or fed.ndim or fed < 0:
            raise StateError(f"the saved decoder's fed_frames is {fed}, not a count; the state is damaged")
        caches = feature_shapes(self.vae)
        wanted_marks = [i for i, (_, _, over_time) in enumerate(caches) if over_time] if fed == 1 else []
        if marks is None or marks.dtype != torch.int64 or marks.tolist() != wanted_marks:
            raise StateError(
                f"the saved decoder's replicate is {marks}, this VAE needs {wanted_marks} after {int(fed)} "
                "latent frames"
            )
        first = state.get("feature.0")
        if grid is None and first is not None and first.ndim == 5:
            grid = first.shape[0], first.shape[3], first.shape[4]
        batch, height, width = grid or (0, 0, 0)
        wanted = {
            f"feature.{i}": (batch, channels, min(int(fed), 2), int(height * scale), int(width * scale))
            for i, (channels, scale, _) in enumerate(caches)
            if fed and i not in wanted_marks
        }
        found = {name: tensor for name, tensor in state.items() if name.startswith("feature.")}
        for name in sorted(set(found) | set(wanted)):
            shape = tuple(found[name].shape) if name in found else None
            if shape != wanted.get(name) or found[name].dtype != self.vae.dtype:
                raise StateError(
                    f"the saved decoder's {name} is {shape}, this VAE needs {wanted.get(name)} at "
                    f"{self.vae.dtype}; restore with the model and size it was saved with"
                )
        features: list[Tensor | str | None] = [None] * len(self._features)
        for name, tensor in found.items():
            features[int(name.removeprefix("feature."))] = tensor.to(self.vae.device, copy=True)
        for i in wanted_marks:
            features[i] = REPLICATE
        self._features, self._fed_frames = features, int(fed)
        self._grid = (batch, height, width) if fed else None


def feature_shapes(vae: AutoencoderKLWan) -> list[tuple[int, float, bool]]:
    """What each causal convolution of the decoder keeps, in the order in which it is called.

    Returns:
        (channels, rows per latent row, whether the convolution is over time alone). Each keeps its last
        two input frames, after the first latent frame one, and those over time alone then none yet.
    """
    caches, scale = [], 1.0
    for module in vae.decoder.modules():
        if isinstance(module, WanResample):
            scale *= 2
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            # the resampler's own convolution, over time alone, runs before it enlarges
            over_time = module.kernel_size[1] == 1
            caches.append((module.in_channels, scale / 2 if over_time else scale, over_time))
    return caches


class Statistics:
    """Mean and deviation of each latent channel, on every device and in every precision used so far.

    Allocating them at each call would copy from the host and wait for it.

    Args:
        mean: per channel; None, with `deviation`, leaves latents as they are.
    """

    def __init__(self, mean: Sequence[float] | None, deviation: Sequence[float] | None) -> None:
        if (mean is None) != (deviation is None):
            raise InputError("give both latents_mean and latents_std, or neither")
        self._values = None if mean is None or deviation is None else (tuple(mean), tuple(deviation))
        self._ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def denormalise(self, latents: Tensor) -> Tensor:
        """What the transformer sees to what the VAE sees; (…, channels, height, width)."""
        if self._values is None:
            return latents
        mean, deviation = self._on(latents)
        return latents * deviation + mean

    def normalise(self, latents: Tensor) -> Tensor:
        """What the VAE sees to what the transformer sees; (…, channels, height, width)."""
        if self._values is None:
            return latents
        mean, deviation = self._on(latents)
        return (latents - mean) / deviation

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = like.device, like.dtype
        if key not in self._ready and self._values is not None:
            mean, deviation = (torch.tensor(v, device=key[0], dtype=key[1]) for v in self._values)
            self._ready[key] = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        return self._ready[key]


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What the transformer sees to what the VAE sees; (…, channels, height, width)."""
    return Statistics(vae.config.latents_mean, vae.config.latents_std).denormalise(latents)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What the VAE sees to what the transformer sees; (…, channels, height, width)."""
    return Statistics(vae.config.latents_mean, vae.config.latents_std).normalise(latents)


def as_bytes(pixels: Tensor) -> Tensor:
    """(batch, 3, frames, height, width), nominally in [-1, 1], to (batch, frames, height, width, 3) uint8."""
    scaled = pixels.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(scaled, "b c f h w -> b f h w c")


def check_latents(latents: Tensor, channels: int, grid: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(batch, height, width) of latents to decode.

    Args:
        grid: what the frames before them had; None if there were none.

    Raises:
        InputError: no (batch, frames, channels, height, width) of at least one frame, or another grid.
    """
    shape = tuple(latents.shape)
    if len(shape) != 5 or shape[2] != channels or 0 in shape:
        raise InputError(
            f"latents are {shape}; this decoder takes (batch, frames, {channels}, height, width)"
        )
    found = shape[0], shape[3], shape[4]
    if grid not in (None, found):
        raise InputError(
            f"latents of (batch, height, width) {found} follow {grid}; reset the decoder for another video"
        )
    return found


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, or the tensor where it is there; to the host pinned and without waiting."""
    if tensor.is_cuda and device.type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, non_blocking=True)


def pixel_frames(latent_frames: int, temporal_scale: int = 4) -> int:
    """Pixel frames that a video of so many latent frames has."""
    return max(0, temporal_scale * (latent_frames - 1) + 1)


def _convolve(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """A causal 3-D convolution; on a CPU as one 2-D convolution over stacked time taps.

    Equal up to rounding; oneDNN has far better 2-D than 3-D kernels at few channels, cuDNN has not.
    """
    taps, stride = conv.kernel_size[0], conv.stride[0]
    pad_w, _, pad_h, _, pad_t, _ = conv._padding
    if pad_t:
        x = F.pad(x, (0, 0, 0, 0, pad_t, 0))
    if x.is_cuda:
        return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, pad_h, pad_w))
    b, _, f, _, _ = x.shape
    stacked = torch.cat([x[:, :, k : f - taps + 1 + k : stride] for k in range(taps)], 1)
    out = F.conv2d(
        rearrange(stacked, "b c f h w -> (b f) c h w"),
        rearrange(conv.weight, "o i t h w -> o (t i) h w"),
        conv.bias,
        stride=conv.stride[1:],
        padding=(pad_h, pad_w),
    )
    return rearrange(out, "(b f) c h w -> b c f h w", b=b)


def _resample(module: WanResample, x: Tensor) -> Tensor:
    """A resampling layer over a whole clip; time is treated as the streaming caches treat it."""
    head, tail = x[:, :, :1], x[:, :, 1:]
    if module.mode == "upsample3d" and tail.shape[2]:
        doubled = _convolve(module.time_conv, tail)
        tail = rearrange(doubled, "b (two c) f h w -> b c (f two) h w", two=2)
        x = torch.cat([head, tail], 2)
    b = x.shape[0]
    x = module.resample(rearrange(x, "b c f h w -> (b f) c h w"))
    x = rearrange(x, "(b f) c h w -> b c f h w", b=b)
    if module.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], _convolve(module.time_conv, x)], 2)
    return x


@contextmanager
def whole_clip(vae: AutoencoderKLWan) -> Iterator[None]:
    """Within this context encoder and decoder take a whole clip in one pass instead of frame by frame.

    The same function as streaming (up to rounding), for training and for encoding many clips: a fifth
    of the kernel launches for 17 frames, and memory that grows with the clip.
    """
    if vae.config.is_residual:
        raise ValueError("Wan 2.2's residual VAE has no whole-clip pass; decode it with StreamingDecoder")
    patched = [m for m in vae.modules() if isinstance(m, WanCausalConv3d | WanResample)]
    for module in patched:
        convolution = isinstance(module, WanCausalConv3d)
        module.forward = partial(_convolve_call if convolution else _resample_call, module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _convolve_call(module: WanCausalConv3d, x: Tensor, cache_x: None = None) -> Tensor:
    return _convolve(module, x)


def _resample_call(module: WanResample, x: Tensor, *caches: object) -> Tensor:
    return _resample(module, x)


def encode_clip(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """Encode (batch, 3, 4n+1 frames, height, width) in [-1, 1] in one pass; latents (b, c, n+1, h, w)."""
    if vae.config.patch_size is not None:
        video = patchify(video, patch_size=vae.config.patch_size)
    with whole_clip(vae):
        moments = vae.quant_conv(vae.encoder(video))
    return DiagonalGaussianDistribution(moments)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode un-normalised (batch, channels, n, h, w) in one pass; nothing is clamped."""
    with whole_clip(vae):
        out = vae.decoder(vae.post_quant_conv(latents))
    if vae.config.patch_size is not None:
        out = unpatchify(out, patch_size=vae.config.patch_size)
    return out
