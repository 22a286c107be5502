import json

import pytest

from sparseprune.report import Column, Table, human_bytes, track


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
