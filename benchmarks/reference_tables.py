"""Tables of what the package offers: its commands, its triggers, its methods; from the code."""

import argparse
import inspect
import re

from fst_fast import methods, triggers
from fst_fast.bench.table import markdown
from fst_fast.cli.main import build_parser


def commands():
    """A section for each command, with its arguments."""
    return "\n\n".join(_sections(build_parser(), "fst-fast", 2))


def _sections(parser, name, level):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for inner, sub in action.choices.items():
                full = f"{name} {inner}"
                text = [f"{'#' * level} {full}", f"{_sentence(helps[inner])}"]
                rows = [_argument(one) for one in sub._actions if _is_shown(one)]
                if rows:
                    text.append(markdown(["argument", "meaning"], rows))
                if sub.epilog:
                    text.append(f"```\n{sub.epilog.partition(':')[2].strip()}\n```")
                yield "\n\n".join(text)
                yield from _sections(sub, full, level + 1)


def _sentence(text):
    return f"{text[0].upper()}{text[1:]}."


def _is_shown(action):
    return not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)


def _argument(action):
    """The argument as it is typed; its help, its choices and its default."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        names = f"`{action.metavar or action.dest}`"
    elif action.nargs != 0 and not action.choices:
        names += f" `{value}`"
    said = (action.help or "").replace("%%", "%")
    meaning = [_cell(said)] if said else []
    if action.choices and not action.metavar:
        meaning.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if getattr(action, "required", False) and action.option_strings:
        meaning.append("required")
    default = action.default
    if default not in (None, False, argparse.SUPPRESS, []) and "default" not in said:
        meaning.append(f"default: `{default}`")
    return [names.replace("|", "\\|"), "; ".join(meaning)]


def _cell(text):
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def zoo():
    """A row for each trigger."""
    rows = []
    for name, kind in triggers.ZOO.items():
        given = inspect.signature(kind).parameters.values()
        needs = [one.name for one in given if one.default is inspect.Parameter.empty]
        settings = [f"`{p.name}={p.default!r}`" for p in given if p.name not in needs]
        settings = [text if len(text) < 60 else text.partition("=")[0] + "`" for text in settings]
        needed = [f"`{one}` (must be given)" for one in needs]
        rows.append([f"`{name}`", _linked(_summary(kind)), ", ".join([*needed, *settings])])
    return markdown(["name", "what it changes", "settings"], rows)


def _summary(kind):
    return inspect.getdoc(kind).splitlines()[0]


def _linked(text):
    """A docstring's sentence as Markdown, its papers linked."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    link = r"[arXiv \1](https://arxiv.org/abs/\1)"
    return re.sub(r"arXiv[ :]*(\d{4}\.\d{4,5})", link, _cell(text))


def method_list():
    """A section for each method of this package."""
    return "\n\n".join(_method(name, kind) for name, kind in sorted(methods.METHODS.items()))


def _method(name, kind):
    settings = dict(methods.get(name).settings())
    del settings["method"]
    factor = kind.epochs_factor
    cost = kind.cost if factor == 1 else f"{kind.cost}, in {factor} x the epochs"
    facts = [
        ("Source", _linked(inspect.getmodule(kind).__doc__.split("\n\n")[0])),
        ("Passes a step", cost),
        ("Needs of the model", _cell(kind.needs) or "nothing special"),
        ("Settings", ", ".join(f"`{key}={value!r}`" for key, value in settings.items())),
    ]
    lines = [f"- {title}: {text}" for title, text in facts]
    return "\n".join([f"## {name}", "", _linked(_summary(kind)), "", *lines])
