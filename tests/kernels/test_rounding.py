"""`round_through`: every instruction set against float64, gradients, zeros, tensors that are refused."""

from __future__ import annotations

import pytest
import torch
from helpers.isa import LEVELS, forced
from helpers.shapes import generator

from sparseprune.kernels.packing import CODES
from sparseprune.kernels.rounding import round_codes, round_through

SHAPES = [(1, 1), (3, 32), (5, 33), (2, 15), (4, 17), (7, 64), (3, 129), (16, 200), (0, 5)]


def made(rows, cols, kind, group, kept=False, seed=0):
    weight = torch.randn(rows, cols, generator=generator(seed))
    groups = (rows, -(-cols // group))
    scales = (torch.rand(groups, generator=generator(seed + 1)) * 0.2 + 0.05) * (
        1.0 if kind == "int4" else 0.7
    )
    if kind == "int8":
        scales = scales / 20
    minimums = torch.randn(groups, generator=generator(seed + 2)) * 0.3 - 1 if CODES[kind].minimums else None
    mask = torch.rand(rows, cols, generator=generator(seed + 3)) < 0.5 if kept else None
    return weight, scales, minimums, mask


def wide(part, group, cols):
    return part.double().repeat_interleave(group, 1)[:, :cols]


def reference(weight, scales, minimums, mask, group, kind):
    """(codes, value, inside, distance to the nearest tie), float64."""
    code, cols = CODES[kind], weight.shape[1]
    scale = wide(scales, group, cols)
    low = 0 if minimums is None else wide(minimums, group, cols)
    steps = (weight.double() - low) / scale + code.zero
    codes = steps.round().clamp(code.least, code.largest)
    value = (codes - code.zero) * scale + low
    if mask is not None:
        value = torch.where(mask, value, 0)
    tie = ((steps - steps.floor()) - 0.5).abs()
    return codes, value, (codes - steps).abs() <= 0.5, tie


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("kept", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_codes_and_gradients_are_those_of_float64(isa, kind, kept, dtype):
    with forced(isa):
        for rows, cols in SHAPES:
            for group in (32, 64):
                weight, scales, minimums, mask = made(rows, cols, kind, group, kept)
                codes, value, inside, tie = reference(weight, scales, minimums, mask, group, kind)
                clear = tie > 1e-4  # float32 may round the others either way
                parts = [it for it in (weight, scales, minimums) if it is not None]
                for it in parts:
                    it.requires_grad_()
                got = round_through(weight, scales, minimums, mask, group, kind, dtype)
                assert got.dtype == dtype and got.shape == weight.shape
                tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
                assert torch.allclose(got.double()[clear], value[clear], rtol=tolerance, atol=1e-6)
                own = round_codes(weight, scales, minimums, mask, group, kind)
                expected = codes if mask is None else torch.where(mask, codes, CODES[kind].zero)
                assert torch.equal(own.double()[clear], expected[clear])
                up = torch.randn(rows, cols, generator=generator(9)).to(dtype)
                got.backward(up)
                masked = up.double() if mask is None else torch.where(mask, up.double(), 0)
                assert torch.equal(weight.grad.double()[clear], torch.where(inside, masked, 0)[clear])
                code = CODES[kind]
                low = 0 if minimums is None else wide(minimums.detach(), group, cols)
                steps = (weight.detach().double() - low) / wide(scales.detach(), group, cols) + code.zero
                slope = torch.where(inside, codes - steps, codes - code.zero)
                whole = sums((~clear).double(), group) == 0
                of = sums(masked * slope, group)
                assert torch.allclose(scales.grad.double()[whole], of[whole], rtol=1e-4, atol=1e-3)
                if minimums is not None:
                    of = sums(torch.where(inside, 0, masked), group)
                    assert torch.allclose(minimums.grad.double()[whole], of[whole], rtol=1e-4, atol=1e-4)


def sums(values, group):
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values, (0, -cols % group))
    return padded.view(rows, padded.shape[1] // group, group).sum(-1)


@pytest.mark.parametrize("isa", LEVELS)
def test_scales_of_zero_nan_and_infinities_are_defined(isa):
    weight = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 0.3] + [0.1] * 27] * 2)
    scales = torch.tensor([[0.1], [0.0]])
    with forced(isa):
        value = round_through(weight, scales, None, None, 32, "int4", torch.float32)
        codes = round_codes(weight, scales, None, None, 32, "int4")
    assert value[0, 0].isnan() and torch.allclose(value[0, 1:5], torch.tensor([0.7, -0.8, 0.0, 0.3]))
    assert codes[0, :5].tolist() == [8, 15, 0, 8, 11]
    assert codes[1, 3:].tolist() == [8] * 29 and not bool(value[1, 3:].any())


def test_opcheck_and_the_plain_path_of_other_devices(monkeypatch):
    from sparseprune.kernels import rounding

    weight, scales, minimums, mask = made(6, 70, "int4_minimum", 32)
    for it in (weight, scales, minimums):
        it.requires_grad_()
    torch.library.opcheck(
        torch.ops.sparseprune.round_through.default,
        (weight, scales, minimums, mask, 32, "int4_minimum", torch.float32),
    )
    for kind, kept in (("int4_minimum", False), ("int8", True), ("int4", True)):
        weight, scales, minimums, mask = made(6, 70, kind, 32, kept)
        up = torch.randn(6, 70)
        with torch.no_grad():
            ours = round_through(weight, scales, minimums, mask, 32, kind, torch.float32)
            of = rounding._gradients_real(up, weight, scales, minimums, mask, 32, kind)
            codes = round_codes(weight, scales, minimums, mask, 32, kind)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "is_cpu", False)
                plain = rounding._real(weight, scales, minimums, mask, 32, kind, torch.float32)
                plainly = rounding._gradients_real(up, weight, scales, minimums, mask, 32, kind)
                assert torch.equal(codes, round_codes(weight, scales, minimums, mask, 32, kind))
        assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-7)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(of, plainly, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoding": "int3"}, "encoding: must be one of"),
        ({"group_size": 48}, "group_size: must be 32, 64 or 128"),
        ({"dtype": torch.float64}, "dtype: must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(2, 64).half()}, "weight: dtype must be float32"),
        ({"weight": torch.zeros(64)}, "weight: must"),
        ({"scales": torch.ones(2, 3)}, r"scales: must be float32 \(2, 2\)"),
        ({"scales": torch.ones(2, 2).half()}, r"scales: must be float32 \(2, 2\)"),
        ({"minimums": torch.ones(2, 2)}, "minimums: int4 has no minimums"),
        ({"encoding": "int4_minimum"}, "minimums: int4_minimum needs minimums"),
        ({"kept": torch.ones(2, 63, dtype=torch.bool)}, r"kept: must be bool \(2, 64\)"),
        ({"kept": torch.ones(2, 64)}, r"kept: must be bool \(2, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    given = {
        "weight": torch.zeros(2, 64), "scales": torch.ones(2, 2), "minimums": None, "kept": None, "group_size": 32,
        "encoding": "int4", "dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=says):
        round_through(**(given | change))
