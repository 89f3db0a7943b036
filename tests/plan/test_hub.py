"""The hub is asked once; nothing waits for one that does not answer."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import perf_counter

import pytest

import lora_fx
from lora_fx.adapters.peft.folders import adapter_folders
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.hub import is_hub_id, out_of_reach
from lora_fx.plan.weights import weights_folder
from tests.tiny import llama

MISSING = ["./none", "/none/at/all", "~/none", "a/b/c", "none", "none/at all", "none/"]


def hub_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


class NotFound(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes calls and never answers."""
    monkeypatch.setattr("lora_fx.plan.hub._SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub_at(server.getsockname()[1], monkeypatch)
        yield


def test_one_that_answers_is_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        hub_at(server.server_port, monkeypatch)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert out_of_reach("no/where", "config.json") is None
        server.shutdown()


def test_one_that_does_not_is_given_up_soon(silent: None) -> None:
    start = perf_counter()
    with pytest.raises(LoraFxError, match="the hub does not answer"):
        lora_fx.plan("lora 1 adapter x { target linear }", "no/where")
    with pytest.raises(LoraFxError, match="the hub does not answer"):
        lora_fx.plan('lora 1 adapter x { weights = "no/where" }', llama(1))
    with pytest.raises(LoraFxError, match="the hub does not answer"):
        adapter_folders("no/where")
    assert perf_counter() - start < 10


def test_without_it_there_is_the_cache(
    silent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repository = tmp_path / "models--some--adapter"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    spec = lora_fx.parse('lora 1 adapter x { weights = "some/adapter" }')
    assert weights_folder(spec.adapters[0].settings["weights"]) == snapshot
    assert adapter_folders("some/adapter") == {"default": snapshot}


@pytest.mark.parametrize("name", MISSING)
def test_a_folder_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lora_fx.plan.weights", "lora_fx.adapters.peft.folders"):
        monkeypatch.setattr(f"{module}.out_of_reach", lambda *_: pytest.fail("asked"))
    with pytest.raises(LoraFxError, match=f"there is no folder `{name}`"):
        lora_fx.plan(f'lora 1 adapter x {{ weights = "{name}" }}', llama(1))
    with pytest.raises(LoraFxError, match="there is no folder"):
        adapter_folders(name)


def test_names() -> None:
    assert all(map(is_hub_id, ["gpt2", "org/name-1.0_x"]))
    assert not any(map(is_hub_id, [*MISSING[:4], "config.json", "org/config.json", ""]))
