"""The listening socket: what it accepts answers at once, whoever has the socket."""

from __future__ import annotations

import asyncio
import pickle
import socket
from multiprocessing import reduction

import pytest

from rkd_deploy.serve.http.run import Server


async def nodelay(listening: socket.socket) -> int:
    """TCP_NODELAY of a connection that asyncio accepted from a socket, as uvicorn lets it."""
    loop = asyncio.get_running_loop()
    option: asyncio.Future[int] = loop.create_future()

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connection = transport.get_extra_info("socket")
            option.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async with await loop.create_server(Accepted, sock=listening):
        _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        try:
            return await asyncio.wait_for(option, 30)
        finally:
            writer.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accepted_connections_do_not_wait_for_more(tmp_path, host):
    """With Nagle's algorithm every answer on a kept connection came 40 ms late."""
    with Server(model=tmp_path, host=host, port=0)._bound() as listening:
        assert asyncio.run(nodelay(listening)) == 1


def test_a_worker_gets_a_socket_that_still_names_its_protocol(tmp_path, monkeypatch):
    """Several workers get it pickled, as multiprocessing pickles sockets to a process that it starts."""
    with Server(model=tmp_path, port=0)._bound() as listening:
        assert listening.get_inheritable()
        copy = pickle.loads(reduction.ForkingPickler.dumps(listening))
        with copy:
            assert copy.proto == socket.IPPROTO_TCP
            assert asyncio.run(nodelay(copy)) == 1


def test_a_socket_that_names_none_would_wait():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        assert asyncio.run(nodelay(listening)) == 0
