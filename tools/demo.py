"""A trained model in the browser: `python tools/demo.py --checkpoint=W`, then open http://127.0.0.1:8000.

A decoder goes on from a prompt: its tokens stream in, each coloured by its probability, with the likeliest others beside it.
An encoder ranks what may stand behind each [MASK]. W is a run's folder, W@STEP, or hf:FOLDER_OR_HUB_ID.
It needs two small packages: pip install 'jaxlm[demo]'

Only this machine reaches it, unless --host says otherwise; then --allow_host=NAME names how browsers may call it, so that
another site's page cannot reach it under a name of its own. One text is computed at a time and a few wait; who comes after
them is told so. A client that goes away ends its text at the next token.

    POST /generate   {"text": "def ", "temperature": 0.8, …} -> a JSON object a line: {"text", "tokens", "finish"}
    POST /fill_mask  {"text": "import [MASK]", "top_k": 5}   -> one such line: {"parts", "masks"}
    GET  /model      what the page needs to know of the model: the options and their ranges
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import inspect
import json
import math
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
except ImportError as error:
    sys.exit(f"found: {error}; the page needs starlette and uvicorn: pip install 'jaxlm[demo]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from absl import logging

from jaxlm import api
from jaxlm.exits import with_status
from jaxlm.host import keep_freed_memory
from jaxlm.inference.fill_mask import mask_pattern
from jaxlm.inputs import need_lm

PAGE = Path(__file__).resolve().parent / "demo_page"
LOCAL = ("127.0.0.1", "localhost", "[::1]")
ANYWHERE = ("", "0.0.0.0", "::")
MOST_BYTES = 1 << 16  # of a request's body
MOST_TOKENS = 512  # new ones in an answer
MOST_WAITING = 4  # requests behind the one that is computed
MOST_CONNECTIONS = 64
PATIENCE = 20  # seconds for a client to send its request, or to take a line
FAREWELL = 3  # seconds that an interrupted server waits for the texts under way
ALTERNATIVES = 8  # shown beside each token
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
Json = dict[str, Any]


# --- what may be asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A number in a request, and its field on the page. step 1: a whole number."""

    name: str
    label: str
    least: float
    most: float
    step: float
    default: float

    def problem(self, value: Any) -> str:
        """What is wrong with the value, '' if nothing is."""
        kinds = (int,) if self.step == 1 else (int, float)
        fits = type(value) in kinds and self.least <= value <= self.most
        kind = "a whole number" if self.step == 1 else "a number"
        range = f"from {self.least:.10g} to {self.most:.10g}"
        return "" if fits else f"{self.name}: expected {kind} {range}, found {shown(value)}"


def options_of(lm: api.LanguageModel, most_tokens: int = MOST_TOKENS) -> list[Option]:
    """What can be chosen for this model, with the defaults of `jaxlm.api`."""
    most_tokens = min(most_tokens, lm.max_len)
    call, ranges = {
        "gpt": (
            api.stream,
            [
                ("max_new_tokens", "New tokens", 1, most_tokens, 1),
                ("temperature", "Temperature", 0, 5, 0.05),
                ("top_k", "Top k", 0, lm.num_tokens, 1),
                ("top_p", "Top p", 0.01, 1, 0.01),
                ("min_p", "Min p", 0, 1, 0.01),
                ("repetition_penalty", "Repeat penalty", 0.1, 10, 0.05),
                ("seed", "Seed", 0, 2**32 - 1, 1),
            ],
        ),
        "bert": (api.fill_mask, [("top_k", "Candidates", 1, min(50, lm.num_tokens), 1)]),
    }[lm.family]
    defaults = inspect.signature(call).parameters
    return [
        Option(name, label, least, most, step, min(defaults[name].default, most))
        for name, label, least, most, step in ranges
    ]


def read_wanted(body: bytes, options: Sequence[Option]) -> Json:
    """The text and the options of a request, checked.

    Raises:
      HTTPException: 400, with everything that is wrong.
    """
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from error
    if not isinstance(wanted, dict):
        raise HTTPException(400, f"expected a JSON object, found {shown(wanted)}")
    known = {option.name: option for option in options}
    problems = [f"unknown: {shown(name)}" for name in wanted if name not in {"text", *known}]
    if not isinstance(wanted.get("text"), str):
        problems.append("text: expected a text")
    problems += [known[name].problem(value) for name, value in wanted.items() if name in known]
    if problems := [problem for problem in problems if problem]:
        raise HTTPException(400, "; ".join(problems))
    return wanted


def shown(value: Any, most: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= most else text[:most] + " …"


async def read_body(request: Request) -> bytes:
    """A request's JSON.

    Raises:
      HTTPException: 415, 413, 408. A page of another site can send other types of content without being asked first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected content-type: application/json")
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise HTTPException(
                        413, f"the text is too long: {MOST_BYTES:,} bytes at most in a request"
                    )
    except TimeoutError as error:
        raise HTTPException(408, f"the request took longer than {PATIENCE} seconds") from error
    return body


# --- what is answered -------------------------------------------------------------------------------------------------


def generate(lm: api.LanguageModel, text: str, **options: Any) -> Iterator[Json]:
    """A line for each piece: its text, its tokens (there may be several, and text may wait for more), why it ended.

    A token is told with its probability, with the likeliest ones at its place, and which of these it is (-1: none).
    """
    most = min(ALTERNATIVES, lm.num_tokens)
    name = functools.lru_cache(maxsize=4096)(functools.partial(token_text, lm))
    tell = lambda id, logprob: [name(id), math.exp(logprob)]
    for piece in api.stream(lm, text, alternatives=most, **options):
        tokens = []
        for (id, logprob), others in zip(piece.tokens, piece.alternatives, strict=True):
            ids = [other for other, _ in others]
            place = ids.index(id) if id in ids else -1
            alternatives = [tell(*other) for other in others]
            tokens.append(
                {"token": tell(id, logprob), "alternatives": alternatives, "place": place}
            )
        yield {"text": piece.text, "tokens": tokens, "finish": piece.finish}


def fill_mask(lm: api.LanguageModel, text: str, **options: Any) -> Iterator[Json]:
    """One line: the text around the masks, and for each mask its candidates."""
    (masks,) = api.fill_mask(lm, [text], **options)
    yield {
        "parts": mask_pattern(lm.tokenizer).split(text),
        "masks": [[[c.token, c.probability] for c in candidates] for candidates in masks],
    }


def token_text(lm: api.LanguageModel, id: int) -> str:
    """What a token adds to a text, with its space; what the vocabulary calls it if that is nothing or half a character."""
    decode = lm.tokenizer.decode
    before = lm.tokenizer.encode("a").tolist()  # at the beginning some tokenizers drop a space
    text = decode([*before, id])[len(decode(before)) :]
    return text if text and "\ufffd" not in text else lm.tokenizer.token(id)


class Turns:
    """One computation at a time, in the order in which they came; `most_waiting` more may wait."""

    def __init__(self, most_waiting: int = MOST_WAITING):
        self.most_waiting, self.inside = most_waiting, 0
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Raises HTTPException 503 if too many wait already."""
        if self.inside > self.most_waiting:
            raise HTTPException(
                503,
                f"{self.inside} texts are computed or waiting already: try again in a moment",
                headers={"retry-after": "5"},
            )
        self.inside += 1
        try:
            async with self._lock:
                yield
        finally:
            self.inside -= 1


class Answer(Response):
    """Lines of JSON, sent as they are made while the client is there.

    make: called in its turn, gives the lines. They are made in a thread, so the server goes on meanwhile.
    """

    media_type = "application/x-ndjson"

    def __init__(self, turns: Turns, make: Callable[[], Iterator[Json]]):
        super().__init__()
        del self.headers["content-length"]
        self.turns, self.make = turns, make

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        client = Request(scope, receive)
        async with self.turns.take():
            if await client.is_disconnected():  # while it waited
                return
            with contextlib.closing(self.make()) as lines:
                line = await run_in_threadpool(first, lines)
                start = {"status": self.status_code, "headers": self.raw_headers}
                await send({"type": "http.response.start", **start})
                while line is not None and not await client.is_disconnected():
                    body = json.dumps(line, allow_nan=False).encode() + b"\n"
                    async with asyncio.timeout(PATIENCE):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                    line = await run_in_threadpool(next, lines, None)
            await send({"type": "http.response.body", "body": b""})


def first(lines: Iterator[Json]) -> Json | None:
    """The first line; what a model cannot use shows here."""
    try:
        return next(lines, None)
    except api.BadInput as error:
        raise HTTPException(400, str(error)) from error


# --- the server -------------------------------------------------------------------------------------------------------


class SafeHeaders:
    """Middleware that adds HEADERS to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def say_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def make_app(
    lm: api.LanguageModel, hosts: Sequence[str] = LOCAL, most_tokens: int = MOST_TOKENS
) -> Starlette:
    """The web application of one model. hosts: the names under which it may be called.

    Raises:
      BadInput: for a model that neither continues texts nor fills masks.
    """
    need_lm(lm, "gpt", "bert")
    turns, options = Turns(), options_of(lm, most_tokens)
    answer = {"gpt": generate, "bert": fill_mask}[lm.family]
    about: Mapping[str, Any] = {
        "checkpoint": lm.checkpoint,
        "family": lm.family,
        "path": answer.__name__,
        "max_len": lm.max_len,
        "num_tokens": lm.num_tokens,
        "options": [asdict(option) for option in options],
    }

    async def model(request: Request) -> Response:
        return JSONResponse(about)

    async def ask(request: Request) -> Response:
        wanted = read_wanted(await read_body(request), options)
        return Answer(turns, lambda: answer(lm, **wanted))

    return Starlette(
        routes=[
            Route("/model", model),
            Route(f"/{answer.__name__}", ask, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={HTTPException: say_error},
    )


def url_host(host: str) -> str:
    """A host as URLs and browsers write it."""
    return f"[{host}]" if ":" in host else host.lower()


def serve(app: Any, host: str, port: int) -> None:
    """Serves until it is interrupted. port 0: any that is free.

    Raises:
      OSError: if the port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        address = f"{url_host(host)}:{listener.getsockname()[1]}"
        print(f"open http://{address}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=FAREWELL,
        )
        with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
            uvicorn.Server(config).run(sockets=[listener])


@with_status
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="W, W@STEP, or hf:FOLDER_OR_HUB_ID")
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to (this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--allow_host", action="append", default=[], help="a name by which browsers may call it"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=MOST_TOKENS, help="the most that may be asked for"
    )
    args = parser.parse_args(argv)
    if args.host in ANYWHERE and not args.allow_host:
        parser.error(
            f"--host={args.host} needs --allow_host=NAME: the name or address that browsers call"
        )
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens={args.max_new_tokens}: expected 1 or more")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port={args.port}: expected 0 (any that is free) to 65535")
    keep_freed_memory()
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    hosts = [*LOCAL, *map(url_host, [args.host, *args.allow_host])]
    app = make_app(api.load(args.checkpoint), hosts, args.max_new_tokens)
    serve(app, args.host, args.port)


if __name__ == "__main__":
    main()
