"""What every page of this package satisfies, and Chromium, which opens pages."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class _Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.urls, self.images = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in _VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.urls += [found[key] for key in ("src", "href") if key in found]
        assert not any(key.startswith("on") for key in found)
        if tag == "img":
            assert "alt" in found
            self.images.append(found["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    """Tags are closed, ids are unique, and nothing is loaded from elsewhere. Returns the URLs of images."""
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    for url in checker.urls:
        assert url.startswith("data:") or not (":" in url or url.startswith("//")), url
    assert "@import" not in page
    assert "url(" not in page
    return checker.images


def dumped(path, tmp_path, *options):
    """The DOM of a page after its scripts have run in Chromium, and the messages of its console. The test is
    skipped where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", *options, "--dump-dom",
            Path(path).resolve().as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
