"""A run's manifest and measurements made up for reports, and a reader of the page."""

from html.parser import HTMLParser

import numpy as np

from fst_fast.measure.report import Measured, Observed, Samples

VOID = ("meta", "img", "br", "link", "input", "hr")


def manifest(classes=4, epochs=3, **more):
    generator = np.random.default_rng(classes)
    numbers = generator.uniform(0.1, 0.9, (3, classes)).round(4)
    found = {
        "settings": {"method": "fst", "alpha": 0.07, "epochs": epochs, "seed": 31, "head": "fc"},
        "history": [
            {
                **{"epoch": e + 1, "loss": 1.25 - 0.251 * e, "clean_accuracy": 0.5 + 0.123 * e},
                **{"lr": 0.01 / (e + 1), "cosine": -0.105 * e, "norm": 2.5, "seconds": 0.7 * e},
            }
            for e in range(epochs)
        ],
        "head_shift": {
            **{"cosine": -0.21, "norm": 2.5, "original_norm": 2.5},
            **{"class_cosines": (-numbers[0]).tolist(), "class_norms": numbers[1].tolist()},
            "class_original_norms": numbers[2].tolist(),
        },
        "seconds": 4.3,
        "stopped": None,
        "versions": {"torch": "2.99.1", "python": "3.14.7"},
        "parent": {"path": "suspect.pt", "sha256": "ab12" * 16},
        "sha256": "cd34" * 16,
        "payload": "purified.safetensors",
    }
    return found | more


def observed(labels, classes, seed, triggered):
    generator = np.random.default_rng(seed)
    clean = np.where(generator.random(len(labels)) < 0.8, labels, (labels + 1) % classes)
    shown = np.where(generator.random(len(labels)) < 0.5, 1, clean) if triggered else None
    return Observed(labels, clean, shown)


def measured(classes=4, images=120, trigger=True, suspect=True):
    labels = np.random.default_rng(0).integers(0, classes, images)
    few = np.array([0, 2])
    pictures = np.full((2, 8, 8, 3), 40, np.uint8)
    changed = pictures.copy()
    changed[:, -2:, -2:] = 255
    return Measured(
        before=observed(labels, classes, 1, trigger) if suspect else None,
        after=observed(labels, classes, 2, trigger),
        samples=Samples(
            pictures,
            changed if trigger else None,
            observed(few, classes, 3, trigger) if suspect else None,
            observed(few, classes, 4, trigger),
        ),
        trigger={"name": "BadNets", "size": 2} if trigger else None,
        target=1,
        device="cpu",
        precision="fp32",
    )


class Page(HTMLParser):
    """What a browser would find on a page: elements, their attributes, text, and wrong nesting."""

    def __init__(self, source):
        super().__init__()
        self.open, self.wrong, self.elements, self.words = [], [], [], []
        self.tables = {}
        self.feed(source)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")
        if tag in ("td", "th"):
            self.rows[-1][-1] = self.rows[-1][-1].strip()
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "caption" in self.open:
            self.caption += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())
