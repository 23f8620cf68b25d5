"""`vidkv estimate`: plans, verdicts and windows."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.apps.commandline import run
from vidkv.apps.estimate import estimate_report, render
from vidkv.memory import card_bytes, largest_window, plan_memory
from vidkv.models.registry import MODELS
from vidkv.planning import cache_spec

FORCING = "self-forcing-1.3b"


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, stdout, stderr = run(capsys, "estimate", *arguments, "--json")
    assert (code, stderr) == (0, "")
    result: dict[str, Any] = json.loads(stdout)
    return result


def report_of(name: str, device: str = "cuda", **settings: Any) -> dict[str, Any]:
    entry = MODELS[name]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return estimate_report(entry, cache_spec(entry, {}, device), device, dtype, **settings)


def text_of(report: dict[str, Any]) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(render(report))
    return console.export_text()


class TestNumbers:
    def test_are_those_of_the_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--weights", "fp8", "--text-weights", "int8", "--offload", "group", "--batch", "2")
        found = as_json(capsys, "--model", FORCING, "--kv-format", "int8", *options)
        entry = MODELS[FORCING]
        plan = plan_memory(
            entry, cache_spec(entry, {"format": "int8"}, "cuda"), 480, 832, 2,
            weights="fp8", text_weights="int8", placement="group_offload",
        )  # fmt: skip
        assert {name: found[name] for name in plan.as_dict()} == plan.as_dict()
        assert found["model"] == FORCING and found["cache"].startswith("int8,window=21")
        chosen = {name: found["settings"][name] for name in ("weights", "text_weights", "offload", "batch")}
        assert chosen == {"weights": "fp8", "text_weights": "int8", "offload": "group", "batch": 2}

    def test_the_text_encoder_follows_the_weights(self, capsys: pytest.CaptureFixture[str]) -> None:
        full, low = (as_json(capsys, "--model", FORCING, "--weights", name) for name in ("full", "fp8"))
        assert low["text_bytes"] < 0.6 * full["text_bytes"]
        assert low["weights_bytes"] < 0.6 * full["weights_bytes"]
        assert low["vae_bytes"] == full["vae_bytes"]

    def test_windows_by_format_and_card(self) -> None:
        found = report_of(FORCING, cards=(12.0, 24.0))["largest_windows"]
        assert list(found) == ["bf16", "int8"] and list(found["bf16"]) == ["12", "24", "80", "141"]
        for name, by_card in found.items():
            for gb, window in by_card.items():
                assert window == largest_window(MODELS[FORCING], card_bytes(float(gb)), name)
        assert list(report_of("bounce", "cpu")["largest_windows"]) == ["fp32", "bf16", "int8"]


class TestVerdicts:
    def test_of_cards(self) -> None:
        small, large = report_of(FORCING, cards=(10.0, 24.0))["verdicts"][-2:]
        assert (small["where"], small["fits"], large["where"], large["fits"]) == (
            "a card of 10 GB", False, "a card of 24 GB", True,
        )  # fmt: skip
        assert small["available_bytes"] == 9_500_000_000 and large["reason"] is None
        assert "on a card of 10 GB" in small["reason"] and "9.5 GB can be used" in small["reason"]

    def test_of_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vidkv.apps.estimate.usable_bytes", lambda device: 10**6)
        (found,) = report_of("bounce", "cpu")["verdicts"]
        assert found["where"] == "cpu" and not found["fits"] and "--offload" not in found["reason"]
        monkeypatch.setattr("vidkv.apps.estimate.usable_bytes", lambda device: 10**9)
        assert report_of("bounce", "cpu")["verdicts"][0]["fits"]
        monkeypatch.setattr("vidkv.apps.estimate.usable_bytes", lambda device: None)
        assert report_of("bounce", "cpu")["verdicts"] == []

    def test_a_gpu_that_is_not_here_is_not_judged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert report_of(FORCING)["verdicts"] == []


class TestTable:
    def test_for_people(self) -> None:
        shown = text_of(report_of("wan2.1-1.3b", cards=(10.0, 80.0)))
        for words in (
            "wan2.1-1.3b, 832x480, bfloat16, guided, cache bf16,window=21",
            "fits on a card of 80 GB, where 76.0 GB can be used",
            "does not fit on a card of 10 GB: the video needs",
            "using 95% of the card",
        ):
            assert words in shown
        cells = [row.split("│") for row in shown.splitlines() if "│" in row]
        rows = {row[1].strip(): row[2].strip() for row in cells}
        assert rows["transformer"] == "2.8 GB" and rows["text encoder"] == "11.4 GB"
        assert rows["KV cache"] == rows["KV cache of the negative prompt"] == "5.2 GB"
        assert "waiting on the host" not in rows

    def test_what_is_nothing_is_not_shown(self) -> None:
        shown = text_of(report_of(FORCING, offload="model"))
        assert "negative" not in shown and "waiting on the host" in shown

    def test_a_window_that_fits_no_card(self) -> None:
        assert "none" in text_of(report_of("wan2.1-14b"))

    def test_on_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, stdout, stderr = run(capsys, "estimate", "--model", FORCING, "--card", "24")
        assert (code, stderr) == (0, "")
        assert "fits on a card of 24 GB" in stdout and "Largest window" in stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "int3"), "weights='int3'; choose full, fp8, int8"),
        (("--text-weights", "x"), "weights='x'; choose"),
        (("--offload", "all"), "offload='all'; choose none, text, model, group"),
        (("--card", "0"), "card=0: give a card's memory in GB"),
        (("--card", "nan"), "card=nan"),
    ],
)
def test_refuses(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str) -> None:
    code, stdout, stderr = run(capsys, "estimate", "--model", FORCING, *arguments)
    assert (code, stdout) == (2, "") and stderr.startswith("vidkv: ") and words in stderr
    assert stderr.count("\n") == 1


def test_int8_is_estimated_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidkv.models.weights.find_spec", lambda name: None)
    assert report_of(FORCING, weights="int8")["weights_bytes"] < 2 * 10**9
