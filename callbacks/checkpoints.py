"""best.ckpt and last.ckpt in the run directory, with the model's config inside."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class RunCheckpoint(ModelCheckpoint):
    """Keeps the best by the validation bound and the last, and writes the last when training is interrupted.

    Args:
        dirpath: where they go.
        config: plain dict of the model's and the data's config; a resumed run compares it before it trains.
        file_format: version of what a checkpoint holds, checked before one is read.
    """

    def __init__(self, dirpath: str, config: dict[str, Any], file_format: int) -> None:
        # val/elbo and not val/bpd: the same order, and continuous data has no bits/dim
        super().__init__(
            dirpath=dirpath, filename="best", monitor="val/elbo", mode="max", save_last=True, enable_version_counter=False
        )
        self.config, self.file_format = config, file_format
        self.interrupted = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the config and the format."""
        checkpoint["config"] = self.config
        checkpoint["format"] = self.file_format

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes last.ckpt after Ctrl-C or SIGTERM, if any step was taken."""
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)) or not trainer.training or not trainer.global_step:
            return
        self.interrupted = True
        if rank_zero_only.rank == 0:
            # not trainer.save_checkpoint: its barrier would wait for ranks that the signal did not reach
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, f"{self.dirpath}/last{self.FILE_EXTENSION}")
