"""Names of the quantization schemes, and which layer gets which of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from yunque.errors import InputError

TORCH_SCHEMES = ("bnb_nf4", "bnb_int8")
ONNX_SCHEMES = (
    "onnx_int8_dynamic",
    "onnx_int8_static",
    "onnx_int8_weights",
    "onnx_int4",
    "onnx_nf4",
)
SCHEMES = TORCH_SCHEMES + ONNX_SCHEMES

LayerKind = Literal["float32", "int8_dynamic", "int8_static", "int8_weights", "int4", "nf4"]
LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
BLOCK_SIZES: Mapping[str, tuple[int, ...]] = {
    "int8_weights": (16, 32, 64, 128, 256),
    "int4": (16, 32, 64, 128, 256),
    "nf4": (16, 32, 64, 128, 256),
}
"""What the kernels take, for the kinds that keep a scale per block of inputs."""
DEFAULT_BLOCK_SIZES: Mapping[str, int] = {"int8_weights": 128, "int4": 32, "nf4": 64}
_FORMAT = 1


@dataclass(frozen=True)
class LayerScheme:
    """How one layer of an ONNX graph keeps its weight and computes.

    "int8_dynamic", "int8_static": int8 weights with a scale per output, uint8 inputs whose scale is that of each call
    or ``input_range``. "int8_weights", "int4", "nf4": weights with a scale per block of ``block_size`` inputs;
    ``int8_inputs`` lets the first two multiply inputs that are int8 per row and block, as "nf4" cannot.

    Raises:
        InputError: an unknown kind, or a block size that its kernel does not take.
    """

    kind: LayerKind = "float32"
    block_size: int | None = None
    int8_inputs: bool = True
    input_range: tuple[float, float] | None = None  # of "int8_static", from calibration

    def __post_init__(self) -> None:
        """Check, and fill in the block size."""
        if self.kind not in LAYER_KINDS:
            raise InputError(f"kind: {self.kind!r} is no kind of layer; {', '.join(LAYER_KINDS)} are")
        sizes = BLOCK_SIZES.get(self.kind)
        if sizes is None:
            object.__setattr__(self, "block_size", None)
        elif self.block_size is None:
            object.__setattr__(self, "block_size", DEFAULT_BLOCK_SIZES[self.kind])
        elif self.block_size not in sizes:
            raise InputError(f"block_size: {self.block_size} is none of {', '.join(map(str, sizes))}")
        if self.input_range is not None:
            low, high = self.input_range
            object.__setattr__(self, "input_range", (float(low), float(high)))

    @property
    def is_quantized(self) -> bool:
        """Whether the layer is anything but float32."""
        return self.kind != "float32"

    def __str__(self) -> str:
        """For people: "int4 (block 32)"."""
        return self.kind + (f" (block {self.block_size})" if self.block_size else "")


FLOAT32 = LayerScheme()


def layer_scheme(scheme: str, *, block_size: int | None = None, weights_only: bool = False) -> LayerScheme:
    """What a scheme of ``ONNX_SCHEMES`` does to every layer.

    ``weights_only`` computes with float32 inputs, which for int8 means weights per block.

    Raises:
        InputError: no such scheme, or a block size that it does not take.
    """
    if scheme not in ONNX_SCHEMES:
        raise InputError(f"scheme: {scheme!r} makes no ONNX folder; {', '.join(ONNX_SCHEMES)} do")
    kind: Any = scheme.removeprefix("onnx_")
    if weights_only and kind in ("int8_dynamic", "int8_static"):
        kind = "int8_weights"
    return LayerScheme(kind, block_size, int8_inputs=not weights_only)


@dataclass(frozen=True)
class PrecisionPlan:
    """The scheme of every layer by its ONNX name, and of those it does not name.

    Names are those of ``yunque.export.quantized.quantizable_layers``.
    """

    default: LayerScheme = FLOAT32
    layers: Mapping[str, LayerScheme] = field(default_factory=dict)

    def scheme(self, name: str) -> LayerScheme:
        """The scheme of layer ``name``."""
        return self.layers.get(name, self.default)

    def with_layers(self, layers: Mapping[str, LayerScheme]) -> PrecisionPlan:
        """The same plan with other schemes for some layers."""
        return replace(self, layers={**self.layers, **layers})

    def as_dict(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return {
            "format": _FORMAT,
            "default": _as_dict(self.default),
            "layers": {name: _as_dict(scheme) for name, scheme in self.layers.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def read_plan(path: str | Path) -> PrecisionPlan:
    """Read what ``PrecisionPlan.save`` wrote, or a person.

    Raises:
        InputError: no such file, not JSON, unknown keys, kinds or block sizes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"plan: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"plan: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"plan: {path} is no plan of format {_FORMAT}; see docs/quantization.md")
    unknown = set(content) - {"format", "default", "layers"}
    layers = content.get("layers", {})
    if unknown or not isinstance(layers, dict):
        raise InputError(f"plan: {path}: {', '.join(sorted(unknown)) or 'layers'} is unknown or malformed")
    return PrecisionPlan(
        _from_dict(path, "default", content.get("default", {})),
        {name: _from_dict(path, name, scheme) for name, scheme in layers.items()},
    )


def _as_dict(scheme: LayerScheme) -> dict[str, Any]:
    blank = LayerScheme(scheme.kind)
    given = {name: value for name, value in asdict(scheme).items() if value != getattr(blank, name)}
    return {"kind": scheme.kind, **({"block_size": scheme.block_size} if scheme.block_size else {}), **given}


def _from_dict(path: str | Path, name: str, content: Any) -> LayerScheme:
    known = {field.name for field in fields(LayerScheme)}
    if not isinstance(content, dict) or not set(content) <= known:
        raise InputError(f"plan: {path}: {name}: gives {content!r}; known are {', '.join(sorted(known))}")
    try:
        return LayerScheme(**content)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"plan: {path}: {name}: {error}") from error
