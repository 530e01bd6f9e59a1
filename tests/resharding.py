"""Save under every engine on two ranks, go on under every other: writes the losses of all pairs when run."""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn

from yunque.distributed.checkpoint import Checkpoints, Training

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CROSSED = ("ddp", "fsdp2", "zero2", "zero3")  # ZeRO-1's state is laid out as ZeRO-2's
BF16 = ("fsdp2", "zero2", "zero3")
STEPS = 3
ROWS = 4


class Net(nn.Module):
    """A frozen layer and layers whose sizes no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.first = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(7, 1, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.frozen(x)))) * self.scale


class Run:
    """What a training run prepares, on as many ranks as started it."""

    def __init__(self, folder, engine="ddp", *, bf16=False, seed=0, asynchronous=False):
        precision = "bf16" if bf16 else "no"
        self.accelerator = _accelerator(engine, precision)
        torch.manual_seed(0)
        net = Net()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape))
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": trained[:2], "lr": 0.05}, {"params": trained[2:], "lr": 0.02}], weight_decay=0.1
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.checkpoints = Checkpoints(folder, self.accelerator, keep=2, asynchronous=asynchronous)

    @property
    def training(self):
        return Training(self.model, self.optimizer, [self.scheduler])

    def train(self, first, last):
        """Losses of steps ``first`` to ``last``, the same for any number of ranks."""
        losses = []
        for step in range(first, last):
            rows = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step)).chunk(
                self.accelerator.num_processes
            )[self.accelerator.process_index]
            if engine_is_zero(self.accelerator):
                rows = rows.to(next(self.model.parameters()).dtype)
            loss = (self.model(rows).float() - 1).square().mean()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)  # as the ZeRO configuration below
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(self.accelerator.reduce(loss.detach(), reduction="mean").item())
        return losses

    def save(self, step):
        self.checkpoints.save(step, self.training, {"step": step})
        self.checkpoints.wait()

    def resume(self):
        found = self.checkpoints.newest()
        self.checkpoints.load(found, self.training)
        return found.step


def engine_is_zero(accelerator):
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def _accelerator(engine, precision):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # left by the engine before
        os.environ.pop(name, None)
    state = PartialState(cpu=True)
    options = {"mixed_precision": precision}
    if state.num_processes == 1:
        return Accelerator(cpu=True, **options)
    state.distributed_type = DistributedType.MULTI_CPU
    if engine == "ddp":
        return Accelerator(cpu=True, **options)
    if engine == "fsdp2":
        state.distributed_type = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP", reshard_after_forward=True)
        return Accelerator(fsdp_plugin=plugin, **options)
    state.distributed_type = DistributedType.MULTI_GPU
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_zero_config(int(engine[-1]), precision)), **options
    )


def _zero_config(stage, precision):
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "bf16": {"enabled": precision == "bf16"},
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }


def main(folder, output):
    """All pairs of engines in float32, those of one kind in bf16, and what one rank saved."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    losses = {}
    for engine in ENGINES:
        run = Run(folder / engine, engine, asynchronous=engine != "ddp")
        losses[f"{engine} begins"] = run.train(0, STEPS)
        run.save(STEPS)
        losses[f"{engine} unbroken"] = run.train(STEPS, 2 * STEPS)
    for engine in ENGINES:
        for source in (*CROSSED, "single") if engine in CROSSED else (engine,):
            run = Run(folder / source, engine, seed=1)
            losses[f"{source} -> {engine}"] = run.train(run.resume(), 2 * STEPS)
    for engine in BF16:
        run = Run(folder / f"{engine}-bf16", engine, bf16=True)
        run.train(0, STEPS)
        run.save(STEPS)
        losses[f"{engine} bf16 unbroken"] = run.train(STEPS, 2 * STEPS)
        for target in BF16:
            run = Run(folder / f"{engine}-bf16", target, bf16=True, seed=1)
            losses[f"{engine} -> {target} bf16"] = run.train(run.resume(), 2 * STEPS)
    if PartialState().is_main_process:
        output.write_text(json.dumps(losses, indent=1))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
