"""``yunque plan`` as typed; what it says is tested in tests/distributed/test_plan.py."""

import json

import pytest
import tiny

from yunque import cli


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    tiny.FAMILIES["llama"]().config.save_pretrained(tmp_path)

    def typed(*options):
        command = ["yunque", "plan", "--model_name_or_path", str(tmp_path), "--prompt_tokens", "12", *options]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return typed


def test_table_verdict_and_scaling(run):
    code, out, err = run("--method", "ppo", "--profile", "ddp", "--devices", "2", "--scaling")
    assert code == 0, err
    assert "ddp: fits; the largest batch is" in out
    assert "rule of the course" in out
    assert "scaling on paper" in out


def test_json_holds_every_layout(run):
    code, out, _ = run("--method", "qlora", "--devices", "2", "--json", "--device-memory", "24GB")
    assert code == 0
    found = {layout["profile"]: layout for layout in json.loads(out)["layouts"]}
    assert found["fsdp2"]["fits"]
    assert "nf4" in found["zero3"]["impossible"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--profile", "zero4"], "profile: there is no zero4; take cpu, ddp, fsdp2"),
        (["--device-memory", "plenty"], "device-memory: 'plenty' is no size"),
        (["--method", "sft"], "method: there is no sft"),
        (["--dtype", "int8"], "dtype: there is no int8"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path: "),
    ],
)
def test_bad_input_is_one_line(run, options, words):
    code, out, err = run(*options)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not out
