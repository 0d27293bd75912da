"""What the BatchNorm side of a unit has to move at least, by kind of unit, and what eager PyTorch moves."""

from __future__ import annotations

import dataclasses

from bench import cases


@dataclasses.dataclass(frozen=True)
class Kind:
    """A unit of ResNet-50 as the floors distinguish them: accesses per element of its BatchNorm side, forward and backward, of
    eager PyTorch and of the two-pass form (the convolution's own reads and writes left out; a bit per element is in `bits`);
    and in the full chain of units, the convolutions' own reads and writes included."""

    name: str
    act: str
    residual: bool
    has_dgrad: bool
    eager: tuple[int, int]
    two_pass: tuple[int, int]
    chain: tuple[int, int] | None

    @property
    def bits(self) -> int:
        """Times that a bit per element is written or read."""
        return 3 if self.residual else 0


KINDS = (
    Kind("stem", "relu", False, False, (5, 5), (3, 2), None),
    Kind("inner", "relu", False, True, (5, 8), (3, 5), (2, 4)),
    Kind("end", "relu", True, True, (8, 8), (4, 6), (5, 5)),
    Kind("shortcut", "identity", False, True, (3, 5), (3, 5), (1, 3)),
)


def kind_of(unit: cases.Unit, is_first: bool) -> str:
    if is_first:
        return "stem"
    return "end" if unit.residual else "shortcut" if unit.act == "identity" else "inner"


def resnet50_bytes(per_element: dict[str, float]) -> float:
    """Bytes per image of the BatchNorm side of ResNet-50 at 224 from bytes per element of each kind."""
    return sum(
        per_element[kind_of(unit, i == 0)] * unit.channels * unit.height * unit.width
        for i, unit in enumerate(cases.units("resnet50"))
    )
