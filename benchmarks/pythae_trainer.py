"""Images a second of a VAE's training at 28x28, everything on, against pythae's trainer with the same network."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.jobs import Job, Turns
from benchmarks.paired import Row, timed
from datamodules.base import ImageDataModule
from lightning_modules import VAELightningModule
from losses import Bernoulli, DiagGaussian

SHAPE, LATENT, BATCH, BATCHES = (1, 28, 28), 16, 128, 100  # of an epoch, which is a turn


class RandomBits(ImageDataModule):
    """Binary pictures of 1x28x28."""

    name = "random_bits"

    def __init__(self) -> None:
        super().__init__(list(SHAPE), 2, BATCH, 0, actual_shape=SHAPE, actual_levels=2)
        self.setup()

    def load(self) -> dict[str, Tensor]:
        """Draws the splits."""
        images = torch.randint(2, (BATCH * BATCHES + 64, *SHAPE), dtype=torch.uint8)
        return {"train": images[:-64], "val": images[-64:-32], "test": images[-32:]}


class Encoder(nn.Module):
    """Pythae's MLP encoder, 784-512-(16, 16), as q(z|x)."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.theirs = theirs

    def forward(self, x: Tensor) -> DiagGaussian:
        """Returns q(z|x)."""
        output = self.theirs(x)
        return DiagGaussian(output.embedding, 0.5 * output.log_covariance)


class Decoder(nn.Module):
    """Pythae's MLP decoder, 16-512-784, without its last sigmoid: a Bernoulli takes logits."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        first, (linear, sigmoid) = theirs.layers[0], theirs.layers[1]
        if not isinstance(sigmoid, nn.Sigmoid):
            raise TypeError(f"pythae's decoder ends with {sigmoid}, not with a sigmoid")
        self.layers = nn.Sequential(first, linear)

    def forward(self, z: Tensor) -> Tensor:
        """Returns the logits."""
        return self.layers(z).view(-1, *SHAPE)


def pythae(rounds: int) -> list[Row]:
    """Epoch by epoch in turns; pythae's checkpoints and evaluation are off, its progress bar is as it comes."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    rounds = 6 * rounds  # turns differ by more than what is looked for

    def network() -> VAE:
        return VAE(VAEConfig(input_dim=SHAPE, latent_dim=LATENT, reconstruction_loss="bce"))

    with tempfile.TemporaryDirectory() as folder:
        data, mine = RandomBits(), network()
        images = data.splits["train"]
        config = BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_epochs=1, optimizer_cls="AdamW", no_cuda=True
        )
        theirs = BaseTrainer(network(), BaseDataset(images.float(), torch.zeros(len(images))), training_config=config)
        theirs.prepare_training()
        model = VAELightningModule(
            Encoder(mine.encoder), Decoder(mine.decoder), Bernoulli(), LATENT, image_shape=SHAPE, levels=2,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        )  # fmt: skip
        settings = ("model=vae", "data=mnist", "data/binarization=static", f"trainer.max_epochs={rounds + 3}")
        job = Job.build(Path(folder), *settings, data=data, model=model)
        turns = Turns(lambda steps: timed(lambda: theirs.train_step(1)), BATCHES)
        job.run(turns)
    count = sum(parameter.numel() for parameter in model.parameters())
    text = "{ours} and {theirs} µs an image"
    name = f"VAE's training at 28x28, {count:,} parameters, everything on"
    return [turns.pairs().row(name, "pythae's trainer", 1.25, False, text, work=1e3 / BATCH)]
