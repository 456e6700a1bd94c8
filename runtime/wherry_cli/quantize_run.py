"""Runs `wherry quantize`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wherry_cli.serve import Failure
from wherry_runtime.calibration.pipeline import Job, Report, quantize
from wherry_runtime.calibration.sensitivity import mixed, sensitivities
from wherry_runtime.loading.locate import locate
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

MEASURED = 4  # one window to measure on for so many to calibrate with


@dataclass(frozen=True)
class Flags:
    """The command's options; see there."""

    method: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool
    true_sequential: bool
    damping: float
    smoothing: float
    bits_per_weight: float
    sparsity: float
    outliers: float
    measure_on: Path | None
    calibration: Path | None
    windows: int
    length: int


def recipe_of(name: str) -> Recipe:
    """The method called so.

    Raises:
        Failure: there is none; the message says which there are, and what each is for.
    """
    recipes = known()
    if name not in recipes:
        listed = "\n".join(f"  {recipe.name:12} {recipe.summary}" for recipe in recipes.values())
        raise Failure(f"{name!r} is no method of quantizing; there are\n{listed}")
    return recipes[name]


def run(uri: str, target: Path, flags: Flags) -> None:
    """Quantizes, with a progress bar on standard error.

    Raises:
        Failure: settings that the method does not have, or a text that is missing.
        ModelError: what is wrong with the model or the text.
    """
    recipe = recipe_of(flags.method)
    source = locate(uri)
    try:
        settings = recipe.settled(
            Settings(
                bits=flags.bits,
                group=flags.group,
                symmetric=flags.symmetric,
                act_order=flags.act_order,
                true_sequential=flags.true_sequential,
                damping=flags.damping,
                smoothing=flags.smoothing,
                bits_per_weight=flags.bits_per_weight,
                sparsity=flags.sparsity,
                outliers=flags.outliers,
            )
        )
    except ValueError as error:
        raise Failure(str(error)) from None
    if flags.measure_on is not None:
        raise Failure("--measure-on is for --method auto; wherry eval kl measures what is there")
    if recipe.calibrates and flags.calibration is None:
        raise Failure(f"{recipe.name} looks at what goes through the model: give it a text with --calibration FILE")
    if not recipe.calibrates and flags.calibration is not None:
        raise Failure(f"{recipe.name} needs no text; leave out --calibration")
    text = flags.calibration
    chosen = [] if text is None else windows(text, Tokenizer(source), flags.windows, flags.length)
    with _progress() as progress:
        mix: dict[str, Settings] = {}
        if settings.bits_per_weight:
            found = sensitivities(source, target, recipe, settings, chosen, _layers(progress, "sensitivity"))
            mix = mixed(found, recipe, settings)
        quantize(Job(source, target, recipe, settings, chosen, mix), _layers(progress, recipe.name))
    _show(source, target)


def run_auto(uri: str, target: Path, flags: Flags, limit: float) -> None:
    """Quantizes in the smallest way that is good enough.

    Raises:
        Failure: a text is missing, or something is set that is auto's to find.
        ModelError: what is wrong with the model or the text, or nothing is good enough.
    """
    from wherry_runtime.calibration.auto import choose

    if flags.calibration is None:
        raise Failure("auto measures what it tries: give it a text with --calibration FILE")
    if flags.bits or flags.group or not flags.symmetric or flags.bits_per_weight or flags.sparsity or flags.outliers:
        raise Failure(
            "auto finds bits and groups itself; leave out --bits, --group, --asymmetric and what is like them"
        )
    source = locate(uri)
    tokenizer = Tokenizer(source)
    chosen = windows(flags.calibration, tokenizer, flags.windows, flags.length)
    text = None
    if flags.measure_on is not None:
        text = windows(flags.measure_on, tokenizer, max(1, flags.windows // MEASURED), flags.length)
    with _progress() as progress:
        found, loss = choose(source, target, limit, chosen, lambda candidate: _layers(progress, str(candidate)), text)
    Console().print(f"{found}: {loss} nats per token", highlight=False, soft_wrap=True)
    _show(source, target)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _layers(progress: Progress, name: str) -> Report:
    task = progress.add_task(f"{name}: layers")
    return lambda done, total: progress.update(task, completed=done, total=total)


def _show(source: Path, target: Path) -> None:
    before, after = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (source, target))
    sizes = f"{after / 1e6:,.1f} MB, {after / before:.0%} of {before / 1e6:,.1f} MB"
    Console().print(f"{target}: {sizes}", highlight=False, soft_wrap=True)
