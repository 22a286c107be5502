"""`sparseprune quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import Calibration, DType, DTypeOption, Json, Model, Out, Typed
from sparseprune.cli.windows import calibration_data
from sparseprune.options import Layers, Windowing
from sparseprune.quantization.options import Quantization

__all__ = ["quantize"]


def quantize(
    model: Model,
    out: Out,
    windowing: Windowing,
    quantization: Quantization,
    layers: Layers,
    typed: Typed,
    calibration: Calibration = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the calibration windows.")] = 0,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Give the linears of MODEL weights of 4 or 8 bits, and write it to the folder OUT.

    MODEL is dense; `sparseprune prune --quantize` prunes and quantizes in one call.
    """
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.quantization.driver import quantize as quantize_model
    from sparseprune.quantization.driver import solver_for

    solver_for(quantization, calibration is not None)
    if calibration is None:
        typed.refuse(
            "count", "length", "seed", rule="must come with --calibration; add it, or leave this out"
        )
    text = files.text("--calibration", calibration)
    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if text is not None:
        data = calibration_data(text, tokenizer, windowing, seed, max_length(loaded))
    report = quantize_model(
        loaded, **vars(quantization), **vars(layers), calibration=data, progress=not as_json
    )
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out(
        {"quantized": report.to_dict(), "saved": str(out)}, lambda: f"{report}\nsaved in {out}", as_json
    )
