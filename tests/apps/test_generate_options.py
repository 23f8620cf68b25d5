"""`vidkv generate`: what it takes beside a prompt and a length, and every mistake in it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import save_file

from tests.apps.commandline import run
from tests.models.checkpoints.stock_files import ENTRY
from tests.tiny import CHANNELS, HEIGHT, WIDTH, build_pipeline, noise, randomise
from vidkv.apps import generate as generating
from vidkv.models import registry
from vidkv.models.tiny_vae import TinyVideoDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.planning import plan
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import probe, read_metadata

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
TINY_SIZE = ("--height", str(HEIGHT), "--width", str(WIDTH), "--seconds", "1.3")

pytestmark = pytest.mark.usefixtures("short_first_chunk")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VIDKV_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(registry.MODELS, ENTRY.name, ENTRY)
    # the command line switches bars off before the libraries are imported, which is too late here
    monkeypatch.setattr(logging, "_tqdm_active", False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of the shipped model, of another prompt and seed than the tests ask for."""
    return shipped(tmp_path_factory.mktemp("source") / "source.mp4", OTHER, 1.5, 11)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the tests would get without something to start from."""
    return pictures(shipped(tmp_path_factory.mktemp("plain") / "plain.mp4", PROMPT, 30 / 16, 3))


def shipped(out: Path, prompt: str, seconds: float, seed: int) -> Path:
    request = VideoRequest(prompt=prompt, seconds=seconds, seed=seed)
    generating.generate(plan(request, EngineSettings(device="cpu")), out, lambda *progress: None, 0.0)
    return out


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    name = "transformer.blocks.0.attn1.to_v.lora"
    path = tmp_path / "style.safetensors"
    save_file({f"{name}_A.weight": noise(2, 48, seed=1), f"{name}_B.weight": noise(48, 2, seed=2)}, path)
    return path


@pytest.fixture
def tiny_vae(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "taew2_1.safetensors", CHANNELS)


def write_tiny(path: Path, channels: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyVideoDecoder(latent_channels=channels, channels=(8, 6, 4, 4))
    randomise(model, spread=0.1)
    save_file(model.state_dict(), path)
    return path


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return found.astype(np.float32)


class Command:
    """`vidkv generate` in a folder of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, model: Path | None) -> None:
        self.capsys, self.folder, self.made = capsys, folder, 0
        self.model = () if model is None else ("--model", str(model), *TINY_SIZE)

    def __call__(self, *more: str, prompt: str = PROMPT) -> dict[str, Any]:
        self.made += 1
        out = self.folder / f"out{self.made}.mp4"
        code, stdout, stderr = run(
            self.capsys,
            "generate",
            prompt,
            "--out",
            str(out),
            "--json",
            "--device",
            "cpu",
            *self.model,
            *more,
        )
        assert code == 0, stderr
        result: dict[str, Any] = json.loads(stdout)
        assert probe(out).frames == result["frames"]
        return result | {"path": out}

    def refused(self, *more: str, prompt: str = PROMPT) -> str:
        """The one line that a mistake costs; nothing stays behind."""
        before = sorted(self.folder.iterdir())
        out = self.folder / "refused.mp4"
        code, stdout, stderr = run(
            self.capsys, "generate", prompt, "--out", str(out), "--device", "cpu", *self.model, *more
        )
        assert (code, stdout) == (2, ""), stderr
        lines = stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vidkv: "), stderr
        assert sorted(self.folder.iterdir()) == before
        return lines[0]


@pytest.fixture
def bounce(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    folder = tmp_path / "out"
    folder.mkdir()
    return Command(capsys, folder, None)


@pytest.fixture
def tiny(capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: Path) -> Command:
    folder = tmp_path / "out"
    folder.mkdir()
    return Command(capsys, folder, saved)


class TestStart:
    """On the shipped model, whose VAE knows what pictures of its world look like."""

    def test_an_image_is_the_first_frame(
        self, bounce: Command, source: Path, plain: np.ndarray, tmp_path: Path
    ) -> None:
        image = pictures(source)[20]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.png")
        found = bounce("--image", str(tmp_path / "a.png"), "--seconds", "1", "--seed", "3")
        assert (found["frames"], found["chunks"]) == (16, 3)
        near, far = np.abs(pictures(found["path"])[0] - image).mean(), np.abs(plain[0] - image).mean()
        assert near < 3 and near < far / 4
        assert read_metadata(found["path"])["image"] == "a.png"

    def test_a_video_goes_on(self, bounce: Command, source: Path, plain: np.ndarray) -> None:
        """Of 24 frames the last 21 are whole chunks; they are part of the result."""
        given = pictures(source)[-21:]
        found = bounce("--video", str(source), "--seconds", str(30 / 16), "--seed", "3")
        assert (found["frames"], found["chunks"]) == (30, 3)
        made = pictures(found["path"])
        near, far = (np.abs(video[:21] - given).mean() for video in (made, plain))
        assert near < 3 and near < far / 4
        # what follows goes on from where the video ended
        assert np.abs(made[21] - made[20]).mean() < np.abs(plain[21] - made[20]).mean() / 2

    def test_prompts_change_at_the_chunks_that_an_image_makes(self, tiny: Command, tmp_path: Path) -> None:
        """Chunks begin at frames 0, 1 and 13: second 0.8 is in time, though not without the image."""
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8)).save(tmp_path / "a.png")
        image = ("--image", str(tmp_path / "a.png"))
        at = ("--prompt-at", f"0.8:{OTHER}")
        assert tiny(*image, *at)["latents_sha256"] != tiny(*image)["latents_sha256"]
        assert "second 0.8 would never be shown" in tiny.refused(*at)

    def test_mistakes(self, tiny: Command, tmp_path: Path, source: Path, tiny_vae: Path) -> None:
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / "a.png")
        image, text = str(tmp_path / "a.png"), tmp_path / "text.png"
        text.write_text("no picture")
        assert "either an image or a video to start from, not both" in tiny.refused(
            "--image", image, "--video", str(source)
        )
        assert "there is no file missing.png" in tiny.refused("--image", "missing.png")
        assert "there is no file missing.mp4" in tiny.refused("--video", "missing.mp4")
        assert "text.png cannot be read as an image" in tiny.refused("--image", str(text))
        assert "text.png cannot be read as a video" in tiny.refused("--video", str(text))
        assert "cannot be read as an image" in tiny.refused("--image", str(tmp_path))
        assert "cannot be read as a video" in tiny.refused("--video", str(tmp_path))
        assert "num_frames=21 counts the 21 frames" in tiny.refused("--video", str(source))
        assert "cannot encode a picture" in tiny.refused("--image", image, "--vae", str(tiny_vae))


class TestChoices:
    def test_each_changes_the_video_and_the_metadata(self, tiny: Command) -> None:
        plain = tiny()["latents_sha256"]
        options = {
            "noise": ("stock",),
            "weights": ("fp8",),
            "guidance": ("3",),
            "negative": (OTHER, "--guidance", "3"),
        }
        seen = {plain}
        for name, (value, *more) in options.items():
            found = tiny(f"--{name}", value, *more)
            about = read_metadata(found["path"])[name]
            assert about == (value if name != "guidance" else "3.0")
            seen.add(found["latents_sha256"])
        assert len(seen) == 5

    def test_text_weights_alone(self, tiny: Command) -> None:
        both, text = tiny("--weights", "fp8"), tiny("--text-weights", "fp8")
        mixed = tiny("--weights", "fp8", "--text-weights", "full")
        assert len({r["latents_sha256"] for r in (both, text, mixed)}) == 3

    def test_switches(self, tiny: Command) -> None:
        at = ("--seconds", "2.5", "--prompt-at", f"1.3:{OTHER}")
        found = {way: tiny(*at, "--switch", way) for way in ("keep", "recache", "flush", "lerp")}
        assert len({r["latents_sha256"] for r in found.values()}) == 4
        assert read_metadata(found["lerp"]["path"])["switch"] == "lerp"

    def test_loras_act_with_their_scales(self, tiny: Command, lora: Path) -> None:
        """Two of half the strength are one; one of half the strength is not."""
        files = ((f"{lora}",), (f"{lora}:0.5", "--lora", f"{lora}:0.5"), (f"{lora}:0.5",))
        made = [tiny("--lora", *arguments) for arguments in files]
        whole, twice, half = (pictures(result["path"]) for result in made)
        assert np.abs(whole - twice).mean() < np.abs(whole - half).mean() / 20
        assert read_metadata(made[1]["path"])["loras"] == f"{lora.name}:0.5; {lora.name}:0.5"

    def test_another_decoder_and_tiles_change_pictures_not_latents(
        self, tiny: Command, tiny_vae: Path
    ) -> None:
        plain, other, tiled = tiny(), tiny("--vae", str(tiny_vae)), tiny("--tile", "2x4")
        assert len({r["latents_sha256"] for r in (plain, other, tiled)}) == 1
        assert np.abs(pictures(other["path"]) - pictures(plain["path"])).mean() > 5
        assert np.abs(pictures(tiled["path"]) - pictures(plain["path"])).mean() > 0.1
        assert read_metadata(tiled["path"])["tile"] == "(2, 4)"

    def test_only_lasting_guidance_takes_a_second_cache(self, saved: Path, tmp_path: Path) -> None:
        lasting = Path(shutil.copytree(saved, tmp_path / "lasting"))
        index = lasting / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"guidance": 2.0}))

        def need(folder: Path, guidance: float | None) -> int:
            request = VideoRequest(prompt=PROMPT, seconds=1.0, model=str(folder), guidance=guidance)
            return plan(request, EngineSettings(device="cpu")).need_bytes

        assert need(saved, 3.0) == need(saved, None) == need(lasting, 1.0)
        assert need(lasting, None) == need(lasting, 3.0) > need(saved, None)

    def test_compile_compiles_the_blocks(self, tiny: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[int] = []
        monkeypatch.setattr(
            CausalWanTransformer3DModel, "compile_blocks", lambda self: compiled.append(len(self.blocks))
        )
        tiny()
        assert compiled == []
        tiny("--compile")
        assert compiled == [2]

    def test_the_text_encoder_comes_when_it_is_needed(
        self, tiny: Command, saved: Path, tmp_path: Path, own_home: Path
    ) -> None:
        """Of a model that the user brings, unless nothing is to be offloaded; the video is the same."""
        stock = Path(shutil.copytree(saved, tmp_path / "stock-like"))
        index = stock / "model_index.json"
        settings = {"model": ENTRY.name, "prompt_grammar": None}
        index.write_text(json.dumps(json.loads(index.read_text()) | settings))
        chosen = ("--model", str(stock))
        resident = tiny(*chosen, "--offload", "none", prompt="a cat")
        assert not own_home.exists()
        on_demand = tiny(*chosen, prompt="a cat")
        assert len(list((own_home / "embeddings").iterdir())) == 1
        assert on_demand["latents_sha256"] == resident["latents_sha256"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--switch", "jump"), "switch='jump': input should be 'keep'"),
            (("--noise", "white"), "noise='white': input should be 'counter'"),
            (("--offload", "disk"), "offload='disk'; choose none, text, model, group"),
            (("--offload", "model"), "offload=model moves networks off a GPU, and this runs on the CPU"),
            (("--offload", "group"), "offload=group moves networks off a GPU"),
            (("--weights", "int3"), "weights='int3'; choose full, fp8, int8"),
            (("--text-weights", "half"), "weights='half'; choose full, fp8, int8"),
            (("--tile", "32"), "--tile '32' is not ROWSxCOLUMNS, such as 32x32"),
            (("--tile", "axb"), "--tile 'axb' is not ROWSxCOLUMNS"),
            (("--tile", "-4x4"), "--tile '-4x4' is not ROWSxCOLUMNS"),
            (("--tile", "1x8"), "a tile of 1 x 8 latents; it needs at least 2 x 2"),
            (("--guidance", "0.5"), "guidance scale 0.5 must be finite and at least 1"),
            (("--guidance", "nan"), "guidance=nan: input should be a finite number"),
            (("--guidance", "2", "--negative", "a zebra"), "unknown word 'zebra'"),
            (("--lora", "missing.safetensors:0.5"), "there is no file missing.safetensors"),
            (("--lora", "missing.safetensors:strong"), "there is no file missing.safetensors:strong"),
            (("--vae", "missing.safetensors"), "there is no file missing.safetensors"),
        ],
    )
    def test_are_one_line(self, tiny: Command, arguments: tuple[str, ...], message: str) -> None:
        assert message in tiny.refused(*arguments)

    @pytest.mark.parametrize("scale", ["nan", "inf"])
    def test_a_scale_that_is_no_number(self, tiny: Command, lora: Path, scale: str) -> None:
        assert f"a LoRA weight of {scale} for {lora} cannot be used" in tiny.refused(
            "--lora", f"{lora}:{scale}"
        )

    def test_files_of_other_kinds(self, tiny: Command, lora: Path, tmp_path: Path) -> None:
        """A pickle is never opened, whatever its name."""
        torn = tmp_path / "torn.safetensors"
        torn.write_bytes(lora.read_bytes()[:100])
        for name in ("lora.pt", "lora.safetensors", "taew.pth", "vae.safetensors"):
            trap = tmp_path / name
            trap.write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
            option = "--lora" if "lora" in name else "--vae"
            assert name in tiny.refused(option, str(trap))
        assert not (tmp_path / "opened").exists()
        assert "torn.safetensors" in tiny.refused("--lora", str(torn))
        assert "torn.safetensors" in tiny.refused("--vae", str(torn))

    def test_of_other_models(self, tiny: Command, tiny_vae: Path, lora: Path, tmp_path: Path) -> None:
        assert "taew2_1.safetensors" in tiny.refused("--lora", str(tiny_vae))
        assert "style.safetensors" in tiny.refused("--vae", str(lora))
        wide = tmp_path / "wide.safetensors"
        name = "transformer.blocks.0.attn1.to_v.lora"
        save_file({f"{name}_A.weight": noise(2, 64), f"{name}_B.weight": noise(64, 2)}, wide)
        assert "wide.safetensors" in tiny.refused("--lora", str(wide))
        other = write_tiny(tmp_path / "taew2_2.safetensors", 48)
        message = tiny.refused("--vae", str(other))
        assert "48" in message and "4" in message.replace("48", "")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]
