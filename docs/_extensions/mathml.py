"""Sphinx extension: formulas of pages as MathML, which needs no script and no network."""

import re

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def mathml(node, **options):
    """The formula; browsers size its brackets by themselves, so commands for that are left out."""
    text = re.sub(r"\\[bB]ig+(?![a-z])", "", node.astext())
    try:
        return tex2mathml(text, **options)
    except MathError as error:
        LOGGER.warning("%s in the formula %s", error, text, location=node)
        return ""


def inline(translator, node):
    translator.body.append(mathml(node))
    raise SkipNode


def block(translator, node):
    translator.body.append(f"<div>{mathml(node, as_block=True)}</div>")
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
