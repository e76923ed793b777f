"""A run that was saved: its checkpoint, read without running anything that is in it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch import Tensor

from callbacks import all_finite
from lightning_modules import LikelihoodModule
from runs.build import SettingError, build_part
from runs.data import load_data
from runs.directory import BEST, LAST, read_checkpoint
from runs.resuming import same_images

OWN_PACKAGES = ("losses", "diffusion", "networks", "datamodules", "lightning_modules")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A checkpoint and where it lies.

    Attributes:
        path: the file.
        content: what is in it: tensors and plain values only.
        packages: packages besides this framework's whose objects its config may name.
    """

    path: Path
    content: dict[str, Any]
    packages: Sequence[str] = ()

    @classmethod
    def open(cls, run: str, packages: Sequence[str] = ()) -> SavedRun:
        """Reads a run directory's best checkpoint (the last, if there is no best), or a checkpoint file.

        Raises:
            SettingError: if there is none, it is damaged, of another version, or holds more than tensors and plain values.
        """
        path = Path(run)
        if path.is_dir():
            found = [path / name for name in (BEST, LAST) if (path / name).is_file()]
            if not found:
                raise SettingError(f"run={run} holds neither {BEST} nor {LAST}: give the directory of a run that has trained")
            path = found[0]
        elif not path.is_file():
            raise SettingError(f"run={run} does not exist: give a run directory or a checkpoint file")
        saved = cls(path, read_checkpoint(path, "run"), packages)
        saved.check_targets()
        return saved

    @property
    def directory(self) -> Path:
        """Where results of this checkpoint go: its run directory, or a directory beside a file that lies elsewhere."""
        if self.path.parent.name == "checkpoints":
            return self.path.parent.parent
        return self.path.with_name(f"{self.path.stem}-evaluation")

    @property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The sets of weights in it, what the run tests with first: ``ema`` and ``raw``, or ``raw`` alone."""
        if "current_model_state" in self.content:
            return {"ema": self.content["state_dict"], "raw": self.content["current_model_state"]}
        return {"raw": self.content["state_dict"]}

    def choose(self, wished: object, several: bool = True) -> list[str]:
        """Returns the sets of weights that are wished for: by default the one that the run itself was tested with.

        Args:
            wished: ``ema``, ``raw``, ``both`` or ``None``.
            several: whether ``both`` may be chosen.

        Raises:
            SettingError: if they are not there, or not finite.
        """
        there = list(self.weights)
        chosen = there if wished == "both" and several and len(there) == 2 else [there[0] if wished is None else wished]
        for name in chosen:
            if name not in there:
                raise SettingError(
                    f"weights={wished}: this checkpoint has {' and '.join(there)} weights; choose one of them"
                    f"{' or both' * several}"
                )
            if not all_finite(value for value in self.weights[name].values() if isinstance(value, Tensor)):
                raise SettingError(f"run={self.path} holds {name} weights that are not finite: give another checkpoint")
        return chosen

    def check_targets(self) -> None:
        """Refuses a config that names anything but this framework's public objects: building one runs it.

        Raises:
            SettingError: naming the object, and how to allow a package of one's own.
        """
        for target in _targets(self.content["config"], self.path):
            package, _, name = target.rpartition(".")
            if package in OWN_PACKAGES and name in importlib.import_module(package).__all__:
                continue
            if package == "torch.optim" and isinstance(getattr(torch.optim, name, None), type):
                continue
            if target.split(".")[0] not in self.packages:
                raise SettingError(
                    f"run={self.path} names {target}, which is not part of this framework and would be run: if you trust it, "
                    f"add packages=[{target.split('.')[0]}]"
                )

    def data(self, root: str | None = None) -> LightningDataModule:
        """Builds the data module of the run and reads its data, from ``root`` if given.

        Raises:
            SettingError: if it is missing, or other images than the run was trained on.
        """
        config = dict(self.content["config"]["data"])
        if root is not None and "root" in config:
            config["root"] = root
        try:
            datamodule = load_data(OmegaConf.create(config))
        except SettingError as error:
            raise SettingError(str(error).replace("data.root", "data_root")) from error.__cause__  # as it is called here
        same_images(self.content.get("images"), datamodule, f"run={self.path}")
        return datamodule

    def model(self) -> LikelihoodModule:
        """Builds the model, its weights not yet loaded."""
        return build_part(OmegaConf.create(self.content["config"]["model"]))

    def trained(self, weights: str | None = None) -> LikelihoodModule:
        """Returns the model with its weights, in evaluation mode, on the CPU.

        Args:
            weights: ``ema`` or ``raw``; by default those that the run was tested with.

        Raises:
            SettingError: if they are not there, not finite, or of another version.
        """
        (name,) = self.choose(weights, several=False)
        model = self.model()
        self.load(model, name)
        return model.eval()

    def load(self, model: LikelihoodModule, weights: str) -> None:
        """Puts one of the sets of weights into the model.

        Raises:
            SettingError: if they do not fit, as from another version of the code.
        """
        try:
            model.load_state_dict(self.weights[weights])
        except (RuntimeError, KeyError, TypeError, AttributeError):
            raise SettingError(
                f"run={self.path} has weights that do not fit the model its config describes: it is damaged, or was written by "
                "another version"
            ) from None


def _targets(config: Any, path: Path) -> Iterator[str]:
    """Yields what a config would have built, wherever it stands; refuses text that would turn into more when it is read."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield str(config["_target_"])
        for part in (*config.keys(), *config.values()):
            yield from _targets(part, path)
    elif isinstance(config, (list, tuple)):
        for part in config:
            yield from _targets(part, path)
    elif isinstance(config, str) and "${" in config:
        raise SettingError(
            f"run={path} has an interpolation in its config ({config[:60]}), which no run of this framework writes"
        )
    elif config is not None and not isinstance(config, (str, int, float)):
        raise SettingError(f"run={path} has a {type(config).__name__} in its config, where only plain values belong")
