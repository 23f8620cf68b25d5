"""The doctor finds what is missing, says what to do, and never breaks itself."""

from __future__ import annotations

import builtins
import io
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from vidkv.apps import doctor
from vidkv.apps.doctor import Check, healthy, render, run_checks

Usage = namedtuple("Usage", "total used free")


def named(checks: list[Check], name: str) -> Check:
    return {check.name: check for check in checks}[name]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Pretend that exactly these programs exist, and that CC is not set."""

    def install(found: Mapping[str, str]) -> None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(shutil, "which", found.get)

    return install


@pytest.fixture
def read_paths(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Let `vidkv.attention.self_test` be this function."""

    def install(self_test: Callable[..., Any]) -> None:
        module = ModuleType("vidkv.attention")
        module.self_test = self_test  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vidkv.attention", module)

    return install


class TestReport:
    def test_every_part_is_looked_at(self) -> None:
        names = [check.name for check in run_checks()]
        assert len(names) == len(set(names))
        for part in ("torch", "bf16", "triton", "pyav", "disk here", "write temp", "weights"):
            assert part in names
        assert any(name.startswith("gpu") for name in names)
        assert any(name.startswith("read path") for name in names)

    def test_whatever_is_wrong_has_a_remedy(self) -> None:
        for check in run_checks():
            assert check.detail
            assert check.remedy or check.status == "ok" or check.name == "gpu"

    def test_a_broken_check_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> list[Check]:
            raise RuntimeError("boom")

        monkeypatch.setattr(doctor, "_disk", broken)
        check = named(run_checks(), "disk")
        assert (check.status, check.detail) == ("fail", "RuntimeError: boom")

    def test_warnings_are_healthy(self) -> None:
        assert healthy([Check("a", "ok", ""), Check("b", "warn", "")])
        assert not healthy([Check("a", "ok", ""), Check("b", "fail", "")])

    def test_table_shows_everything_literally(self) -> None:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(render([Check("gpu [0]", "warn", "16 [GiB]", "free [some]")]))
        shown = console.export_text()
        for part in ("gpu [0]", "warn", "16 [GiB]", "→ free [some]"):
            assert part in shown

    def test_findings_are_plain_data(self) -> None:
        assert asdict(Check("a", "ok", "d")) == {
            "name": "a",
            "status": "ok",
            "detail": "d",
            "remedy": "",
        }


class TestTorch:
    def test_this_machine(self) -> None:
        checks = list(doctor._torch())
        assert named(checks, "torch").status == "ok"
        assert torch.__version__ in named(checks, "torch").detail
        assert named(checks, "bf16").status == "ok"

    def test_old_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        check = named(list(doctor._torch()), "torch")
        assert check.status == "warn"
        assert "2.11" in check.remedy


class TestTriton:
    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        (check,) = doctor._triton()
        assert (check.name, check.status) == ("triton", "warn")
        assert "torch read paths" in check.remedy

    @pytest.mark.parametrize(
        ("found", "status", "text"),
        [
            ({"gcc": "/bin/gcc", "cc": "/bin/cc"}, "ok", "/bin/gcc"),
            ({"clang": "/bin/clang"}, "ok", "/bin/clang"),
            ({"cc": "/bin/cc"}, "warn", "triton ignores"),
            ({}, "warn", "none of gcc"),
        ],
        ids=["gcc", "clang", "only cc", "none"],
    )
    def test_compiler(
        self,
        programs: Callable[[Mapping[str, str]], None],
        found: dict[str, str],
        status: str,
        text: str,
    ) -> None:
        programs(found)
        check = doctor._compiler()
        assert check.status == status
        assert text in check.detail
        assert bool(check.remedy) == (status != "ok")

    @pytest.mark.parametrize(("value", "status"), [("mycc", "ok"), ("absent", "warn")])
    def test_compiler_named_by_the_user(
        self,
        programs: Callable[[Mapping[str, str]], None],
        monkeypatch: pytest.MonkeyPatch,
        value: str,
        status: str,
    ) -> None:
        programs({"mycc": "/opt/mycc", "gcc": "/bin/gcc"})
        monkeypatch.setenv("CC", value)
        assert doctor._compiler().status == status

    @pytest.mark.parametrize(("present", "status"), [(True, "ok"), (False, "warn")])
    def test_headers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool, status: str
    ) -> None:
        monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
        if present:
            (tmp_path / "Python.h").touch()
        check = doctor._headers()
        assert check.status == status
        assert str(tmp_path) in check.detail


class TestGpu:
    def test_present(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(name="Test GPU", major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 80 * 2**30))
        checks = list(doctor._gpu())
        assert [check.name for check in checks] == ["gpu 0", "gpu 1"]
        assert checks[0].detail == "Test GPU, capability 9.0, 3.0 of 80.0 GiB free"

    def test_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(Path, "exists", lambda _: False)
        (check,) = doctor._gpu()
        assert (check.status, check.detail) == ("warn", "no GPU: the CPU path is used")

    @pytest.mark.parametrize(("version", "remedy"), [(None, "CUDA build"), ("13.0", "nvidia-smi")])
    def test_present_but_unusable(
        self, monkeypatch: pytest.MonkeyPatch, version: str | None, remedy: str
    ) -> None:
        monkeypatch.setattr(Path, "exists", lambda _: True)
        check = doctor._no_gpu(version)
        assert check.status == "warn"
        assert remedy in check.remedy


class TestPyAv:
    def test_this_machine(self) -> None:
        (check,) = doctor._pyav()
        assert check.status == "ok"
        assert "3 of 3 frames" in check.detail

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        (check,) = doctor._pyav()
        assert check.status == "fail"
        assert "pip install" in check.remedy

    def test_without_h264(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown() -> int:
            raise ValueError("libx264")

        monkeypatch.setattr(doctor, "_video_round_trip", unknown)
        (check,) = doctor._pyav()
        assert check.status == "fail"
        assert "cannot write H.264: libx264" in check.detail

    def test_frames_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_video_round_trip", lambda: 2)
        (check,) = doctor._pyav()
        assert (check.status, bool(check.remedy)) == ("fail", True)


class TestDisk:
    @pytest.mark.parametrize(("free", "status"), [(2**40, "ok"), (2**30, "warn"), (2**20, "fail")], ids=str)
    def test_free_space(self, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**41, 0, free))
        checks = list(doctor._disk())
        assert {check.name for check in checks} == {"disk here", "disk temp"}
        assert {check.status for check in checks} == {status}

    def test_nothing_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton" / "deep"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        checks = list(doctor._folders())
        assert {check.status for check in checks} == {"ok"}
        assert named(checks, "write triton cache").detail == str(tmp_path / "triton" / "deep")
        assert named(checks, "write vidkv cache").detail == str(tmp_path / "cache" / "vidkv")
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
    def test_unwritable_folders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/absent/triton")
        checks = list(doctor._folders())
        check = named(checks, "write triton cache")
        assert check.status == "warn"
        assert "TRITON_CACHE_DIR" in check.remedy

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
    def test_unwritable_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir("/proc")
        assert named(list(doctor._folders()), "write here").status == "fail"


class TestWeights:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(doctor, "_package_folder", lambda _: tmp_path)
        return tmp_path

    def test_complete(self, folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "model.safetensors").write_bytes(b"\0" * 2**20)
        (check,) = doctor._weights()
        assert (check.status, check.detail) == ("ok", f"1 files, 1.0 MiB in {folder}")

    @pytest.mark.parametrize("name", ["model_index.json", "vae.safetensors"])
    def test_incomplete(self, folder: Path, name: str) -> None:
        (folder / name).write_text("{}")
        (check,) = doctor._weights()
        assert (check.status, bool(check.remedy)) == ("fail", True)

    @pytest.mark.parametrize("package", ["vidkv.absent.weights", "vidkv.errors"])
    def test_absent(self, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
        monkeypatch.setattr(doctor, "WEIGHTS_PACKAGE", package)
        (check,) = doctor._weights()
        assert (check.status, check.detail) == ("fail", f"{package} is not installed")

    def test_a_folder_without_init_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "some_model" / "weights").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        found = doctor._package_folder("some_model.weights")
        assert found == tmp_path / "some_model" / "weights"


class TestReadPaths:
    def test_errors_are_held_against_their_bounds(
        self, read_paths: Callable[[Callable[..., Any]], None]
    ) -> None:
        errors = [("reference", 0.0, 1e-6), ("two-pass", 2e-3, 1e-3), ("fused", float("nan"), 1e-2)]
        read_paths(lambda: errors)
        checks = doctor.read_paths_self_test()
        assert [check.status for check in checks] == ["ok", "fail", "fail"]
        assert checks[1].name == "read path two-pass"
        assert "2.0e-03 exceeds its bound 1e-03" in checks[1].detail

    def test_a_crash_is_a_finding(self, read_paths: Callable[[Callable[..., Any]], None]) -> None:
        def crash(device: str = "cpu") -> None:
            raise RuntimeError("illegal memory access")

        read_paths(crash)
        check = named(run_checks(), "read paths")
        assert (check.status, check.detail) == ("fail", "RuntimeError: illegal memory access")

    def test_the_gpu_is_tested_too_and_its_crash_hides_nothing(
        self, read_paths: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def self_test(device: str = "cpu") -> list[tuple[str, float, float]]:
            if crashing and device == "cuda":
                raise RuntimeError("illegal memory access")
            return [("two-pass", {"cpu": 0.0, "cuda": 1.0}[device], 1e-3)]

        read_paths(self_test)
        crashing = False
        assert doctor._read_paths_on_gpu() == [] or torch.cuda.is_available()
        monkeypatch.setattr(doctor, "_gpu_usable", lambda: True)
        monkeypatch.setattr(doctor, "_gpu", lambda: [])
        checks = run_checks()
        assert named(checks, "read path two-pass").status == "ok"
        assert named(checks, "read path two-pass on the GPU").status == "fail"
        crashing = True
        checks = run_checks()
        assert named(checks, "read path two-pass").status == "ok"
        assert named(checks, "read paths on the GPU").detail == "RuntimeError: illegal memory access"

    def test_missing_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vidkv.attention", None)
        check = named(run_checks(), "read paths")
        assert check.status == "fail"
        assert check.detail.startswith("cannot be imported")


def test_nothing_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(builtins, "print", lambda *_, **__: pytest.fail("print was called"))
    run_checks()
    assert capsys.readouterr() == ("", "")
