"""conf/wandb/schedules.yaml as a W&B agent runs it: with the agent's own command and variables, offline."""

import os
import sys
from pathlib import Path

import yaml
from wandb.wandb_agent import Agent

from tests.jobs import QUICK, ROOT, result
from tests.wandb_file import read


def test_an_agent_trains_what_the_sweep_asks_under_the_runs_own_id(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "PL_"))]:
        monkeypatch.delenv(name)
    variables = {
        "WANDB_SWEEP_ID": "s1w2e3e4", "WANDB_PROJECT": "of-the-agent", "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline",
        "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)  # where the program of the sweep is
    sweep = yaml.safe_load((ROOT / "conf" / "wandb" / "schedules.yaml").read_text())
    small = [*QUICK, "model.num_steps=8", "model.network.hidden_dim=32"]
    # an agent without a server: it is told what to run
    agent = Agent.__new__(Agent)
    agent._sweep_command = [*sweep["command"], *small, f"paths.output_dir={tmp_path}", f"hydra.run.dir={tmp_path}/run"]
    agent._in_jupyter, agent._function, agent._forward_signals, agent._run_processes = False, None, False, {}
    chosen = {name: {"value": setting["values"][-1]} for name, setting in sweep["parameters"].items()}
    agent._command_run({"run_id": "r5u6n7i8", "program": sweep["program"], "args": chosen})
    assert agent._run_processes["r5u6n7i8"].wait(120) == 0

    record = result(tmp_path / "run")
    assert record["choices"]["model/schedule"] == chosen["model/schedule"]["value"]
    assert record["seed"] == chosen["seed"]["value"]
    assert record["step"] == 22
    found = read(tmp_path / "wandb")
    run = found["run"][0]
    assert (run.run_id, run.sweep_id, run.project) == ("r5u6n7i8", "s1w2e3e4", "of-the-agent")
    assert found["exit"][-1].exit_code == 0
    assert sweep["metric"]["name"] in {item.key or item.nested_key[-1] for row in found["history"] for item in row.item}
