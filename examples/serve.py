"""Serve a bundle: `python examples/serve.py engines/qwen-fp16 --port 8000`, then POST /generate {"prompt": "..."}.

A bad request is answered with 4xx and {"error": "one sentence"}.
"""

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from refmodels import LogitLockError, stop_ids_in, tokenizer_in
from trt_runtime import GenerationConfig, generate, open_engine

MAX_BODY_BYTES = 1 << 18
MAX_WAITING = 16
"""Number of requests that may wait for the engine, which serves one at a time."""


class Question(BaseModel):
    prompt: str
    max_new_tokens: int = Field(64, ge=1, le=100_000)


class GoneError(Exception):
    """The client of a running request has left."""


class LimitBody:
    """ASGI middleware that reads the body, and refuses one of more than `MAX_BODY_BYTES`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                return await refusal(413, f"the body has more than {MAX_BODY_BYTES} bytes")(scope, receive, send)
        read = [{"type": "http.request", "body": body}] if scope["type"] == "http" else []

        async def again() -> Any:
            return read.pop() if read else await receive()

        await self.app(scope, again, send)


def refusal(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence.encode(errors="replace").decode()}, status)


def make_app(bundle: str) -> FastAPI:
    app, engine, one_at_a_time = FastAPI(), open_engine(bundle), threading.Lock()
    tokenizer = tokenizer_in(engine.bundle.directory, engine.spec)
    stops = stop_ids_in(engine.bundle.directory, engine.spec, tokenizer, chat=False)
    places = threading.BoundedSemaphore(MAX_WAITING)
    app.add_middleware(LimitBody)

    @app.exception_handler(RequestValidationError)
    async def not_a_question(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(LogitLockError)
    async def bad_input(_: Request, error: LogitLockError) -> JSONResponse:
        return refusal(400, str(error))

    @app.post("/generate")
    async def answer(question: Question) -> Any:
        ids = await asyncio.to_thread(tokenizer.encode, question.prompt)
        if not 0 < len(ids) <= engine.max_positions:
            return refusal(400, f"the prompt has {len(ids)} tokens; 1 to {engine.max_positions} are possible")
        if not places.acquire(blocking=False):
            return refusal(503, f"{MAX_WAITING} requests are waiting already; try again later")
        config = GenerationConfig(max_new_tokens=question.max_new_tokens, stop_ids=stops)
        events: asyncio.Queue[dict[str, str] | str | None] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def send(event: dict[str, str] | str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has been stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

        def on_text(row: int, text: str) -> None:
            if gone.is_set():
                raise GoneError
            send(text)

        def run() -> None:
            try:
                with one_at_a_time:
                    if not gone.is_set():
                        generate(engine, tokenizer, [ids], config, on_text=on_text)
            except GoneError:
                pass
            except LogitLockError as error:
                send({"error": str(error)})
            finally:
                places.release()
                send(None)

        async def stream() -> AsyncIterator[str]:
            try:
                while (event := await events.get()) is not None:
                    yield f"data: {json.dumps(event)}\n\n"
            finally:
                gone.set()

        threading.Thread(target=run, daemon=True).start()
        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(make_app(options.bundle), host="127.0.0.1", port=options.port)  # the loopback interface only
