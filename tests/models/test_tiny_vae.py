"""Tiny decoders against a frame-by-frame evaluation of the published layout, and streamed against whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.tiny import noise, randomise, relative_l2
from vidkv.errors import InputError, StateError
from vidkv.models.tiny_vae import StreamingTinyDecoder, TinyVideoDecoder, memory_shapes
from vidkv.models.vae import pixel_frames

CHANNELS = 4
KINDS: dict[str, dict[str, Any]] = {
    "Wan 2.1": {"channels": (8, 6, 4, 4)},
    "Wan 2.2": {"channels": (8, 6, 4, 4), "patch_size": 2},
    "Wan 2.2, large": {"channels": (8, 6, 4, 4), "patch_size": 2, "large": True},
    "denormalised": {
        "channels": (8, 6, 4, 4),
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 1.0, 2.0],
    },
    "all levels double": {"channels": (8, 6, 4, 4), "double_time": (True, True, True)},
}


def build(kind: str) -> TinyVideoDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVideoDecoder(latent_channels=CHANNELS, **KINDS[kind])
    randomise(model, spread=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest) -> TinyVideoDecoder:
    return build(request.param)


def latents_for(frames: int, batch: int = 2) -> Tensor:
    return 2 * noise(batch, frames, CHANNELS, 2, 3)


def evaluate(vae: TinyVideoDecoder, latents: Tensor) -> Tensor:
    """The published layout written down again, frame by frame: layers by their index in the file.

    Returns:
        (batch, 3, frames, height, width) in the files' own range, [0, 1], not clamped.
    """
    weights, config = vae.state_dict(), vae.config
    frames = [frame for frame in latents.unbind(1)]
    if config.latents_mean is not None:
        mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        frames = [x * deviation[:, None, None] + mean[:, None, None] for x in frames]

    def convolve(x: Tensor, name: str, **settings: Any) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **settings)

    def remember(i: int, frames: list[Tensor]) -> list[Tensor]:
        out = []
        for x, past in zip(frames, [torch.zeros_like(frames[0]), *frames[:-1]], strict=True):
            both = torch.cat([x, past], 1)
            name = f"decoder.{i}.conv"
            if config.large:
                y = convolve(both, f"{name}.0", padding=3, groups=both.shape[1])
                out.append(convolve(F.relu(convolve(y, f"{name}.1")), f"{name}.3") + x)
            else:
                y = F.relu(convolve(both, f"{name}.0", padding=1))
                y = F.relu(convolve(y, f"{name}.2", padding=1))
                out.append(F.relu(convolve(y, f"{name}.4", padding=1) + x))
        return out

    def split(i: int, frames: list[Tensor], double: bool) -> list[Tensor]:
        return [y for x in frames for y in convolve(x, f"decoder.{i}.conv").chunk(1 + double, 1)]

    if config.large:
        frames = [convolve(x, "decoder.0") for x in frames]
        for level, double in enumerate(config.double_time):
            start = 1 + 7 * level
            for i in range(start, start + 3):
                frames = remember(i, frames)
            frames = [F.relu(convolve(x, f"decoder.{start + 3}", padding=1)) for x in frames]
            frames = split(start + 6, [F.pixel_shuffle(x, 2) for x in frames], double)
    else:
        frames = [F.relu(convolve(3 * torch.tanh(x / 3), "decoder.1", padding=1)) for x in frames]
        for level, double in enumerate(config.double_time):
            start = 3 + 6 * level
            for i in range(start, start + 3):
                frames = remember(i, frames)
            frames = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames]
            frames = split(start + 4, frames, double)
            frames = [convolve(x, f"decoder.{start + 5}", padding=1) for x in frames]
        frames = [F.relu(x) for x in frames]
    frames = [convolve(x, "decoder.22", padding=1) for x in frames]
    p = config.patch_size
    frames = [rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p) for x in frames]
    return torch.stack(frames, 2)[:, :, 2 ** sum(config.double_time) - 1 :]


class TestNetwork:
    def test_computes_the_published_layout(self, vae: TinyVideoDecoder) -> None:
        latents = latents_for(5)
        wanted = 2 * evaluate(vae, latents) - 1
        found = vae(latents)
        assert float(wanted.std()) > 0.1
        assert relative_l2(found, wanted) <= 1e-5

    @pytest.mark.parametrize("frames", [1, 2, 5])
    def test_as_many_frames_as_the_full_decoder(self, frames: int) -> None:
        assert build("Wan 2.1")(latents_for(frames)).shape == (2, 3, pixel_frames(frames), 16, 24)
        assert build("Wan 2.2")(latents_for(frames)).shape == (2, 3, pixel_frames(frames), 32, 48)

    def test_it_is_causal(self, vae: TinyVideoDecoder) -> None:
        latents = latents_for(5)
        changed = latents.clone()
        changed[:, 3:] += 1
        before, after = vae(latents), vae(changed)
        kept = pixel_frames(3, vae.temporal_scale)
        assert torch.equal(before[:, :, :kept], after[:, :, :kept])
        assert not torch.equal(before[:, :, kept], after[:, :, kept])

    def test_published_sizes(self) -> None:
        """Tensors of `taew2_1`, `taew2_2` and `taew2_2_super`, by name."""
        with torch.device("meta"):
            first = TinyVideoDecoder().state_dict()
            second = TinyVideoDecoder(48, 2).state_dict()
            large = TinyVideoDecoder(48, 2, large=True).state_dict()
        assert first["decoder.1.weight"].shape == (256, 16, 3, 3)
        assert first["decoder.3.conv.0.weight"].shape == (256, 512, 3, 3)
        assert first["decoder.7.conv.weight"].shape == (256, 256, 1, 1)
        assert first["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
        assert first["decoder.22.bias"].shape == (3,)
        assert second["decoder.1.weight"].shape == (256, 48, 3, 3)
        assert second["decoder.22.weight"].shape == (12, 64, 3, 3)
        assert large["decoder.1.conv.0.weight"].shape == (1024, 1, 7, 7)
        assert large["decoder.21.conv.weight"].shape == (128, 64, 1, 1)

    def test_save_pretrained(self, vae: TinyVideoDecoder, tmp_path: Path) -> None:
        vae.save_pretrained(tmp_path)
        loaded = TinyVideoDecoder.from_pretrained(tmp_path)
        assert torch.equal(loaded(latents_for(2)), vae(latents_for(2)))


class TestStreaming:
    @pytest.mark.parametrize("chunks", [[6], [1] * 6, [3, 3], [1, 2, 3]], ids=str)
    def test_streams_the_whole_clip(self, vae: TinyVideoDecoder, chunks: list[int]) -> None:
        latents = latents_for(6)
        decoder = StreamingTinyDecoder(vae)
        found = torch.cat([decoder.decode(part) for part in latents.split(chunks, 1)], 2)
        assert relative_l2(found, vae(latents)) <= 1e-6

    def test_does_not_depend_on_chunks(self, vae: TinyVideoDecoder) -> None:
        """Bit for bit: frames pass the network one by one either way."""
        latents = latents_for(6)
        one, three = StreamingTinyDecoder(vae), StreamingTinyDecoder(vae)
        singles = torch.cat([one.feed(latents[:, i : i + 1]) for i in range(6)], 1)
        assert torch.equal(singles, torch.cat([three.feed(part) for part in latents.split(3, 1)], 1))

    def test_frames_are_bytes(self, vae: TinyVideoDecoder) -> None:
        latents = latents_for(3)
        frames = StreamingTinyDecoder(vae).feed(latents)
        wanted = rearrange(evaluate(vae, latents).clamp(0, 1) * 255, "b c f h w -> b f h w c")
        assert frames.dtype == torch.uint8 and frames.shape == wanted.shape
        assert float((frames.float() - wanted).abs().max()) <= 0.5 + 1e-2

    def test_never_looks_at_a_value(self, vae: TinyVideoDecoder) -> None:
        """Tensors without data pass: nothing is copied to the host, nothing branches on a number."""
        decoder = StreamingTinyDecoder(vae.to("meta"))
        for frames in (1, 3):
            assert decoder.feed(latents_for(frames).to("meta")).is_meta

    def test_half_precision(self) -> None:
        exact = StreamingTinyDecoder(build("Wan 2.1")).feed(latents_for(3)).int()
        half = StreamingTinyDecoder(build("Wan 2.1").bfloat16()).feed(latents_for(3)).int()
        assert 0 < float((exact - half).abs().float().mean()) < 8

    def test_other_latents(self) -> None:
        decoder = StreamingTinyDecoder(build("Wan 2.1"))
        decoder.feed(latents_for(1))
        with pytest.raises(InputError, match=r"takes \(batch, frames, 4"):
            decoder.feed(noise(2, 1, 5, 2, 3))
        with pytest.raises(InputError, match="follow"):
            decoder.feed(latents_for(1, batch=1))


class TestState:
    @pytest.mark.parametrize("fed", [0, 1, 4])
    def test_restore_and_copy_go_on_bit_for_bit(self, vae: TinyVideoDecoder, fed: int) -> None:
        from safetensors.torch import load, save

        latents = latents_for(7)
        source = StreamingTinyDecoder(vae)
        if fed:
            source.feed(latents[:, :fed])
        saved = save(source.state())
        copy, restored = source.copy(), StreamingTinyDecoder(vae)
        restored.feed(latents[:, 3:5])
        restored.restore(load(saved), (2, 2, 3))
        copy.feed(-latents[:, fed:])
        wanted = source.feed(latents[:, fed:])
        assert torch.equal(restored.feed(latents[:, fed:]), wanted)

    @pytest.mark.parametrize("damage", ["fed", "no fed", "missing", "surplus", "channels", "grid", "dtype"])
    def test_a_damaged_state_changes_nothing(self, vae: TinyVideoDecoder, damage: str) -> None:
        latents = latents_for(4)
        decoder, undisturbed = StreamingTinyDecoder(vae), StreamingTinyDecoder(vae)
        decoder.feed(latents[:, :2])
        undisturbed.feed(latents[:, :2])
        state, last = decoder.state(), "memory.8"
        changes: dict[str, Callable[[], object]] = {
            "fed": lambda: state.update(fed_frames=torch.tensor(-1)),
            "no fed": lambda: state.pop("fed_frames"),
            "missing": lambda: state.pop(last),
            "surplus": lambda: state.update({"memory.9": state[last]}),
            "channels": lambda: state.update({last: state[last][:, :-1]}),
            "grid": lambda: state.update({last: state[last].mT}),
            "dtype": lambda: state.update({last: state[last].double()}),
        }
        changes[damage]()
        with pytest.raises(StateError, match=r"fed_frames|memory"):
            decoder.restore(state)
        assert torch.equal(decoder.feed(latents[:, 2:]), undisturbed.feed(latents[:, 2:]))

    def test_a_state_of_another_grid(self) -> None:
        decoder = StreamingTinyDecoder(build("Wan 2.1"))
        decoder.feed(latents_for(1))
        with pytest.raises(StateError, match=r"memory\.0 is \(2, 8, 2, 3\), this one needs \(2, 8, 3, 2\)"):
            decoder.restore(decoder.state(), (2, 3, 2))
        restored = decoder.copy()
        with pytest.raises(InputError, match=r"\(1, 2, 3\) follow \(2, 2, 3\)"):
            restored.feed(latents_for(1, batch=1))

    def test_memory_does_not_grow(self, vae: TinyVideoDecoder) -> None:
        decoder = StreamingTinyDecoder(vae)
        sizes = []
        for _ in range(4):
            decoder.feed(latents_for(3))
            kept: Mapping[str, Tensor] = decoder.state()
            memory = [tensor for name, tensor in kept.items() if name.startswith("memory")]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in memory)
            sizes.append(sum(t.nbytes for t in memory))
        assert len(set(sizes)) == 1
        shapes = [(t.shape[1], t.shape[2] // 2) for t in memory]
        assert shapes == memory_shapes(vae)

    def test_reset_and_flush(self, vae: TinyVideoDecoder) -> None:
        decoder = StreamingTinyDecoder(vae)
        first = decoder.feed(latents_for(2))
        assert decoder.flush().shape == (0, 0, 0, 3)
        decoder.reset()
        assert torch.equal(decoder.feed(latents_for(2)), first)
