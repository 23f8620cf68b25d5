"""Streaming decode is whole-clip decode is diffusers' decode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor

from tests.tiny import CHANNELS, build_vae, noise, relative_l2
from vidkv.errors import InputError, StateError
from vidkv.models.vae import (
    Statistics,
    StreamingDecoder,
    decode_clip,
    denormalise,
    encode_clip,
    normalise,
    pixel_frames,
    whole_clip,
)

VAES: dict[str, dict[str, Any]] = {
    "bounce": {},
    "no patches": {"patch_size": None, "in_channels": 3, "out_channels": 3},
    "time first": {"temperal_downsample": [True, False], "scale_factor_temporal": 2},
    "time last": {"temperal_downsample": [False, True], "scale_factor_temporal": 2},
    "one time step per latent": {"temperal_downsample": [False, False], "scale_factor_temporal": 1},
    "wider below": {"dim_mult": [1, 2, 2], "num_res_blocks": 2},
}
RESIDUAL = {"residual, Wan 2.2": {"is_residual": True, "decoder_base_dim": 4}}
HEIGHT, WIDTH = 2, 3


@pytest.fixture(params=VAES | RESIDUAL)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return build_vae(**(VAES | RESIDUAL)[request.param])


@pytest.fixture(params=VAES)
def plain_vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return build_vae(**VAES[request.param])


def latents_for(frames: int, batch: int = 2) -> Tensor:
    """Un-normalised, (batch, frames, channels, h, w)."""
    return noise(batch, frames, CHANNELS, HEIGHT, WIDTH)


def stock_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """diffusers' decode, (batch, 3, frames, h, w) in [-1, 1]."""
    with torch.no_grad():
        decoded: Tensor = vae.decode(rearrange(latents, "b f c h w -> b c f h w"), return_dict=False)[0]
    return decoded


def scale(vae: AutoencoderKLWan) -> int:
    return 2 ** sum(vae.config.temperal_downsample)


class TestDecode:
    @pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 3, 1], [1, 3, 3], [2, 5]], ids=str)
    def test_streams_what_diffusers_decodes(self, vae: AutoencoderKLWan, chunks: list[int]) -> None:
        """At float64: kernels that processors pick by layout sum float32 in other orders (3e-6 on some)."""
        vae, latents = vae.double(), latents_for(7).double()
        wanted = stock_decode(vae, latents)
        decoder, parts = StreamingDecoder(vae), []
        with torch.no_grad():
            for part in latents.split(chunks, 1):
                parts.append(decoder.pixels(part))
        found = torch.cat(parts, 2)
        assert float(wanted.std()) > 0.1
        assert relative_l2(found.clamp(-1, 1), wanted) <= 1e-12
        expected, before = [], 0
        for n in chunks:
            expected.append(pixel_frames(before + n, scale(vae)) - pixel_frames(before, scale(vae)))
            before += n
        assert [part.shape[2] for part in parts] == expected

    @pytest.mark.parametrize("kind", ["bounce", "residual, Wan 2.2"])
    def test_bit_for_bit_what_diffusers_decodes(self, kind: str) -> None:
        """Both take the frames one by one; widths and a grid that are no powers of two."""
        vae = build_vae(**(VAES | RESIDUAL)[kind], base_dim=6, z_dim=CHANNELS)
        latents = noise(1, 6, CHANNELS, 5, 7)
        decoder = StreamingDecoder(vae)
        with torch.no_grad():
            found = torch.cat([decoder.pixels(part) for part in latents.split([1, 2, 3], 1)], 2)
        assert torch.equal(found.clamp(-1, 1), stock_decode(vae, latents))

    def test_streaming_does_not_depend_on_chunks(self, vae: AutoencoderKLWan) -> None:
        """Bit for bit: frames pass the decoder one by one either way."""
        latents = latents_for(6)
        one, three = StreamingDecoder(vae), StreamingDecoder(vae)
        singles = torch.cat([one.feed(latents[:, i : i + 1]) for i in range(6)], 1)
        assert torch.equal(singles, torch.cat([three.feed(part) for part in latents.split(3, 1)], 1))

    def test_whole_clip(self, plain_vae: AutoencoderKLWan) -> None:
        vae = plain_vae
        latents = latents_for(5)
        with torch.no_grad():
            found = decode_clip(vae, rearrange(latents, "b f c h w -> b c f h w"))
        assert relative_l2(found.clamp(-1, 1), stock_decode(vae, latents)) <= 1e-5

    @pytest.mark.parametrize("frames", [1, 2])
    def test_whole_clip_of_few_frames(self, plain_vae: AutoencoderKLWan, frames: int) -> None:
        vae = plain_vae
        latents = latents_for(frames)
        with torch.no_grad():
            found = decode_clip(vae, rearrange(latents, "b f c h w -> b c f h w"))
        assert relative_l2(found.clamp(-1, 1), stock_decode(vae, latents)) <= 1e-5

    def test_frames_are_bytes_of_the_denormalised_latents(self, vae: AutoencoderKLWan) -> None:
        latents = latents_for(3)
        frames = StreamingDecoder(vae).feed(normalise(vae, latents))
        wanted = rearrange((stock_decode(vae, latents) + 1) * 127.5, "b c f h w -> b f h w c")
        assert frames.dtype == torch.uint8 and frames.shape == wanted.shape
        # half a level of rounding, and what normalising back and forth costs
        assert float((frames.float() - wanted).abs().max()) <= 0.5 + 1e-2
        assert frames.min() == 0 and frames.max() == 255, "some pixels are clamped"

    def test_a_batch_is_its_elements(self) -> None:
        vae = build_vae()
        latents = latents_for(3)
        both = StreamingDecoder(vae).feed(latents).int()
        for i in range(2):
            alone = StreamingDecoder(vae).feed(latents[i : i + 1]).int()
            assert int((both[i : i + 1] - alone).abs().max()) <= 1

    def test_half_precision(self) -> None:
        vae = build_vae()
        exact = StreamingDecoder(vae).feed(latents_for(3)).int()
        half = StreamingDecoder(build_vae().bfloat16()).feed(latents_for(3)).int()
        assert 0 < float((exact - half).abs().float().mean()) < 8


class TestFeed:
    def test_never_looks_at_a_value(self, vae: AutoencoderKLWan) -> None:
        """Tensors without data pass: nothing is copied to the host, nothing branches on a number."""
        vae = vae.to("meta")
        decoder = StreamingDecoder(vae)
        for frames in (1, 3):
            out = decoder.feed(latents_for(frames).to("meta"))
            assert out.is_meta and out.dtype == torch.uint8

    def test_statistics_are_allocated_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One allocation a call would copy from the host each time."""
        decoder = StreamingDecoder(build_vae())
        first = decoder.feed(latents_for(1))
        monkeypatch.setattr(torch, "tensor", None)
        decoder.feed(latents_for(3))
        decoder.reset()
        assert torch.equal(decoder.feed(latents_for(1)), first)

    def test_statistics_follow_precision(self) -> None:
        """A second precision gets its own, and the first keeps its."""
        statistics = Statistics([0.1], [1 / 3])
        exact = statistics.denormalise(torch.ones(1, 1, 1))
        assert statistics.denormalise(torch.ones(1, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert torch.equal(statistics.denormalise(torch.ones(1, 1, 1)), exact)
        assert float(exact) == pytest.approx(0.1 + 1 / 3)

    def test_without_statistics_latents_stay(self) -> None:
        x = noise(2, 3)
        assert torch.equal(Statistics(None, None).denormalise(x), x)
        assert torch.equal(Statistics(None, None).normalise(x), x)
        with pytest.raises(InputError, match="both latents_mean and latents_std"):
            Statistics([0.0], None)

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((1, 0, CHANNELS, 2, 3), "latents are (1, 0, 4, 2, 3)"),
            ((1, 2, CHANNELS + 1, 2, 3), "takes (batch, frames, 4, height, width)"),
            ((2, CHANNELS, 2, 3), "latents are (2, 4, 2, 3)"),
            ((1, 1, CHANNELS, 2, 3), "(1, 2, 3) follow (2, 2, 3)"),
            ((2, 1, CHANNELS, 3, 2), "(2, 3, 2) follow (2, 2, 3)"),
        ],
        ids=str,
    )
    def test_wrong_latents_change_nothing(self, shape: tuple[int, ...], words: str) -> None:
        latents = latents_for(3)
        decoder, undisturbed = StreamingDecoder(build_vae()), StreamingDecoder(build_vae())
        decoder.feed(latents[:, :1])
        undisturbed.feed(latents[:, :1])
        with pytest.raises(InputError, match=re.escape(words)):
            decoder.feed(torch.zeros(shape))
        assert torch.equal(decoder.feed(latents[:, 1:]), undisturbed.feed(latents[:, 1:]))

    def test_the_grid_is_part_of_the_state(self) -> None:
        decoder, other = StreamingDecoder(build_vae()), StreamingDecoder(build_vae())
        decoder.feed(latents_for(2))
        other.restore(decoder.state())
        with pytest.raises(InputError, match="follow"):
            other.feed(latents_for(1, batch=1))
        other.reset()
        assert other.feed(latents_for(1, batch=1)).shape[0] == 1


class TestStreamState:
    @pytest.mark.parametrize("fed", [0, 1, 2, 5])
    def test_restore_and_copy_go_on_bit_for_bit(self, vae: AutoencoderKLWan, fed: int) -> None:
        latents = latents_for(8)
        source = StreamingDecoder(vae)
        if fed:
            source.feed(latents[:, :fed])
        state = {name: tensor.clone() for name, tensor in source.state().items()}
        copy, restored = source.copy(), StreamingDecoder(vae)
        restored.feed(latents[:, 3:5])
        restored.restore(state)
        wanted = source.feed(latents[:, fed:])
        assert torch.equal(restored.feed(latents[:, fed:]), wanted)
        assert torch.equal(copy.feed(latents[:, fed:]), wanted)
        # taken before, not changed since
        assert all(torch.equal(state[name], tensor) for name, tensor in state.items())

    @pytest.mark.parametrize(
        "damage",
        [
            "fed",
            "no fed",
            "marks",
            "no marks",
            "feature",
            "surplus",
            "channels",
            "grid",
            "one frame",
            "dtype",
        ],
    )
    @pytest.mark.parametrize("fed", [1, 4])
    def test_a_damaged_state_changes_nothing(self, vae: AutoencoderKLWan, damage: str, fed: int) -> None:
        latents = latents_for(6)
        decoder, undisturbed = StreamingDecoder(vae), StreamingDecoder(vae)
        decoder.feed(latents[:, :fed])
        undisturbed.feed(latents[:, :fed])
        state = decoder.state()
        last = max(name for name in state if name.startswith("feature."))
        changes: dict[str, Callable[[], object]] = {
            "fed": lambda: state.update(fed_frames=torch.tensor(5 - fed)),
            "no fed": lambda: state.pop("fed_frames"),
            "marks": lambda: state.update(replicate=torch.tensor([0])),
            "no marks": lambda: state.pop("replicate"),
            "feature": lambda: state.pop(last),
            "surplus": lambda: state.update({"feature.999": state[last]}),
            "channels": lambda: state.update({last: state[last][:, :-1]}),
            "grid": lambda: state.update({last: state[last].mT}),
            "one frame": lambda: state.update({last: state[last][:, :, :0]}),
            "dtype": lambda: state.update({last: state[last].double()}),
        }
        changes[damage]()
        with pytest.raises(StateError, match=r"fed_frames|replicate|feature"):
            decoder.restore(state)
        assert torch.equal(decoder.feed(latents[:, fed:]), undisturbed.feed(latents[:, fed:]))

    def test_a_state_of_another_grid(self) -> None:
        decoder = StreamingDecoder(build_vae())
        decoder.feed(latents_for(3))
        with pytest.raises(StateError, match=r"feature\.0 is \(2, 4, 2, 2, 3\)"):
            decoder.restore(decoder.state(), (2, WIDTH, HEIGHT))
        decoder.restore(decoder.state(), (2, HEIGHT, WIDTH))

    def test_a_copy_is_independent(self) -> None:
        vae = build_vae()
        latents = latents_for(6)
        source = StreamingDecoder(vae)
        source.feed(latents[:, :2])
        copy = source.copy()
        copy.feed(-3 * latents[:, 2:])
        undisturbed = StreamingDecoder(vae)
        undisturbed.feed(latents[:, :2])
        assert torch.equal(source.feed(latents[:, 2:]), undisturbed.feed(latents[:, 2:]))

    def test_state_is_what_safetensors_takes(self, vae: AutoencoderKLWan) -> None:
        from safetensors.torch import load, save

        decoder = StreamingDecoder(vae)
        decoder.feed(latents_for(2))
        state = load(save({k: v.contiguous() for k, v in decoder.state().items()}))
        other = StreamingDecoder(vae)
        other.restore(state)
        latents = latents_for(5)[:, 2:]
        assert torch.equal(other.feed(latents), decoder.feed(latents))

    def test_reset_begins_a_new_video(self, vae: AutoencoderKLWan) -> None:
        latents = latents_for(3)
        decoder = StreamingDecoder(vae)
        first = decoder.feed(latents)
        assert not torch.equal(decoder.feed(latents)[:, -first.shape[1] :], first)
        decoder.reset()
        assert torch.equal(decoder.feed(latents), first)

    def test_memory_does_not_grow(self) -> None:
        decoder = StreamingDecoder(build_vae())
        sizes = []
        for _ in range(6):
            decoder.feed(latents_for(2))
            tensors = [t for t in decoder.state().values() if t.is_floating_point()]
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors), "no cache holds a clip"
            sizes.append(sum(t.nbytes for t in tensors))
        assert len(set(sizes[1:])) == 1

    def test_flush_has_nothing_left(self) -> None:
        decoder = StreamingDecoder(build_vae())
        decoder.feed(latents_for(2))
        assert decoder.flush().shape == (0, 0, 0, 3)

    def test_diffusers_own_caches_are_left_alone(self) -> None:
        """A decode in between does not disturb the stream, nor the stream the decode."""
        vae = build_vae()
        latents = latents_for(4)
        decoder, undisturbed = StreamingDecoder(vae), StreamingDecoder(vae)
        decoder.feed(latents[:, :2])
        undisturbed.feed(latents[:, :2])
        before = stock_decode(vae, latents)
        assert torch.equal(decoder.feed(latents[:, 2:]), undisturbed.feed(latents[:, 2:]))
        assert torch.equal(stock_decode(vae, latents), before)


class TestEncode:
    # diffusers' encode walks in steps of four frames, so the others cannot be compared
    @pytest.mark.parametrize("kind", ["bounce", "no patches", "wider below"])
    @pytest.mark.parametrize("latent_frames", [1, 2, 4])
    def test_equals_diffusers(self, kind: str, latent_frames: int) -> None:
        vae = build_vae(**VAES[kind])
        stride = 4 * (vae.config.patch_size or 1)
        video = noise(2, 3, pixel_frames(latent_frames), HEIGHT * stride, WIDTH * stride).tanh()
        with torch.no_grad():
            wanted = vae.encode(video, return_dict=False)[0].parameters
            found = encode_clip(vae, video).parameters
        assert found.shape == (2, 2 * CHANNELS, latent_frames, HEIGHT, WIDTH)
        assert relative_l2(found, wanted) <= 1e-5

    def test_residual_vaes_have_no_whole_clip_pass(self) -> None:
        vae = build_vae(**RESIDUAL["residual, Wan 2.2"])
        with pytest.raises(ValueError, match="StreamingDecoder"):
            decode_clip(vae, rearrange(latents_for(2), "b f c h w -> b c f h w"))
        with pytest.raises(ValueError, match="StreamingDecoder"):
            encode_clip(vae, noise(1, 3, 5, 16, 24))

    def test_the_patches_are_undone(self, plain_vae: AutoencoderKLWan) -> None:
        """After the context, however it ends, the model is diffusers' again."""
        vae = plain_vae
        before = stock_decode(vae, latents_for(2))
        forwards = {name: module.forward for name, module in vae.named_modules()}
        with pytest.raises(KeyError), whole_clip(vae):
            raise KeyError
        assert all(module.forward == forwards[name] for name, module in vae.named_modules())
        assert torch.equal(stock_decode(vae, latents_for(2)), before)

    def test_gradients_flow(self) -> None:
        """Training goes through the whole-clip pass."""
        vae = build_vae().requires_grad_(True)
        latents = rearrange(latents_for(2), "b f c h w -> b c f h w").requires_grad_()
        decode_clip(vae, latents).square().mean().backward()
        assert latents.grad is not None and float(latents.grad.abs().min()) > 0
        named = dict(vae.decoder.named_parameters())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in named.values())


class TestNormalisation:
    def test_per_channel(self) -> None:
        vae = build_vae()
        x = noise(2, 3, CHANNELS, 2, 2)
        for c, (mean, deviation) in enumerate(
            zip(vae.config.latents_mean, vae.config.latents_std, strict=True)
        ):
            torch.testing.assert_close(denormalise(vae, x)[:, :, c], x[:, :, c] * deviation + mean)
        torch.testing.assert_close(normalise(vae, denormalise(vae, x)), x)

    def test_pixel_frames(self) -> None:
        assert [pixel_frames(n) for n in (0, 1, 2, 3, 21)] == [0, 1, 5, 9, 81]
        assert [pixel_frames(n, 2) for n in (0, 1, 4)] == [0, 1, 7]
