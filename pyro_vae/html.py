"""Parts of HTML pages: tables, pictures, warnings, commands. Reports and notebook output are made of them.

Each function returns ``Markup``. It escapes the texts that it is given, unless they are ``Markup`` already.
The parts inherit their colours, so that they are legible on a light and on a dark background. Nothing is
loaded from the network.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

GENERATOR = '<meta name="generator" content="pyro-vae">'  # shows that pyro_vae wrote the page


def _unbroken(text: str) -> Markup:
    """A text whose options, such as ``--out``, are not broken at the ends of lines."""
    return Markup(re.sub(r"--\w[\w-]*", r'<span class="option">\g<0></span>', str(escape(text))))


_environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_environment.filters["unbroken"] = _unbroken
_TEMPLATE = """\
{% macro styles() %}
<style>
  .pyro-vae { overflow-wrap: break-word }
  .pyro-vae .scroll { overflow-x: auto }
  .pyro-vae table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
  .pyro-vae th, .pyro-vae td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0;
    border-bottom: 1px solid rgba(128, 128, 128, .3) }
  .pyro-vae th { font-weight: 600 }
  .pyro-vae .numbers tbody th { font-weight: 400 }
  .pyro-vae .numbers td, .pyro-vae .numbers th + th { text-align: right; white-space: nowrap }
  @media (max-width: 40rem) {
    .pyro-vae table { font-size: .85em }
    .pyro-vae th, .pyro-vae td { padding-right: .6rem }
    .pyro-vae .numbers th + th { white-space: normal }
    .pyro-vae .wide { display: none }
  }
  .pyro-vae .option { white-space: nowrap }
  .pyro-vae pre { font-size: .85em; line-height: 1.5; padding: .75rem 1rem; border-radius: 6px;
    overflow-x: auto; background: rgba(128, 128, 128, .12) }
  .pyro-vae pre.command { white-space: pre-wrap }
  .pyro-vae .warning { margin: 1rem 0; padding: .6rem 1rem; border-left: 4px solid #d97706;
    border-radius: 4px; background: rgba(217, 119, 6, .13) }
  .pyro-vae .note { opacity: .75; font-size: .9em }
  .pyro-vae .pictures { columns: 28rem 2; column-gap: 1.5rem; margin-top: 1rem }
  .pyro-vae figure { margin: 0 0 1.5rem; break-inside: avoid }
  .pyro-vae img { max-width: 100%; box-sizing: border-box; padding: .5rem; border-radius: 6px;
    background: #fff; border: 1px solid rgba(128, 128, 128, .3) }
  .pyro-vae figcaption { opacity: .75; font-size: .9em }
  .pyro-vae summary { cursor: pointer }
</style>
{% endmacro %}

{% macro page(title, parts, policy) %}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if policy %}
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
{% endif %}
{{ generator }}
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --link: #0550ae }
  @media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --paper: #16191d; --link: #7db7ff } }
  body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
    max-width: 70rem; margin: 2rem auto 4rem; padding: 0 1rem }
  h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 }
  h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
  p, .warning { max-width: 46rem }
  a { color: var(--link) }
  @media (prefers-color-scheme: dark) { .pyro-vae img { filter: brightness(.92) } }
</style>
{{ styles() }}
<body class="pyro-vae">
<h1>{{ title }}</h1>
{% for part in parts %}
{{ part }}
{% endfor %}
</body>
</html>
{% endmacro %}

{% macro notebook(parts) %}
<div class="pyro-vae">
{{ styles() }}
{% for part in parts %}
{{ part }}
{% endfor %}
</div>
{% endmacro %}

{% macro section(title, parts) %}
<section>
<h2>{{ title }}</h2>
{% for part in parts %}
{{ part }}
{% endfor %}
</section>
{% endmacro %}

{% macro paragraph(text, kind) %}
<p{% if kind %} class="{{ kind }}"{% endif %}>{{ text }}</p>
{% endmacro %}

{% macro table(rows, header, narrow) %}
{% macro cell(tag, text, i) %}
<{{ tag }}{% if narrow and i >= narrow %} class="wide"{% endif %}>{{ text }}</{{ tag }}>
{% endmacro %}
<div class="scroll"><table{% if header %} class="numbers"{% endif %}>
{% if header %}
<thead><tr>{% for text in header %}{{ cell("th", text, loop.index0) }}{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for text in row[1:] %}{{ cell("td", text, loop.index) }}{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}

{% macro warning(remedy, cause) %}
<div class="warning"><strong>{{ remedy | unbroken }}</strong><br>{{ cause | unbroken }}</div>
{% endmacro %}

{% macro pre(text, kind) %}
<pre{% if kind %} class="{{ kind }}"{% endif %}>{{ text | unbroken }}</pre>
{% endmacro %}

{% macro picture(src, name, caption) %}
<figure><img src="{{ src }}" alt="{{ name }}">
{% if caption %}
<figcaption>{{ caption }}</figcaption>
{% endif %}
</figure>
{% endmacro %}

{% macro pictures(parts) %}
<div class="pictures">
{% for part in parts %}
{{ part }}
{% endfor %}
</div>
{% endmacro %}

{% macro link(target, text) %}<a href="{{ target }}">{{ text }}</a>{% endmacro %}

{% macro details(title, parts) %}
<details><summary>{{ title }}</summary>
{% for part in parts %}
{{ part }}
{% endfor %}
</details>
{% endmacro %}
"""
_parts: Any = _environment.from_string(_TEMPLATE).make_module({"generator": Markup(GENERATOR)})


def page(title: str, *parts: Markup, policy: str = "") -> str:
    """A whole page.

    :param policy: its Content-Security-Policy, if any.
    """
    return str(_parts.page(title, parts, policy)).lstrip()


def notebook(*parts: Markup) -> str:
    """What ``_repr_html_`` returns: parts with their style."""
    return str(_parts.notebook(parts))


def section(title: str, *parts: Markup) -> Markup:
    """Parts under a heading."""
    return _parts.section(title, parts)


def paragraph(text: str) -> Markup:
    """A paragraph."""
    return _parts.paragraph(text, "")


def note(text: str) -> Markup:
    """A paragraph in smaller type."""
    return _parts.paragraph(text, "note")


def table(
    rows: Iterable[Sequence[object]], header: Sequence[str] = (), *, narrow: int | None = None
) -> Markup:
    """A table. The first cell of each row is its name. With a header, the other cells are aligned to the
    right, as numbers.

    :param narrow: the number of columns that a narrow page shows. The default is all.
    """
    return _parts.table(list(rows), header, narrow)


def warning(remedy: str, cause: str) -> Markup:
    """A warning: what to do, and why."""
    return _parts.warning(remedy, cause)


def command(text: str) -> Markup:
    """A shell command, whose long lines are wrapped."""
    return _parts.pre(text, "command")


def pre(text: str) -> Markup:
    """Text in a fixed-width font."""
    return _parts.pre(text, "")


def picture(src: str, name: str, caption: str = "") -> Markup:
    """A picture.

    :param src: its URL, relative or from :func:`data_url`.
    """
    return _parts.picture(src, name, caption)


def pictures(*parts: Markup) -> Markup:
    """Pictures in columns, as many as the page is wide enough for."""
    return _parts.pictures(parts)


def link(target: str, text: str) -> Markup:
    """A link to a relative URL."""
    return Markup(_parts.link(target, text))


def details(title: str, *parts: Markup) -> Markup:
    """Parts that are hidden until the title is clicked."""
    return _parts.details(title, parts)


def data_url(content: bytes, kind: str = "image/png") -> str:
    """A URL that contains a file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def plus_minus(mean: float, error: float | None, digits: int = 2) -> str:
    """``"-12.34 ± 0.05"``; without the error if it is ``None`` or NaN."""
    text = f"{mean:.{digits}f}"
    return text if error is None or error != error else f"{text} ± {error:.{digits}f}"
