"""A stand-in for Neon's front door on 127.0.0.1, with a real PostgreSQL and PgBouncer behind it.

It follows the published proxy: TLS, the endpoint by the server name, SCRAM bound to the channel,
which startup parameters pass, the order of the checks, and the words and the form of its errors.
The control plane is not there: a test sets what it says (`refusal`), and how long a compute takes
to wake. Left out: an endpoint in the password, and cancelling a query.
"""

import asyncio
import hashlib
import hmac
import os
import shutil
import ssl
import tempfile
import threading
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from support.pgbouncer import PgBouncer
from support.postgres import Postgres, make_certificate, system_postgres

DOMAIN = "eu-central-1.aws.neon.tech"
CANCEL_REQUEST, TLS_REQUEST, VERSION_3 = 80877102, 80877103, 196608
PASSED_ON = ("user", "database", "application_name", "replication")
INSECURE = "connection is insecure (try using `sslmode=require`)"
NO_ENDPOINT = (
    "Endpoint ID is not specified. Either please upgrade the postgres client library"
    " (libpq) for SNI support or pass the endpoint ID (first part of the domain name)"
    " as a parameter: '?options=endpoint%3D<endpoint-id>'."
    " See more at https://neon.tech/sni"
)
UNPOOLED = (
    ". Please use unpooled connection or remove this parameter from the startup"
    " package. More details: https://neon.tech/docs/connect/connection-errors"
    "#unsupported-startup-parameter"
)


class Compute(Postgres):
    """The PostgreSQL behind the front door, which has checked the password by then."""

    def __init__(self) -> None:
        super().__init__(system_postgres(), max_connections=104)  # the smallest's

    def _create(self) -> None:
        super()._create()
        (self.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 trust\n")


class Pooler(PgBouncer):
    """PgBouncer set up as Neon's, except for what Debian's does not know."""

    def __init__(self, compute: Compute) -> None:
        super().__init__(
            compute,
            pool=64,
            max_client_conn=10_000,
            auth_type="trust",  # the front door has checked the password
            client_tls_sslmode="disable",  # TLS ends at the front door
            server_tls_sslmode="disable",
            ignore_startup_parameters="extra_float_digits",
            query_wait_timeout=120,
        )


class Refused(Exception):
    """An error in the front door's words: the client reads it, and the connection ends."""


@dataclass(eq=False)
class Link:
    """One end of a connection, in messages of PostgreSQL's protocol."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def receive(self, kind_bytes: int = 1) -> tuple[bytes, bytes]:
        """The kind and the body of a message; a client's first ones have no kind."""
        kind = await self.reader.readexactly(kind_bytes)
        length = int.from_bytes(await self.reader.readexactly(4), "big")
        return kind, await self.reader.readexactly(length - 4)

    def send(self, kind: bytes, *body: bytes) -> None:
        self.writer.write(framed(kind, *body))

    async def carry_to(self, other: Self) -> None:
        """Pass on what comes in until it ends, then close the other end too."""
        with suppress(OSError):
            while chunk := await self.reader.read(65536):
                other.writer.write(chunk)
                await other.writer.drain()
        other.writer.close()


def framed(kind: bytes, *body: bytes) -> bytes:
    whole = b"".join(body)
    return kind + number(len(whole) + 4) + whole


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def signed(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


@dataclass
class Endpoint:
    """What lies behind a name, and what those meet who ask for it."""

    name: str
    password: str
    compute_port: int
    pooler_port: int
    refusal: str = ""  # what the front door or the control plane says instead
    refuses_first: bool = False  # before the password is asked for
    wakes_in: float = 0  # seconds, counted from the first connection
    awake_at: float = 0
    inside: set[Link] = field(default_factory=set)

    async def wake(self) -> None:
        """Wait until it is awake. It goes on waking when a client gives up."""
        if self.wakes_in:
            self.awake_at, self.wakes_in = time.monotonic() + self.wakes_in, 0
        while time.monotonic() < self.awake_at:
            await asyncio.sleep(0.02)


class Neon:
    """The front door: TLS, the endpoint by the name of the host, the password, the way in."""

    def __init__(self, compute: Compute, pooler: Pooler) -> None:
        self.compute, self.pooler = compute, pooler
        self.endpoints: dict[str, Endpoint] = {}
        self.home = Path(tempfile.mkdtemp(prefix="auth-neon-"))
        self.files = make_certificate(self.home, {})
        certificate = ssl.PEM_cert_to_DER_cert(self.files[0].read_text())
        self.binding = hashlib.sha256(certificate).digest()  # RFC 5929
        started = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=[self._run(started)])
        self.thread.start()
        started.wait()

    def add(self, name: str) -> Endpoint:
        """A new endpoint, with the same compute as every other."""
        ports = self.compute.port, self.pooler.port
        self.endpoints[name] = Endpoint(name, self.compute.password, *ports)
        return self.endpoints[name]

    def url(self, label: str, database: str = "postgres", **options: str) -> str:
        """The URL as Neon prints it, with the address besides, since no DNS knows the host."""
        options = {"sslmode": "require", "channel_binding": "require"} | options
        query = "".join(f"&{name}={value}" for name, value in options.items())
        user = f"postgres:{self.compute.password}"
        host = f"{label}.{DOMAIN}:{self.port}"
        return f"postgresql://{user}@{host}/{database}?hostaddr=127.0.0.1{query}"

    def suspend(self, endpoint: Endpoint, wakes_in: float = 0) -> None:
        """Close all its connections. The next client wakes it, in that many seconds."""

        async def close() -> None:
            endpoint.wakes_in, endpoint.awake_at = wakes_in, 0
            for client in endpoint.inside:
                client.writer.transport.abort()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result()

    async def _run(self, started: threading.Event) -> None:
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self.over.wait()
        server.close()

    async def _meet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        client = Link(reader, writer)
        try:
            await self._let_in(client)
        except Refused as error:  # never FATAL, and one SQLSTATE for all
            fields = "SERROR", "VERROR", "CXX000", f"M{error}", "\0"
            client.send(b"E", "\0".join(fields).encode())
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has left, or the door is being closed
        finally:
            writer.close()

    async def _let_in(self, client: Link) -> None:
        names: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.files)
        context.sni_callback = lambda _socket, name, _context: names.append(name)
        _, hello = await client.receive(0)
        if hello != number(TLS_REQUEST):
            raise Refused(INSECURE)
        client.writer.write(b"S")
        await client.writer.start_tls(context)
        _, hello = await client.receive(0)
        if hello.startswith(number(CANCEL_REQUEST)):
            return
        words = hello[4:].decode().split("\0")
        wanted = dict(zip(words[::2], words[1::2], strict=False))
        options = wanted.pop("options", "")
        label, pooled = self._find_label(names[0], options)
        if not label:
            client.send(b"R", number(3))  # AuthenticationCleartextPassword
            await client.receive()
            raise Refused(NO_ENDPOINT)
        endpoint = self.endpoints[label]
        if endpoint.refusal and endpoint.refuses_first:
            raise Refused(endpoint.refusal)
        await self._check_password(client, wanted["user"], endpoint.password)
        await endpoint.wake()
        if endpoint.refusal:
            raise Refused(endpoint.refusal)
        if options and not options.startswith("endpoint="):
            wanted["options"] = options
        server = await self._log_in(endpoint, pooled, wanted, client)
        endpoint.inside.add(client)
        await asyncio.gather(client.carry_to(server), server.carry_to(client))
        endpoint.inside.remove(client)

    def _find_label(self, host: str | None, options: str) -> tuple[str, bool]:
        """The endpoint by the server name or by the option, and whether by its pooler."""
        label = (host or "").partition(".")[0]
        option = options.removeprefix("endpoint=") if "endpoint=" in options else ""
        if label and option and label != option:
            text = "Inconsistent project name inferred from SNI ('{}') and project option ('{}')."
            raise Refused(text.format(label, option))
        label = label or option
        return label.removesuffix("-pooler"), label.endswith("-pooler")

    async def _check_password(self, client: Link, user: str, password: str) -> None:
        """SCRAM (RFC 5802, RFC 7677), bound to the channel if the client wishes."""
        client.send(b"R", number(10), b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
        _, opening = await client.receive()
        flag, _, bare = opening.partition(b"\0")[2][4:].split(b",", 2)
        bound = flag.startswith(b"p=")
        salt = os.urandom(16)
        nonce = bare.partition(b",r=")[2] + b64encode(os.urandom(18))
        challenge = b"r=%b,s=%b,i=4096" % (nonce, b64encode(salt))
        client.send(b"R", number(11), challenge)
        _, answer = await client.receive()
        unproven, _, proof = answer.rpartition(b",p=")
        channel = b64encode(flag + b",," + (self.binding if bound else b""))
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 4096)
        said = b",".join([bare, challenge, unproven])
        key = signed(salted, b"Client Key")
        mask = signed(hashlib.sha256(key).digest(), said)
        right = b64encode(bytes(a ^ b for a, b in zip(key, mask, strict=True)))
        if (unproven, proof) != (b"c=%b,r=%b" % (channel, nonce), right):
            raise Refused(f"password authentication failed for user '{user}'")
        signature = signed(signed(salted, b"Server Key"), said)
        client.send(b"R", number(12), b"v=", b64encode(signature))

    async def _log_in(
        self, endpoint: Endpoint, pooled: bool, wanted: dict[str, str], client: Link
    ) -> Link:
        """The connection to the server behind, once it has said that it is ready."""
        passed = {name: wanted[name] for name in wanted if name in PASSED_ON}
        passed["client_encoding"] = "UTF8"
        if "options" in wanted:
            passed["options"] = wanted["options"]
        words = "".join(f"{name}\0{value}\0" for name, value in passed.items())
        port = endpoint.pooler_port if pooled else endpoint.compute_port
        for _ in range(15):  # for three seconds
            with suppress(OSError, asyncio.IncompleteReadError):
                server = Link(*await asyncio.open_connection("127.0.0.1", port))
                server.send(b"", number(VERSION_3), words.encode(), b"\0")
                welcome = b""
                while True:
                    kind, body = await server.receive()
                    if kind == b"E":
                        server.writer.close()
                        text = body.partition(b"\0M")[2].partition(b"\0")[0].decode()
                        advice = text.startswith("unsupported startup") * UNPOOLED
                        raise Refused(text + advice)
                    welcome += framed(kind, body)
                    if kind == b"Z":
                        client.writer.write(welcome)
                        return server
            await asyncio.sleep(0.2)
        raise Refused("Couldn't connect to compute node")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join()
        shutil.rmtree(self.home, ignore_errors=True)
