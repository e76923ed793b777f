"""Servers that refuse, stay silent or answer with errors: none ends a run, and the run is offline at once."""

import http.server
import socket
import threading
import time

import psutil
import pytest

import loggers.wandb_run as wandb_run
from loggers import finish_wandb, wandb_logger
from tests.wandb_file import read, values


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's ``status``."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(request):
    """The port of a server of the kind asked for; what it holds open is closed at the end."""
    if isinstance(request.param, int):
        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        made.status, made.daemon_threads = request.param, True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made.server_port
        made.shutdown()
        made.server_close()
        return
    with socket.create_server(("127.0.0.1", 0)) as made:  # accepts, and never answers
        port = made.getsockname()[1]
        if request.param == "refused":
            made.close()
        yield port


@pytest.mark.parametrize(
    ("asked", "server"),
    [("logger.mode", "refused"), ("WANDB_MODE", "silent"), ("logger.mode", 401), ("WANDB_MODE", 500)],
    indirect=["server"],
)
def test_a_server_that_starts_no_run_leaves_it_offline_in_bounded_time(asked, server, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 2.0)
    started = time.monotonic()
    logger = wandb_logger(
        str(tmp_path), "elbo", "a-run", config={"seed": 3}, id_file=str(tmp_path / "id"),
        mode="online" if asked == "logger.mode" else None,
    )  # fmt: skip
    logger.log_metrics({"val/bpd": 2.0}, step=1)
    finish_wandb(failed=False)
    assert time.monotonic() - started < 12
    output = capfd.readouterr()
    (line,) = output.out.splitlines()
    assert line.startswith(f"W&B: offline ({asked}=online, but 127.0.0.1:{server} started no run: ")
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in line
    assert output.err == ""
    found = read(tmp_path / "wandb")
    assert found["run"][0].run_id == (tmp_path / "id").read_text()
    assert values(found["run"][0].config.update)["seed"] == 3
    assert values(found["history"][0].item)["val/bpd"] == 2.0
    assert found["exit"][-1].exit_code == 0


def test_a_run_outlives_wandbs_own_process_and_the_next_run_is_another(tmp_path, capfd):
    def start(name):
        return wandb_logger(str(tmp_path / name), "elbo", name, mode="offline")

    logger = start("first")
    (process,) = (child for child in psutil.Process().children() if child.name() == "wandb-core")
    process.kill()
    for step in range(200):  # what is written at once may still go into the dead process's socket
        logger.log_metrics({"val/bpd": 2.0}, step=step)
        if logger.failed and step > 2:
            break
        time.sleep(0.02)
    finish_wandb(failed=False)
    assert capfd.readouterr().out.count("W&B missed") == 1
    logger = start("second")
    logger.log_metrics({"val/bpd": 1.0}, step=1)
    finish_wandb(failed=False)
    found = read(tmp_path / "second" / "wandb")
    assert found["run"][0].display_name == "second"
    assert [values(record.item)["val/bpd"] for record in found["history"]] == [1.0]
