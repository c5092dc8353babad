"""The documents' figures, drawn from the records; ``python benchmarks/tables.py`` writes them.

A function of FIGURES returns a Drawing, or None where no record holds what it shows. The drawing's
label is its alternative text.
"""

from efficacy_figures import attack_map, published, retuned, tradeoff
from speed_figures import head, inject, ladder, shares, speed

FIGURES = {
    "published": published,
    "tradeoff": tradeoff,
    "attack_map": attack_map,
    "retuned": retuned,
    "speed": speed,
    "ladder": ladder,
    "shares": shares,
    "head": head,
    "inject": inject,
}
