"""Says what one request may cost the server, and how many there may be at once."""

from __future__ import annotations

from dataclasses import dataclass

from rkd_deploy.fields import check_fields, option

MEGABYTE = 1_000_000


def _megabytes(megabytes: float) -> int:
    return int(megabytes * MEGABYTE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused, so that neither memory nor time of the server is a client's to take.

    Attributes:
        body: Largest body of a request, bytes; a larger one is answered 413, before it is read where it names its size.
        pixels: Largest image, width times height, by its header: it is never decoded.
        batch: Most images of one request.
        requests: Requests at once, in one worker, from the first byte of the body on; more are answered 503 with
            Retry-After. With `body` they bound the memory.
        seconds: Time for a whole request, its upload included; a client that stalls is answered 408.

    Raises:
        UsageError: A number out of its range.
    """

    body: int = option(
        "--max-body", "Largest request, MB.", default=16 * MEGABYTE, reads=float, parse=_megabytes, low=1000, high=2**31
    )
    pixels: int = option("--max-pixels", "Largest image, width x height.", default=64_000_000, low=1, high=2**31)
    batch: int = option("--max-batch", "Most images of a request.", default=64, low=1, high=65_536)
    requests: int = option(
        "--max-requests", "Requests at once, in each worker; more get 503.", default=64, low=1, high=65_536
    )
    seconds: float = option("--timeout", "Seconds for a request, upload included.", default=30.0, low=0.1, high=3600)

    def __post_init__(self) -> None:
        check_fields(self)
