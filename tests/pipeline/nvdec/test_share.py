"""Clips of a batch are dealt by the rates of both sides; what rounding leaves over is made up for."""

import pytest

from pipeline.nvdec.share import Rates, Share


@pytest.mark.parametrize(
    ("rates", "share"),
    [((300.0, 100.0), 0.75), ((0.0, 50.0), 0.0), ((50.0, 0.0), 1.0), ((0.0, 0.0), 0.0)],
)
def test_share_of_rates(rates: tuple[float, float], share: float) -> None:
    assert Rates(*rates).nvdec_share == share


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_must_be_finite(rate: float) -> None:
    with pytest.raises(ValueError, match=r"cpu_per_s .* must be a finite number"):
        Rates(1.0, rate)


def test_a_share_is_between_nought_and_one() -> None:
    with pytest.raises(ValueError, match=r"nvdec_share \(1.5\) must be in 0..1"):
        Share(1.5)


@pytest.mark.parametrize("share", [0.0, 0.13, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("clips", [1, 3, 8, 32])
def test_after_any_number_of_batches_less_than_a_clip_is_owed(share: float, clips: int) -> None:
    deal, taken = Share(share), 0
    for batch in range(1, 60):
        chosen = deal.deal([True] * clips)
        taken += sum(chosen)
        assert abs(taken - share * clips * batch) <= 0.5 + 1e-9
        assert abs(sum(chosen) - share * clips) <= 1.0 + 1e-9  # both sides end together in every batch


def test_only_clips_that_nvdec_can_decode_go_there() -> None:
    deal = Share(0.5)
    assert deal.deal([False, True, False, True, True, True]) == [False, True, False, True, True, False]
    assert deal.deal([False] * 4) == [False] * 4
    assert sum(deal.deal([True] * 4)) == 3  # of what it could not take it makes up for half a clip at most
    assert Share(1.0).deal([True, False, True]) == [True, False, True]


def test_an_empty_batch_changes_nothing() -> None:
    deal = Share(0.4)
    assert deal.deal([]) == []
    assert sum(deal.deal([True] * 5)) == 2


@pytest.mark.parametrize(("both", "share"), [(0.0, 0.2), (1100.0, 0.2), (1000.0, 0.2), (799.0, 0.0), (800.0, 0.0)])
def test_one_side_has_all_where_both_at_once_are_not_faster(both: float, share: float) -> None:
    assert Rates(200.0, 800.0, both).nvdec_share == pytest.approx(share)
    assert Rates(800.0, 200.0, both).nvdec_share == pytest.approx(1.0 - share)
