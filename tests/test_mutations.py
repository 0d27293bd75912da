"""The table of mutants fits the sources. Planting them takes a build each: python tests/mutations.py."""

import mutations


def test_each_text_occurs_once():
    assert mutations.problems() == []


def test_every_phase_has_mutants():
    counts = {}
    for m in mutations.MUTATIONS:
        counts[m.phase] = counts.get(m.phase, 0) + 1
    for phase in ("bn_fwd_reduce", "bn_fwd_apply", "bn_bwd_reduce", "bn_bwd_apply"):
        assert counts.get(phase, 0) >= 4, phase
