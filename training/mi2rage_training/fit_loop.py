"""The training loop: accelerate's mixed precision, accumulation and processes, with draws keyed by step."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mi2rage_rt.noise import rng, seed_from
from mi2rage_rt.progress import Steps
from mi2rage_rt.progress import steps as progress_steps
from mi2rage_training.classifier_model import LoadedClassifier, RelationModule
from mi2rage_training.fit_checkpoint import CheckpointFile, FitState
from mi2rage_training.fit_config import FitConfig
from mi2rage_training.fit_data import PairTensors, logits_from, metrics_of, predictions
from mi2rage_training.fit_device import seed_device
from mi2rage_training.fit_targets import Targets
from mi2rage_training.metrics import RelationMetrics

__all__ = ["Trainer"]

_SMALL_MODEL = 10_000_000


class _LossModule(nn.Module):
    """Gives the loss in `forward`, the only method that DDP and autocast see."""

    shift: Tensor

    def __init__(self, relation: RelationModule, shift: Tensor) -> None:
        super().__init__()
        self.relation = relation
        self.register_buffer("shift", shift, persistent=False)

    def forward(
        self, text: dict[str, Tensor], image: dict[str, Tensor], mask: Tensor, shares: Tensor, weights: Tensor
    ) -> Tensor:
        """Sum over the rows of weight * cross-entropy to `shares`, float32 scalar."""
        logits = logits_from(self.relation, text, image, mask).float() + self.shift
        return (weights * nn.functional.cross_entropy(logits, shares, reduction="none")).sum()


class Trainer:
    """Fits a classifier's module in place.

    Args:
        classifier: its module stands on the device to fit on.
        data: of the training pairs; `targets`: of the same.
        held_out: of the validation pairs, or None.

    Attributes:
        state: how far it is.
        total_steps: optimiser steps that the settings ask for.
    """

    def __init__(
        self,
        classifier: LoadedClassifier,
        accelerator: Accelerator,
        data: PairTensors,
        targets: Targets,
        held_out: PairTensors | None,
        config: FitConfig,
    ) -> None:
        self.classifier = classifier
        self.accelerator = accelerator
        self.data = data
        self.targets = targets
        self.held_out = held_out
        self.config = config
        self.state = FitState()
        self.device = classifier.module.missing_image.device
        self.epoch_steps = -(-len(data.pairs) // config.batch_size)
        self.total_steps = config.steps or config.epochs * self.epoch_steps
        trained = [parameter for parameter in classifier.module.parameters() if parameter.requires_grad]
        small = sum(parameter.numel() for parameter in trained) < _SMALL_MODEL
        self.peak_rate = (1e-3 if small else 3e-5) if config.learning_rate is None else config.learning_rate
        optimizer = torch.optim.AdamW(trained, lr=self.peak_rate, weight_decay=config.weight_decay)
        self._order: tuple[int, Tensor] | None = None
        self._wrap(optimizer)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        loss_module = _LossModule(self.classifier.module, self.targets.shift.to(self.device))
        self.loss_module: Any = self.accelerator.prepare_model(loss_module)
        self.optimizer: Any = self.accelerator.prepare_optimizer(optimizer)

    def run(self, checkpoint: CheckpointFile | None, description: str) -> int:
        """Go on from `checkpoint`, where there is one, to the end, load the best weights, and return where it began."""
        if checkpoint is not None and (saved := checkpoint.read()) is not None:
            self._restore(saved)
        began_at = self.state.step
        self._train_mode()
        with self._progress(description) as bar:
            bar.advance(self.state.step)
            while self.state.step < self.total_steps and not self._stalled():
                self.train_step()
                self.state.step += 1
                bar.advance()
                every = self.config.evaluation_steps or self.epoch_steps
                epoch_is_over = self.state.step % every == 0 or self.state.step == self.total_steps
                if epoch_is_over:
                    self._end_epoch()
                    bar.note(f"loss {self.state.losses[-1]:.3f}")
                if checkpoint is not None and (epoch_is_over or self._wants_checkpoint()):
                    self._save(checkpoint)
        if self.state.best:
            self.classifier.module.load_state_dict(self.state.best, strict=False)
        return began_at

    def _progress(self, description: str) -> contextlib.AbstractContextManager[Steps]:
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext(Steps(None, None))
        return progress_steps(description, self.total_steps)

    def _stalled(self) -> bool:
        """Whether `patience` epochs in a row have not raised the validation F1."""
        scores = self.state.scores
        if self.config.patience is None or not scores:
            return False
        return len(scores) - 1 - scores.index(max(scores)) >= self.config.patience

    def _wants_checkpoint(self) -> bool:
        return self.config.checkpoint_steps is not None and self.state.step % self.config.checkpoint_steps == 0

    def _train_mode(self) -> None:
        self.loss_module.train()
        if not self.config.train_image_encoder:
            self.classifier.module.image_encoder.eval()

    def _rows(self) -> Tensor:
        """Rows of the step's batch, over all processes: shuffled anew in each epoch."""
        epoch, position = divmod(self.state.step, self.epoch_steps)
        if self._order is None or self._order[0] != epoch:
            order = rng(seed_from("fit-order", self.config.seed, epoch)).permutation(len(self.data.pairs))
            self._order = (epoch, torch.from_numpy(order))
        start = position * self.config.batch_size
        return self._order[1][start : start + self.config.batch_size]

    def _hidden(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image mask, float32 (B,), and which sentences are reduced, bool (B,) or None: no row loses both."""
        mask = self.data.mask[rows]
        if not (self.config.image_dropout or self.config.text_dropout):
            return mask, None
        drawn = torch.from_numpy(rng(seed_from("fit-hidden", self.config.seed, self.state.step)).random(len(rows)))
        hidden = drawn < self.config.image_dropout
        reduced = (drawn >= 1 - self.config.text_dropout) & (mask > 0) if self.config.text_dropout else None
        return mask * (~hidden).float(), reduced

    def _rate(self) -> float:
        """Linear warm-up over a tenth of the steps, then linearly to zero."""
        step, steps = self.state.step, self.total_steps
        warmup = max(1, steps // 10)
        return self.peak_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    def train_step(self) -> None:
        """One optimiser step.

        The batch is dealt to `gradient_accumulation` parts of each process; a part that gets no row computes one with
        weight 0, since all processes must take part. The mean over the whole batch comes out, whatever their number.
        """
        rows = self._rows()
        mask, reduced = self._hidden(rows)
        processes, parts = self.accelerator.num_processes, self.config.gradient_accumulation
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        for part in range(parts):
            deal = part * processes + self.accelerator.process_index
            mine = torch.arange(len(rows))[deal :: processes * parts]
            weights = self.targets.weights[rows[mine]]
            if not len(mine):
                mine, weights = torch.zeros(1, dtype=torch.long), torch.zeros(1)
            seed_device(self.device, "fit-dropout", self.config.seed, self.state.step, deal)
            hidden = mask[mine], None if reduced is None else reduced[mine]
            self.state.loss_sum += self._part(rows[mine], *hidden, weights, len(rows))
        self.state.loss_rows += len(rows)

    def _part(self, rows: Tensor, mask: Tensor, reduced: Tensor | None, weights: Tensor, batch: int) -> float:
        with self.accelerator.accumulate(self.loss_module):
            loss = self.loss_module(
                self.data.text(rows, reduced),
                self.data.image(rows),
                mask.to(self.device),
                self.targets.shares[rows].to(self.device),
                weights.to(self.device),
            )
            # Accelerate divides by the parts, and DDP by the processes.
            scale = self.accelerator.num_processes * self.config.gradient_accumulation / batch
            self.accelerator.backward(loss * scale)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.loss_module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def _end_epoch(self) -> None:
        state = self.state
        state.losses.append(self._loss_sum() / state.loss_rows)
        state.loss_sum, state.loss_rows = 0.0, 0
        if self.held_out is None:
            return
        state.scores.append(self._validate(self.held_out).f1)
        if state.scores[-1] >= max(state.scores):
            state.best = {name: value.clone() for name, value in self._trained_weights().items()}
        self._train_mode()

    def _loss_sum(self) -> float:
        """The running epoch's, over all processes."""
        if self.accelerator.num_processes == 1:
            return self.state.loss_sum
        return float(sum(gather_object([self.state.loss_sum])))

    def _validate(self, held_out: PairTensors) -> RelationMetrics:
        """Each process answers its share of the rows; all learn all answers, and so come to the same decision."""
        rows = torch.arange(len(held_out.pairs))[self.accelerator.process_index :: self.accelerator.num_processes]
        answers = list(zip(rows.tolist(), predictions(held_out, rows), strict=True))
        if self.accelerator.num_processes > 1:
            answers = sorted(gather_object(answers))
        return metrics_of(held_out, [answer for _, answer in answers])

    def _trained_weights(self) -> dict[str, Tensor]:
        """The module's state without what is frozen: that comes from its source again."""
        frozen = {name for name, value in self.classifier.module.named_parameters() if not value.requires_grad}
        return {name: value for name, value in self.classifier.module.state_dict().items() if name not in frozen}

    def _save(self, checkpoint: CheckpointFile) -> None:
        progress = dataclasses.replace(self.state, loss_sum=self._loss_sum())
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        checkpoint.write(
            {
                "progress": {field.name: getattr(progress, field.name) for field in dataclasses.fields(FitState)},
                "weights": self._trained_weights(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": {} if scaler is None else scaler.state_dict(),
            }
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.state = FitState(**saved["progress"])
        if not self.accelerator.is_main_process:
            self.state.loss_sum = 0.0  # the main process has the sum of all
        self.state.best = {name: value.to(self.device) for name, value in self.state.best.items()}
        self.classifier.module.load_state_dict(saved["weights"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
