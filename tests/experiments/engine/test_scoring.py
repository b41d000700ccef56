"""What a report says of samples that could not be read."""

from experiments.engine.scoring import quarantine_notes


def test_ten_quarantined_samples_are_named_and_the_others_counted() -> None:
    found = [(f"clip {i}", "damaged") for i in range(13)]
    assert quarantine_notes([]) == ()
    assert quarantine_notes(found[:10]) == tuple(f"quarantined clip {i}: damaged" for i in range(10))
    assert quarantine_notes(found)[-2:] == ("quarantined clip 9: damaged", "and 3 more quarantined")
