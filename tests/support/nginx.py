"""Debian's nginx with the block of the pages, the real program on ports of its own."""

import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import httpx

from support.command import ROOT, free_port, missing, unprivileged
from support.postgres import make_certificate

NAME = "auth.example.com"
PATIENCE = 30  # seconds for what takes two

TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # of a certificate made just now
TRUSTING.check_hostname = False
TRUSTING.verify_mode = ssl.CERT_NONE


def block() -> str:
    """What a reader of docs/run.md saves as auth.conf."""
    page = (ROOT / "docs" / "run.md").read_text()
    return re.search(
        r"^```nginx auth\.conf\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )[1]


class Nginx:
    """Debian's nginx with the block of the README, in a folder of its own, gone after `stop`."""

    def __init__(self, upstream: int) -> None:
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None or shutil.which("openssl") is None:
            missing("nginx (Debian: apt-get install nginx-light openssl)")
        self.home = Path(tempfile.mkdtemp(prefix="auth-nginx-"))
        user = unprivileged()
        if user:
            os.chown(self.home, user["user"], user["group"])
        certificate, key = make_certificate(self.home, user)
        self.port, self.http_port = free_port(), free_port()
        live = f"/etc/letsencrypt/live/{NAME}"
        text = block()
        for said, here in {
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "listen 80;": f"listen 127.0.0.1:{self.http_port};",
            f"{live}/fullchain.pem": certificate,
            f"{live}/privkey.pem": key,
            "http://127.0.0.1:8000;": f"http://127.0.0.1:{upstream};",
            # So that a test can wait for it, and reach it at any speed of the machine.
            "client_header_timeout 10s;": "client_header_timeout 2s;",
            "client_body_timeout 10s;": "client_body_timeout 2s;",
            "rate=50r/s;": "rate=1r/s;",
        }.items():
            assert text.count(said) == 1, said
            text = text.replace(said, str(here))
        (self.home / "auth.conf").write_text(text)
        # Debian's default folders are not for whoever runs the tests.
        folders = "".join(
            f"{kind}_temp_path {self.home / kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = self.home / "nginx.conf"
        configuration.write_text(
            f"daemon off; worker_processes 2; pid {self.home / 'pid'};\n"
            f"events {{}}\nhttp {{ access_log off;\n{folders}include auth.conf; }}\n"
        )
        errors = self.home / "errors"
        self.process = subprocess.Popen(
            [program, "-c", configuration, "-p", self.home, "-e", errors],
            cwd=self.home,
            stderr=subprocess.DEVNULL,  # it repeats what it writes into the file
            **user,
        )
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > patience:
                    log = errors.read_text() if errors.exists() else "no log"
                    self.stop()
                    raise RuntimeError(log) from error
                time.sleep(0.02)

    def client(self, address: str) -> httpx.Client:
        """A client with that address, as nginx sees it."""
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            headers={"Host": NAME},
            timeout=PATIENCE,
            transport=httpx.HTTPTransport(verify=TRUSTING, local_address=address),
        )

    def connection(self, address: str) -> ssl.SSLSocket:
        """A connection from that address, for bytes that no client library would send."""
        return TRUSTING.wrap_socket(
            socket.create_connection(
                ("127.0.0.1", self.port), PATIENCE, source_address=(address, 0)
            )
        )

    def stop(self) -> None:
        """End nginx and remove all that it left on disk."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
