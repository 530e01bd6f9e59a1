"""Memory and compute of a training run on GPUs, from a model's configuration alone: ``yunque plan``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from yunque.distributed.layouts import Task, Weights, refusal
from yunque.distributed.plan_layouts import (
    AUTOCAST,
    PROFILES,
    SHARDED,
    TENSOR_PARALLEL,
    ZERO,
    ZERO3,
    Held,
    Layout,
    held,
)
from yunque.distributed.plan_model import Batch, Engine, Weight, build, part_of, read_config, saved_bytes, weights_of
from yunque.errors import InputError
from yunque.models.arguments import ModelArguments

METHODS: dict[str, tuple[Task, str | None]] = {
    "full": ("finetune", "full"),
    "lora": ("finetune", "lora"),
    "qlora": ("finetune", "qlora"),
    "dpo": ("preferences", None),
    "ppo": ("rl", None),
    "grpo": ("rl", None),
}
"""What each method trains; None where ``--weights`` says on which weights."""

USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is CUDA's context, kernels' workspace and fragmentation."""

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022, table 3
_FLOPS_PER_PARAMETER_AND_TOKEN = 6  # Kaplan et al., 2020, section 2.1
_PETAFLOP_DAY = 1e15 * 24 * 3600
_TRACED_LAYERS = 6
"""Layers of a deep model to trace: a multiple of the periods, 1 to 6, in which architectures vary their layers."""
_COURSE_WEIGHTS, _COURSE_TRAINING = 4, 20
_BFLOAT16, _FLOAT32 = 2, 4


@dataclass
class Request:
    """What is to be trained, how, and on what; the batch is a device's forward pass."""

    model: ModelArguments
    method: str = "full"
    weights: str = "lora"
    devices: int = 1
    nodes: int = 1
    device_memory_bytes: int = 80 * 2**30
    tensor_ranks: int | None = None
    batch: Batch = field(default_factory=lambda: Batch(8, 512, 128))
    rollout_rows: int = 16
    zero3_persistent: int | None = None

    def __post_init__(self) -> None:
        """Check names and ranges, and let the method decide how weights are held."""
        if self.method not in METHODS:
            raise InputError(f"method: there is no {self.method}; take {', '.join(METHODS)}")
        if self.model.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: there is no {self.model.dtype}; take float32 or bfloat16")
        self.weights = METHODS[self.method][1] or self.weights
        if self.weights not in ("full", "lora", "qlora"):
            raise InputError(f"weights: there is no {self.weights}; take full, lora or qlora")
        for name, value in {
            "devices": self.devices, "nodes": self.nodes, "per_device_train_batch_size": self.batch.rows,
            "prompt_tokens": self.batch.prompt_tokens, "rollout_batch_size": self.rollout_rows,
        }.items():  # fmt: skip
            if value < 1:
                raise InputError(f"{name}: {value} is too small; give 1 or more")
        if self.batch.answer_tokens < 2:
            raise InputError(f"answer_tokens: {self.batch.answer_tokens} leaves no answer; give 2 or more")
        if self.devices % self.nodes:
            raise InputError(f"devices: {self.devices} do not divide over {self.nodes} nodes; give a multiple")
        if self.tensor_ranks is not None and (self.tensor_ranks < 1 or self.devices % self.tensor_ranks):
            raise InputError(f"tp_size: {self.devices} devices do not divide by {self.tensor_ranks}")
        quantized = self.weights == "qlora"
        self.model = replace(self.model, use_peft=self.weights != "full", load_in_4bit=quantized)

    @property
    def task(self) -> Task:
        """Which trainer it is."""
        return METHODS[self.method][0]


@dataclass(frozen=True)
class LayoutPlan:
    """Bytes of one device under a profile, or why the method does not run under it."""

    profile: str
    impossible: str | None = None
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    value_head: int = 0
    reference: int = 0
    buffers: int = 0
    activations: int = 0
    activations_checkpointed: int = 0
    logits: int = 0
    rollout_weights: int = 0
    kv_cache: int = 0
    host: int = 0
    total: int = 0
    total_checkpointed: int = 0
    fits: bool = False
    fits_checkpointed: bool = False
    largest_batch: int = 0
    largest_batch_checkpointed: int = 0


@dataclass(frozen=True)
class Plan:
    """All layouts of a request, and what its model would cost to train from nothing."""

    model: str
    method: str
    parameters: int
    trained: int
    course_weights_bytes: int
    course_training_bytes: int
    chinchilla_tokens: int
    chinchilla_flops: float
    chinchilla_petaflop_days: float
    petaflop_days_per_billion_tokens: float
    layouts: list[LayoutPlan]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def of(self, profile: str) -> LayoutPlan:
        """The layout of one profile."""
        return next(layout for layout in self.layouts if layout.profile == profile)


def plan(request: Request, profiles: tuple[str, ...] = PROFILES) -> Plan:
    """Plan ``request`` under each of ``profiles``; nothing but the model's configuration is read.

    Raises:
        InputError: no such model, profile, or LoRA target.
    """
    for profile in profiles:
        check_profile(profile)
    model = _Model(request)
    base = sum(weight.count for weight in model.policy_weights if "lora_" not in weight.name)
    flops = _FLOPS_PER_PARAMETER_AND_TOKEN * base
    tokens = TOKENS_PER_PARAMETER * base
    return Plan(
        model=request.model.model_name_or_path or "",
        method=request.method if METHODS[request.method][1] else f"{request.method} on {request.weights} weights",
        parameters=base,
        trained=sum(weight.count for weight in model.weights if weight.trains),
        course_weights_bytes=_COURSE_WEIGHTS * base,
        course_training_bytes=(_COURSE_WEIGHTS + _COURSE_TRAINING) * base,
        chinchilla_tokens=tokens,
        chinchilla_flops=float(flops) * tokens,
        chinchilla_petaflop_days=flops * tokens / _PETAFLOP_DAY,
        petaflop_days_per_billion_tokens=flops * 1e9 / _PETAFLOP_DAY,
        layouts=[_layout_plan(profile, request, model) for profile in profiles],
    )


def check_profile(profile: str | None) -> None:
    """Refuse a name that no file in ``launch/`` has.

    Raises:
        InputError: it is not one of the profiles.
    """
    if profile is not None and profile not in PROFILES:
        raise InputError(f"profile: there is no {profile}; take {', '.join(PROFILES)}")


class _Model:
    """The model on the meta device and what has been traced of it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.config = read_config(request.model)
        self.model = build(self.config, request.model)
        value_head = request.method == "ppo"
        self.weights = weights_of(self.model, request.model, value_head=value_head)
        self.head_weights = [weight for weight in self.weights if weight.name.startswith("v_head.")]
        self.policy_weights: list[Weight] = [weight for weight in self.weights if weight not in self.head_weights]
        base = self.model.get_base_model() if request.model.use_peft else self.model
        self.tensor_plan: dict[str, str] = getattr(base, "tp_plan", None) or {}
        self._traced: dict[Any, int] = {}
        self._built: dict[tuple[int, int], Any] = {}

    def activations(self, engine: Engine, rows: int, ranks: int, *, checkpointing: bool) -> int:
        """Bytes saved by a forward pass of ``rows``: traced on 1 and 2 rows, from which more follow."""
        one, two = (self._trace(engine, count, ranks, checkpointing) for count in (1, 2))
        return one + (rows - 1) * (two - one)

    def _trace(self, engine: Engine, rows: int, ranks: int, checkpointing: bool) -> int:
        if self.request.weights == "full":
            engine = replace(engine, zero3=False)  # which differs only where a weight is frozen
        key = (engine, rows, ranks, checkpointing)
        if key not in self._traced:
            depth = self.config.num_hidden_layers
            if depth <= 2 * _TRACED_LAYERS or getattr(self.config, "num_decoder_layers", depth) != depth:
                self._traced[key] = self._saved(depth, *key)
            else:  # every further layer, or period of layers, saves the same
                few, more = (self._saved(layers, *key) for layers in (_TRACED_LAYERS, 2 * _TRACED_LAYERS))
                self._traced[key] = few + (depth - _TRACED_LAYERS) * (more - few) // _TRACED_LAYERS
        return self._traced[key]

    def _saved(self, layers: int, engine: Engine, rows: int, ranks: int, checkpointing: bool) -> int:
        shape = (layers, ranks)
        if shape not in self._built:
            whole = ranks == 1 and layers == self.config.num_hidden_layers
            part = part_of(self.config, layers, ranks)
            self._built[shape] = self.model if whole else build(part, self.request.model)
        batch = replace(self.request.batch, rows=rows)
        return saved_bytes(self._built[shape], self.request.task, batch, engine, checkpointing=checkpointing)


def _layout_plan(profile: str, request: Request, model: _Model) -> LayoutPlan:
    if reason := _impossible(profile, request, model):
        return LayoutPlan(profile, impossible=reason)
    layout = _layout(profile, request)
    sizes = held(model.policy_weights, layout, model.tensor_plan)
    value_head = _sum(held(model.head_weights, layout))
    reference = _reference(request, model, layout)
    twin, cache = _rollout(request, model, layout)
    logits = _logits_row(request, model)
    static = sizes.weights + sizes.gradients + sizes.optimizer + value_head + reference
    limit = int(USABLE * request.device_memory_bytes)

    def training(rows: int, again: bool) -> int:
        """What comes and goes in an update of ``rows``."""
        saved = model.activations(_engine(profile), rows, layout.tensor_ranks, checkpointing=again)
        return sizes.buffers + saved + logits * rows

    def total(again: bool) -> int:
        """Training and rollouts take turns: the larger of the two counts."""
        return static + max(training(request.batch.rows, again), twin + cache)

    def largest(again: bool) -> int:
        first = static + training(1, again)
        if max(first, static + twin + cache) > limit:
            return 0
        return 1 + (limit - first) // max(1, training(2, again) - training(1, again))

    return LayoutPlan(
        profile,
        weights=sizes.weights,
        gradients=sizes.gradients,
        optimizer=sizes.optimizer,
        value_head=value_head,
        reference=reference,
        buffers=sizes.buffers,
        activations=training(request.batch.rows, False) - sizes.buffers - logits * request.batch.rows,
        activations_checkpointed=training(request.batch.rows, True) - sizes.buffers - logits * request.batch.rows,
        logits=logits * request.batch.rows,
        rollout_weights=twin,
        kv_cache=cache,
        host=sizes.host,
        total=total(False),
        total_checkpointed=total(True),
        fits=total(False) <= limit,
        fits_checkpointed=total(True) <= limit,
        largest_batch=largest(False),
        largest_batch_checkpointed=largest(True),
    )


def _sum(part: Held) -> int:
    return part.weights + part.gradients + part.optimizer


def _impossible(profile: str, request: Request, model: _Model) -> str | None:
    weights: Weights = "full" if request.weights == "full" else "qlora" if request.weights == "qlora" else "lora"
    if reason := refusal(profile, request.task, weights):
        return reason
    if profile == "cpu" and request.devices > 1:
        return "one process; take ddp"
    if profile in TENSOR_PARALLEL and not model.tensor_plan:
        return f"transformers has no tensor-parallel plan for {model.config.model_type}; take fsdp2"
    if profile in TENSOR_PARALLEL:
        ranks = _layout(profile, request).tensor_ranks
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        if heads % ranks:
            return f"{heads} key-value heads do not divide over {ranks} devices; give another tp_size"
    return None


def _layout(profile: str, request: Request) -> Layout:
    ranks = 1
    if profile in TENSOR_PARALLEL:
        within = request.devices // request.nodes
        ranks = request.tensor_ranks or (request.devices if profile == "tp" else min(2, within))
    stored = _BFLOAT16 if request.model.dtype == "bfloat16" or request.model.load_in_4bit else _FLOAT32
    layout = Layout(profile, request.devices, ranks, weight_bytes=stored)
    return layout if request.zero3_persistent is None else replace(layout, persistent=request.zero3_persistent)


def _engine(profile: str) -> Engine:
    precision: Literal["float32", "autocast", "bfloat16"] = "bfloat16"
    if profile == "cpu":
        precision = "float32"
    elif profile in AUTOCAST:
        precision = "autocast"
    return Engine(precision, zero3=profile in ZERO3)


def _logits_row(request: Request, model: _Model) -> int:
    """Bytes of logits beside those saved, per row: only fine-tuning an encoder-decoder makes those of a whole batch.

    There they exist in bf16 and in float32 while the loss is taken; elsewhere a chunk at a time is made.
    """
    if request.task != "finetune" or not model.config.is_encoder_decoder:
        return 0
    return request.batch.answer_tokens * model.config.vocab_size * (_BFLOAT16 + _FLOAT32)


def _reference(request: Request, model: _Model, layout: Layout) -> int:
    """Bytes of a frozen copy of the policy: none where it is the same weights with the adapter off."""
    if request.task == "finetune" or request.weights != "full":
        return 0
    frozen = [replace(weight, trains=False) for weight in model.policy_weights]
    if layout.profile in SHARDED:
        return sum(_BFLOAT16 * -(-weight.count // layout.data_ranks) for weight in frozen)
    if layout.profile in ZERO:
        return sum(layout.weight_bytes * weight.count for weight in frozen)
    return held(frozen, layout, model.tensor_plan).weights


def _rollout(request: Request, model: _Model, layout: Layout) -> tuple[int, int]:
    """Bytes of the whole weights that sharded profiles gather for rollouts, and of the cache of the rollout's rows."""
    if request.task != "rl":
        return 0, 0
    whole = replace(layout, profile="zero2", devices=1, tensor_ranks=1)
    twin = held(model.weights, whole).weights if layout.profile in (*SHARDED, *TENSOR_PARALLEL) else 0
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = (
        getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // text.num_attention_heads
    )
    # T5 and kin keep the prompt's cross-attention keys and values beside the answer's own: the same length in all
    tokens = request.batch.prompt_tokens + request.batch.answer_tokens
    return twin, 2 * layers * heads * size * tokens * request.rollout_rows * _BFLOAT16
