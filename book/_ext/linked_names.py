"""Names in chapters, like `dslib.merge`, lead to where the API describes them; one that it does not is a warning."""

import re

from docutils import nodes
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

NAME = re.compile(r"dslib(?:\.\w+)+")


def link_names(app, doctree, docname) -> None:
    """Sphinx's `doctree-resolved`: wrap literals that begin with a documented name, and are in no link yet."""
    known = app.env.get_domain("py").objects
    for literal in list(doctree.findall(nodes.literal)):
        name = NAME.match(literal.astext())
        found = known.get(name.group()) if name else None
        if name and not found:
            logging.getLogger(__name__).warning(
                "%s is not in the API: correct the name, or give it a docstring", name.group(), location=docname
            )
        if found and not isinstance(literal.parent, nodes.reference) and found.docname != docname:
            link = make_refnode(app.builder, docname, found.docname, found.node_id, literal.deepcopy(), name.group())
            literal.replace_self(link)


def setup(app) -> dict:
    """Register `link_names` with Sphinx."""
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
