"""Serve a bundle: `python examples/serve.py engines/qwen-fp16 --port 8000`, then POST /generate {"prompt": "..."}."""

import argparse
import json
import queue
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from refmodels import stop_ids_in, tokenizer_in
from trt_runtime import GenerationConfig, generate, open_engine


class Question(BaseModel):
    prompt: str
    max_new_tokens: int = Field(64, ge=1)


def make_app(bundle: str) -> FastAPI:
    app, engine, one_at_a_time = FastAPI(), open_engine(bundle), threading.Lock()
    tokenizer = tokenizer_in(engine.bundle.directory, engine.spec)
    stops = stop_ids_in(engine.bundle.directory, engine.spec, tokenizer, chat=False)

    @app.post("/generate")
    def answer(question: Question) -> StreamingResponse:
        ids, pieces = tokenizer.encode(question.prompt), queue.Queue()
        if not 0 < len(ids) <= engine.max_positions:
            raise HTTPException(400, f"the prompt has {len(ids)} tokens; 1 to {engine.max_positions} are possible")
        config = GenerationConfig(max_new_tokens=question.max_new_tokens, stop_ids=stops)

        def run() -> None:
            try:
                with one_at_a_time:
                    generate(engine, tokenizer, [ids], config, on_text=lambda row, text: pieces.put(text))
            finally:
                pieces.put(None)

        threading.Thread(target=run, daemon=True).start()
        stream: Iterator[str] = (f"data: {json.dumps(piece)}\n\n" for piece in iter(pieces.get, None))
        return StreamingResponse(stream, media_type="text/event-stream")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(make_app(options.bundle), host="127.0.0.1", port=options.port)  # the loopback interface only
