"""A real small audit with a release: what it writes is documented, shown, no more than the example has, and redacted."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import ldm
from detection import audit, redaction, report, spaces, views
from tests import report_example, test_audit
from tests.conftest import ROOT, make_mesh
from tests.test_audit import SIZE, people
from tests.test_report import LISTED, leaves, parse, text_of

NOTES = (
    "/srv/ward 7/SMITH JOHN 1960.png: is constant",
    "P0042_0003.dcm is listed 2 times",
    "3 pairs of images of different or unknown patients are the same image (planted by data.cohort), 1 across splits",
)


def named(images, name):
    """Ids and patients as hospitals have them: with names, spaces and dates."""
    ids = np.array([f"ward {i % 7}/{name.upper()}SON_JOHN 19{i:03d}.png" for i in range(len(images))])
    patients = np.array([f"{name.upper()}SON_JOHN 19{i:03d}" for i in range(len(images))])
    return SimpleNamespace(images=images, ids=ids, patients=patients)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(audit.json, its folder, the sets): with every section, by the modules that fill them."""
    folder = tmp_path_factory.mktemp("real")
    sizes = {"train": 40, "val": 100, "control": 40}
    sets = {name: named(people(i, n), name) for i, (name, n) in enumerate(sizes.items())}
    copies = np.concatenate([sets["train"].images[:12], people(9, 48)])
    ids = np.array([f"made/{i:03d}.png" for i in range(60)])
    synthetic = SimpleNamespace(images=copies, ids=ids, patients=ids, files=ids)
    (folder / "source" / "made").mkdir(parents=True)
    for name in synthetic.ids:
        (folder / "source" / name).write_bytes(name.encode())

    def judged(which):
        one = SimpleNamespace(images=copies[which], ids=synthetic.ids[which], patients=synthetic.patients[which])
        space = {"detector": lambda x: views.pixels(x, 16)}
        how = {"spaces": space, "in_order": data.in_order, "path": folder / "quality.json", "neighbours": 3}
        return ldm.evaluate(sets["val"], {"synthetic": one}, pairs=30, batch=32, seed=0, **how)

    settings = dict(
        render=None, plants=test_audit.PLANTS, again=spaces.by_correlation(lambda x: views.pixels(x[:, ::2, ::2])),
        others={"pixels": spaces.by_correlation(views.pixels)}, levels=(0.2, 0.6), stated=True, caveats=NOTES, redact=True,
        losses=lambda x: jnp.stack([jnp.square(x).mean((1, 2, 3)), jnp.abs(x).mean((1, 2, 3))], 1),
        described={"config": {"data": {"path": "/srv/ward 7", "layout": "auto"}}, "environment": {"python": "3.11"}},
        quality=lambda keep_K: ldm.before_and_after(judged(np.ones(60, bool)), judged(keep_K), "synthetic"),
        source=folder / "source", in_order=data.in_order, folder=folder / "audit", policy=test_audit.POLICY,
        release_to=folder / "release", release_level=0.05, release_anyway=False, fdr=0.1, percentile=95.0, pairs=4,
        slow_images=2000, planted=40, batch=32, seed=0,
    )  # fmt: skip
    with jax.set_mesh(make_mesh(8, 1)):
        space = spaces.registered(views.pixels, (SIZE, SIZE, 1), candidates=8)
        result = audit(space, sets, synthetic, **settings)
    assert json.loads((folder / "audit" / "audit.json").read_text()) == json.loads(json.dumps(result))
    return json.loads(json.dumps(result)), folder, {**sets, "synthetic": synthetic}


def paths(result):
    """Places of leaves, whatever the number of list items and the names of spaces and sets."""
    found = set()
    for keys, _ in leaves({name: value for name, value in result.items() if name != "provenance"}):
        place = ["*" if isinstance(key, int) else key for key in keys]
        if place[0] == "spaces":
            place[1] = "*"
        found.add(tuple(place[: place.index("*") + 2] if "*" in place else place))
    return found


def test_every_key_of_a_real_audit_is_documented(real):
    result, _, _ = real
    assert result["release"]["released"] and result["membership"] and result["release"]["quality"]["after"]
    pages = re.findall(r"`([^`]+)`", (ROOT / "docs" / "audit.md").read_text())
    named = set(re.findall(r"[A-Za-z_0-9]+", " ".join(pages)))
    keys = {key for place in paths(result) for key in place if isinstance(key, str) and key != "*"}
    assert len(keys) > 90 and not keys - named


def test_the_example_invents_no_key(real):
    """What the tests of the report rest on is what an audit writes."""
    result, _, _ = real
    known = paths(result)
    alike = lambda one, other: one[: len(other)] == other or other[: len(one)] == one  # null here, a list there
    invented = {place for place in paths(report_example.example()) if not any(alike(place, other) for other in known)}
    tail = {place for place in invented if place[:2] == ("calibrated", "tail")}  # refused in one of the two
    assert not invented - tail


def test_every_number_of_a_real_audit_is_shown(real):
    result, _, _ = real
    page = report.render(result, [], redact=False, title="a test")
    shown = {e.get("data-key") for e in parse(page).iter("data")}
    words = text_of(parse(page).find("body"))
    unseen = set()
    for keys, value in leaves(result):
        pointer = report.pointer(keys)
        if keys[0] in ("positive_control", "provenance") or any(pointer.startswith(listed) for listed in LISTED):
            continue
        above = {report.pointer(keys[:n]) for n in range(1, len(keys) + 1)}
        if value not in (None, {}) and not above & shown and not (isinstance(value, str) and value in words):
            unseen.add("/".join("*" if isinstance(key, int) else str(key) for key in keys))
    in_words = {"rendering/differs", "release/released", "stated", "bounds/contradict"}
    in_words |= {
        f"{a}_extrapolated" for a in ("paper/mem_rate_size_matched", "calibrated/size_matched", "paper/null_mem_rate")
    }
    assert {place for place in unseen if not place.startswith("spaces/")} <= in_words


# ---- redaction


def test_the_codes_own_words_stay_in_what_is_shared(real):
    """Sentences that hold nothing but counts, and the names of what was measured."""
    result, _, _ = real
    ours = [redaction.PARTS.format(300, 10, 9), redaction.LOUD.format("-10.3"), redaction.CHOSEN, redaction.PER_IMAGE]
    ours.append(redaction.VOXELS.format("1 x 0.5 x 0.5", "1e+03 x 2 x 2"))
    strangers = [f"{ours[0]} of SMITH JOHN", redaction.VOXELS.format("SMITH JOHN", 1)]
    clean = redaction.redacted(result | {"caveats": [*ours, *strangers]})
    assert clean["caveats"][:-1] == ours and clean["caveats"][-1].startswith("2 more")
    assert clean["rendering"]["worst_of"] == result["rendering"]["worst_of"]
    assert [row["of"] for row in clean["rendering"]["effects"]] == [row["of"] for row in result["rendering"]["effects"]]


def tokens(sets):
    """Ids, patients, and the names, folders and dates in them."""
    words = {word for one in sets.values() for names in (one.ids, one.patients) for word in map(str, names)}
    words |= {part for word in words for part in re.split(r"[/_ .]", word)}
    return {word for word in words if len(word) > 3 and word not in ("made", "ward")} | {"SMITH", "P0042", "0003.dcm"}


def test_redacted_files_hold_no_name_of_a_patient_or_file(real):
    _, folder, sets = real
    whole = (folder / "audit" / "audit.json").read_text()
    assert "SMITH JOHN" in whole and "TRAINSON_JOHN" in whole
    page = re.sub(r"<style>.*?</style>", "", (folder / "audit" / "report.html").read_text(), flags=re.DOTALL)
    page = re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    for text in (page, (folder / "audit" / "audit.redacted.json").read_text()):
        text = re.sub(r"\b[0-9a-f]{64}\b", "", text)  # hashes of the data
        assert not [word for word in tokens(sets) if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
        assert "3 pairs of images of different or unknown patients" in text, "what holds counts alone stays"
        assert "2 more, on the data" in text


def dressed(result, pairs, names):
    """The result and pairs with these names wherever a real audit has names."""
    a, b, c, d = names
    made = json.loads(json.dumps(result))
    made["caveats"] = [f"/srv/{a}/{b}.png: is constant", f"{c}.dcm is listed 2 times", f"{a}/{d}: 3 files, {b}", d]
    made["patients"] = [{"patient": a, "n_copies": 3}, {"patient": b, "n_copies": 2}]
    made["release"]["folder"] = f"/srv/{c}"
    made["provenance"]["config"]["data"] |= {"path": f"/srv/{d}", "patient_pattern": c, "accept_duplicates": [a, b]}
    made["provenance"]["environment"]["hostname"] = d
    made["provenance"]["data"] = {"train": {"n": 3, "sha256": "0", "path": a}}
    made["unknown"] = {c: [d]}
    made["rendering"]["file"] = b
    made["baselines"]["c_t"]["worst_image"] = c
    shown = [p._replace(synthetic_id=f"{d}.png", training_id=f"{a}/{c}.dcm", patient=a) for p in pairs]
    return made, shown


NAMES = st.text("ABCDEFGHJKLMNPQRSTUVWXYZ0123456789_-. 'éß王", min_size=6, max_size=24).map(
    lambda s: f"Zq{s.strip()}Zq"
)


@settings(max_examples=12, deadline=None)
@given(names=st.lists(NAMES, min_size=4, max_size=4, unique=True))
def test_what_is_shared_does_not_depend_on_names(real, names):
    """Any names give the same bytes, so none can be read out of them, whole or in part."""
    result, _, _ = real
    pairs = report_example.pairs(2, size=(4, 4))

    def shared(names):
        made, shown = dressed(result, pairs, names)
        return (
            report.render(made, shown, redact=True, title="a test"),
            json.dumps(redaction.redacted(made, shown), ensure_ascii=False),
        )

    plain = shared(["Zq one Zq", "Zq two Zq", "Zq three Zq", "Zq four Zq"])
    assert shared(names) == plain
    assert not any(name in text for name in names for text in plain)
