"""The reference pages are what the code says now."""

import generate_reference
import pytest


@pytest.fixture(scope="module")
def pages():
    return generate_reference.pages()


def test_pages_are_what_the_code_says(pages):
    folder = generate_reference.FOLDER
    committed = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    stale = sorted(name for name in pages.keys() | committed.keys() if pages.get(name) != committed.get(name))
    assert not stale, f"docs/reference: {', '.join(stale)} not what the code says; run `make docs` and commit"


@pytest.mark.parametrize(
    ("page", "row"),
    [
        ("configurations.md", "| `kl_placement` | `reward` `loss` | `reward` |"),  # a choice
        ("configurations.md", "| `lora_target_modules` | list of text |  |"),  # unset
        (
            "configurations.md",
            "| `num_generations` | integer | `4` | Responses sampled per prompt. |",
        ),  # its base's words
        ("command_line.md", "| `--json` | switch | off |"),  # a name of its own
        ("command_line.md", "| `--gate` | list of text |"),
        ("command_line.md", "| `max_rows` | integer |  |"),  # of the server
        ("command_line.md", "| `--set` | NAME=VALUE |"),  # of a script with a parser of its own
        ("http_api.md", "| `n` | integer (at least 1, at most 32) |"),  # a limit of the settings
        ("http_api.md", "## POST /admin/swap"),  # only there with admin keys
        ("launch_profiles.md", "| `deepspeed_config.zero_stage` |  |  |  |  |  | `1` | `2` | `3` | `3` |"),
        ("manifest.md", "| `created` | text | ISO 8601, UTC |"),
    ],
)
def test_what_pages_say(pages, page, row):
    assert row in pages[page]
