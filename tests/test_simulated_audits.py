"""The benchmark on simulated embeddings, at a few of its sizes: no null above nominal, no more false finds than promised."""

import pytest

from detection import calibrate
from tests.benchmarks import statistics

pytestmark = pytest.mark.slow


def test_nulls_are_flagged_at_no_more_than_nominal_at_any_size():
    """Bonferroni over the rows, so that chance fails this once in twenty seeds, and this seed is fixed."""
    rows = statistics.nulls(sizes=(50, 1000), draws=60, paper_draws=5)
    assert len(rows) == 16
    for row in rows:
        hits = round(row["any_flagged"] * 60)
        assert calibrate.clopper_pearson(hits, 60, 1 - 0.1 / len(rows))[0] <= statistics.FDR, row
        hits = round(row["copies_seen"] * 60)
        assert calibrate.clopper_pearson(hits, 60, 1 - 0.1 / len(rows))[0] <= statistics.FDR, row
        middle, (low, _) = row["p_at_most_nominal"], row["p_at_most_nominal_ci"]
        assert middle - 1.6 * (middle - low) <= statistics.FDR, row
    floors = {(r["n"], r["m"], r["k"]): r for r in rows if r["images_a_patient"] == "1"}
    assert floors[1000, 50, 1000]["paper_copies"] > 0.2 and floors[1000, 50, 1000]["paper_memorized"] > 0.2


def test_planted_copies_cost_no_more_false_discoveries_than_promised():
    rows = statistics.power(unseen_patients=(50, 1000), rates=(0.02, 0.5), draws=25)
    for row in rows:
        middle, (_, high) = row["false_discoveries"], row["false_discoveries_ci"]
        assert middle - 1.6 * (high - middle) <= statistics.FDR, row
        middle, (_, high) = row["tail_false_discoveries"], row["tail_false_discoveries_ci"]
        assert middle - 1.6 * (high - middle) <= statistics.FDR, row
        assert row["found"] >= row["found_promised"] - 0.3, row
        for side in ("at_least_holds", "at_most_holds"):
            holds = round(row[side] * 25)
            assert calibrate.clopper_pearson(holds, 25, 1 - 0.1 / len(rows))[1] >= row["bounds_promised"], row
    of = {(r["m"], r["copies"], r["copy_rate"]): r for r in rows if r["images_a_patient"] == "1"}
    assert of[50, "near", 0.02]["recall"] == 0 and of[50, "near", 0.02]["tail_recall"] > 0.7
    assert of[1000, "near", 0.5]["recall"] > 0.99 and of[1000, "far", 0.5]["recall"] < 0.9
    assert "| near |" in statistics.table(rows)
