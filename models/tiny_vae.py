"""Tiny video decoders of the TAEHV kind (github.com/madebyollin/taehv): a stand-in for a video VAE's decoder.

A stack of 2-D convolutions. Blocks with memory also see their input of one frame ago, and a 1x1
convolution splits a frame into two, so it is causal and streams with one frame of memory per block.
The module's tensors have the names and shapes of the published files: `taew2_1` for Wan 2.1's latents,
`taew2_2` and `taew2_2_super` for Wan 2.2's, LightX2V's `lighttaew2_1` and `lighttaew2_2`.

TAEHV's files take latents as the transformer sees them. LightX2V's take them denormalised: there the
configuration holds the statistics. `vae_files.load_tiny_decoder` reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from vidkv.errors import StateError
from vidkv.models.vae import Statistics, as_bytes, check_latents, move

CHANNELS = {False: (256, 128, 64, 64), True: (512, 256, 128, 64)}
"""Of the four levels, by whether the decoder is a large one (`_super`)."""


class SoftClamp(nn.Module):
    """Latents to (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut; (frames, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class LargeMemoryBlock(nn.Module):
    """A wide depthwise convolution and a hidden layer, over a frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        both = 2 * channels
        self.conv = nn.Sequential(
            nn.Conv2d(both, both, 7, padding=3, groups=both, bias=False),
            nn.Conv2d(both, 2 * both, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * both, channels, 1, bias=False),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([x, before], 1)) + x
        return out


class SplitTime(nn.Module):
    """Every frame becomes `factor` of them."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "f (t c) h w -> (f t) c h w", t=self.factor)


def _plain_layers(
    inputs: int, outputs: int, channels: Sequence[int], double: Sequence[bool]
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        SoftClamp(),
        nn.Conv2d(inputs, channels[0], 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    for width, after, twice in zip(channels[:-1], channels[1:], double, strict=True):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), SplitTime(width, 1 + twice)]
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
    return [*layers, nn.ReLU(inplace=True), nn.Conv2d(channels[-1], outputs, 3, padding=1)]


def _large_layers(
    inputs: int, outputs: int, channels: Sequence[int], double: Sequence[bool]
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, channels[0], 1, bias=False)]
    for width, after, twice in zip(channels[:-1], channels[1:], double, strict=True):
        layers += [LargeMemoryBlock(width) for _ in range(3)]
        layers += [nn.Conv2d(width, 4 * after, 3, padding=1), nn.ReLU(inplace=True), nn.PixelShuffle(2)]
        layers += [SplitTime(after, 1 + twice)]
    return [*layers, nn.Conv2d(channels[-1], outputs, 3, padding=1)]


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    """Latents to pixels with a few million weights: 8x space, 16x with `patch_size` 2.

    Args:
        latent_channels: 16 for Wan 2.1, 48 for Wan 2.2's 5B model.
        patch_size: pixels per side that the last convolution yields at once.
        large: the layers of the `_super` files.
        channels: of the four levels; by default as published.
        double_time: which of the three levels doubles the frames.
        latents_mean, latents_std: per channel, where it takes denormalised latents; None where it takes
            them as the transformer sees them.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        large: bool = False,
        channels: Sequence[int] | None = None,
        double_time: Sequence[bool] = (False, True, True),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        build = _large_layers if large else _plain_layers
        widths = CHANNELS[large] if channels is None else channels
        self.decoder = nn.Sequential(*build(latent_channels, 3 * patch_size**2, widths, double_time))

    @property
    def temporal_scale(self) -> int:
        """Pixel frames per latent frame after the first, which yields one."""
        return int(2 ** sum(self.config.double_time))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode a whole clip at once; memory grows with it.

        Args:
            latents: (batch, frames, channels, height, width), as the transformer sees them.

        Returns:
            (batch, 3, pixel frames, height, width), nominally in [-1, 1].
        """
        statistics = Statistics(self.config.latents_mean, self.config.latents_std)
        pixels, _ = self.advance(statistics.denormalise(latents), None)
        return pixels[:, :, self.temporal_scale - 1 :]

    def advance(self, latents: Tensor, memory: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Decode latents that follow on what `memory` remembers; None at the start of a video.

        Args:
            latents: (batch, frames, channels, height, width), as this network takes them.

        Returns:
            (batch, 3, `temporal_scale` x frames, height, width), and the memory after them: the last
            input frame of every block with memory, (batch, channels, height, width). The first
            `temporal_scale` - 1 frames of a video are not part of it.
        """
        batch = latents.shape[0]
        x = latents.to(self.dtype).flatten(0, 1)
        after: list[Tensor] = []
        for layer in self.decoder:
            if not isinstance(layer, MemoryBlock | LargeMemoryBlock):
                x = layer(x)
                continue
            frames = torch.unflatten(x, 0, (batch, -1))
            first = torch.zeros_like(frames[:, 0]) if memory is None else memory[len(after)]
            after.append(frames[:, -1].clone())
            x = layer(x, torch.cat([first[:, None], frames[:, :-1]], 1).flatten(0, 1))
        if self.config.patch_size > 1:
            x = F.pixel_shuffle(x, self.config.patch_size)
        return rearrange(x, "(b f) c h w -> b c f h w", b=batch) * 2 - 1, after


class StreamingTinyDecoder:
    """`TinyVideoDecoder` fed piece by piece; used as `vae.StreamingDecoder` is."""

    def __init__(self, vae: TinyVideoDecoder) -> None:
        self.vae = vae
        self._statistics = Statistics(vae.config.latents_mean, vae.config.latents_std)
        self.reset()

    def reset(self) -> None:
        """Forget everything fed so far: the next latent frame is the first of a video."""
        self.finite = torch.tensor(True)
        self._memory: list[Tensor] | None = None
        self._fed_frames = 0
        self._grid: tuple[int, int, int] | None = None

    @torch.no_grad()
    def feed(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: (batch, frames, channels, height, width), as the transformer sees them.

        Returns:
            (batch, pixel frames, height, width, 3) uint8 on the latents' device.
        """
        pixels = self.decode(latents)
        self.finite = pixels.isfinite().all()
        return as_bytes(pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `feed`, before rounding: (batch, 3, pixel frames, height, width), nothing clamped."""
        self._grid = check_latents(latents, self.vae.config.latent_channels, self._grid)
        decoded = []
        # frame by frame from the start, so that no sum depends on how many were fed at once
        for frame in torch.split(self._statistics.denormalise(latents), 1, 1):
            pixels, self._memory = self.vae.advance(frame, self._memory)
            decoded.append(pixels if self._fed_frames else pixels[:, :, self.vae.temporal_scale - 1 :])
            self._fed_frames += 1
        return torch.cat(decoded, 2)

    def to(self, device: torch.device) -> None:
        """Move the memory, not the network. To the host it goes into pinned memory, unwaited for."""
        if self._memory is not None:
            self._memory = [move(tensor, device) for tensor in self._memory]

    def flush(self) -> Tensor:
        """The frames still held back: none in this family, (0, 0, 0, 3) uint8."""
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def state(self) -> dict[str, Tensor]:
        """The memory as named tensors, for safetensors."""
        tensors = {f"memory.{i}": tensor for i, tensor in enumerate(self._memory or ())}
        return tensors | {"fed_frames": torch.tensor(self._fed_frames)}

    def copy(self) -> StreamingTinyDecoder:
        """An independent decoder in the same state."""
        other = StreamingTinyDecoder(self.vae)
        other.restore(self.state())
        return other

    def restore(self, state: Mapping[str, Tensor], grid: tuple[int, int, int] | None = None) -> None:
        """Go on from a `state()`.

        Args:
            grid: (batch, height, width) of the latents to come; None takes what the state has.

        Raises:
            StateError: it is of another network or grid, or damaged; nothing has changed.
        """
        fed = state.get("fed_frames")
        if fed is None or fed.dtype != torch.int64 or fed.ndim or fed < 0:
            raise StateError(f"the saved decoder's fed_frames is {fed}, not a count; the state is damaged")
        first = state.get("memory.0")
        if grid is None and first is not None and first.ndim == 4:
            grid = first.shape[0], first.shape[2], first.shape[3]
        batch, height, width = grid or (0, 0, 0)
        wanted = {
            f"memory.{i}": (batch, channels, height * scale, width * scale)
            for i, (channels, scale) in enumerate(memory_shapes(self.vae))
            if fed
        }
        found = {name: tensor for name, tensor in state.items() if name != "fed_frames"}
        for name in sorted(set(found) | set(wanted)):
            shape = tuple(found[name].shape) if name in found else None
            if shape != wanted.get(name) or found[name].dtype != self.vae.dtype:
                raise StateError(
                    f"the saved decoder's {name} is {shape}, this one needs {wanted.get(name)} at "
                    f"{self.vae.dtype}; restore with the model and size it was saved with"
                )
        self._memory = [found[name].to(self.vae.device, copy=True) for name in wanted] if fed else None
        self._fed_frames = int(fed)
        self._grid = (batch, height, width) if fed else None


def memory_shapes(vae: TinyVideoDecoder) -> list[tuple[int, int]]:
    """(channels, rows per latent row) of the frame that each block with memory keeps, in order."""
    shapes, scale, channels = [], 1, 0
    for layer in vae.decoder:
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
        if isinstance(layer, nn.PixelShuffle):
            channels //= 4
        if isinstance(layer, nn.Upsample | nn.PixelShuffle):
            scale *= 2
        if isinstance(layer, MemoryBlock | LargeMemoryBlock):
            shapes.append((channels, scale))
    return shapes
