import math
from xml.etree import ElementTree

import markdown
import pytest

from longreach.report.grid import (
    Grid,
    format_interval,
    format_memory,
    format_percent,
    format_perplexity,
    format_range,
    format_ratio,
    format_rough,
    format_signed,
    is_alike,
    to_markdown,
    without_empty_columns,
)


def test_markdown_escapes_what_would_end_a_cell_or_be_obeyed():
    rows = (("a|b*<i>", "70.00"), ("alibi", "60.00"))
    grid = Grid("title", "note", (("method",), ("128", "1x")), rows, best=frozenset({(1, 1)}))
    assert to_markdown(grid) == (
        "| method | 128<br>1x |\n| --- | ---: |\n| a\\|b\\*&lt;i&gt; | 70.00 |\n| alibi | **60.00** |\n"
    )


@pytest.mark.parametrize(
    "name",
    ["two\nlines", "two\r\nlines", "a&lt;b", "~~a~~", "a&b|c", r"a\b", "*a*_b_`c`[d](e)", "<b>a</b>", "x\u2028y"],
)
def test_markdown_shows_a_cell_as_it_is_and_keeps_its_row(name):
    text = to_markdown(Grid("title", "note", (("method",), ("1x",)), ((name, "70.00"),)))
    table = markdown.markdown(text, extensions=["tables"]).replace("<br>", "\n")
    cells = ElementTree.fromstring(table).iterfind(".//tbody/tr/td")
    assert [cell.text for cell in cells] == ["\n".join(name.splitlines()), "70.00"]
    assert len(text.splitlines()) == 3
    assert "~" not in text  # of which GitHub makes what is struck out


def test_columns_without_a_value_go_from_the_first_named_on():
    rows = (("a", "-", "-", "1"), ("b", "-", "-", "-"))
    grid = Grid("title", "note", (("m",), ("x",), ("y",), ("z",)), rows, best=frozenset({(0, 1)}))
    kept = without_empty_columns(grid, first=2)
    assert kept.columns == (("m",), ("x",), ("z",))
    assert kept.rows == (("a", "-", "1"), ("b", "-", "-"))
    assert kept.best == grid.best


def test_ratios_of_speed_have_two_digits():
    values = (0.0104, 0.334, 0.996, 1.006, 1.86, 9.96, 20.4, 128.0, 2512.0, None)
    texts = ["0.010x", "0.33x", "1.0x", "1.0x", "1.9x", "10x", "20x", "130x", "2,500x", "-"]
    assert [format_rough(value) for value in values] == texts
    assert [is_alike(value) for value in (0.94, 0.951, 1.0, 1.049, 1.06)] == [False, True, True, True, False]


def test_numbers_as_text():
    assert [format_perplexity(x) for x in (1.0, 999.99, 12345.6, 2.5e7, math.inf)] == [
        "1.00",
        "999.99",
        "12,346",
        "2.5e+07",
        "∞",
    ]
    assert [format_ratio(x) for x in (None, 0.98, 0.9984, 1.0, 1.004, 1.62, math.inf)] == [
        "-",
        "0.98x",
        "0.998x",
        "1.000x",
        "1.004x",
        "1.62x",
        "∞x",
    ]
    assert [format_memory(x) for x in (None, 2**20, 2**30 - 1, 3 * 2**29)] == ["-", "1 MiB", "1,024 MiB", "1.50 GiB"]
    assert [format_signed(x) for x in (0.0184, -2.0)] == ["+0.018", "-2.000"]
    assert [format_interval(-0.5, 0.25), format_interval(None, None)] == ["[-0.500, +0.250]", "-"]
    assert format_interval(0.5, 1.0, format_percent) == "[50%, 100%]"
    assert [format_range(values, "{:,}".format) for values in ((), (5, 5), (2000, 5, 70))] == ["-", "5", "5-2,000"]
