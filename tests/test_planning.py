"""The name of the work: what it depends on, and what it does not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vidkv
from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv import planning
from vidkv.errors import InputError, PromptError, ResourceError
from vidkv.heads import write_shares
from vidkv.planning import Plan, file_digest, naming_shortage, plan, weights_digest
from vidkv.request import EngineSettings, VideoRequest

BASE: dict[str, Any] = {
    "prompt": "a red circle bouncing",
    "seconds": 4,
    "height": HEIGHT,
    "width": WIDTH,
    "schedule": [[2, "a blue square bouncing"]],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("files")
    for name, value in (("one", 10), ("two", 200)):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), value, np.uint8)).save(folder / f"{name}.png")
        save_file({"w": torch.full((2,), float(value))}, folder / f"{name}.safetensors")
    return folder


def planned(model: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Plan:
    request = VideoRequest.of(BASE | {"model": str(model)} | changes)
    return plan(request, EngineSettings(**({"device": "cpu"} | (settings or {}))))


class TestKey:
    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": "a green circle bouncing"},
            {"schedule": []},
            {"schedule": [[2, "a blue circle bouncing"]]},
            {"schedule": [[1, "a blue square bouncing"]]},
            {"seed": 1},
            {"seconds": 5},
            {"height": HEIGHT + 32},
            {"width": WIDTH + 32},
            {"cache": "int8"},
            {"cache": "window=12"},
            {"cache": "sink=1"},
            {"cache": "positions=absolute"},
            {"steps": 3},
            {"guidance": 2.5},
            {"negative": "a blue circle bouncing"},
            {"switch": "recache"},
            {"switch": "flush"},
            {"noise": "stock"},
        ],
        ids=str,
    )
    def test_changes_with_the_request(self, model: Path, change: dict[str, Any]) -> None:
        base, changed = planned(model), planned(model, **change)
        assert changed.key != base.key and changed.id == changed.key[:16]

    def test_changes_with_a_files_content_and_not_with_its_name_or_time(
        self, model: Path, files: Path, tmp_path: Path
    ) -> None:
        one, two = (planned(model, image=str(files / f"{name}.png")).key for name in ("one", "two"))
        copy = shutil.copyfile(files / "one.png", tmp_path / "other name.png")
        os.utime(copy, (1, 1))
        assert planned(model, image=str(copy)).key == one != two
        shutil.copyfile(files / "two.png", copy)
        assert planned(model, image=str(copy)).key == two
        assert one != planned(model).key

    @pytest.mark.parametrize(
        ("name", "one", "two"),
        [
            ("weights", "full", "int8"),
            ("text_weights", None, "int8"),
            ("tile", None, (2, 2)),
            ("tile", (2, 2), (2, 3)),
            ("compiled", False, True),
        ],
    )
    def test_changes_with_the_settings(self, model: Path, name: str, one: Any, two: Any) -> None:
        base = planned(model)
        keys = [
            replace(base, settings=EngineSettings(**{"device": "cpu", name: value})).key
            for value in (one, two)
        ]
        assert keys[0] != keys[1]

    def test_changes_with_loras_their_scales_and_the_decoder(self, model: Path, files: Path) -> None:
        one, two = files / "one.safetensors", files / "two.safetensors"
        base = planned(model)
        settings: list[dict[str, Any]] = [
            {},
            {"loras": ((one, 1.0),)},
            {"loras": ((two, 1.0),)},
            {"loras": ((one, 0.5),)},
            {"loras": ((one, 1.0), (two, 1.0))},
            {"loras": ((two, 1.0), (one, 1.0))},
            {"vae": one},
            {"vae": two},
        ]
        keys = {replace(base, settings=EngineSettings(device="cpu", **entry)).key for entry in settings}
        assert len(keys) == len(settings)

    def test_changes_with_precision_of_the_device_and_with_the_numerics(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = planned(model)
        assert replace(base, device="cuda").key != base.key
        assert replace(base, device="cuda").key == replace(base, device="cuda:1").key
        again = replace(base)
        monkeypatch.setattr(planning, "NUMERICS", planning.NUMERICS + 1)
        assert again.key != base.key

    @pytest.mark.parametrize(
        ("change", "settings"),
        [
            ({"id": "x"}, {}),
            ({"out": "a/b.mp4"}, {}),
            ({"prompt": "  A red   circle bouncing "}, {}),
            ({"schedule": "2: A blue square, bouncing".replace(",", "")}, {}),
            ({"seconds": 4.0}, {}),
            ({"cache": "format=fp32"}, {}),
            ({"switch": None}, {}),
            ({}, {"offload": "none"}),
            ({}, {"device": "auto"}),
            ({}, {"text_weights": "full"}),
        ],
        ids=str,
    )
    def test_does_not_change_with_what_changes_no_frame(
        self, model: Path, change: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = planned(model, settings, **change)
        assert found.key == planned(model).key
        assert found.id == change.get("id", found.key[:16])

    def test_does_not_change_with_the_day(self, model: Path) -> None:
        """The same in another process: no hash of Python's, no order of a set."""
        import subprocess
        import sys

        script = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
            "from tests.test_planning import planned; print(planned(Path(sys.argv[2])).key)"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parents[1]), str(model)],
            capture_output=True,
            check=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "7"},
        )
        assert run.stdout.split()[-1] == planned(model).key

    def test_covers_every_field(self) -> None:
        """A new field of a request belongs into the key, or among those that change no frame."""
        free = {"id", "out"}
        keyed = {
            "prompt",
            "schedule",
            "seed",
            "seconds",
            "model",
            "width",
            "height",
            "cache",
            "image",
            "video",
            "steps",
            "guidance",
            "negative",
            "switch",
            "noise",
        }
        assert set(VideoRequest.model_fields) == free | keyed
        assert set(EngineSettings.model_fields) == {"offload", "device"} | {
            "weights",
            "text_weights",
            "loras",
            "vae",
            "tile",
            "compiled",
        }


class TestWeightsDigest:
    def test_is_of_content_not_of_place_or_time(self, model: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(model, tmp_path / "elsewhere")
        for path in copy.rglob("*"):
            os.utime(path, (1, 1))
        assert weights_digest(copy) == weights_digest(model)
        assert planned(copy).key == planned(model).key

    def test_changes_with_any_file(self, model: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        before = weights_digest(copy)
        files = [path for path in copy.rglob("*") if path.suffix in (".json", ".safetensors")]
        assert len(files) >= 6
        for path in files:
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            assert weights_digest(copy) != before, path
            path.write_bytes(data)
            assert weights_digest(copy) == before
        files[0].rename(files[0].with_name("renamed.json"))
        assert weights_digest(copy) != before

    def test_of_large_files_sees_both_ends_and_the_size(self, tmp_path: Path) -> None:
        path, size = tmp_path / "w.safetensors", 20 << 20
        data = bytearray(size)
        found = set()
        for place in (0, 8, size // 2, size - 1):
            data[place] ^= 1
            path.write_bytes(data)
            os.utime(path, (place, place))
            found.add(weights_digest(tmp_path))
            data[place] ^= 1
        path.write_bytes(data + b"\0")
        found.add(weights_digest(tmp_path))
        assert len(found) == 5 or (len(found) == 4 and size // 2 % (1 << 16))


class TestHeads:
    """Measured shares count for caches with local heads alone."""

    def test_key(self, model: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(model, tmp_path / "copy")
        before = planned(copy).key
        keys = []
        for shares in ([[0.1, 0.2]] * 2, [[0.3, 0.1]] * 2, [[0.3, 0.2]] * 2):
            write_shares(copy, shares, {})
            assert planned(copy).key == before
            keys.append(planned(copy, cache="local_heads=1").key)
        # it is their order that tells
        assert keys[0] != keys[1] == keys[2] and before not in keys

    def test_unmeasured(self, model: Path) -> None:
        with pytest.raises(InputError, match=r"vidkv eval heads --model .* --write"):
            planned(model, cache="local_heads=1")


class TestFileDigest:
    def test_of_what_cannot_be_read_is_an_input_error(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(InputError, match=f"cannot read {path}"):
                file_digest(path)

    def test_sees_new_content(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"one")
        first = file_digest(path)
        path.write_bytes(b"two")
        os.utime(path, ns=(1, 1))
        assert file_digest(path) != first


class TestPlan:
    def test_counts(self, model: Path) -> None:
        found = planned(model)
        assert (found.frames, found.chunks, found.size) == (64, 6, (HEIGHT, WIDTH))
        assert found.need_bytes > 0 and found.device == "cpu"

    def test_metadata_tells_how_it_was_made(self, model: Path) -> None:
        found = planned(
            model, {"tile": (2, 3)}, seed=7, cache="int8", negative="a blue circle bouncing", guidance=2
        )
        metadata = found.metadata()
        assert all(isinstance(value, str) for value in metadata.values()) and json.dumps(metadata)
        assert metadata["vidkv"] == vidkv.__version__ and metadata["seed"] == "7"
        assert metadata["size"] == f"{WIDTH}x{HEIGHT}" and metadata["seconds"] == "4"
        assert metadata["negative"] == "a blue circle bouncing" and metadata["guidance"] == "2.0"
        first, second = metadata["prompts"].split("; ")
        assert first.startswith("0: ") and second.startswith("2: ") and "blue square" in second
        assert "int8" in metadata["cache"]
        assert not {"image", "noise", "weights", "loras"} & set(metadata)

    @pytest.mark.parametrize(
        ("request_", "settings", "message"),
        [
            ({"schedule": [[3.9, "a blue square bouncing"]]}, {}, "would never be shown"),
            ({"image": "/none.png"}, {}, "there is no file /none.png"),
            ({}, {"offload": "moon"}, "offload='moon'; choose"),
            ({}, {"device": "tpu"}, "device='tpu'; choose"),
            ({}, {"offload": "model"}, "moves networks off a GPU"),
            ({}, {"weights": "int3"}, "int3"),
            ({"prompt": "one hundred dragons"}, {}, "dragons"),
            ({"cache": "window=2,sink=1"}, {}, "window"),
        ],
        ids=str,
    )
    def test_refuses_in_one_line(
        self, model: Path, request_: dict[str, Any], settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises((InputError, PromptError), match=message) as caught:
            planned(model, settings, **request_)
        assert "\n" not in str(caught.value)

    def test_an_unknown_model(self) -> None:
        with pytest.raises(InputError, match="unknown model '/none'"):
            planned(Path("/none"))

    def test_an_image_and_a_video_are_too_much(self, model: Path, files: Path) -> None:
        path = str(files / "one.png")
        with pytest.raises(InputError, match="either an image or a video"):
            planned(model, image=path, video=path)

    def test_what_cannot_fit_is_refused(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planning, "usable_bytes", lambda device: 1000)
        with pytest.raises(ResourceError):
            planned(model)

    @pytest.mark.parametrize(
        "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't")]
    )
    def test_shortage_is_named(self, model: Path, error: Exception) -> None:
        found = planned(model)
        with pytest.raises(ResourceError, match=r"cpu has run out of memory: the video needs about"):
            with naming_shortage(found):
                raise error
        with pytest.raises(RuntimeError, match=r"^other$"), naming_shortage(found):
            raise RuntimeError("other")
