"""The whole search on a tiny model in which one layer bears no rounding, and what is refused."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from evaluating import ROOT, options
from warm import ON_CPU

from yunque import artifacts, runtime
from yunque.compression.mixed_arguments import KeepGateArguments, candidate_schemes
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.compression.schemes import LayerScheme, read_plan
from yunque.compression.sensitivity import Meter
from yunque.errors import CheckFailed, InputError
from yunque.evaluation.keep_gate import PLAN, PLOT, RESULT, SEARCH, keep_gate
from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.rl.rollout import generate

FRAGILE = "decoder.block.0.layer.2.DenseReluDense.wo"
ROUNDED, WHOLE = "onnx_int8_weights@16", "float32"
NUM_TOKENS = 6


def fragile_t5():
    """One neuron of each block of 16 speaks so softly, and is heard so loudly, that its block rounds to nothing else.

    The function is what it was: relu(x / c) c = relu(x).
    """
    model = tiny.t5(num_layers=1, num_decoder_layers=1)
    model = type(model)(model.config).eval()
    generator = torch.Generator().manual_seed(0)
    feed_forward = model.decoder.block[0].layer[2].DenseReluDense
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
        for neuron in (3, 19):
            feed_forward.wi.weight[neuron] /= 1e4
            feed_forward.wo.weight[:, neuron] *= 1e4
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, and prompts with the model's own answers as references."""
    root = tmp_path_factory.mktemp("keep_gate")
    model, tokenizer = fragile_t5(), tiny.tokenizer()

    def write(staging):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    artifacts.save_model_folder(root / "model", write, stage="ppo", parents=[], prompt_template="{text}")
    adapter, rng = adapter_for(model, tokenizer), torch.Generator().manual_seed(5)
    (root / "data").mkdir()
    for split in ("validation", "test"):
        prompts = [torch.randint(3, 64, (7,), generator=rng).tolist() for _ in range(40)]
        ended = [[*prompt, 1] for prompt in prompts]
        greedy = GenerationArguments(temperature=0.0, max_new_tokens=NUM_TOKENS)
        answers = generate(model, adapter, ended, greedy, seed=0, samples=range(40), device=torch.device("cpu"))
        lines = [
            json.dumps({"dialogue": tokenizer.decode(prompt), "summary": tokenizer.decode(answer.tokens)})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        (root / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield root
        torch.set_num_threads(threads)


def search(place, name, *, resume=False, overwrite_output_dir=False, **given):
    order = QuantizationArguments(
        model_name_or_path=str(place / "model"), scheme="mixed", output_dir=str(place / name), resume=resume,
        overwrite_output_dir=overwrite_output_dir,
    )  # fmt: skip
    chosen = {
        "keep_gate": ["rougeL>=-25", "length>=-4"], "candidates": [ROUNDED, WHOLE],
        "gate_dataset_name": str(place / "data"), "gate_max_new_tokens": NUM_TOKENS, "sensitivity_prompts": 24,
        "sensitivity_answers": 2,
    }  # fmt: skip
    return keep_gate(order, KeepGateArguments(**chosen | given))


def script(*arguments):
    """Run compress/quantize.py in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantize.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "compress" / "quantize.py"), run_name="__main__")
    return left.value.code


@pytest.fixture(scope="module")
def found(place):
    """A search from beginning to end, as a user starts it."""
    folder = place / "out"
    given = {
        "model_name_or_path": place / "model", "scheme": "mixed", "output_dir": folder, "keep_gate": ["rougeL>=-25"],
        "candidates": [ROUNDED, WHOLE], "gate_dataset_name": place / "data", "gate_max_new_tokens": NUM_TOKENS,
        "sensitivity_prompts": 24, "sensitivity_answers": 2,
    }  # fmt: skip
    assert script(*options(**given), "--keep_gate", "length>=-4") == 0
    manifest = artifacts.read_manifest(folder)
    return SimpleNamespace(folder=folder, manifest=manifest, report=json.loads((folder / RESULT).read_text()))


def test_only_the_fragile_layer_stays_whole(found):
    assert found.report["plan"].pop(FRAGILE) == WHOLE
    assert set(found.report["plan"].values()) == {ROUNDED}
    worst = max(found.report["layers"], key=lambda one: one["kl"]["mean"])
    assert worst["layer"] == FRAGILE
    assert worst["changed"] > 0.5 > max(one["changed"] for one in found.report["layers"] if one["layer"] != FRAGILE)


def test_the_folder_is_complete_and_runs(found):
    assert artifacts.verify(found.folder) == []
    assert {RESULT, PLAN, PLOT} <= found.manifest.files.keys()
    assert not (found.folder / SEARCH).exists()
    plan = read_plan(found.folder / PLAN)
    assert plan.scheme(FRAGILE) == LayerScheme()
    assert plan.as_dict() == found.manifest.config["plan"]
    assert found.manifest.prompt_template == "{text}"
    answers = runtime.load(found.folder).generate(["w5 w6 w7"], max_new_tokens=4)
    assert answers[0].tokens


def test_search_and_verdict_are_on_different_rows_and_both_told(found):
    plans = found.report["search"]["plans"]
    assert {one["split"] for one in plans} == {"validation"}
    assert {one["passed"] for one in plans} == {True, False}
    [verdict] = found.report["verdicts"]
    assert verdict["split"] == "test"
    assert verdict["passed"]
    gates = [one["gate"] for one in found.manifest.metrics["verdict"]["verdicts"]]
    assert gates == ["rougeL>=-25", "length>=-4"], "none is lost when the option is given twice"
    passing = [one["num_bytes"] for one in plans if one["passed"]]
    assert found.manifest.metrics["layer_bytes"] == min(passing)


def test_a_killed_search_goes_on_to_the_same_numbers(place, found, monkeypatch):
    whole, calls = Meter.damage, []

    def until_killed(meter, layers):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(meter, layers)

    monkeypatch.setattr(Meter, "damage", until_killed)
    with pytest.raises(KeyboardInterrupt):
        search(place, "killed")
    lines = place / "killed" / SEARCH / "sensitivity" / "rank-0000.jsonl"
    with lines.open("a") as file:
        file.write('{"batch": 5, "lay')  # what a kill leaves of a line
    assert not (place / "killed" / "yunque.json").exists()
    with pytest.raises(InputError, match=r"unfinished search.*--resume"):
        search(place, "killed")
    with pytest.raises(InputError, match="sensitivity_prompts"):
        search(place, "killed", resume=True, sensitivity_prompts=25)

    def counted(meter, layers):
        calls.append(len(layers))
        return whole(meter, layers)

    calls.clear()
    monkeypatch.setattr(Meter, "damage", counted)
    search(place, "killed", resume=True, most_plans=2)  # the cheapest, and the safest, which passes
    report = json.loads((place / "killed" / RESULT).read_text())
    assert calls.count(1) == len(report["layers"]) - 5
    assert report["layers"] == found.report["layers"]
    assert set(report["plan"].values()) == {WHOLE}
    assert not report["search"]["complete"]


def test_no_plan_passes_and_it_is_said_why(place):
    with pytest.raises(CheckFailed, match=r"no plan of .* passes on validation.*rougeL>=\+5"):
        search(place, "never", keep_gate=["rougeL>=+5"])
    assert not (place / "never" / "yunque.json").exists()
    report = json.loads((place / "never" / RESULT).read_text())
    assert report["plan"] is None
    assert not any(one["passed"] for one in report["search"]["plans"])
    assert len(report["search"]["plans"]) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_gate": []}, "keep_gate: scheme mixed needs"),
        ({"keep_gate": ["toxicity<0.2x"]}, "keep_gate: toxicity<0.2x"),
        ({"keep_gate": ["toxicity<=+0.01"]}, "keep_gate: toxicity.*toxicity_model_name_or_path"),
        ({"keep_gate": ["nonsense>=+1"]}, "have no nonsense; there are .*rougeL"),
        ({"keep_gate": ["recovery>=0.9"]}, "keep_gate: recovery"),
        ({"candidates": ["onnx_int4"]}, "candidates: give at least two"),
        ({"candidates": ["onnx_int4", "onnx_int3"]}, "onnx_int3 is unknown"),
        ({"candidates": ["float32", "onnx_int8_static"]}, "onnx_int8_static is unknown"),
        ({"candidates": ["onnx_int4@7", "float32"]}, "candidates: onnx_int4@7: block_size"),
        ({"search_split": "train"}, "no split 'train'"),
        ({"gate_dataset_name": None}, "gate_dataset_name"),
        ({"sensitivity_answers": 1}, "sensitivity_answers"),
    ],
)
def test_bad_input(place, given, message):
    with pytest.raises(InputError, match=message):
        search(place, "bad", overwrite_output_dir=True, **given)
    assert not (place / "bad" / "yunque.json").exists()


def test_gates_are_for_scheme_mixed_only(place, capsys):
    given = {"model_name_or_path": place / "model", "output_dir": place / "bad", "keep_gate": ["rougeL>=-1"]}
    assert script(*options(scheme="onnx_int4", **given)) == 2
    assert capsys.readouterr().err.startswith("error: keep_gate: is for scheme mixed")


def test_candidates_by_name():
    schemes = candidate_schemes(["onnx_int4@64", "onnx_int8_dynamic", "float32"])
    assert schemes["onnx_int4@64"] == LayerScheme("int4", 64)
    assert not schemes["float32"].is_quantized
    assert candidate_schemes(["onnx_int8_dynamic"], weights_only=True)["onnx_int8_dynamic"].kind == "int8_weights"
