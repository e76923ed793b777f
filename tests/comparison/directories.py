"""Run directories written by hand, as train.py and evaluate.py leave them: test_compare.py holds them to real ones."""

from __future__ import annotations

import copy
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from comparison.job import run

NATS = 64 * math.log(2)  # in a bit/dim of 8x8 pixels
BASE = {
    "seed": 0,
    "ckpt": None,
    "paths": {"output_dir": "outputs", "data_dir": "data"},
    "sweep": {"retry_failed": True, "fresh": False},
    "model": {
        "_target_": "lightning_modules.VAELightningModule",
        "encoder": {"_target_": "networks.MLPEncoder", "_partial_": True, "hidden_dim": 256, "dropout": 0.2},
        "decoder": {"_target_": "networks.MLPDecoder", "_partial_": True, "hidden_dim": 256, "dropout": 0.4},
        "likelihood": {"_target_": "losses.DiscretizedLogistic", "levels": 17},
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.0025, "betas": [0.9, 0.99]},
        "lr_scheduler": {"_target_": "lightning_modules.Constant", "warmup_steps": 100},
        "image_shape": [1, 8, 8],
        "levels": 17,
        "latent_dim": 14,
        "beta": 1.0,
    },
    "data": {
        "_target_": "datamodules.DigitsDataModule",
        "image_shape": [1, 8, 8],
        "levels": 17,
        "batch_size": 128,
        "seed": 0,
        "split_seed": 0,
    },
    "trainer": {"_target_": "lightning.pytorch.Trainer", "max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 1},
    "logger": {},
    "callbacks": {
        "seeding": {"_target_": "callbacks.SeededBatches", "seed": 0},
        "ema": {"_target_": "callbacks.EMA", "decay": 0.999},
        "pictures": {"_target_": "callbacks.Pictures", "directory": "here", "every_n_epochs": 50, "num": 4},
        "progress": {"_target_": "callbacks.progress_bar"},
    },
}
CHOICES = {
    "experiment": None,
    "callbacks": "default",
    "logger": "csv",
    "trainer": "default",
    "data": "digits",
    "model": "vae",
    "model/lr_scheduler": "constant",
    "model/optimizer": "adamw_decay",
    "model/likelihood": "discretized_logistic",
    "model/decoder": "mlp",
    "model/encoder": "mlp",
}
DDPM = {  # choices; what a vae has and a ddpm has not is None
    "model": "ddpm",
    "model/schedule": "linear",
    "model/weighting": "elbo",
    "recipe/ddpm@model": "digits",
    "model/optimizer": "adamw",
    "model/likelihood": None,
    "model/decoder": None,
    "model/encoder": None,
}
DDPM_SETTINGS = {
    "model._target_": "lightning_modules.DDPMLightningModule",
    "model.encoder": None,
    "model.decoder": None,
    "model.likelihood": None,
    "model.latent_dim": None,
    "model.beta": None,
    "model.num_steps": 1000,
    "model.schedule": {"_target_": "diffusion.linear", "_partial_": True},
    "model.weighting": {"_target_": "losses.elbo_weighting"},
}


def write_run(
    directory: Path,
    figure: float = 2.0,
    seed: int = 0,
    choices: dict[str, str | None] | None = None,
    settings: dict[str, Any] | None = None,
    continuous: bool = False,
    status: str = "done",
    reason: str = "",
    extras: bool = False,
) -> Path:
    """Writes a run directory.

    Args:
        directory: where.
        figure: test bits/dim, or -ELBO in nats of continuous data.
        seed: of the run.
        choices: what differs from a VAE on digits; ``None`` takes a choice away.
        settings: dotted key -> value; ``None`` takes it away.
        continuous: whether the data has no levels.
        status: done, failed or running; only a run that is done has a result.json.
        reason: why it failed.
        extras: whether it has curves, KLs, samples and an evaluation.
    """
    config = copy.deepcopy(BASE)
    config["seed"] = config["data"]["seed"] = config["callbacks"]["seeding"]["seed"] = seed
    config["callbacks"]["pictures"]["directory"] = str(directory)
    config["model"]["likelihood"]["levels"] = config["model"]["levels"] = config["data"]["levels"] = None if continuous else 17
    for key, value in (settings or {}).items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node.pop(last, None)
        if value is not None:
            node[last] = value
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    state = {"status": status, "reason": reason, "overrides": [f"seed={seed}"], "time": "2026-01-31 12:00:00"}
    (directory / "job.json").write_text(json.dumps(state, indent=2))
    if status == "done":
        made = {key: value for key, value in {**CHOICES, **(choices or {})}.items() if value or key == "experiment"}
        (directory / "result.json").write_text(json.dumps(result(figure, seed, made, continuous), indent=2))
    if extras:
        write_extras(directory, figure)
    return directory


def result(figure: float, seed: int, choices: dict[str, Any], continuous: bool) -> dict[str, Any]:
    total = figure if continuous else figure * NATS
    terms = {"reconstruction": 0.9 * total, "prior": 0.02 * total, "matching": 0.08 * total, "elbo": total}
    signs = {"elbo": -1, "reconstruction": -1, "prior": 1, "matching": 1}
    metrics = {f"test/{term}": sign * terms[term] for term, sign in signs.items()}
    metrics |= {f"test/{term}_se": 0.7 for term in signs}
    costs = {term: {"nats": value, "nats_se": 0.7} for term, value in terms.items()}
    if not continuous:
        metrics = {"test/bpd": figure, **metrics, "test/bpd_se": 0.7 / NATS}
        for cost in costs.values():
            cost |= {"bits_per_dim": cost["nats"] / NATS, "bits_per_dim_se": 0.7 / NATS}
    return {
        "metrics": metrics,
        "costs": costs,
        "objective": figure - 0.01,
        "weights": "ema",
        "checkpoint": "best.ckpt",
        "step": 22,
        "images_seen": 22 * 128,
        "parameters": 316548,
        "protocol": {"dataset": "digits"},
        "choices": choices,
        "overrides": [f"seed={seed}"],
        "seed": seed,
        "devices": 1,
        "precision": "32-true",
        "seconds": {"train": 2.0, "total": 3.0 + seed},
        "versions": {"torch": "2.14.1"},
    }


def write_extras(directory: Path, figure: float, points: int = 30, steps: int = 100) -> None:
    rows = ["step,val/bpd,val/elbo,epoch,train/bpd,images_seen"]
    for point in range(points):
        value = figure + math.exp(-point / 6)
        step = 10 * point + 10
        rows.append(f"{step - 1},,,{point},{value + 0.01},{128.0 * (step - 1)}")
        rows.append(f"{step},{value},{-value * NATS},{point},,{128.0 * step}")
    (directory / "metrics.csv").write_text("\n".join([*rows, ""]))
    for name in ("plots", "samples"):
        (directory / name).mkdir()
    levels = [f"{t},{figure * 30 / t**1.3:.9g}" for t in range(1, steps + 1)]
    (directory / "plots" / "kl_per_level.csv").write_text("\n".join(["t,nats", *levels, ""]))
    (directory / "samples" / "final.png").write_bytes(png(int(figure * 1000) % 200))
    kept = range(2, steps, 5)
    chain = {
        "t": list(kept),
        "kl_nats": [figure * 30 / t for t in kept],
        "rate_bits_per_dim": [figure * 0.9 * (1 - t / steps) for t in kept],
        "rmse_levels": [5 * t / steps + figure - 1.5 for t in kept],
    }
    (directory / "evaluation.json").write_text(json.dumps({"bpd": figure, "results": {"ema": {"bpd": figure, "steps": chain}}}))


def png(shade: int, size: int = 24) -> bytes:
    """Returns a grey picture with a gradient."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b"".join(b"\0" + bytes(min(255, shade + 2 * x + y) for x in range(size)) for y in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def write_sweep(root: Path, seeds=(0, 1, 2), extras: bool = False) -> dict[tuple[str, str, int], float]:
    """Writes a sweep of three schedules and two losses; returns the figures."""
    figures = {}
    for i, schedule in enumerate(("linear", "cosine", "sigmoid")):
        for j, weighting in enumerate(("elbo", "simple")):
            for seed in seeds:
                figure = 1.9 + 0.03 * i + 0.11 * j + 0.004 * ((7 * seed + 3 * i + 2 * i * j * seed + j) ** 2 % 11)
                write_run(
                    root / f"ddpm-digits-s{seed}-{schedule}{weighting}", figure, seed,
                    {**DDPM, "model/schedule": schedule, "model/weighting": weighting},
                    {
                        **DDPM_SETTINGS,
                        "model.schedule": {"_target_": f"diffusion.{schedule}", "_partial_": True},
                        "model.weighting": {"_target_": f"losses.{weighting}_weighting"},
                    },
                    extras=extras,
                )  # fmt: skip
                figures[schedule, weighting, seed] = figure
    return figures


def compare(out: Path, *runs: Path | str, by=None, metric: str = "test/bpd") -> Path:
    """Compares in this process; returns the directory asked for."""
    run(OmegaConf.create({"runs": [str(one) for one in runs], "by": by, "metric": metric, "out": str(out)}))
    return out
