"""A SLURM cluster of one machine: commands for the PATH that run what is submitted, with the variables that SLURM would set."""

from __future__ import annotations

import sys
from pathlib import Path

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
here, script = Path(__file__).parent, sys.argv[-1]
wanted = dict(re.findall(r"^#SBATCH --([\\w-]+)=(\\S+)", Path(script).read_text(), re.MULTILINE))
first, last = (wanted["array"].split("%")[0].split("-") * 2)[:2]
for task in range(int(first), int(last) + 1):
    variables = {
        "SLURM_JOB_ID": str(4711 + task), "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_JOB_NAME": wanted["job-name"], "SLURM_NTASKS": wanted["ntasks-per-node"],
        "SLURM_NTASKS_PER_NODE": wanted["ntasks-per-node"], "SLURM_CPUS_PER_TASK": wanted["cpus-per-task"],
        "SLURM_NNODES": wanted["nodes"], "SLURM_JOB_NUM_NODES": wanted["nodes"], "SLURM_JOB_NODELIST": "localhost",
    }
    line = f'bash "{script}"; echo $? > "{here}/4711_{task}.ended"'
    (here / f"4711_{task}.begun").touch()
    out = open(here / f"4711_{task}.batch", "w")
    subprocess.Popen(["bash", "-c", line], env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=out,
                     stderr=out, start_new_session=True)
print("Submitted batch job 4711")
"""
SRUN = """
import os, sys, time
arguments = sys.argv[1:]
for flag in ("--output", "--error"):
    place = arguments.index(flag)
    path = arguments[place + 1].replace("%A", os.environ["SLURM_ARRAY_JOB_ID"]).replace("%a", os.environ["SLURM_ARRAY_TASK_ID"])
    while not os.path.isdir(os.path.dirname(path)):  # submitit makes it when sbatch is back: SLURM is slower than that
        time.sleep(0.05)
    os.dup2(os.open(path.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if flag == "--output" else 2)
    del arguments[place : place + 2]
arguments.remove("--unbuffered")
os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_STEP_ID="0")
os.execvp(arguments[0], arguments)
"""
SACCT = """
from pathlib import Path
print("JobID|State|NodeList")
for begun in Path(__file__).parent.glob("*.begun"):
    ended = begun.with_suffix(".ended")
    state = "RUNNING" if not ended.exists() else "COMPLETED" if ended.read_text().strip() == "0" else "FAILED"
    print(f"{begun.stem}|{state}|localhost")
"""


def make_cluster(directory: Path) -> Path:
    """Writes sbatch, srun and sacct into ``directory``, which also keeps a file for each job begun and ended."""
    directory.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (directory / name).write_text(f"#!{sys.executable}\n{text.lstrip()}")
        (directory / name).chmod(0o755)
    return directory
