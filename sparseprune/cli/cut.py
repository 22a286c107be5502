"""`sparseprune cut`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparseprune.cli import console, files
from sparseprune.cli.options import Calibration, DType, DTypeOption, Exclude, Include, Json, Model, Out
from sparseprune.options import Windowing

__all__ = ["cut"]


def cut(
    model: Model,
    out: Out,
    windowing: Windowing,
    structure: Annotated[str, typer.Option(help='"neurons", "heads" or "layers".')],
    fraction: Annotated[float, typer.Option(help="Fraction of them to remove.")],
    criterion: Annotated[
        str, typer.Option(help='Which go; "auto": the best with --calibration, "l1" without.')
    ] = "auto",
    calibration: Calibration = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Cut whole neurons, heads or layers out of MODEL, and write the smaller dense model to the folder OUT."""
    from sparseprune.cli.stream import calibration_data
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.surgery import CRITERIA, LAYER_CRITERIA, STRUCTURES
    from sparseprune.surgery import cut as cut_model

    if structure not in STRUCTURES:
        raise ValueError(f"--structure: must be one of {', '.join(STRUCTURES)}, got {structure}")
    if not 0 < fraction < 1:
        raise ValueError(f"--fraction: must be in (0, 1), got {fraction}")
    known = ("auto", *(LAYER_CRITERIA if structure == "layers" else CRITERIA))
    if criterion not in known:
        raise ValueError(f"--criterion: must be one of {', '.join(known)} for {structure}, got {criterion}")
    files.check_text("--calibration", calibration)
    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if calibration is not None:
        data = calibration_data(calibration, tokenizer, windowing, seed, max_length(loaded))
    report = cut_model(
        loaded,
        structure,
        fraction,
        criterion=criterion,
        calibration=data,
        include=include or None,
        exclude=exclude or None,
        seed=seed,
        progress=True,
    )
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out({"cut": report.to_dict(), "saved": str(out)}, lambda: f"{report}\nsaved in {out}", as_json)
