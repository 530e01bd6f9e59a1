"""Put the top-level folders of scripts, configurations and launch profiles into the wheel, below ``yunque``."""

from pathlib import Path

from setuptools import find_packages, setup

PATTERNS = {
    "recipes": ["*.py", "configs/*.yaml", "constitutions/*"],
    "compress": ["*.py", "configs/*.yaml"],
    "launch": ["*.yaml"],
    "serve": ["*.*", "Dockerfile", "examples/*.*", "kubernetes/*.*"],
    "slurm": ["*.sh", "*.sbatch", "*.env"],
}
FOLDERS = [name for name in PATTERNS if Path(name).is_dir()]  # an image that only serves is built without them

setup(
    packages=[*find_packages("src"), *(f"yunque.{name}" for name in FOLDERS)],
    package_dir={"": "src"} | {f"yunque.{name}": name for name in FOLDERS},
    package_data={f"yunque.{name}": PATTERNS[name] for name in FOLDERS}
    | {"yunque": ["py.typed", "data/*.yaml", "evaluation/page/*", "serving/page/*"]},
)
