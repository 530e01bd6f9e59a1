"""The served models by name: loaded with their hashes checked, warmed up, swapped while requests run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from yunque.runtime.models import CausalModel, Classifier, Seq2SeqModel
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine import Engine
from yunque.serving.engine_settings import ClassifierSettings, EngineSettings
from yunque.serving.metrics import Metrics


@dataclass(frozen=True)
class Served:
    """A model that is ready: ``engine`` is an ``Engine`` or, for a classifier, a ``ClassifierEngine``."""

    name: str
    folder: Path
    manifest_sha256: str
    created: int  # seconds since 1970, when it was loaded
    model: Seq2SeqModel | CausalModel | Classifier
    engine: Engine | ClassifierEngine

    @property
    def kind(self) -> str:
        """``seq2seq``, ``causal`` or ``classifier``."""
        return self.model.spec.kind

    @property
    def generates(self) -> bool:
        """Whether it writes text."""
        return isinstance(self.engine, Engine)


class Registry:
    """Models by their served names; ``load`` and ``swap`` block: call them in a thread, not in the event loop."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        metrics: Metrics,
        engine_settings: EngineSettings | None = None,
        classifier_settings: ClassifierSettings | None = None,
        default: str | None = None,
    ) -> None:
        self.folders = dict(folders)
        self.metrics = metrics
        self.engine_settings = engine_settings or EngineSettings()
        self.classifier_settings = classifier_settings or ClassifierSettings()
        self.default = default

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, warm and not failed."""
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """Served names, in the order they were given."""
        return list(self.folders)

    def load(self) -> None:
        """Load and warm up all models; all or none.

        Raises:
            InputError: a folder that is missing, damaged or of no model; nothing stays loaded.
        """
        raise NotImplementedError

    def get(self, name: str | None = None) -> Served:
        """The model of a name, or the default one.

        Raises:
            UnknownModel: no such name.
        """
        raise NotImplementedError

    def swap(self, name: str, folder: Path | None = None) -> Served:
        """Load ``folder`` (None: the same folder again) beside the served model, warm it up, switch, drain the old.

        Requests on the old model finish there. Raises, and leaves the old one serving, when the new one cannot be
        loaded or is of another kind (a generator for a classifier).
        """
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """``Engine.drain`` for all models, at the same time."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop all engines and free all models."""
        raise NotImplementedError


class UnknownModel(Exception):
    """No model is served under this name."""

    def __init__(self, name: str, names: list[str]) -> None:
        super().__init__(f"model {name!r} is not served here; there are: {', '.join(names)}")
        self.name = name


def named_folders(values: list[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER`` (whose last part is the name) of the command line, in order.

    Raises:
        InputError: the same name twice, or an empty name or folder.
    """
    raise NotImplementedError
