import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.kernels import cuda, native, ops
from sparseprune.weights.encoding import Encoding, Part
from sparseprune.weights.format import Format, group_counts
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import SPEC_FIELDS, WeightSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["2:4", "4:8", "1:4", "bitmap", "csr"]


def sparse_dense(rows, cols, form, dtype=torch.float32, seed=0):
    """A random dense weight that the format can hold."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if form.kind == "nm":
        groups = weight.view(rows, cols // form.m, form.m)
        drop = groups.abs().argsort(-1)[..., : form.m - form.n]
        return groups.scatter(-1, drop, 0.0).view(rows, cols).to(dtype)
    return (weight * (weight.abs() > 0.8)).to(dtype)


@pytest.mark.parametrize("text", FORMATS)
def test_format_text_round_trip(text):
    form = Format.parse(text)
    assert str(form) == text
    assert Format.parse(form) is form


@pytest.mark.parametrize("text", ["2-4", "5:4", "0:4", "2:", "coo", "", "2:4 ", "2:64", "2:999", None, 24])
def test_format_refuses_what_it_does_not_know(text):
    with pytest.raises(ValueError, match="format: "):
        Format.parse(text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", FORMATS)
def test_layouts_of_the_formats(text, dtype):
    form = Format.parse(text)
    kind = form.kind, form.n, form.m, dtype
    assert native.layout_for(*kind) == ("csr" if text == "csr" else "tile")
    tensor_cores = text == "2:4" and dtype != torch.float32
    assert cuda.layout_for(*kind) == ("sparse24" if tensor_cores else "bitmap8")


def test_format_takes_n_and_m_only_for_nm():
    with pytest.raises(ValueError, match="bitmap takes no N and M"):
        Format("bitmap", 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    text=st.sampled_from(FORMATS), rows=st.integers(0, 35), groups=st.integers(0, 9), odd=st.integers(0, 7),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_dense_and_packed_round_trips(dtype, text, rows, groups, odd, seed):
    form = Format.parse(text)
    cols = groups * form.m if form.kind == "nm" else groups * 8 + odd
    dense = sparse_dense(rows, cols, form, dtype, seed)
    weight = SparseWeight.from_dense(dense, text)
    weight.validate()
    assert torch.equal(weight.dense(), dense)
    assert weight.dtype == dtype
    assert weight.nbytes == weight.nnz * dtype.itemsize + rows * -(-cols // 8)
    again = SparseWeight.unpack(weight.pack(), weight.spec)
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.mask, weight.mask)
    back = SparseWeight.from_parts(weight.parts())
    assert (back.shape, back.format, back.dtype) == (weight.shape, form, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", FORMATS)
def test_parts_are_known_before_they_are_made(text, dtype):
    dense = sparse_dense(6, 24, Format.parse(text), dtype)
    weight = SparseWeight.from_dense(dense, text)
    made = {name: Part(part.dtype, tuple(part.shape)) for name, part in weight.parts().items()}
    assert list(made) == list(weight.spec.part_names)
    assert made == WeightSpec((6, 24), dtype, Format.parse(text)).parts(Format.parse(text).kept(dense))


@pytest.mark.parametrize("missing", ["values", "mask", "spec"])
def test_a_missing_part_is_named(missing):
    parts = tensors_of()
    del parts[missing]
    with pytest.raises(ValueError, match=f"^{missing}: missing"):
        SparseWeight.from_parts(parts)


def test_an_encoding_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match="encoding: kind must be one of plain, int8, int4, int4_minimum, got 'int3'"
    ):
        Encoding("int3")


def test_nm_keeps_exactly_n_of_every_group_also_of_zeros():
    weight = SparseWeight.from_dense(torch.zeros(3, 8), "2:4")
    assert weight.nnz == 3 * 4
    assert weight.density == 0.5
    assert weight.mask.tolist() == [[0b00110011]] * 3


def test_bitmap_drops_negative_zero_and_keeps_nan():
    weight = SparseWeight.from_dense(torch.tensor([[-0.0, float("nan"), 1.0]]), "bitmap")
    assert weight.mask.tolist() == [[0b110]]
    assert weight.nnz == 2


def test_a_weight_that_does_not_fit_is_refused_where_it_does_not():
    dense = torch.zeros(5, 12)
    dense[3, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"2:4, row 3 holds 3 in columns 4 to 7; prune it to 2:4"):
        SparseWeight.from_dense(dense, "2:4")
    with pytest.raises(ValueError, match=r"columns must be a multiple of 8 for 4:8, got 12"):
        SparseWeight.from_dense(dense, "4:8")


@given(rows=st.integers(0, 5), groups=st.integers(0, 9), m=st.integers(1, 32), seed=st.integers(0, 99))
def test_group_counts(rows, groups, m, seed):
    kept = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed)) < 0.5
    counts = group_counts(ops.pack_mask(kept), groups * m, m)
    assert torch.equal(counts.int(), kept.view(rows, groups, m).sum(-1).int())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), r"2 dimensions"),
        (torch.zeros(4, 4, dtype=torch.float64), r"dtype must be float32, bfloat16"),
    ],
)
def test_from_dense_refuses(weight, message):
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_dense(weight, "bitmap")


def tensors_of(text="2:4", rows=6, cols=12):
    weight = SparseWeight.from_dense(sparse_dense(rows, cols, Format.parse(text)), text)
    return weight.parts()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 3, "spec: version must be one of .1, 2., got 3; .*upgrade"),
        ("version", 2, "spec: version 2 has 10 integers, got 9"),
        ("kind", 0, "spec: kind must be one of .1, 2, 3, 4., got 0"),
        ("kind", 2, "spec: format: bitmap takes no N and M"),
        ("n", 5, "spec: format: N:M needs"),
        ("n", 1, "every group of 4 columns must keep 1 for 1:4, got 2 in row 0, group 0"),
        ("m", 8, "columns must be a multiple of 8"),
        ("rows", -1, "spec: rows must be in"),
        ("rows", 2**40, "spec: rows must be in"),
        ("rows", 7, r"mask: shape must be \(7, 2\)"),
        ("cols", 28, r"mask: shape must be \(6, 4\)"),
        ("cols", 8, r"mask: shape must be \(6, 1\)"),
        ("dtype", 1, "values: dtype must be torch.bfloat16, as spec says"),
        ("dtype", 9, "spec: dtype must be one of"),
        ("encoding", 4, "spec: encoding must be one of .0, 1, 2, 3., got 4; upgrade"),
        ("encoding", 1, "spec: encoding: group_size must be 32, 64 or 128 for int8, got 0"),
        ("group_size", 64, "spec: encoding: plain values have no groups, got a group size of 64"),
    ],
)
def test_a_spec_that_lies_is_refused(field, value, message):
    parts = tensors_of()
    parts["spec"][SPEC_FIELDS.index(field)] = value
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_parts(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": lambda t: t[:-1]}, r"values: shape must be \(36,\) for a weight of 6 x 12 whose mask keeps 36, got \(35,\)"),
        ({"values": lambda t: t.view(2, -1)}, r"values: shape must be \(36,\) .* got \(2, 18\)"),
        ({"values": lambda t: t.double()}, "values: dtype must be torch.float32, as spec says, got torch.float64"),
        ({"mask": lambda t: t.to(torch.int16)}, "mask: dtype must be torch.uint8"),
        ({"mask": lambda t: t[:-1]}, "mask: shape must be"),
        ({"mask": lambda t: t | torch.tensor([0, 128], dtype=torch.uint8)}, "bits past column 11 must be 0, got a 1 in row 0"),
        ({"mask": lambda t: t.roll(1, 0) ^ torch.tensor([[1, 0]] + [[0, 0]] * 5, dtype=torch.uint8)}, "values: shape must be"),
        ({"spec": lambda t: t[:-1]}, "spec: must be int64 of shape"),
        ({"spec": lambda t: t.to(torch.int32)}, "spec: must be int64 of shape"),
    ],
)  # fmt: skip
def test_tensors_that_disagree_are_refused(change, message):
    parts = tensors_of()
    for name, edit in change.items():
        parts[name] = edit(parts[name])
    with pytest.raises(ValueError, match=message):
        SparseWeight.from_parts(parts)


def test_nm_mask_with_the_right_count_in_the_wrong_groups_is_refused():
    parts = tensors_of()
    parts["mask"][4, 0] = 0b01110001  # 3 + 1 instead of 2 + 2
    with pytest.raises(ValueError, match="must keep 2 for 2:4, got 1 in row 4, group 0"):
        SparseWeight.from_parts(parts)
