"""What a training step must not do on a device: wait for it, place anything by name, or use other weights from step to step."""

import ast
import math
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import EMA, SeededBatches, Vitals
from lightning_modules import LikelihoodModule, VAELightningModule
from lightning_modules.base import clip_norm
from losses.draws import Own, own_generators, seeded
from runs.build import build_part
from runs.devices import make_trainer
from tests.jobs import ROOT, configure
from tests.test_floors import FLOORS

MODELS = {
    "vae": ("model=vae", "model.encoder.dropout=0.2"),
    "vae, mixture": ("model=vae", "model/likelihood=discretized_logistic_mixture"),
    "mhvae, markov": ("model=mhvae", "model/posterior=markov"),
    "mhvae, top-down": ("model=mhvae", "model/posterior=top_down"),
    "ddpm, elbo": ("model=ddpm", "model/weighting=elbo", "model.network.hidden_dim=32"),
    "ddpm, simple": ("model=ddpm", "model/weighting=simple", "model.network.hidden_dim=32"),
    "ddpm, epsilon": ("model=ddpm", "model/parameterization=epsilon", "model.network.hidden_dim=32"),
    "ddpm, uniform t": ("model=ddpm", "model/timestep_sampler=uniform", "model.network.hidden_dim=32"),
    "ddpm, U-Net": ("model=ddpm", "model/network=unet_8x8", "model.network.base_channels=8"),
    "ddpm, one step": ("model=ddpm", "model.num_steps=1", "model/schedule=constant", "model.network.hidden_dim=32"),
}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "item"}


@pytest.fixture(params=MODELS)
def model(request, tmp_path) -> LikelihoodModule:
    return build_part(configure(tmp_path, *MODELS[request.param]).model).train()


def batch(model, num=8):
    return torch.randint(model.levels, (num, *model.image_shape)).to(torch.uint8)


def at_each_end(model):
    """Yields as the model is, then, if it draws steps, with every t = 1 and every t = T."""
    yield "as drawn"
    if hasattr(model, "timestep_sampler"):
        for t in (1, model.num_steps):
            model.timestep_sampler = lambda num, steps, device, t=t: torch.full((num,), t, device=device)
            yield t


def test_a_step_reads_nothing_from_the_device(model):
    """On PyTorch's meta device there is nothing to read: whatever would wait for a GPU to see a value fails."""
    model.to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)  # there is no fused kernel for it
    for _ in at_each_end(model):
        loss, elbo = model.objective(batch(model).to("meta"))
        loss.backward()
        clip_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.device == elbo.value.device == torch.device("meta")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_built_without_memory_is_another_once_it_has_its_weights(name, tmp_path):
    cfg = configure(tmp_path, *MODELS[name]).model
    model = build_part(cfg).eval()
    with torch.device("meta"):
        empty = build_part(cfg)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    x, found = batch(model), []
    for one in (model, empty.eval()):
        torch.manual_seed(1)
        found.append(one.elbo(x).value)
    assert torch.equal(*found)


class Traced(TorchDispatchMode):
    """Counts the operations that make the host wait."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class TraceSteps(Callback):
    """Traces every step from one end of a batch to the next, with everything that Lightning and the callbacks do."""

    def __init__(self):
        self.mode, self.steps = None, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.mode:
            self.mode.__exit__(None, None, None)
            self.steps.append(dict(self.mode.counts))
        self.mode = Traced()
        self.mode.__enter__()

    def on_train_end(self, trainer, pl_module):
        self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["vae", "mhvae, markov", "ddpm, elbo"])
def test_lightnings_step_reads_nothing_either_away_from_logging(name, tmp_path):
    """Averages, clipping, seeding, learning rates and vitals included.

    What lies on the CPU may be looked at: the gradient's norm here, and the t of DDPM, which are drawn there, for t = 1. The
    test on the meta device covers both. Step 4 is logged, when Traced has seen its end: what is read counts for step 5.
    """
    cfg = configure(tmp_path, *MODELS[name])
    traced = TraceSteps()
    trainer = make_trainer(
        accelerator="cpu", devices=1, max_steps=12, log_every_n_steps=4, gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[SeededBatches(0), Vitals(), EMA(), traced],
    )  # fmt: skip
    trainer.fit(build_part(cfg.model), build_part(cfg.data))
    assert len(traced.steps) == 11
    allowed = {"_local_scalar_dense": 1} | ({"nonzero": 1} if name.startswith("ddpm") else {})
    assert {number: step for number, step in enumerate(traced.steps, 2) if step != allowed and number % 4 != 1} == {}


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, math.inf, math.nan])
def test_gradients_are_clipped_as_torch_clips_them(scale):
    ours, theirs = (torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)) for _ in range(2))
    for mine, other in zip(list(ours.parameters())[1:], list(theirs.parameters())[1:], strict=True):  # the first has none
        mine.grad = scale * torch.randn_like(mine)
        other.grad = mine.grad.clone()
    clip_norm(torch.optim.SGD(ours.parameters()), 1.0)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0, equal_nan=True)


def test_every_step_uses_every_parameter_once_whatever_t_it_draws(model):
    """So DDP need not look for unused ones, and may keep the graph of its first step."""
    uses = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: uses.update([name]))
    for t in at_each_end(model):
        uses.clear()
        model.objective(batch(model))[0].backward()
        assert uses == Counter(name for name, _ in model.named_parameters()), t


@pytest.mark.parametrize("name", ["vae", "mhvae, markov"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, tmp_path):
    """Given each image's own noise, so without dropout: the mean over parts of the gradient is the gradient of the mean."""
    model = build_part(configure(tmp_path, *MODELS[name]).model).eval()
    x, gradients = batch(model, 12), []
    for parts in (1, 3):
        model.zero_grad()
        for index, part in enumerate(x.chunk(parts)):
            rows = range(index * len(part), (index + 1) * len(part))
            with own_generators(Own([seeded(row) for row in rows], lambda: pytest.fail("it has no steps to draw"))):
                (model.objective(part)[0] / parts).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("together", "steps"), [(1, 5), (2, 3), (4, 2), (9, 1)])
def test_a_step_of_the_batches_left_at_an_epochs_end_has_their_mean_gradient(together, steps, tmp_path, monkeypatch):
    model, gradients = build_part(configure(tmp_path, *MODELS["vae"]).model), []
    objective = model.objective
    monkeypatch.setattr(model, "objective", lambda x: (sum(p.sum() for p in model.parameters()), objective(x)[1]))
    monkeypatch.setattr(
        model, "on_before_optimizer_step", lambda _: gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    trainer = make_trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, accumulate_grad_batches=together,
    )  # fmt: skip
    trainer.fit(model, batch(model, 20).unflatten(0, (5, 4)))
    assert len(gradients) == trainer.global_step == 2 * steps
    torch.testing.assert_close(torch.stack(gradients), torch.ones(2 * steps, len(gradients[0])))


def test_ranks_wait_for_each_others_figures_once_a_step_of_several_batches(tmp_path, monkeypatch):
    model, asked = build_part(configure(tmp_path, *MODELS["vae"]).model), []
    note = model._note_terms
    monkeypatch.setattr(model, "_note_terms", lambda: (asked.append(trainer.global_step), note()))
    trainer = make_trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, accumulate_grad_batches=3, log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(model, batch(model, 20).unflatten(0, (5, 4)))
    assert trainer.global_step == 4
    assert asked == [1, 3]


PACKAGES = [name for name, floor in FLOORS.items() if floor < 5]


@pytest.mark.parametrize("path", [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")], ids=lambda path: path.name)
def test_no_source_names_the_device_it_runs_on(path):
    """``torch.cuda.is_available()`` and ``device.type == "cuda"`` ask; ``x.cuda()`` and ``device="cuda"`` tell."""
    tree = ast.parse(path.read_text())
    asked = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"line {node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in asked:
            assert not node.value.startswith("cuda"), f"line {node.lineno}"


def ran(model, loader, directory, stage="fit"):
    """The trainer that has taken ``model`` through ``stage``."""
    trainer = make_trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=directory,
    )  # fmt: skip
    getattr(trainer, stage)(model, loader)
    return trainer


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_labels_are_left_behind_and_levels_that_there_are_not_are_refused(stage, tmp_path):
    def data(*batches):
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def run(loader):
        torch.manual_seed(0)
        model = build_part(configure(tmp_path, *MODELS["vae"]).model)
        trainer = ran(model, loader, tmp_path, stage)
        return [parameter.detach() for parameter in model.parameters()], dict(trainer.callback_metrics)

    x = torch.randint(0, 17, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = run(data(x, x[:2]))
    for labelled in (data((x, torch.arange(6)), (x[:2], torch.arange(2))), data([x], [x[:2]])):
        found = run(labelled)
        assert all(map(torch.equal, found[0], expected[0]))
        assert found[1] == expected[1]
    for bad, sentence in (
        (x + 1, "images hold values 1..17, but this model takes 0..16"),
        (x.int() - 1, "images hold values -1..15, but this model takes 0..16"),
        ({"image": x}, "a batch is a dict: give images"),
        (x / 16, "images are torch.float32, but this model takes whole numbers 0..16"),
        (x[:, :, :7], r"images of shape \(6, 1, 7, 8\) given to a model of \(B, 1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(data(bad))


def test_every_bound_refuses_levels_that_there_are_not(model):
    x = batch(model)
    x[0, 0, 0, 0] = model.levels
    for bound in (model.objective, model.elbo, model.log_weight, model.latent_kls):
        with pytest.raises(ValueError, match=rf"images hold values 0\.\.{model.levels}, but this model takes 0\.\."):
            bound(x)


def test_levels_are_looked_at_once_and_before_they_leave_the_cpu(tmp_path, monkeypatch):
    looked, check = [], LikelihoodModule.check_levels
    monkeypatch.setattr(LikelihoodModule, "check_levels", lambda self, x: (looked.append(x), check(self, x)))
    model = build_part(configure(tmp_path, *MODELS["vae"]).model)
    ran(model, batch(model, 12).unflatten(0, (3, 4)), tmp_path)
    assert [len(x) for x in looked] == [4, 4, 4]
    with pytest.raises(ValueError, match="images hold values"):
        model.to("meta").on_before_batch_transfer(batch(model) + 17, 0)


@pytest.mark.parametrize("name", ["vae", "mhvae, markov", "ddpm, elbo"])
def test_a_bound_is_traced_and_mapped_over_without_its_numbers(name, tmp_path):
    model = build_part(configure(tmp_path, *MODELS[name]).model).eval()
    x = batch(model, 3)
    mapped = torch.func.vmap(lambda image: model.elbo(image[None]).value, randomness="different")(x)
    assert mapped.shape == (3, 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model.elbo(mode.from_tensor(x)).value.shape == (3,)
    whole = torch.compile(lambda images: model.elbo(images).value, fullgraph=True, backend="eager")
    assert whole(x).shape == (3,)


class OwnOptimizer(VAELightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OwnSchedule(VAELightningModule):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}


@pytest.mark.parametrize("kind", [OwnOptimizer, OwnSchedule])
def test_a_subclass_may_have_an_optimiser_of_its_own(kind, tmp_path):
    cfg = configure(tmp_path, *MODELS["vae"]).model
    cfg._target_ = f"{__name__}.{kind.__name__}"
    trainer = ran(build_part(cfg), torch.zeros(3, 4, 1, 8, 8, dtype=torch.uint8), tmp_path)
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    "settings",
    [("model=vae", "model/likelihood=gaussian"), ("model=ddpm", "model.num_steps=3"), ("model=ddpm", "model.num_steps=1")],
)
def test_continuous_data_may_have_another_precision_than_the_model(settings, tmp_path):
    module = build_part(configure(tmp_path, "data=gaussian", *settings).model)
    x = torch.randn(3, 40, *module.image_shape, dtype=torch.float64)
    assert ran(module, x, tmp_path).global_step == 3
