"""An OpenAI-compatible endpoint on this machine: what it says is scripted, and so are its faults."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """Answers POST /v1/chat/completions.

    Attributes:
        reply: request body -> text, or a whole choice as a dict, or a status and what is said with it.
        faults: what goes wrong with the first requests: a status, "garbage", "partial", "slow", "empty",
            "no choices".
        seen: bodies of all requests; `keys` of their Authorization headers.
    """

    def __init__(self, reply, faults=()):
        self.reply, self.faults, self.seen, self.keys = reply, list(faults), [], []
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        self.pause = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, body):
        """Status, and what is sent."""
        with self.lock:
            self.seen.append(body)
            fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return fault, json.dumps({"error": {"message": f"scripted {fault}"}})
        if fault == "garbage":
            return 200, "<html>not a completion</html>"
        if fault == "partial":
            return 200, '{"choices": [{"message": {"content": "tr'
        if fault == "slow":
            time.sleep(1.0)
        if fault == "no choices":
            return 200, json.dumps({"id": "x", "choices": []})
        choice = self.reply(body)
        if isinstance(choice, tuple):
            return choice[0], json.dumps({"error": {"message": choice[1]}})
        if isinstance(choice, str):
            choice = {"message": {"role": "assistant", "content": choice}}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None, **choice}
        return 200, json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [] if fault == "empty" else [choice],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
        )


def streamed(text):
    """A completion as server-sent events, a word at a time."""
    whole = json.loads(text)
    words = re.findall(r"\s*\S+|\s+$", whole["choices"][0]["message"]["content"])
    events = [
        {**whole, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word}}]}
        for word in words
    ]
    lines = [json.dumps(event) for event in [*events, {**events[0], "choices": []}]]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])


@contextmanager
def serving(reply, faults=()):
    """An endpoint while it lasts."""
    endpoint = Endpoint(reply, faults)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with endpoint.lock:
                endpoint.busy += 1
                endpoint.most_busy = max(endpoint.most_busy, endpoint.busy)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.keys.append(self.headers.get("Authorization"))
            status, text = endpoint.answer(body)
            kind = "application/json"
            if body.get("stream") and status == 200:
                kind, text = "text/event-stream", streamed(text)
            time.sleep(endpoint.pause)
            with endpoint.lock:
                endpoint.busy -= 1
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    endpoint.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=endpoint.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
