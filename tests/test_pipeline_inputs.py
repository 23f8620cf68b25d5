"""What a pipeline takes beside a prompt: pictures, videos, other decoders, weights, noise and guidance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.models.checkpoints.stock_files import ENTRY
from tests.tiny import (
    CHANNELS,
    HEIGHT,
    LATENT_SIZE,
    WIDTH,
    build_pipeline,
    generator,
    noise,
    randomise,
    relative_l2,
)
from vidkv import loading
from vidkv.conditioning import encode_pixels
from vidkv.errors import CheckpointError, InputError
from vidkv.models import registry
from vidkv.models.families.bounce import BOUNCE
from vidkv.models.text import encode_prompts
from vidkv.models.tiny_vae import StreamingTinyDecoder, TinyVideoDecoder
from vidkv.models.vae import StreamingDecoder
from vidkv.models.vae_tiles import TiledDecoder, Tiling
from vidkv.models.weights import precision_of
from vidkv.noise import StockNoise
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Chunk, Rollout

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
FREE = "a cat walks on the grass"
SIZE = {"height": HEIGHT, "width": WIDTH}
HELD = replace(BOUNCE, name="tiny-held", image_held=True)


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("VIDKV_HOME", str(home))
    for entry in (ENTRY, HELD):
        monkeypatch.setitem(registry.MODELS, entry.name, entry)
    return home


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def stock(saved: Path, tmp_path: Path) -> Path:
    """The same networks as a model that the user brings: free text, its encoder on demand."""
    folder = Path(shutil.copytree(saved, tmp_path / "stock-like"))
    index = folder / "model_index.json"
    settings = json.loads(index.read_text()) | {"model": ENTRY.name, "prompt_grammar": None}
    index.write_text(json.dumps(settings))
    return folder


def load(folder: Path, **kwargs: Any) -> CausalVideoPipeline:
    pipe = CausalVideoPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: CausalVideoPipeline, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    settings: dict[str, Any] = SIZE | {"num_frames": 21, "output_type": "latent"} | kwargs
    found: Tensor = pipe(prompt, **settings).frames
    return found


def frames_of(pipe: CausalVideoPipeline, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    return latents_of(pipe, prompt, **({"output_type": "pt"} | kwargs))


def picture(frames: int = 1, seed: int = 0) -> Tensor:
    """(frames, height, width, 3) of noise."""
    return torch.randint(0, 256, (frames, HEIGHT, WIDTH, 3), generator=generator(seed), dtype=torch.uint8)


def encoded(pipe: CausalVideoPipeline, pixels: Tensor) -> Tensor:
    return encode_pixels(pipe.vae, pixels[None], torch.device("cpu"))


class TestImage:
    def test_is_the_first_latent_frame_and_the_length_holds(self, pipe: CausalVideoPipeline) -> None:
        image = picture()
        for frames in (2, 14, 20):
            found = latents_of(pipe, image=image, num_frames=frames)
            assert relative_l2(found[:, :1], encoded(pipe, image)) < 1e-6
            assert frames_of(pipe, image=image, num_frames=frames).shape[1] == frames
        chunks = list(pipe.stream(PROMPT, **SIZE, image=image, num_frames=20))
        assert [(c.index, c.start_frame, c.latents.shape[1]) for c in chunks] == [
            (0, 0, 1),
            (1, 1, 3),
            (2, 4, 3),
        ]
        assert [c.frames.shape[1] for c in chunks if c.frames is not None] == [1, 12, 7]

    def test_what_follows_depends_on_it(self, pipe: CausalVideoPipeline) -> None:
        found, again, other = (latents_of(pipe, image=picture(seed=s)) for s in (0, 0, 1))
        assert torch.equal(found, again)
        assert relative_l2(found[:, 1:], other[:, 1:]) > 0.01

    def test_is_a_video_decoded_behind_it(self, pipe: CausalVideoPipeline) -> None:
        """The decoder saw the picture: its frames are those of all latents decoded at once."""
        found = frames_of(pipe, image=picture(), num_frames=13)
        latents = latents_of(pipe, image=picture(), num_frames=13)
        assert torch.equal(found, StreamingDecoder(pipe.vae).feed(latents))

    def test_pil_of_any_size(self, pipe: CausalVideoPipeline) -> None:
        given = Image.fromarray(picture()[0].numpy())
        assert torch.equal(latents_of(pipe, image=given), latents_of(pipe, image=picture()))
        wide = given.resize((3 * WIDTH, HEIGHT))
        assert latents_of(pipe, image=wide).shape == (1, 7, *LATENT_SIZE)

    def test_held_inside_the_first_chunk(self, pipe: CausalVideoPipeline) -> None:
        """Of a model trained so: chunks are as without it, and the given frame is exact."""
        held = build_pipeline(model=HELD.name)
        chunks = list(held.stream(PROMPT, **SIZE, image=picture(), num_frames=20))
        assert [c.latents.shape[1] for c in chunks] == [3, 3]
        assert relative_l2(chunks[0].latents[:, :1], encoded(held, picture())) < 1e-6
        free = latents_of(held, num_frames=9)
        assert torch.equal(free, latents_of(pipe, num_frames=9))
        assert relative_l2(chunks[0].latents[:, 1:], free[:, 1:]) > 0.01

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"image": picture(2)}, "image has 2 frames; a video to go on from is video="),
            ({"image": picture(), "video": picture(9)}, "either an image or a video"),
            ({"image": "a.png"}, "picture to start from is str"),
            ({"image": picture(), "num_frames": 1}, "num_frames=1 counts the 1 frames that are given"),
            ({"video": picture(9), "num_frames": 9}, "num_frames=9 counts the 9 frames that are given"),
            ({"video": picture(8)}, "has 8 frames; this model needs at least 9"),
            ({"image": picture(), "prompt": [PROMPT, OTHER]}, "not a batch of 2"),
            ({"noise": "white"}, "noise='white'; choose counter or stock"),
            ({"image": picture(), "latents": noise(1, 9, *LATENT_SIZE)}, r"need \(1, 6, 4, 4, 6\)"),
            ({"prompt_switch": "jump", "prompt": [(0, PROMPT), (0.5, OTHER)]}, "prompt switch 'jump'"),
        ],
    )
    def test_mistakes(self, pipe: CausalVideoPipeline, kwargs: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words):
            latents_of(pipe, **kwargs)

    def test_mistakes_are_found_when_a_stream_begins(self, pipe: CausalVideoPipeline) -> None:
        with pytest.raises(InputError, match="stock noise"):
            pipe.stream(PROMPT, **SIZE, noise="stock")
        with pytest.raises(InputError, match="latents need num_frames"):
            pipe.stream(PROMPT, **SIZE, latents=noise(1, 6, *LATENT_SIZE))


class TestVideo:
    @pytest.mark.parametrize(("given", "used"), [(9, 9), (10, 9), (20, 9), (21, 21), (100, 81)])
    @pytest.mark.parametrize("model", [BOUNCE.name, HELD.name])
    def test_its_end_is_the_beginning(self, given: int, used: int, model: str) -> None:
        """Whole chunks of it, no more than the window of 21 latent frames; also where images are held."""
        pipe, video = build_pipeline(model=model), picture(given)
        found = latents_of(pipe, video=video, num_frames=used + 12)
        wanted = encoded(pipe, video[-used:])
        assert found.shape[1] == wanted.shape[1] + 3
        assert relative_l2(found[:, :-3], wanted) < 1e-6
        assert frames_of(pipe, video=video, num_frames=used + 5).shape[1] == used + 5

    def test_frames_are_decoded_as_they_are_given(self, pipe: CausalVideoPipeline) -> None:
        found = frames_of(pipe, video=picture(21), num_frames=30)
        latents = encoded(pipe, picture(21))
        assert torch.equal(found[:, :21], StreamingDecoder(pipe.vae).feed(latents))

    def test_what_follows_sees_all_of_it(self, pipe: CausalVideoPipeline) -> None:
        early = picture(21)
        early[:5] = 255 - early[:5]
        found, other = (latents_of(pipe, video=v, num_frames=33) for v in (picture(21), early))
        assert relative_l2(found[:, 6:], other[:, 6:]) > 1e-4

    def test_latents_are_noise_of_generated_frames(self, pipe: CausalVideoPipeline) -> None:
        own = noise(1, 6, *LATENT_SIZE, seed=9)
        found = latents_of(pipe, video=picture(9), num_frames=33, latents=own)
        changed = own.clone()
        changed[:, 3:] *= -1
        other = latents_of(pipe, video=picture(9), num_frames=33, latents=changed)
        assert torch.equal(found[:, :6], other[:, :6])
        assert relative_l2(found[:, 6:], other[:, 6:]) > 0.01

    def test_prompts_change_after_it(self, pipe: CausalVideoPipeline) -> None:
        """The video lasts to frame 21: a prompt of second 1 acts at once, one of 1.4 a chunk later."""
        plain = latents_of(pipe, video=picture(21), num_frames=45)
        for second, kept in ((1.0, 6), (1.4, 9)):
            found = latents_of(pipe, [(0, PROMPT), (second, OTHER)], video=picture(21), num_frames=45)
            assert torch.equal(found[:, :kept], plain[:, :kept])
            assert not torch.equal(found[:, kept : kept + 3], plain[:, kept : kept + 3])


class TestPromptSwitch:
    SCHEDULE = ((0, PROMPT), (1.3, OTHER))

    def latents(self, pipe: CausalVideoPipeline, switch: Any) -> Tensor:
        return latents_of(pipe, list(self.SCHEDULE), num_frames=69, prompt_switch=switch)

    def test_ways_differ_after_the_switch_alone(self, pipe: CausalVideoPipeline) -> None:
        found = {way: self.latents(pipe, way) for way in ("keep", "recache", "flush", "lerp")}
        assert torch.equal(self.latents(pipe, None), found["keep"])
        ways = list(found)
        for i, one in enumerate(ways):
            for other in ways[i + 1 :]:
                assert torch.equal(found[one][:, :6], found[other][:, :6])
                assert not torch.equal(found[one][:, 6:9], found[other][:, 6:9]), (one, other)

    @pytest.mark.parametrize("way", ["keep", "flush"])
    def test_is_the_rollout_s(self, pipe: CausalVideoPipeline, way: Any) -> None:
        rollout = pipe.rollout(HEIGHT, WIDTH, decode=False)
        pipe.set_prompt(rollout, [PROMPT])
        parts = [rollout.step_chunk().latents for _ in range(2)]
        pipe.set_prompt(rollout, [OTHER], switch=way)
        parts += [rollout.step_chunk().latents for _ in range(4)]
        assert torch.equal(self.latents(pipe, way), torch.cat(parts, 1))

    def test_the_model_s_own_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        flushing = replace(BOUNCE, name="tiny-flush", prompt_switch="flush")
        monkeypatch.setitem(registry.MODELS, flushing.name, flushing)
        pipe = build_pipeline(model=flushing.name)
        assert torch.equal(self.latents(pipe, None), self.latents(pipe, "flush"))
        assert not torch.equal(self.latents(pipe, None), self.latents(pipe, "keep"))


class TestStockNoise:
    def test_draws_of_one_generator_in_order(self, pipe: CausalVideoPipeline) -> None:
        """All initial noise at once, then what each step but a chunk's last mixes in."""
        source = generator(5)
        first = torch.randn(1, 6, *LATENT_SIZE, generator=source)
        rollout = pipe.rollout(HEIGHT, WIDTH, decode=False)
        pipe.set_prompt(rollout, [PROMPT])
        parts = []
        for chunk in range(2):
            fresh = [torch.randn(3, *LATENT_SIZE, generator=source)[None]]
            own = first[:, 3 * chunk : 3 * chunk + 3]
            parts.append(rollout.step_chunk(noise=own, step_noise=fresh).latents)
        found = latents_of(pipe, noise="stock", seed=5)
        assert torch.equal(found, torch.cat(parts, 1))
        assert not torch.equal(found, latents_of(pipe, seed=5))

    def test_behind_an_image_it_is_drawn_for_what_is_generated(
        self, pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[int] = []
        monkeypatch.setattr(
            "vidkv.pipeline.StockNoise",
            lambda seed, frames, *rest: (drawn.append(frames), StockNoise(seed, frames, *rest))[1],
        )
        latents_of(pipe, noise="stock", image=picture(), num_frames=25)
        latents_of(pipe, noise="stock", video=picture(9), num_frames=33)
        assert drawn == [6, 6]


class TestTextOnDemand:
    @pytest.fixture
    def loads(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        found: list[Path] = []
        original = loading.load_text_encoder
        monkeypatch.setattr(
            loading,
            "load_text_encoder",
            lambda folder, options: (found.append(folder), original(folder, options))[1],
        )
        return found

    def test_the_same_video_without_the_encoder(self, stock: Path, own_home: Path, loads: list[Path]) -> None:
        pipe = load(stock)
        assert pipe.text_encoder is None and pipe.tokenizer is None and loads == []
        schedule = [(0, FREE), (0.5, OTHER)]
        found = latents_of(pipe, schedule)
        assert len(loads) == 1 and pipe.prompt_encoder is not None and not pipe.prompt_encoder.loaded
        assert len(list((own_home / "embeddings").glob("*.safetensors"))) == 2
        resident = load(stock, text="resident")
        assert resident.text_encoder is not None
        assert torch.equal(found, latents_of(resident, schedule))
        loads.clear()
        assert torch.equal(found, latents_of(load(stock), schedule))
        assert loads == []

    def test_negative_prompts_come_along(self, stock: Path, loads: list[Path]) -> None:
        found = latents_of(load(stock), FREE, guidance_scale=2.0, negative_prompt=OTHER)
        assert len(loads) == 1
        wanted = latents_of(load(stock, text="resident"), FREE, guidance_scale=2.0, negative_prompt=OTHER)
        assert torch.equal(found, wanted)
        assert not torch.equal(found, latents_of(load(stock), FREE))

    def test_mistakes_cost_no_loading(self, stock: Path, loads: list[Path]) -> None:
        with pytest.raises(InputError):
            latents_of(load(stock), "  ")
        with pytest.raises(InputError):
            latents_of(load(stock), FREE, num_frames=0)
        assert loads == []

    def test_the_embedded_model_on_demand(self, saved: Path, pipe: CausalVideoPipeline) -> None:
        found = load(saved, text="on_demand")
        assert found.text_encoder is None
        assert relative_l2(latents_of(found), latents_of(pipe)) < 1e-6

    def test_saved_again_it_says_what_is_missing(self, saved: Path) -> None:
        bare = load(saved, text_encoder=None, tokenizer=None)
        with pytest.raises(InputError, match="no text encoder; give prompt_embeds"):
            latents_of(bare)


class TestDecoders:
    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TinyVideoDecoder(latent_channels=CHANNELS, channels=(8, 6, 4, 4))
        randomise(model, spread=0.1)
        save_file(model.state_dict(), tmp_path / "taew2_1.safetensors")
        return tmp_path / "taew2_1.safetensors"

    def test_a_tiny_one(self, saved: Path, tiny: Path, pipe: CausalVideoPipeline) -> None:
        other = load(saved, vae_path=tiny)
        assert isinstance(other.vae, TinyVideoDecoder)
        latents = latents_of(other)
        assert torch.equal(latents, latents_of(pipe))
        found = frames_of(other)
        assert found.shape == (1, 21, HEIGHT, WIDTH, 3)
        assert torch.equal(found, StreamingTinyDecoder(other.vae).feed(latents))

    def test_it_cannot_take_a_picture(self, saved: Path, tiny: Path) -> None:
        with pytest.raises(InputError, match="TinyVideoDecoder cannot encode a picture; load the model with"):
            latents_of(load(saved, vae_path=tiny), image=picture())

    def test_of_other_latents(self, saved: Path, tmp_path: Path) -> None:
        model = TinyVideoDecoder(latent_channels=16, channels=(8, 6, 4, 4))
        save_file(model.state_dict(), tmp_path / "taew.safetensors")
        with pytest.raises((CheckpointError, InputError), match=r"16.*4|4.*16"):
            frames_of(load(saved, vae_path=tmp_path / "taew.safetensors"))

    def test_tiles(self, saved: Path, pipe: CausalVideoPipeline) -> None:
        other = load(saved)
        other.tiling = Tiling(2, 4)
        assert torch.equal(latents_of(other), latents_of(pipe))
        found = frames_of(other)
        tiled = TiledDecoder(lambda: StreamingDecoder(other.vae), Tiling(2, 4))
        assert torch.equal(found, tiled.feed(latents_of(pipe)))
        assert not torch.equal(found, frames_of(pipe))
        other.tiling = Tiling(LATENT_SIZE[1], LATENT_SIZE[2])
        assert torch.equal(frames_of(other), frames_of(pipe))


class TestWeights:
    @pytest.mark.parametrize(("weights", "bound"), [("fp8", 0.3), ("int8", 0.1)])
    def test_eight_bits_are_close(
        self, saved: Path, pipe: CausalVideoPipeline, weights: str, bound: float
    ) -> None:
        if weights == "int8":
            pytest.importorskip("torchao")
        narrow = load(saved, weights=weights, text_weights="full")
        assert precision_of(narrow.transformer) == weights
        assert precision_of(narrow.text_encoder) == "full"
        assert 1e-4 < relative_l2(latents_of(narrow), latents_of(pipe)) < bound

    def test_the_text_encoder_s_are_the_same_by_default(self, saved: Path) -> None:
        assert precision_of(load(saved, weights="fp8").text_encoder) == "fp8"

    def test_unknown(self, saved: Path) -> None:
        with pytest.raises(InputError, match="weights='int4'"):
            load(saved, weights="int4")


class TestGuidance:
    def test_throughout(self) -> None:
        """With a second cache: later chunks differ from those guided in the first chunk alone."""
        pipe, first = build_pipeline(guidance=3.0), build_pipeline(first_chunk_guidance=3.0)
        found, other = latents_of(pipe), latents_of(first)
        assert torch.equal(found[:, :3], other[:, :3])
        assert relative_l2(found[:, 3:], other[:, 3:]) > 0.001
        assert torch.equal(latents_of(pipe, guidance_scale=1.0), latents_of(build_pipeline()))
        assert torch.equal(latents_of(build_pipeline(guidance=2.0), guidance_scale=3.0), found)

    def test_negative_prompts(self) -> None:
        pipe = build_pipeline(guidance=3.0)
        found = latents_of(pipe)
        own = registry.contrast_prompt("bounce:wide")(PROMPT)
        assert torch.equal(latents_of(pipe, negative_prompt=own), found)
        assert relative_l2(latents_of(pipe, negative_prompt=OTHER)[:, 3:], found[:, 3:]) > 1e-4
        # led away from itself a prompt goes nowhere else
        same = latents_of(pipe, negative_prompt=PROMPT)
        assert relative_l2(same, latents_of(build_pipeline())) < 1e-5

    def test_the_model_s_own_negative_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = replace(ENTRY, name="tiny-negative", negative_prompt=OTHER)
        monkeypatch.setitem(registry.MODELS, entry.name, entry)
        pipe = build_pipeline(model=entry.name, guidance=3.0, prompt_grammar=None)
        assert torch.equal(latents_of(pipe), latents_of(pipe, negative_prompt=OTHER))
        assert not torch.equal(latents_of(pipe), latents_of(pipe, negative_prompt="a house"))

    def test_an_empty_negative_prompt(self) -> None:
        """Of free text it is what guidance leads away from anyway; a grammar has no empty sentence."""
        pipe = build_pipeline(guidance=3.0, prompt_grammar=None)
        assert torch.equal(latents_of(pipe, negative_prompt=""), latents_of(pipe))
        with pytest.raises(InputError, match="prompt is empty"):
            latents_of(build_pipeline(guidance=3.0), negative_prompt="")

    @pytest.mark.parametrize("settings", [{"guidance": 3.0}, {"first_chunk_guidance": 3.0}])
    def test_embeddings_instead_of_the_prompt(self, settings: dict[str, float]) -> None:
        pipe = build_pipeline(**settings)
        embeds = encode_prompts(pipe.tokenizer, pipe.text_encoder, [PROMPT])
        found = latents_of(pipe, None, prompt_embeds=embeds, negative_prompt=OTHER)
        assert torch.equal(found, latents_of(pipe, negative_prompt=OTHER))

    def test_behind_a_video(self) -> None:
        """The negative prompt's cache has the given frames too."""
        pipe = build_pipeline(guidance=3.0)
        found = latents_of(pipe, video=picture(9), negative_prompt=PROMPT)
        assert relative_l2(found, latents_of(build_pipeline(), video=picture(9))) < 1e-5
        assert relative_l2(latents_of(pipe, video=picture(9)), found) > 1e-4


class TestLora:
    def test_through_the_pipeline(self, saved: Path, pipe: CausalVideoPipeline, tmp_path: Path) -> None:
        """At scale s it is the model whose weights have s up down added."""
        name = "blocks.0.attn1.to_v"
        weight = pipe.transformer.get_parameter(f"{name}.weight")
        down, up = noise(2, weight.shape[1], seed=1), 0.3 * noise(weight.shape[0], 2, seed=2)
        file = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        save_file(file, tmp_path / "lora.safetensors")
        adapted, merged = load(saved), load(saved)
        adapted.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="own")
        for scale in (0.5, 1.0):
            adapted.set_adapters("own", scale)
            merged.transformer.load_state_dict({f"{name}.weight": weight + scale * up @ down}, strict=False)
            assert relative_l2(latents_of(adapted), latents_of(merged)) < 1e-5
            assert relative_l2(latents_of(adapted), latents_of(pipe)) > 0.001
        adapted.unload_lora_weights()
        assert torch.equal(latents_of(adapted), latents_of(pipe))


class TestOverlap:
    def test_is_of_no_effect_on_a_cpu(
        self, pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Rollout, "decode_later", lambda *args: pytest.fail("decoded later"))

        def stream(overlap: bool) -> Sequence[Chunk]:
            return list(pipe.stream(PROMPT, **SIZE, num_frames=30, overlap=overlap))

        for found, wanted in zip(stream(True), stream(False), strict=True):
            assert found.index == wanted.index and found.frames is not None and wanted.frames is not None
            assert torch.equal(found.frames, wanted.frames)
