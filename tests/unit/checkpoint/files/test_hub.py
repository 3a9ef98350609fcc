"""The way to the Hub, against a small HTTP server that answers as the Hub does for one model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_api
from support.patience import PATIENCE, slowdown
from support.tiny import build

from swarm_notebook.checkpoint.files import hub
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import ModelNotFound

COMMIT = "f" * 40


class HubStandIn:
    """Serves ``org/tiny`` from a folder, and remembers which files were fetched."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        handler = type("Handler", (_Handler,), {"folder": folder, "fetched": self.fetched})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    fetched: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if self.path == "/":
            self._send(200, b"", {}, with_body=False)
            return
        if not self.path.startswith("/org/tiny/resolve/"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
            return
        name = self.path.rpartition("/")[2]
        if not (self.folder / name).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"{}", headers, with_body=with_body)
            return
        if with_body:
            self.fetched.append(name)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        self._send(200, (self.folder / name).read_bytes(), headers, with_body=with_body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Keep the tests' output quiet."""


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[HubStandIn]:
    folder = tmp_path / "served"
    build("llama").save_pretrained(folder, max_shard_size="60KB")
    server = HubStandIn(folder)
    yield server
    server.close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Lets the Hub be at another address, with an empty cache."""

    def at(endpoint: str) -> None:
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_last_answer", None)

    return at


def test_only_the_shards_of_the_hosted_blocks_are_downloaded(
    stand_in: HubStandIn, online: Callable[[str], None], tmp_path: Path
) -> None:
    online(stand_in.url)
    source = resolve("org/tiny")
    assert source.dht_prefix == "tiny-hf"
    assert source.tokenizer() is None
    assert source.generation_config() is not None
    load_blocks(source, 1, 2, dtype=torch.float32)
    index = json.loads((tmp_path / "served" / "model.safetensors.index.json").read_text())
    needed = {shard for name, shard in index["weight_map"].items() if ".layers.1." in name}
    shards = [name for name in stand_in.fetched if name.endswith(".safetensors")]
    assert sorted(shards) == sorted(needed)
    assert len(needed) < len(set(index["weight_map"].values())) / 2


def test_a_repository_that_does_not_exist(
    stand_in: HubStandIn, online: Callable[[str], None]
) -> None:
    online(stand_in.url)
    with pytest.raises(ModelNotFound, match="'nobody/nothing': no such repository on the Hub"):
        resolve("nobody/nothing")


def test_a_repository_of_pickles(
    stand_in: HubStandIn, online: Callable[[str], None], tmp_path: Path
) -> None:
    served = tmp_path / "served"
    for path in (*served.glob("*.safetensors"), served / "model.safetensors.index.json"):
        path.unlink()
    (served / "pytorch_model.bin").write_bytes(b"pickle")
    online(stand_in.url)
    with pytest.raises(ModelNotFound, match=r"only as pytorch_model\.bin, a pickle"):
        resolve("org/tiny")
    assert "pytorch_model.bin" not in stand_in.fetched


def test_without_a_hub_the_answer_comes_soon(online: Callable[[str], None]) -> None:
    before, began = slowdown(), time.monotonic()
    online("http://127.0.0.1:9")
    with pytest.raises(ModelNotFound, match="the Hub does not answer"):
        resolve("nobody/nothing")
    assert time.monotonic() - began < 10 * max(before, slowdown())


def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.2)
    over = threading.Event()
    monkeypatch.setattr(hub, "_head", lambda _answer: over.wait(PATIENCE))
    assert hub._ask() is False
    assert not over.is_set()
    over.set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", True),
        ("org/model-1.5_x", True),
        ("a/b/c", False),
        ("./folder", False),
        ("../up", False),
        ("with space", False),
        ("model.gguf", False),
        ("", False),
    ],
)
def test_the_form_of_a_hub_name(text: str, expected: bool) -> None:
    assert hub.is_repository_name(text) is expected
