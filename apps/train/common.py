"""What every training stage shares: progress that a clock may bound, checkpoints, a log of the curve."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


@dataclass
class Progress:
    """How far a stage has come: by steps or, if the clock runs faster, by minutes.

    Attributes:
        steps: steps of the whole stage.
        minutes: budget of this process; None for no bound.
        step: steps done, kept across restarts.
        minutes_before: minutes that earlier processes spent on this stage.
    """

    steps: int
    minutes: float | None = None
    step: int = 0
    minutes_before: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def minutes_spent(self) -> float:
        return self.minutes_before + (time.monotonic() - self._start) / 60

    @property
    def fraction(self) -> float:
        by_clock = self.minutes_spent / self.minutes if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, by_clock))

    def __iter__(self) -> Iterator[int]:
        while self.fraction < 1.0:
            yield self.step
            self.step += 1


def learning_rate(peak: float, step: int, fraction: float, warmup_steps: int = 100) -> float:
    """Linear warm-up, then half a cosine from `peak` to a twentieth of it."""
    warm = min(1.0, (step + 1) / warmup_steps)
    return peak * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * fraction)))


class Stage:
    """A model in training: optimizer, EMA weights, checkpoints and the curve as JSON lines.

    Args:
        name: file stem of checkpoints and curve inside `folder`.
        model: trained in place.
        peak: highest learning rate.
        progress: the stage's length.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress,
        peak: float,
        ema_decay: float = 0.999,
        weight_decay: float = 0.01,
    ) -> None:
        self.name, self.folder, self.accelerator = name, folder, accelerator
        self.progress, self.peak = progress, peak
        fused = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.raw: nn.Module = accelerator.unwrap_model(self.model)
        self.ema = EMAModel(self.raw.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def update(self, loss: Tensor) -> None:
        """One optimizer step on `loss`."""
        rate = learning_rate(self.peak, self.progress.step, self.progress.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.raw.parameters())

    def log(self, **values: Any) -> None:
        """Append one line to the curve; tensors are read back here and nowhere else."""
        row = {"stage": self.name, "step": self.progress.step, "minutes": self.progress.minutes_spent}
        row |= {key: value.item() if isinstance(value, Tensor) else value for key, value in values.items()}
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Write everything that a later process needs to go on from here."""
        target = self.folder / self.name
        self.accelerator.save_state(str(target))
        torch.save(self.ema.state_dict(), target / "ema.bin")
        state = {"step": self.progress.step, "minutes": self.progress.minutes_spent}
        (target / "progress.json").write_text(json.dumps(state))

    def _resume(self) -> None:
        source = self.folder / self.name
        if not (source / "progress.json").exists():
            return
        state = json.loads((source / "progress.json").read_text())
        self.progress.step, self.progress.minutes_before = state["step"], state["minutes"]
        self.accelerator.load_state(str(source))
        self.ema.load_state_dict(torch.load(source / "ema.bin", weights_only=True))
        self.ema.to(self.accelerator.device)
        self.accelerator.print(f"{self.name}: going on from step {state['step']}")

    def use_average(self) -> nn.Module:
        """The model with its averaged weights; the trained ones are given up."""
        self.ema.copy_to(self.raw.parameters())
        return self.raw
