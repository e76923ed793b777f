"""What a command line can name for a job under test: callbacks that say what it does, and data of another kind."""

import os

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_modules.sharding import local


class Shards(Callback):
    """Prints how many numbers of the weights, their gradients' moments and their average this rank holds."""

    def on_train_end(self, trainer, pl_module):
        parameters = list(pl_module.parameters())
        state = trainer.optimizers[0].state
        moments = sum(local(state[parameter]["exp_avg"]).numel() for parameter in parameters)
        weights = sum(local(parameter).numel() for parameter in parameters)
        average = sum(tensor.numel() for callback in trainer.callbacks for tensor in getattr(callback, "_average", ()))
        whole = sum(parameter.numel() for parameter in parameters)
        print(f"rank {trainer.global_rank} holds {weights} {moments} {average} of {whole}", flush=True)


class ForeignData(LightningDataModule):
    """Data that is not this framework's."""

    def __init__(self, **settings):
        super().__init__()


class Plain(LightningModule):
    """A model without a bound."""

    def __init__(self, **settings):
        super().__init__()


class Signals(Callback):
    """The first rank sends itself a signal after a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
