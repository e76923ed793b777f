"""How large a batch the memory holds: tries, says the setting to type, and ends the job."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error


class BatchSizeFinder(Callback):
    """Takes training steps with batches of 1, 2, 4, ... images until the memory, or the training set, is exhausted.

    The job then ends without training: a batch size that a run found by itself would be in no config, and the learning rate
    and its schedule depend on it. Lightning's finder goes on with the run, and over this data asks for batches larger than
    the training set.

    Args:
        steps: training steps with each size; the second has the optimiser's moments beside it.
        most: where to stop in any case.

    Raises:
        ValueError: if a number is below 1.
    """

    def __init__(self, steps: int = 2, most: int = 65536) -> None:
        if steps < 1 or most < 1:
            raise ValueError(f"callbacks.batch_size_finder.steps={steps} and .most={most} must be at least 1")
        self.steps, self.most = steps, most

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks for the size, prints it and ends the job."""
        found, size, reason = 0, 1, f"{self.most} is where it stops"
        while size <= self.most:
            if size > trainer.datamodule.sizes["train"]:
                reason = "the training set is not much larger"
                break
            try:
                self._try(trainer, pl_module, size)
            except RuntimeError as error:
                if not is_oom_error(error):
                    raise
                reason = f"the memory does not hold {size}"
                break
            found, size = size, 2 * size
        print(f"data.batch_size={found} fits: {reason}" if found else f"no batch fits: {reason}", flush=True)
        raise SystemExit(0)

    def _try(self, trainer: Trainer, pl_module: LightningModule, size: int) -> None:
        pl_module.zero_grad()
        garbage_collection_cuda()
        trainer.datamodule.batch_size = size
        x = trainer.strategy.batch_to_device(next(iter(trainer.datamodule.train_dataloader())))
        for _ in range(self.steps):
            with trainer.precision_plugin.train_step_context(), torch.enable_grad():
                loss, _ = pl_module.objective(x)
            loss.backward()
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad()
