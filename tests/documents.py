"""The project's Markdown: headings, links, blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

PROGRAMS = ("accelerate", "make", "pytest", "python", "sbatch", "srun", "yunque")
"""What starts a command of ours; paths of scripts do too."""

FOLDERS = ("bench", "compress", "launch", "recipes", "serve", "slurm", "tests")
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
_PATH = re.compile(
    rf"(?<![\w./-])(?:docs|src|{'|'.join(FOLDERS)})/[\w./-]*(?:\.(?:py|yaml|md|sh|json|sbatch)|/site\.env)\b"
)


@dataclass(frozen=True)
class Block:
    """A fenced or indented block: its language ("" where none is named), its text and its first line's number."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """A Markdown file, its blocks of code and what is left of it without them."""

    path: Path
    blocks: tuple[Block, ...]
    prose: str

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def anchors(self) -> set[str]:
        """What GitHub names the headings."""
        found: dict[str, int] = {}
        for heading in re.findall(r"^#+ +(.+?) *#*$", self.prose, re.MULTILINE):
            text = _LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
            if found[slug]:
                found[f"{slug}-{found[slug]}"] = 0
        return {*found, *re.findall(r'<a (?:id|name)="([^"]+)"', self.prose)}

    @property
    def links(self) -> list[str]:
        return _LINK.findall(_CODE.sub("", self.prose))

    @property
    def code(self) -> list[str]:
        """Code within lines of text."""
        return [" ".join(found[1].split()) for found in _CODE.findall(self.prose)]

    @property
    def paths(self) -> set[str]:
        """Files of the repository that the page names anywhere."""
        found = _PATH.findall(self.path.read_text(encoding="utf-8"))
        return {name for name in found if not re.search("[A-Z]{4}", name)}  # such as tests/ROOM/test_MODULE.py

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Where and the words of every command, in blocks and in lines of text."""
        found = []
        for block in self.blocks:
            if block.language in ("", "bash", "sh", "console"):
                found += [(f"{self.name}:{block.line}", line) for line in lines_of(block.text)]
        found += [(self.name, text) for text in self.code if " --" in text]
        parts = [(where, words) for where, line in found for words in split(line)]
        return [(where, words) for where, words in parts if words and starts_command(words[0])]


def starts_command(word: str) -> bool:
    """Whether a word is a program or a script of ours."""
    name = word.rpartition("/")[2]
    script = word.removeprefix("./").partition("/")[0] in FOLDERS and name.endswith((".py", ".sh"))
    return script or (name in PROGRAMS and (word == name or word.startswith(".venv/bin/")))


def lines_of(text: str) -> list[str]:
    """Lines of a block of commands, continued ones joined, without prompts."""
    return [line.strip().removeprefix("$ ") for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines() if line.strip()]


def split(line: str) -> list[list[str]]:
    """Words of each command of a line of shell, without variables set for it; none where it is not shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.commenters, lexer.whitespace_split = "#", True
    commands: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";&|"):
                commands.append([])
            elif commands[-1] or not _ASSIGNMENT.fullmatch(word):
                commands[-1].append(word.removesuffix("]") if word[0] != "[" else word[1:])  # [--optional VALUE]
    except ValueError:  # an apostrophe: a sentence
        return []
    return [words[: words.index(">")] if ">" in words else words for words in commands]


def read(path: Path) -> Page:
    """Take a page apart."""
    blocks: list[Block] = []
    prose: list[str] = []
    current: list[str] | None = None
    language, start, fence, former = "", 0, "", ""
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        marker = re.match(r" *(```+) *(\w*)", line)
        if fence:
            if line.strip() == fence:
                blocks.append(Block(language, "\n".join(current or ()), start))
                fence, current = "", None
            else:
                (current := current if current is not None else []).append(line)
        elif marker:
            if current is not None:  # an indented block ends here
                blocks.append(Block("", "\n".join(current), start))
            fence, language, start, current = marker[1], marker[2], number + 1, []
        elif line.startswith("    ") and (current is not None or not former.strip()):
            if current is None:
                start, current = number, []
            current.append(line[4:])
        elif current is not None and not line.strip():
            current.append("")
        else:
            if current is not None:
                blocks.append(Block("", "\n".join(current), start))
                current = None
            prose.append(line)
        if current is None or not fence:
            former = line
    if current is not None:
        blocks.append(Block("", "\n".join(current), start))
    return Page(path, tuple(blocks), "\n".join(prose))
