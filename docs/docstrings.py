"""An extension of griffe: docstrings as its Google parser and Markdown expect them."""

import re

import griffe


class Docstrings(griffe.Extension):
    """Examples become a section of code, and roles of reStructuredText plain code."""

    def on_object(self, *, obj, **options):
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
