"""The trainer on the devices that conf/trainer asks for, and the compiled networks; hardware that is missing is refused."""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from callbacks import StopTogether
from lightning_modules import LikelihoodModule
from lightning_modules.sharding import networks
from runs.build import SettingError

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
# backends that leave the backward pass to autograd: there torch.compile has blocks that run again draw other numbers
WITHOUT_BACKWARD = ("eager", "eager_debug", "eager_noexcept", "pre_dispatch_eager")


class StaticGraphDDP(DDPStrategy):
    """DDP that learns the graph of the first backward pass and keeps to it, also where gradients are accumulated.

    Every step uses every parameter: whichever t a batch draws and whatever the loss weighs, each network is run on all rows
    once. Only which of its outputs the loss reads varies, and DDP does not look at that.

    Lightning leaves gradients unsynchronised until the last of the batches that make a step. The graph is learned while
    gradients are synchronised, and PyTorch stops at an internal assertion if the first pass is not one of these.

    Buffers are not sent around: they are constants, and a proposal that each rank works out from what all ranks saw.
    """

    def __init__(self, **settings: Any) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as older PyTorch has it
        super().__init__(static_graph=True, **{name: False}, **settings)
        self._learned = False

    def configure_ddp(self) -> None:
        """Wraps the model anew, as every fit does: the graph is then to be learned again."""
        self._learned = False
        super().configure_ddp()

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Synchronises the first pass all the same: the sum over batches stays the same, early or late."""
        learned, self._learned = self._learned, True
        return super().block_backward_sync() if learned else nullcontext()


class Unprofiled(PassThroughProfiler):
    """Measures nothing, as Lightning's default does, in a fifth of its time: it is asked some seventy times in a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        """Returns a context that does nothing."""
        return self._nothing


def make_trainer(
    float32_matmul_precision: str = "highest",
    fast_dev_run: int | bool | None = None,
    overfit_batches: int | float | None = None,
    **settings: Any,
) -> Trainer:
    """Builds Lightning's trainer.

    Args:
        float32_matmul_precision: of products and convolutions in float32: ``highest`` is float32; ``high`` is TF32, ``medium``
            bfloat16 for products and TF32 for convolutions, where the hardware has them. Holds for this process until the next
            trainer is built.
        fast_dev_run: Lightning's; ``None`` is its default, as it is of the others.
        overfit_batches: the same.
        **settings: Lightning's own.

    Raises:
        SettingError: for hardware or an environment that is not there.
    """
    _check_hardware(settings)
    if not torch.cuda.is_available():
        # Lightning has NVML asked whether there is a GPU, for the sake of processes that fork; every optimiser step asks again,
        # and where there is no driver takes 0.2 ms to be told so
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    if settings.get("profiler") in PROFILERS:  # to files: a simple one has hundreds of lines
        place = {"dirpath": settings.get("default_root_dir"), "filename": "profile"}
        settings["profiler"] = PROFILERS[settings["profiler"]](**place)
    settings["profiler"] = settings.get("profiler") or Unprofiled()
    round_float32("trainer", float32_matmul_precision)
    if SLURMEnvironment.detect():
        settings.setdefault("plugins", [SLURMEnvironment(auto_requeue=False)])
    if settings.get("enable_checkpointing", True) and not fast_dev_run:  # else there is nothing to stop for
        together = StopTogether(requeue=_in_slurm(settings))
        settings["callbacks"] = [*(settings.get("callbacks") or []), together]
    return Trainer(fast_dev_run=fast_dev_run or False, overfit_batches=overfit_batches or 0.0, **settings)


def round_float32(group: str, precision: str) -> None:
    """Sets how products and convolutions in float32 are computed, where the hardware has a choice: see :func:`make_trainer`.

    Raises:
        SettingError: for an unknown precision, naming the setting of ``group``.
    """
    if precision not in ("highest", "high", "medium"):
        raise SettingError(f"{group}.float32_matmul_precision={precision}: choose highest, high (TF32) or medium (bfloat16)")
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # PyTorch's default rounds convolutions in any case


def _in_slurm(settings: dict[str, Any]) -> bool:
    return any(isinstance(plugin, SLURMEnvironment) for plugin in settings.get("plugins") or [])


def _check_hardware(settings: dict[str, Any]) -> None:
    accelerator, precision = settings.get("accelerator", "auto"), str(settings.get("precision"))
    has_cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not (has_cuda or (accelerator == "gpu" and torch.backends.mps.is_available())):
        raise SettingError(
            f"trainer.accelerator={accelerator}: PyTorch finds no GPU on this machine; choose trainer=cpu, or trainer=ddp_cpu "
            "for several processes"
        )
    shards = isinstance(settings.get("strategy"), ModelParallelStrategy)
    if shards and precision in ("16-mixed", "64-true", "64"):
        raise SettingError(
            f"trainer.precision={precision}: weights that are shared out over devices (trainer=fsdp) train in 32-true or "
            "bf16-mixed; choose one of these, or trainer=ddp"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not (has_cuda or torch.backends.mps.is_available()))
    if on_cpu and shards and not shards_on_cpu():
        raise SettingError(
            f"trainer.accelerator={accelerator}: PyTorch {torch.__version__} shards on GPUs only; choose trainer=ddp_cpu, or "
            "install a later one"
        )
    uses_cuda = accelerator in ("gpu", "cuda", "auto") and has_cuda
    if uses_cuda and "bf16" in precision and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingError(
            f"trainer.precision={precision}: {torch.cuda.get_device_name()} has no bfloat16; add trainer.precision=32-true"
        )
    if _in_slurm(settings) and "SLURM_NTASKS" not in os.environ:
        raise SettingError(
            "trainer=slurm: this process is not a task of a SLURM job; start it by srun inside a job, or choose trainer=ddp"
        )


def shards_on_cpu() -> bool:
    """Whether this PyTorch's FSDP2 runs on CPUs: 2.6 looks there for an event of a stream that it does not have."""
    return hasattr(torch.cpu.Stream, "record_event")


def compile_networks(model: LikelihoodModule, setting: bool | str) -> None:
    """Compiles a model's networks in place, so that checkpoints and callbacks see the same modules and names.

    The bound around them stays as it is: it draws from generators that torch.compile would not follow from batch to batch.
    A batch of another size, as the last one of an evaluation, is compiled once more, then for every size.

    Args:
        model: not yet sharded.
        setting: ``True``, or a backend of torch.compile by name; ``False`` compiles nothing.

    Raises:
        SettingError: for a backend that is not there, or that would give checkpointed activations other dropout masks when they
            are computed again, and so wrong gradients.
    """
    if not setting:
        return
    backend = "inductor" if setting is True else setting
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise SettingError(f"compile={setting}: choose true, false or a backend of torch.compile: {', '.join(known)}")
    if backend in WITHOUT_BACKWARD and any(getattr(part, "checkpoint_activations", False) for part in model.modules()):
        raise SettingError(
            f"compile={setting} does not keep dropout's random numbers for model.network.checkpoint_activations=true, whose "
            "gradients would be wrong: choose compile=aot_eager or compile=true"
        )
    for network in networks(model):
        network.compile(backend=backend)


def check_processes(group: str, devices: int, nodes: int) -> None:
    """Refuses other numbers of devices than torchrun or srun has begun processes for: each would be a run of its own.

    Args:
        group: ``trainer`` or ``fabric``, whose settings they are.
        devices: on each node.
        nodes: how many.

    Raises:
        SettingError: naming the setting, and what began how many.
    """
    starter, begun = "torchrun", int(os.environ.get("WORLD_SIZE") or 1)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        starter, begun = "srun", int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) if SLURMEnvironment.detect() else 1
    if begun not in (1, devices * nodes):
        advice = f"{group}.devices={begun // nodes}" if begun % nodes == 0 else f"{group}.devices and {group}.num_nodes"
        raise SettingError(
            f"{group}.devices={devices} on {group}.num_nodes={nodes}, but {starter} began {begun} processes, one for each "
            f"device: give {advice}"
        )


def is_child_rank() -> bool:
    """Whether this process is not the first of its job: by Lightning's, torchrun's or SLURM's word."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "SLURM_PROCID"))
