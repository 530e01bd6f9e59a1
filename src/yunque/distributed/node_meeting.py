"""What the nodes of one Slurm step can tell of each other: whose clock is off, who sees the same folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 30.0
_PINGS = 10
_TIME = struct.Struct("!d")


@dataclass(frozen=True)
class Seen:
    """What a node saw of the first one: its clock's lead in seconds, and whether it reads the same ``output_dir``."""

    node: str
    lead_s: float
    shares_folder: bool


def first_node() -> str | None:
    """Address of the first node of this Slurm job; None when Slurm does not tell."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes or shutil.which("scontrol") is None:
        return None
    name = _scontrol("hostnames", nodes).split()[0]
    try:
        return socket.gethostbyname(name)
    except OSError:  # a name that only Slurm knows
        words = dict(word.split("=", 1) for word in _scontrol("node", name).split() if "=" in word)
        return words.get("NodeAddr")


def _scontrol(*what: str) -> str:
    return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, timeout=30, check=True).stdout


def meet(address: str, port: int, rank: int, ranks: int, folder: Path, node: str) -> list[Seen]:
    """Compare this node with the first one: on the first, what every other node saw; on those, what they saw.

    The first node listens at ``address`` and ``port``; each other one asks for its time and takes the answer with the
    shortest way, from whose middle its own clock is apart by the lead (Cristian 1989).

    Raises:
        OSError: the nodes do not reach each other.
    """
    if rank == 0:
        return _listen(address, port, ranks, folder)
    return [_ask(address, port, node, folder)]


def _listen(address: str, port: int, ranks: int, folder: Path) -> list[Seen]:
    token = secrets.token_hex(8)
    mark = folder / f".yunque-doctor-{token}"
    mark.write_text(token)
    seen: list[Seen] = []
    try:
        with socket.create_server((address, port)) as server:
            server.settimeout(_TIMEOUT_S)
            for _ in range(ranks - 1):
                try:
                    connection, _ = server.accept()
                except TimeoutError as error:
                    missing = ranks - 1 - len(seen)
                    raise TimeoutError(f"{missing} of {ranks} nodes did not come within {_TIMEOUT_S:.0f} s") from error
                with connection, connection.makefile("rw") as lines:
                    connection.settimeout(_TIMEOUT_S)
                    lines.write(f"{token}\n")
                    lines.flush()
                    for _ in range(_PINGS):
                        lines.readline()
                        connection.sendall(_TIME.pack(time.time()))
                    seen.append(Seen(**json.loads(lines.readline())))
    finally:
        mark.unlink(missing_ok=True)
    return seen


def _ask(address: str, port: int, node: str, folder: Path) -> Seen:
    connection = _connect(address, port)
    with connection, connection.makefile("rw") as lines:
        token = _line(connection)
        mark = folder / f".yunque-doctor-{token}"
        shares = mark.exists() and mark.read_text() == token
        ways = []
        for _ in range(_PINGS):
            start = time.time()
            connection.sendall(b"\n")
            (there,) = _TIME.unpack(_exactly(connection, _TIME.size))
            end = time.time()
            ways.append((end - start, (start + end) / 2 - there))
        seen = Seen(node, min(ways)[1], shares)
        lines.write(json.dumps(seen.__dict__) + "\n")
    return seen


def _connect(address: str, port: int) -> socket.socket:
    end = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((address, port), timeout=_TIMEOUT_S)
        except OSError:  # the first node is not there yet
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("the first node closed the connection")
        received += part
    return received


def _line(connection: socket.socket) -> str:
    received = b""
    while not received.endswith(b"\n"):
        received += _exactly(connection, 1)
    return received.decode().strip()
