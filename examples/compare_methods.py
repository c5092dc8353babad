"""Compare several methods on one suspect, and plot accuracy lost against attack success left.

    python examples/compare_methods.py [--short] [FOLDER]

What is done is kept in FOLDER: stopped at any moment, the same call goes on.
"""

import sys
import tempfile
from pathlib import Path

import suspect

import fst_fast


def main(folder, short=False):
    model, clean, test, normalize = suspect.make(short)
    table = fst_fast.compare(
        model,
        suspect.loader_of(clean, normalize),
        test=suspect.loader_of(test, normalize, shuffle=False),
        methods=["ft", "clp"] if short else ["ft", "ft_sam", "anp", "fst", "trigger_unlearning"],
        trigger=suspect.TRIGGER,
        target=suspect.TARGET,
        epochs=1 if short else 10,
        folder=folder,
        check=not short,
        progress=False,
    )
    print(table)
    table.plot(folder / "plot.png")
    print(f"wrote {folder / 'plot.png'}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--short"]
    main(Path(arguments[0] if arguments else tempfile.mkdtemp()), "--short" in sys.argv)
