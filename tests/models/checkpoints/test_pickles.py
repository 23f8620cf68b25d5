"""Pickled checkpoints give their tensors and nothing else; what a pickle asks to run never runs."""

from __future__ import annotations

import argparse
import code
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.testing
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny import noise
from vidkv.errors import CheckpointError
from vidkv.models.checkpoints import pickles
from vidkv.models.checkpoints.pickles import Unpickled, unpickle
from vidkv.models.checkpoints.unpickle import choose, shards, write_file


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def script(canary: Path) -> Path:
    path = canary.with_name("created_by_import.py")
    path.write_text(f"open({str(canary)!r}, 'w').close()")
    return path


def nested(canary: Path) -> Call:
    inner = canary.with_name("inner.pt")
    torch.save(Call(os.mkdir, str(canary)), inner)
    return Call(functools.partial(torch.load, weights_only=False), str(inner))


def extended_path(canary: Path) -> list[Call]:
    folder = str(script(canary).parent)
    return [Call(sys.path.insert, 0, folder), Call(importlib.import_module, "created_by_import")]


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "os.mkdir": lambda canary: Call(os.mkdir, str(canary)),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w').close()"),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w').close()"),
    "pathlib": lambda canary: Call(Path.write_text, canary, "here"),
    "runpy": lambda canary: Call(runpy.run_path, str(script(canary))),
    "importlib": lambda canary: Call(importlib.import_module, "created_by_import"),
    "map": lambda canary: Call(list, Call(map, os.mkdir, [str(canary)])),
    "reduce": lambda canary: Call(functools.reduce, operator.call, [os.mkdir, str(canary)]),
    "nested torch.load": nested,
    "interpreter": lambda canary: Call(
        code.InteractiveInterpreter.runsource, code.InteractiveInterpreter(), f"open({str(canary)!r}, 'w')"
    ),
    "numpy": lambda canary: Call(numpy.testing.runstring, f"open({str(canary)!r}, 'w').close()", {}),
}
"""What creates the canary when it is unpickled without care."""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "canary"
    script(path)
    # a module beside the checkpoint, where a careless reader would find it
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sys.modules.pop("created_by_import", None)
    return path


def read(path: Path, **options: Any) -> tuple[Unpickled, dict[str, Tensor]]:
    folder = path.with_name(f"{path.name}.out")
    folder.mkdir()
    result = unpickle(path, folder, **options)
    found: dict[str, Tensor] = {}
    for file in result.files:
        found |= load_file(file)
    return result, found


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 700
    return message


class TestMalicious:
    @pytest.mark.parametrize("name", PAYLOADS)
    def test_payloads_run_without_care_and_not_here(self, canary: Path, name: str) -> None:
        path = canary.with_name("evil.pt")
        torch.save({"generator": {"x": noise(2)}, "evil": PAYLOADS[name](canary)}, path)
        if name == "numpy":
            # a function that executes text, under a name that is let through: a stand-in takes its place
            result, found = read(path)
            assert torch.equal(found["x"], noise(2)) and result.beside == ("evil",)
        else:
            message = refused(path)
            assert "it asks for " in message and "torch.save" in message
        assert not canary.exists()
        torch.load(path, weights_only=False)
        assert canary.exists(), "the payload is a dud"

    @pytest.mark.parametrize("form", ["old torch", "bare pickle", "tampered zip", "tar"])
    def test_other_containers(self, canary: Path, form: str) -> None:
        path = canary.with_name("evil.pt")
        payload = pickle.dumps({"generator": Call(os.mkdir, str(canary))}, protocol=2)
        if form == "old torch":
            torch.save(Call(os.mkdir, str(canary)), path, _use_new_zipfile_serialization=False)
        elif form == "bare pickle":
            path.write_bytes(payload)
        elif form == "tar":
            with tarfile.open(path, "w") as tar:
                for name in ("sys_info", "pickle", "storages", "tensors"):
                    member = tarfile.TarInfo(name)
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
        else:
            whole = io.BytesIO()
            torch.save({"x": noise(2)}, whole)
            with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
                for name in old.namelist():
                    new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
        refused(path)
        assert not canary.exists()

    def test_torchscript(self, canary: Path) -> None:
        path = canary.with_name("script.pt")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("script/constants.pkl", pickle.dumps((), protocol=2))
            archive.writestr("script/code/x.py", "x")
            archive.writestr("script/data.pkl", pickle.dumps(Call(os.mkdir, str(canary)), protocol=2))
            archive.writestr("script/version", "3\n")
        refused(path)
        assert not canary.exists()

    def test_memory_bomb(self, tmp_path: Path) -> None:
        # each line doubles what the one before holds, as tuples that repr or copy would expand
        body = b"\x80\x02(K\x01" + b"K\x01" * 10 + b"t"
        body += b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(100))
        path = tmp_path / "bomb.pt"
        path.write_bytes(body + b".")
        refused(path)

    def test_deep_nesting(self, tmp_path: Path) -> None:
        path = tmp_path / "deep.pt"
        path.write_bytes(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".")
        refused(path)

    def test_storage_that_is_not_there(self, tmp_path: Path) -> None:
        class Huge(pickle.Pickler):
            def persistent_id(self, thing: object) -> object:
                return ("storage", torch.FloatStorage, "0", "cpu", 1 << 40) if thing == "huge" else None

        path = tmp_path / "huge.pt"
        whole = io.BytesIO()
        torch.save({"x": noise(2)}, whole)
        written = io.BytesIO()
        rebuild = torch._utils._rebuild_tensor_v2
        Huge(written, protocol=2).dump(
            {"x": Call(rebuild, "huge", 0, (1 << 40,), (1,), False, OrderedDict())}
        )
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, written.getvalue() if name.endswith("data.pkl") else old.read(name))
        refused(path)

    def test_a_view_larger_than_the_file(self, tmp_path: Path) -> None:
        torch.save({"x": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pt")
        assert "it claims 4,398,046,511,104 bytes of tensors" in refused(tmp_path / "wide.pt")

    def test_time_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        slow = tmp_path / "slow.py"
        slow.write_text("import time; time.sleep(60)")
        monkeypatch.setattr(pickles, "PROGRAM", slow)
        torch.save({"x": noise(2)}, tmp_path / "x.pt")
        assert "within 1 s" in refused(tmp_path / "x.pt", limit_s=1)

    def test_a_crash_of_the_reader_is_an_error_of_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crash = tmp_path / "crash.py"
        crash.write_text("import os; os.abort()")
        monkeypatch.setattr(pickles, "PROGRAM", crash)
        torch.save({"x": noise(2)}, tmp_path / "x.pt")
        assert "SIGABRT" in refused(tmp_path / "x.pt")


class TestDamaged:
    @pytest.mark.parametrize("keep", [0, 3, 0.5, 0.98], ids=str)
    def test_truncated(self, tmp_path: Path, keep: float) -> None:
        path = tmp_path / "x.pt"
        torch.save({"x": noise(1000)}, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        refused(path)

    @pytest.mark.parametrize(
        "value", [[1, 2], noise(3), {}, {"a": 1}, {"x": torch.zeros(2).to_sparse()}], ids=str
    )
    def test_no_dictionary_of_weights(self, tmp_path: Path, value: object) -> None:
        torch.save(value, tmp_path / "x.pt")
        refused(tmp_path / "x.pt")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No such file"):
            unpickle(tmp_path / "none.pt", tmp_path)


class TestTensors:
    def test_averaged_weights_come_first(self, tmp_path: Path) -> None:
        plain, averaged = {"model.x": noise(2, seed=1)}, {"model.x": noise(2, seed=2)}
        torch.save(
            {"critic": plain, "generator": plain, "generator_ema": averaged, "step": 3}, tmp_path / "x.pt"
        )
        result, found = read(tmp_path / "x.pt")
        assert found.keys() == {"model.x"} and torch.equal(found["model.x"], averaged["model.x"])
        assert result.taken == ("generator_ema",) and result.beside == ("critic", "generator", "step")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_values_survive_bit_for_bit(self, tmp_path: Path, legacy: bool) -> None:
        base = noise(6, 5)
        tied = noise(4)
        state = {
            "bf16": noise(3, 5, dtype=torch.float32).bfloat16(),
            "fp16": noise(3).half(),
            "transposed": base.t(),
            "part": base[1:3, ::2],
            "scalar": torch.tensor(3.5),
            "none": torch.empty(0, 4),
            "parameter": nn.Parameter(noise(2)),
            "tied": tied,
            "tied_again": tied,
            "int": torch.arange(5),
        }
        if not legacy:
            # the old format has no class for it
            state["fp8"] = noise(7).to(torch.float8_e4m3fn)
        torch.save(OrderedDict(state), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        result, found = read(tmp_path / "x.pt")
        assert result.taken == () and found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].float(), tensor.detach().float()), name

    def test_settings_beside_weights_are_left_aside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = types.ModuleType("omegaconf.dictconfig")
        config = type("DictConfig", (dict,), {"__module__": module.__name__})
        module.DictConfig = config  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        settings = config()
        settings.lr = 1
        optimizer = {"state": {0: {"step": noise(1)}}, "param_groups": [{"lr": 1e-4}]}
        value = {
            "generator": {"x": noise(2)},
            "optimizer": optimizer,
            "config": settings,
            "arguments": argparse.Namespace(steps=4),
            "counts": defaultdict(int),
        }
        torch.save(value, tmp_path / "x.pt")
        result, found = read(tmp_path / "x.pt")
        assert found.keys() == {"x"}
        assert result.beside == ("optimizer", "config", "arguments", "counts")

    def test_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickles, "SHARD_BYTES", 1000)
        state = {f"x{i}": noise(150, seed=i) for i in range(4)} | {"large": noise(400)}
        torch.save(state, tmp_path / "x.pt")
        result, found = read(tmp_path / "x.pt")
        assert len(result.files) == 5
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())

    def test_nested_dictionaries(self) -> None:
        value = {"state_dict": {"a": {"b": noise(1)}, "n": 1}, "epoch": 3}
        inner, taken, beside = choose(value, ["model", "state_dict"])
        assert inner is value["state_dict"] and taken == ["state_dict"] and beside == ["epoch", "n"]

    def test_a_part_without_tensors_is_not_taken(self) -> None:
        inner, taken, _ = choose({"generator_ema": {}, "generator": {"x": noise(1)}}, list(pickles.PARTS))
        assert taken == ["generator"] and inner.keys() == {"x"}


class TestWriting:
    def test_a_tensor_other_than_announced(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"x is torch\.float32 \(3,\)"):
            write_file(tmp_path / "x", [("x", torch.float32, (2,))], lambda name: noise(3))

    def test_items_start_at_multiples_of_their_size(self, tmp_path: Path) -> None:
        state = {"a": torch.tensor([1], dtype=torch.int8), "b": noise(3), "c": noise(1).half()}
        specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
        write_file(tmp_path / "x", specs, state.__getitem__)
        found = load_file(tmp_path / "x")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())

    def test_no_shard_passes_the_limit_but_for_one_tensor(self) -> None:
        specs = [(str(size), torch.int8, (size,)) for size in (4, 4, 4, 20, 1)]
        files = shards(specs, 10)
        assert [[name for name, _, _ in file] for file in files] == [["4", "4"], ["4"], ["20"], ["1"]]
