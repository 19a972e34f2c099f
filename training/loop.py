"""The training loop: one for every recipe.

It knows nothing of tasks: a `Problem` makes losses, the loop makes steps, averages weights, writes a JSON line now and
then and a checkpoint from which the same run goes on exactly.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models import BUILDERS
from models.checkpoints import HASH_PLANES, SAME_NAMES, load_official
from training.optimizers import MuonAdamW
from training.recipe import Recipe

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 120.0
LOG_STEPS = 100


class Trained(NamedTuple):
    """What a run gives.

    Attributes:
        model: with averaged weights, in evaluation mode.
        seconds: spent on the run, the parts before an interruption included.
    """

    model: nn.Module
    seconds: float


class Run:
    """A model on its way through a recipe, and everything that the rest of the way depends on.

    Args:
        recipe: what to train.
        examples: what the recipe's problem loaded.
        device: where to train.
        start_weights: safetensors to begin from instead of fresh weights.
        model: to train instead of the one that the recipe names.
    Raises: ValueError if there are too few examples for one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        examples: Any,
        *,
        device: torch.device,
        start_weights: Path | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.recipe, self.examples, self.device = recipe, examples, device
        self.steps_per_epoch = len(examples) // recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"{len(examples)} examples do not fill one batch of {recipe.batch_size}")
        self.num_steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.rng = Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model: nn.Module = model or BUILDERS[recipe.model](num_classes=len(recipe.problem.labels))
        if start_weights is not None:
            # A model that clusters may start from one that does not: its hash planes are then its own.
            load_official(self.model, load_file(start_weights), SAME_NAMES, kept=HASH_PLANES)
        self.model.to(device).train()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        self.optimizer = MuonAdamW(self.model, recipe.optimizer, num_steps=self.num_steps)

    def advance(self) -> Tensor:
        """Make one step.

        Returns: scalar, loss of the step's batch.
        """
        recipe = self.recipe
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.has_bf16):
            progress = self.step / self.num_steps
            loss = recipe.problem.loss(
                self.model, self.examples, self._rows(self.step), progress=progress, rng=self.rng
            )
        loss.backward()
        if recipe.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        self.optimizer.step(self.step)
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def finish(self) -> nn.Module:
        """Take the averaged weights out, in evaluation mode.

        Batch norms keep statistics of the weights that they were trained with, so those of the average are collected in
        one more pass over the examples, as the last steps show them.
        """
        model: nn.Module = self.average.module.eval()
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            return model
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        progress = (self.num_steps - 1) / self.num_steps
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.has_bf16):
            for step in range(self.steps_per_epoch):
                rows = self._rows(self.num_steps + step)
                self.recipe.problem.loss(model, self.examples, rows, progress=progress, rng=self.rng)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval()

    def save(self, path: Path, *, seconds: float) -> None:
        """Write a checkpoint; an interrupted write leaves the earlier one whole."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "num_steps": self.num_steps,
            "rng": self.rng.get_state(),
            "global_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> float:
        """Go on from a checkpoint.

        Returns: seconds spent before it was written.
        Raises: ValueError if it belongs to a run of another length, whose learning rates differ.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        num_steps = state.get("num_steps", self.num_steps)
        if num_steps != self.num_steps:
            raise ValueError(f"{path} belongs to a run of {num_steps} steps; this one has {self.num_steps}; remove it")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["global_rng"])
        if state.get("cuda_rng") is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return float(state.get("seconds", 0.0))

    def _rows(self, step: int) -> Tensor:
        """Choose a step's batch: every epoch has an order of its own, which depends on the seed alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order_rng = Generator().manual_seed(self.recipe.seed * 100_003 + epoch)
        size = self.recipe.batch_size
        return torch.randperm(len(self.examples), generator=order_rng)[position * size : (position + 1) * size]


def train(
    recipe: Recipe, *, data: Path, work: Path, device: torch.device, start_weights: Path | None = None
) -> Trained:
    """Run a recipe to its end, going on from the checkpoint in the work folder if there is one.

    Args:
        recipe: what to train.
        data: folder of all data sets.
        work: folder for the checkpoint and `log.jsonl`; made if missing.
        device: where to train.
        start_weights: safetensors to begin from instead of fresh weights; a checkpoint wins over them.
    Raises: FloatingPointError if the loss is not finite; the checkpoint before that is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, recipe.problem.load(data), device=device, start_weights=start_weights)
    checkpoint = work / CHECKPOINT
    start = time.monotonic() - (run.resume(checkpoint) if checkpoint.exists() else 0.0)
    log(work, {"step": run.step, "num_steps": run.num_steps, "device": str(device)})

    saved = time.monotonic()
    losses: list[Tensor] = []
    with tqdm(total=run.num_steps, initial=run.step, unit="step", mininterval=5.0, dynamic_ncols=True) as bar:
        while run.step < run.num_steps:
            losses.append(run.advance())
            bar.update()
            is_last = run.step == run.num_steps
            is_save_due = is_last or time.monotonic() - saved > CHECKPOINT_SECONDS
            if is_save_due or run.step % LOG_STEPS == 0:
                loss = _mean(losses, run.step)
                losses.clear()
                bar.set_postfix(loss=f"{loss:.3f}")
                log(work, {"step": run.step, "epoch": run.step / run.steps_per_epoch, "loss": loss})
            if is_save_due:
                run.save(checkpoint, seconds=time.monotonic() - start)
                saved = time.monotonic()
    return Trained(run.finish(), time.monotonic() - start)


def log(work: Path, fields: dict[str, Any]) -> None:
    """Append one JSON line to `work/log.jsonl`, with the time in seconds since the epoch."""
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps({"time": round(time.time(), 1), **fields}) + "\n")


def _mean(losses: list[Tensor], step: int) -> float:
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} at step {step}; it should be finite; lower the learning rate")
    return mean
