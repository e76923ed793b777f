"""When pictures are drawn, and from which numbers."""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from callbacks import Pictures
from callbacks.pictures import fixed_draws, plot_profile
from runs.build import build_part
from tests.jobs import configure


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


@pytest.mark.parametrize("name", ["final.png", "kl_per_level.csv"])
def test_one_that_is_cut_off_while_it_is_written_leaves_the_one_before(name, tmp_path, monkeypatch):
    callback, trainer = Pictures(str(tmp_path)), SimpleNamespace(loggers=[])
    figure = plt.figure()

    def write():
        if name.endswith("png"):
            callback._save(trainer, figure, f"samples/{name}", "samples", "")
        else:
            callback._table(trainer, torch.rand(1000))

    def cut_off(self, text, *_):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    write()
    (path,) = tmp_path.rglob(name)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", cut_off)
    monkeypatch.setattr(plt.Figure, "savefig", lambda self, target, **_: cut_off(Path(target), ""))
    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("lowest", "what", "scale"), [(0.001, "KL", "log"), (0.0, "KL", "log"), (-0.5, "ln q/p", "linear")])
def test_a_long_profile_shows_log_ratios_of_either_sign_as_they_are(lowest, what, scale):
    values = np.linspace(1.0, lowest, 20)
    figure = plot_profile(values, "bits/dim", "twenty latents", what)
    axis, total = figure.axes
    assert axis.get_yscale() == scale
    (line,) = (line for line in axis.lines if len(line.get_xdata()) == 20)
    np.testing.assert_allclose(line.get_ydata(), values, atol=1e-9)
    assert [text.get_text().startswith(f"{what} of one step") for text in figure.legends[0].texts] == [True, False]
    assert total.get_ylim()[0] <= min(0.0, total.lines[0].get_ydata().min())
    plt.close(figure)


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        (("model=vae",), "KL of each latent z_1..z_1,"),
        (("model=mhvae", "model.depth=3"), "ln q/p of z_1..z_2, and KL of z_3,"),
        (("model=mhvae", "model.depth=1"), "KL of each latent z_1..z_1,"),
        (("model=mhvae", "model.depth=3", "model/posterior=top_down"), "KL of each latent z_1..z_3,"),
    ],
)
def test_the_profile_says_which_latents_cost_a_kl(settings, title, tmp_path, monkeypatch):
    captions, model = [], build_part(configure(tmp_path, *settings).model)
    monkeypatch.setattr(Pictures, "_save", lambda self, trainer, figure, path, key, caption: captions.append(caption))
    with torch.inference_mode():
        Pictures(str(tmp_path))._profile(SimpleNamespace(loggers=[]), model, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert captions[0].startswith(title)
