"""`sparseprune cut`."""

from __future__ import annotations

from sparseprune.cli import console, files
from sparseprune.cli.options import Calibration, DType, DTypeOption, Json, Model, Out, Typed
from sparseprune.cli.windows import calibration_data
from sparseprune.options import Names, Windowing
from sparseprune.surgery.options import Cutting

__all__ = ["cut"]


def cut(
    model: Model,
    out: Out,
    cutting: Cutting,
    windowing: Windowing,
    names: Names,
    typed: Typed,
    calibration: Calibration = None,
    dtype: DTypeOption = DType.auto,
    as_json: Json = False,
) -> None:
    """Cut whole neurons, heads or layers out of MODEL, and write the smaller dense model to the folder OUT."""
    from sparseprune.io.checkpoint import save
    from sparseprune.models.modules import max_length
    from sparseprune.surgery import cut as cut_model

    if calibration is None:
        typed.refuse("count", "length", rule="must come with --calibration; add it, or leave this out")
        if cutting.criterion != "random":
            typed.refuse(
                "seed", rule="must come with --calibration or --criterion random; add one, or leave this out"
            )
    if cutting.criterion in ("l1", "random"):
        rule = f"criterion {cutting.criterion} reads no text; leave it out, or pass --criterion auto"
        typed.refuse("calibration", rule=rule)
    text = files.text("--calibration", calibration)
    files.check_out(model, out)
    loaded, tokenizer = files.load_dense(model, dtype)
    data = None
    if text is not None:
        data = calibration_data(text, tokenizer, windowing, cutting.seed, max_length(loaded))
    report = cut_model(loaded, **vars(cutting), **vars(names), calibration=data, progress=True)
    with console.bar("saving") as update:
        save(loaded, out, tokenizer, progress=update)
    console.out({"cut": report.to_dict(), "saved": str(out)}, lambda: f"{report}\nsaved in {out}", as_json)
