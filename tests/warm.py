"""A Python that starts at once: processes of their own, forked from servers that have imported torch and others.

``python()`` names a program that takes the interpreter's place in a command: ``[warm.python(), "-m", "mod", ...]``. It
hands its arguments, environment, folder and standard files to a server, whose fork runs the command to a normal end.
Signals, exit codes and deaths reach the other side. ``sys.executable`` in it is that program: a launcher's ranks
start the same way. Where imports would read another environment than the server's, a cold Python starts.

Ranks take servers in turn, so that their hash seeds differ as those of interpreters do. Nothing of yunque is imported
before a fork. What hides is a third-party module that a script uses without importing it: so every script also starts
cold in some test, and so do whole launches.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of every process that tests start."""

ON_CPU = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
"""Of one that no launch profile and no rehearsal tells so."""

FOLDER = "YUNQUE_TESTS_WARM"
"""Variable with the servers' folder, which all pytest processes of a session share."""

FROZEN = ("HF_", "HOME", "KMP_", "LD_", "MKL_", "OMP_", "PYTHON", "TOKENIZERS_", "TRANSFORMERS_", "XDG_")
"""Prefixes of variables that imports read."""

LIBRARIES = (
    *("accelerate.commands.launch", "datasets", "deepspeed", "peft", "sklearn.metrics", "torch.distributed.run"),
    *("torch.distributed.checkpoint.hf_storage", "torch.utils.tensorboard", "transformers.trainer_seq2seq"),
    *("transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.llama.modeling_llama", "transformers.models.roberta.modeling_roberta"),
    *("transformers.models.t5.modeling_t5", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer"),
    *("trl.trainer.sft_trainer",),
)

PROGRAM = """\
#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
from warm_client import main
main({folder!r}, {python!r}, {server!r})
"""


def prepare():
    """Let this process and those it starts share servers, which end with it."""
    if FOLDER in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    os.environ[FOLDER] = str(folder)
    (folder / "owner").write_text(str(os.getpid()))
    (folder / "environment.json").write_text(json.dumps(os.environ | ENVIRONMENT))
    program = folder / "python"
    tests = str(Path(__file__).parent)
    program.write_text(
        PROGRAM.format(python=sys.executable, tests=tests, folder=str(folder), server=str(Path(__file__)))
    )
    program.chmod(0o755)


def python():
    """The program that stands for ``sys.executable``."""
    prepare()
    return os.path.join(os.environ[FOLDER], "python")


def environment(*paths, **more):
    """Variables of a process that a test starts, with ``paths`` first on its path."""
    path = os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH", "")]))
    return os.environ | ENVIRONMENT | {"PYTHONPATH": path} | more


def end():
    """End the servers, if they are this process's."""
    folder = Path(os.environ.get(FOLDER, "/nonexistent"))
    if not folder.is_dir() or int((folder / "owner").read_text()) != os.getpid():
        return
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGTERM)
    shutil.rmtree(folder)
    del os.environ[FOLDER]


def warm_up():
    """Import what the processes would import one by one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in LIBRARIES:
        importlib.import_module(name)
    del os.environ["DS_ACCELERATOR"]


class Server:
    """Forks a process per request and tells its asker how it ended."""

    def __init__(self, folder, number, given):
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / f"{number}.new"))
        self.listener.listen()
        os.rename(folder / f"{number}.new", folder / str(number))  # from here on clients connect
        self.owner = os.pidfd_open(int((folder / "owner").read_text()))
        self.given = frozen(given)
        self.imported = {name: value for name, value in os.environ.items() if name not in given}
        self.askers = {}  # process id: (its pidfd, connection)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.owner, selectors.EVENT_READ, self.leave)

    def serve(self):
        """In the server never returns; in a fork returns the request."""
        while True:
            for key, _ in self.selector.select():
                if (request := key.data()) is not None:
                    return request

    def accept(self):
        """Fork; None in the server, the request in the fork."""
        connection, _ = self.listener.accept()
        try:
            request, files = receive(connection)
        except (OSError, ValueError):  # the asker has gone
            connection.close()
            return None
        known = request["words"][:1] and not request["words"][0].startswith("-")
        known = known or request["words"][0] in ("-u", "-m", "-c")
        pid = os.fork() if known and self.suits(request["environment"]) else None
        if pid == 0:
            self.become(files)
            connection.close()
            return request
        for file in files:
            os.close(file)
        connection.sendall(str(pid or 0).encode())
        if pid is None:
            connection.close()
            return None
        watch = os.pidfd_open(pid)
        self.askers[pid] = (watch, connection)
        self.selector.register(watch, selectors.EVENT_READ, lambda: self.ended(pid))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.abandoned(pid))
        return None

    def suits(self, environment):
        """Whether the server's imports found these variables: those they have set themselves do not count."""
        asked = frozen(environment)
        return {name: asked[name] for name in asked if asked[name] != self.imported.get(name)} == self.given

    def ended(self, pid):
        watch, connection = self.askers.pop(pid)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(KeyError):
            self.selector.unregister(connection)
        self.selector.unregister(watch)
        os.close(watch)
        with contextlib.suppress(OSError):
            connection.sendall(str(status).encode())
        connection.close()

    def abandoned(self, pid):
        """The asker was killed, and so is what it stands for."""
        if pid in self.askers:
            self.selector.unregister(self.askers[pid][1])
            os.kill(pid, signal.SIGKILL)

    def leave(self):
        for pid in self.askers:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(sys.argv[1], ignore_errors=True)  # where the owner was killed
        os._exit(0)

    def become(self, files):
        """Close the server's files in a fork and open the asker's."""
        self.selector.close()
        self.listener.close()
        os.close(self.owner)
        for watch, connection in self.askers.values():
            os.close(watch)
            connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)


def frozen(environment):
    names = [name for name in environment if name.startswith(FROZEN) and name != "PYTHONPATH"]
    return {name: environment[name] for name in names}


def receive(connection):
    """A request and the asker's standard files."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    wanted, content = int.from_bytes(size, "big"), b""
    while len(content) < wanted:
        part = connection.recv(wanted - len(content))
        if not part:
            raise OSError
        content += part
    return json.loads(content), files


def run(request, imported):
    """Be the process that ``python *words`` would be."""
    os.setsid()
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(imported | request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.executable = python()
    own = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = own + [part for part in sys.path[1:] if part not in inherited]
    try:
        execute(request["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    leave(code)


def leave(code):
    """End as an interpreter does, without taking every imported module apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def execute(words):
    """Run a script, ``-m`` a module or ``-c`` code as ``__main__``."""
    if words[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        words = words[1:]
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__builtins__ = __builtins__
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(words[1], None)  # what the server has imported as a library
        runpy._run_module_as_main(words[1])
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), vars(module))
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.realpath(words[0])))
        module.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(module))


if __name__ == "__main__":
    given = dict(os.environ)
    warm_up()
    gc.collect()
    gc.freeze()
    server = Server(Path(sys.argv[1]), sys.argv[2], given)
    run(server.serve(), server.imported)
