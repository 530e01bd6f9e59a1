"""What training holds and sends on one rank, counted while it runs: for ``yunque rehearse`` and to prove ``plan``.

Bytes are those of storages, each counted once, so views, flat buffers and their padding count as what they occupy.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import checkpoint

_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
}
"""torch.distributed's names of the dispatcher's collectives, which functional collectives and DTensor use too."""

_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


class Meter:
    """Counts, while entered, what this rank's training holds and sends; finds model and optimizer by itself.

    Models are those that pass through ``Accelerator.prepare``; optimizers those that step them. What counts as what:

    - parameters: what the module holds between steps: local shards of FSDP2 and tensor parallel (float32 under
      Accelerate's bf16), all 16-bit weights under ZeRO-1 and 2, the rank's partition and what is never partitioned
      under ZeRO-3, packed nf4 weights with their scales. A frozen reference that is not prepared is not among them.
    - gradients: at the optimizer's step; under ZeRO what is left in 16 bits and the float32 copy the step works on.
    - optimizer: its state, and the float32 master weights that ZeRO keeps (``master_bytes`` of it).
    - activations: the most that was saved for a backward pass at one time, parameters left out; autocast's 16-bit
      copies of weights are among them, and so is what checkpointing computes again.
    - communication: bytes of the whole buffer of each collective (all_gather: what comes out; reduce_scatter: what
      goes in), from every caller: DDP's reducer, FSDP2, DeepSpeed, DTensor, gathering of metrics.
    """

    def __init__(self) -> None:
        self.activations = SavedActivations()
        self._traffic = _Traffic()
        self._models: list[nn.Module] = []
        self._peaks: Counter[str] = Counter()
        self._steps = 0
        self._stack = ExitStack()

    def __enter__(self) -> Meter:
        """Start to count."""
        for name in ("prepare", "prepare_model"):  # the second where a model was split as it was read
            self._watch(name)
        for handle in (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            self._stack.callback(handle.remove)
        self._stack.enter_context(self.activations)
        self._stack.enter_context(self._traffic)
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting; the figures stay."""
        self._stack.close()

    def _watch(self, name: str) -> None:
        """Note the models that a method of Accelerator returns."""
        from accelerate import Accelerator

        prepare = getattr(Accelerator, name)

        @wraps(prepare)
        def watched(accelerator: Any, *objects: Any, **options: Any) -> Any:
            prepared = prepare(accelerator, *objects, **options)
            several = prepared if isinstance(prepared, tuple | list) else (prepared,)
            for model in (item for item in several if isinstance(item, nn.Module)):
                if not any(model is known for known in self._models):
                    self._models.append(model)
                    self._watch_step(_zero(model))
            return prepared

        setattr(Accelerator, name, watched)
        self._stack.callback(setattr, Accelerator, name, prepare)

    def report(self) -> dict[str, Any]:
        """Peaks in bytes since the start, communication in bytes by operation, and optimizer steps seen."""
        self._raise_peak("parameter_bytes", held_bytes(weights_of(self._models)))
        names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "master_bytes")
        return {
            "rank": int(os.environ.get("RANK", "0")),
            **{name: self._peaks[name] for name in names},
            "activation_peak_bytes": self.activations.peak_bytes,
            "communication_bytes": dict(sorted(self._traffic.bytes.items())),
            "optimizer_steps": self._steps,
        }

    def _raise_peak(self, name: str, value: int) -> None:
        self._peaks[name] = max(self._peaks[name], value)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._trains(optimizer):
            self._raise_peak("parameter_bytes", held_bytes(weights_of(self._models)))
            self._raise_peak("gradient_bytes", held_bytes(gradients_of(self._models)))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._trains(optimizer):
            self._steps += 1
            masters = [master for model in self._models for master in _masters(model)]
            states = [value for state in optimizer.state.values() for value in state.values()]
            self._raise_peak("master_bytes", held_bytes(masters))
            self._raise_peak("optimizer_bytes", held_bytes([*states, *masters]))

    def _watch_step(self, zero: Any) -> None:
        """Look at the gradients before DeepSpeed's own step too, which lets most of them go at once."""
        if hasattr(zero, "averaged_gradients"):
            step = zero.step

            @wraps(step)
            def watched(*args: Any, **options: Any) -> Any:
                self._raise_peak("gradient_bytes", held_bytes(gradients_of(self._models)))
                return step(*args, **options)

            zero.step = watched

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether ``optimizer`` belongs to a prepared model, itself or inside DeepSpeed's."""
        ours = {id(weight) for model in self._models for weight in [*model.parameters(), *_masters(model)]}
        return any(id(weight) in ours for group in optimizer.param_groups for weight in group["params"])


class SavedActivations:
    """Bytes that autograd keeps for backward passes while entered: now, and at their peak.

    Works on FakeTensors too, where it counts what a run would keep.
    """

    def __init__(self) -> None:
        self.bytes = self.peak_bytes = 0
        self._users: Counter[int] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> SavedActivations:
        """Start to count what is saved from here on."""
        enter = saved_tensors_hooks.__enter__

        def counted(hooks: Any) -> None:
            # What checkpointing computes again goes to hooks of its own, and not through those around it.
            if isinstance(hooks, checkpoint._recomputation_hook):
                hooks.pack_hook = partial(self._recomputed, hooks.pack_hook)
            enter(hooks)

        saved_tensors_hooks.__enter__ = counted  # type: ignore[method-assign]
        self._stack.callback(setattr, saved_tensors_hooks, "__enter__", enter)
        self._stack.callback(setattr, torch.autograd.Function, "apply", torch.autograd.Function.apply)
        torch.autograd.Function.apply = _with_weights_kept(self, torch.autograd.Function.apply)
        self._stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        self._stack.close()

    def _pack(self, tensor: Tensor) -> Any:
        if _is_weight(tensor):
            return tensor
        saved = _Saved(tensor)
        self._count(saved, tensor)
        return saved

    def _recomputed(self, store: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        if not _is_weight(tensor):
            tensor = tensor.detach()  # checkpointing keeps this very object until the backward pass has used it
            self._count(tensor, tensor)
        return store(tensor)

    def _count(self, owner: object, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` as long as ``owner`` lives."""
        storage = local(tensor).untyped_storage()
        self._keep(storage._cdata, storage.nbytes())
        weakref.finalize(owner, self._drop, storage._cdata, storage.nbytes()).atexit = False

    def _keep(self, storage: int, size: int) -> None:
        self._users[storage] += 1
        if self._users[storage] == 1:
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _drop(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.bytes -= size


def _with_weights_kept(saved: SavedActivations, apply: Any) -> Any:
    """``Function.apply`` past the hooks where it gets ZeRO-3's weights.

    Hooks would give them back without DeepSpeed's marks, which TRL's fused head looks for.
    """

    def applied(kind: Any, *args: Any, **options: Any) -> Any:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None or hooks[1] is not _unpack or not any(hasattr(arg, "ds_id") for arg in args):
            return apply.__func__(kind, *args, **options)
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            results = apply.__func__(kind, *args, **options)
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        outputs = results if isinstance(results, tuple) else (results,)
        node = next((output.grad_fn for output in outputs if getattr(output, "grad_fn", None) is not None), None)
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and not _is_weight(tensor):
                saved._count(node, tensor)
        return results

    return classmethod(applied)


class _Saved:
    """A saved tensor; autograd lets go of it when the backward pass is through."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _unpack(saved: Any) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


class _Traffic:
    """Sees every collective in torch's dispatcher, whoever calls it, DDP's C++ reducer included; no other operation."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._library: torch.library.Library | None = None

    def __enter__(self) -> _Traffic:
        self._library = torch.library.Library("c10d", "IMPL")
        for name, operation in _COLLECTIVES.items():
            watched = partial(self._count, operation, getattr(torch.ops.c10d, name).default)
            # A key that all devices pass, below autograd and below DTensor.
            self._library.impl(name, watched, "BackendSelect", with_keyset=True)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._library is not None:
            self._library._destroy()

    def _count(self, operation: str, collective: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
        self.bytes[operation] += max(_payload(value) for value in args)
        return collective.redispatch(keys & _BELOW, *args, **kwargs)


def _payload(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_payload(part) for part in value) if isinstance(value, list | tuple) else 0


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind ``tensors`` on this rank, each counted once; what is no tensor counts nothing."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = local(tensor).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def weights_of(models: Iterable[nn.Module]) -> Iterator[Any]:
    """Tensors that hold the parameters of ``models`` on this rank: shards, partitions, nf4 scales."""
    for model in models:
        for weight in model.parameters():
            yield weight.data
            yield getattr(weight, "ds_tensor", None)
            yield from _scales(getattr(weight, "quant_state", None))


def gradients_of(models: Iterable[nn.Module]) -> Iterator[Any]:
    """Tensors that hold gradients of ``models`` on this rank, DeepSpeed's own copies included."""
    for model in models:
        yield from (weight.grad for weight in model.parameters())
        yield getattr(_zero(model), "grad_partitions_flat_buffer", None)
        for name in ("averaged_gradients", "all_grad_tensors"):
            for parts in (getattr(_zero(model), name, None) or {}).values():
                yield from parts if isinstance(parts, list) else [parts]
        yield from (master.grad for master in _masters(model))


def _scales(state: Any) -> Iterator[Any]:
    if state is not None:
        yield from (state.absmax, state.code, state.offset)
        yield from _scales(state.state2)


def _zero(model: nn.Module) -> Any:
    """DeepSpeed's optimizer, where ``model`` is its engine."""
    return vars(model).get("optimizer")


def _masters(model: nn.Module) -> list[Tensor]:
    zero = _zero(model)
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if masters := getattr(zero, name, None):
            return list(masters)
    return []
