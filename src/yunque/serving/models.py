"""The served models by name: loaded with their hashes checked, warmed up, swapped while requests run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from yunque import artifacts
from yunque.errors import InputError
from yunque.runtime.models import CausalModel, Classifier, Seq2SeqModel, load
from yunque.serving import machine
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine import Engine
from yunque.serving.engine_settings import ClassifierSettings, EngineSettings
from yunque.serving.metrics import EngineMetrics, Metrics

_GRACE_S = 2.0
"""A model that was swapped out still takes requests for so long: somebody may have got it just before."""
_DRAIN_S = 600.0
"""So long may requests on a model that was swapped out go on."""

log = logging.getLogger("yunque.serving")


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


class UnknownModel(Exception):
    """No model is served under this name."""

    def __init__(self, name: str, names: list[str]) -> None:
        super().__init__(f"model {name!r} is not served here; there are: {', '.join(names)}")
        self.name = name


class Registry:
    """Models by their served names; ``load``, ``swap``, ``drain`` and ``close`` block: not in the event loop."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        metrics: Metrics,
        engine_settings: EngineSettings | None = None,
        classifier_settings: ClassifierSettings | None = None,
        default: str | None = None,
    ) -> None:
        """Take the names; nothing is loaded yet. The default model is ``default``, or the first that generates."""
        self.folders = dict(folders)
        self.metrics = metrics
        self.engine_settings = engine_settings or EngineSettings()
        self.classifier_settings = classifier_settings or ClassifierSettings()
        if not folders:
            raise InputError("model: give at least one folder to serve")
        if default is not None and default not in folders:
            raise InputError(f"default_model: {default!r} is not served; there are: {', '.join(folders)}")
        self.default = default
        self._served: dict[str, Served] = {}
        self._swapping = threading.Lock()
        self._retiring: list[threading.Thread] = []

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, warm and not failed."""
        return bool(self._served) and all(served.engine.healthy for served in self._served.values())

    @property
    def names(self) -> list[str]:
        """Served names, in the order they were given."""
        return list(self.folders)

    def load(self) -> None:
        """Load and warm up all models; all or none.

        Raises:
            InputError: a folder that is missing, damaged or of no model; nothing stays loaded.
        """
        served: dict[str, Served] = {}
        try:
            for name, folder in self.folders.items():
                served[name] = self._open(name, folder)
        except BaseException:
            for one in served.values():
                one.engine.close()
            raise
        for one in served.values():
            self._announce(one)
        if self.default is None:
            self.default = next((name for name, one in served.items() if one.generates), next(iter(served)))
        self._served = served

    def get(self, name: str | None = None) -> Served:
        """The model of a name, or the default one.

        Raises:
            UnknownModel: no such name.
        """
        wanted = name or self.default or ""
        found = self._served.get(wanted)
        if found is None:
            raise UnknownModel(wanted, self.names)
        return found

    def swap(self, name: str, folder: Path | None = None) -> Served:
        """Load ``folder`` (None: the same folder again) beside the served model, warm it up, switch, drain the old.

        Requests on the old model finish there, in the background; then its memory is freed. One swap at a time.

        Raises:
            UnknownModel: no such name.
            InputError: the new model cannot be loaded, or is a generator for a classifier or the reverse; the old one
                goes on serving.
        """
        with self._swapping:
            old = self.get(name)
            try:
                new = self._open(name, folder or old.folder)
                if new.generates != old.generates:
                    new.engine.close()
                    raise InputError(f"{new.folder}: is a {new.kind} model, {name!r} serves a {old.kind} one")
            except BaseException:
                self.metrics.swaps.labels(name, "failed").inc()
                raise
            self._served = {**self._served, name: new}
            self.folders[name] = new.folder
            self.metrics.swaps.labels(name, "done").inc()
            self._withdraw(old)
            self._announce(new)
            thread = threading.Thread(target=_retire, args=(old.engine,), name=f"retire-{name}", daemon=True)
            thread.start()
            self._retiring = [other for other in self._retiring if other.is_alive()] + [thread]
            return new

    def drain(self, timeout_s: float) -> bool:
        """``Engine.drain`` for all models, at the same time; those that were swapped out too."""
        end = time.monotonic() + timeout_s
        engines = [served.engine for served in self._served.values()]
        if not engines:
            return True
        with ThreadPoolExecutor(len(engines)) as pool:
            done = all(list(pool.map(lambda engine: engine.drain(timeout_s), engines)))
        for thread in self._retiring:
            thread.join(max(0.0, end - time.monotonic()))
        return done and not any(thread.is_alive() for thread in self._retiring)

    def close(self) -> None:
        """Stop all engines and free all models."""
        served, self._served = self._served, {}
        for one in served.values():
            self._withdraw(one)
            one.engine.close()
        del served
        machine.give_back()

    # --- one model ----------------------------------------------------------------------------------------------------

    def _open(self, name: str, folder: Path) -> Served:
        """A model, loaded and warm."""
        threads = self.engine_settings.threads or machine.cores()
        model = load(folder, threads=threads)
        metrics = EngineMetrics(self.metrics, name)
        engine: Engine | ClassifierEngine
        if isinstance(model, Classifier):
            engine = ClassifierEngine(model, self.classifier_settings, metrics)
        else:
            engine = Engine(model, self._shared(), metrics)
        engine.start()
        sha256 = artifacts.sha256_file(folder / artifacts.MANIFEST)
        return Served(name, folder, sha256, int(time.time()), model, engine)

    def _shared(self) -> EngineSettings:
        """The engines' settings, where several share the free memory."""
        settings = self.engine_settings
        if settings.memory_budget_bytes is not None:
            return settings
        return replace(settings, memory_share=settings.memory_share / len(self.folders))

    def _announce(self, served: Served) -> None:
        self.metrics.info.labels(served.name, served.kind, served.manifest_sha256).set(1)

    def _withdraw(self, served: Served) -> None:
        self.metrics.info.remove(served.name, served.kind, served.manifest_sha256)


def _retire(engine: Engine | ClassifierEngine) -> None:
    """Let an engine finish what it has, then free it."""
    time.sleep(_GRACE_S)
    if not engine.drain(_DRAIN_S):
        log.warning("requests on a model that was swapped out took longer than %.0f s and were cancelled", _DRAIN_S)
    engine.close()
    del engine
    machine.give_back()


def named_folders(values: list[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER`` (whose last part is the name) of the command line, in order.

    Raises:
        InputError: the same name twice, or an empty name or folder.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals:
            name, folder = Path(value).resolve().name, value
        if not name or not folder:
            raise InputError(f"model: {value!r} is not NAME=FOLDER or FOLDER")
        if name in folders:
            raise InputError(f"model: the name {name!r} is given twice; write NAME=FOLDER with another name")
        folders[name] = Path(folder)
    return folders
