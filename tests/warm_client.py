"""What stands for ``python`` in a command: asks a server of warm.py to run it, and lives and dies as it does.

Only light parts of the standard library: this starts with every process.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

SERVERS = 2
START_LIMIT_S = 120
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(folder, python, server):
    """Run the command of ``sys.argv`` on a server; on none where none can serve it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    number = int(os.environ.get("RANK", os.getpid())) % SERVERS
    connection = connect(folder, number, python, server)
    pid = ask(connection)
    if not pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execv(python, [python, *sys.argv[1:]])
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: forward(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    answer = connection.recv(16)
    code = os.waitstatus_to_exitcode(int(answer)) if answer else 1
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def forward(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def connect(folder, number, python, server):
    """A connection to the server of that number, which is started where nobody has."""
    path = os.path.join(folder, str(number))
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{path}.pid"):
            with open(os.path.join(folder, "environment.json")) as file:
                environment = json.load(file)
            with open(f"{path}.log", "w") as log:
                process = subprocess.Popen(
                    [python, server, folder, str(number)], env=environment, cwd=folder, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=unblock,
                )  # fmt: skip
            with open(f"{path}.pid", "w") as file:
                file.write(str(process.pid))
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except FileNotFoundError:  # it is still importing
            time.sleep(0.05)
        if not alive(f"{path}.pid"):
            break
    with open(f"{path}.log") as log:
        sys.exit(f"no server of warm.py:\n{log.read()}")


def alive(path):
    """Whether a server lives, which is a child of one of these programs: not a zombie of it either."""
    with open(path) as file, contextlib.suppress(FileNotFoundError), open(f"/proc/{file.read()}/stat") as state:
        return state.read().rpartition(")")[2].split()[0] != "Z"
    return False


def unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def ask(connection):
    """Process id of the fork that runs the command; 0 where it would find another environment than its imports did."""
    request = json.dumps({"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    return int(connection.recv(16))
