"""What all routes share: the models, the keys, the state of the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Literal

from prometheus_client import Counter

from yunque import artifacts
from yunque.errors import InputError
from yunque.serving import logs
from yunque.serving.chat import ChatFormat, read_chat_format
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine_settings import ClassifierSettings, EngineSettings, GuardSettings
from yunque.serving.guard import Guard
from yunque.serving.metrics import Metrics
from yunque.serving.models import Registry, Served, UnknownModel
from yunque.serving.problems import Problem
from yunque.serving.security import KeyRing, read_keys
from yunque.serving.settings import ADMIN_KEYS, API_KEYS, ServerSettings

GUARD = "guard"
"""The name that the guard's classifier is served under."""


class Service:
    """One server's models and keys.

    Raises:
        InputError: a key file that cannot be used, or a model called as the guard.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.responses = Counter(
            "yunque_http_responses", "Answers, by route and status.", ["route", "status"],
            registry=self.metrics.registry,
        )  # fmt: skip
        self.read_keys(settings)
        folders = dict(settings.models)
        self.guard_settings: GuardSettings | None = None
        if settings.guard_folder is not None:
            if GUARD in folders:
                raise InputError(f"models: {GUARD} is the name of --guard_folder's classifier; take another")
            folders[GUARD] = settings.guard_folder
            self.guard_settings = GuardSettings(
                action=settings.guard_action,
                label=settings.guard_label,
                threshold=settings.guard_threshold,
                release=settings.guard_release,
            )
        self.registry = Registry(
            folders,
            self.metrics,
            EngineSettings(
                threads=settings.threads,
                max_rows=settings.max_rows,
                max_queued=settings.max_queued,
                prefill_tokens=settings.prefill_tokens,
                memory_budget_bytes=settings.memory_budget_bytes,
                memory_share=settings.memory_share,
                deadline_s=settings.timeout_s,
            ),
            ClassifierSettings(threads=settings.threads, deadline_s=settings.timeout_s),
        )
        self.draining = False
        self.active = 0  # requests that were let in and are not answered yet
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._swapping = threading.Lock()
        self._formats: dict[str, ChatFormat | None] = {}  # by manifest

    @property
    def status(self) -> Literal["loading", "ready", "draining"]:
        """What ``/ready`` tells."""
        if self.draining:
            return "draining"
        return "ready" if self.registry.ready else "loading"

    def read_keys(self, settings: ServerSettings) -> None:
        """Read the keys, at the start and again when asked to.

        Raises:
            InputError: a key file that cannot be used.
        """
        api = read_keys(settings.api_key_file, API_KEYS, "api_key_file")
        admin = read_keys(settings.admin_key_file, ADMIN_KEYS, "admin_key_file")
        self.api_keys, self.admin_keys = KeyRing(api), KeyRing(admin)

    def start_loading(self) -> None:
        """Load and warm up the models in a thread, so that probes are answered meanwhile."""
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                self.registry.load()
                for name in self.registry.names:
                    self.chat_format(self.registry.get(name))
                self.guard()
            except BaseException as error:
                self.failure = error
                loop.call_soon_threadsafe(self.on_failure)
            else:
                logs.event(
                    "ready", models={name: self.registry.get(name).manifest_sha256 for name in self.registry.names}
                )

        threading.Thread(target=load, name="load", daemon=True).start()

    def check_ready(self) -> None:
        """Check that the models are there.

        Raises:
            Problem: 503, still loading.
        """
        if not self.registry.ready:
            raise Problem(503, "the models are still being loaded", code="loading", headers={"Retry-After": "1"})

    def model(self, name: str | None, *, generates: bool) -> Served:
        """The served model of a name; the first that writes text, or the first that labels, when None.

        Raises:
            Problem: 404, no such model, or one of the other kind; 503, still loading.
        """
        self.check_ready()
        if name is None:
            every = (self.registry.get(each) for each in self.registry.names)
            served = next((each for each in every if each.generates == generates), None)
            if served is None:
                kind = "writes text" if generates else "labels texts"
                raise Problem(404, f"model: none is served here that {kind}", param="model", code="model_not_found")
            return served
        try:
            served = self.registry.get(name)
        except UnknownModel as error:
            raise Problem(404, str(error), param="model", code="model_not_found") from error
        if served.generates != generates:
            hint = "is a classifier; use /classify" if served.kind == "classifier" else "writes text; use /generate"
            raise Problem(404, f"model: {name} {hint}", param="model", code="wrong_kind_of_model")
        return served

    def chat_format(self, served: Served) -> ChatFormat | None:
        """How a model's chats become prompts; None where it takes none."""
        key = served.manifest_sha256
        if key not in self._formats:
            self._formats[key] = (
                read_chat_format(served.folder, self.settings.chat_template) if served.generates else None
            )
        return self._formats[key]

    def guard(self) -> Guard | None:
        """The guard, if there is one, with its classifier of now."""
        if self.guard_settings is None:
            return None
        engine = self.registry.get(GUARD).engine
        assert isinstance(engine, ClassifierEngine)
        return Guard(engine, self.guard_settings)

    # --- changing models while they serve -----------------------------------------------------------------------------

    def swap(self, name: str, folder: str | None) -> Served:
        """Serve ``name`` from the configured folder called ``folder`` (None: its own, read again); blocks.

        Raises:
            Problem: 404, no such model or folder; 409, another swap runs, or the folder cannot be served.
        """
        own = {**self.settings.models, **({GUARD: self.settings.guard_folder} if self.settings.guard_folder else {})}
        if name not in own:
            raise Problem(404, f"model: {name} is not served here", param="model", code="model_not_found")
        if folder is not None and folder not in self.settings.folders:
            raise Problem(404, "folder: is not among the configured ones", param="folder", code="folder_not_found")
        path = own[name] if folder is None else self.settings.folders[folder]
        if not self._swapping.acquire(blocking=False):
            raise Problem(409, "another swap is running", code="swap_running")
        try:
            read_chat_format(path, self.settings.chat_template)
            served = self.registry.swap(name, path)
        except InputError as error:
            raise Problem(409, f"the former model goes on serving: {error}", code="swap_failed") from error
        finally:
            self._swapping.release()
        logs.event("swapped", model=name, manifest_sha256=served.manifest_sha256)
        return served

    def reload(self, settings: ServerSettings) -> None:
        """Take over new keys, limits and folders of the served names, swapping those whose manifest differs; blocks.

        Raises:
            InputError: nothing is taken over from settings that cannot be used.
        """
        self.read_keys(settings)
        self.settings = settings
        for name, folder in settings.models.items():
            if name not in self.registry.names:
                logs.event("ignored", model=name, reason="a new name; restart the server to serve it")
                continue
            manifest = folder / artifacts.MANIFEST
            new = artifacts.sha256_file(manifest) if manifest.is_file() else None
            if new == self.registry.get(name).manifest_sha256:
                continue
            try:
                self.swap(name, None)
            except Problem as error:
                logs.event("swap_failed", model=name, reason=error.message)
