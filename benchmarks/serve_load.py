"""Clients of a server, in a process of their own, so that they take nothing from its interpreter.

    python -m benchmarks.serve_load < task.json

The task names the server's `url` and a `kind`. `answers`: so many clients ask for all `bodies`; one record
for each. `probe`: `bodies` one after another as streams, beside clients that keep asking for `background`.
`storm`: clients that behave at random, well and badly, for `seconds` or for so many `requests`; the outcomes
are counted. The result is one JSON object on standard output; a progress bar goes to standard error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from tqdm import tqdm

CHAT = "/v1/chat/completions"
FINISHED, LEFT, STUCK = "finished", "left", "stuck"
"""Outcomes of a request; or `<status> <code>` of an error, or `broken: …` for a fault of the server."""
PATIENCE = 180.0
"""Seconds after which a request counts as stuck."""

Json = dict[str, Any]


@dataclass
class Reply:
    """A response as a client sees it."""

    outcome: str
    text: str = ""
    first: float | None = None
    """Seconds to the first text of a stream."""
    seconds: float = 0.0
    tokens: int = 0


class ProtocolError(Exception):
    """Raised for a response that no client could rely on."""


@asynccontextmanager
async def session_for(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A pool of connections without limits of its own."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield session


# ---- one request -------------------------------------------------------------------------------------


async def ask(session: aiohttp.ClientSession, body: Json, chunks: int | None = None) -> Reply:
    """Ask for a chat completion and read the answer.

    Args:
        session: the connections.
        body: the request; with `stream` the answer is read event by event.
        chunks: after so many events of a stream the client goes away.
    """
    begun = time.perf_counter()
    async with session.post(CHAT, json=body) as response:
        if response.status != 200:
            return Reply(error_outcome(response.status, await response.read()))
        if body.get("stream"):
            reply = await _read_stream(response, chunks, begun)
        else:
            reply = whole(await response.json())
    reply.seconds = time.perf_counter() - begun
    return reply


def error_outcome(status: int, content: bytes) -> str:
    """`<status> <code>` of an error object.

    Raises:
        ProtocolError: for a body that is none.
    """
    try:
        error = json.loads(content)["error"]
        return f"{status} {error['code'] or 'invalid_request'}"
    except (ValueError, KeyError, TypeError) as fault:
        raise ProtocolError(f"status {status} without an error object") from fault


def whole(answer: Json) -> Reply:
    """An answer that came in one piece."""
    choices = answer["choices"]
    if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
        raise ProtocolError("a choice without a finish reason")
    tokens = answer["usage"]["completion_tokens"]
    return Reply(FINISHED, choices[0]["message"]["content"], tokens=tokens)


async def _read_stream(response: aiohttp.ClientResponse, chunks: int | None, begun: float) -> Reply:
    """An answer that comes as a stream, read to its end or for so many events."""
    text, first, reasons, done = "", None, Counter[int](), False
    events = 0
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if chunks is not None and events >= chunks:
            response.close()
            return Reply(LEFT)
        events += 1
        if line.strip() == b"data: [DONE]":
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            return Reply(f"{_status(event['error'])} {event['error']['code']}")
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "")
            if piece and first is None:
                first = time.perf_counter() - begun
            text += piece if choice["index"] == 0 else ""
            reasons[choice["index"]] += choice["finish_reason"] is not None
    if not done or not reasons or set(reasons.values()) != {1}:
        raise ProtocolError(f"a stream with {dict(reasons)} finish reasons, done: {done}")
    return Reply(FINISHED, text, first)


def _status(error: Json) -> int:
    """The status that an error within a stream would have had."""
    return {"timeout": 504, "service_unavailable": 503, "server_error": 500}.get(error["type"], 400)


async def outcome_of(request: Awaitable[Reply]) -> Reply:
    """The reply, with every failure to get one as an outcome."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await request
    except TimeoutError:
        return Reply(STUCK)
    except (aiohttp.ClientError, ProtocolError, OSError, ValueError, KeyError) as error:
        return Reply(f"broken: {type(error).__name__}: {error}"[:120])


# ---- answers and probes ------------------------------------------------------------------------------


async def answers(task: Json) -> Json:
    """Records of all bodies, asked for by so many clients; and the seconds of the whole."""
    bodies: Sequence[Json] = task["bodies"]
    records: list[Reply | None] = [None] * len(bodies)
    pending = iter(range(len(bodies)))
    async with session_for(task["url"]) as session:
        with tqdm(total=len(bodies), desc="requests", disable=task.get("quiet"), leave=False) as bar:

            async def client() -> None:
                for i in pending:
                    records[i] = await outcome_of(ask(session, bodies[i]))
                    bar.update()

            begun = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(task["clients"])))
            seconds = time.perf_counter() - begun
    return {"seconds": seconds, "replies": [asdict(record) for record in records if record]}


async def probe(task: Json) -> Json:
    """Records of streams asked for one after another, beside clients that keep the server busy."""
    stream: Json = {"stream": True}
    async with session_for(task["url"]) as session:

        async def busy(offset: int) -> None:
            for i in itertools.count(offset):
                await outcome_of(ask(session, task["background"][i % len(task["background"])]))

        others = [asyncio.create_task(busy(i)) for i in range(task["clients"] if task["background"] else 0)]
        await asyncio.sleep(task.get("settle", 0.0))
        records = []
        for body in tqdm(task["bodies"], desc="probes", disable=task.get("quiet"), leave=False):
            records.append(await outcome_of(ask(session, body | stream)))
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return {"replies": [asdict(record) for record in records]}


# ---- the storm ---------------------------------------------------------------------------------------


NO_BODIES = (
    b"", b"{", b"[]", b"{}", b"null", b'{"messages": 3}', b"\xff\xfe", b'{"messages": []}',
)  # fmt: skip
"""Bodies that are no request."""
WRONG_FIELDS: tuple[Json, ...] = (
    {"temperature": "hot"}, {"no_such": 1}, {"n": 0}, {"n": 999}, {"max_tokens": -1}, {"tools": [{}]},
    {"seed": 2**70}, {"decoder": "no-such"}, {"stop": ["x"] * 99}, {"stream_options": {}},
    {"logprobs": True, "top_logprobs": 21}, {"model": "no-such"},
    {"messages": [{"role": "user", "content": "\ud800"}]},
)  # fmt: skip
"""Fields that spoil a request that was right."""


@dataclass
class Storm:
    """The surroundings of a client that behaves at random.

    Attributes:
        session: the connections.
        url: the server's.
        rng: the client's choices.
        bodies: requests that are right.
        texts: their answers.
        long: a prompt that is longer than the server takes.
        limit: bytes of the longest body that the server takes.
    """

    session: aiohttp.ClientSession
    url: str
    rng: random.Random
    bodies: list[Json]
    texts: list[str]
    long: str
    limit: int

    def valid(self) -> tuple[Json, str]:
        """A request that is right, and its answer."""
        i = self.rng.randrange(len(self.bodies))
        return self.bodies[i], self.texts[i]

    async def checked(self, body: Json, text: str, chunks: int | None = None) -> Reply:
        """The reply to a request, whose text must be the known one."""
        reply = await ask(self.session, body, chunks)
        if reply.outcome == FINISHED and reply.text != text:
            raise ProtocolError(f"another text: {reply.text[:30]!r}, not {text[:30]!r}")
        return reply


async def _whole(storm: Storm) -> Reply:
    return await storm.checked(*storm.valid())


async def _several(storm: Storm) -> Reply:
    body, text = storm.valid()
    return await storm.checked(
        body | {"n": storm.rng.randint(2, 4), "stream": storm.rng.random() < 0.5}, text
    )


async def _streamed(storm: Storm) -> Reply:
    body, text = storm.valid()
    return await storm.checked(body | {"stream": True}, text)


async def _stream_left(storm: Storm) -> Reply:
    body, text = storm.valid()
    return await storm.checked(body | {"stream": True}, text, chunks=storm.rng.randint(0, 4))


async def _left(storm: Storm) -> Reply:
    """A client that goes away after a while, perhaps before it is answered."""
    body, text = storm.valid()
    try:
        async with asyncio.timeout(storm.rng.expovariate(20)):
            return await storm.checked(body, text)
    except TimeoutError:
        return Reply(LEFT)


async def _hasty(storm: Storm) -> Reply:
    body, text = storm.valid()
    return await storm.checked(body | {"timeout": storm.rng.uniform(0.001, 0.2)}, text)


async def _malformed(storm: Storm) -> Reply:
    body, _ = storm.valid()
    spoilt = [json.dumps(body | fields).encode() for fields in WRONG_FIELDS]
    data = storm.rng.choice([*NO_BODIES, *spoilt])
    headers = {"Content-Type": "application/json"}
    async with storm.session.post(CHAT, data=data, headers=headers) as response:
        content = await response.read()
    if response.status not in (400, 404, 429):  # some faults are found only when there is room
        raise ProtocolError(f"a malformed body has status {response.status}")
    return Reply(error_outcome(response.status, content))


async def _too_long(storm: Storm) -> Reply:
    """A prompt that does not fit."""
    body, _ = storm.valid()
    return await ask(storm.session, body | {"messages": [{"role": "user", "content": storm.long}]})


async def _too_large(storm: Storm) -> Reply:
    """A body that is refused before it is read whole; the connection may end before the reply is read."""
    try:
        async with storm.session.post(CHAT, data=b" " * (storm.limit + 1)) as response:
            return Reply(error_outcome(response.status, await response.read()))
    except (aiohttp.ClientConnectionError, OSError):
        return Reply("413 body_too_long")


async def _raw(storm: Storm) -> Reply:
    """A connection on which something else than HTTP comes, half of a request, or nothing."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    pieces = [
        b"",
        b"\x00\x01garbage\r\n\r\n",
        b"GET /health HTTP/1.1\r\n",
        head + b"Content-Length: 500\r\n\r\n{",
    ]
    parts = urlsplit(storm.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(storm.rng.choice(pieces))
    await writer.drain()
    await asyncio.sleep(storm.rng.uniform(0, 0.02))
    writer.close()
    del reader
    return Reply("raw")


async def _looking(storm: Storm) -> Reply:
    """A look at the paths of operators."""
    path = storm.rng.choice(["/health", "/ready", "/metrics", "/v1/models", "/no-such-path"])
    async with storm.session.get(path) as response:
        await response.read()
        if response.status != (404 if path == "/no-such-path" else 200):
            raise ProtocolError(f"{path} has status {response.status}")
    return Reply("looked")


BEHAVIOURS: dict[str, Callable[[Storm], Awaitable[Reply]]] = {
    "whole": _whole,
    "streamed": _streamed,
    "several": _several,
    "left": _left,
    "stream left": _stream_left,
    "hasty": _hasty,
    "malformed": _malformed,
    "too long": _too_long,
    "too large": _too_large,
    "raw": _raw,
    "looking": _looking,
}
"""Behaviours of a client by name; each is one request."""


def _turns(task: Json) -> Iterator[None]:
    """Yields once for each request that may begin, with a progress bar."""
    begun, total = time.monotonic(), task.get("requests") or 0
    unit = {"total": total, "unit": "req"} if total else {"total": round(task["seconds"]), "unit": "s"}
    with tqdm(desc=task["name"], disable=task.get("quiet"), mininterval=1.0, **unit) as bar:
        for i in itertools.count():
            elapsed = time.monotonic() - begun
            if (total and i >= total) or elapsed >= task["seconds"]:
                return
            bar.update(1 if total else max(0.0, elapsed - bar.n))
            yield


async def storm(task: Json) -> Json:
    """Outcomes of clients that behave at random, counted by behaviour."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in task["behaviours"]}
    names, weights = list(counts), list(task["behaviours"].values())
    turns = _turns(task)
    async with session_for(task["url"]) as session:

        async def client(number: int) -> None:
            rng = random.Random(f"{task['seed']} {number}")
            place = Storm(
                session, task["url"], rng, task["bodies"], task["texts"], task["long"], task["limit"]
            )
            for _ in turns:
                name = rng.choices(names, weights)[0]
                reply = await outcome_of(BEHAVIOURS[name](place))
                counts[name][reply.outcome] += 1
                if reply.outcome.startswith("429"):
                    await asyncio.sleep(rng.uniform(0, 0.3))

        await asyncio.gather(*(client(i) for i in range(task["clients"])))
    return {"outcomes": counts}


KINDS: dict[str, Callable[[Json], Awaitable[Json]]] = {"answers": answers, "probe": probe, "storm": storm}


async def run(task: Json) -> Json:
    """The result of a task."""
    return await KINDS[task["kind"]](task)


def main() -> None:
    """Do the task on standard input."""
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
