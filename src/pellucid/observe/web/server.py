"""`pellucid watch`: a page on this machine that shows runs while they train, and after.

Starlette answers the page's questions (feed.py) and pushes "step N is ready" over server-sent events; it opens the
telemetry read-only and holds no lock, so a browser can never delay a training. Bound to loopback, with a content policy
that lets nothing in or out.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from pellucid.config import UserError
from pellucid.observe.mounts import is_network
from pellucid.observe.store import FILE_NAME
from pellucid.observe.web.feed import Feed, _number, answer

PAGE = Path(__file__).parent / "page"
VENDOR = Path(__file__).parent / "vendor"
NEEDED = ("preact.mjs", "hooks.mjs", "htm.mjs", "uplot.mjs", "uplot.css")
HOST = "127.0.0.1"
PORT, PORTS = 8384, 20  # the first tried, and how many
POLL, POLL_NETWORK, PING = 0.1, 2.0, 15.0  # seconds
MOST_RUNS = 8
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def watch(run_dirs: Sequence[str | Path] = (), port: int | None = None, open_browser: bool = True) -> None:
    """Serve the dashboard of some runs until interrupted; with none given, of the newest ones under runs/.

    port: the first to try (8384); a taken one is passed over, and said so. Raises UserError for what is not a run.
    """
    check_assets()
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("watch needs the packages of the dashboard: pip install 'pellucid[dashboard]'") from None
    feeds = [Feed(folder) for folder in (run_dirs or newest_runs())]
    listener, taken = bind(port or PORT)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"
    if taken:
        print(f"port {taken} is in use, so this is on {listener.getsockname()[1]}", file=sys.stderr)
    for feed in feeds:
        if feed.problem:
            print(feed.problem, file=sys.stderr)
        if is_network(feed.directory):
            print(f"{feed.directory} lies on a network file system: looked at every {POLL_NETWORK:.0f} seconds", file=sys.stderr)
    print(f"watching {', '.join(str(feed.directory) for feed in feeds)} at {address}  (Ctrl-C ends)")
    if open_browser:
        webbrowser.open(address)
    make_server(feeds).run(sockets=[listener])


def make_server(feeds: Sequence[Feed]):
    """A uvicorn.Server whose event streams end when it is told to."""
    import uvicorn

    app = make_app(feeds, lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3))
    return server


def check_assets() -> None:
    """Raises UserError if the build step that fetches the page's JavaScript has not run."""
    missing = [name for name in NEEDED if not (VENDOR / name).is_file()]
    if missing:
        raise UserError(f"the dashboard's JavaScript is missing ({', '.join(missing)}): this is a checkout without the "
                        "build step; run `pip install -e .` with a network")  # fmt: skip


def newest_runs() -> list[Path]:
    """The runs under runs/, newest first. Raises UserError if there are none."""
    found = [path for path in Path("runs").glob("*") if (path / FILE_NAME).is_file() or (path / "config.toml").is_file()]
    if not found:
        raise UserError("there is no run under runs/ here: name one (pellucid watch RUN_DIR), or train one (pellucid train)")
    return sorted(found, key=lambda path: -max(p.stat().st_mtime for p in path.iterdir()))[:MOST_RUNS]


def bind(port: int) -> tuple[socket.socket, int | None]:
    """(a listening socket on the first free port, the first one that was taken)."""
    for candidate in range(port, min(port + PORTS, 1 << 16)):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        return listener, port if candidate != port else None
    raise UserError(f"ports {port} to {port + PORTS - 1} are all in use; choose another with --port")


def make_app(feeds: Sequence[Feed], stopping: Callable[[], bool] = lambda: False):
    """The ASGI application; its event streams end once `stopping`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    class Assets(StaticFiles):
        def file_response(self, *arguments, **named) -> Response:
            response = super().file_response(*arguments, **named)
            response.headers.update(HEADERS)
            return response

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    async def ask(request: Request) -> Response:
        try:
            body, kind = await run_in_threadpool(answer, feeds, request.path_params["path"], dict(request.query_params))
        except UserError as error:
            return JSONResponse({"problem": str(error)}, status_code=404, headers=HEADERS)
        return Response(body, media_type=kind, headers=HEADERS)

    async def stage(request: Request) -> Response:
        """Have a step played. The header tells our page from another site's form, which cannot send it."""
        try:
            if "x-pellucid" not in request.headers:
                raise UserError("only the dashboard's own page may ask for that")
            query = dict(request.query_params)
            feed, step = feeds[_number(query, "run", len(feeds))], query.get("step", "")
            if not step.isdecimal():
                raise UserError(f"step={step}: give the number of a step")
            making = await run_in_threadpool(lambda: feed.plays.make(int(step), feed.pulse()["step"]))
        except UserError as error:
            return JSONResponse({"problem": str(error)}, status_code=400, headers=HEADERS)
        return JSONResponse(making, headers=HEADERS)

    async def tell(request: Request) -> Response:
        gone = request.is_disconnected
        stream = pulses(feeds, gone, stopping, run_in_threadpool)
        return StreamingResponse(stream, media_type="text/event-stream", headers={**HEADERS, "X-Accel-Buffering": "no"})

    routes = [Route("/", page), Route("/events", tell), Route("/api/stage", stage, methods=["POST"]), Route("/api/{path}", ask),
              Mount("/page", Assets(directory=PAGE)),
              Mount("/vendor", Assets(directory=VENDOR, check_dir=False))]  # fmt: skip
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # against DNS rebinding
    return Starlette(routes=routes, middleware=[hosts])


async def pulses(feeds: Sequence[Feed], gone, stopping: Callable[[], bool], in_thread) -> AsyncIterator[str]:
    """Server-sent events: one whenever a run has a new step, a new event or another problem; a comment when quiet."""
    known: list[dict | None] = [None] * len(feeds)
    pause = POLL_NETWORK if any(is_network(feed.directory) for feed in feeds) else POLL
    quiet = 0.0
    while not stopping() and not await gone():
        for index, feed in enumerate(feeds):
            state = await in_thread(feed.pulse)
            if state["problem"]:  # a locked or vanished file: the last step stays on the page
                state["step"] = (known[index] or state)["step"]
            if state != known[index]:
                known[index], quiet = state, 0.0
                yield f"data: {json.dumps({'run': index, **state})}\n\n"
        if quiet >= PING:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(pause)
        quiet += pause
