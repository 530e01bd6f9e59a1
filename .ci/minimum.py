"""Constraints to the lowest versions that pyproject.toml allows: minimum.py [EXTRA ...]."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for extra in (None, *sys.argv[1:]):
    for requirement in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        if found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement):
            print(f"{found[1]}=={found[2]}")
