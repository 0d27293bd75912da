"""What the paper reports (arXiv 2003.00152), each figure with how far it can be trusted.

Accuracies are per cent on CIFAR-10's test images after 160 epochs, means of 5 runs.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A number of the paper and the tag of its source (a key of TAGS)."""

    value: float
    tag: str


TAGS = {
    "abstract": "stated in the abstract of version 3: exact",
    "figure": "read off the pixels of a figure of version 1: about 0.4 points either way",
    "hidden": "the same, where another curve hides part of it: about 0.8 points either way",
    "second hand": "quoted by a reader of version 1",
}

# The columns of the figure in version 1, as configurations; "bn, alternate" is its curve "alternate init", of which the
# text that is at hand does not say which initialisation it is (beta = 1 is the likeliest).
_COLUMNS = ("bn", "bn, alternate", "bn+shortcut+output", "shortcut+output", "all", "none")
_ROWS = {
    "resnet14": (48.1, 50.7, 63.2, 48.9, 90.5, 10.6),
    "resnet32": (57.6, 59.6, 66.7, 45.8, 92.3, 10.3),
    "resnet56": (63.0, 64.9, 71.3, 42.5, 93.2, 10.9),
    "resnet110": (69.7, 71.9, 74.7, 19.1, 93.4, 10.4),
    "resnet218": (75.8, 77.5, 78.2, 17.3, 93.4, 10.0),
    "resnet434": (80.0, 81.4, 80.6, 12.8, 92.9, 10.4),
    "resnet866": (82.0, 83.9, 82.1, 13.1, 92.8, 10.1),
    "wrn14_2": (53.4, 56.6, 72.6, 57.5, 93.0, 10.4),
    "wrn14_4": (59.6, 61.5, 79.5, 66.0, 94.1, 9.4),
    "wrn14_8": (64.4, 66.5, 83.4, 73.1, 94.9, 10.1),
    "wrn14_16": (68.2, 70.8, 85.6, 77.5, 95.1, 10.1),
    "wrn14_32": (73.2, 74.5, 86.8, 79.8, 95.1, 9.7),
}
_HIDDEN = {
    ("resnet14", "bn"),
    ("resnet434", "bn"),
    ("wrn14_32", "bn"),
    ("resnet218", "bn+shortcut+output"),
    ("resnet434", "bn+shortcut+output"),
    ("wrn14_2", "shortcut+output"),
}

ACCURACY: dict[tuple[str, str], Figure] = {
    (model, column): Figure(value, "hidden" if (model, column) in _HIDDEN else "figure")
    for model, row in _ROWS.items()
    for column, value in zip(_COLUMNS, row, strict=True)
} | {("resnet866", "bn"): Figure(82.0, "abstract")}

# Per cent of all gammas with |gamma| < 0.01 in a ResNet-110.
SMALL_GAMMAS = {"bn": Figure(27.0, "second hand"), "all": Figure(9.0, "second hand")}

# Networks of the two families by rising size.
DEPTHS = tuple(model for model in _ROWS if model.startswith("resnet"))
WIDTHS = ("resnet14", *(model for model in _ROWS if model.startswith("wrn")))

# BatchNorm's parameters in them, as in the paper's table of models.
BATCHNORM_PARAMETERS = {
    "resnet14": 1_120,
    "resnet32": 2_464,
    "resnet56": 4_256,
    "resnet110": 8_288,
    "resnet218": 16_352,
    "resnet434": 32_480,
    "resnet866": 64_736,
    "wrn14_2": 2_240,
    "wrn14_4": 4_480,
    "wrn14_8": 8_960,
    "wrn14_16": 17_920,
    "wrn14_32": 35_840,
}
