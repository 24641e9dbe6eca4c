"""A page of HTML that refers to nothing outside itself, from a template that extends `page.html.j2`."""

from __future__ import annotations

import base64


def render(template: str, **values: object) -> str:
    """Fill in a template.

    Args:
        template: file of this package that extends `reporting/page.html.j2`, for instance `training/report.html.j2`.
        **values: what it shows; text is escaped, and a ``gapkernels.reporting.figures.Plot`` embedded by the
            macro `images`.
    """
    from jinja2 import Environment, PackageLoader

    # `select_autoescape` goes by file name; these templates are always HTML.
    environment = Environment(
        loader=PackageLoader("gapkernels", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["keep_together"] = _keep_together
    environment.filters["embed"] = _embed
    return environment.get_template(template).render(**values)


def _keep_together(text: str) -> str:
    """No line ends inside of ``N = 4096``."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
