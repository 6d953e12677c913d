"""The service, started by the command that its users type, and the clients that ask it."""

import re
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psutil

from support.command import ROOT, environment

PASSWORD = "correct horse"


class Account(NamedTuple):
    """A registered user, and an access token of theirs."""

    id: str
    email: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


class OwnConnections(httpx.BaseTransport):
    """A connection for each thread: hundreds that share a pool would wait for each other."""

    def __init__(self) -> None:
        self.context = ssl.create_default_context()  # slow to make, and never used
        self.threads = threading.local()
        self.all: list[httpx.HTTPTransport] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not hasattr(self.threads, "own"):
            self.threads.own = httpx.HTTPTransport(verify=self.context)
            self.all.append(self.threads.own)
        response = self.threads.own.handle_request(request)
        if response.status_code == 500:  # after which uvicorn closes the connection
            response.read()
            self.threads.own.close()
            del self.threads.own
        return response

    def close(self) -> None:
        for transport in self.all:
            transport.close()


class Service:
    """The service on a port of the system's choice, before any number of clients.

    Its log is checked when the `with` block ends: no secret may be in it, and no traceback,
    unless `tracebacks` is set to True.
    """

    def __init__(
        self, database: str, *options: str, app: str = "main:app", **variables: str
    ) -> None:
        self.tracebacks = False
        self.folder = Path(tempfile.mkdtemp(prefix="auth-service-"))
        self.log_file = self.folder / "log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                ["uvicorn", app, "--port", "0", *options],
                cwd=ROOT,
                env=environment(database, **variables),
                stdout=log,
                stderr=log,
            )
        patience = time.monotonic() + 60
        try:
            while not (port := re.search(r"running on http://\S+:(\d+)", self.log)):
                if self.process.poll() is not None or time.monotonic() > patience:
                    raise RuntimeError(self.log)
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        self.port = int(port[1])
        self.url = f"http://127.0.0.1:{self.port}"
        connections = OwnConnections()
        self.http = httpx.Client(base_url=self.url, timeout=60, transport=connections)
        self.crowd = ThreadPoolExecutor(600)

    @property
    def log(self) -> str:
        """All that the service has printed so far."""
        return self.log_file.read_text()

    @property
    def spent(self) -> float:
        """The seconds of processor time that the service has taken so far."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def register(self, email: str, password: str = PASSWORD) -> httpx.Response:
        body = {"email": email, "password": password}
        return self.http.post("/auth/register", json=body)

    def login(self, email: str, password: str = PASSWORD) -> httpx.Response:
        body = {"email": email, "password": password}
        return self.http.post("/auth/login", json=body)

    def me(self, token: str) -> httpx.Response:
        return self.http.get("/auth/me", headers={"Authorization": f"Bearer {token}"})

    def account(self, email: str = "", password: str = PASSWORD) -> Account:
        """A new account, who is logged in."""
        email = email or f"{secrets.token_hex(6)}@example.com"
        user = self.register(email, password).raise_for_status().json()
        token = self.login(email, password).raise_for_status().json()["access_token"]
        return Account(user["id"], user["email"], token)

    def at_once(
        self, times: int, ask: Callable[..., httpx.Response], *words: Any
    ) -> list[Future[httpx.Response]]:
        """The answers to come of that many clients who all ask the same now."""
        return [self.crowd.submit(ask, *words) for _ in range(times)]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the service and return its exit status, negative for the signal it died of."""
        if hasattr(self, "http"):
            self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            if hasattr(self, "crowd"):
                self.crowd.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        log = self.log
        self.stop()
        if error[0] is None:  # else there is already something to say
            leaks = ["$2b$", PASSWORD, "eyJ"] + ["Traceback"] * (not self.tracebacks)
            for leak in leaks:
                assert leak not in log, log[-5000:]


def statuses(answers: list[Future[httpx.Response]]) -> Counter[int]:
    """How often each status came."""
    return Counter(answer.result().status_code for answer in answers)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition that must come true."""
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience, "waited in vain"
        time.sleep(0.02)
