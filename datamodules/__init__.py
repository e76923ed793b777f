"""Floor 2: files -> integer batches."""

from datamodules.base import ImageDataModule
from datamodules.binarization import DynamicBinarization, NoBinarization, StaticBinarization
from datamodules.digits import DigitsDataModule
from datamodules.files import CIFAR10DataModule, FashionMNISTDataModule, MissingDataError, MNISTDataModule, SVHNDataModule
from datamodules.gaussian import GaussianDataModule
from datamodules.image_folder import ImageFolderDataModule, UnreadablePictureError
from datamodules.sampling import GlobalBatchSampler
from datamodules.shards import DamagedShardsError
from datamodules.stream import BlockSampler, StreamDataModule

__all__ = [
    "BlockSampler",
    "CIFAR10DataModule",
    "DamagedShardsError",
    "DigitsDataModule",
    "DynamicBinarization",
    "FashionMNISTDataModule",
    "GaussianDataModule",
    "GlobalBatchSampler",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "MissingDataError",
    "NoBinarization",
    "SVHNDataModule",
    "StaticBinarization",
    "StreamDataModule",
    "UnreadablePictureError",
]
