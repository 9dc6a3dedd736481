"""Pages of HTML: everything is escaped, figures are inside, and curves are thinned without losing a peak."""

import html.parser
import json
import re

import numpy as np
import pytest

from gptoss_dist.tracking.pages.skeleton import (
    Section,
    figure_html,
    html_page,
    list_html,
    paragraphs_html,
    table_html,
)
from gptoss_dist.tracking.pages.thinning import rounded, thin

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\"'&"


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    tags = Tags()
    tags.feed(page)
    return tags


def test_no_text_of_a_run_becomes_a_tag():
    body = paragraphs_html([HOSTILE]) + list_html([HOSTILE]) + table_html([HOSTILE], [[HOSTILE, 1]])
    tags = read(html_page(HOSTILE, [Section(HOSTILE, body)], subtitle=HOSTILE))
    assert "script" not in tags.tags and "img" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    shown = "".join(tags.text)
    assert shown.count("</script><script>alert(1)</script>") == 9 and "\x1b" not in shown and "\\x1b" in shown


def test_figures_are_data_and_nothing_else():
    figure = {"data": [{"y": np.array([1.0, np.nan, np.inf]), "name": HOSTILE}], "layout": {"title": HOSTILE}}
    body = figure_html(figure)
    page = html_page("x", [Section("Curves", body), Section("More", body)])
    tags = read(page)
    assert tags.tags.count("script") == 4, "two figures, plotly.js once, and what draws them"
    data = json.loads(re.search(r'json">(.*?)</script>', body)[1])
    assert data["data"][0] == {"y": [1.0, None, None], "name": HOSTILE} and data["layout"]["title"] == HOSTILE
    assert "plotly.js v" in page
    assert "plotly.js v" not in html_page("x", [Section("Text", paragraphs_html(["no figure"]))])


def test_the_page_forbids_requests_and_asks_for_none():
    tags = read(html_page("x", [Section("Curves", figure_html({"data": []}))]))
    policies = [value for name, value in tags.attributes if name == "content" and "default-src" in value]
    assert policies and policies[0].startswith("default-src 'none'")
    assert not [value for name, value in tags.attributes if name in ("src", "href") and value[:1] not in "#d"]


def test_numbers_stand_on_the_right():
    table = table_html(["a"], [["1.5"], ["2.31 ± 0.02"], ["-3e-05"], ["25 %"], ["1,234"], ["–"], ["lr 2"], ["a 1"]])
    assert table.count('class="number"') == 6


@pytest.mark.parametrize("count", [0, 1, 2, 99, 100, 101, 1000, 12345])
def test_thinned_curves_keep_every_peak(count):
    values = np.random.default_rng(count).normal(size=count)
    thinned = thin(values, 100)
    assert len(thinned.last) <= 100
    assert thinned.is_whole == (count <= 100)
    if count:
        assert thinned.last[-1] == count - 1
        assert thinned.low.min() == values.min() and thinned.high.max() == values.max()
        first = np.append(0, thinned.last[:-1] + 1)
        for begin, end, low, high, mean in zip(first, thinned.last, thinned.low, thinned.high, thinned.mean):
            part = values[begin : end + 1]
            assert (low, high) == (part.min(), part.max()) and mean == pytest.approx(part.mean())


def test_rounding_keeps_significant_digits():
    values = np.array([0.0, 1234567.0, -0.000123456789, 1e-300, np.nan, np.inf])
    np.testing.assert_allclose(rounded(values)[:4], [0.0, 1234570.0, -0.000123457, 1e-300], rtol=1e-12)
    assert np.isnan(rounded(values)[4])
