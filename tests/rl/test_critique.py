"""The steps with a writer that says what it was asked: what each is made of, what an edit redoes."""

import json
from dataclasses import replace

import pytest

from yunque.errors import InputError, Stopped
from yunque.models.arguments import GenerationArguments
from yunque.rl.constitution import Constitution, Frames, Principle
from yunque.rl.critique import ConstitutionalData, RedTeamPrompt, load_prompts
from yunque.rl.feedback_arguments import FeedbackArguments

FRAMES = Frames(
    answer="A[{prompt}]",
    critique="C[{prompt};{answer};{request}]",
    revision="R[{prompt};{answer};{critique};{request}]",
    preference="{prompt}|{first}|{second}|{question}",
)
PRINCIPLES = (Principle("x", 1, "cx", "rx", "qx"), Principle("y", 2, "cy", "ry", "qy"))
CONSTITUTION = Constitution(PRINCIPLES, FRAMES, "hash")
PROMPTS = [RedTeamPrompt("1", "one"), RedTeamPrompt("2", "two"), RedTeamPrompt("3", "three")]


class Echo:
    """Answers with the number of its call and what it was asked; may stop after some texts, or find some too long."""

    identity = source = "echo"

    def __init__(self, stop_after=None, too_long="", constant=None):
        self.asked, self.judged = [], []
        self.stop_after, self.too_long, self.constant = stop_after, too_long, constant

    def write(self, requests, options):
        for place, request in reversed([*enumerate(requests)]):  # any order will do
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise Stopped("asked to")
            self.asked.append(request.prompt)
            short = request.prompt.startswith(self.too_long) if self.too_long else False
            yield place, None if short else self.constant or f"<{request.prompt[:1]}{request.stream % 10**6}>"

    def log_odds(self, prompts, max_new_tokens):
        self.judged += prompts
        return [1.0 if prompt.split("|")[1] > prompt.split("|")[2] else -1.0 for prompt in prompts]


@pytest.fixture
def data(tmp_path):
    def build(prompts=PROMPTS, constitution=CONSTITUTION, generation=None, **changed):
        args = FeedbackArguments(**({"num_revisions": 2} | changed))
        return ConstitutionalData(
            args, generation or GenerationArguments(max_new_tokens=9), constitution, prompts, tmp_path
        )

    return build


@pytest.fixture
def files(tmp_path):
    return lambda: {path.name: path.read_text() for path in sorted(tmp_path.glob("*.jsonl"))}


@pytest.fixture
def edit(tmp_path):
    def change(name, key, **fields):
        path = tmp_path / name
        records = [json.loads(line) for line in path.read_text().splitlines()]
        next(record for record in records if record["key"] == key).update(fields)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return change


def test_each_step_is_made_of_the_one_before(data, files):
    echo = Echo()
    rows, counts = data().revisions(echo)
    step = {name: [json.loads(line) for line in text.splitlines()] for name, text in files().items()}
    answer = step["answers.jsonl"][0]["answer"]
    first, second = step["critiques.jsonl"][0], step["critiques.jsonl"][3]
    revised, last = step["revisions.jsonl"][0], step["revisions.jsonl"][3]
    assert [first["key"], second["key"], revised["key"], last["key"]] == ["1/1", "1/2", "1/1", "1/2"]
    assert f"C[one;{answer};cx]" in echo.asked
    assert f"R[one;{answer};{first['critique']};rx]" in echo.asked
    assert f"C[one;{revised['revision']};cy]" in echo.asked
    assert f"R[one;{revised['revision']};{second['critique']};ry]" in echo.asked
    assert rows[0] == {"id": "1", "instruction": "one", "input": "", "output": last["revision"]}
    assert counts == {"answers": 3, "sft_rows": 3, "sft_dropped": 0, "share_revised": 1.0}


@pytest.mark.parametrize("stop_after", range(15))
def test_stopped_anywhere_and_resumed_it_is_the_unbroken_run(data, files, tmp_path, stop_after):
    with pytest.raises(Stopped):
        data().revisions(Echo(stop_after=stop_after))
    echo = Echo()
    rows, _ = data().revisions(echo)
    assert len(echo.asked) == 15 - stop_after
    resumed = files()
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    assert (data().revisions(Echo())[0], files()) == (rows, resumed)


def test_a_finished_step_is_not_done_again(data):
    data().revisions(Echo())
    echo = Echo()
    data().revisions(echo)
    assert echo.asked == []


def test_an_edited_line_is_kept_and_only_what_follows_from_it_redone(data, edit, files):
    data().revisions(Echo())
    edit("critiques.jsonl", "2/1", critique="it is EDITED")
    echo = Echo()
    data().revisions(echo)
    assert [prompt[:6] for prompt in echo.asked] == ["R[two;"]  # the echo's revision is what it was, so no more
    assert "it is EDITED" in files()["critiques.jsonl"]
    edit("answers.jsonl", "3", answer="EDITED too")
    echo = Echo()
    data().revisions(echo)
    assert [prompt[:8] for prompt in echo.asked] == ["C[three;", "R[three;"]
    assert files()["answers.jsonl"].count("EDITED too") == 1


def test_an_edited_last_revision_reaches_the_data(data, edit):
    data().revisions(Echo())
    edit("revisions.jsonl", "1/2", revision="by hand")
    assert data().revisions(Echo())[0][0]["output"] == "by hand"


@pytest.mark.parametrize(
    "changed",
    [
        {"generation": GenerationArguments(max_new_tokens=8)},
        {"seed": 1},
        {"constitution": replace(CONSTITUTION, frames=replace(FRAMES, answer="B[{prompt}]"))},
    ],
    ids=["generation", "seed", "frames"],
)
def test_other_settings_redo_all(data, changed):
    data().revisions(Echo())
    echo = Echo()
    data(**changed).revisions(echo)
    assert len([prompt for prompt in echo.asked if prompt[0] in "AB"]) == 3


def test_a_changed_principle_redoes_only_its_critiques(data):
    data().revisions(Echo())
    echo = Echo()
    changed = replace(CONSTITUTION, principles=(PRINCIPLES[0], replace(PRINCIPLES[1], critique_request="new")))
    data(constitution=changed).revisions(echo)
    assert {prompt[:1] for prompt in echo.asked} == {"C"}
    assert all(prompt.endswith("new]") for prompt in echo.asked)


def test_more_prompts_add_lines_only(data):
    data(prompts=PROMPTS[:2]).revisions(Echo())
    echo = Echo()
    data().revisions(echo)
    assert len(echo.asked) == 5


def test_a_prompt_too_long_for_a_step_is_left_out_and_may_be_filled_in_by_hand(data, edit, files):
    rows, counts = data().revisions(Echo(too_long="C[two"))
    assert [row["id"] for row in rows] == ["1", "3"]
    assert counts["sft_dropped"] == 1
    assert "longer than the model reads" in files()["critiques.jsonl"]
    edit("critiques.jsonl", "2/1", critique="by hand")
    assert len(data().revisions(Echo())[0]) == 3


def test_preferences_follow_the_judge(data, files):
    echo = Echo()
    rows, counts = data().preferences(echo, echo)
    assert counts["pairs"] == counts["pairs_judged"] == 3
    assert all(row["chosen"] > row["rejected"] for row in rows)
    assert [set(row) for row in rows] == [{"id", "prompt", "chosen", "rejected"}] * 3
    assert len(echo.judged) == 6  # both orders; the second principle is not needed
    judged = echo.judged.copy()
    data().preferences(echo, echo)
    assert echo.judged == judged


def test_a_judge_that_always_says_a_leaves_no_pair(data):
    class Biased(Echo):
        def log_odds(self, prompts, max_new_tokens):
            return [5.0] * len(prompts)

    rows, counts = data().preferences(Echo(), Biased())
    assert rows == []
    assert (counts["abstained"], counts["share_abstained"]) == (3, 1.0)


def test_equal_and_empty_answers_make_no_pair(data):
    assert data().preferences(Echo(constant="same"), Echo())[1]["pairs_equal"] == 3
    assert data(seed=1).preferences(Echo(constant=" "), Echo())[1]["pairs_empty"] == 3


def test_an_edited_verdict_turns_the_pair_and_a_strange_one_is_refused(data, edit):
    echo = Echo()
    rows, _ = data().preferences(echo, echo)
    before = rows[1]
    verdict = json.loads((data().folder / "judgements.jsonl").read_text().splitlines()[1])["preferred"]
    edit("judgements.jsonl", "2", preferred="b" if verdict == "a" else "a")
    after = data().preferences(echo, echo)[0][1]
    assert (after["chosen"], after["rejected"]) == (before["rejected"], before["chosen"])
    edit("judgements.jsonl", "2", preferred="c")
    with pytest.raises(InputError, match="key 2: preferred is 'c'"):
        data().preferences(echo, echo)


def test_an_edited_candidate_is_judged_again(data, edit):
    data().preferences(Echo(), Echo())
    edit("candidates.jsonl", "1/a", answer="zzz")
    echo = Echo()
    rows, _ = data().preferences(echo, echo)
    assert rows[0]["chosen"] == "zzz"
    assert len(echo.judged) == 2
    assert echo.asked == []


def test_more_rounds_than_principles_are_refused(data):
    with pytest.raises(InputError, match="num_revisions: 3 rounds, but the constitution has 2 principles"):
        data(num_revisions=3)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}], {}, "have the id '1'"),
        ([{"text": "x"}], {}, "prompt_column: no column 'prompt'"),
        ([{"prompt": " "}], {}, "none of the 1 rows"),
        ([{"prompt": ["x"]}], {}, "holds a list"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, rows, options, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=words):
        load_prompts(FeedbackArguments(dataset_name=str(path), **options))


def test_prompts_have_their_id_or_their_row_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"q": "x"}\n{"q": null}\n{"q": "y", "id": "mine"}\n{"q": "z"}\n')
    prompts, source = load_prompts(FeedbackArguments(dataset_name=str(path), prompt_column="q", max_prompts=2))
    assert prompts == [RedTeamPrompt("1", "x"), RedTeamPrompt("mine", "y")]
    assert source["rows"] == 2
