"""A comment or docstring opens with a sentence, as far as its first word tells."""

import ast
import io
import re
import tokenize

import pytest
import rooms

FRAGMENT = re.compile(r"(Of|What|Whether|How|Not|Nor|In which|As of|Where|Who|Those|That)\b")


def comments(source):
    """The comments, as (line, text); lines that follow each other are one comment."""
    lines, found, last = source.splitlines(), [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#:").strip()
        alone = lines[line - 1].lstrip().startswith("#")
        if alone and last == line - 1:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
        else:
            found.append((line, text))
        last = line if alone else -1
    return found


def docstrings(source):
    """The docstrings, as (line, text)."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [(node.body[0].lineno, text) for node in nodes if (text := ast.get_docstring(node))]


def fragments(source):
    """The comments and docstrings that open with a fragment, as line and text."""
    return [
        f"line {line}: {text.splitlines()[0]}"
        for line, text in sorted(comments(source) + docstrings(source))
        if FRAGMENT.match(text)
    ]


@pytest.mark.parametrize("room", rooms.ROOMS)
def test_no_comment_or_docstring_opens_with_a_fragment(room):
    found = [
        f"{path.relative_to(rooms.ROOT)}, {fragment}"
        for path in sorted((rooms.PACKAGE / room).rglob("*.py"))
        for fragment in fragments(path.read_text())
    ]
    assert not found, "write a sentence with a subject and a verb:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""What a run is."""', 1),
        ("# Of the whole run;\n# not of an epoch.\nx = 1", 1),
        ("x = 1  # Not the loader's own", 1),
        ('def f():\n    """Whether it holds."""', 1),
        ("# The step keeps what it was given.\n# What follows is of one sentence.\nx = 1", 0),
        ("# Nothing waits for the device.\nx = 1", 0),
        ('x = "# Of text"', 0),
        ('def f():\n    """Return whether it holds."""', 0),
    ],
)
def test_a_fragment_is_found(source, count):
    assert len(fragments(source)) == count
