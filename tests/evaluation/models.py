"""Small models in float64 on odd images, and one device."""

from functools import cache

import torch
from lightning.fabric import Fabric

from diffusion import Lattice
from evaluation.rows import Rows, gather
from lightning_modules import MarkovPosterior, MHVAELightningModule, TopDownPosterior, VAELightningModule
from losses import DiscretizedLogistic
from networks import GaussianTransition, MLPDecoder, MLPEncoder
from tests.lightning_modules.test_ddpm import ddpm

LEVELS, SHAPE = 17, (1, 4, 4)


@cache
def cpu():
    return Fabric(accelerator="cpu", devices=1)


def gathered(rows, function, width=1, batch_size=64):
    """The values of ``function``, (b, width) or (b,), of all rows: (N, R, width)."""
    values, finished = gather(rows, lambda x: function(x).view(len(x), width), width, cpu(), batch_size, lambda _: None)
    assert finished is None
    return values


def odd_images(num):
    """Images that cost very different numbers of bits: flat, noisy, and everything between."""
    generator = torch.Generator().manual_seed(7)
    spread = torch.linspace(0, 1, num).view(-1, 1, 1, 1)
    noise = torch.randint(0, LEVELS, (num, *SHAPE), generator=generator)
    flat = torch.randint(0, LEVELS, (num, 1, 1, 1), generator=generator)
    return (spread * noise + (1 - spread) * flat).round().to(torch.uint8)


def rows_of(images, replicates, seed=0, purpose="test"):
    return Rows.of_split(images, len(images), replicates, seed, purpose)


def small_ddpm(num_steps=12, parameterization=None):
    torch.manual_seed(2)
    return ddpm(parameterization or Lattice(LEVELS), num_steps).double().eval()


def small_vae():
    torch.manual_seed(3)
    sizes = {"hidden_dim": 16, "num_blocks": 1, "dropout": 0.2}
    encoder, decoder = MLPEncoder(SHAPE, 3, **sizes), MLPDecoder(SHAPE, 3, 2, **sizes)
    likelihood = DiscretizedLogistic(LEVELS)
    return VAELightningModule(encoder, decoder, likelihood, 3, image_shape=SHAPE, levels=LEVELS).double().eval()


def small_mhvae(posterior=MarkovPosterior):
    torch.manual_seed(4)
    sizes = {"hidden_dim": 16, "num_blocks": 1, "dropout": 0.2}
    copies = 2 if posterior is TopDownPosterior else 1
    upward = [GaussianTransition(3, 3, **sizes)]
    return (
        MHVAELightningModule(
            posterior(MLPEncoder(SHAPE, 3 * copies, **sizes), upward, depth=2, latent_dim=3),
            MLPDecoder(SHAPE, 3, 2, **sizes),
            DiscretizedLogistic(LEVELS),
            depth=2,
            latent_dim=3,
            transition=[GaussianTransition(3, 3, **sizes)],
            image_shape=SHAPE,
            levels=LEVELS,
        )
        .double()
        .eval()
    )
