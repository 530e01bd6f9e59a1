"""Checks of one node before anybody trains on it: each says what it found and, where that is not right, the fix."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from yunque.distributed import node_meeting, node_speed

GIB, GB = 1 << 30, 10**9

TESTED = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "numpy": "2.4.6",
    "onnxruntime": "1.31.1",
    "peft": "0.21.2",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}
"""Versions that the tests ran with (constraints.txt)."""

MIN_FREE_BYTES, GOOD_FREE_BYTES = 2 * GIB, 50 * GIB
GOOD_WRITE, GOOD_COPY = 100e6, 6e9
GOOD_REDUCE = {"gloo": 0.1e9, "nccl": 5e9}
GOOD_SHM_BYTES = GIB
GOOD_FILES, GOOD_PROCESSES = 4096, 4096
GOOD_LEAD_S, MAX_LEAD_S = 1.0, 60.0  # munge refuses credentials of a clock that is 5 minutes off
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES")

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the report; ``values`` holds the numbers in it, with units in their names."""

    name: str
    status: Status
    found: str
    fix: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Where runs will write, and whether to leave out what takes seconds."""

    output_dir: Path
    quick: bool = False


def examine(options: Options) -> list[Check]:
    """Run all checks of this node; one that fails by itself is a line of the report too."""
    groups: dict[str, Callable[[], Iterator[Check]]] = {
        "software": _software,
        "processors": _processors,
        "gpus": _gpus,
        "speeds": lambda: iter(()) if options.quick else _speeds(),
        "disk": lambda: _disk(options),
        "limits": _limits,
        "clock": _clock,
        "slurm": lambda: _slurm(options),
    }
    checks: list[Check] = []
    for name, group in groups.items():
        try:
            checks += group()
        except Exception as error:  # a doctor that dies of the illness helps nobody
            fix = "this check itself broke; the message names the cause"
            checks.append(Check(name, "fail", f"{type(error).__name__}: {error}", fix))
    return [replace(check, fix="") if check.status == "ok" else check for check in checks]


def node_name() -> str:
    """Slurm's name of this node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def describe(checks: list[Check]) -> str:
    """The report as a table, fixes below what they are for."""
    width = max(len(check.name) for check in checks)
    lines = [f"node {node_name()}"]
    for check in checks:
        lines.append(f"  {check.status:<4}  {check.name:<{width}}  {check.found}")
        if check.status != "ok":
            lines.append(f"  {'':<4}  {'':<{width}}  fix: {check.fix}")
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    return "\n".join([*lines, f"node {node_name()}: " + ", ".join(f"{n} {status}" for status, n in counts.items())])


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The report as plain values."""
    return {"node": node_name(), "checks": [asdict(check) for check in checks]}


# --- software ---


def _software() -> Iterator[Check]:
    least, here = (3, 11), platform.python_version()
    status: Status = "ok" if _numbers(here) >= least else "fail"
    yield Check("python", status, here, "install Python 3.11 or newer")
    installed = {name: version for name in TESTED if (version := _version(name))}
    if "torch" not in installed:
        yield Check("training", "warn", "torch is not installed: this node only serves", "pip install 'yunque[train]'")
    minima = _minima()
    old = [f"{name} {has} < {minima[name]}" for name, has in installed.items() if _older(has, minima.get(name))]
    other = [f"{name} {has} (tested {TESTED[name]})" for name, has in installed.items() if has != _same(name, has)]
    if old:
        yield Check("versions", "fail", ", ".join(old), "pip install --upgrade 'yunque[train]'")
    elif other:
        yield Check("versions", "warn", ", ".join(other), "pip install --constraint constraints.txt 'yunque[train]'")
    else:
        yield Check("versions", "ok", f"{len(installed)} packages as tested", values={"versions": installed})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _same(name: str, version: str) -> str:
    """``version`` if only the last number differs from the tested one's."""
    return version if _numbers(version)[:2] == _numbers(TESTED[name])[:2] else TESTED[name]


def _older(version: str, least: str | None) -> bool:
    return least is not None and _numbers(version) < _numbers(least)


def _minima() -> dict[str, str]:
    found = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in metadata.requires("yunque") or ())
    return {match[1]: match[2] for match in found if match}


# --- processors, GPUs ---


def _processors() -> Iterator[Check]:
    usable, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{usable} of {all_cores} cores, {memory / GIB:.0f} GiB memory"
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    values = {"cores": usable, "memory_bytes": memory}
    fix = "ask for more with --cpus-per-task"
    yield Check("processors", "warn" if usable < 2 * gpus else "ok", found, fix, values)


def _gpus() -> Iterator[Check]:
    driver = _nvidia_smi()
    asked = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    if util.find_spec("torch") is None:
        found = f"{len(driver)} by nvidia-smi" if driver else "none"
        yield Check("gpus", "ok", found)
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        broken = bool(driver or asked or list(Path("/dev").glob("nvidia[0-9]*")))
        found = f"torch {torch.__version__} sees none" + (f", nvidia-smi {len(driver)}" if driver else "")
        fix = "install a CUDA build of torch that the driver supports; look for CUDA_VISIBLE_DEVICES"
        yield Check("gpus", "fail" if broken else "ok", found if broken else "none: profiles run over gloo", fix)
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    names = sorted({f"{device.name}, {device.total_memory / GIB:.0f} GiB" for device in devices})
    found = f"{count} x {' and '.join(names)}, CUDA {torch.version.cuda}" + (f", driver {driver[0]}" if driver else "")
    values = {"count": count, "memory_bytes": [device.total_memory for device in devices]}
    if asked not in (0, count):
        yield Check("gpus", "fail", f"{found}; Slurm gave {asked}", "look for CUDA_VISIBLE_DEVICES", values)
    else:
        mixed = "ask for one kind with --gpus-per-node=TYPE:NUMBER"
        yield Check("gpus", "warn" if len(names) > 1 else "ok", found, mixed, values)
    yield from _gpu_abilities(torch, count)


def _gpu_abilities(torch: Any, count: int) -> Iterator[Check]:
    used = [1 - free / total for free, total in map(torch.cuda.mem_get_info, range(count))]
    busy = [index for index, share in enumerate(used) if share > 0.05]
    found = f"in use on {busy}: " + ", ".join(f"{used[index]:.0%}" for index in busy) if busy else "free"
    yield Check("gpu memory", "warn" if busy else "ok", found, "end the other processes (nvidia-smi)")
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check("bf16", "ok" if able else "warn", "yes" if able else "no", "train with --mixed_precision no")
    if torch.distributed.is_nccl_available():
        yield Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Check("nccl", "fail", "not in this build of torch", "install torch for CUDA on Linux")


def _nvidia_smi() -> list[str]:
    """Driver version once per GPU that the driver sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def _speeds() -> Iterator[Check]:
    if util.find_spec("torch") is None:
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in range(count):
        to_device, to_host = node_speed.copy_speeds(device)
        found = f"{to_device / GB:.1f} GB/s to the GPU, {to_host / GB:.1f} GB/s back"
        values = {"to_device_bytes_per_s": to_device, "to_host_bytes_per_s": to_host}
        slow = min(to_device, to_host) < GOOD_COPY
        fix = "look at the PCIe link's width and at NUMA: nvidia-smi topo -m"
        yield Check(f"copies gpu {device}", "warn" if slow else "ok", found, fix, values)
    backend, ranks = ("nccl", count) if count > 1 else ("gloo", 2)
    name, fix = f"all-reduce ({backend})", "NCCL_DEBUG=INFO says which links are used; nvidia-smi topo -m what there is"
    if backend == "gloo":
        fix = "look at what else runs here, and at the loopback device"
    try:
        speed = node_speed.all_reduce_speed(ranks, backend)
    except RuntimeError as error:
        yield Check(name, "fail", str(error), fix)
        return
    found, values = f"{speed / GB:.2f} GB/s between {ranks} ranks", {"bus_bytes_per_s": speed}
    yield Check(name, "warn" if speed < GOOD_REDUCE[backend] else "ok", found, fix, values)


# --- disk, limits ---


def _disk(options: Options) -> Iterator[Check]:
    folder = _existing(options.output_dir)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Check("disk", "fail", f"{folder} is not a folder to write to", "give another --output_dir")
        return
    free = shutil.disk_usage(folder).free
    status: Status = "fail" if free < MIN_FREE_BYTES else "warn" if free < GOOD_FREE_BYTES else "ok"
    found, fix = f"{free / GIB:.0f} GiB free at {folder}", "free space, or give an --output_dir on another disk"
    values: dict[str, Any] = {"free_bytes": free}
    if status != "fail" and not options.quick:
        try:
            speed = node_speed.write_speed(folder)
        except OSError as error:
            yield Check("disk", "fail", f"{folder}: {error.strerror}", fix)
            return
        found, values = f"{found}, writes {speed / 1e6:.0f} MB/s", values | {"write_bytes_per_s": speed}
        if speed < GOOD_WRITE:
            status, fix = "warn", f"{fix}; checkpoints will take long here"
    yield Check("disk", status, found, fix, values)
    cache = _existing(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser())
    free = shutil.disk_usage(cache).free
    found = f"{free / GIB:.0f} GiB free at {cache}"
    yield Check("hub cache", "warn" if free < 10 * GIB else "ok", found, "set HF_HOME to a bigger disk")


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _limits() -> Iterator[Check]:
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    found = f"{size / GIB:.1f} GiB"
    fix = "docker run --shm-size=8g, or mount a bigger tmpfs: loaders and NCCL pass tensors through it"
    yield Check("/dev/shm", "warn" if size < GOOD_SHM_BYTES else "ok", found, fix, {"bytes": size})
    adapters = list(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    if adapters:
        states = [path.read_text().strip() for path in adapters]
        down = [str(path) for path, state in zip(adapters, states, strict=True) if "ACTIVE" not in state]
        found = f"{len(down)} of {len(adapters)} ports down" if down else f"{len(adapters)} ports active"
        yield Check("infiniband", "warn" if down else "ok", found, "ibstat; ask the administrator")
    least: dict[str, float] = {"nofile": GOOD_FILES, "nproc": GOOD_PROCESSES}
    if adapters:  # only RDMA pins memory
        least["memlock"] = math.inf
    for name, wanted in least.items():
        soft = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[0]
        limit = math.inf if soft == resource.RLIM_INFINITY else soft
        found, fix = (str(number).replace("inf", "unlimited") for number in (limit, f"raise it to {wanted} or more"))
        yield Check(f"ulimit {name}", "warn" if limit < wanted else "ok", found, f"{fix}: limits.conf, slurmd's unit")


def _clock() -> Iterator[Check]:
    state, error_s = _kernel_clock()
    fix = "start chrony or systemd-timesyncd; a virtual machine may follow its host instead"
    if state == _TIME_ERROR:
        yield Check("clock", "warn", "the kernel says: not synchronised", fix)
    else:
        yield Check("clock", "ok", f"synchronised, estimated error {error_s * 1e3:.1f} ms", values={"error_s": error_s})


def _kernel_clock() -> tuple[int, float]:
    """State of the clock and its estimated error in seconds, as NTP daemons tell the kernel: adjtimex(2)."""
    buffer = ctypes.create_string_buffer(256)
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    (microseconds,) = struct.unpack_from("@l", buffer.raw, 4 * struct.calcsize("@l"))
    return state, microseconds / 1e6


# --- Slurm ---


def _slurm(options: Options) -> Iterator[Check]:
    present = [name for name in _JOB if os.environ.get(name)]
    if not present:
        yield Check("slurm", "ok", "not inside a job")
        return
    missing = [name for name in _JOB if name not in present]
    if missing:
        fix = "submit with slurm/submit.sh, or unset all SLURM_ variables"
        yield Check("slurm", "fail", f"{', '.join(missing)} not set but {present[0]} is", fix)
        return
    rank, ranks = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    yield Check("slurm", "ok", f"job {os.environ['SLURM_JOB_ID']}, {nodes} nodes, {gpus} GPUs here")
    if nodes > 1 and ranks == nodes:
        yield from _other_nodes(rank, ranks, _existing(options.output_dir))


def _other_nodes(rank: int, ranks: int, folder: Path) -> Iterator[Check]:
    fix = "open the ports above 12000 between the nodes; is the output_dir writable?"
    address = node_meeting.first_node()
    if address is None:
        yield Check("other nodes", "warn", "scontrol does not tell the first node's address", "install Slurm's client")
        return
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_STEP_ID", "0"))
    port = 12000 + (job + 7919 * (step + 1)) % 20000
    try:
        seen = node_meeting.meet(address, port, rank, ranks, folder, node_name())
    except OSError as error:
        yield Check("other nodes", "fail", f"{address}:{port}: {error}", fix)
        return
    worst = max(seen, key=lambda one: abs(one.lead_s))
    lead = abs(worst.lead_s)
    status: Status = "fail" if lead > MAX_LEAD_S else "warn" if lead > GOOD_LEAD_S else "ok"
    found = f"{worst.node} is {worst.lead_s * 1e3:+.1f} ms from the first node"
    yield Check("clocks apart", status, found, "synchronise all nodes with one server", {"lead_s": worst.lead_s})
    apart = [one.node for one in seen if not one.shares_folder]
    found = f"{folder} on {', '.join(apart)} is another one" if apart else f"{folder} is the same one"
    fix = "give an --output_dir on a file system that all nodes share"
    yield Check("shared folder", "fail" if apart else "ok", found, fix)
