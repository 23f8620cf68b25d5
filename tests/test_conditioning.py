"""Pictures and videos to start from: what is accepted, and that they become the VAE's own latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import CHANNELS, HEIGHT, WIDTH, build_vae, generator, relative_l2
from vidkv.conditioning import (
    PIECE,
    as_pixels,
    encode_pixels,
    read_picture,
    read_video_end,
    usable_frames,
)
from vidkv.errors import InputError
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.vae import pixel_frames


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)


class TestPixels:
    def test_every_kind_is_the_same_video(self) -> None:
        wanted = pixels(1, 3, 8, 6, 3)
        pictures = [Image.fromarray(frame.numpy()) for frame in wanted[0]]
        for value in (wanted, wanted[0], wanted.numpy(), wanted[0].numpy(), pictures, tuple(pictures)):
            assert torch.equal(as_pixels(value, 8, 6), wanted)
        for value in (pictures[0], wanted[0, 0], wanted[0, 0].numpy()):
            assert torch.equal(as_pixels(value, 8, 6), wanted[:, :1])

    def test_transparency_and_grey_become_colours(self) -> None:
        grey = Image.fromarray(pixels(8, 6).numpy())
        assert torch.equal(as_pixels(grey, 8, 6), as_pixels(grey.convert("RGB"), 8, 6))
        clear = Image.fromarray(pixels(8, 6, 4).numpy())
        assert as_pixels(clear, 8, 6).shape == (1, 1, 8, 6, 3)

    @pytest.mark.parametrize("tensor", [True, False])
    def test_another_size_is_cropped_around_the_middle_not_stretched(self, tensor: bool) -> None:
        """Twice as wide as wanted: of four stripes the outer two go, the inner two stay in their places."""
        stripes = torch.zeros(16, 64, 3, dtype=torch.uint8)
        for i, value in enumerate((250, 50, 150, 250)):
            stripes[:, 16 * i : 16 * i + 16] = value
        value: Any = stripes if tensor else Image.fromarray(stripes.numpy())
        found = as_pixels(value, 8, 16)[0, 0, :, :, 0].float()
        assert found.shape == (8, 16)
        assert float((found[:, 2:6] - 50).abs().max()) < 2
        assert float((found[:, 10:14] - 150).abs().max()) < 2

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("picture.png", "is str; give PIL images"),
            (None, "is NoneType"),
            ([], "is list"),
            (torch.zeros(8, 6, 3), r"\(8, 6, 3\) torch.float32"),
            (np.zeros((8, 6, 3)), r"\(8, 6, 3\) torch.float64"),
            (torch.zeros(8, 6, dtype=torch.uint8), r"\(8, 6\) torch.uint8"),
            (torch.zeros(3, 8, 6, dtype=torch.uint8), r"\(3, 8, 6\); give \(frames, height, width, 3\)"),
            (torch.zeros(0, 8, 6, 3, dtype=torch.uint8), r"\(0, 8, 6, 3\)"),
            (torch.zeros(2, 1, 8, 6, 3, dtype=torch.uint8), r"\(2, 1, 8, 6, 3\)"),
        ],
    )
    def test_anything_else(self, value: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            as_pixels(value, 8, 6)


class TestEncoding:
    @pytest.mark.parametrize("frames", [1, 5, PIECE + 1, PIECE + 5, 2 * PIECE + 1])
    def test_equals_diffusers_encoder(self, frames: int) -> None:
        """Over the seams of the pieces too."""
        vae, given = build_vae(), pixels(1, frames, HEIGHT, WIDTH, 3)
        found = encode_pixels(vae, given, torch.device("cpu"))
        with torch.no_grad():
            raw = vae.encode((given.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        mean, deviation = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        wanted = ((raw - mean) / deviation).transpose(1, 2)
        assert found.shape == (1, 1 + (frames - 1) // 4, CHANNELS, HEIGHT // 8, WIDTH // 8)
        assert relative_l2(found, wanted) < 1e-5

    def test_a_decoder_alone_cannot(self) -> None:
        decoder = TinyVideoDecoder(latent_channels=CHANNELS, channels=(8, 6, 4, 4))
        with pytest.raises(InputError, match="TinyVideoDecoder cannot encode a picture"):
            encode_pixels(decoder, pixels(1, 1, HEIGHT, WIDTH, 3), torch.device("cpu"))


class TestUsableFrames:
    @pytest.mark.parametrize(("first", "chunk"), [(3, 3), (1, 3), (1, 1), (8, 8)])
    @pytest.mark.parametrize("most", [2, 9, 21])
    def test_the_longest_prefix_of_whole_chunks(self, first: int, chunk: int, most: int) -> None:
        whole = [pixel_frames(first + n * chunk) for n in range(40) if n == 0 or first + n * chunk <= most]
        for frames in range(1, 120):
            fitting = [count for count in whole if count <= frames]
            if fitting:
                assert usable_frames(frames, first, chunk, most) == max(fitting)
            else:
                with pytest.raises(InputError, match=f"has {frames} frames; .* at least {whole[0]}"):
                    usable_frames(frames, first, chunk, most)


class TestPictureFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        wanted = pixels(9, 7, 3)
        Image.fromarray(wanted.numpy()).save(tmp_path / "a.png")
        assert torch.equal(read_picture(tmp_path / "a.png"), wanted[None])

    def test_turned_upright(self, tmp_path: Path) -> None:
        """Orientation 6: the camera lay on its side, what is stored is to be turned clockwise."""
        stored = Image.fromarray(pixels(9, 7, 3).numpy())
        about = Image.Exif()
        about[0x0112] = 6
        stored.save(tmp_path / "a.png", exif=about)
        wanted = torch.from_numpy(np.array(stored).copy()).rot90(-1, (0, 1))
        assert torch.equal(read_picture(tmp_path / "a.png")[0], wanted)

    def test_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no image"):
            read_picture(tmp_path / "missing.png")
        Image.fromarray(pixels(64, 64, 3).numpy()).save(tmp_path / "whole.png")
        data = (tmp_path / "whole.png").read_bytes()
        for name, content in (
            ("text.png", b"hello"),
            ("empty.png", b""),
            ("cut.png", data[: len(data) // 2]),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(
                InputError, match=rf"{name} cannot be read as an image .*; give a PNG or JPEG"
            ):
                read_picture(tmp_path / name)
        with pytest.raises(InputError, match="cannot be read as an image"):
            read_picture(tmp_path)


def write_mp4(path: Path, frames: int) -> None:
    """Frames of one grey each, ten apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 32, 48, "yuv420p"
        for i in range(frames):
            picture = np.full((48, 32, 3), 20 + 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


class TestVideoFiles:
    @pytest.mark.parametrize(("asked", "got"), [(1, 1), (5, 5), (12, 12), (100, 12)])
    def test_the_end(self, tmp_path: Path, asked: int, got: int) -> None:
        write_mp4(tmp_path / "a.mp4", 12)
        found = read_video_end(tmp_path / "a.mp4", asked)
        assert found.shape == (got, 48, 32, 3) and found.dtype == torch.uint8
        greys = found.float().mean((1, 2, 3))
        wanted = torch.tensor([20.0 + 10 * i for i in range(12 - got, 12)])
        assert float((greys - wanted).abs().max()) < 4

    def test_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no video"):
            read_video_end(tmp_path / "missing.mp4", 5)
        write_mp4(tmp_path / "whole.mp4", 12)
        data = (tmp_path / "whole.mp4").read_bytes()
        for name, content in (
            ("text.mp4", b"hello"),
            ("empty.mp4", b""),
            ("cut.mp4", data[: len(data) // 2]),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=name):
                read_video_end(tmp_path / name, 5)

    def test_sound_alone(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        with pytest.raises(InputError, match="has no video stream"):
            read_video_end(tmp_path / "a.wav", 5)
