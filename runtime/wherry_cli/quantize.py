"""`wherry quantize`: writes a checkpoint with fewer bits."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from wherry_cli.serve import Failure, model_uri


def app(
    source: Annotated[str, typer.Argument(help="The model's directory, or sample://tiny.")],
    target: Annotated[Path, typer.Argument(help="Directory to write; it must not be there yet.")],
    method: Annotated[
        str,
        typer.Option(help="How to quantize: gptq, awq, int8 …; auto: the smallest that keeps --max-quality-loss."),
    ],
    bits: Annotated[int, typer.Option(help="Bits of a weight; 0: the method's own.", min=0)] = 0,
    group: Annotated[int, typer.Option(help="Weights that share a scale; 0: the method's own.", min=0)] = 0,
    asymmetric: Annotated[
        bool, typer.Option(help="Zero points: a little finer; 4 bits then take the memory of 8 when they are run here.")
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help="Text in UTF-8, like what the model is used for.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.", min=16)] = 512,
    act_order: Annotated[bool, typer.Option(help="GPTQ: columns with the largest activations first.")] = True,
    true_sequential: Annotated[
        bool, typer.Option(help="GPTQ: a layer's matrices see what rounding those before them did.")
    ] = True,
    damping: Annotated[float, typer.Option(help="GPTQ: share of the mean diagonal added to the Hessian.")] = 0.01,
    max_quality_loss: Annotated[
        float, typer.Option(help="For auto: mean divergence from the model in nats per token; 0.01 is about 1%.", min=0)
    ] = 0.01,
    bits_per_weight: Annotated[
        float,
        typer.Option(help="GPTQ: as many on average, scales included, more where rounding costs more; 0: all alike."),
    ] = 0.0,
    sparsity: Annotated[float, typer.Option(help="prune: share of weights that become zero; 0: half.")] = 0.0,
    outliers: Annotated[
        float, typer.Option(help="llm-int8: activations of this magnitude are multiplied apart; 0: of 6.", min=0)
    ] = 0.0,
    measure_on: Annotated[
        Path | None,
        typer.Option(help="For auto: text to measure on; without, an eighth of the calibration is kept for it."),
    ] = None,
    smoothing: Annotated[float, typer.Option(help="SmoothQuant: how much of the range goes into weights.")] = 0.5,
) -> None:
    """Write a quantized copy of a model, in a layout that other programs read as well.

    A run that was cut off goes on where it was when it is started again with the same arguments.
    """
    from wherry_cli.quantize_run import Flags, run, run_auto  # the engine takes seconds to import
    from wherry_runtime.loading.errors import ModelError

    try:
        flags = Flags(
            *(method, bits, group, not asymmetric, act_order, true_sequential, damping, smoothing),
            *(bits_per_weight, sparsity, outliers, measure_on, calibration, windows, length),
        )
        if method == "auto":
            run_auto(model_uri(source), target, flags, max_quality_loss)
        else:
            run(model_uri(source), target, flags)
    except (Failure, ModelError, OSError) as error:
        sys.stderr.write(f"wherry quantize: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("wherry quantize: stopped; the same command goes on from here\n")
        raise typer.Exit(130) from None
