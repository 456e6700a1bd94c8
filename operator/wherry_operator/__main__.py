"""`wherry-operator`: puts the parts together and runs them until SIGTERM."""

import asyncio
import contextlib
import functools
import json
import logging
import signal
import sys
from typing import Any

from wherry_operator import handlers, health
from wherry_operator.api.v1alpha1 import API_VERSION, PLURAL
from wherry_operator.cluster.client import Api, ApiError, Unavailable
from wherry_operator.cluster.election import Election
from wherry_operator.cluster.reconcile import Reconciler
from wherry_operator.controller import Controller
from wherry_operator.metrics import LEADER
from wherry_operator.settings import OperatorSettings, from_args

logger = logging.getLogger("wherry.operator")


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(settings: OperatorSettings) -> None:
    """Everything to stderr; of kopf only what matters."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.WARNING)


async def wait_for_resource(api: Api) -> None:
    """Returns once the API server knows LLMDeployments."""
    while True:
        try:
            answer = await api.request("GET", f"/apis/{API_VERSION}")
            if any(resource["name"] == PLURAL for resource in answer.get("resources", [])):
                return
            problem = "it has no such kind"
        except (ApiError, Unavailable) as error:
            problem = str(error)
        logger.warning("the API server does not know LLMDeployments yet; is the CRD installed? (%s)", problem)
        await asyncio.sleep(2.0)


async def lead(election: Election, controller: Controller) -> None:
    """Works while leading; on a lost lease stops at once and stands by again."""
    while True:
        await election.acquire()
        work = asyncio.create_task(controller.run())
        hold = asyncio.create_task(election.hold())
        try:
            await asyncio.wait([work, hold], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            logger.warning("the lease is lost: standing by")
        finally:
            for task in (work, hold):
                task.cancel()
            await asyncio.gather(work, hold, return_exceptions=True)


async def run(settings: OperatorSettings) -> None:
    """The operator's life, until cancelled."""
    lease_api = await Api.connect(settings.kubeconfig)
    election = Election(lease_api, settings.leader_election_namespace, settings.leader_election_name, settings.identity)
    may_write = election.leading if settings.leader_election else lambda: True
    api = await Api.connect(settings.kubeconfig, may_write)
    watching = asyncio.Event()
    server, port = await health.serve(settings.health_host, settings.health_port, watching.is_set)
    logger.info("serving %s, health on port %d", ", ".join(settings.namespaces) or "all namespaces", port)
    try:
        await wait_for_resource(api)
        controller = Controller(api, Reconciler(api, settings.planning()), settings.namespaces, settings.resync_s)
        connect = functools.partial(Api.configuration, settings.kubeconfig)
        watcher = handlers.Watcher(controller.queue.add, connect, settings.namespaces)
        async with asyncio.TaskGroup() as group:
            group.create_task(watcher.run())
            watching.set()
            if settings.leader_election:
                group.create_task(lead(election, controller))
            else:
                LEADER.set(1)
                group.create_task(controller.run())
    finally:
        if settings.leader_election:
            await election.release()
        await server.cleanup()
        await asyncio.gather(api.close(), lease_api.close())


async def run_until_told(settings: OperatorSettings) -> None:
    """Runs, and ends on SIGTERM or SIGINT as after a day's work."""
    task = asyncio.create_task(run(settings))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> None:
    """Entry point."""
    settings = from_args(sys.argv[1:])
    configure_logging(settings)
    asyncio.run(run_until_told(settings))


if __name__ == "__main__":
    main()
