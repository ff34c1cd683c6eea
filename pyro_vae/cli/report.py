"""``report.html``: what a run folder holds, on one page. Pictures and texts are those of the folder; nothing
is computed."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment

from pyro_vae.cli import output
from pyro_vae.cli.runs import GENERATOR, SHOWN, Run
from pyro_vae.files import is_file, is_folder, read_bytes, write_whole

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
"""
    + GENERATOR
    + """
<title>{{ name }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
         margin: 2rem auto; padding: 0 1rem }
  pre { font-size: 13px; background: #f5f5f5; padding: 1rem; overflow-x: auto }
  img { max-width: 100%; max-height: 36rem }
  td { padding-right: 2rem }
</style>
<h1>{{ name }}</h1>
<p>{{ summary }}</p>
{% for title, texts, pictures in parts %}
<h2>{{ title }}</h2>
{% for text in texts %}
<pre>{{ text }}</pre>
{% endfor %}
{% for picture in pictures %}
<figure><img src="{{ picture | urlencode }}" alt="{{ picture }}">
<figcaption>{{ picture }}</figcaption></figure>
{% endfor %}
{% endfor %}
<h2>configuration</h2>
<table>
{% for key, value in config.items() if value is not none %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
</html>
"""
)


def write_page(run: Run, changed: Path | None = None) -> Path | None:
    """Write ``report.html`` anew, unless ``changed`` lies outside the run, and return its path. A failure is
    reported and ends nothing."""
    if changed is not None and changed.resolve().parent != run.path.resolve():
        return None
    try:
        name, parts = run.path.resolve().name, list(_parts(run.path))
        page = _PAGE.render(name=name, summary=run.summary(), config=asdict(run.config), parts=parts)
        write_whole(run.path / "report.html", page.encode("utf-8", "replace"))
        return run.path / "report.html"
    except (OSError, ValueError) as error:
        output.say(f"{run.path}: report.html is not written: {error}")
        return None


def _parts(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Title, texts and pictures of each folder in it that has any."""
    for kind in SHOWN:
        own = [
            part
            for part in folder.iterdir()
            if re.fullmatch(rf"{kind}(-\d+)?", part.name) and is_folder(part)
        ]
        for part in sorted(own, key=_number):
            files = [
                file for file in sorted(part.iterdir()) if is_file(file)
            ]  # a link would show what is elsewhere
            texts = [_shown(file) for file in files if file.suffix == ".txt"]
            pictures = [f"{part.name}/{file.name}" for file in files if file.suffix == ".png"]
            if texts or pictures:
                yield part.name, texts, pictures


def _shown(file: Path) -> str:
    try:
        return read_bytes(file, max_bytes=2**20).decode("utf-8", "replace").rstrip()
    except ValueError as error:
        return str(error)


def _number(path: Path) -> Any:
    """plots, plots-2, …, plots-10."""
    found = re.search(r"-(\d+)$", path.name)
    return int(found[1]) if found else 1
