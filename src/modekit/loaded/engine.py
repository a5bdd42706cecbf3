"""The one training loop: planned batches through accelerate, whatever launcher and however many processes.

What is trained is a `TrainedModule`: a model with its loss. Batches come in their order, states hold only what moves
(states.py). Whoever gives a judge (training/engine.py) has states compared by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from transformers import PreTrainedModel

from modekit.errors import TrainingError
from modekit.loaded.load import default_device
from modekit.loaded.states import History, Tensors, damaged, read_state, tidy, whole_states, write_state
from modekit.processes import processes
from modekit.run import DETAIL, Run

STATE_SECONDS = 120.0
"""Between two states of a training that is not judged: what a kill costs at most, unless writing one takes long."""
_STATE_SHARE = 20  # at most one second of so many is spent on writing states
_BETAS = (0.9, 0.95)


class TrainedModule(nn.Module):
    """A model with its loss: a batch goes in, its share of the step's loss comes out.

    Attributes:
        model: the submodule that is trained, with whose name a state's names begin.
        config: of the model.
        skips_parameters: whether a step may leave some that move without a gradient.
    """

    skips_parameters = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # where accelerate looks for sizes and for layers to shard

    def groups(self) -> list[dict[str, Any]]:
        """Of what moves, for AdamW: parameters, `lr` at its peak, `weight_decay`."""
        raise NotImplementedError

    def drain(self) -> dict[str, float]:
        """Figures of the step that has just ended, for the log. Called once per step."""
        return {}


class PlannedBatches(Protocol):
    """All parts of all steps, in order; what a part holds has a method `to`."""

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...
    def describe(self, number: int) -> str:
        """Which text a part holds, for messages."""


@dataclass(frozen=True)
class LoopSettings:
    """How a training goes through its batches.

    Attributes:
        steps: optimiser steps.
        parts: of how many parts each process makes a step.
        warmup: share of the steps over which rates rise; then they fall linearly.
        clip: largest norm of the gradient.
        seed: of torch's generators; afterwards they go on from where they were.
        bfloat16: whether products are in bfloat16.
        least: share of its peak below which a rate does not fall.
        every, patience: with a judge: steps between states that it gets; states no better than the best until training ends.
    """

    steps: int
    parts: int
    warmup: float
    clip: float
    seed: int
    bfloat16: bool = False
    least: float = 0.0
    every: int = 1
    patience: int = 1


Judge = Callable[[nn.Module], Mapping[str, float]]
"""Held-out losses by name, of the model as it is wrapped, in evaluation."""


class NotFiniteError(TrainingError):
    """Where a loss was not finite, and what it was."""

    @classmethod
    def at(cls, where: str, found: str) -> NotFiniteError:
        """Of a loss. Without a constructor of its own it can be pickled, as results of processes are."""
        return cls(
            "the loss is not finite: training stopped",
            where=where,
            found=found,
            remedy="lower the learning rate, or leave this text out",
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While open, torch's own generators, from which adapters, dropout, jitter and noise are drawn, go on from a seed."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Loop:
    """A training under way, from the last whole state in `folder` on; without a folder no state is kept.

    `step` is how many are done, `history` what they logged: `loss` per predicted token, `learning_rate`, what the module says,
    and in entries of their own the judge's `eval_NAME_loss` and their mean, `eval_loss`.
    """

    def __init__(
        self,
        module: TrainedModule,
        batches: PlannedBatches,
        loop: LoopSettings,
        folder: Path | None,
        run: Run,
        judge: Judge | None = None,
    ) -> None:
        self._module, self._batches, self._loop = module, batches, loop
        self._folder, self._run, self._judge = folder, run, judge
        unused = DistributedDataParallelKwargs(find_unused_parameters=module.skips_parameters)
        self._accelerator = Accelerator(cpu=default_device().type == "cpu", kwargs_handlers=[unused])
        if getattr(self._accelerator.state, "fsdp_plugin", None) is not None and not self._accelerator.is_fsdp2:
            raise TrainingError("FSDP's first version is not supported", where="fsdp_config", remedy="set fsdp_version: 2")
        groups = module.groups()
        self._peaks = [group["lr"] for group in groups]
        self._wrapped, self._optimizer = self._accelerator.prepare(module, torch.optim.AdamW(groups, betas=_BETAS))
        self._moving = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.step = 0
        self.history: History = []
        self._kept = time.monotonic()
        self._wait = STATE_SECONDS

    def go(self) -> None:
        """Do the steps that are left. Raises TrainingError when the last state is damaged, NotFiniteError for a loss."""
        with seeded(self._loop.seed, self._accelerator.device):
            self._resume()
            self._report()
            if self._judge is not None and not self.history:
                self._evaluate(self._judge)
            while self.step < self._loop.steps and not self._no_longer_better():
                self._step()
                self._keep()

    @property
    def best_step(self) -> int:
        """After which the held-out loss was lowest, the start not counted; 0 where no state was judged."""
        judged = {int(each["step"]): each["eval_loss"] for each in self.history if each["step"] and "eval_loss" in each}
        return min(judged, key=judged.__getitem__, default=0)

    def _step(self) -> None:
        loop, ranks = self._loop, processes()
        rate = self._rate()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        self._wrapped.train()
        total = 0.0
        first = self.step * loop.parts * ranks.count
        for part in range(loop.parts):
            numbers = range(first + part * ranks.count, first + (part + 1) * ranks.count)
            batch = {name: each.to(self._accelerator.device) for name, each in self._batches[numbers[ranks.rank]].items()}
            with self._accelerator.no_sync(self._wrapped) if part + 1 < loop.parts else nullcontext():
                with self._autocast():
                    loss = self._wrapped(**batch)
                total += self._finite(loss, numbers)
                self._accelerator.backward(loss * ranks.count)  # gradients are the processes' mean
        self._accelerator.clip_grad_norm_(self._wrapped.parameters(), loop.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self._report()
        of_all = float(ranks.add_up(torch.tensor(total, dtype=torch.float64)))
        self.history.append({"step": self.step, "loss": of_all, "learning_rate": self._peaks[0] * rate, **self._module.drain()})
        self._report(f"{DETAIL}loss {of_all:.3f}")

    def _rate(self) -> float:
        """What the next step's rate is of its peak: linear up over the warm-up, then linear to zero, or to the least."""
        loop = self._loop
        warm = max(1, math.ceil(loop.steps * loop.warmup))
        rest = max(1, loop.steps - warm)
        return min((self.step + 1) / warm, max(loop.least, 1.0 - (self.step - warm) / rest))

    def _finite(self, loss: torch.Tensor, numbers: Sequence[int]) -> float:
        value = float(loss.detach())
        if processes().add_up(torch.tensor(float(math.isfinite(value)))) < processes().count:
            texts = "; ".join(self._batches.describe(number) for number in numbers)
            raise NotFiniteError.at(f"step {self.step + 1}: {texts}", f"loss {value}")
        return value

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=self._loop.bfloat16)

    def _report(self, detail: str = "") -> None:
        if processes().is_main:
            self._run.progress(f"train{detail}", self.step, self._loop.steps)

    def _evaluate(self, judge: Judge) -> None:
        self._wrapped.eval()
        with torch.no_grad(), self._autocast():
            losses = judge(self._wrapped)
        mean = sum(losses.values()) / len(losses)
        if not math.isfinite(mean):
            raise NotFiniteError.at(f"held-out text after step {self.step}", f"loss {mean}")
        each = {f"eval_{name}_loss": loss for name, loss in losses.items()}
        self.history.append({"step": self.step, "eval_loss": mean, **each})

    def _no_longer_better(self) -> bool:
        since = [each for each in self.history if "eval_loss" in each and each["step"] > self.best_step > 0]
        return len(since) >= self._loop.patience

    def _keep(self) -> None:
        """Judge and keep a state where one is due; without a judge every two minutes, or as often as writing one allows."""
        began = time.monotonic()
        due = began >= self._kept + self._wait if self._judge is None else self.step % self._loop.every == 0
        if due and self._judge is not None:
            self._evaluate(self._judge)
        if due and self._folder is not None:
            self._write(self._folder)
            self._kept = time.monotonic()
            self._wait = max(STATE_SECONDS, _STATE_SHARE * (self._kept - began))

    def _write(self, folder: Path) -> None:
        moved = {name: _whole(each) for name, each in self._moving.items()}
        kept = {
            f"{key} {name}": _whole(value)
            for name, each in self._moving.items()
            for key, value in self._optimizer.state.get(each, {}).items()
        }
        for name, state in _generators(self._accelerator.device).items():
            kept[name] = self._accelerator.gather(state[None].to(self._accelerator.device)).cpu()
        if processes().is_main:
            write_state(folder, self.step, moved, kept, self.history)
            tidy(folder, self.best_step)
        processes().wait()

    def _resume(self) -> None:
        """Take the newest whole state."""
        state = next(iter(whole_states(self._folder)), None) if self._folder is not None else None
        if state is None:
            return
        with damaged(state):
            moved, kept, self.history = read_state(state, self._moving)
            self.step = int(state.name.rpartition("-")[2])
            with torch.no_grad():
                for name, parameter in self._moving.items():
                    parameter.copy_(_like(moved[name], parameter))
            self._take_optimizer(kept)
        processes().wait()

    def _take_optimizer(self, kept: Tensors) -> None:
        for saved, value in kept.items():
            key, _, name = saved.partition(" ")
            if key == "generator":
                torch.set_rng_state(value[processes().rank % len(value)])
            elif key == "generator_cuda" and self._accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(value[processes().rank % len(value)], self._accelerator.device)
            elif name:
                parameter = self._moving[name]
                self._optimizer.state[parameter][key] = _like(value, parameter) if value.ndim else value


def _whole(tensor: Any) -> torch.Tensor:
    """On the CPU; of which each process may hold a shard."""
    whole: torch.Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return whole.cpu().contiguous()


def _like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A tensor of a parameter's shape, where and sharded as the parameter is. Raises ValueError for another shape."""
    if value.shape != parameter.shape:
        raise ValueError(f"{tuple(value.shape)} for {tuple(parameter.shape)}")
    value = value.to(parameter.device)
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators, (bytes,) uint8."""
    found = {"generator": torch.get_rng_state()}
    return found | ({"generator_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
