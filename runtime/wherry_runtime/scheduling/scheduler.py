"""Continuous batching with chunked prefill.

Each step has a budget of tokens. Requests that are decoding come first (one token each), then prompts that are partly
computed, then the queue, by priority and arrival; a prompt that does not fit into what is left of the budget is
computed in chunks over several steps (Agrawal et al., 2024, https://arxiv.org/abs/2403.02310). When the KV cache runs
out, the running request that ranks last gives its blocks back and returns to the queue; it is recomputed later,
usually from the prefix cache. The request that ranks first is never preempted and every request fits alone, so there
is always progress.
"""

from bisect import insort
from collections.abc import Mapping

from wherry_runtime.scheduling.blocks import BlockManager, extend_hashes
from wherry_runtime.scheduling.plan import SequenceStep, StepPlan
from wherry_runtime.scheduling.request import Request


class QueueFullError(Exception):
    """As many requests are live as may run and wait."""


class DoesNotFitError(Exception):
    """The request needs more blocks than the whole cache has."""


class Scheduler:
    """Holds all live requests and decides each step. Call `schedule`, compute the plan, then `commit`."""

    def __init__(self, blocks: BlockManager, *, max_running: int, max_batched_tokens: int, max_queued: int) -> None:
        if min(max_running, max_batched_tokens) < 1 or max_queued < 0:
            raise ValueError("max_running and max_batched_tokens must be at least 1, max_queued at least 0")
        self.blocks = blocks
        # Every running request must be able to decode in every step, or the last ones would starve.
        self.max_running = min(max_running, max_batched_tokens)
        self.max_batched_tokens = max_batched_tokens
        self.max_queued = max_queued
        self.waiting: list[Request] = []  # both lists by rank
        self.running: list[Request] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._requests: dict[str, Request] = {}
        self._arrivals = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def get(self, request_id: str) -> Request:
        """The live request of this id."""
        return self._requests[request_id]

    @property
    def idle(self) -> bool:
        return not self._requests

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFullError: `max_running` + `max_queued` requests are live already.
            DoesNotFitError: it would not fit even alone.
            ValueError: no tokens, nothing to generate, or an id that is live.
        """
        if not request.tokens or request.max_new_tokens < 1 or request.id in self._requests:
            raise ValueError("a request needs a prompt, at least one token to generate, and an id of its own")
        needed = self.blocks.blocks_for(request.num_prompt + request.max_new_tokens)
        if needed > self.blocks.num_blocks:
            raise DoesNotFitError(f"it needs {needed} KV cache blocks, there are {self.blocks.num_blocks}")
        if len(self._requests) >= self.max_running + self.max_queued:
            raise QueueFullError(f"{len(self._requests)} requests are running or waiting")
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request_id: str) -> Request | None:
        """Takes a request out, finished or cancelled, and frees its blocks. None if it is not live."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            (self.running if request in self.running else self.waiting).remove(request)
            self._release(request)
        return request

    def schedule(self) -> StepPlan:
        """Decides the next step and allocates its blocks. An empty plan means that nothing is live."""
        steps: dict[str, SequenceStep] = {}
        preempted: list[str] = []
        budget = self.max_batched_tokens
        order = [r for r in self.running if r.remaining == 1] + [r for r in self.running if r.remaining > 1]
        for request in order:
            if request.id in preempted or not budget:
                continue
            count = min(request.remaining, budget)
            for victim in self._make_room(request, count):
                preempted.append(victim.id)
                if (undone := steps.pop(victim.id, None)) is not None:
                    budget += len(undone.tokens)
            if request.id not in preempted:
                steps[request.id] = self._step(request, count)
                budget -= count
        admitted = [] if preempted else self._admit(steps, budget)
        return StepPlan(list(steps.values()), admitted, preempted)

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> None:
        """Books a computed plan: progress, blocks that became full, and the tokens drawn (by request id).

        Requests that were removed in the meantime are skipped.
        """
        for step in plan.sequences:
            request = self._requests.get(step.request_id)
            if request is None:
                continue
            request.num_computed = step.end
            self._register(request)
            if step.samples:
                request.tokens.append(sampled[request.id])

    def check_integrity(self) -> None:
        """Raises IntegrityError if a block is lost, held twice or held by nobody live."""
        self.blocks.check_integrity(request.blocks for request in self._requests.values())

    def _make_room(self, request: Request, count: int) -> list[Request]:
        """Preempts from the back until `count` more tokens of `request` have blocks, or it was preempted itself."""
        victims: list[Request] = []
        while not self._grow(request, request.num_computed + count):
            victim = self.running[-1]
            self._preempt(victim)
            victims.append(victim)
            if victim is request:
                break
        return victims

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Extends the block table to hold `num_tokens` tokens; False if too few blocks are free."""
        needed = self.blocks.blocks_for(num_tokens) - len(request.blocks)
        if needed > self.blocks.num_free:
            return False
        if needed > 0:
            request.blocks += self.blocks.allocate(needed)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_registered = 0
        request.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.rank)

    def _release(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        request.blocks = []

    def _admit(self, steps: dict[str, SequenceStep], budget: int) -> list[str]:
        """Moves requests from the head of the queue into the batch while slots, budget and blocks last."""
        admitted = []
        while self.waiting and budget and len(self.running) < self.max_running:
            request = self.waiting[0]
            if not self._take_prefix(request):
                break
            self.waiting.pop(0)
            insort(self.running, request, key=lambda r: r.rank)
            count = min(request.remaining, budget)
            self._grow(request, request.num_computed + count)
            steps[request.id] = self._step(request, count)
            budget -= count
            admitted.append(request.id)
        return admitted

    def _take_prefix(self, request: Request) -> bool:
        """Shares the known prefix with a request, if all its known tokens fit; False changes nothing.

        Asking for room for all of them, not only the first chunk, keeps two long prompts from preempting each other.
        """
        matched: list[int] = []
        if self.blocks.prefix_cache:
            extend_hashes(request.hashes, request.tokens, self.blocks.block_size, request.salt)
            # The newest token is always computed: its logits are what the request is for.
            matched = self.blocks.match(request.hashes[: (len(request.tokens) - 1) // self.blocks.block_size])
        needed = self.blocks.blocks_for(len(request.tokens)) - len(matched)
        if needed > self.blocks.num_free - self.blocks.num_free_among(matched):
            return False
        self.blocks.share(matched)
        request.blocks = matched
        request.num_registered = len(matched)
        request.num_computed = len(matched) * self.blocks.block_size
        if not request.preemptions:
            request.cached_tokens = request.num_computed
            self.prefix_hit_tokens += request.num_computed
        return True

    def _register(self, request: Request) -> None:
        """Tells the prefix cache about blocks that are full now."""
        full = request.num_computed // self.blocks.block_size
        if not self.blocks.prefix_cache or full <= request.num_registered:
            return
        extend_hashes(request.hashes, request.tokens, self.blocks.block_size, request.salt)
        for index in range(request.num_registered, full):
            self.blocks.register(request.blocks[index], request.hashes[index])
        request.num_registered = full

    @staticmethod
    def _step(request: Request, count: int) -> SequenceStep:
        start = request.num_computed
        tokens = request.tokens[start : start + count]
        return SequenceStep(request.id, tokens, start, request.blocks, start + count == len(request.tokens))
