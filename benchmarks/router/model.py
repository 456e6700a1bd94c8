"""Policies in a model of time: the router's own pool and policies, simulated engines, no sockets and no waiting.

    python -m benchmarks.router.model [--workload NAME] [--rates 20,40] [--policies a,b] [--replicas 8] [--routers 1]

Minutes of many replicas take seconds here, and one run is the same as the next. `policies.py` measures the same
workloads with real processes, and other routers beside.
"""

import argparse
import heapq
import itertools
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.router.workloads import WORKLOADS, Session

from wherry_cli.simulated_model import Costs, Job, Shape, Simulation, encode_chat, text_of
from wherry_protocol.worker import (
    ChatMessage,
    End,
    ExecuteRequest,
    LoadReport,
    LoadUpdate,
    Prompt,
    SamplingParams,
    Started,
    Token,
)
from wherry_router.policies import POLICIES, Policy
from wherry_router.policies.power_of_two import PowerOfTwo
from wherry_router.policies.random import RandomChoice
from wherry_router.pool import Endpoint, Lease, Pool
from wherry_router.settings import Limits
from wherry_runtime.scheduling.digest import Cursor, marks_for
from wherry_runtime.scheduling.request import Request

SHAPE = Shape(kv_tokens=100_000, max_running=64)
REPORT_S = 0.08
LAG_S = 0.002  # from a worker to a router


@dataclass
class Result:
    """What a run was like after its warm-up; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    prompt: int = 0
    cached: int = 0
    work: list[int] = field(default_factory=list)  # tokens computed, by replica

    def percentile(self, share: float) -> float:
        """Of the times to the first token."""
        ordered = sorted(self.ttft)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("inf")

    @property
    def imbalance(self) -> float:
        """The most that one replica computed, over the mean."""
        return max(self.work) / statistics.fmean(self.work) if sum(self.work) else 0.0


@dataclass
class Live:
    """A request that is being answered."""

    session: Session
    turn: int
    sent: float
    lease: Lease
    job: Job
    begun: bool = False


def _made(policy: str, seed: int) -> Policy:
    """The policy, with random numbers that are the same in every run."""
    if policy == "random":
        return RandomChoice(random.Random(seed))
    return PowerOfTwo(random.Random(seed)) if policy == "power-of-two" else POLICIES[policy]()


class World:
    """Replicas, routers in turns, and the events between them."""

    def __init__(self, policy: str, replicas: int, routers: int, shape: Shape = SHAPE) -> None:
        self.now = 0.0
        self.shape = shape
        self.engines = [Simulation(shape, Costs()) for _ in range(replicas)]
        self.idle = [True] * replicas
        self.pools = []
        for seed in range(routers):
            pool = Pool(Limits(eject_share=0.0), clock=lambda: self.now, policy=_made(policy, seed))
            pool.set_endpoints([Endpoint(f"replica-{n}", f"http://{n}") for n in range(replicas)])
            self.pools.append(pool)
        self.cursors: list[list[Cursor | None]] = [[None] * replicas for _ in range(routers)]
        self.live: dict[str, Live] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.turns = itertools.count()
        self.result = Result(work=[0] * replicas)
        self.warm = 0.0

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), what))

    def run(self, sessions: list[Session], warm_s: float, until_s: float) -> Result:
        self.warm = warm_s
        for session in sessions:
            self.at(session.at, lambda session=session: self.send(session, 0))
        self.at(0.0, self.report)
        while self.events and self.events[0][0] < until_s:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self.result

    def report(self) -> None:
        for number, pool in enumerate(self.pools):
            for index, replica in enumerate(pool.replicas()):
                engine = self.engines[index]
                digest = engine.scheduler.blocks.digest
                self.cursors[number][index], change = digest.since(self.cursors[number][index])
                update = LoadUpdate(load=self.load(engine), prefixes=change)
                self.at(self.now + LAG_S, lambda p=pool, r=replica, u=update: p.reported(r, u))
        self.at(self.now + REPORT_S, self.report)

    def load(self, engine: Simulation) -> LoadReport:
        scheduler = engine.scheduler
        blocks = scheduler.blocks
        return LoadReport(
            model="chat",
            ready=True,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_running=scheduler.max_running,
            kv_tokens_used=(blocks.num_blocks - blocks.num_free) * blocks.block_size,
            kv_tokens_total=blocks.num_blocks * blocks.block_size,
            prompt_tokens_total=engine.prompt_tokens,
            completion_tokens_total=engine.completion_tokens,
            prefix_hit_tokens_total=scheduler.prefix_hit_tokens,
            preemptions_total=0,
            steps_total=engine.steps,
            heartbeat_age_s=0.0,
            tokens_owed=scheduler.tokens_owed,
        )

    def send(self, session: Session, turn: int) -> None:
        step = session.turns[turn]
        session.history.append({"role": "user", "content": step.added})
        messages = [ChatMessage(**m) for m in session.history]  # type: ignore[arg-type]
        key = f"{session.name}/{turn}"
        request = ExecuteRequest(
            id=key, model="chat", prompt=Prompt(messages=messages), sampling=SamplingParams(max_tokens=step.output)
        )
        pool = self.pools[next(self.turns) % len(self.pools)]
        ask = pool.asks.of(request, session.name)
        replica = pool.choose([], ask)
        if replica is None:
            self.result.refused += 1
            return
        index = list(pool.replicas()).index(replica)
        lease = pool.lease(replica, ask.prompt_tokens - replica.cached_tokens(ask), step.output, ask)
        tokens = encode_chat(messages)
        marks = marks_for(request, len(tokens), self.shape.block_size)
        job = Job(Request(id=key, tokens=tokens, max_new_tokens=step.output, marks=marks), 1, step.output, "length")
        try:
            self.engines[index].submit(job)
        except Exception:  # the queue is full
            self.result.refused += 1
            lease.release()
            return
        self.live[key] = Live(session, turn, self.now, lease, job)
        if self.idle[index]:
            self.step(index)

    def step(self, index: int) -> None:
        engine = self.engines[index]
        plan = engine.plan()
        self.idle[index] = plan is None
        if plan is None:
            return
        for key in plan.admitted:
            request = self.live[key].job.request
            started = Started(key, request.num_prompt, request.cached_tokens, 1)
            self.at(self.now + LAG_S, lambda live=self.live[key], event=started: live.lease.observe(event))
            if self.now > self.warm:
                self.result.prompt += request.num_prompt
                self.result.cached += request.cached_tokens
                self.result.work[index] += request.num_prompt - request.cached_tokens
        self.at(self.now + plan.seconds, lambda: self.finish(index))

    def finish(self, index: int) -> None:
        for progress in self.engines[index].finish():
            live = self.live[progress.key]
            self.result.work[index] += self.now > self.warm
            if not live.begun:
                live.begun = True
                if live.sent > self.warm:
                    self.result.ttft.append(self.now - live.sent)
            live.lease.observe(Token(index=0, ids=[1]))
            if progress.ended:
                self.end(live, progress.key)
        self.step(index)

    def end(self, live: Live, key: str) -> None:
        del self.live[key]
        live.lease.observe(End(finish_reason="length", prompt_tokens=1, completion_tokens=1))
        live.lease.release()
        self.result.answered += self.now > self.warm
        tokens = live.job.request.tokens[live.job.request.num_prompt :]
        live.session.history.append({"role": "assistant", "content": text_of(tokens)})
        turn = live.turn + 1
        if turn < len(live.session.turns):
            pause = live.session.turns[turn].pause_s
            self.at(self.now + pause, lambda: self.send(live.session, turn))


def run(workload: str, policy: str, rate: float, replicas: int, routers: int, seconds: float, warm: float) -> Result:
    """One policy under one rate of requests a second."""
    sessions = list(itertools.takewhile(lambda s: s.at < seconds, WORKLOADS[workload].sessions(rate)))
    return World(policy, replicas, routers).run(sessions, warm, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workload", choices=WORKLOADS, default="shared-prefix")
    parser.add_argument("--rates", default="20,40")
    parser.add_argument("--policies", default="random,least-tokens,prefix-aware")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--warm", type=float, default=20)
    args = parser.parse_args()
    for policy in args.policies.split(","):
        for rate in args.rates.split(","):
            r = run(args.workload, policy, float(rate), args.replicas, args.routers, args.seconds, args.warm)
            answered = r.answered / (args.seconds - args.warm)
            sys.stdout.write(
                f"{args.workload} {policy:16} {rate:>5}/s answered {answered:6.1f}/s ttft p50 {r.percentile(0.5):6.3f} "
                f"p99 {r.percentile(0.99):7.3f} s cached {r.cached / max(r.prompt, 1):.0%} "
                f"max/mean {r.imbalance:.2f} refused {r.refused}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
