"""Clients that stall or leave, servers that are full, stopped or killed: no wrong answer, nothing accepted lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import psutil
import pytest
from real_servers import PATIENCE_S, served

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
PLACES = 2


@pytest.fixture(scope="module")
def strict(photo_bundle, tmp_path_factory):
    """A server with little patience and few places."""
    limits = ("--timeout", 1, "--max-requests", PLACES)
    with served(photo_bundle, tmp_path_factory.mktemp("strict"), *limits) as running:
        yield running


def begun(server, photo, share=0.5):
    """A connection that has sent a part of a request."""
    connection = socket.create_connection(server.place, timeout=PATIENCE_S)
    connection.sendall(HEAD % len(photo) + photo[: int(share * len(photo))])
    return connection


def read(connection):
    """The rest of what the server sends until it closes the connection."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content


def until(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_client_that_stalls_is_answered_and_its_connection_closed(strict, photo):
    with begun(strict, photo) as connection:
        answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"was not here after 1 s" in answer


def test_a_full_server_says_when_to_come_back_and_places_become_free(strict, photo, expected):
    stalled = [begun(strict, photo) for _ in range(PLACES)]
    until(lambda: strict.ask("/v1/classify", photo).status == 503)
    stalled += [begun(strict, photo) for _ in range(PLACES)]  # whichever has run out by now
    full = strict.ask("/v1/classify", photo)
    assert full.status in (200, 503)
    if full.status == 503:
        assert full.headers["retry-after"] == "1"
        assert "places for requests are taken" in full.json["error"]
    assert strict.ask("/v2/health/ready").status == 200  # what needs no place is answered all the same
    for connection in stalled:  # who leaves gives the place back
        connection.close()
    until(lambda: strict.ask("/v1/classify", photo).status == 200)
    assert strict.ask("/v1/classify", photo).json["predictions"][0]["label"] == expected["label"]


def test_clients_that_leave_before_their_answer_harm_nobody(strict, photo, expected):
    for share in (0.5, 1.0) * 5:
        begun(strict, photo, share).close()
    until(lambda: strict.ask("/v1/classify", photo).status == 200)
    assert strict.ask("/v1/classify", photo).json["predictions"][0]["label"] == expected["label"]
    assert "Traceback" not in strict.log.read_text()


def test_what_is_no_http_is_refused(strict):
    with socket.create_connection(strict.place, timeout=PATIENCE_S) as connection:
        connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
        assert read(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_with_every_accepted_request_answered(photo_bundle, photo, expected, tmp_path, workers):
    """Requests whose second half comes after the signal; and a crowd that asks until the door is closed."""
    statuses, lost = [], []
    with served(photo_bundle, tmp_path, "--workers", workers) as server:

        def ask_on():
            while True:
                connection = socket.create_connection(server.place, timeout=PATIENCE_S)
                try:
                    connection.sendall(HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close") % len(photo) + photo)
                    answer = read(connection)
                except OSError:
                    answer = b""
                finally:
                    connection.close()
                statuses.append(answer[:12])
                if answer and (b'"label": "%s"' % expected["label"].encode()) not in answer:
                    lost.append(answer)
                if not answer:
                    return

        def crowd():
            try:
                ask_on()
            except ConnectionRefusedError:
                return

        clients = [threading.Thread(target=crowd) for _ in range(4)]
        for client in clients:
            client.start()
        halves = [begun(server, photo) for _ in range(3)]
        until(lambda: len(statuses) > 20)
        time.sleep(0.5)  # the halves are with the server
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        for half in halves:
            half.sendall(photo[len(photo) // 2 :])
            answer = read(half)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b'"label": "%s"' % expected["label"].encode() in answer
            half.close()
        assert server.process.wait(PATIENCE_S) == 0
        for client in clients:
            client.join(PATIENCE_S)
    assert not lost
    assert set(statuses) <= {b"HTTP/1.1 200", b""}  # answered whole, or never taken in


def test_a_killed_worker_is_replaced_and_metrics_keep_its_counts(photo_bundle, photo, expected, tmp_path):
    with served(photo_bundle, tmp_path, "--workers", 2) as server:
        for _ in range(5):
            server.ask("/v1/classify", photo)
        parent = psutil.Process(server.process.pid)

        def workers():
            alive = (child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE)
            return {child.pid for child in alive if any("spawn_main" in word for word in child.cmdline())}

        before = workers()
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        answers = []
        until(lambda: len(workers() - before) == 1 or answers.append(server.ask("/v1/classify", photo)))
        answers += [server.ask("/v1/classify", photo) for _ in range(5)]
        assert {answer.json["predictions"][0]["label"] for answer in answers} == {expected["label"]}
        lines = server.ask("/metrics").body.decode().splitlines()
        assert f'rkd_requests_total{{endpoint="classify",code="200"}} {5 + len(answers)}' in lines


def test_what_cannot_be_served_is_said_before_anything_listens(rkd, photo_bundle, server, tmp_path):
    assert "No model to load" in rkd("serve", tmp_path / "nothing").err
    port = server.place[1]
    taken = rkd("serve", photo_bundle, "--port", port)
    assert taken.code == 1
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use. Give another --port" in taken.err
    for words, flag, value in (
        ("--max-requests 0 must be a whole number between 1", "--max-requests", 0),
        ("--max-body: body = 1 must be", "--max-body", 0.000001),
        ("--workers 0 must be", "--workers", 0),
        ("--port 65536 must be", "--port", 65536),
    ):
        refused = rkd("serve", photo_bundle, flag, value)
        assert refused.code == 2
        assert words in refused.err
