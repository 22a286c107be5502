"""`sparseprune cut`."""

from __future__ import annotations

from sparseprune.cli import console, files
from sparseprune.cli.options import Calibration, DType, DTypeOption, Json, Model, Out
from sparseprune.options import Names, Windowing
from sparseprune.surgery.options import Cutting

__all__ = ["cut"]


def cut(
    model: Model,
    out: Out,
    cutting: Cutting,
    windowing: Windowing,
    names: Names,
    calibration: Calibration = None,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Cut whole neurons, heads or layers out of MODEL, and write the smaller dense model to the folder OUT."""
    from sparseprune.cli.stream import calibration_data
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.surgery import cut as cut_model

    files.check_text("--calibration", calibration)
    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if calibration is not None:
        data = calibration_data(calibration, tokenizer, windowing, cutting.seed, max_length(loaded))
    report = cut_model(loaded, **vars(cutting), **vars(names), calibration=data, progress=True)
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out({"cut": report.to_dict(), "saved": str(out)}, lambda: f"{report}\nsaved in {out}", as_json)
