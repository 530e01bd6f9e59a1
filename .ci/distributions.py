"""Whether wheel and source distribution hold what they must and nothing else: distributions.py FOLDER."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(r"PKG-INFO|MANIFEST\.in|setup\.cfg|src/yunque\.egg-info/.*")  # by setuptools, or for it

(wheel,), (source,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
FOLDERS = ("recipes", "compress", "launch", "serve", "slurm")  # of setup.py
listing = ["git", "ls-files", "src/yunque", *FOLDERS]
tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
tracked = [name for name in tracked if not name.endswith("README.md")]
wanted = {name.removeprefix("src/") if name.startswith("src/") else f"yunque/{name}" for name in tracked}
held = set(zipfile.ZipFile(wheel).namelist())
package = {name for name in held if not name.partition("/")[0].endswith(".dist-info")}
if missing := wanted - held:
    sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
if strange := package - wanted:
    sys.exit(f"{wheel.name} holds {', '.join(sorted(strange))}")
if not any(name.endswith("/licenses/LICENSE") for name in held):
    sys.exit(f"{wheel.name} has no licence")
citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
if citation is None or citation[1] != wheel.name.split("-")[1]:
    sys.exit(f"CITATION.cff does not name the version of {wheel.name}")
with tarfile.open(source) as archive:
    names = {member.name.partition("/")[2] for member in archive if member.isfile()}
wanted = {*tracked, "LICENSE", "README.md", "pyproject.toml", "setup.py"}
if missing := wanted - names:
    sys.exit(f"{source.name} lacks {', '.join(sorted(missing))}")
if strange := {name for name in names - wanted if not GENERATED.match(name)}:
    sys.exit(f"{source.name} holds {', '.join(sorted(strange))}")
print(f"{wheel.name}: {len(package)} files of the package, each tracked; {source.name}: the same")
