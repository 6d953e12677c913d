"""A TCP relay that stands in for the network between the service and its PostgreSQL.

It passes every byte on as it is, so what it counts is what was sent. What it does besides, a real
network does too: it goes silent with its connections open, loses them, or is slow.
"""

import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import httpx

from support.postgres import change_url


@dataclass
class Talk:
    """One connection through the wire: both its ends, and what the client said last."""

    client: socket.socket
    server: socket.socket
    unread: bytearray = field(default_factory=bytearray)
    introduced: bool = False  # the first message has no type
    client_spoke_last: bool = False


class Wire:
    """A TCP relay to a PostgreSQL that counts round trips, falls silent, or is cut.

    One thread carries everything, so a count is exact once the client has its answer.
    """

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.round_trips = 0
        self.statements: list[str] = []
        self.opened = 0
        self.goodbyes = 0
        self.talks: list[Talk] = []
        self.speaking = threading.Event()  # cleared: a network that drops everything
        self.speaking.set()
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.done = False
        self.thread = threading.Thread(target=self._carry, daemon=True)
        self.thread.start()

    def url(self, database: str) -> str:
        """The database's URL by way of this wire, in clear text so that it can be read."""
        port = self.listener.getsockname()[1]
        return change_url(database, port=port, sslmode="disable", gssencmode="disable")

    def heard(self, ask: Callable[..., httpx.Response], *words: str) -> list[str]:
        """The first words of a request's statements, each of which took one round trip."""
        trips, said = self.round_trips, len(self.statements)
        assert ask(*words).is_success
        statements = [sql.split(" ")[0] for sql in self.statements[said:]]
        assert self.round_trips - trips == len(statements)
        return statements

    def cut(self) -> None:
        """Close every connection, without the goodbye that a server would say."""
        for talk in list(self.talks):
            for end in (talk.client, talk.server):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it went by itself

    def _carry(self) -> None:
        while not self.done:
            for key, _ in self.selector.select(timeout=0.1):
                self.speaking.wait()
                if key.fileobj is self.listener:
                    self._open()
                elif key.data in self.talks:
                    self._pass_on(key.data, key.fileobj)

    def _open(self) -> None:
        client, _ = self.listener.accept()
        self.opened += 1
        try:
            server = socket.create_connection(("127.0.0.1", self.server_port))
        except OSError:
            client.close()
            return
        talk = Talk(client, server)
        self.talks.append(talk)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(end, selectors.EVENT_READ, talk)

    def _pass_on(self, talk: Talk, end: socket.socket) -> None:
        try:
            chunk = end.recv(65536)
            if chunk and end is talk.client:
                self.round_trips += not talk.client_spoke_last
                self._read(talk, chunk)
                talk.server.sendall(chunk)
            elif chunk:
                talk.client.sendall(chunk)
            talk.client_spoke_last = end is talk.client
        except OSError:
            chunk = b""
        if not chunk:
            self.talks.remove(talk)
            for closing in (talk.client, talk.server):
                self.selector.unregister(closing)
                closing.close()

    def _read(self, talk: Talk, chunk: bytes) -> None:
        """Note the statements: simple Query, extended Parse; Terminate is the goodbye."""
        talk.unread += chunk
        while len(talk.unread) >= 5:
            start = 1 if talk.introduced else 0
            end = start + int.from_bytes(talk.unread[start : start + 4], "big")
            if len(talk.unread) < end:
                return
            kind, body = talk.unread[:start], talk.unread[start + 4 : end]
            del talk.unread[:end]
            talk.introduced = True
            if kind == b"Q":
                self.statements.append(body.split(b"\0")[0].decode())
            elif kind == b"P":
                self.statements.append(body.split(b"\0")[1].decode())
            elif kind == b"X":
                self.goodbyes += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.speaking.set()
        self.thread.join()
        for talk in self.talks:
            talk.client.close()
            talk.server.close()
        self.listener.close()
        self.selector.close()
