"""When pictures are drawn, and from which numbers."""

from types import SimpleNamespace

import pytest
import torch

from callbacks import Pictures
from callbacks.pictures import fixed_draws


@pytest.mark.parametrize("every", [1, 3])
def test_samples_are_drawn_every_n_epochs_from_the_same_latents(every, tmp_path, monkeypatch):
    callback, drawn, latents = Pictures(str(tmp_path), every), [], []

    def samples(self, trainer, *_):
        drawn.append(trainer.current_epoch)
        latents.append(torch.rand(()).item())

    monkeypatch.setattr(Pictures, "_samples", samples)
    for epoch in range(7):
        trainer = SimpleNamespace(current_epoch=epoch, sanity_checking=False, is_global_zero=True, global_step=epoch)
        callback.on_validation_end(trainer, SimpleNamespace(device=torch.device("cpu")))
    assert drawn == [epoch for epoch in range(7) if (epoch + 1) % every == 0]
    assert len(set(latents)) == 1


def test_training_draws_on_as_if_no_picture_had_been_drawn():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with fixed_draws(torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with fixed_draws(torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
