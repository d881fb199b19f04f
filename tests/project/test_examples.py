"""The examples, run as a user would run them."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.bundle import export_model
from tests.support import foreign
from tests.support.goldens import GOLDENS
from tests.support.marks import quick_first
from tests.support.paths import ROOT
from tests.support.scripts import load_script

EXAMPLES = ROOT / "examples"


def _scaled_gate(model: nn.Module) -> None:
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1.5)  # type: ignore[union-attr, operator, index]


@pytest.mark.slow
def test_aligns_a_foreign_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align = load_script("examples/align_onnx.py").align

    model = str(GOLDENS / "qwen2")
    good = foreign.export(foreign.huggingface("qwen2"), tmp_path / "good.onnx")
    bad = foreign.export(foreign.huggingface("qwen2", _scaled_gate), tmp_path / "bad.onnx")
    names = str(tmp_path / "names.json")
    assert align(model, str(good), names)
    assert "was proposed" in capsys.readouterr().out
    assert not align(model, str(bad), names)
    assert "-> blocks.1.mlp.gate: " in capsys.readouterr().out


def test_reference_in_another_projects_test() -> None:
    """The example is a pytest file; a kernel with a fault fails it."""
    example = load_script("examples/test_my_kernels.py")

    example.test_mlp_is_as_good_as_fp16_allows(2)
    with pytest.MonkeyPatch.context() as patch:
        right = example.my_gated_mlp
        patch.setattr(example, "my_gated_mlp", lambda x, gate, up, out: right(x, up, gate, out))
        with pytest.raises(AssertionError):
            example.test_mlp_is_as_good_as_fp16_allows(2)


@pytest.mark.slow
def test_serves_tokens(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    make_app = load_script("examples/serve.py").make_app

    bundle = export_model("qwen", precision="fp32", output=tmp_path / "bundle")
    with torch.inference_mode(), TestClient(make_app(str(bundle))) as client:
        with client.stream("POST", "/generate", json={"prompt": "Sort: t j e r o ->"}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            text = "".join(response.iter_text())
        pieces = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]
        assert "".join(pieces) == " e j o r t" and len(pieces) > 1
        assert client.post("/generate", json={}).status_code == 422
        assert client.post("/generate", json={"prompt": "a b " * 300}).status_code == 400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    bundle = export_model("qwen", precision="fp32", output=tmp_path_factory.mktemp("served") / "bundle")
    return load_script("examples/serve.py").make_app(str(bundle))


@pytest.mark.parametrize(
    ("status", "body"),
    quick_first(
        [
            (422, b""),
            (422, b"[1]"),
            (422, b"{"),
            (400, b"[" * 100_000),
            (422, b'{"prompt": 5}'),
            (422, b'{"prompt": "x", "max_new_tokens": NaN}'),
            (422, b'{"prompt": "x", "max_new_tokens": -1}'),
            (422, b'{"prompt": "x", "max_new_tokens": 1e99}'),
            (422, b"\xff\xfe"),
            (400, b'{"prompt": ""}'),
            (400, b'{"prompt": "\\ud800"}'),
            (400, b'{"prompt": "' + b"a b " * 3000 + b'"}'),
            (413, b'{"prompt": "' + b"a" * (1 << 18) + b'"}'),
        ],
        3,
    ),
)
def test_bad_requests_are_one_sentence(server: Any, status: int, body: bytes) -> None:
    from fastapi.testclient import TestClient

    with TestClient(server, raise_server_exceptions=False) as client:
        answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and 0 < len(answer.json()["error"].splitlines()[0]) < 300


def test_a_client_that_leaves_stops_its_generation(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets one token at most, and the engine is free for the next one."""
    stopped = threading.Event()
    script = sys.modules[server.router.routes[-1].endpoint.__module__]

    def endless(engine: Any, tokenizer: Any, prompts: Any, config: Any, *, on_text: Any) -> None:
        try:
            while True:
                on_text(0, "x")
                time.sleep(0.01)
        finally:
            stopped.set()

    monkeypatch.setattr(script, "generate", endless)
    sent: list[Any] = []
    left = asyncio.Event()
    request = [{"type": "http.request", "body": b'{"prompt": "Sort: t j"}'}]

    async def receive() -> Any:
        if request:
            return request.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            left.set()

    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "asgi": {"version": "3.0"}}
    asyncio.run(asyncio.wait_for(server(scope, receive, send), 30))
    assert stopped.wait(30)


def test_listens_on_the_loopback_interface_only() -> None:
    assert 'host="127.0.0.1"' in (EXAMPLES / "serve.py").read_text()
