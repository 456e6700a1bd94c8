"""`python -m wherry_local.node`: one process node."""

import argparse
import asyncio
import logging
import os
from pathlib import Path

from wherry_local.components import sample_models
from wherry_local.node.agent import Node, NodeOptions
from wherry_local.paths import ENV_MARK, ENV_MARK_NODE, Home
from wherry_protocol.naming import ENV_SAMPLE_MODELS


def _machine_memory() -> str:
    return str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="wherry_local.node")
    for flag in ("home", "name", "address", "pod-network", "api-service"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--cpu", default=str(len(os.sched_getaffinity(0))))
    parser.add_argument("--memory", default=_machine_memory())
    parser.add_argument("--backoff-scale", type=float, default=1.0)
    values = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    home = Home(Path(values.pop("home")))
    env = {ENV_SAMPLE_MODELS: str(sample_models()), ENV_MARK: str(home.root)}
    env[ENV_MARK_NODE] = str(home.node(values["name"]))
    asyncio.run(Node(NodeOptions(home=home, container_env=env, **values)).run())


if __name__ == "__main__":
    main()
