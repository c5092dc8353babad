"""docs/scale.md is what its script computes."""

import pytest

pytest.importorskip("timm")

import scale


def test_the_document_is_what_the_script_computes():
    text = scale.DOCUMENT.read_text()
    assert scale.fill(text) == text


def test_an_exchange_is_a_ring_within_machines_and_between_them():
    assert scale.exchange_seconds(1e9, 1) == 0
    assert scale.exchange_seconds(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / scale.NVLINK)
    more = scale.exchange_seconds(1e9, 64) - scale.exchange_seconds(1e9, 8)
    assert more == pytest.approx(2 * 7 / 8 * 1e9 / 8 / scale.PORT)


def test_flops_are_those_that_are_known():
    # Twice the 4.09 billion multiplications and additions of He et al. (2016).
    costs = scale.costs_of("resnet50")
    assert costs.forward == pytest.approx(2 * 4.09e9, rel=0.01)
    assert costs.parameters == 25_557_032
    assert costs.norms == 53
