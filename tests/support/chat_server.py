"""A real HTTP server that speaks the chat completions protocol of OpenAI-compatible servers, and misbehaves on demand.

The "model" rewrites the last line before the instruction's end by a rule, so that answers differ with the row, the seed
and the attempt. Started as a script it serves until it is killed: for trials by hand.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SYNONYMS = {
    "film": "picture",
    "movie": "feature",
    "good": "fine",
    "bad": "poor",
    "great": "superb",
    "funny": "amusing",
}


@dataclass
class Call:
    """One request: its number (from 0), how often this very body came before, and its body and headers."""

    number: int
    repeats: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def cells(self) -> list[str]:
        """The row that is to be rewritten, by cells: texts and label."""
        lines = [line for line in self.prompt.split("\n") if "\t" in line]
        return lines[-1].split("\t")

    @property
    def structured(self) -> bool:
        return "response_format" in self.body


@dataclass
class Send:
    """What the server does: an answer's text, or a status with headers, or worse."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "an error on purpose"
    finish: str = "stop"
    wait: float = 0.0
    half: bool = False
    """The JSON of the answer ends in its middle."""
    raw: str | None = None
    """The body of the answer as it is, instead of a chat completion."""
    drop: bool = False
    """The connection ends in the middle of the answer."""


Behaviour = Callable[[Call], "Send | str | None"]


def paraphrase(text: str, seed: int) -> str:
    """Other words at other places: what the fake model makes of a sentence."""
    words = [SYNONYMS.get(word, word) for word in text.split()]
    turn = seed % max(1, len(words))
    words = words[turn:] + words[:turn]
    return " ".join(["In short", ",", *words, ("indeed", "truly", "really", "after all")[seed % 4]])


def answer(call: Call, texts: list[str] | None = None, label: str | None = None) -> str:
    """A well-behaved answer: JSON where a schema was sent, else lines as the prompt asks for."""
    *given, stated = call.cells
    seed = int(call.body.get("seed") or 0)
    if texts is None and "Repair such damage" in call.prompt:
        texts = [
            text.replace(" n't", "n't").replace(" .", ".").replace(" ,", ",").replace("-LRB-", "(")
            for text in given
        ]
    if texts is None:
        keep = re.search(r"Rewrite (\w+) alone", call.prompt)
        columns = ["sentence"] if len(given) == 1 else ["sentence1", "sentence2"]
        texts = [
            text if keep and keep[1] != column else paraphrase(text, seed)
            for column, text in zip(columns, given, strict=True)
        ]
    label = stated if label is None else label
    if call.structured:
        names = list(call.body["response_format"]["json_schema"]["schema"]["properties"])
        return json.dumps(dict(zip(names, [*texts, float(label)], strict=True)))
    if len(texts) == 1:
        return texts[0]
    return f"sentence1: {texts[0]}\nsentence2: {texts[1]}"


class ChatServer:
    """Serves on a free port within `with`; `behaviour` says what happens to a call, None leaves it to `answer`."""

    def __init__(self, behaviour: Behaviour | None = None, port: int = 0) -> None:
        self.behaviour = behaviour
        self.calls: list[Call] = []
        self.counts: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._json(
                    200,
                    {
                        "object": "list",
                        "data": [{"id": "fake-model", "object": "model", "created": 1, "owned_by": "t"}],
                    },
                )

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                with outer.lock:
                    key = data.decode()
                    call = Call(
                        len(outer.calls),
                        outer.counts[key],
                        json.loads(data),
                        {name.lower(): value for name, value in self.headers.items()},
                    )
                    outer.counts[key] += 1
                    outer.calls.append(call)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    found = outer.behaviour(call) if outer.behaviour else None
                    send = (
                        found if isinstance(found, Send) else Send(answer(call) if found is None else found)
                    )
                    time.sleep(send.wait)
                finally:
                    with outer.lock:
                        outer.at_once -= 1
                with contextlib.suppress(ConnectionError):
                    self._send(call, send)

            def _send(self, call: Call, send: Send) -> None:
                if send.status != 200:
                    self._json(send.status, {"error": {"message": send.message, "code": None}}, send.headers)
                elif call.body.get("stream"):
                    self._stream(send)
                else:
                    self._whole(call, send)

            def _whole(self, call: Call, send: Send) -> None:
                message = {"role": "assistant", "content": send.text}
                body = json.dumps(
                    {
                        "id": "chat-1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": call.body["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": send.finish}],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                    }
                ).encode()
                if send.raw is not None:
                    body = send.raw.encode()
                if send.half:
                    body = body[: len(body) // 2]
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if send.drop:
                    self.wfile.write(body[: len(body) // 2])
                    self._hang_up()
                else:
                    self.wfile.write(body)

            def _stream(self, send: Send) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                if send.raw is not None:
                    self.wfile.write(b"data: " + send.raw.encode() + b"\n\n")
                    self.close_connection = True
                    return
                pieces = re.findall(r".{1,7}", send.text, re.DOTALL)
                for number, piece in enumerate(pieces):
                    if send.drop and number == len(pieces) // 2:
                        self._hang_up()
                        return
                    line = self._chunk({"content": piece}, None)
                    self.wfile.write(line[: len(line) // 2] + b"\n\n" if send.half and number == 1 else line)
                self.wfile.write(self._chunk({}, send.finish) + b"data: [DONE]\n\n")
                self.close_connection = True

            def _chunk(self, delta: dict[str, str], finish: str | None) -> bytes:
                choice = {"index": 0, "delta": delta, "finish_reason": finish}
                chunk = {
                    "id": "1",
                    "object": "chat.completion.chunk",
                    "created": 1,
                    "model": "fake-model",
                    "choices": [choice],
                }
                return b"data: " + json.dumps(chunk).encode() + b"\n\n"

            def _hang_up(self) -> None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

            def _json(
                self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
            ) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                for name, text in (headers or {}).items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(body)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator[ChatServer]:
        thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    @property
    def repeated(self) -> int:
        """Requests whose very body had come before."""
        return sum(count - 1 for count in self.counts.values())


if __name__ == "__main__":
    with ChatServer(port=8765).running() as served:
        print(served.url, flush=True)
        while True:
            time.sleep(60)
            print(len(served.calls), "calls,", served.repeated, "repeated", flush=True)
