"""Chromium, headless, over its DevTools protocol: by a pipe, so that neither a port nor a WebSocket library is needed.

https://chromedevtools.github.io/devtools-protocol/: with --remote-debugging-pipe the browser reads commands from file
descriptor 3 and answers on 4, JSON texts that end in a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 60
PHONE, DESK = (390, 844), (1280, 900)


class Browser:
    """One browser process; `close` ends it."""

    def __init__(self, program: str, folder: Path) -> None:
        self._number, self._read, self.events = 0, b"", list[dict[str, Any]]()
        ours, theirs = _pipe(), _pipe()  # commands: theirs reads what ours writes; answers the other way
        arguments = [
            program,
            "--headless",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",  # containers have 64 MB there
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--use-fake-device-for-media-stream",  # a camera that shows a moving picture,
            "--use-fake-ui-for-media-stream",  # and may be used without a question
            f"--user-data-dir={folder / 'profile'}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium refuses root otherwise
        ]
        output = str(folder / "browser.log")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._process = os.posix_spawn(
            program,
            arguments,
            {**os.environ, "HOME": str(folder)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, ours[0], 3),
                (os.POSIX_SPAWN_DUP2, theirs[1], 4),
                (os.POSIX_SPAWN_OPEN, 1, output, flags, 0o600),
                (os.POSIX_SPAWN_OPEN, 2, output, flags, 0o600),
            ],
            setpgroup=0,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from, self._log = ours[1], theirs[0], Path(output)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        _write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path | str, size: tuple[int, int], *, dark: bool) -> None:
        """Show a file or an address at a size in CSS pixels, as a reader would who prefers dark or light."""
        width, height = size
        phone = size == PHONE
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[wish])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page (the debugger may, where the page itself may not)."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """The value of a JavaScript expression, once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            page = self.evaluate("document.body.innerText")
            assert time.monotonic() < end, f"{expression} has not become true in {seconds} s; the page says: {page}"
            time.sleep(0.05)
        return value

    def choose_file(self, selector: str, file: Path) -> None:
        """Give a file to an input of the page, as its dialogue does."""
        element = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=element["result"]["objectId"])

    def complaints(self) -> list[str]:
        """What the console shows since the page was opened: errors, warnings, and anything a script would print."""
        self.evaluate("new Promise(done => setTimeout(done, 50))")  # what is on its way arrives
        named = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in named]

    def requests(self) -> list[str]:
        """Everything that was asked for since then."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path) -> None:
        """The whole page, not just what the window shows."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.close(self._to)  # the browser ends with its pipe
        end = time.monotonic() + 10
        while time.monotonic() < end and os.waitpid(self._process, os.WNOHANG) == (0, 0):
            time.sleep(0.05)
        if time.monotonic() >= end:
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._from)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            assert ready, f"The browser has said nothing for {PATIENCE_S} s:\n{self._log.read_text()[-2000:]}"
            found = os.read(self._from, 1 << 16)
            assert found, f"The browser has ended:\n{self._log.read_text()[-2000:]}"
            self._read += found
        first, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not 3 or 4 themselves, which the browser's will be."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
