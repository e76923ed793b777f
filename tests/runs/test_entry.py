"""How an entry point starts."""

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from subprocess import PIPE

import pytest
from omegaconf import OmegaConf

from runs.build import SettingError
from runs.entry import flags_first, loading, start, take_lazy_help
from runs.interrupts import end_at_once, listen
from runs.lifelines import BEGUN_BY
from runs.names import check_names
from tests.jobs import ROOT, command

OF_NO_RANK = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "SLURM_PROCID", BEGUN_BY)}


def test_the_collector_leaves_alone_what_is_imported_and_searches_what_comes_after(monkeypatch):
    monkeypatch.setattr("runs.entry._loaded", False)
    before = gc.get_freeze_count()
    with loading():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(imported)
    cycle = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() > 0
    frozen = gc.get_freeze_count()
    left = [cycle := []]  # by a job of a sweep
    cycle.append(left)
    with loading():  # by the next one
        pass
    assert gc.get_freeze_count() <= frozen
    del left, cycle
    assert gc.collect() > 0


def test_the_collector_works_on_where_an_import_fails(monkeypatch):
    monkeypatch.setattr("runs.entry._loaded", False)
    with pytest.raises(ModuleNotFoundError), loading():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


NAMED = """
import weakref
from runs.entry import loading

class Binding(type):
    pass

Binding.__module__ = "{}"
with loading():
    cycle = type("Held", (), {{}})()
    cycle.itself = cycle
    ended = weakref.ref(cycle, lambda _: print("freed", flush=True))
    held = [cycle]
    held.append(held)
    del cycle, held
"""


@pytest.mark.parametrize(("module", "freed"), [("nanobind", "freed"), ("pybind11_builtins", "")])
def test_at_its_end_a_process_frees_what_was_imported_where_a_binding_would_list_it(module, freed):
    ended = subprocess.run([sys.executable, "-c", NAMED.format(module)], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout.strip(), ended.stderr, ended.returncode) == (freed, "", 0)


FIRST_RANK = """
import os, signal, subprocess, sys
from runs.entry import start

def launch():
    later = "import time; from runs.entry import start; start(lambda: [print('begun', flush=True), time.sleep(600)])"
    rank = subprocess.Popen([sys.executable, "-c", later], env=os.environ | {"LOCAL_RANK": "1"}, stdout=subprocess.PIPE)
    print(rank.pid, rank.stdout.readline().decode(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

start(launch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends them")
def test_a_later_rank_ends_with_the_first_one():
    first = subprocess.Popen([sys.executable, "-c", FIRST_RANK], cwd=ROOT, env=OF_NO_RANK, stdout=PIPE, stderr=PIPE, text=True)
    rank, begun = first.stdout.readline().split()
    try:
        first.communicate(timeout=30)  # to the end of both, which share what errors are written to
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(rank), signal.SIGKILL)
    assert (begun, first.returncode) == ("begun", -signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends them")
@pytest.mark.parametrize(
    ("variables", "code"),
    [({"LOCAL_RANK": "1"}, -signal.SIGKILL), ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "1"}, 0), ({"LOCAL_RANK": "0"}, 0)],
)
def test_a_later_rank_whose_first_one_has_ended_already_ends_too(variables, code):
    ended = subprocess.Popen(["true"])
    ended.wait()
    program = [sys.executable, "-c", "from runs.entry import start; start(lambda: None)"]
    assert subprocess.run(program, cwd=ROOT, env=OF_NO_RANK | variables | {BEGUN_BY: str(ended.pid)}).returncode == code


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_what_a_terminal_lacks_ends_no_command(variables):
    child = 'subprocess.run([sys.executable, "-c", "print(chr(0x2211))"])'
    program = f"import subprocess, sys; from runs.entry import start; start(lambda: [{child}, print(chr(0x2212))])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )
    assert (ended.stdout.split(), ended.stderr) == ([r"\u2211", r"\u2212"], "")


LATE = """
import os, sys
from runs.entry import start

def job():
    print("first", flush=True)
    sys.stdin.readline()
    for stream in (sys.stdout, sys.stderr):
        print("unread", file=stream, flush=True)
    os.write(int(sys.argv[1]), b"ended")

start(job)
"""


def test_a_job_outlives_whoever_reads_what_it_prints():
    kept, own = os.pipe()
    job = subprocess.Popen(
        [sys.executable, "-c", LATE, str(own)], cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT, pass_fds=[own]
    )
    assert job.stdout.readline() == b"first\n"
    job.stdout.close()
    job.stdin.close()
    os.close(own)
    with open(kept, "rb") as ended:
        assert (job.wait(timeout=60), ended.read()) == (0, b"ended")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_job_that_begins_without_streams_opens_no_file_in_their_place(closed, tmp_path):
    job = "lambda: [print('unread'), open('number', 'w').write(str(open('other', 'w').fileno())), sys.stdout.isatty()]"
    program = f"import sys; from runs.entry import start; start({job})"
    ended = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


def test_what_the_system_refuses_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    for error, sentence in (
        (OSError(28, "No space left on device"), "error: a file cannot be read or written: No space left on device"),
        (OSError(13, "Permission denied", "/there"), "error: /there: Permission denied"),
    ):

        def refused(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            start(refused)
        assert end.value.code == sentence


def test_argparse_takes_help_that_is_no_text_yet_and_checks_the_rest(monkeypatch):
    def check_help(self, action):  # Python 3.14's, in short
        if "%" in action.help:
            raise ValueError("badly formed help string")

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check_help, raising=False)
    take_lazy_help()
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--lazy", help=object())
    parser._check_help(action)
    action.help = "100%"
    with pytest.raises(ValueError, match="badly formed"):
        parser._check_help(action)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate.py run=x +devices=2", "devices=2: nothing reads it; is it fabric.devices?"),
        ("sample.py run=x +split=val", "split=val: nothing reads it; leave it out"),
        ("sample.py outputs/run", "outputs/run is not KEY=VALUE: write run=outputs/run"),
        ("sample.py run=x sampler=null", "sampler=null: what is chosen of sampler is a name; leave it out"),
        ("sample.py run=x fabric=null", "fabric=null: what is chosen of fabric is a name; give default"),
        ("sample.py run=x ~num", "num is left out by ~num, and the command reads it"),
        ("compare.py runs=x +metrics=1", "metrics=1: nothing reads it; is it metric?"),
        ("prepare.py out=x +sourc=1", "sourc=1: nothing reads it; is it source?"),
    ],
)
def test_every_command_refuses_what_nothing_reads(line, sentence, tmp_path):
    script, *overrides = line.split()
    done = command(*overrides, cwd=tmp_path, script=script)
    assert done.stderr.startswith(f"error: {sentence}")
    assert len(done.stderr.splitlines()) == 1
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])


def test_flags_may_stand_between_overrides():
    line = "model=vae --config-dir here seed=1 -m --cfg job ~logger --config-dir=x --info --info all a=b"
    flags = "--config-dir here -m --cfg job --config-dir=x --info --info all"
    assert flags_first(["seed=1", "--config-d", "x"]) == ["--config-d", "x", "seed=1"]  # argparse takes beginnings
    assert flags_first(line.split()) == [*flags.split(), "model=vae", "seed=1", "~logger", "a=b"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("open", b"model: [1\n", r"\S*/experiment/open.yaml, line 2: expected ',' or ']'"),
        ("latin", b"# \xe9\n", r"\S*/experiment/latin.yaml: it is not text in UTF-8, which configs are; .* at byte 3"),
        ("twice", b"model:\n  num_steps: 1\n  num_steps: 2\n", r"\S*/experiment/twice.yaml, line 3: found duplicate key"),
        ("three", b"defaults: 3\n", "Invalid defaults list in 'experiment/three'"),
        ("half", b"# @package _global_\nmodel:\n  num_steps: ${a\n", r"no viable alternative at input '\$\{a'"),
        ("number", b"# @package _global_\nmodel: {1: 2}\n", "model cannot be built with .* 1=2: keywords must be strings"),
        ("none", b"# @package _global_\ncallbacks: 3\n", "callbacks=3: leave it alone, or change a setting in it"),
    ],
)
def test_a_config_of_ones_own_that_is_none_is_named_in_one_line(name, text, sentence, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / f"{name}.yaml").write_bytes(text)
    done = command(f"experiment={name}", "--config-dir", f"{tmp_path}/own", "trainer.max_steps=1", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: {sentence}", line)
    assert done.returncode == 1


def test_what_another_setting_refers_to_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    own = dict.fromkeys(("seed", "ckpt", "compile", "paths", "sweep"))
    for reference in ("${width}", "${oc.decode:${width}}", "${oc.select:width,3}", "${width[0]}"):
        check_names(OmegaConf.create(own | {"width": 3, "model": {"size": reference}}), "train")
    with pytest.raises(SettingError, match=r"^width=3: nothing reads it"):
        check_names(OmegaConf.create(own | {"width": 3, "model": {"size": "${width_of}", "name": "a:width"}}), "train")


@pytest.mark.parametrize("script", ["train", "evaluate", "sample", "compare", "prepare"])
def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(script, tmp_path):
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")  # found before the real one
    command = [sys.executable, str(ROOT / f"{script}.py")]
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, **listening)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_is_heard_again_once_a_command_has_begun():
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler, after in ((signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, handler)
            end_at_once()
            assert signal.getsignal(signal.SIGINT) == after
            listen()
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
