"""`wherry local …`: a real Kubernetes control plane on this machine, with pods as local processes.

For trying Wherry and for tests. It is not a container runtime: see docs/local-mode.md.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from wherry_cli.progress import console, step
from wherry_local.assets import catalog
from wherry_local.assets.provide import provide
from wherry_local.components import Options
from wherry_local.errors import LocalError
from wherry_local.kube import UNREACHABLE, ApiError
from wherry_local.lifecycle import Cluster
from wherry_local.node.logs import LogOptions, read
from wherry_local.paths import default_home, project_root

app = typer.Typer(no_args_is_help=True, help=__doc__)
out = Console(highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Show what the user can act on, without a traceback."""
    try:
        yield
    except LocalError as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        raise typer.Exit(1) from None


def _cluster() -> Cluster:
    return Cluster(default_home())


@app.command()
def up(
    nodes: Annotated[int, typer.Option(min=1, max=99, help="process nodes")] = 3,
    operator: Annotated[bool, typer.Option(help="run the Wherry operator too")] = True,
    cpu: Annotated[str, typer.Option(help="CPUs that each node claims to have (default: this machine's)")] = "",
    memory: Annotated[str, typer.Option(help="memory that each node claims to have, such as 8Gi")] = "",
    backoff_scale: Annotated[float, typer.Option(min=0, help="factor on the back-off of crashing containers")] = 1.0,
) -> None:
    """Start the cluster, or what of it does not run. Run again, it changes only what differs."""
    with _errors():
        began = time.monotonic()
        assets = provide(catalog.LOCAL, step)
        cluster = _cluster()
        crds = sorted((project_root() / "crds").glob("*.yaml"))
        options = Options(nodes=nodes, operator=operator, cpu=cpu, memory=memory, backoff_scale=backoff_scale)
        cluster.up(options, assets, crds, step)
        console.print(f"The local cluster is up [dim]({time.monotonic() - began:.1f} s)[/]. For kubectl:")
        out.print(f"export KUBECONFIG={cluster.home.kubeconfig}")


@app.command()
def down(purge: Annotated[bool, typer.Option("--purge", help="delete the cluster's data too")] = False) -> None:
    """End every process of the cluster. Its objects are there again after the next `up`, unless purged."""
    with _errors():
        _cluster().down(purge=purge, progress=step)


@app.command()
def env() -> None:
    """Print shell settings for kubectl: `eval "$(wherry local env)"`."""
    with _errors():
        cluster = _cluster()
        if not cluster.home.kubeconfig.exists():
            raise LocalError("there is no local cluster: start one with `wherry local up`")
        out.print(f"export KUBECONFIG={cluster.home.kubeconfig}")
        out.print(f'export PATH="$PATH:{provide(["kubectl"], step)}"', markup=False)


@app.command()
def assets(
    names: Annotated[list[str] | None, typer.Argument(help="binaries; none: all that --for needs")] = None,
    purpose: Annotated[Literal["local", "kind"], typer.Option("--for", help="what the binaries are for")] = "local",
) -> None:
    """Get Kubernetes' binaries and print the directory they are in."""
    with _errors():
        wanted = names or (catalog.LOCAL if purpose == "local" else catalog.KIND_SET)
        out.print(str(provide(wanted, step)), markup=False)


def _components_table(cluster: Cluster) -> Table:
    table = Table("COMPONENT", "STATE", "READY", "RESTARTS", "PID", box=None, pad_edge=False)
    for name, entry in sorted((cluster.state().get("components") or {}).items()):
        ready = "[green]yes[/]" if entry["ready"] else "[red]no[/]"
        table.add_row(name, entry["state"], ready, str(entry["restarts"]), str(entry["pid"] or "–"))
    return table


async def _objects(cluster: Cluster) -> tuple[list[Any], list[Any]]:
    async with cluster.kube() as kube:
        return (await kube.get("/api/v1/nodes"))["items"], (await kube.get("/api/v1/pods"))["items"]


def _ready(item: Any) -> str:
    conditions = item.get("status", {}).get("conditions") or []
    value = next((c["status"] for c in conditions if c["type"] == "Ready"), "Unknown")
    return "[green]yes[/]" if value == "True" else f"[red]{'no' if value == 'False' else 'unknown'}[/]"


@app.command()
def status() -> None:
    """Show components, nodes and pods."""
    with _errors():
        cluster = _cluster()
        console.print(f"state directory: {cluster.home.root}")
        if not cluster.running():
            raise LocalError("the local cluster does not run: start it with `wherry local up`")
        out.print(_components_table(cluster))
        try:
            nodes, pods = asyncio.run(_objects(cluster))
        except (ApiError, *UNREACHABLE) as error:
            raise LocalError(
                f"the API server does not answer ({error}); see `wherry local logs kube-apiserver`"
            ) from error
        table = Table("NODE", "READY", "ADDRESS", "PODS", box=None, pad_edge=False)
        for node in nodes:
            name = node["metadata"]["name"]
            address = next(
                (a["address"] for a in node["status"].get("addresses") or [] if a["type"] == "InternalIP"), ""
            )
            table.add_row(name, _ready(node), address, str(sum(pod["spec"].get("nodeName") == name for pod in pods)))
        out.print("", table, sep="\n")
        if pods:
            table = Table("POD", "PHASE", "READY", "NODE", "ADDRESS", box=None, pad_edge=False)
            for pod in pods:
                name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
                where = pod["spec"].get("nodeName", "–"), pod["status"].get("podIP", "–")
                table.add_row(name, pod["status"].get("phase", ""), _ready(pod), *where)
            out.print("", table, sep="\n")


@app.command()
def logs(
    component: Annotated[str, typer.Argument(help="a component or node, as `wherry local status` names it")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as it is written")] = False,
    tail: Annotated[int, typer.Option(help="lines from the end; -1: all")] = -1,
) -> None:
    """Print the log of a component or node. For pods use `kubectl logs`."""
    with _errors():
        cluster = _cluster()
        path = cluster.home.log(component)
        if not path.exists():
            names = sorted(log.stem for log in path.parent.glob("*.log"))
            raise LocalError(f"there is no log of {component!r}; there are {', '.join(names) or 'none'}")

        async def copy() -> None:
            options = LogOptions(follow=follow, tail=tail)
            async for piece in read(path, options, cluster.running, plain=True):
                sys.stdout.buffer.write(piece)
                sys.stdout.flush()

        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            asyncio.run(copy())


Node = Annotated[str, typer.Argument(help="a node's name or number: node-2 or 2")]


@app.command()
def kill_node(node: Node) -> None:
    """Kill a node and all its pods' processes at once, as a power failure would."""
    with _errors():
        name = _cluster().kill_node(node)
        console.print(f"killed {name}; bring it back with `wherry local start-node {name}`")


@app.command()
def freeze_node(node: Node) -> None:
    """Stop a node and all its pods' processes where they are, as a hung machine would."""
    with _errors():
        name = _cluster().freeze_node(node)
        console.print(f"froze {name}; thaw it with `wherry local thaw-node {name}`")


@app.command()
def thaw_node(node: Node) -> None:
    """Let a frozen node go on."""
    start_node(node)


@app.command()
def start_node(node: Node) -> None:
    """Bring back a node that was killed or frozen."""
    with _errors():
        name = _cluster().start_node(node)
        console.print(f"started {name}")
