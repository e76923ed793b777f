"""best.ckpt and last.ckpt in the run directory, with the model's config inside and never with weights that are not finite."""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from callbacks.ema import EMA
from callbacks.files import whole
from callbacks.last_validation import ends_here, is_cut_off
from lightning_modules.base import is_logged
from lightning_modules.sharding import load_whole, sharded_parts

LARGE = ("state_dict", "current_model_state", "optimizer_states", "begun_step")  # large, and of tensors and numbers


def diverged(what: str, step: int) -> FloatingPointError:
    """Returns the error of a run that has diverged, to raise."""
    return FloatingPointError(
        f"training diverged: {what} after {step} steps; lower model.optimizer.lr, or keep trainer.gradient_clip_val"
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of every floating-point tensor is finite, of this rank's part where they are sharded."""
    extremes: dict[torch.device, list[Tensor]] = {}  # what is gathered of shards lies on the CPU, and they do not
    for tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if own.is_floating_point() and own.numel():
            # NaN is both the least and the largest; torch.isfinite takes fifteen times as long, and memory for three more
            extremes.setdefault(own.device, []).append(torch.stack(torch.aminmax(own)))
    return all(bool(torch.stack(of_one).isfinite().all()) for of_one in extremes.values())  # waits for each device once


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then moves it there: a process that is killed leaves the one before whole.

    Lightning moves it from the system's folder for temporary files, which on another disk is a copy over the one before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the file at once; one that a callback of one's own keeps elsewhere (``s3://...``) as Lightning does."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        self._write(lambda draft: torch.save(checkpoint, draft), path)

    def copy_checkpoint(self, source: str | Path, path: str | Path) -> None:
        """Copies a file at once, which takes a third of the time that writing 560 MB does, and gathers nothing again."""
        self._write(lambda draft: shutil.copyfile(source, draft), path)

    @staticmethod
    def _write(write: Callable[[Path], object], path: str | Path) -> None:
        with whole(Path(path)) as draft:
            try:
                write(draft)
            except RuntimeError as error:
                if any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter")):
                    raise OSError(errno.EIO, "cannot be written whole, perhaps because the disk is full") from error
                raise


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best by the validation bound and the last, and writes the last when training is interrupted.

    A run that has diverged ends here, by its loss where that is logged, by its validation figure, or by its weights before they
    are written: what is on disk can be gone on from.

    Attributes:
        interrupted: whether training was, and last.ckpt is there to go on from.
        kept_step: the step of last.ckpt.
        loaded_step: the step of the checkpoint that was read last, to go on from or to test.

    Args:
        dirpath: where they go.
        config: plain dict of the model's and the data's config; a resumed run compares it before it trains.
        file_format: version of what a checkpoint holds, checked before one is read.
    """

    def __init__(self, dirpath: str, config: dict[str, Any], file_format: int) -> None:
        # val/elbo and not val/bpd: the same order, and continuous data has no bits/dim
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor="val/elbo",
            mode="max",
            save_last=True,
            save_on_train_epoch_end=False,  # but after validations
            enable_version_counter=False,
        )
        self.config, self.file_format = config, file_format
        self.interrupted, self.kept_step, self.loaded_step, self._looked_at, self._validates = False, 0, 0, 0, True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has files written whole, unless one has chosen how they are written."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        files, written = trainer.strategy.checkpoint_io, self._last_checkpoint_saved
        best_now = written == self.best_model_path and self._last_global_step_saved == trainer.global_step
        if best_now and filepath == self.last_model_path and isinstance(files, WholeFiles):  # last.ckpt, of the same moment
            if trainer.is_global_zero:
                files.copy_checkpoint(written, filepath)
            trainer.strategy.barrier("RunCheckpoint.copy")
            self._last_checkpoint_saved = filepath
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.after_save_checkpoint(proxy(self))
        else:
            super()._save_checkpoint(trainer, filepath)
        self.kept_step = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on after an epoch that has ended, and from the weights that were trained, averaged now or not."""
        self.loaded_step = checkpoint["global_step"]
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.kept_step = self.loaded_step
        there, here = (config["data"].get("batch_size") for config in (checkpoint["config"], self.config))
        fit_loop = checkpoint["loops"]["fit_loop"]
        if there != here or not _is_validated_in_part(fit_loop):
            _end_epoch(fit_loop)
        if "current_model_state" in checkpoint and not any(isinstance(callback, EMA) for callback in trainer.callbacks):
            load_whole(pl_module, checkpoint["current_model_state"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best figure so far if best.ckpt lies here: its directory may have been moved, another run's has another."""
        here = Path(self.dirpath)
        if not (here / f"{self.filename}{self.FILE_EXTENSION}").is_file():
            return

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks once whether there are validations: Lightning looks through the module each time it is asked."""
        super().on_train_start(trainer, pl_module)
        self._validates = trainer.enable_validation

    @cached_property
    def state_key(self) -> str:
        """Lightning's key, put together once: it is asked for at every hook of every step."""
        return super().state_key

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a run whose loss is not finite; looks only where it is logged, when the device is waited for anyway.

        Nothing is saved here, but where training ends within an epoch and no validation follows: Lightning calls no hook.
        """
        step = trainer.global_step
        if step != self._looked_at and is_logged(trainer, step):
            self._looked_at = step
            self._check(trainer, "train/loss")
        if not self._validates and not trainer.fit_loop.epoch_loop._num_ready_batches_reached() and ends_here(trainer):
            self._save_unvalidated(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run whose validation figure is not finite, before it is kept; writes last.ckpt whatever the figure.

        Lightning does so only where the figure is the best so far: a run that is killed would go on from there.
        """
        if not trainer.sanity_checking:
            self._check(trainer, "val/elbo")
        super().on_validation_end(trainer, pl_module)
        self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes last.ckpt after every epoch where there are no validations; an epoch that was cut short has written it."""
        if not self._validates:
            self._save_unvalidated(trainer, pl_module)

    def _save_unvalidated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(pl_module, "before_stop"):  # or rank 0 would save what it has seen alone: a validation shares that itself
            pl_module.before_stop()
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @staticmethod
    def _check(trainer: Trainer, name: str) -> None:
        value = float(trainer.callback_metrics.get(name, 0.0))  # equal on all ranks: all of them end
        if not math.isfinite(value):
            raise diverged(f"{name} is {value}", trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the config, the format, and what tells the run's images from others.

        Raises:
            FloatingPointError: if the weights, or their average, are not finite.
            MisconfigurationException: if something else in it could not be read again.
        """
        kept = (value for value in checkpoint["state_dict"].values() if isinstance(value, Tensor))
        if not all_finite([*pl_module.parameters(), *kept]):
            raise diverged("the weights are not finite", trainer.global_step)
        checkpoint["config"] = self.config
        checkpoint["format"] = self.file_format
        if hasattr(trainer.datamodule, "fingerprint"):
            checkpoint["images"] = trainer.datamodule.fingerprint()
        _check_readable(checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes last.ckpt after Ctrl-C or SIGTERM; one during a validation has it done again, from its first batch.

        Not weights that are not finite, nor sharded ones, as gathering them would wait for ranks that the signal did not reach:
        then the one of the validation before stays.
        """
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)) or not trainer.global_step:
            return
        last = Path(self.dirpath) / f"last{self.FILE_EXTENSION}"
        writable = trainer.training or (trainer.validating and not trainer.sanity_checking)
        writable = writable and not sharded_parts(pl_module) and all_finite(pl_module.parameters())
        if writable and rank_zero_only.rank == 0:
            if trainer.validating:
                progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
                progress.reset()
                progress.total.ready = progress.total.started = 1  # how Lightning marks a validation that is to be finished
            # not trainer.save_checkpoint: its barrier would wait for ranks that the signal did not reach
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, last)
            self.kept_step = trainer.global_step
        self.interrupted = last.exists()


def _check_readable(checkpoint: dict[str, Any]) -> None:
    """Refuses what torch.load(weights_only=True) would not read: what callbacks and save_hyperparameters put there."""
    parts = {name: part for name, part in checkpoint.items() if name not in LARGE and name != "callbacks"}
    for name, part in {**parts, **checkpoint["callbacks"]}.items():
        file = BytesIO()
        try:
            torch.save(part, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # whatever an object raises that cannot be pickled
            found = re.search(r"(?:GLOBAL|pickle) (\S+)", str(error))
            raise MisconfigurationException(
                f"the checkpoint's part {name!r} holds {found[1] if found else 'an object'}, which weights_only=True does not "
                "read: let it hold tensors, numbers, strings, lists and dicts"
            ) from error


def _is_validated_in_part(fit_loop: dict[str, Any]) -> bool:
    """Whether the validation after the last batch was cut off, and is to be done again."""
    epochs = fit_loop["epoch_progress"]["current"]
    return is_cut_off(fit_loop["epoch_loop.val_loop.batch_progress"]) and epochs["processed"] < epochs["ready"]


def _end_epoch(fit_loop: dict[str, Any]) -> None:
    """Counts an epoch as over whose last batch has been trained on.

    Lightning writes it down as begun, and goes on with it wherever it then finds its batches, or their validation, not at their
    end: in batches of another size, after a limit on batches, and always where there are max_steps.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if batches["is_last_batch"]:
        for counts in epochs.values():
            counts["processed"] = counts["completed"] = counts["started"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def run_checkpoint(trainer: Trainer) -> RunCheckpoint | None:
    """Returns the one that keeps the run's best and last, or None; a user's own may come before it."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, RunCheckpoint)), None)


def tested_step(trainer: Trainer) -> int:
    """Returns the step of the weights that a run is tested with: of its best, where there is one, once that has been read."""
    saver = run_checkpoint(trainer)
    return trainer.global_step if saver is None or not saver.best_model_path else saver.loaded_step
