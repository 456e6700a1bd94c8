"""Continuous batching with chunked prefill, planned one step ahead.

Each step has a budget of tokens. Requests that are decoding come first (one token each), then prompts that are partly
computed, then the queue, by priority and arrival; a prompt that does not fit into what is left of the budget is
computed in chunks over several steps (Agrawal et al., 2024, https://arxiv.org/abs/2403.02310), and beside decodes the
chunk is cut to what they may wait for (see `pacing`). When the KV cache runs out, the running request that ranks last
gives its blocks back and returns to the queue; it is recomputed later, usually from the prefix cache. So do those of a
lower priority when a request in the queue lacks a slot or blocks. The request that ranks first is never preempted and
every request fits alone, so there is always progress.

A plan may be made while the one before it is computing (as in NanoFlow, Zhu et al., 2024,
https://arxiv.org/abs/2408.12757): a token that the step in flight draws is UNKNOWN, to be filled in when the step
starts. Two rules keep that simple. While a plan is in flight nobody is preempted: the next plan is empty instead, and
made again when the results are in. And the blocks of a request that ends are freed only once no plan in flight writes
to them.
"""

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence

from wherry_protocol.worker import EXPECTED_OUTPUT
from wherry_runtime.scheduling.blocks import BlockManager, IntegrityError, extend_hashes
from wherry_runtime.scheduling.limit import StepLimit
from wherry_runtime.scheduling.pacing import Allowance, Pacer
from wherry_runtime.scheduling.plan import UNKNOWN, SequenceStep, StepPlan, Work
from wherry_runtime.scheduling.request import Request

RESUMED = 1 << 62  # by how many arrivals a resumed answer goes ahead
YOUNG = 8  # tokens of an answer that may come late if many requests begin together
NO_DRAFTS: Mapping[str, Sequence[int]] = {}


class QueueFullError(Exception):
    """As many requests are live as may run and wait."""


class DoesNotFitError(Exception):
    """The request needs more blocks than the whole cache has."""


class Scheduler:
    """Holds all live requests and decides each step.

    Call `schedule`, compute the plan, then `commit` or `abandon` it; one more plan may be made before that.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_batched_tokens: int,
        max_queued: int,
        max_itl_ratio: float = 0.0,
    ) -> None:
        if min(max_running, max_batched_tokens) < 1 or max_queued < 0:
            raise ValueError("max_running and max_batched_tokens must be at least 1, max_queued at least 0")
        self.blocks = blocks
        # Every running request must be able to decode in every step, or the last ones would starve.
        self.max_running = min(max_running, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.limit = StepLimit(max_batched_tokens)
        self.max_queued = max_queued
        self.pacer = Pacer(max_itl_ratio)
        self.waiting: list[Request] = []  # both lists by rank
        self.running: list[Request] = []
        self.in_flight = 0  # plans that are neither committed nor abandoned
        self.preemptions = 0
        self.prefix_queried_tokens = 0  # of prompts that were looked up in the prefix cache
        self.prefix_hit_tokens = 0
        self._requests: dict[str, Request] = {}
        self._leaving: dict[str, Request] = {}  # ended, but plans in flight still write to their blocks
        self._suspects: set[str] = set()  # of those, whose blocks hold what nobody may read
        self._tainted: list[int] = []
        self._arrivals = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def get(self, request_id: str) -> Request:
        """The live request of this id."""
        return self._requests[request_id]

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def tokens_owed(self) -> int:
        """What live requests are to compute: prompts, less what is cached, and `EXPECTED_OUTPUT` of each answer."""
        digest, size = self.blocks.digest, self.blocks.block_size
        owed = 0
        for request in (*self.running, *self.waiting):
            answer = max(min(request.max_new_tokens, EXPECTED_OUTPUT) - request.num_new, 1)
            done = request.num_computed or digest.cached_blocks(request.marks) * size
            owed += max(len(request.tokens) - request.num_new - done, 0) + answer
        return owed

    @property
    def num_decoding(self) -> int:
        """Sequences in the next step if all that it does is to advance each running one by a token; 0 if it does more,
        or a plan in flight draws somebody's last token."""
        if self.waiting and (len(self.running) < self._slots or self._outranked(self.waiting[0])):
            return 0
        return len(self.running) if all(r.remaining == 1 for r in self.running) else 0

    @property
    def _slots(self) -> int:
        return min(self.max_running, self.limit.tokens)

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFullError: `max_running` + `max_queued` requests are live already.
            DoesNotFitError: it would not fit even alone.
            ValueError: no tokens, nothing to generate, or an id that is live.
        """
        taken = request.id in self._requests or request.id in self._leaving
        if not request.tokens or request.max_new_tokens < 1 or taken:
            raise ValueError("a request needs a prompt, at least one token to generate, and an id of its own")
        needed = self.blocks.blocks_for(request.num_prompt + request.max_new_tokens)
        if needed > self.blocks.num_blocks:
            raise DoesNotFitError(f"it needs {needed} KV cache blocks, there are {self.blocks.num_blocks}")
        if len(self._requests) >= self.max_running + self.max_queued:
            raise QueueFullError(f"{len(self._requests)} requests are running or waiting")
        request.arrival = self._arrivals
        # Answers that had begun elsewhere go before those that nobody has seen anything of.
        request.rank = (-request.priority, self._arrivals - (RESUMED if request.num_resumed else 0))
        self._arrivals += 1
        self._requests[request.id] = request
        if self.blocks.prefix_cache:
            self.blocks.digest.expect(request.marks)
        insort(self.waiting, request, key=_rank)

    def remove(self, request_id: str, *, suspect: bool = False) -> Request | None:
        """Takes a request out, finished or cancelled; its blocks are freed when no plan in flight has it.

        `suspect`: what it computed is not to be trusted. Its blocks come out of `take_tainted` once they are free.

        Returns:
            None if it is not live.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        (self.running if request in self.running else self.waiting).remove(request)
        if self.blocks.prefix_cache:
            self.blocks.digest.over(request.marks)
        if suspect:
            self.blocks.forget(request.blocks.tolist())
            self._suspects.add(request_id)
        self._leaving[request_id] = request
        self._let_go(request)
        return request

    def take_tainted(self) -> list[int]:
        """Free blocks to be scrubbed before anybody gets them: call it before the next `schedule`."""
        tainted, self._tainted = self._tainted, []
        return tainted

    def schedule(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> StepPlan:
        """Decides the next step and allocates its blocks.

        Args:
            drafts: by request id, guesses of what follows the newest token. They are used for requests that decode, as
                far as tokens are left in the budget and blocks are free.

        Returns:
            The plan. Without sequences there is nothing to commit: nothing is live, or nothing can be planned until the
            plan in flight is committed.
        """
        made_way = self._make_way()
        if made_way is None:
            return StepPlan()
        preempted: list[str] = []
        decodes, prompts = self._ready()
        chunks, allowance = self._chunks(decodes, prompts, drafts)
        while (missing := self._missing_blocks(chunks) - self.blocks.num_free) > 0:
            if drafts:
                drafts = NO_DRAFTS
            elif self.in_flight:
                return StepPlan()
            elif len(self.running) > 1:
                preempted.append(self._preempt_last())
            else:
                raise IntegrityError(f"{self.running[0].id} is alone and lacks {missing} blocks")
            decodes, prompts = self._ready()
            chunks, allowance = self._chunks(decodes, prompts, drafts)
        steps = [self._step(request, count, drafts.get(request.id, ()) if drafts else ()) for request, count in chunks]
        admitted = [] if preempted else self._admit(steps, allowance, made_way)
        if steps:
            self.in_flight += 1
        return StepPlan(steps, admitted, made_way + preempted, _work(steps))

    def commit(self, plan: StepPlan, sampled: Mapping[str, Sequence[int]]) -> None:
        """Books a computed plan: progress, blocks that became full, and the tokens drawn (by request id).

        Requests that sample have at least one token, and at most one more than they had drafts: the drafts accepted and
        the token after them. Those with drafts may have none, and are then where they were. What rejected drafts left
        in the KV cache is overwritten. Requests that were removed in the meantime are skipped.
        """
        if not plan.sequences:
            return
        self.in_flight -= 1
        self.limit.succeeded()
        size = self.blocks.block_size
        for step in plan.sequences:
            request = self._landed(step)
            if request is None:
                continue
            end = step.end
            if step.samples:
                tokens = sampled[request.id]
                request.tokens += tokens
                request.num_unknown -= 1
                if step.num_drafts:
                    end += len(tokens) - 1 - step.num_drafts
                    request.num_planned = end
                    request.speculating = False
            request.num_computed = end
            if end // size > request.num_registered:
                self._register(request)

    def abandon(self, plan: StepPlan) -> None:
        """Takes back a plan that was not computed; of several, the newest first. Its requests keep their blocks."""
        self.in_flight -= 1
        for step in plan.sequences:
            request = self._landed(step)
            if request is not None:
                request.num_planned = step.start
                request.num_unknown -= step.samples
                request.speculating = False

    def shrink(self, plan: StepPlan) -> bool:
        """Makes steps smaller after `plan`, abandoned by now like all others, ran out of memory.

        Requests that do not fit into such steps go back to the queue. False: the plan was one token of one request.
        """
        smaller = self.limit.failed(plan.num_tokens)
        while len(self.running) > self.limit.tokens:
            self._preempt_last()
        return smaller

    def rewind(self, request_id: str) -> list[int]:
        """Takes back the last block that is not full, after a rejected draft wrote to it what nobody may read.

        Only while no plan is in flight. Its tokens are computed again.

        Returns:
            The blocks to scrub: nobody else has them.
        """
        request = self._requests[request_id]
        full = request.num_computed // self.blocks.block_size
        request.num_computed = request.num_planned = full * self.blocks.block_size
        tainted: list[int] = request.blocks[full:].tolist()
        return tainted

    def check_integrity(self) -> None:
        """Raises IntegrityError if a block is lost, held twice or held by nobody live."""
        held = [*self._requests.values(), *self._leaving.values()]
        self.blocks.check_integrity(request.blocks.tolist() for request in held)

    def _landed(self, step: SequenceStep) -> Request | None:
        """The request of a step that is not in flight any more; None if it has ended."""
        request = self._requests.get(step.request_id)
        if request is not None:
            request.in_flight -= 1
            return request
        leaving = self._leaving[step.request_id]
        leaving.in_flight -= 1
        self._let_go(leaving)
        return None

    def _ready(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Running requests with one token to compute, and those with more, each by rank."""
        decodes, prompts = [], []
        for request in self.running:
            remaining = request.remaining
            if remaining == 1:
                decodes.append(request)
            elif remaining > 1:
                prompts.append((request, remaining))
        return decodes, prompts

    def _chunks(
        self, decodes: list[Request], prompts: list[tuple[Request, int]], drafts: Mapping[str, Sequence[int]]
    ) -> tuple[list[tuple[Request, int]], Allowance]:
        """How many tokens of each running request to compute, and what is left for the queue."""
        chunks = [(request, 1) for request in decodes]
        budget = self.limit.tokens - len(chunks)
        if drafts:
            for index, request in enumerate(decodes):
                guesses = drafts.get(request.id, ())
                if guesses and not request.num_unknown:
                    count = min(len(guesses), request.most_computed - len(request.tokens), budget)
                    chunks[index] = (request, 1 + count)
                    budget -= count
        if not prompts and not self.waiting:
            return chunks, Allowance(0)
        allowance = self._allowance(budget, decodes)
        for request, remaining in prompts:
            if allowance.exhausted:
                break
            chunks.append((request, allowance.take(remaining)))
        return chunks, allowance

    def _allowance(self, tokens: int, decodes: list[Request]) -> Allowance:
        """What prompts may take of a step with `decodes`. Answers that have only just begun do not hold others up: of
        requests that come together, the first one does not make the rest wait."""
        if all(request.num_new + request.num_unknown <= YOUNG for request in decodes):
            return Allowance(tokens)
        return self.pacer.allowance(tokens, len(decodes), sum(request.num_planned + 1 for request in decodes))

    def _missing_blocks(self, chunks: Iterable[tuple[Request, int]]) -> int:
        """How many blocks must be allocated for `chunks`."""
        size = self.blocks.block_size
        missing = 0
        for request, count in chunks:
            end = request.num_planned + count
            if end > request.num_blocks * size:
                missing += -(-end // size) - request.num_blocks
        return missing

    def _outranked(self, request: Request) -> bool:
        """Whether somebody runs whose priority is below that of `request`; an earlier arrival alone preempts nobody."""
        return bool(self.running) and self.running[-1].priority < request.priority

    def _make_way(self) -> list[str] | None:
        """Preempts for those at the head of the queue that have a higher priority, as many as this step can begin.

        Returns:
            Who was preempted; None: somebody is to be, once no plan is in flight.
        """
        preempted: list[str] = []
        begins = tokens = blocks = 0  # of those that there is room for so far
        while begins < len(self.waiting) and tokens < self.limit.tokens:
            # Whoever is preempted ranks behind it in the queue.
            request = self.waiting[begins]
            if not self._outranked(request):
                break
            while not self._has_room(request, begins, blocks):
                if not self._could_have_room(request, blocks):
                    return preempted
                if self.in_flight:
                    return None
                preempted.append(self._preempt_last())
            begins += 1
            tokens += len(request.tokens)
            blocks += self._known_prefix(request)[1]
        return preempted

    def _has_room(self, request: Request, begins: int, blocks: int) -> bool:
        """Whether a slot and blocks are free beside `begins` requests and `blocks` that are promised."""
        if len(self.running) + begins >= self._slots:
            return False
        return self._known_prefix(request)[1] + blocks + self._growth(self.running) <= self.blocks.num_free

    def _could_have_room(self, request: Request, blocks: int) -> bool:
        """Whether preempting everybody of a lower priority would make room."""
        below = [r for r in self.running if r.priority < request.priority]
        if not below:
            return False
        others = self.running[: len(self.running) - len(below)]
        missing = self._known_prefix(request)[1] + blocks + self._growth(others) - self.blocks.num_free
        if missing <= 0 or missing > sum(r.num_blocks for r in below):
            return missing <= 0
        return missing <= self.blocks.num_held_only_by(r.blocks.tolist() for r in below)

    def _growth(self, requests: Iterable[Request]) -> int:
        """Blocks that requests lack for the tokens they know of."""
        size = self.blocks.block_size
        return sum(max(-(-(len(r.tokens) + r.num_unknown) // size) - r.num_blocks, 0) for r in requests)

    def _preempt_last(self) -> str:
        """Puts the last of the batch back into the queue; its id. Only while no plan is in flight."""
        request = self.running.pop()
        self._release(request)
        request.num_computed = request.num_planned = 0
        request.num_registered = request.num_marked = 0
        request.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=_rank)
        return request.id

    def _let_go(self, request: Request) -> None:
        """Frees the blocks of a request that has ended, if no plan in flight has it."""
        if request.in_flight:
            return
        del self._leaving[request.id]
        blocks = self._release(request)
        if request.id in self._suspects:
            self._suspects.discard(request.id)
            # Not those that others share: these were computed before, and are in use.
            self._tainted += [block for block in blocks if self.blocks.is_free(block)]

    def _release(self, request: Request) -> list[int]:
        blocks = request.take_blocks()
        self.blocks.release(blocks, request.hashes)
        return blocks

    def _admit(self, steps: list[SequenceStep], allowance: Allowance, made_way: list[str]) -> list[str]:
        """Moves requests from the head of the queue into the batch while slots, budget and blocks last; none that has
        just made way."""
        admitted = []
        while self.waiting and len(self.running) < self._slots and not allowance.exhausted:
            request = self.waiting[0]
            if request.id in made_way or not self._take_prefix(request):
                break
            self.waiting.pop(0)
            insort(self.running, request, key=_rank)
            steps.append(self._step(request, allowance.take(request.remaining)))
            admitted.append(request.id)
        return admitted

    def _take_prefix(self, request: Request) -> bool:
        """Shares the known prefix with a request, if all its known tokens fit; False changes nothing.

        Asking for room for all of them, not only the first chunk, keeps two long prompts from preempting each other.
        """
        matched, needed = self._known_prefix(request)
        if needed > self.blocks.num_free:
            return False
        self.blocks.share(matched)
        request.add_blocks(matched)
        request.num_registered = len(matched)
        self._mark(request)
        request.num_computed = request.num_planned = len(matched) * self.blocks.block_size
        if not request.preemptions:
            request.cached_tokens = request.num_computed
            self.prefix_hit_tokens += request.num_computed
            self.prefix_queried_tokens += len(request.tokens)
        return True

    def _known_prefix(self, request: Request) -> tuple[list[int], int]:
        """The blocks that hold its known prefix, and how many leave the free list if it is admitted."""
        matched: list[int] = []
        if self.blocks.prefix_cache:
            extend_hashes(request.hashes, request.tokens, self.blocks.block_size, request.salt)
            # The newest token is always computed: its logits are what the request is for.
            matched = self.blocks.match(request.hashes[: (len(request.tokens) - 1) // self.blocks.block_size])
        lacking = self.blocks.blocks_for(len(request.tokens)) - len(matched)
        return matched, lacking + self.blocks.num_free_among(matched)

    def _register(self, request: Request) -> None:
        """Tells the prefix cache about blocks that are full now."""
        full = request.num_computed // self.blocks.block_size
        if self.blocks.prefix_cache:
            extend_hashes(request.hashes, request.tokens, self.blocks.block_size, request.salt)
            for index in range(request.num_registered, full):
                self.blocks.register(int(request.blocks[index]), request.hashes[index])
        request.num_registered = full
        self._mark(request)

    def _mark(self, request: Request) -> None:
        """Tells the prefix cache what routers know its blocks by."""
        marks, index = request.marks if self.blocks.prefix_cache else (), request.num_marked
        while index < len(marks) and marks[index][0] < request.num_registered:
            block, key = marks[index]
            self.blocks.mark(request.hashes[block], key)
            index += 1
        request.num_marked = index

    def _step(self, request: Request, count: int, drafts: Sequence[int] = ()) -> SequenceStep:
        """Plans `count` tokens of `request`, for which there are blocks: known ones, and then one that is UNKNOWN or as
        many of `drafts` as it takes."""
        start = request.num_planned
        end = start + count
        known = len(request.tokens)
        num_drafts = 0
        tokens = request.tokens[start:end]
        if end > known and request.num_unknown:
            tokens.append(UNKNOWN)
        elif end > known:
            num_drafts = end - known
            tokens += drafts[:num_drafts]
        if end > request.num_blocks * self.blocks.block_size:
            request.add_blocks(self.blocks.allocate(self.blocks.blocks_for(end) - request.num_blocks))
        samples = end >= known + request.num_unknown
        request.num_planned = end
        request.num_unknown += samples
        request.speculating = num_drafts > 0
        request.in_flight += 1
        return SequenceStep(request.id, tokens, start, request.blocks, samples, num_drafts)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _work(steps: Iterable[SequenceStep]) -> Work:
    decodes = context = tokens = 0
    for step in steps:
        count = len(step.tokens)
        if count == 1 or step.num_drafts:
            decodes += 1
            context += step.start + 1
            count -= 1
        tokens += count
    return Work(decodes, context, tokens)
