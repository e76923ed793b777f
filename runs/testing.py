"""The test that a run ends with: its figures, then its pictures."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from rich.console import Console

from callbacks import EMA, Pictures, run_checkpoint, tested_step
from datamodules import ImageDataModule
from lightning_modules import LikelihoodModule
from runs.directory import LAST, RESULT, write_json
from runs.report import code_version, result_record, table, totals
from runs.resuming import resume_command
from runs.settings import only_tries
from runs.speech import one_sentence, say


def test(
    trainer: Trainer,
    model: LikelihoodModule,
    datamodule: ImageDataModule,
    directory: Path,
    cfg: DictConfig,
    started: float,
    best_figure: float,
) -> None:
    """Tests the best weights, or the last if none were validated: result.json, the table, and after these the pictures."""
    session, step = time.monotonic() - started, trainer.global_step
    best = getattr(run_checkpoint(trainer), "best_model_path", "") or None
    trainer.fit_loop.epoch_loop._batches_that_stepped = step  # which numbers the row of the test; one less after a resumed run
    facts = {
        "weights": "ema" if any(isinstance(callback, EMA) for callback in trainer.callbacks) else "raw",
        "checkpoint": Path(best).name if best else None,
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "protocol": {**datamodule.protocol(), **model.protocol(), "consistency": model.consistency},
        "choices": {key: value for key, value in HydraConfig.get().runtime.choices.items() if not key.startswith("hydra/")},
        "overrides": list(HydraConfig.get().overrides.task),
        "seed": cfg.seed,
        **code_version(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "objective": best_figure,
    }
    pictures = [callback for callback in trainer.callbacks if isinstance(callback, Pictures)]

    def report(trainer: Trainer, model: LikelihoodModule) -> None:
        if only_tries(trainer, cfg):
            text = f"trainer.fast_dev_run={cfg.trainer.fast_dev_run}: training, validation and test work; there is no result"
            say(trainer, text)
        elif trainer.is_global_zero:
            write_result(trainer, model, directory, facts, session, time.monotonic() - started)
            if pictures:
                say(trainer, f"drawing pictures of samples and of each KL, in {directory}")
                end_by_sigterm(trainer)

    trainer.strategy.optimizers = []  # or sharding would read their state too, and fail where a parameter has none
    others = [callback for callback in trainer.callbacks if callback not in pictures]
    trainer.callbacks = [*others, LambdaCallback(on_test_end=report), *pictures]
    try:
        with one_sentence(trainer):
            trainer.test(model, datamodule, ckpt_path=best, verbose=False, weights_only=True)
    except (KeyboardInterrupt, SystemExit, SIGTERMException):
        if (directory / RESULT).is_file():
            say(trainer, "\ninterrupted while pictures were drawn; the result stands")
        elif (directory / LAST).is_file():
            say(trainer, f"\ninterrupted in the test; to begin it again:\n  {resume_command(directory)}")
        raise


def write_result(
    trainer: Trainer, model: LikelihoodModule, directory: Path, facts: dict[str, Any], fitted: float, elapsed: float
) -> None:
    """Writes result.json and prints the table: figures come before pictures, which take their time.

    Args:
        trainer: the run's, as its test ends.
        model: with the tested weights.
        directory: the run's.
        facts: what stands beside the figures.
        fitted: seconds of this session when fit was over.
        elapsed: seconds of this session.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
    step, tested = facts["step"], tested_step(trainer)
    protocol = {**facts["protocol"], "num_tested": model.num_scored}
    facts = {**facts, "protocol": protocol, "tested_step": tested, **totals(trainer, fitted, elapsed)}
    write_json(directory / RESULT, result_record(metrics, model.num_dims, model.levels, **facts))
    steps = f"step {tested}" + (f" of {step}, the best in validation" if tested < step else "")
    whole = model.num_scored == protocol["num_test"]  # else trainer.limit_test_batches left some out
    images = "test set" if whole else f"{model.num_scored} of {protocol['num_test']} test images"
    Console().print(table(metrics, model, f"{images}, {facts['weights']} weights, {steps}"))


def end_by_sigterm(trainer: Trainer) -> None:
    """Has SIGTERM end what follows at once: Lightning looks for it between batches, and there are none any more."""

    def end(*_: Any) -> None:
        raise SIGTERMException

    if trainer.received_sigterm:  # in the last batch
        end()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # Lightning puts back what was there before
