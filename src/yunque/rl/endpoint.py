"""A model behind an OpenAI-compatible endpoint: requests in parallel, retried with growing waits, never redirected."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from yunque.errors import InputError, Stopped
from yunque.models.arguments import GenerationArguments
from yunque.rl.feedback_arguments import WriterArguments
from yunque.rl.writing import Request

_RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT_S = 60.0
_SHOWN_CHARS = 200  # of an endpoint's own error
_SAVED = "what is done is saved; go on with --resume"
_LETTER = re.compile(
    r"\W*(?:(?:the |la )?(?:better |mejor )?(?:answer|option|choice|respuesta|opción)(?: is| es)?\W*)?"
    r"(?-i:([AB]))(?:\W*$|\W*[.:,;)\]—-])",
    re.IGNORECASE,
)
"""A letter that stands alone, or before a mark that ends the choice: "A", "(B)", "Answer: A.", "B) because ..."."""
_SLICE_S = 0.1  # between two looks at whether the run was asked to stop


class _Retry(Exception):
    """A failure that may pass; ``wait_s`` is what the endpoint asked for, if anything."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: a redirect would carry the key to another host and turn POST into GET."""
        return


class Endpoint:
    """Writes answers through ``/chat/completions`` or ``/completions``; ``option`` is the URL's, for errors.

    The key, where there is one, is read from an environment variable and goes nowhere but into the request's header.
    """

    def __init__(
        self, args: WriterArguments, option: str, url: str, model: str, key_env: str, stopped: Callable[[], bool]
    ) -> None:
        self.option, self.model, self.stopped = option, model, stopped
        self.args = args
        route = "/chat/completions" if args.endpoint_style == "chat" else "/completions"
        self.url = url.rstrip("/") + route
        self.source = f"{url}#{model}"
        self.identity = f"endpoint {model} {args.endpoint_style}"  # without the URL: a server may move
        self._key_env, self._key = key_env, os.environ.get(key_env)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def write(self, requests: Sequence[Request], options: GenerationArguments) -> Iterator[tuple[int, str | None]]:
        """Position and text of each request as it arrives; a failure is raised once the others are in.

        Raises:
            InputError: the endpoint refuses the request (a wrong key, model or route).
            Stopped: it does not answer, or answers nonsense, as often as ``max_retries`` allows; or a signal came.
        """
        failures: list[BaseException] = []

        def ask(request: Request) -> str | None:
            try:
                return self._ask(request, options, lambda: bool(failures) or self.stopped())
            except BaseException as error:
                failures.append(error)  # from here on, requests not yet sent are not sent
                return None

        with ThreadPoolExecutor(max_workers=self.args.batch_size) as pool:
            futures = {pool.submit(ask, request): place for place, request in enumerate(requests)}
            for future in as_completed(futures):
                if (text := future.result()) is not None:
                    yield futures[future], text
        if failures:
            raise failures[0]

    def log_odds(self, prompts: Sequence[str], max_new_tokens: int) -> list[float | None]:
        """+1 where the endpoint answers A, -1 where it answers B, None where it is neither."""
        options = GenerationArguments(temperature=0.0, max_new_tokens=max_new_tokens)
        answers = dict(self.write([Request(prompt, 0) for prompt in prompts], options))
        return [read_letter(answers[place] or "") for place in range(len(prompts))]

    def _ask(self, request: Request, options: GenerationArguments, stopped: Callable[[], bool]) -> str:
        if stopped():
            raise Stopped(_SAVED)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": request.stream % 2**31,
        }
        if self.args.endpoint_style == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        wait_s = self.args.retry_wait_s
        for tries_left in range(self.args.max_retries, -1, -1):
            try:
                return self._post(json.dumps(body).encode())
            except _Retry as error:
                if not tries_left:
                    raise Stopped(
                        f"{self.option}: {self.url} failed {self.args.max_retries + 1} times, at last: {error}; "
                        + _SAVED
                    ) from error
                # the jitter keeps requests that failed together from coming back together
                self._wait(max(error.wait_s, wait_s * random.uniform(0.75, 1.25)), stopped)
                wait_s *= 2
        raise AssertionError("unreachable")

    def _wait(self, seconds: float, stopped: Callable[[], bool]) -> None:
        until = time.monotonic() + min(seconds, _LONGEST_WAIT_S)
        while (left := until - time.monotonic()) > 0:
            if stopped():
                raise Stopped(_SAVED)
            time.sleep(min(left, _SLICE_S))

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.args.request_timeout_s) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, a reset, a time-out, a cut answer
            reason = getattr(error, "reason", None) or error
            text = (
                f"no answer in {self.args.request_timeout_s:g} s" if isinstance(reason, TimeoutError) else str(reason)
            )
            raise _Retry(text or type(error).__name__) from error
        return self._text(content)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:_SHOWN_CHARS]
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in _RETRIED_STATUS:
            return _Retry(reason, _seconds(error.headers.get("Retry-After")))
        hint = ""
        if error.code in (401, 403):
            hint = f"; the key comes from {self._key_env}, which is {'set' if self._key else 'not set'}"
        return InputError(f"{self.option}: {self.url} refuses model {self.model!r}: {reason}{hint}")

    def _text(self, content: bytes) -> str:
        try:
            choice = json.loads(content)["choices"][0]
            text = choice["message"]["content"] if self.args.endpoint_style == "chat" else choice["text"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            shown = content[:_SHOWN_CHARS].decode("utf-8", "replace")
            raise _Retry(f"the answer is not OpenAI's: {shown!r}") from error
        if text is None:  # a refusal or a tool call: an answer without text
            return ""
        if not isinstance(text, str):
            raise _Retry(f"the answer is not text but {type(text).__name__}")
        return text.encode("utf-8", "replace").decode("utf-8").strip()


def read_letter(answer: str) -> float | None:
    """+1 where the first line chooses A, -1 where it chooses B, None for "A better answer ...", "A or B" and others."""
    found = _LETTER.match(answer.strip().partition("\n")[0])
    return None if found is None else 1.0 if found[1] == "A" else -1.0


def _seconds(header: str | None) -> float:
    try:
        return max(float(header), 0.0) if header else 0.0
    except ValueError:  # a date
        return 0.0
