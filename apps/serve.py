"""Jobs over HTTP and the workers that do them, in one tree of processes: `vidkv serve`."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from vidkv.apps.api import LOOPBACK, ApiLimits, create_app
from vidkv.errors import InputError, ResourceError, VidkvError
from vidkv.files import reason
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore
from vidkv.jobs.supervisor import Supervisor
from vidkv.request import EngineSettings, VideoRequest, shown

MIN_TOKEN = 16
DRAIN_S = 2.0
"""How long answers that are under way may take once the server has been told to stop."""
START_S, STOP_S = 1.0, 7.0
"""How long after that workers are waited for: until the supervisor sees that it is to stop them, then until
it has. It was told at the same time. A worker that is still being started cannot be stopped and has nothing
to save; it ends when it finds this process gone."""
LINGER_S = 5.0
"""How long /health says that the workers are gone before the server ends."""
CONNECTIONS = 2_048
FIRST_PROMPT = "a red circle bouncing"
"""What workers make before the first video is asked for, so that it does not wait for what loads lazily."""


def serve(
    root: Path, host: str = "127.0.0.1", port: int = 8000, token: str | None = None,
    devices: Sequence[str] = ("cpu",), *, settings: EngineSettings | None = None,
    options: Options | None = None, retries: int = 2, limits: ApiLimits | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> int:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C, which end it within ten seconds with all work saved.

    Args:
        root: the output folder.
        port: 0 for any that is free.
        token: that requests must bear; required where others can reach the server.
        devices: as of `Supervisor`.
        say: told where the server is.

    Returns:
        The number of the signal that ended it.

    Raises:
        InputError: the address cannot be used, or is not to be without a token.
        OutputError: the output folder cannot be used, or another vidkv renders to it.
        ResourceError: the workers cannot work.
    """
    address = _address(host, port)
    if token is None and not ipaddress.ip_address(address[1][0]).is_loopback:
        raise InputError(
            f"host={host!r:.80}: others could use this server; give --token-file FILE with a secret of at "
            f"least {MIN_TOKEN} characters, or --host 127.0.0.1"
        )
    if token is not None:
        check_token(token)
    signals: list[int] = []
    with _listening(address, host) as listener, JobStore(root) as store:
        name = f"[{host}]" if ":" in host else host
        app = create_app(
            store, settings=settings or EngineSettings(), token=token, limits=limits or ApiLimits(),
            hosts=LOOPBACK | {name.lower()},
        )  # fmt: skip
        # loads gradio
        from vidkv.apps import web_page

        web_page.mount(app, app.state.service)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", ws="none", server_header=False,
            proxy_headers=False, limit_concurrency=CONNECTIONS, h11_max_incomplete_event_size=2**15,
            timeout_graceful_shutdown=DRAIN_S,  # type: ignore[arg-type]
        )  # fmt: skip
        server = uvicorn.Server(config)
        warm = VideoRequest(prompt=FIRST_PROMPT, seconds=1), settings or EngineSettings()
        with Supervisor(store, devices, options, retries, idle=True, warm=warm) as supervisor:
            crew = Crew(supervisor, server)
            app.state.service.stopping = lambda: server.should_exit
            app.state.service.ailing = lambda: crew.ailing
            with _noting(signals, server):
                crew.start()
                say(f"http://{name}:{listener.getsockname()[1]}")
                # uvicorn's own handlers stand in while it runs, and hand signals on to ours at its end
                server.run([listener])
                server.should_exit = True
                crew.join(START_S)
                if crew.stopping:
                    crew.join(STOP_S)
    if crew.error is not None:
        raise crew.error
    return signals[0] if signals else 0


class Crew(threading.Thread):
    """Looks after the workers beside the server; each ends with the other.

    Attributes:
        error: what the workers ended in.
        stopping: it is ending them.
    """

    def __init__(self, supervisor: Supervisor, server: uvicorn.Server) -> None:
        super().__init__(name="supervisor", daemon=True)
        self.supervisor, self.server = supervisor, server
        self.error: VidkvError | None = None
        self.stopping = False

    @property
    def ailing(self) -> str | None:
        """Why no work is being done."""
        if self.error is not None:
            return str(self.error)
        return None if self.is_alive() or self.server.should_exit else "the supervisor has not started"

    def run(self) -> None:
        try:
            while not self.server.should_exit:
                self.supervisor.step()
            self.stopping = True
            self.supervisor.stop()
        except VidkvError as error:
            self.error = error
        except Exception as error:
            self.error = ResourceError(
                f"the supervisor of the workers has ended with {type(error).__name__}: {error}; see "
                "`vidkv doctor`, then start the server again"
            )
        deadline = time.monotonic() + LINGER_S
        while not self.server.should_exit and time.monotonic() < deadline:
            time.sleep(0.05)
        self.server.should_exit = True


def read_token(path: Path) -> str:
    """The secret in a file.

    Raises:
        InputError: it cannot be read, or is too short.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token file {path}: {reason(error)}") from None
    return check_token(token)


def check_token(token: str) -> str:
    """The token itself.

    Raises:
        InputError: it is too short, or no header can hold it.
    """
    if len(token) < MIN_TOKEN or not all("!" <= character <= "~" for character in token):
        raise InputError(
            f"the token has {len(token)} characters; use at least {MIN_TOKEN}, of ASCII without spaces, "
            'such as from `python -c "import secrets; print(secrets.token_urlsafe())"`'
        )
    return token


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    if not 0 <= port <= 65535:
        raise InputError(f"port={port}; give one of 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host={shown(host)}: {reason(error)}; give an address of this machine") from None
    family, *_, address = found[0]
    return family, (str(address[0]), int(address[1]))


@contextlib.contextmanager
def _listening(address: tuple[socket.AddressFamily, tuple[str, int]], host: str) -> Iterator[socket.socket]:
    """Bound before anything else is started, so that a taken port costs nothing.

    Raises:
        InputError: it cannot be bound.
    """
    try:
        listener = socket.create_server(address[1], family=address[0], backlog=1024)
    except OSError as error:
        why = reason(error)
        raise InputError(f"cannot listen on {host}:{address[1][1]}: {why}; give another --port") from None
    with listener:
        yield listener


@contextlib.contextmanager
def _noting(signals: list[int], server: uvicorn.Server) -> Iterator[None]:
    """End the server on SIGTERM and SIGINT, also before and after uvicorn listens to them itself."""

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
