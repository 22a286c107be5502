import json
from dataclasses import dataclass

import pytest

from sparseprune.report import Column, Report, Table, alike, human_bytes, track


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (102400, "100 KiB"),
        (1023 * 1024, "1.0 MiB"),
        (999.6 * 1024, "1.0 MiB"),
        (90 * 2**20, "90.0 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**40, "1.0 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def make_table(name="model.layers.0.mlp.down_proj"):
    columns = [
        "layer",
        "shape",
        Column("sparsity", ".1%"),
        Column("bytes", human_bytes),
        Column("speed-up", ".2f"),
    ]
    rows = [(name, (576, 1536), 0.5, 1536, None), ("[red]x[/red]", (4, 4), 0.25, 999, 1.5)]
    return Table("Layers", columns, rows, footer=["total: 2 layers"])


def test_render_keeps_every_character_of_long_cells(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "a." * 200 + "weight"
    text = make_table(name).render(color=False)
    assert name in text
    assert "\x1b" not in text
    assert "…" not in text
    for expected in ("Layers", "576x1536", "50.0%", "1.5 KiB", "total: 2 layers", "[red]x[/red]", "1.50"):
        assert expected in text
    assert len(text.splitlines()) == 6


def test_numbers_align_right_and_missing_is_a_dash():
    lines = make_table().render(color=False).splitlines()
    assert lines[3].endswith("-")
    assert lines[4].endswith("1.50")
    assert len(lines[3]) == len(lines[4])


def test_color_only_when_asked():
    assert "\x1b" in make_table().render(color=True)
    assert "\x1b" not in str(make_table())


def test_to_dict_is_json_with_raw_values():
    data = json.loads(json.dumps(make_table().to_dict()))
    assert data["rows"][0] == {
        "layer": "model.layers.0.mlp.down_proj",
        "shape": [576, 1536],
        "sparsity": 0.5,
        "bytes": 1536,
        "speed-up": None,
    }
    assert data["columns"] == ["layer", "shape", "sparsity", "bytes", "speed-up"]
    assert data["footer"] == ["total: 2 layers"]


def test_a_short_row_is_an_error():
    with pytest.raises(ValueError, match=r"rows: .* \(2\), row 1 has 1"):
        Table("t", ["a", "b"], [(1, 2), (3,)])


def test_track_yields_all_and_is_silent_unless_enabled(capfd):
    assert list(track(range(5), "quiet", enabled=False)) == list(range(5))
    assert capfd.readouterr() == ("", "")
    assert list(track(iter("abc"), "loud", total=3)) == ["a", "b", "c"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "loud" in err


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int, int]
    error: float | None = None

    @property
    def size(self):
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Parts(Report):
    parts: tuple[Part, ...]
    by_batch: dict[int, float]

    @property
    def total(self):
        return sum(part.size for part in self.parts)

    def table(self):
        return Table.of("Parts", COLUMNS, self.parts, [f"{self.total} in all"])


COLUMNS = (
    Column("part", value=lambda it: it.name),
    Column("weights", ",d", lambda it: it.size),
    Column("error", ".1%", lambda it: it.error, optional=True),
)


def test_a_column_says_once_what_it_shows():
    report = Parts((Part("a", (30, 40)), Part("b", (1, 2))), {1: 0.5})
    assert "1,200" in str(report) and "1202 in all" in str(report)
    assert [column.name for column in report.table().columns] == ["part", "weights"]  # no part has an error
    known = Parts((Part("a", (30, 40)), Part("b", (1, 2), 0.25)), {})
    assert known.table().rows == [("a", 1200, None), ("b", 2, 0.25)]
    with pytest.raises(ValueError, match="columns: part must say what its value is"):
        Table.of("t", [Column("part")], [1])


def test_fields_and_properties_are_json():
    report = Parts((Part("a", (3, 4)),), {1: 0.5})
    assert json.loads(json.dumps(report.to_dict())) == {
        "parts": [{"name": "a", "shape": [3, 4], "error": None, "size": 12}],
        "by_batch": {"1": 0.5},
        "total": 12,
    }


def test_things_alike_are_one_row():
    parts = [
        Part("x.0.up", (2, 2), 0.5),
        Part("x.1.up", (2, 2)),
        Part("x.2.up", (2, 3)),
        Part("x.3.up", (2, 2), 1.0),
    ]
    like, single = alike(parts, lambda it: it.shape)
    assert (like.name, len(like.members), single.name) == ("x.*.up", 3, "x.2.up")
    assert like.total(lambda it: it.size) == 12 and like.mean(lambda it: it.error) == 0.75
    assert single.mean(lambda it: it.error) is None and single.first is parts[2]
    assert [it.name for it in alike(parts, lambda it: it.shape, full=True)] == [it.name for it in parts]
