"""`wherry-router`: the OpenAI API in front of workers."""

import argparse
import asyncio
import contextlib
import functools
import gc
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from typing import Any, NamedTuple

import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from wherry_protocol.http.bounded import Bounds
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.server import AddressError, bind, covers_loopback, serve, stop_on_signals, url_of
from wherry_protocol.http.tls import TlsError
from wherry_protocol.naming import ENV_REDIS_URL, ENV_WORKER_TOKEN, ROUTER_PORT
from wherry_router import redis_url, worker_tls
from wherry_router.admission import flags as admission_flags
from wherry_router.admission.entry import Admission
from wherry_router.admission.settings import QueueSettings
from wherry_router.app import OPEN_PATHS, RouterApp
from wherry_router.discovery.endpoints import EndpointPoll, parse_endpoints
from wherry_router.identity import flags as identity
from wherry_router.limits import flags as limiting
from wherry_router.listener import TlsFiles, make_tls
from wherry_router.listener import add_arguments as add_tls_arguments
from wherry_router.listener import check as check_tls
from wherry_router.metrics import RouterMetrics
from wherry_router.policies import POLICIES
from wherry_router.policies import add_arguments as add_policy_arguments
from wherry_router.pool import Pool
from wherry_router.replicas import Replicas
from wherry_router.response_cache import flags as caching
from wherry_router.settings import Limits
from wherry_router.upstream import Upstream
from wherry_router.worker_tls import WorkerTls

log = logging.getLogger("wherry.router")

_SHARES = frozenset({"eject_share", "eject_fault_rate", "retry_share", "panic_share"})

_BOUNDS = {
    "max_body_bytes": "bytes of a request's body",
    "max_concurrent": "requests at a time; over it the answer is 429",
    "max_connections": "connections of clients at once; 0: no bound",
    "head_timeout_s": "seconds that a request's line and headers have to arrive",
    "unread_timeout_s": "seconds that a client has to take what waits for it",
    "body_timeout_s": "seconds that its body then has",
    "first_token_timeout_s": "seconds from a request to its first token",
    "no_replica_wait_s": "seconds that a request waits while no replica is ready",
    "max_tries": "replicas that one request may be tried on",
    "resume_wait_s": "seconds that an answer whose worker is lost waits for another",
    "max_resume_tries": "workers that may be lost one after the other without a new token of an answer",
    "stall_s": "seconds of silence after which a worker is asked whether it is alive",
    "probe_timeout_s": "seconds that it has to answer; more for one that has usually taken longer",
    "max_per_replica": "requests at a time on one replica; over it another is chosen, and with none left it is 429",
    "breaker_faults": "failed requests in a row that open a replica's circuit breaker; a lost worker opens it at once",
    "breaker_max_open_s": "seconds after which an open breaker lets a request try though no probe succeeded",
    "eject_share": "share of the replicas that outlier ejection may take out at a time; 0: none",
    "eject_s": "seconds that an outlier is out the first time; then twice as long each time",
    "eject_fault_rate": "share of failed requests in 30 s that makes an outlier, if others fail much less",
    "eject_ttft_factor": "times the others' median time to first token that makes an outlier",
    "retry_share": "retries allowed as a share of the requests of ten seconds",
    "retry_min_per_s": "retries a second that are allowed anyway",
    "panic_share": "share of replicas that look bad, over which all of them are used again",
}


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def argument_parser() -> argparse.ArgumentParser:
    """Every flag of the router."""
    parser = argparse.ArgumentParser(prog="wherry-router", allow_abbrev=False, description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--deployment", help="watch the pods of this LLMDeployment")
    where.add_argument(
        "--endpoints",
        type=parse_endpoints,
        help="workers, as http://host:port,http://host:port; https with --worker-tls",
    )
    parser.add_argument("--namespace", help="the LLMDeployment's namespace (default: $POD_NAMESPACE, else `default`)")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, else in-cluster, else ~/.kube/config")
    parser.add_argument("--model", required=True, help="the model name that clients ask for")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--loopback",
        action="store_true",
        help="listen on 127.0.0.1 too, where `kubectl port-forward` connects; nothing more if --host is loopback",
    )
    parser.add_argument("--port", type=int, default=ROUTER_PORT, help="0: a free one (default: %(default)s)")
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=300,
        help="seconds that running answers get after SIGTERM (%(default)s)",
    )
    parser.add_argument(
        "--drain-grace-s", type=float, default=5, help="seconds that new requests are taken after SIGTERM (%(default)s)"
    )
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="end a stream whose worker is lost with an error, instead of going on with it on another",
    )
    add_policy_arguments(parser)
    defaults = Limits()
    for name, text in _BOUNDS.items():
        default = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        kind = _share if name in _SHARES else type(default)
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    identity.add_arguments(parser)
    admission_flags.add_arguments(parser)
    caching.add_arguments(parser)
    limiting.add_arguments(parser)
    add_tls_arguments(parser)
    worker_tls.add_arguments(parser)
    return parser


async def _discovery(
    args: argparse.Namespace, upstream: Upstream, pool: Pool, stack: contextlib.AsyncExitStack
) -> None:
    if args.endpoints:
        await EndpointPoll(args.endpoints, args.model, upstream, pool).run()
        return
    # Imported late: the Kubernetes client takes a second, and --endpoints does not need it.
    from wherry_router.discovery.watch import PodWatch, api_client

    api = await stack.enter_async_context(await api_client(args.kubeconfig))
    namespace = args.namespace or os.environ.get("POD_NAMESPACE") or "default"
    await PodWatch(api, namespace, args.deployment, pool, secure=bool(args.worker_tls)).run()


class Certificates(NamedTuple):
    """What the router shows its clients, and its workers."""

    clients: TlsFiles | None
    workers: WorkerTls | None


def _following(certificates: Certificates, metrics: RouterMetrics) -> list[tuple[str, Coroutine[Any, Any, None]]]:
    """The work of following certificates; their metrics are there from now on."""
    tls, to_workers = certificates
    work: list[tuple[str, Coroutine[Any, Any, None]]] = []
    if tls is not None:
        metrics.watch_stale(tls.stale)
        metrics.tls_not_after.set_function(lambda: tls.not_after)
        work.append(("following the certificate", tls.watched.run()))
    if to_workers is not None:
        metrics.watch_stale(to_workers.stale)
        metrics.worker_tls_not_after.set_function(lambda: to_workers.files.not_after)
        work.append(("following the certificate for workers", to_workers.files.watched.run()))
    return work


def _registry() -> CollectorRegistry:
    """With what Prometheus tells of every process: memory, processor time, open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def _spare_the_collector() -> None:
    """Keeps the garbage collector from going through all that the program consists of, again and again, for the few
    objects of a request: otherwise it takes 7% of the processor, and now and then a request waits 10 ms for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def _run(
    args: argparse.Namespace, queue: QueueSettings, sockets: list[socket.socket], certificates: Certificates
) -> int:
    tls, to_workers = certificates
    limits = Limits(**{name: getattr(args, name) for name in Limits.__struct_fields__ if hasattr(args, name)})
    registry = _registry()
    metrics = RouterMetrics(registry)
    stop = asyncio.Event()
    stop_on_signals(stop)
    status = 0

    def ended(task: asyncio.Task[None]) -> None:
        # None ends by itself; without it the router would go blind, so it goes down and is started anew.
        nonlocal status
        if not task.cancelled() and not stop.is_set():
            log.critical(f"{task.get_name()} failed", exc_info=task.exception())
            status = 1
            stop.set()

    async with contextlib.AsyncExitStack() as stack:
        upstream = Upstream(os.environ.get(ENV_WORKER_TOKEN), limits, to_workers)
        stack.push_async_callback(upstream.close)
        backend = Replicas(upstream, limits, metrics, POLICIES[args.policy]())
        stack.push_async_callback(backend.close)
        gate = identity.make_gate(args, OPEN_PATHS)
        metrics.watch_stale(gate.stale)
        cache, keepers = caching.make(args, metrics.cache, stack)
        limiter = limiting.make_limiter(args, registry)
        stack.push_async_callback(limiter.close)
        app = RouterApp(
            backend,
            args.model,
            limits,
            metrics,
            registry,
            gate,
            report=backend.report,
            worker_token=os.environ.get(ENV_WORKER_TOKEN),
            cache=cache,
            admission=Admission(queue, metrics.admission, backend.pool, limits.max_per_replica),
            limiter=limiter,
        )
        work = [("discovery", _discovery(args, upstream, backend.pool, stack))]
        work += [("following the keys", follower) for follower in gate.followers()]
        work += [("counting limits", follower) for follower in limiter.followers()]
        work += [("keeping answers", follower) for follower in keepers]
        work += _following(certificates, metrics)
        tasks = [asyncio.create_task(job, name=name) for name, job in work]
        for task in tasks:
            task.add_done_callback(ended)
        url = url_of(sockets[0], "http" if tls is None else "https")
        log.info("listening", extra={"fields": {"url": url, "model": args.model}})
        drain = functools.partial(app.drain, args.drain_timeout_s, args.drain_grace_s)
        _spare_the_collector()
        bounds = Bounds(limits.head_timeout_s, limits.unread_timeout_s, limits.max_connections)
        await serve(app, sockets, stop, drain, None if tls is None else tls.context, bounds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return status


def main(argv: list[str] | None = None) -> None:
    """Runs until SIGTERM. Exits with 0, 1 (discovery failed) or 2 (the settings are wrong)."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    identity.check(parser, args)
    try:
        queue = admission_flags.settings(args)
    except ValueError as error:
        parser.error(str(error))
    redis_url.check(parser, ENV_REDIS_URL)
    caching.check(parser, args)
    check_tls(parser, args)
    worker_tls.check(parser, args)
    set_up()
    try:
        sockets = [bind(args.host, args.port)]
        if args.loopback and not covers_loopback(sockets[0]):
            sockets.append(bind("127.0.0.1", sockets[0].getsockname()[1]))
        certificates = Certificates(make_tls(args), worker_tls.make_worker_tls(args))
    except (AddressError, TlsError) as error:
        sys.stderr.write(f"wherry-router: {error}\n")
        sys.exit(2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_run(args, queue, sockets, certificates))
    sys.exit(status)


if __name__ == "__main__":
    main()
