"""Messages between the judge and the worker, over a socket: a header in JSON, and raw buffers."""

import json
import math
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

MESSAGE_BYTES = 256 * 2**20
HEADER_BYTES = 32 * 2**20  # JSON takes some ten times its length once it is read
_LENGTHS = struct.Struct(">QQ")


class ExchangeError(ValueError):
    """A message that cannot be sent, or one that came and is not to be believed."""


class Channel:
    """One end of the socket. Every wait ends at `deadline`, a time of `time.monotonic`."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.deadline = math.inf

    def send(self, header: dict[str, Any], buffers: Sequence[memoryview]) -> None:
        """Send one message.

        Raises ExchangeError where it is too large, before anything of it is sent; TimeoutError at
        the deadline; OSError where nobody is at the other end.
        """
        sizes = [buffer.nbytes for buffer in buffers]
        try:
            text = json.dumps({**header, "sizes": sizes}).encode()
        except (ValueError, RecursionError) as error:
            raise ExchangeError(f"This cannot be handed over: {error}.") from None
        if len(text) > HEADER_BYTES or sum(sizes) > MESSAGE_BYTES:
            raise ExchangeError(
                f"This is too large to be handed over: {len(text) + sum(sizes):,} bytes, where "
                f"{HEADER_BYTES:,} of text and numbers and {MESSAGE_BYTES:,} of tensors may be."
            )
        parts: list[bytes | memoryview] = [_LENGTHS.pack(len(text), sum(sizes)), text, *buffers]
        for part in parts:
            self._socket.settimeout(self._left())
            self._socket.sendall(part)

    def receive(self) -> tuple[dict[str, Any], list[memoryview]]:
        """The header and the buffers of the next message.

        Raises ExchangeError where it is malformed, TimeoutError at the deadline, EOFError or
        OSError where the other end is closed.
        """
        length, total = _LENGTHS.unpack(self._read(_LENGTHS.size))
        if length > HEADER_BYTES or total > MESSAGE_BYTES:
            raise ExchangeError(f"A message of {length + total:,} bytes is too large.")
        try:
            header = json.loads(bytes(self._read(length)))
        except (ValueError, RecursionError):
            raise ExchangeError("A message is no JSON, or is nested too deeply.") from None
        sizes = header.pop("sizes", None) if isinstance(header, dict) else None
        if (
            not isinstance(sizes, list)
            or not all(type(size) is int and size >= 0 for size in sizes)
            or sum(sizes) != total
        ):
            raise ExchangeError("A message's buffers are not those that its header announces.")
        return header, [self._read(size) for size in sizes]

    def close(self) -> None:
        """Close this end; whoever waits at the other one learns of it."""
        self._socket.close()

    def _read(self, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        done = 0
        while done < size:
            self._socket.settimeout(self._left())
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise EOFError("The other end is closed.")
            done += count
        return view

    def _left(self) -> float | None:
        if self.deadline == math.inf:
            return None
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
