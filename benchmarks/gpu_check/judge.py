"""The targets, and whether a run reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DECODE_SPEEDUP = 1.5
DECODE_BANDWIDTH = 0.8  # a fraction of the rate of a copy on this card
MIDDLE_SPEEDUP = 1.0
CODES_DECODE_SPEEDUP = {"int4": 2.0, "int8": 1.4}  # of 3.8 and 1.9 that the bytes would give
LARGE_SPEEDUP = 1.4
LARGE_OF_VENDOR = 0.95
MASK_OF_COPY = 0.8
LARGE_BY_SPEEDUP = (
    "8.0",
    "8.6",
    "8.9",
)  # elsewhere wgmma and its like are out of mma.sp's reach: the vendor's 2:4 is it


@dataclass(frozen=True)
class Verdict:
    """What was asked for, in words; `reached` is None where it cannot be said."""

    target: str
    reached: bool | None


def judge_linear(
    cell: Mapping[str, Any], compute_capability: str | None, copy_gb_s: float | None
) -> Verdict | None:
    """None where there is no target: they are for 2:4 in 16 bits, and for few rows of codes."""
    batch, speedup = cell["batch"], cell["speedup"]
    wanted = CODES_DECODE_SPEEDUP.get(cell["format"].rpartition(" ")[2])
    if wanted is not None and batch <= 16:
        return Verdict(f"{wanted}x dense", speedup >= wanted and not cell["wrong"])
    if cell["format"] != "2:4" or cell["dtype"] == "fp32":
        return None
    if batch <= 16:
        target = f"{DECODE_SPEEDUP}x dense or {DECODE_BANDWIDTH:.0%} of copy"
        bandwidth = copy_gb_s is not None and cell["gb_s"] >= DECODE_BANDWIDTH * copy_gb_s
        verdict = Verdict(target, speedup >= DECODE_SPEEDUP or bandwidth)
    elif batch < 512:
        verdict = Verdict("not slower than dense", speedup >= MIDDLE_SPEEDUP)
    elif compute_capability in LARGE_BY_SPEEDUP:
        verdict = Verdict(f"{LARGE_SPEEDUP}x dense", speedup >= LARGE_SPEEDUP)
    else:
        over = cell["over_vendor"]
        verdict = Verdict(
            f"{LARGE_OF_VENDOR:.0%} of torch's 2:4", None if over is None else over >= LARGE_OF_VENDOR
        )
    return Verdict(verdict.target, False) if cell["wrong"] else verdict


def judge_mask(record: Mapping[str, Any]) -> Verdict:
    shares = record["copy_shares"]
    wanted = ("mask_apply_packed_", "mask_apply_", "threshold_mask_")
    reached = not record["wrong"] and all(shares.get(name, 0.0) >= MASK_OF_COPY for name in wanted)
    return Verdict(f"{MASK_OF_COPY:.0%} of copy", reached)


def score(data: Mapping[str, Any]) -> str:
    """How many targets a run reaches."""
    device = data["environment"].get("device", {})
    verdicts = [
        judge_linear(it, device.get("compute_capability"), device.get("copy_gb_s")) for it in data["linears"]
    ]
    known = [it.reached for it in [*verdicts, *map(judge_mask, data["masks"])] if it is not None]
    wrong = sum(it["wrong"] for name in ("linears", "masks", "conversions") for it in data[name])
    unknown = sum(it is None for it in known)
    text = f"{sum(it is True for it in known)} of {len(known) - unknown} targets reached"
    if unknown:
        text += f", {unknown} cannot be judged (torch's 2:4 does not run here)"
    return text + (f"; {wrong} results are WRONG" if wrong else "")
