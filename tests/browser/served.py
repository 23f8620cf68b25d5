"""`vidkv serve` as it is, and beside it how many event streams are open: python served.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vidkv.apps import serve as serving


def counting(create: Any) -> Any:
    """`create_app`, with a route that says what the service holds open."""

    def create_app(*arguments: Any, **options: Any) -> FastAPI:
        app: FastAPI = create(*arguments, **options)

        async def streams(_: Request) -> Response:
            return JSONResponse({"streams": app.state.service.streams})

        app.router.routes.insert(0, Route("/streams", streams))
        return app

    return create_app


if __name__ == "__main__":
    serving.create_app = counting(serving.create_app)
    serving.serve(Path(sys.argv[1]), port=0, say=lambda url: print(url, flush=True))
