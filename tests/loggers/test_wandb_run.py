import socket

import pytest

from loggers.wandb_run import _kept_id, choose_mode


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_without_a_key_it_is_offline_and_nothing_is_asked_of_the_network(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked the network"))
    assert choose_mode(None) == ("offline", "no API key")
    assert choose_mode("online")[0] == "offline"


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_what_the_user_says_goes_and_the_config_goes_first(mode, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose_mode(None)[0] == mode
    assert choose_mode("online")[0] == "online"


def test_with_a_key_it_is_online_only_if_the_server_answers(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password " + "x" * 40 + "\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert choose_mode(None)[0] == "online"
    assert choose_mode(None) == ("offline", "127.0.0.1 does not answer")


def test_unknown_modes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="offlin is unknown"):
        choose_mode("offlin")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE=sometimes"):
        choose_mode(None)


def test_an_id_whose_writing_was_cut_off_is_chosen_once_and_not_at_every_start(tmp_path):
    file = tmp_path / "wandb_id"
    file.touch()
    chosen = _kept_id(str(file))
    assert chosen
    assert _kept_id(str(file)) == chosen
