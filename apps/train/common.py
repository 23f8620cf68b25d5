"""What every training stage shares: progress that a clock may bound, checkpoints, a log of the curve."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Losses = Callable[..., dict[str, Tensor]]
EMA_EVERY = 4
SAVE_STEPS = 1000


class _Graph:
    """A training step captured as a CUDA graph; called with inputs of the captured shapes."""

    def __init__(self, step: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.values


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


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder to fill that then takes the place of `target`; call `recover` before reading `target`.

    Killed at any moment, it leaves the former folder or the new one whole.
    """
    partial, old = _beside(target, "partial"), _beside(target, "old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> bool:
    """Whether there is a whole `target`, after undoing a replacement that was cut between its renames."""
    old = _beside(target, "old")
    if not target.exists() and old.exists():
        old.rename(target)
    return target.exists()


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


class Stage(Generic[M]):
    """A model in training: optimizer, EMA weights, checkpoints and the curve as JSON lines.

    Args:
        name: file stem of checkpoints and curve inside `folder`.
        model: trained in place.
        peak: highest learning rate.
        progress: the stage's length.
        generator: what clips are drawn with; its state is part of the checkpoints.
    """

    def __init__(
        self,
        name: str,
        model: M,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress,
        peak: float,
        generator: torch.Generator,
        ema_decay: float = 0.998,
        weight_decay: float = 0.01,
    ) -> None:
        self.name, self.folder, self.accelerator = name, folder, accelerator
        self.progress, self.peak, self.generator = progress, peak, generator
        self.on_gpu = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=torch.tensor(peak) if self.on_gpu else peak,
            betas=(0.9, 0.98),
            weight_decay=weight_decay,
            fused=self.on_gpu,
            capturable=self.on_gpu,
        )
        accelerator.free_memory()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.raw: M = accelerator.unwrap_model(self.model)
        self.ema = EMAModel(
            self.raw.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        self._graphs: dict[str, _Graph] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def update(self, key: str, losses: Losses, *inputs: Tensor) -> dict[str, Tensor]:
        """One optimizer step on `losses(*inputs)["loss"]`.

        On a GPU the step is captured once per `key` as a CUDA graph and replayed: these models are so
        small that launching their kernels takes longer than running them.

        Args:
            key: name of this kind of step; inputs keep their shapes under one key.
            losses: gives named scalars, "loss" among them; it must not wait for the device.
        """
        rate = learning_rate(self.peak, self.progress.step, self.progress.fraction)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if not self.on_gpu:
            values = self._step(losses, *inputs)
        else:
            if key not in self._graphs:
                self._graphs[key] = _Graph(partial(self._step, losses), inputs)
            values = self._graphs[key](*inputs)
        if self.progress.step % EMA_EVERY == 0:
            self.ema.step(self.raw.parameters())
        return values

    def _step(self, losses: Losses, *inputs: Tensor) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            values = losses(*inputs)
        self.optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        nn.utils.clip_grad_norm_(self.raw.parameters(), 1.0)
        self.optimizer.optimizer.step()
        return {name: value.detach() for name, value in values.items()}

    def log(self, **values: Any) -> None:
        """Append one line to the curve; tensors are read back here and nowhere else."""
        row = {"stage": self.name, "step": self.progress.step, "minutes": self.progress.minutes_spent}
        row |= {key: value.item() if isinstance(value, Tensor) else value for key, value in values.items()}
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        # stdout belongs to the command's result
        self.accelerator.print(json.dumps(row), file=sys.stderr, flush=True)

    def save(self, step: int) -> None:
        """Write everything that a later process needs to go on after `step` steps."""
        with replacing(self.folder / self.name) as target:
            self.accelerator.save_state(str(target))
            torch.save(self.ema.state_dict(), target / "ema.bin")
            torch.save(self.generator.get_state(), target / "generator.bin")
            state = {"step": step, "minutes": self.progress.minutes_spent}
            (target / "progress.json").write_text(json.dumps(state))

    def _resume(self) -> None:
        source = self.folder / self.name
        if not recover(source):
            return
        state = json.loads((source / "progress.json").read_text())
        self.progress.step, self.progress.minutes_before = state["step"], state["minutes"]
        self.accelerator.load_state(str(source))
        self.ema.load_state_dict(torch.load(source / "ema.bin", weights_only=True))
        self.ema.to(self.accelerator.device)
        self.generator.set_state(torch.load(source / "generator.bin", weights_only=True))
        self.accelerator.print(
            f"{self.name}: going on from step {state['step']}", file=sys.stderr, flush=True
        )

    def use_average(self) -> M:
        """The model with its averaged weights; the trained ones are given up."""
        self.ema.copy_to(self.raw.parameters())
        return self.raw
