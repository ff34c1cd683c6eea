"""Parts of pages."""

import re

import pytest
from markupsafe import Markup

from pyro_vae import html
from tests.support import pages

BAD = "<script>alert('&\"')</script>"


@pytest.mark.parametrize(
    "part",
    [
        html.section(BAD, html.paragraph(BAD)),
        html.note(BAD),
        html.table([(BAD, BAD)], (BAD, BAD)),
        html.warning(BAD, BAD),
        html.command(BAD),
        html.pre(BAD),
        html.picture(BAD, BAD, BAD),
        html.link(BAD, BAD),
        html.details(BAD, html.pre(BAD)),
    ],
)
def test_texts_are_escaped_once(part):
    page = html.page(BAD, part)
    assert isinstance(part, Markup)
    assert "<script" not in page
    assert "&amp;lt;" not in page
    assert "&lt;script&gt;" in part
    pages.check(page)
    pages.check(html.notebook(part))


def test_plus_minus():
    assert html.plus_minus(-1.234, 0.056) == "-1.23 ± 0.06"
    assert html.plus_minus(-1.234, float("nan"), 1) == html.plus_minus(-1.234, None, 1) == "-1.2"


def test_narrow_page_hides_the_columns_after_the_given_number():
    table = html.table([("a", 1, 2, 3)], ("", "x", "y", "z"), narrow=2)
    assert re.findall('<t. class="wide">(.)</t.>', table) == ["y", "z", "2", "3"]
    assert 'class="wide"' not in html.table([("a", 1, 2)])
