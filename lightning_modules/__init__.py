"""Floor 3: what the bound is. One LightningModule for each family, all reporting the same record of terms."""

from lightning_modules.base import LikelihoodModule
from lightning_modules.ddpm import DDPMLightningModule
from lightning_modules.latents import LatentModule
from lightning_modules.lr_schedules import Constant, WarmupCosine
from lightning_modules.mhvae import MHVAELightningModule
from lightning_modules.posteriors import MarkovPosterior, TopDownPosterior
from lightning_modules.vae import VAELightningModule

__all__ = [
    "Constant",
    "DDPMLightningModule",
    "LatentModule",
    "LikelihoodModule",
    "MHVAELightningModule",
    "MarkovPosterior",
    "TopDownPosterior",
    "VAELightningModule",
    "WarmupCosine",
]
