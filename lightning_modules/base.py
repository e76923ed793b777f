"""What the three families share: a bound to report, an objective to minimise, and the same metric names.

``elbo`` and ``objective`` are apart so that ``val/bpd`` compares over every run, whatever was minimised.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules import accumulation
from lightning_modules.lr_schedules import Constant
from lightning_modules.metric import TERMS, ElboMetric, TrainingTerms
from lightning_modules.sharding import gather, release, shard, sharded_parts
from losses import Elbo, to_unit
from losses.elbo import nats_to_bits_per_dim


def build(module_or_factory: nn.Module | Callable[..., nn.Module], **sizes: Any) -> nn.Module:
    """Returns a module as it is, or calls a factory (``_partial_: true`` in yaml) with the sizes that the model knows."""
    return module_or_factory if isinstance(module_or_factory, nn.Module) else module_or_factory(**sizes)


def signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a function's signature with it, which Lightning works out anew in every training step."""
    function.__signature__ = inspect.signature(function)
    return function


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the loss of optimiser step ``step`` (1 is the first) is logged; none is where ``log_every_n_steps`` is 0."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, as ``torch.nn.utils.get_total_norm`` does for one device and dtype: ()."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_norm(optimizer: Optimizer, max_norm: float) -> None:
    """Scales the gradients so that their norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    A norm that lies on the CPU is looked at, and gradients that are short enough are left alone: multiplying them by 1 is
    twice the memory traffic of the norm. A GPU would have to be waited for.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    if not parameters:
        return
    norm = total_norm([parameter.grad for parameter in parameters])
    if norm.device.type == "cpu" and type(norm) is Tensor and norm <= max_norm:
        return
    clip_grads_with_norm_(parameters, max_norm, norm)


def is_of_a_run(checkpoint_path: Any) -> bool:
    """Whether this is a checkpoint file that a run of this framework has written, with its config inside."""
    try:
        return {"config", "format"} <= torch.load(checkpoint_path, map_location="meta", weights_only=True, mmap=True).keys()
    except Exception:  # of whatever kind: a run's checkpoint can be read so
        return False


class LikelihoodModule(LightningModule, ABC):
    """A generative model with a bound on ln p(x).

    Attributes:
        consistency: whether the bound is of the three-variable form: matching is a log ratio ln q/p along one drawn chain, of
            either sign for an image, and the prior term is the KL of z_T given z_{T-1}. A table then names them so.
        evens_out: whether a test's images share low-discrepancy draws, whose errors cancel over images: a standard error that
            takes images for independent is then too large, never too small.
        train_row: numbers that callbacks add to the next row of training metrics, by name.
        num_scored: images of the last validation or test, over all ranks: fewer than there are where batches are limited.

    Args:
        image_shape: (C, H, W) of one example.
        levels: values a pixel takes, or ``None`` for continuous data, whose figures are log-densities in nats.
        optimizer: parameters -> optimiser; AdamW at 1e-3 unless given.
        lr_scheduler: (step, total steps) -> factor of the learning rate.
    """

    consistency = evens_out = False

    def __init__(
        self,
        image_shape: Sequence[int],
        levels: int | None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[[int, float], float] | None = None,
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or any(size < 1 for size in image_shape):
            raise ValueError(f"image_shape must be three positive sizes [C, H, W], got {list(image_shape)}")
        self.image_shape = tuple(int(size) for size in image_shape)
        self.levels = levels
        self.optimizer_factory = optimizer
        self.lr_factor = lr_scheduler or Constant()
        self.val_metric, self.test_metric = ElboMetric(), ElboMetric()
        self.train_row: dict[str, float | Tensor] = {}
        self.num_scored = 0
        self._training_terms, self._noted = TrainingTerms(), None
        self._begun_step: dict[str, Any] = {}  # the gradients of one that a checkpoint was written within
        self._given: list[dict[str, Any]] = []

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> LikelihoodModule:
        """Loads what a ``Trainer`` of one's own has written, as Lightning does: give the parts that it holds no settings of.

        Raises:
            TypeError: for a run's checkpoint, saying what loads one: what its model is built from may be code, which it only
                names.
        """
        if is_of_a_run(checkpoint_path):
            raise TypeError(
                f"the model of {checkpoint_path} is built from the config beside its weights: "
                f"evaluation.SavedRun.open({str(checkpoint_path)!r}).trained() does both"
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; the one that Lightning sets at every hook, forty times a step, without a module's bookkeeping."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def num_dims(self) -> int:
        """D, the number of dimensions of one example."""
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def unit(self) -> str:
        """What figures are reported in."""
        return "nats" if self.levels is None else "bits/dim"

    @property
    def likelihood_dtype(self) -> torch.dtype:
        """What images and latents are held in: float32, or float64 in a float64 model.

        Raises:
            ValueError: if the weights are of half precision.
        """
        if self.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the model's weights are {self.dtype}, too coarse to be trained or to give a bound: keep them in float32, and "
                'train with precision="bf16-mixed"'
            )
        return torch.promote_types(torch.float32, self.dtype)

    @abstractmethod
    def elbo(self, x: Tensor) -> Elbo:
        """Returns an unbiased estimate of the real bound: x uint8 (B, C, H, W) (float for continuous data)."""

    @abstractmethod
    def log_weight(self, x: Tensor) -> Tensor:
        """Returns ln p(x, z) - ln q(z|x) of one drawn z, all latents: (B,), nats.

        Its mean is the ELBO; ln of the mean of K exponentials is the importance-weighted bound (Burda et al. 2016, eq. 8).
        """

    @abstractmethod
    def objective(self, x: Tensor) -> tuple[Tensor, Elbo]:
        """Returns (loss, estimate of the real bound). The loss is a scalar in nats per dimension, and what is minimised."""

    @abstractmethod
    def sample(self, num: int, mean: bool = False) -> Tensor:
        """Draws from the model: (num, C, H, W), as images are. With ``mean``, the last step shows p(x|z_1)'s mean, no draw."""

    @abstractmethod
    def latent_kls(self, x: Tensor) -> Tensor:
        """Returns what each latent z_1..z_T costs, its KL or log ratio, nats, (T, B).

        The last row is the prior term, the others sum to matching.
        """

    def evaluation_elbo(self, x: Tensor, stage: str) -> Elbo:
        """Returns the estimate of the bound that ``stage`` ("val" or "test") reports; by default :meth:`elbo`."""
        return self.elbo(x)

    def protocol(self) -> dict[str, Any]:
        """Returns what a reader must know to compare the test figure: which estimator, with how many draws."""
        return {"estimator": "one draw of the latents for each image"}

    def to_unit(self, x: Tensor) -> Tensor:
        """Maps levels to [-1, 1]; continuous data stays as it is. float32, or float64 in a float64 model.

        Raises:
            ValueError: if these are not images (B, C, H, W) of this model, numbers where levels are due, or other levels than
                there are (:meth:`check_levels`).
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"images are a {type(x).__name__}: give one tensor (B, C, H, W), of (images, labels) the first")
        if x.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of shape {tuple(x.shape)} given to a model of (B, {', '.join(map(str, self.image_shape))})"
            )
        if x.is_floating_point() == (self.levels is not None):
            due = "continuous values" if self.levels is None else f"whole numbers 0..{self.levels - 1}"
            raise ValueError(f"images are {x.dtype}, but this model takes {due}")
        self.check_levels(x)
        return x.to(self.likelihood_dtype) if self.levels is None else to_unit(x, self.levels, self.likelihood_dtype)

    def check_levels(self, x: Tensor) -> None:
        """Refuses levels that this model does not have, which would have a finite bound, even a perfect one.

        Only what lies on the CPU is looked at, as a device would have to be waited for: images for a device are to be looked
        at before they go there.

        Raises:
            ValueError: if there are values outside 0..levels-1.
        """
        if self.levels is None or x.device.type != "cpu" or x.is_floating_point() or torch.compiler.is_compiling():
            return
        try:
            values = x.numpy()
        except RuntimeError:  # of operations that are traced, or mapped over: there are no numbers yet
            return
        if values.size and (values.max() >= self.levels or (x.dtype != torch.uint8 and values.min() < 0)):
            raise ValueError(f"images hold values {values.min()}..{values.max()}, but this model takes 0..{self.levels - 1}")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        """Leaves labels behind, as most data sets give (images, labels), and looks at levels that are about to leave the CPU.

        Those that stay there the step looks at, once, by :meth:`to_unit`.

        Raises:
            ValueError: if there are no images, or values outside 0..levels-1.
        """
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise ValueError(f"a batch is a {type(x).__name__}: give images (B, C, H, W) as one tensor, or (images, labels)")
        if self.device.type != "cpu":
            self.check_levels(x)
        return x

    def on_train_start(self) -> None:
        """Trains with the settings that the optimiser was given here: a checkpoint brings those that it was written with.

        Only with those: what else stands in a parameter group may be the optimiser's own state. What an earlier training of
        this model has noted, and was cut off before it wrote it, is left behind.
        """
        self._noted, self.train_row = None, {}
        if not self.trainer.global_step:
            self._training_terms, self._begun_step = TrainingTerms(), {}
        accumulation.go_on(self, self._begun_step)
        self._begun_step = {}
        scheduler = self.lr_schedulers()
        if not self._given or type(scheduler) is not LambdaLR:  # a subclass has an optimiser or a schedule of its own
            return
        for index, (group, given) in enumerate(zip(scheduler.optimizer.param_groups, self._given, strict=True)):
            group.update(given)
            if "lr" in given:
                scheduler.base_lrs[index] = group["initial_lr"] = given["lr"]
                group["lr"] = given["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)

    def before_stop(self) -> None:
        """Called on every rank before training stops, or saves without a validation: gives rank 0 what it is to save."""
        self._training_terms.share(self.trainer.strategy)

    def on_validation_start(self) -> None:
        """Gives rank 0 the terms of all ranks since the last row: after validation a checkpoint is written.

        And all ranks the mean of their gradients, if it comes within an optimiser step: the step's mean stays what it is.
        """
        self._training_terms.share(self.trainer.strategy)
        accumulation.share(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the terms since the last row of training; a due one is written first, or the next would hold them, too."""
        self._write_row()
        checkpoint["training_terms"] = self._training_terms.recorded(self.trainer.world_size)
        if begun := accumulation.recorded(self):
            checkpoint["begun_step"] = begun

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with them where training goes on."""
        if self.goes_on:
            self._training_terms = TrainingTerms.restored(checkpoint.get("training_terms"), self.trainer.world_size)
            self._begun_step = checkpoint.get("begun_step", {})

    @property
    def goes_on(self) -> bool:
        """Whether a checkpoint is being loaded to train on, not to test."""
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Sets Lightning's count of steps, which numbers the rows of validation: resumed within an epoch it may be too high."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    @signed
    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        """Minimises :meth:`objective`; every ``log_every_n_steps`` the means since the last time go to the loggers."""
        loss, elbo = self.objective(x)
        if self.trainer.log_every_n_steps > 0:
            self._training_terms.add(loss, elbo)
        if is_logged(self.trainer, self.trainer.global_step + 1) and not self.trainer.fit_loop._should_accumulate():
            self._note_terms()  # ranks wait for each other: once a step, of however many batches
        share = accumulation.share_of_step(self.trainer, batch_idx)
        return loss if share == 1 else loss / share

    def _note_terms(self) -> None:
        """Keeps the means over all ranks, for callbacks and for the row that :meth:`on_train_batch_end` writes.

        Not by ``self.log``: from then on Lightning would read what a progress bar shows from the device after every batch.
        """
        self._noted = self.trainer.strategy.reduce(self._training_terms.means(), reduce_op="mean")
        self.trainer.callback_metrics.update(self._headline(self._noted[1]), **{"train/loss": self._noted[0]})

    def _headline(self, nats: Tensor | float) -> dict[str, Tensor | float]:
        """Returns train/bpd, or train/elbo of continuous data, by name: of the bound in nats."""
        return {"train/elbo": nats} if self.levels is None else {"train/bpd": nats_to_bits_per_dim(-nats, self.num_dims)}

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Writes the row of this step, if it is one that is logged: the terms, and what callbacks added to ``train_row``.

        Straight to the loggers and in one piece: ``self.log`` takes a third of a millisecond for every single number. Loss and
        terms are means over the batches since the last row: one alone seldom has a DDPM's t = 1, and is far off where it has.
        """
        self._write_row()

    def _write_row(self) -> None:
        trainer = self.trainer
        if self._noted is None or not is_logged(trainer, trainer.global_step):
            return
        if trainer.global_step <= trainer.fit_loop.epoch_loop._batches_that_stepped:  # which Lightning raises after this
            return
        loss, *nats = self._noted.tolist()
        headline = self._headline(nats[0])
        trainer.progress_bar_metrics.update(headline)
        row = {"train/loss": loss, **{f"train/{name}": value for name, value in zip(TERMS, nats, strict=True)}, **headline}
        row |= {name: float(value) for name, value in self.train_row.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)
        self._training_terms, self._noted, self.train_row = TrainingTerms(), None, {}

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        """Adds the batch's terms to the running sums."""
        self.val_metric.update(self.evaluation_elbo(x, "val"))

    def test_step(self, x: Tensor, batch_idx: int) -> None:
        """Adds the batch's terms to the running sums."""
        self.test_metric.update(self.evaluation_elbo(x, "test"))

    def configure_model(self) -> None:
        """Shards the networks, if the strategy is one that shards: it then has made a mesh of devices."""
        if self.device_mesh is not None and not sharded_parts(self):
            shard(self, self.device_mesh)

    def on_validation_epoch_start(self) -> None:
        """Makes sharded networks whole, after callbacks have chosen the weights; the sums begin anew after a pass cut off."""
        self.val_metric.reset()
        gather(self)

    def on_validation_end(self) -> None:
        """Shards them again, when callbacks are done with the weights that validation used."""
        release(self)

    def on_test_epoch_start(self) -> None:
        """Makes sharded networks whole; the sums begin anew after a pass that was cut off."""
        self.test_metric.reset()
        gather(self)

    def on_test_end(self) -> None:
        """Shards them again."""
        release(self)

    def on_validation_epoch_end(self) -> None:
        """Logs val/{bpd, elbo, reconstruction, prior, matching} and the bound's standard error."""
        self._log_metric("val", self.val_metric)

    def on_test_epoch_end(self) -> None:
        """Logs test/{bpd, elbo, reconstruction, prior, matching}, each with its standard error."""
        self._log_metric("test", self.test_metric)

    def _log_metric(self, stage: str, metric: ElboMetric) -> None:
        found = metric.compute()
        metric.reset()
        self.num_scored = int(found.pop("count"))
        terms = {name: value.float() for name, value in found.items()}
        names = terms if stage == "test" else (*TERMS, "elbo_se")
        logged = {f"{stage}/{name}": terms[name] for name in names}
        headline = f"{stage}/elbo"
        if self.levels is not None:  # bits/dim counts levels: a density has none
            headline = f"{stage}/bpd"
            logged[headline] = nats_to_bits_per_dim(-terms["elbo"], self.num_dims)
            logged[f"{stage}/bpd_se"] = nats_to_bits_per_dim(terms["elbo_se"], self.num_dims)
        self.log(headline, logged.pop(headline), prog_bar=stage == "val")
        self.log_dict(logged)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips. Lightning refuses to with a fused optimiser in mixed precision, for the sake of a gradient scaler.

        Only float16 has one; with bfloat16 the gradients are what they seem.
        """
        plugin = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_val > 0:
            clip_norm(optimizer, gradient_clip_val)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forgets the gradients, as ``optimizer.zero_grad()`` does in ten times the time."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def configure_optimizers(self) -> dict[str, Any]:
        """Builds the optimiser and its learning rate by step."""
        optimizer = self.optimizer_factory(self.parameters())
        given = getattr(self.optimizer_factory, "keywords", {}).items()
        self._given = [{name: value for name, value in given if group.get(name) == value} for group in optimizer.param_groups]
        total = self.trainer.estimated_stepping_batches
        total = math.inf if total < 0 else total  # of batches that nobody has counted Lightning says -1
        scheduler = LambdaLR(optimizer, lambda step: self.lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
