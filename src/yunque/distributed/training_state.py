"""What a run has learned, by parameter name: the same whatever engine, and however many ranks, hold it.

Under FSDP2 and tensor parallel a tensor stays the shard this rank holds. ZeRO keeps flat pieces of its own: there every
parameter is gathered for a moment, and one rank keeps it.
"""

from __future__ import annotations

import base64
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import FSDPModule

from yunque.distributed import zero

# Said of every save and load of one process, also in the background, where a context would not reach it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

WEIGHT = "weight"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_BATCH_BYTES = 2**28
"""Read at once where every rank needs whole parameters."""


@dataclass(frozen=True)
class Training:
    """The model and the optimizer that Accelerate has prepared, and the schedules of the learning rate."""

    model: nn.Module
    optimizer: Any
    schedulers: Sequence[Any] = ()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, under the names of the bare model."""
        named = extract_model_from_parallel(self.model).named_parameters()
        return {_bare(name): parameter for name, parameter in named if parameter.requires_grad}

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without Accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


@dataclass(frozen=True)
class Captured:
    """A run's state: tensors "weight/NAME", "exp_avg/NAME", ... and what fits into JSON."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def capture(training: Training, *, rank: int, ranks: int) -> Captured:
    """This rank's part of the weights that train and of the optimizer's state; every rank calls it at once."""
    parameters = training.parameters
    if zero.holds(training.model):
        tensors, scalars = zero.gather(training.model, parameters, rank=rank, ranks=ranks)
        engine: Any = training.model
        groups = engine.optimizer.param_groups
    else:
        tensors, scalars = {}, {}
        optimizer = training.inner_optimizer
        for name, parameter in parameters.items():
            tensors[f"{WEIGHT}/{name}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim():
                    tensors[f"{key}/{name}"] = value
                elif value is not None:
                    scalars.setdefault(name, {})[key] = float(value)
        groups = optimizer.param_groups
    numbers = {
        "scalars": scalars,
        "groups": [_hyperparameters(group) for group in groups],
        "schedulers": [scheduler.state_dict() for scheduler in training.schedulers],
    }
    return Captured(tensors, numbers)


@torch.no_grad()
def restore(training: Training, folder: Path, numbers: Mapping[str, Any]) -> None:
    """Load what ``capture`` of any engine on any number of ranks saved.

    Raises:
        ValueError: the checkpoint is of another model; the message names the first weight that differs.
    """
    for module in training.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass left the root's weights gathered: the next would compute with them
    parameters = training.parameters
    saved: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    _check_same_model({key: tuple(found.size) for key, found in saved.items()}, parameters)
    kinds = sorted({key.partition("/")[0] for key in saved})
    if zero.holds(training.model):
        engine: Any = training.model
        zero.make_state(engine, [kind for kind in kinds if kind != WEIGHT], numbers["scalars"])
        for batch in _batches(parameters, kinds):
            wanted = {
                key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
                for key in (f"{kind}/{name}" for name in batch for kind in kinds)
                if key in saved
            }
            _read(wanted, folder)
            for key, value in wanted.items():
                kind, _, name = key.partition("/")
                zero.scatter(parameters[name], value, None if kind == WEIGHT else kind)
        groups = engine.optimizer.param_groups
    else:
        groups = _restore_plain(training, folder, saved, kinds, numbers["scalars"])
    for group, before in zip(groups, numbers["groups"], strict=False):
        for name in before.keys() & group.keys():
            group[name] = tuple(before[name]) if isinstance(group[name], tuple) else before[name]
    for scheduler, state in zip(training.schedulers, numbers["schedulers"], strict=True):
        scheduler.load_state_dict(state)


def _restore_plain(
    training: Training, folder: Path, saved: Mapping[str, Any], kinds: Sequence[str], scalars: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Read each rank's shards in place, and give the optimizer its state as its own ``load_state_dict`` wants it."""
    parameters, optimizer = training.parameters, training.inner_optimizer
    targets: dict[str, Tensor] = {f"{WEIGHT}/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key in (f"{kind}/{name}" for kind in kinds if kind != WEIGHT):
            if key in saved:
                found = saved[key]
                same = tuple(found.size) == tuple(parameter.shape)
                dtype = found.properties.dtype
                targets[key] = (
                    torch.zeros_like(parameter.detach(), dtype=dtype) if same else torch.zeros(found.size, dtype=dtype)
                )
    _read(targets, folder)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    state = {}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        name = name_of.get(id(parameter), "")
        found = {kind: targets[f"{kind}/{name}"] for kind in kinds if kind != WEIGHT and f"{kind}/{name}" in targets}
        found |= {key: torch.tensor(value) for key, value in scalars.get(name, {}).items()}
        if found:
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer.param_groups


def _read(targets: dict[str, Tensor], folder: Path) -> None:
    # every rank plans its own reads, since the files say what they hold
    dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def _check_same_model(saved: Mapping[str, tuple[int, ...]], parameters: Mapping[str, nn.Parameter]) -> None:
    before = {key.partition("/")[2]: shape for key, shape in saved.items() if key.startswith(f"{WEIGHT}/")}
    for name, parameter in parameters.items():
        shape = zero.shape_of(parameter)
        if name not in before:
            raise ValueError(f"it holds no {name}")
        if before[name] != shape:
            raise ValueError(f"size mismatch: {name} is {list(before[name])} there and {list(shape)} here")
    extra = before.keys() - parameters.keys()
    if extra:
        raise ValueError(f"it holds {min(extra)}, which does not train here")


def _batches(parameters: Mapping[str, nn.Parameter], kinds: Sequence[str]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        names.append(name)
        size += 4 * len(kinds) * int(np.prod(zero.shape_of(parameter)))
        if size > _BATCH_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, such as its learning rate."""
    numbers = {}
    for name, value in group.items():
        many = isinstance(value, tuple | list) and name != "params"
        if all(
            isinstance(number, float | int) and not isinstance(number, bool) for number in (value if many else [value])
        ):
            numbers[name] = value
    return numbers


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def random_state() -> dict[str, Any]:
    """The generators of this rank, as JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, rest = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), rest],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any] | None, *, seed: tuple[int, int]) -> None:
    """Set the generators of this rank as ``random_state`` found them, or by ``seed`` where it found none."""
    if state is None:
        first, second, third = np.random.SeedSequence(seed).generate_state(3).tolist()
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
        return
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
