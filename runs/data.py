"""The data of a job, read before anything else is built."""

from __future__ import annotations

from omegaconf import DictConfig

from datamodules import ImageDataModule
from runs.build import RankError, SettingError, build_part
from runs.devices import is_child_rank


def load_data(cfg: DictConfig) -> ImageDataModule:
    """Builds the data module and reads the data now: what is missing is said before anything else is built.

    By any rank: the first may have found what another node has not.
    """
    datamodule = build_part(cfg)
    if not isinstance(datamodule, ImageDataModule):
        raise SettingError(
            f"data._target_={cfg._target_}: derive it from datamodules.ImageDataModule, whose load() gives images"
        )
    try:
        if not is_child_rank():
            datamodule.prepare_data()
        datamodule.setup()
        datamodule.train_dataloader()  # refuses a batch larger than the data here, not in the middle of fit
    except (ValueError, OSError) as error:
        raise (RankError if is_child_rank() else SettingError)(" ".join(str(error).split())) from error
    return datamodule
