"""Floor 2: tensors -> parameters."""

from networks.conv import ConvDecoder, ConvEncoder
from networks.layers import Dropout
from networks.mlp import MLPDecoder, MLPDenoiser, MLPEncoder
from networks.transitions import GaussianTransition
from networks.unet import UNet

__all__ = [
    "ConvDecoder",
    "ConvEncoder",
    "Dropout",
    "GaussianTransition",
    "MLPDecoder",
    "MLPDenoiser",
    "MLPEncoder",
    "UNet",
]
