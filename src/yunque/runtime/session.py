"""ONNX Runtime sessions of a model folder, and runs of them over buffers that the caller owns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
from numpy.typing import NDArray

from yunque import artifacts
from yunque.errors import InputError
from yunque.runtime.memory import anonymous_ranges, use_large_pages
from yunque.runtime.spec import ModelSpec

Verify = Literal["sha256", "size", "none"]

_SPIN_US = 100


def check_files(folder: Path, verify: Verify) -> None:
    """Compare the folder's files with its manifest: all content, only the sizes, or nothing.

    Raises:
        InputError: a file is missing or is not the one that was exported.
    """
    if verify == "none":
        return
    if verify == "sha256":
        problems = artifacts.verify(folder)
    else:
        files = artifacts.read_manifest(folder).files.items()
        sizes = ((name, folder / name, file["bytes"]) for name, file in files)
        problems = [
            f"{name} is missing or has another size"
            for name, path, size in sizes
            if not path.is_file() or path.stat().st_size != size
        ]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}; copy the folder again or export it again")


def open_sessions(folder: Path, spec: ModelSpec, threads: int | None) -> dict[str, ort.InferenceSession]:
    """One session per graph of the folder; ``threads`` per session, all cores when None.

    Raises:
        InputError: the graphs need a newer ONNX Runtime, or are damaged.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    # Lengths change from step to step, and so would the plan of memory made for the first.
    options.enable_mem_pattern = False
    # Weights beside the arena, which would double in size for them.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # Threads wait busily for the next operator, since waking takes longer, but not until the next graph: a decoder that
    # waits so holds the core that its encoder wants, or the server's event loop.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    # Processors without VNNI multiply uint8 by int8 in 16 bits that overflow: weights become uint8 there, and exact
    options.add_session_config_entry("session.x64quantprecision", "1")
    sessions, former = {}, anonymous_ranges()
    for name, file in spec.graphs.items():
        try:
            sessions[name] = ort.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _unloadable(folder / file, error) from error
    use_large_pages(former)
    return sessions


def _unloadable(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    version = ort.__version__
    if "opset" in reason.lower() or "ir_version" in reason.lower() or "IR version" in reason:
        return InputError(
            f"{path}: made for a newer ONNX Runtime than {version} (pip install -U onnxruntime): {reason}"
        )
    return InputError(f"{path}: ONNX Runtime {version} cannot load it: {reason[:300]}")


def geometry(session: ort.InferenceSession) -> dict[str, list[Any]]:
    """Shapes of the session's inputs by name; dynamic dimensions are names."""
    return {value.name: value.shape for value in session.get_inputs()}


class Bound:
    """A graph bound to arrays: it reads the inputs and writes the outputs in place at every run.

    An output array may be an input too; it is then updated.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._arrays = (dict(inputs), dict(outputs))  # the binding does not keep them alive
        values: dict[int, ort.OrtValue] = {}
        for name, array in inputs.items():
            values[id(array)] = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, values[id(array)])
        for name, array in outputs.items():
            value = values.get(id(array)) or ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run the graph once."""
        self._session.run_with_iobinding(self._binding)
