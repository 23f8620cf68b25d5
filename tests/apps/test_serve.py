"""The server as its users meet it: addresses, tokens, signals, workers that live and die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vidkv.apps import serve as serving
from vidkv.apps.serve import check_token, read_token, serve
from vidkv.errors import InputError, OutputError, ResourceError
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.supervisor import Supervisor, sole_supervisor
from vidkv.request import VideoRequest
from vidkv.segments import probe

TOKEN = "correct-horse-battery"
PROMPT = "a red circle bouncing"
WAIT_S = 60.0

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from vidkv.apps.serve import serve
if __name__ == "__main__":
    print("signal", serve(Path(sys.argv[1]), port=0, say=lambda url: print(url, flush=True)), flush=True)
"""


class TestAddress:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::ffff:127.0.0.1"])
    def test_others_need_a_token(self, tmp_path: Path, host: str) -> None:
        with pytest.raises(InputError, match="--token-file"):
            serve(tmp_path, host, 0)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("port", [-1, 65536])
    def test_no_port(self, tmp_path: Path, port: int) -> None:
        with pytest.raises(InputError, match=f"port={port}"):
            serve(tmp_path, port=port)

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "", "a b", "x" * 300])
    def test_no_address(self, tmp_path: Path, host: str) -> None:
        with pytest.raises(InputError, match="host="):
            serve(tmp_path, host, 0)

    def test_a_port_that_is_taken(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(InputError, match=f"{port}.*--port"):
                serve(tmp_path, port=port)

    def test_a_folder_that_another_renders_to(self, tmp_path: Path) -> None:
        with JobStore(tmp_path) as store, sole_supervisor(store):
            with pytest.raises(OutputError, match="another vidkv"):
                serve(tmp_path, port=0)


class TestToken:
    def test_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        assert read_token(tmp_path / "token") == TOKEN

    @pytest.mark.parametrize(
        "token", ["", "short", "with a space in it", "f\u00fcnfzehn-oder-mehr", "tab\tor-not-tab-x"]
    )
    def test_that_cannot_be_used(self, tmp_path: Path, token: str) -> None:
        (tmp_path / "token").write_text(token)
        for read in (lambda: read_token(tmp_path / "token"), lambda: check_token(token)):
            with pytest.raises(InputError, match="at least 16") as error:
                read()
            # it is a secret
            assert not token or token not in str(error.value)
        with pytest.raises(InputError, match="at least 16"):
            serve(tmp_path / "out", token=token, port=0)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="token file"):
            read_token(tmp_path / "nope")


class Server:
    """`serve` in a process of its own."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        (root.parent / "script.py").write_text(SCRIPT)
        repository = Path(serving.__file__).parents[2]
        environment["PYTHONPATH"] = str(repository)
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, str(root.parent / "script.py"), str(root)], text=True, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url + str(self.process.stderr)

    def stop(self, number: int) -> tuple[float, str, str]:
        """Seconds it took, and what it said."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(WAIT_S)
        took = time.monotonic() - begun
        # these end when the last process of the tree has closed its side
        out, err = self.process.communicate(timeout=WAIT_S)
        return took, out, err


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "renders")
    yield server
    if server.process.poll() is None:
        server.process.kill()
    server.process.communicate()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


class TestProcess:
    def test_it_makes_a_video_and_stops_in_the_middle_of_another(self, server: Server) -> None:
        with httpx.Client(base_url=server.url, timeout=WAIT_S, trust_env=False) as client:
            assert client.get("/health").json()["status"] == "ok"
            first = client.post("/v1/videos", json={"prompt": PROMPT, "seconds": 1}).json()["id"]
            with client.stream("GET", f"/v1/videos/{first}/events") as stream:
                assert [video["status"] for video in events(stream.iter_lines())][-1] == "completed"
            (server.root / "copy.mp4").write_bytes(client.get(f"/v1/videos/{first}/content").content)
            assert probe(server.root / "copy.mp4").frames == 16
            second = client.post("/v1/videos", json={"prompt": PROMPT, "seconds": 600}).json()["id"]
            with client.stream("GET", f"/v1/videos/{second}/events") as stream:
                seen = events(stream.iter_lines())
                assert next(video for video in seen if video["chunks_done"])["status"] == "in_progress"
                took, out, err = server.stop(signal.SIGTERM)
                # the stream ends rather than breaks
                assert all(video["status"] != "failed" for video in seen)
        assert took < 10 and out == f"signal {signal.SIGTERM.value}\n" and server.process.returncode == 0
        assert "Traceback" not in err
        with JobStore(server.root) as store:
            job = store.get(second)
            assert job.state is State.QUEUED and job.done >= 1
            assert not store.claims.held(store.folder(job).path)
            with sole_supervisor(store):
                pass

    def test_ctrl_c_before_anything_was_asked(self, server: Server) -> None:
        took, out, err = server.stop(signal.SIGINT)
        assert took < 10, err
        assert out == f"signal {signal.SIGINT.value}\n" and "Traceback" not in err, err


class Idle(Supervisor):
    """Without workers: what is tested is what becomes of the server."""

    error: Exception | None = None
    dies_at = 3

    def step(self) -> bool:
        time.sleep(0.01)
        self.dies_at -= 1
        if self.error is not None and self.dies_at < 0:
            raise self.error
        return True


class TestTogether:
    @pytest.mark.parametrize(
        "error", [ResourceError("worker0 has died 3 times"), RuntimeError("no such thing")]
    )
    def test_a_server_without_workers_says_so_and_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        monkeypatch.setattr(serving, "Supervisor", Idle)
        monkeypatch.setattr(Idle, "error", error)
        monkeypatch.setattr(serving, "LINGER_S", 1.0)
        answers: list[httpx.Response] = []
        asking: list[threading.Thread] = []

        def ask(url: str) -> None:
            while not answers or answers[-1].status_code == 200:
                answers.append(httpx.get(f"{url}/health", trust_env=False))
            request = {"prompt": PROMPT, "seconds": 1}
            answers.append(httpx.post(f"{url}/v1/videos", json=request, trust_env=False))

        def say(url: str) -> None:
            asking.append(threading.Thread(target=ask, args=(url,)))
            asking[0].start()

        with pytest.raises(ResourceError, match=str(error)):
            serve(tmp_path, port=0, say=say)
        asking[0].join()
        assert [answer.status_code for answer in answers[-2:]] == [503, 503]
        assert str(error) in answers[-2].json()["error"]["message"]
        with JobStore(tmp_path) as store:
            assert not store.jobs()

    def test_with_a_token_it_listens_for_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "Supervisor", Idle)
        found: list[tuple[int, int]] = []
        asking: list[threading.Thread] = []

        def ask(url: str) -> None:
            url = url.replace("0.0.0.0", "localhost")
            bearer = {"Authorization": f"Bearer {TOKEN}", "Host": "render.example"}
            with httpx.Client(base_url=url, trust_env=False) as client:
                found.append(
                    (
                        client.get("/v1/videos").status_code,
                        client.get("/v1/videos", headers=bearer).status_code,
                    )
                )
            os.kill(os.getpid(), signal.SIGTERM)

        def say(url: str) -> None:
            asking.append(threading.Thread(target=ask, args=(url,)))
            asking[0].start()

        # other tests of this process may have brought one with them, as Ray does
        before = signal.getsignal(signal.SIGTERM)
        assert serve(tmp_path, "0.0.0.0", 0, TOKEN, say=say) == signal.SIGTERM
        asking[0].join()
        assert found == [(401, 200)]
        assert signal.getsignal(signal.SIGTERM) is before

    def test_streams_and_slow_senders_do_not_hold_it_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "Supervisor", Idle)
        asking: list[threading.Thread] = []
        took: list[float] = []

        def ask(url: str) -> None:
            port = int(url.rpartition(":")[2])
            with JobStore(tmp_path) as store:
                store.submit(VideoRequest(prompt=PROMPT, seconds=1, id="a"))
            senders = []
            heads = ["GET /v1/videos/a/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"] * 20
            heads += [
                "POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                "Content-Length: 99\r\n\r\n{"
            ] * 5
            heads += ["GET /health HTTP"] * 5
            for head in heads:
                sender = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
                sender.sendall(head.encode())
                senders.append(sender)
            for sender in senders[:20]:
                assert sender.recv(1 << 16).startswith(b"HTTP/1.1 200")
            took.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            for sender in senders:
                while sender.recv(1 << 16):
                    pass
                sender.close()

        def say(url: str) -> None:
            asking.append(threading.Thread(target=ask, args=(url,)))
            asking[0].start()

        assert serve(tmp_path, port=0, say=say) == signal.SIGINT
        assert time.monotonic() - took[0] < 8
        asking[0].join()
