"""`wherry-operator`: puts the parts together and runs them until SIGTERM."""

import asyncio
import json
import logging
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
    """The operator's life."""
    lease_api = await Api.connect(settings.kubeconfig)
    election = Election(lease_api, settings.leader_election_namespace, settings.leader_election_name, settings.identity)
    may_write = election.leading if settings.leader_election else lambda: True
    api = await Api.connect(settings.kubeconfig, may_write)
    stop = asyncio.Event()
    watching = False
    server, port = await health.serve(settings.health_host, settings.health_port, lambda: watching)
    logger.info("serving %s, health on port %d", ", ".join(settings.namespaces) or "all namespaces", port)
    tasks: list[asyncio.Task[None]] = []
    try:
        await wait_for_resource(api)
        controller = Controller(api, Reconciler(api, settings.planning()), settings.namespaces, settings.resync_s)
        watch = asyncio.create_task(
            handlers.watch(
                controller.queue.add, lambda: Api.configuration(settings.kubeconfig), settings.namespaces, stop
            )
        )
        watching = True
        if settings.leader_election:
            tasks = [watch, asyncio.create_task(lead(election, controller))]
        else:
            LEADER.set(1)
            tasks = [watch, asyncio.create_task(controller.run())]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        stop.set()
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if settings.leader_election:
            await election.release()
        await server.cleanup()
        await asyncio.gather(api.close(), lease_api.close())


def main() -> None:
    """Entry point."""
    settings = from_args(sys.argv[1:])
    configure_logging(settings)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
