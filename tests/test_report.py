"""The report as text: self-contained, complete, true to audit.json, and silent about patients where it is redacted."""

import base64
import copy
import io
import json
import re
import types
import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest

from detection import charts, redaction, report
from tests import report_example
from tests.conftest import ROOT

OPTIONAL = {  # section of the page -> key of audit.json
    "bounds": "bounds",
    "similarity": "histogram",
    "extraction": "extraction",
    "positive": "positive_control",
    "power": "power",
    "spaces": "spaces",
    "membership": "membership",
    "baselines": "baselines",
    "release": "release",
    "patients": "patients",
    "provenance": "provenance",
}
LISTED = {  # leaves that are drawn, not printed
    *(f"{of}/histogram/{key}" for of in ("", "/paper") for key in ("edges", "synthetic", "unseen", "control")),
    *(f"/extraction/{key}" for key in ("draws", "images", "images_ci", "patients", "patients_ci", "extrapolated")),
    *(f"/membership/{key}" for key in ("levels", "train_loss", "val_loss", "gap", "gap_ci", "auc", "auc_ci")),
    *(f"/membership/control/{key}" for key in ("auc", "auc_ci")),
    "/rendering/gap_db",
    "/rendering/raw_gap_db",
}


@pytest.fixture(scope="module")
def result():
    return report_example.example()


@pytest.fixture(scope="module")
def pairs():
    return report_example.pairs()


def render(result, pairs, redact=False, title="Audit of a test"):
    return report.render(result, pairs, redact=redact, title=title)


def parse(page):
    """The page as a tree; raises where a tag is not closed, an attribute not quoted or a character not escaped."""
    return ET.fromstring(page)


def section(page, name):
    return next(e for e in parse(page).iter() if e.get("id") == name)


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def resolve(result, pointer):
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        result = result[int(key)] if isinstance(result, list) else result[key]
    return result


def images(page):
    uris = [e.get("src") for e in parse(page).iter("img")]
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(u.split(",", 1)[1])))) for u in uris]


VARIANTS = {
    "fail": {},
    "pass": {"verdict": "PASS", "copies": 0.0},
    "inconclusive": {"verdict": "INCONCLUSIVE", "m": 12, "c": 3},
    "one image": {"k": 1},
    "one image, no copy": {"k": 1, "copies": 0.0},
}


@pytest.mark.parametrize("redact", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_well_formed_and_self_contained(pairs, variant, redact):
    page = render(report_example.example(**VARIANTS[variant]), pairs, redact)
    for element in parse(page).iter():
        assert element.tag != "script"
        for name, value in element.attrib.items():
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith(("data:", "#")), value
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page, "a browser would refuse what slipped through"
    anchors = {e.get("href")[1:] for e in parse(page).iter("a")}
    assert anchors <= {e.get("id") for e in parse(page).iter()}


def test_the_verdict_comes_first_with_its_reasons(pairs):
    for verdict in ("PASS", "FAIL", "INCONCLUSIVE"):
        made = report_example.example(verdict=verdict)
        page = render(made, pairs)
        banner = text_of(section(page, "verdict"))
        assert banner.startswith(verdict) and all(reason in banner for reason in made["reasons"])
        assert page.index('id="verdict"') < page.index("max_copy_rate") < page.index('id="rests"')


def test_every_number_is_that_of_audit_json(result, pairs):
    """Each `<data>` names its place in audit.json, holds the exact value and shows it rounded, and nothing else."""
    found = list(parse(render(result, pairs)).iter("data"))
    assert len(found) > 200
    for element in found:
        value = resolve(result, element.get("data-key"))
        assert json.loads(element.get("value")) == value
        assert same(value, "".join(element.itertext())), (element.get("data-key"), value, "".join(element.itertext()))


def same(value, text):
    if isinstance(value, bool):
        return text == ("yes" if value else "no")
    if isinstance(value, str):
        return text == value
    if isinstance(value, list) and any(isinstance(v, bool | str) for v in value):
        return text.strip("[]").split(", ") == [report.plain(v) for v in value]
    shown = re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?(?!\d)", text.replace("], [", " ").replace(", ", " "))
    values = np.ravel(value)
    scale = 100 if "%" in text or (isinstance(value, list) and "." in text and close(100 * values, shown)) else 1
    return close(scale * values, shown)


def close(values, shown):
    """Rounded to the decimals, or to the four significant digits, that are shown."""
    if len(values) != len(shown):
        return False
    for v, text in zip(values, shown, strict=True):
        number = float(text.replace(",", ""))
        decimals = len(text.partition("e")[0].partition(".")[2])
        if abs(number - v) > max(
            0.5001 * 10**-decimals if "e" not in text else 0, (0.51 if "e" in text else 5e-4) * abs(v)
        ):
            return False
    return True


def test_no_number_stands_outside_audit_json(pairs):
    """Prose and headings hold the same digits whatever was measured: all that varies is in `<data>` or drawn."""

    def fixed(page):
        tree = parse(page)
        for parent in list(tree.iter()):
            for child in list(parent):
                drawn = child.tag in ("data", "svg", "style", "title") or child.get("class") in ("settings", "small")
                if drawn or child.get("id") == "pairs":
                    tail = child.tail or ""
                    before = list(parent)[: list(parent).index(child)]
                    if before:
                        before[-1].tail = (before[-1].tail or "") + " " + tail
                    else:
                        parent.text = (parent.text or "") + " " + tail
                    parent.remove(child)
        return re.findall(r"\d[\d.,]*", "".join(tree.itertext()))

    one, two = (report_example.example(seed=seed, k=k, m=m) for seed, k, m in ((0, 128, 160), (5, 97, 61)))
    for made in (one, two):  # names, which may hold digits
        made["patients"] = [{**row, "patient": "somebody"} for row in made["patients"]]
        made["provenance"]["data"] = {name: {**v, "sha256": "hash"} for name, v in made["provenance"]["data"].items()}
    assert fixed(render(one, pairs)) == fixed(render(two, pairs))


def test_every_leaf_of_audit_json_is_shown(result, pairs):
    page = render(result, pairs)
    shown = {e.get("data-key") for e in parse(page).iter("data")}
    words = text_of(parse(page).find("body"))
    unseen = []
    for keys, value in leaves(result):
        pointer = report.pointer(keys)
        framed = keys[0] == "positive_control" and keys[2:] == ("standard",)
        once = framed or (
            keys[0] == "positive_control" and keys[2:] == ("n",) and keys[1] > 0
        )  # the same in every cell
        if once or any(pointer.startswith(listed) for listed in LISTED) or value is None:
            continue
        prefixes = {report.pointer(keys[:n]) for n in range(1, len(keys) + 1)}
        if not prefixes & shown and not (isinstance(value, str) and value in words):
            unseen.append(pointer)
    assert set(unseen) == {
        "/rendering/differs",  # in words
        "/bounds/contradict",
        "/stated",
        "/release/released",
        "/absent",  # nothing is
        "/paper/mem_rate_size_matched_extrapolated",
        "/calibrated/size_matched_extrapolated",
        "/paper/null_mem_rate_extrapolated",  # in words
    }


def leaves(tree, keys=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


@pytest.mark.parametrize("gone", ["absent", "null"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_section_says_so_and_why(result, pairs, name, gone):
    made = copy.deepcopy(result)
    if gone == "null":
        made[OPTIONAL[name]] = None
    else:
        del made[OPTIONAL[name]]
    told = text_of(section(render(made, pairs), name))
    assert "Not in this report." in told
    if gone == "absent":
        assert f"audit.json has no {OPTIONAL[name]}" in told


def test_the_least_of_an_audit_json_makes_a_report(pairs):
    """The keys that the first audits wrote are enough, and none of what they lack is claimed."""
    made = report_example.measured(report_example.scores(128, 160, 120, 0))
    page = render(made, pairs)
    assert text_of(section(page, "verdict")).startswith("NO VERDICT")
    assert page.count("Not in this report.") == len(OPTIONAL)
    made["calibrated"]["threshold"], made["rendering"]["gap_db"][3] = None, None
    made["power"] = {
        "min_detectable_copy_rate": None,
        "smallest_flaggable_copy_rate": None,
        "recall": 0.9,
        "probability": 0.8,
    }
    page = render(made, [])
    assert text_of(section(page, "power")).count("none: too few unseen patients") == 1
    assert text_of(section(page, "power")).count("none, by these unseen patients and planted copies") == 1
    assert "no copy rate would be found" in text_of(section(page, "rests"))


def test_spaces_and_baselines_that_could_not_be_measured_say_so(result, pairs):
    made = copy.deepcopy(result)
    space = made["spaces"]["SSIM"]
    for key in space:
        space[key] = None
    made["spaces"]["theirs"] = {"n_flagged": 3}
    made["baselines"]["c_t"] = {"statistic": None, "p_value": None, "cells": 0}
    page = render(made, pairs)
    assert text_of(section(page, "spaces")).count("not measured") >= 9
    assert "not measured, p = not measured" in text_of(section(page, "baselines"))


@pytest.mark.parametrize(
    "nasty",
    [
        "<script>alert(1)</script>",
        "\"onload='x' x=\"",
        "Müller, 王 & söner",
        "a\x00b\x1b[31m\x7f",
        "\u202egnp.exe",
        "bad\udcffbytes",
        "{{ 7 * 7 }}{% raw %}",
        "]]><!--",
        "../../etc/passwd",
        "x" * 300,
    ],
)
def test_hostile_ids_are_text(result, nasty, tmp_path):
    made = copy.deepcopy(result)
    made["patients"] = [{"patient": nasty, "n_copies": 3}]
    made["spaces"][nasty] = made["spaces"]["SSIM"]
    made["positive_control"][0]["kind"] = nasty
    made["caveats"], made["reasons"] = [nasty], [nasty]
    pair = report_example.pairs(1)[0]._replace(synthetic_id=nasty, training_id=nasty, patient=nasty)
    report.write(tmp_path / "r.html", made, [pair], redact=False, title=nasty)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    tree = parse(page)
    assert not list(tree.iter("script")) and {e.tag for e in tree.iter("img")} == {"img"}
    seen = report.printable(nasty)
    assert sum("".join(e.itertext()) == seen for e in tree.iter("bdi")) == 4
    assert not re.search("[\x00-\x08\u202e\udcff]", page)
    safe = render(made, [pair], redact=True, title=nasty)
    parse(safe)
    if len(seen) > 5 and "7 * 7" not in nasty:
        assert nasty not in safe


def test_volumes_show_three_planes():
    page = render(report_example.example(), report_example.pairs(3, size=(10, 24, 20)))
    shown = images(page)
    assert len(shown) == 9
    assert all(x.shape == (24, 20 + 20 + 24 + 2) for x in shown), "axial, coronal and sagittal planes, one pixel apart"
    assert "middle planes" in text_of(section(page, "pairs"))


def test_pictures_are_the_images(pairs):
    shown = images(render(report_example.example(), pairs))
    assert len(shown) == 3 * len(pairs)
    for i, pair in enumerate(pairs):
        for x, picture in ((pair.synthetic, shown[3 * i]), (pair.nearest, shown[3 * i + 1])):
            np.testing.assert_allclose(picture / 127.5 - 1, x[..., 0], atol=1 / 127)
        difference = (shown[3 * i + 2] / 255 - 0.5) * 2
        np.testing.assert_allclose(difference, np.clip((pair.synthetic - pair.nearest)[..., 0], -1, 1), atol=1 / 120)


def test_flagged_pairs_are_marked_in_words(pairs):
    cards = list(section(render(report_example.example(), pairs), "pairs").iter("article"))
    for card, pair in zip(cards, pairs, strict=True):
        assert ("flagged" in card.get("class").split()) == pair.flagged
        assert ("not flagged" in text_of(card)) == (not pair.flagged)


@pytest.mark.parametrize("k", [1, 100_000])
@pytest.mark.parametrize("size", [(512, 512), (64, 128, 128)])
def test_it_stays_small(k, size):
    """At worst: pictures of noise, which no PNG makes smaller, and one patient a copy."""
    made = report_example.example(k=k, m=10_000 if k > 1 else 5)
    made["patients"] = [{"patient": f"patient-{i:06d}", "n_copies": 1} for i in range(k)]
    page = render(made, report_example.pairs(16, size))
    assert len(page.encode()) < 3_000_000
    assert len(list(section(page, "patients").iter("li"))) == min(k, report.MOST_PATIENTS)


def test_every_key_is_documented(result):
    named = set(
        re.findall(r"[A-Za-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", (ROOT / "docs" / "audit.md").read_text())))
    )
    keys = set()
    for path, _ in leaves({name: value for name, value in result.items() if name not in ("spaces", "provenance")}):
        keys |= {key for key in path if isinstance(key, str) and "tail" not in path[:-1]}
    keys |= {key for space in result["spaces"].values() for key in space} | {*result["provenance"], "n", "sha256"}
    assert len(keys) > 90 and not keys - named


# ---- redaction


def secrets(result, pairs):
    """What must not be found in a redacted report."""
    words = {w for p in pairs for w in (p.training_id, p.patient, p.synthetic_id)}
    words |= {row["patient"] for row in result["patients"]}
    return words | {"ann", "smith", "ward", "WARD7", "hospital", "/srv", "C:\\", "made elsewhere"}


def sentences(result):
    made = copy.deepcopy(result)
    patient = made["patients"][0]["patient"]
    made["caveats"] = [
        f"patient {patient} has two scans in /srv/hospital/ann smith/ward 7/{patient}.png",
        "1 file was skipped: '/srv/hospital/my ward/x y.dcm' could not be read (see ~/ann/log.txt)",
        "read from C:\\Users\\ann\\x.png and \\\\ward\\share and gs://hospital/bucket and ward/seven/eight",
    ]
    made["reasons"] = [f"{patient} is copied; d1/d2 < 1/3 for 3 of 4 images and/or t/T = 0.5"]
    made["provenance"]["environment"]["hostname"] = "ward7"
    made["future"] = {"verdicts": [patient]}
    return made


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_redacted_leaks_no_id_and_no_path(result, pairs, verdict):
    made = {**sentences(result), "verdict": verdict}
    page = render(made, pairs, redact=True, title="Audit of /srv/hospital/ann/runs")
    for text in (re.sub("<style>.*?</style>", "", page, flags=re.DOTALL), json.dumps(redaction.redacted(made, pairs))):
        low = text.lower()
        leaked = [word for word in secrets(result, pairs) if re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", low)]
        assert not leaked
    assert "d1/d2 &lt; 1/3 for 3 of 4 images and/or t/T = 0.5" in page, "what is no secret stays"
    assert "patient 1" in page


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", None])
def test_redacted_shows_no_real_image(result, pairs, verdict):
    """Every picture in the file is a synthetic image that was not flagged, in an audit that passed."""
    page = render({**result, "verdict": verdict}, pairs, redact=True)
    whole = render(result, pairs)
    real = [e.get("src") for card in parse(whole).iter("article") for e in list(card.iter("img"))[1:]]
    flagged = [
        next(card.iter("img")).get("src")
        for card in parse(whole).iter("article")
        if card.get("class") == "pair flagged"
    ]
    assert len(real) == 2 * len(pairs) and flagged
    for uri in real + flagged:
        assert uri.split(",", 1)[1][:200] not in page and uri[200:400] not in page
    shown = images(page)
    innocent = [p for p in pairs if not p.flagged]
    assert len(shown) == (len(innocent) if verdict == "PASS" else 0)
    assert page.count("base64") == len(shown)
    for picture in shown:
        like = [np.corrcoef(picture.ravel(), p.nearest.ravel())[0, 1] for p in pairs]
        assert max(like) < 0.5


def test_pseudonyms_do_not_depend_on_the_ids(result, pairs):
    """Other names, in another order among equals: the same file, byte for byte. So no name can be read out of it."""
    rng = np.random.default_rng(0)
    people = sorted({row["patient"] for row in result["patients"]} | {p.patient for p in pairs})
    other = dict(zip(people, (f"p{n:05d}" for n in rng.permutation(len(people))), strict=True))
    renamed = copy.deepcopy(result)
    rows = [{**row, "patient": other[row["patient"]]} for row in renamed["patients"]]
    renamed["patients"] = sorted((rows[i] for i in rng.permutation(len(rows))), key=lambda row: -row["n_copies"])
    theirs = [
        p._replace(patient=other[p.patient], training_id=f"t{i}", synthetic_id=f"s{i}") for i, p in enumerate(pairs)
    ]
    assert render(result, pairs, redact=True) == render(renamed, theirs, redact=True)


def test_pseudonyms_agree_between_pairs_and_patients(result, pairs):
    page = render(result, pairs, redact=True)
    rows = redaction.redacted(result, pairs)["patients"]
    true = {row["patient"]: row["n_copies"] for row in result["patients"]}
    shown = {row["patient"]: row["n_copies"] for row in rows}
    first = redaction.anonymous(result, pairs)[0]
    assert first.patient == "patient 1" and shown["patient 1"] == true[pairs[0].patient]
    assert sorted(shown.values()) == sorted(true.values())
    listed = [text_of(li) for li in section(page, "patients").iter("li")]
    assert listed == [f"{row['patient']} {row['n_copies']}" for row in rows][: report.MOST_PATIENTS]


def test_ids_of_digits_do_not_take_numbers_with_them(result, pairs):
    made = {**copy.deepcopy(result), "patients": [{"patient": "109", "n_copies": 3}, {"patient": "3", "n_copies": 1}]}
    made["reasons"] = ["patient 109 and 3 of 109 images; patients: 3"]
    clean = redaction.redacted(made)
    assert clean["reasons"] == ["patient (removed) and 3 of 109 images; patients: (removed)"]


# ---- charts


def test_positions_are_the_numbers(result):
    """Read back from the drawing, by the axis."""
    drawn = charts.histogram(result)
    counts = result["histogram"]["synthetic"]
    path = dict(drawn.areas)["synthetic"]
    tops = np.array([float(y) for _, y in re.findall(r"L([\d.]+) ([\d.]+)H", path)])
    high = drawn.y.high
    np.testing.assert_allclose((100 - tops) / 100 * high, 100 * np.array(counts) / sum(counts), atol=1e-4 * high)
    threshold = next(x for style, x in drawn.rules if style == "calibrated")
    back = drawn.x.low + threshold / 100 * (drawn.x.high - drawn.x.low)
    assert back == pytest.approx(result["calibrated"]["threshold"])
    rows = charts.rates(result)
    assert [row.at * row.top / 100 for row in rows] == pytest.approx([result[a][b] for a, b in (r.keys for r in rows)])


@pytest.mark.parametrize("what", ["images", "patients"])
def test_curves_follow_the_numbers(result, what):
    curve = result["extraction"]
    drawn = charts.extraction(result, what)
    points = [np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", path), float) for _, path in drawn.lines]
    solid, dashed = points
    measured = [d for d, beyond in zip(curve["draws"], curve["extrapolated"], strict=True) if not beyond]
    np.testing.assert_allclose(solid[:, 0] / 100 * drawn.x.high, measured, atol=1e-4 * drawn.x.high)
    np.testing.assert_allclose(
        (100 - solid[:, 1]) / 100 * drawn.y.high, curve[what][: len(measured)], atol=1e-4 * drawn.y.high
    )
    assert (dashed[0] == solid[-1]).all(), "the extrapolation starts where measuring ended"


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    keep = charts.thinned(100_000)
    assert len(keep) <= charts.MOST_POINTS and keep[0] == 0 and keep[-1] == 99_999
    assert charts.thinned(1).tolist() == [0] and charts.thinned(3).tolist() == [0, 1, 2]


def test_a_gap_in_the_spectrum_breaks_the_line(result):
    made = copy.deepcopy(result)
    made["rendering"]["gap_db"][5] = None
    line = next(path for style, path in charts.spectrum(made).lines if style == "synthetic")
    assert line.count("M") == 2 and "nan" not in line
    made["rendering"]["gap_db"] = [None] * 32
    assert charts.spectrum(made).lines


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.031, 0.0042), (0.99971, 1.0), (0, 1e5), (0.5, 0.5)])
def test_ticks_lie_on_the_axis_and_say_where(low, high):
    axis = charts.axis(low, high, "x")
    assert len(axis.ticks) >= 2
    for position, text in axis.ticks:
        assert 0 <= position <= 100
        value = axis.low + position / 100 * (axis.high - axis.low)
        assert float(text.replace(",", "")) == pytest.approx(value, abs=1e-6 * (axis.high - axis.low))


# ---- what an audit hands over


def test_top_pairs_and_patients_are_the_audits():
    """Against the plain definition, with ties."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (9, 4, 5, 1)).astype(np.float32)
    names = np.array([f"i{n}" for n in range(9)])
    train = cohort(images, names, np.array(["b", "a", "c"])[np.arange(9) % 3])
    synthetic = cohort(images[:6] / 2, names[:6], names[:6])
    nearest, sim = np.array([4, 8, 0, 4, 1, 2]), np.array([0.9, 0.2, 0.9, 0.99, 0.1, 0.5])
    flagged = sim > 0.3
    made = report.top_pairs(synthetic, train, nearest, sim, 1 - sim, flagged, 4)
    assert [p.synthetic_id for p in made] == ["i3", "i0", "i2", "i5"], "ties in the order of the files"
    assert [(p.training_id, p.patient) for p in made] == [("i4", "a"), ("i4", "a"), ("i0", "b"), ("i2", "c")]
    assert all(p.flagged for p in made) and made[0].p_value == pytest.approx(0.01)
    np.testing.assert_array_equal(made[0].nearest, images[4])
    np.testing.assert_array_equal(made[0].synthetic, images[3] / 2)
    assert report.copied_patients(train.patients[nearest], flagged) == [
        {"patient": "a", "n_copies": 2},
        {"patient": "b", "n_copies": 1},
        {"patient": "c", "n_copies": 1},
    ]
    assert report.copied_patients(train.patients[nearest], np.zeros(6, bool)) == []


def cohort(images, ids, patients):
    return types.SimpleNamespace(images=images, ids=ids, patients=patients)
