"""`wherry plan FILE`: what the operator would do about the LLMDeployments in a file. Nothing is changed."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from kubernetes.aio import config
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wherry_operator.cluster.client import Api, ApiError, Unavailable
from wherry_operator.cluster.preview import Preview, manifests, preview
from wherry_operator.desired.common import RenderSettings
from wherry_operator.planning.types import Action, Settings

SAME, DIFFERENT, TROUBLE = 0, 1, 2
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def plan(
    file: Annotated[str, typer.Argument(help="A YAML file with LLMDeployments; - reads standard input.")],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="For manifests that name none.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
    kubeconfig: Annotated[str | None, typer.Option(help="Else $KUBECONFIG or ~/.kube/config.")] = None,
    runtime_image: Annotated[str | None, typer.Option(help="Plan for an operator with this --runtime-image.")] = None,
    router_image: Annotated[str | None, typer.Option(help="Plan for an operator with this --router-image.")] = None,
) -> None:
    """Show what applying FILE would make the operator do, and change nothing.

    The API server checks the manifest in a dry run, and the operator's own planner looks at the cluster as it is now.

    Exits like diff: 0 if there is nothing to do, 1 if something would change, 2 if there is trouble.
    """
    if output not in ("table", "json"):
        raise typer.BadParameter("must be table or json", param_hint="--output")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        wanted = list(manifests(text))
        settings = Settings(RenderSettings(runtime_image, router_image)) if runtime_image and router_image else None
        previews = asyncio.run(_previews(wanted, namespace, kubeconfig, settings))
    except (OSError, UnicodeDecodeError, ValueError, ApiError, Unavailable, config.ConfigException) as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        raise typer.Exit(TROUBLE) from error
    if not wanted:
        err.print(f"[red]error:[/] there is no LLMDeployment in {escape(file)}")
        raise typer.Exit(TROUBLE)
    if output == "json":
        sys.stdout.write(json.dumps([_as_json(entry) for entry in previews], indent=2, default=str) + "\n")
    else:
        for entry in previews:
            _show(entry)
    raise typer.Exit(_exit_code(previews))


app = plan


app = plan


async def _previews(
    wanted: list[dict[str, Any]], namespace: str, kubeconfig: str | None, settings: Settings | None
) -> list[Preview]:
    api = await Api.connect(kubeconfig)
    try:
        where = namespace or _context_namespace(kubeconfig)
        return [await preview(api, manifest, where, settings) for manifest in wanted]
    finally:
        await api.close()


def _context_namespace(kubeconfig: str | None) -> str:
    try:
        _, active = config.list_kube_config_contexts(config_file=kubeconfig)
    except (config.ConfigException, OSError):
        return "default"
    return str(active["context"].get("namespace") or "default")


def _exit_code(previews: list[Preview]) -> int:
    if any(entry.refused or (entry.plan and entry.plan.problem) for entry in previews):
        return TROUBLE
    changed = any(not entry.exists or entry.changes or (entry.plan and entry.plan.actions) for entry in previews)
    return DIFFERENT if changed else SAME


def _title(entry: Preview) -> str:
    return f"{entry.namespace}/{entry.name}"


_SIGNS = {
    "create": "[green]+ create[/]",
    "apply": "[yellow]~ apply[/]",
    "annotate": "[yellow]~ mark[/]",
    "delete": "[red]- delete[/]",
}


def _show(entry: Preview) -> None:
    out.print(f"[bold]{escape(_title(entry))}[/]" + ("" if entry.exists or entry.refused else " is new"))
    if entry.refused:
        out.print(f"  [red]the API server refuses it:[/] {escape(entry.refused)}\n")
        return
    for path, before, after in entry.changes:
        out.print(f"  {escape(path)}: {_value(before)} → {_value(after)}")
    if entry.plan is None:
        return
    if entry.plan.problem:
        out.print(f"  [red]{entry.plan.problem.reason}:[/] {escape(entry.plan.problem.message)}\n")
        return
    rows = [(_SIGNS[a.verb], f"{a.kind} {a.name}", a.reason) for a in _shown(entry)]
    rows += [(f"[dim]later: {p.action}[/]", p.target, p.reason) for p in entry.plan.pending]
    if not rows:
        out.print("  nothing to do\n")
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("  action", "object", "why"):
        table.add_column(column)
    for sign, what, why in rows:
        table.add_row("  " + sign, escape(what), escape(why))
    out.print(table)
    out.print()


def _value(value: Any) -> str:
    return "[dim]unset[/]" if value is None else escape(json.dumps(value))


def _shown(entry: Preview) -> list[Action]:
    # That the operator marks the object with its finalizer is of no interest here.
    return [a for a in entry.plan.actions if a.verb in _SIGNS] if entry.plan else []


def _as_json(entry: Preview) -> dict[str, Any]:
    plan = entry.plan
    return {
        "name": entry.name,
        "namespace": entry.namespace,
        "exists": entry.exists,
        "refused": entry.refused or None,
        "problem": {"reason": plan.problem.reason, "message": plan.problem.message} if plan and plan.problem else None,
        "changes": [{"field": path, "before": before, "after": after} for path, before, after in entry.changes],
        "actions": [{"verb": a.verb, "kind": a.kind, "name": a.name, "reason": a.reason} for a in _shown(entry)],
        "pending": [pending.to_wire() for pending in plan.pending] if plan else [],
    }
