"""What docs/python.md shows, run as a notebook would run it."""

import re

import pytest
import torch

from datamodules import DigitsDataModule
from evaluation import SavedRun
from lightning_modules import VAELightningModule
from tests.jobs import ROOT


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_a_notebook_works_as_the_page_says(name, runs, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    cells = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    run, names = runs[name], {}
    exec(cells[0].replace("outputs/2026-01-31/12-00-00-vae-digits", str(run)), names)
    assert names["bits"].shape == (64,)
    assert names["kls"].shape[1] == 64
    assert (names["images"].dtype, tuple(names["images"].shape)) == (torch.uint8, (16, 1, 8, 8))
    assert not names["model"].training
    assert f"{names['bits'].mean():.3f} bits/dim: " in capsys.readouterr().out
    if name == "vae":
        exec(cells[1], names)
        assert 1 < names["metrics"]["test/bpd"] < 5
        exec(cells[2], names)
        assert names["loss"].item() < 4
    assert len(cells) == 3


def test_what_python_users_try_first_is_answered_in_a_sentence(runs):
    for name in ("vae", "ddpm"):
        checkpoint = SavedRun.open(str(runs[name])).path
        with pytest.raises(TypeError, match=rf"evaluation\.SavedRun\.open\('{checkpoint}'\)\.trained\(\)"):
            VAELightningModule.load_from_checkpoint(checkpoint)
    data = DigitsDataModule(image_shape=(1, 8, 8), levels=17, batch_size=8, seed=0)
    for loader in (data.train_dataloader, data.test_dataloader):
        with pytest.raises(RuntimeError, match=r"digits has not been read: call prepare_data\(\) and setup\(\)"):
            loader()
    with pytest.raises(ValueError, match=r"images are a tuple: give one tensor"):
        SavedRun.open(str(runs["vae"])).trained().elbo((torch.zeros(1), torch.zeros(1)))
