"""From the numbers of an audit to a decision: PASS, FAIL or INCONCLUSIVE, with the reasons and an exit code."""

from collections.abc import Sequence
from typing import Any

CODES = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
DOUBT = 0.01  # the negative control is out of order if it is as high by chance with less than this probability
POLICY = ("max_copy_rate", "max_patients", "min_recall", "min_recall_of_kind", "min_power")


def decide(result: dict[str, Any], policy: dict[str, float]) -> tuple[str, list[str]]:
    """The verdict on what `audit.json` holds.

    In this order: an audit whose own instruments are out of order (synthetic and real images rendered unlike, a negative
    control too high) is INCONCLUSIVE, whatever it found, since its finds may be false. Copies found beyond the policy, be
    they named or only counted (`enrichment`), FAIL, however weak the audit: a weak one can only have missed more. Copies
    not found PASS only if there are no more than the policy allows, by an upper bound that rests on what planted copies
    are seen; if enough of them are, of each kind too; if the audit had the power to see copies at the allowed rate; if
    its negative control could have failed; and if it is stated whom the generator was trained on.

    Args:
      policy: max_copy_rate: largest acceptable rate of copies among the synthetic images; max_patients: largest
        acceptable number of patients they point at; min_recall: least recall on planted copies, by the lower end of its
        interval; min_recall_of_kind: least recall on any kind of them that counts; min_power: least probability of seeing
        that there are copies if the generator copied at the rate max_copy_rate.
    Returns:
      (verdict, reasons), the deciding reasons first; there is at least one.
    Raises:
      ValueError: a policy value that is missing or out of range.
    """
    check(policy)
    percent = lambda rate: f"{100 * rate:.1f} %"
    span = lambda ci: f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"
    calibrated, bounds, power = (result[k] for k in ("calibrated", "bounds", "power"))
    k, n_val = result["n_syn"], result["n_val_patients"]
    allowed = percent(policy["max_copy_rate"])
    flagged = (
        f"{calibrated['n_copies']} of {k} synthetic images are flagged as copies, of {calibrated['n_mem_patients']} "
        "training patients"
    )
    between = (
        f"between {percent(bounds['at_least_rate'])} and {percent(bounds['at_most_rate'])} of the synthetic images are copies, "
        f"with {100 * bounds['confidence']:g} % confidence at each end"
    )

    if wrong := broken(result):
        return "INCONCLUSIVE", [*wrong, flagged, between]
    blind = untested(result)

    found = []
    if calibrated["n_mem_patients"] > policy["max_patients"]:
        found.append(f"{flagged}; the policy allows {policy['max_patients']:g} patients")
    elif bounds["at_least"] and policy["max_patients"] < 1:
        found.append(
            f"at least {bounds['at_least']} of {k} synthetic images are copies (chance of so many so similar if none is: "
            f"{bounds['p_value']:.2g}), though {calibrated['n_copies']} can be named; the policy allows no patient to be copied"
        )
    if bounds["at_least_rate"] > policy["max_copy_rate"]:
        found.append(f"{between}; the policy allows a rate of {allowed}")
    if found:
        return "FAIL", [*found, *blind]

    blind += missed("audit", power, bounds["by_kind"], policy)
    if bounds["at_most_rate"] > policy["max_copy_rate"] and not bounds["contradict"]:
        blind.append(
            f"up to {percent(bounds['at_most_rate'])} of the synthetic images may be copies; the policy allows {allowed}: "
            f"{bounds['n_above']} of {k} are more similar than {unseen_patients(bounds['rank'], n_val)}, "
            f"{bounds['n_above_expected']:.1f} would be by chance{mended(result)}"
        )
    if power["at_max_copy_rate"] < policy["min_power"]:
        rate = power["min_detectable_copy_rate"]
        can = f"needs a copy rate of {percent(rate)}" if rate else "is impossible at any rate"
        blind.append(
            f"with {n_val} unseen patients and {k} synthetic images, seeing with {percent(power['probability'])} probability "
            f"that there are copies {can}: a rate of {allowed}, which the policy allows, is seen with "
            f"{percent(power['at_max_copy_rate'])}{mended(result)}"
        )
    if blind:
        return "INCONCLUSIVE", [*blind, flagged, between]
    return "PASS", [
        f"{flagged}; {between}; allowed are {allowed}",
        f"planted copies are seen with recall {percent(power['recall'])} {span(power['recall_ci'])}, and a copy rate of {allowed} would have been noticed with probability "
        f"{percent(power['at_max_copy_rate'])}",
    ]


def exit_code(result: dict[str, Any]) -> int:
    """What a pipeline sees of `audit.json`: 0 only for a PASS, of what was released where a release was asked for."""
    release = result["release"]
    refused = release and not release["released"] and result["verdict"] == "FAIL"
    return CODES[(result if refused or not release else release)["verdict"]]


def broken(result: dict[str, Any]) -> list[str]:
    """What is out of order with the audit's instruments, so that its finds may be false; nothing if all is well."""
    look, negative = result["rendering"], result["negative_control"]
    wrong = []
    if look["differs"]:
        wrong.append(
            f"synthetic and real images are rendered differently ({look['worst_of']}: {look['worst_effect']:+.1f} standard "
            "deviations): high similarity may be smoothness, low similarity noise"
        )
    if negative["excess_p_value"] < DOUBT:
        wrong.append(
            f"the negative control is too high: {100 * negative['flag_rate']:.1f} % of unseen patients' images look like "
            f"copies at a nominal {100 * negative['nominal']:.1f} % (chance of as many: {negative['excess_p_value']:.4f})"
        )
    return wrong


def untested(result: dict[str, Any]) -> list[str]:
    """What nothing shows to be in order with them, whatever was found."""
    negative, bounds, doubts = result["negative_control"], result["bounds"], []
    if not result["stated"]:
        doubts.append(
            "nobody stated which patients the generator was trained on, and the split by ids need not be its: copies of those "
            "it has seen and we call unseen look innocent; say who they are in a CSV, patient_id,split, as data.splits"
        )
    if negative["smallest_excess_p_value"] >= DOUBT:
        doubts.append(
            f"the negative control, of {negative['n_patients']} patients, could not have failed whatever they look like: more "
            "control or unseen patients are needed"
        )
    if bounds["contradict"]:
        doubts.append(
            f"at least {bounds['at_least']} of {result['n_syn']} synthetic images are copies, more than the planted ones "
            "allow: these copies are less similar to their originals than planted ones, so nothing says how many there are "
            "at most"
        )
    return doubts


def missed(who: str, recall: dict[str, Any], by_kind: Sequence[dict[str, Any]], policy: dict[str, float]) -> list[str]:
    """Where planted copies are seen less often than the policy asks for, of all kinds and of each.

    Args:
      recall: `controls.overall`. by_kind: rows of `controls.recalls` that count, at the same line.
    """
    percent, found = lambda rate: f"{100 * rate:.1f} %", []
    (low, high), least = recall["recall_ci"], policy["min_recall"]
    if low < least:
        enough = recall["recall"] >= least
        mend = (
            "the interval is too wide: plant more copies (audit.planted)" if enough else "a better detector is needed"
        )
        found.append(
            f"the {who} sees {percent(recall['recall'])} [{100 * low:.1f}, {100 * high:.1f}] of planted copies; the policy "
            f"asks for {percent(least)} by the lower end: {mend}"
        )
    if unseen := [row for row in by_kind if row["recall"] < policy["min_recall_of_kind"]]:
        kinds = ", ".join(f"{row['kind']} ({percent(row['recall'])})" for row in unseen)
        found.append(
            f"of some kinds of planted copies the {who} sees too few: {kinds}; the policy asks for "
            f"{percent(policy['min_recall_of_kind'])} of each: a better detector is needed"
        )
    return found


def unseen_patients(rank: int, n: int) -> str:
    """What lies below the line of this rank, in words."""
    return f"all {n} unseen patients" if rank == 1 else f"all but {rank - 1} of {n} unseen patients"


def mended(result: dict[str, Any]) -> str:
    """How many more images or patients would do, if recall stays as it is."""
    enough = result["power"]["enough"]
    have = {"n_syn": result["n_draws"], "n_val_patients": result["n_val_patients"]}
    images = "synthetic images" if result["n_draws"] == result["n_syn"] else "independent synthetic images"
    if all(enough[name] == n for name, n in have.items()):
        return "; audits of this size pass four times in five if nothing is copied"
    ways = [
        f"{enough[name]} {what} with these {have[other]} {others}"
        for name, what, other, others in (
            ("n_syn", images, "n_val_patients", "unseen patients"),
            ("n_val_patients", "unseen patients", "n_syn", images),
        )
        if enough[name]
    ]
    if result["power"]["recall_ci"][0] <= 0:
        return ""
    if not ways:
        return f"; more of both, {images} and unseen patients, are needed"
    return f"; enough would be about {', or '.join(ways)}"


def check(policy: dict[str, float]) -> None:
    """Raises ValueError unless the policy has every value, in range."""
    for name in POLICY:
        value = policy.get(name)
        top = float("inf") if name == "max_patients" else 1.0
        if value is None or not 0 <= value <= top:
            raise ValueError(f"config.audit.policy.{name}={value!r}: give a number from 0 to {top:g}")
