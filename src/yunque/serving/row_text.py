"""One text of a request while it waits and runs."""

from __future__ import annotations

from yunque.runtime.batch import EOS, LENGTH, RUNNING, Step, sizes
from yunque.runtime.models import CausalModel, Seq2SeqModel
from yunque.runtime.options import GenerationOptions
from yunque.serving.requests import Event, FinishReason, Stream, TokenLogprob, TopLogprob
from yunque.serving.text import TextWriter


class RowText:
    """A text in the making: its options, times and what of it has been shown."""

    def __init__(
        self,
        stream: Stream,
        index: int,
        options: GenerationOptions,
        limit: int,
        arrived: float,
        deadline: float,
        model: Seq2SeqModel | CausalModel,
    ) -> None:
        self.stream = stream
        self.index = index
        self.prompt = stream.request.prompt
        self.options = options
        self.arrived = arrived  # by time.perf_counter, like all times here
        self.deadline = deadline
        self.last: float | None = None  # when the newest token came
        self.room, self.source = sizes(model.spec, self.prompt, limit)
        self._tokenizer = model.tokenizer
        self._writer = TextWriter(model.tokenizer, stream.request.options.stop)

    def is_over(self, now: float) -> bool:
        """Whether it is to end although the model has not ended it."""
        return self.stream.cancelled or now >= self.deadline

    @property
    def why_over(self) -> FinishReason:
        """The reason, once ``is_over``."""
        return "cancelled" if self.stream.cancelled else "deadline"

    def take(self, step: Step, place: int) -> Event:
        """The event of the row's token in ``step``."""
        token, reason = int(step.tokens[place]), int(step.reasons[place])
        offset = self._writer.length
        text = self._writer.add(token)
        finish: FinishReason | None = None
        if self._writer.stopped or reason == EOS:
            finish = "stop"
        elif reason == LENGTH:
            finish = "length"
        elif reason != RUNNING:
            raise ValueError(f"reason {reason}")
        if finish is not None:
            text += self._writer.finish()
            finish = "stop" if self._writer.stopped else finish
        return Event(text, (token,), self._logprobs(step, place, token, offset), finish, self.index)

    def last_event(self, reason: FinishReason, error: str | None = None) -> Event:
        """The end from outside, with the text that was held back."""
        return Event("" if error else self._writer.finish(), finish_reason=reason, index=self.index, error=error)

    def _logprobs(self, step: Step, place: int, token: int, offset: int) -> tuple[TokenLogprob, ...] | None:
        if not self.options.logprobs or step.logprobs is None:
            return None
        top: tuple[TopLogprob, ...] = ()
        if self.options.top_logprobs and step.top is not None:
            ids, logprobs = (values[place, : self.options.top_logprobs].tolist() for values in step.top)
            top = tuple(
                TopLogprob(number, self._tokenizer.token_bytes(number), logprob)
                for number, logprob in zip(ids, logprobs, strict=True)
            )
        own = self._tokenizer.token_bytes(token)
        return (TokenLogprob(token, own, float(step.logprobs[place]), top, offset),)
