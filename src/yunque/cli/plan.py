"""``yunque plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from yunque import errors


def plan(
    model: Annotated[str, typer.Option("--model_name_or_path", help="Folder with a config.json, or hub id.")],
    method: Annotated[str, typer.Option(help="full, lora, qlora, dpo, ppo or grpo.")] = "full",
    weights: Annotated[str, typer.Option(help="dpo, ppo, grpo: on full, lora or qlora weights.")] = "lora",
    profile: Annotated[str | None, typer.Option(help="Layout to judge; all are shown.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs in all.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines they are in.")] = 1,
    device_memory: Annotated[str, typer.Option("--device-memory", help="Memory of a GPU, as 80GiB.")] = "80GiB",
    rows: Annotated[int, typer.Option("--per_device_train_batch_size", help="Rows per forward pass of a GPU.")] = 8,
    prompt: Annotated[int, typer.Option("--prompt_tokens", help="Longest prompt of a batch.")] = 512,
    answer: Annotated[int, typer.Option("--answer_tokens", help="Longest answer of a batch.")] = 128,
    rollout: Annotated[int, typer.Option("--rollout_batch_size", help="Answers a GPU samples at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="Precision of the loaded weights: float32 or bfloat16.")] = "float32",
    lora_r: Annotated[int, typer.Option("--lora_r", help="Rank of the LoRA matrices.")] = 32,
    targets: Annotated[list[str] | None, typer.Option("--lora_target_modules", help="Layer; may be repeated.")] = None,
    tp_size: Annotated[int | None, typer.Option("--tp_size", help="GPUs of a tensor-parallel group.")] = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="Efficiency on 8, 64 and 512 GPUs too.")] = False,
    tflops: Annotated[float, typer.Option(help="Scaling: peak bf16 TFLOP/s of a GPU.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="Scaling: share of it that one GPU reaches.")] = 0.4,
    network: Annotated[float, typer.Option(help="Scaling: network of a GPU in GB/s, one direction.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a training run needs of every GPU, and which layouts fit, from a model's configuration alone."""
    try:
        from yunque.distributed import plan as library
        from yunque.distributed import plan_report
        from yunque.distributed import scaling as paper
        from yunque.distributed.plan_model import Batch
        from yunque.models.arguments import ModelArguments
    except ImportError as error:
        raise errors.InputError(f"yunque plan needs {error.name}; pip install 'yunque[train]'") from error
    request = library.Request(
        model=ModelArguments(
            model_name_or_path=model,
            dtype=dtype,  # type: ignore[arg-type]  # the request checks it
            lora_r=lora_r,
            lora_target_modules=targets or None,
        ),
        method=method,
        weights=weights,
        devices=devices,
        nodes=nodes,
        device_memory_bytes=plan_report.parse_bytes(device_memory, "device-memory"),
        tensor_ranks=tp_size,
        batch=Batch(rows, prompt, answer),
        rollout_rows=rollout,
    )
    library.check_profile(profile)
    found = library.plan(request)
    cluster = paper.Cluster(flops_per_s=tflops * 1e12, mfu=mfu, network_bytes_per_s=network * 1e9)
    efficiencies = paper.table(request, cluster) if scaling else []
    if as_json:
        on_paper = [asdict(row) | {"exposed": row.exposed, "overlapped": row.overlapped} for row in efficiencies]
        print(json.dumps(found.as_json() | ({"scaling": on_paper} if scaling else {}), indent=2))
        return
    print(plan_report.describe(found, request, profile))
    if scaling:
        print("\n" + paper.describe(efficiencies, cluster))
