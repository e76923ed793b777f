"""Runs entry points in forks of a process that has imported what they import, which takes longer than most tests' jobs.

A fork has its own arguments, environment, working directory and process group, and ends as any interpreter does. Tests of what
is imported, and when, start processes anew.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_IMPORTS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # what a process reads as it imports: the same in all forks


class Fork:
    """``python SCRIPT ARGUMENTS``, which has begun.

    Args:
        arguments: the script and what it is given.
        cwd: where it runs.
        environment: all of it, but for ``OF_IMPORTS``.
    """

    def __init__(self, arguments: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self.arguments = arguments
        self._printed = tempfile.TemporaryDirectory()
        for name in ("out", "error"):
            (Path(self._printed.name) / name).touch()
        self.pid = _ask(arguments=arguments, cwd=str(cwd), environment=environment | OF_IMPORTS, printed=self._printed.name)

    def kill(self) -> None:
        """Kills it and what it has started."""
        os.killpg(self.pid, signal.SIGKILL)

    def printed(self) -> str:
        """Returns what it has printed so far."""
        return (Path(self._printed.name) / "out").read_text()

    def finish(self, timeout: float) -> subprocess.CompletedProcess:
        """Waits for its end; what takes longer than ``timeout`` seconds is killed, and ends with code -9."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        code = _ask(wait=self.pid)
        late.cancel()
        out, error = self.printed(), (Path(self._printed.name) / "error").read_text()
        self._printed.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, out, error)


@cache
def _server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__], env=os.environ | OF_IMPORTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )


def _ask(**request: object) -> int:
    server = _server()
    server.stdin.write(json.dumps(request).encode() + b"\n")
    return int(server.stdout.readline())


def _serve() -> dict:
    """Answers requests, and returns one in the fork that is to do it; what still runs when the tests end is killed."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            running.remove(request["wait"])
        elif not (answer := os.fork()):
            return request
        else:
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    sys.exit()


def _become(request: dict) -> str:
    """Makes this process what was asked for, and returns its script."""
    os.setsid()
    for number, name in enumerate(("in", "out", "error")):
        path = os.path.join(request["printed"], name) if number else os.devnull
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin = os.fdopen(0)  # the server's may have read ahead
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells make their children ignore Ctrl-C
    sys.argv = request["arguments"]
    sys.path[0] = str(ROOT)
    return sys.argv[0]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from runs.entry import loading

    with loading():
        for name in ("torch._dynamo", "wandb", "runs.job", "runs.sweep", "runs.preparation", "evaluation.job", "sampling.job"):
            import_module(name)
    runpy.run_path(_become(_serve()), run_name="__main__")
