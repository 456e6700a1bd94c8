"""A simulated engine in real time: `wherry_cli.simulated_model` behind the interface of the worker's HTTP server."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from wherry_cli.simulated_model import (
    VOCABULARY_SIZE,
    Costs,
    Job,
    Progress,
    Shape,
    Simulation,
    encode,
    encode_chat,
    natural_length,
    text_of,
)
from wherry_protocol.worker import (
    End,
    ErrorEvent,
    Event,
    ExecuteRequest,
    LoadReport,
    Metrics,
    PrefixChange,
    Started,
    Token,
)
from wherry_runtime.engine.resume import check_resume, digest_of
from wherry_runtime.engine.validation import (
    RequestError,
    check_identity,
    check_prompt,
    check_sampling,
    check_text,
    check_tokens,
)
from wherry_runtime.scheduling.digest import Cursor, marks_for
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import DoesNotFitError, QueueFullError
from wherry_runtime.server.surface import Rounded

log = logging.getLogger("wherry.simulate")

BEHIND_S = 0.1  # by which steps may end late before that counts, and is told
_TELL_EVERY_S = 10.0
_SEED_BITS = 53


class _Answer:
    """One request on its way through the engine."""

    def __init__(self, id_: str, job: Job, digest: str) -> None:
        self.id = id_
        self.job = job
        self.digest = digest
        self.began = self.admitted = self.first = time.monotonic()
        self.progress: deque[Started | Progress | ErrorEvent | None] = deque()  # None: it was cancelled
        self.ready = asyncio.Event()
        self.cancelled = False

    def put(self, news: Started | Progress | ErrorEvent | None) -> None:
        self.progress.append(news)
        self.ready.set()

    async def take(self) -> Started | Progress | ErrorEvent | None:
        """The next news."""
        while not self.progress:
            self.ready.clear()
            await self.ready.wait()
        return self.progress.popleft()

    def started(self) -> Started:
        self.admitted = time.monotonic()
        request = self.job.request
        return Started(self.id, request.num_prompt, request.cached_tokens, self.job.seed, self.digest)

    def over(self, count: int) -> list[Event]:
        """The last events of an answer of `count` tokens."""
        now = time.monotonic()
        times = Metrics(self.admitted - self.began, self.first - self.admitted, now - self.first)
        finish = "cancelled" if self.cancelled else self.job.finish
        request = self.job.request
        return [times, End(finish, request.num_prompt, count, request.cached_tokens)]


class SimulatedEngine:
    """Has the shape of `wherry_runtime.server.surface.Engine`.

    Steps follow one another as the model says, by an absolute schedule: what one ends late, the next ones catch up. A
    process that cannot keep up says so in its log and counts it in `behind_s`.

    Args:
        tokens_per_event: tokens of an answer that are told together, after the first one. More than 1 makes large
            simulations affordable, since the events are what costs.
    """

    def __init__(self, model: str, shape: Shape, costs: Costs, tokens_per_event: int = 1) -> None:
        self._model = model
        self._shape = shape
        self._tokens_per_event = tokens_per_event
        self._simulation = Simulation(shape, costs)
        self._live: dict[str, _Answer] = {}  # by key, which is never used again
        self._keys: dict[str, str] = {}  # request id → key
        self._count = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._beat: float | None = None  # while a step runs, when it began
        self._told = 0.0
        self.behind_s = 0.0

    @property
    def rounded(self) -> Rounded | None:
        return None

    @property
    def max_model_len(self) -> int:
        return self._shape.max_model_len

    async def start(self) -> None:
        """Starts the step loop: there is nothing to load."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends running requests with a retryable error."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for answer in self._live.values():
            answer.put(ErrorEvent(code="shutting_down", message="the worker is shutting down", retryable=True))

    def bound(self) -> bool:
        return False

    def heartbeat_age(self) -> float:
        beat = self._beat
        return 0.0 if beat is None else max(0.0, time.monotonic() - beat)

    def load(self) -> LoadReport:
        """As busy as the simulated device is."""
        simulation, scheduler = self._simulation, self._simulation.scheduler
        blocks = scheduler.blocks
        return LoadReport(
            model=self._model,
            ready=self._task is not None and not self._task.done(),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_running=scheduler.max_running,
            kv_tokens_used=(blocks.num_blocks - blocks.num_free) * blocks.block_size,
            kv_tokens_total=blocks.num_blocks * blocks.block_size,
            prompt_tokens_total=simulation.prompt_tokens,
            completion_tokens_total=simulation.completion_tokens,
            prefix_queried_tokens_total=scheduler.prefix_queried_tokens,
            prefix_hit_tokens_total=scheduler.prefix_hit_tokens,
            preemptions_total=scheduler.preemptions,
            steps_total=simulation.steps,
            heartbeat_age_s=self.heartbeat_age(),
            tokens_owed=scheduler.tokens_owed,
        )

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        """See `surface.Engine.prefixes_since`."""
        if not self._shape.prefix_cache:
            return None, None
        return self._simulation.scheduler.blocks.digest.since(cursor)

    def cancel(self, request_id: str) -> bool:
        """See `surface.Engine.cancel`."""
        key = self._keys.get(request_id)
        if key is None:
            return False
        answer = self._live[key]
        answer.cancelled = True
        self._simulation.cancel(key)
        answer.put(None)
        return True

    async def generate(
        self, request: ExecuteRequest, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Event]:
        """See `surface.Engine.generate`."""
        check_identity(request, self._model)
        if request.id in self._keys:
            raise RequestError("duplicate_id", f"a request with id {request.id!r} is live already", param="id")
        self._count += 1
        key = f"{request.id}#{self._count}"
        answer = self._admit(request, key)
        self._keys[request.id] = key
        self._live[key] = answer
        try:
            if admitted is not None:
                await admitted()
            async for event in self._events(answer):
                yield event
        finally:
            del self._live[key], self._keys[request.id]
            self._simulation.cancel(key)

    def _admit(self, request: ExecuteRequest, key: str) -> _Answer:
        """Checks the request and queues it, unless what it goes on with is a whole answer already."""
        check_sampling(request.sampling, VOCABULARY_SIZE)
        _check_simulated(request)
        prompt = _tokens(request)
        check_tokens(prompt, VOCABULARY_SIZE, self._shape.max_model_len)
        digest = digest_of(prompt)
        job = self._job(request, key, prompt, digest)
        answer = _Answer(request.id, job, digest)
        if job.request.num_resumed < job.length:
            try:
                self._simulation.submit(job)
            except QueueFullError as error:
                raise RequestError("queue_full", f"{error}; try again later", status=429, retryable=True) from None
            except DoesNotFitError as error:
                raise RequestError("kv_cache_too_small", str(error), param="max_tokens") from None
            self._work.set()
        return answer

    def _job(self, request: ExecuteRequest, key: str, prompt: list[int], digest: str) -> Job:
        sampling, resume = request.sampling, request.resume
        if resume is not None:
            check_resume(resume, sampling, digest, VOCABULARY_SIZE)
            seed = resume.seed
        else:
            seed = secrets.randbits(_SEED_BITS) if sampling.seed is None else sampling.seed
        most = min(self._shape.max_model_len, self._shape.kv_tokens) - len(prompt)
        most = most if sampling.max_tokens is None else min(sampling.max_tokens, most)
        if most < 1:
            raise RequestError("kv_cache_too_small", "the prompt leaves no room for an answer", param="prompt")
        length = most
        if not sampling.ignore_eos:
            length = min(most, max(natural_length(seed, self._shape.answer_tokens), sampling.min_tokens))
        begun = [] if resume is None else resume.token_ids
        if len(begun) > length:
            raise RequestError("invalid_resume", f"the answer ended with token {length}", param="resume")
        live = Request(
            id=key,
            tokens=prompt + begun,
            max_new_tokens=most,
            priority=request.priority,
            salt=request.cache_salt.encode(),
            num_resumed=len(begun),
            marks=marks_for(request, len(prompt), self._shape.block_size) if self._shape.prefix_cache else (),
        )
        return Job(live, seed, length, "stop" if length < most else "length")

    async def _events(self, answer: _Answer) -> AsyncIterator[Event]:
        first = told = answer.job.request.num_resumed
        held: list[int] = []
        ended = first >= answer.job.length
        if ended:
            yield answer.started()
        while not ended:
            news = await answer.take()
            if not isinstance(news, Progress):
                if news is None:
                    break
                yield news
                if isinstance(news, ErrorEvent):
                    return
                continue
            held.append(news.token)
            ended = news.ended
            if ended or told == first or len(held) >= self._tokens_per_event:
                if told == first:
                    answer.first = time.monotonic()
                yield Token(told, held, text_of(held))
                told += len(held)
                held = []
        for event in answer.over(told):
            yield event

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._beat = time.monotonic()
            step = self._simulation.plan()
            if step is None:
                self._beat = None
                self._work.clear()
                await self._work.wait()
                due = max(due, loop.time())
                continue
            for key in step.admitted:
                if (answer := self._live.get(key)) is not None:
                    answer.put(answer.started())
            due += step.seconds
            await asyncio.sleep(max(due - loop.time(), 0.0))
            late = loop.time() - due
            if late > BEHIND_S:
                self._tell_behind(late)
                due += late
            for progress in self._simulation.finish():
                if (answer := self._live.get(progress.key)) is not None:
                    answer.put(progress)

    def _tell_behind(self, late: float) -> None:
        self.behind_s += late
        now = time.monotonic()
        if now - self._told > _TELL_EVERY_S:
            self._told = now
            log.warning(
                "this machine is too slow for the simulation: lower --speed or raise --tokens-per-event",
                extra={"fields": {"behind_s": round(self.behind_s, 3)}},
            )


def _check_simulated(request: ExecuteRequest) -> None:
    """Refuses what would need a model's text."""
    sampling = request.sampling
    for name in ("stop", "stop_token_ids", "logprobs"):
        if getattr(sampling, name) not in (None, []):
            raise RequestError("unsupported", f"a simulated engine has no {name}", param=name)


def _tokens(request: ExecuteRequest) -> list[int]:
    prompt = request.prompt
    check_prompt(prompt)
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if prompt.text is not None:
        check_text(prompt.text)
        return encode(prompt.text)
    if not prompt.messages:
        raise RequestError("empty_prompt", "messages is empty; it needs at least one message", param="messages")
    for message in prompt.messages:
        check_text(message.content)
    return encode_chat(prompt.messages)
