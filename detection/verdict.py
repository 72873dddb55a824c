"""From the numbers of an audit to a decision: PASS, FAIL or INCONCLUSIVE, with the reasons and an exit code."""

from typing import Any

EXIT = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
DOUBT = 0.01  # the negative control is out of order if it is as high by chance with less than this probability
POLICY = ("max_copy_rate", "max_patients", "min_recall", "min_power")


def decide(result: dict[str, Any], policy: dict[str, float]) -> tuple[str, list[str]]:
    """The verdict on what `audit.json` holds.

    In this order: an audit whose own instruments are out of order (synthetic and real images rendered unlike, a negative
    control too high) is INCONCLUSIVE, whatever it found, since its finds may be false. Copies found beyond the policy
    FAIL, however weak the audit: a weak one can only have missed more. Copies not found PASS only if the audit would
    have found them: enough recall on planted copies, enough power at the rate that the policy allows, and an upper
    bound of the copy rate within it.

    Args:
      policy: max_copy_rate: largest acceptable rate of copies among the synthetic images; max_patients: largest
        acceptable number of patients they point at; min_recall: least recall on planted copies; min_power: least
        probability of flagging any copy if the generator copied at the rate max_copy_rate.
    Returns:
      (verdict, reasons), the deciding reasons first; there is at least one.
    Raises:
      ValueError: a policy value that is missing or out of range.
    """
    check(policy)
    percent = lambda rate: f"{100 * rate:.1f} %"
    span = lambda ci: f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"
    calibrated, power, negative = result["calibrated"], result["power"], result["negative_control"]
    low, high = calibrated["copy_rate_ci"]
    copies = (
        f"{calibrated['n_copies']} of {result['n_syn']} synthetic images are flagged as copies "
        f"({percent(calibrated['copy_rate'])} {span((low, high))}), of {calibrated['n_mem_patients']} training patients"
    )

    broken = []
    look = result["rendering"]
    if look["differs"]:
        broken.append(
            f"synthetic and real images are rendered differently ({look['worst_of']}: {look['worst_effect']:+.1f} standard "
            "deviations): high similarity may be smoothness, low similarity noise"
        )
    if negative["excess_p_value"] < DOUBT:
        broken.append(
            f"the negative control is too high: {percent(negative['flag_rate'])} of unseen patients' images look like copies "
            f"at a nominal {percent(negative['nominal'])} (chance of as many: {negative['excess_p_value']:.4f})"
        )
    if broken:
        return "INCONCLUSIVE", [*broken, copies]

    found = []
    if calibrated["n_mem_patients"] > policy["max_patients"]:
        found.append(f"{copies}; the policy allows {policy['max_patients']:g} patients")
    if low > policy["max_copy_rate"]:
        found.append(f"{copies}; the policy allows a rate of {percent(policy['max_copy_rate'])}")
    if found:
        return "FAIL", found

    blind = []
    allowed = percent(policy["max_copy_rate"])
    if power["recall"] < policy["min_recall"]:
        blind.append(
            f"the detector sees {percent(power['recall'])} {span(power['recall_ci'])} of planted copies; the policy asks for "
            f"{percent(policy['min_recall'])}"
        )
    if power["at_max_copy_rate"] < policy["min_power"]:
        least = power["min_detectable_copy_rate"]
        can = f"needs a copy rate of {percent(least)}" if least else "is impossible at any rate"
        blind.append(
            f"with {result['n_val_patients']} unseen patients and {result['n_syn']} synthetic images, finding copies with "
            f"80 % probability {can}: a rate of {allowed}, which the policy allows, is found with {percent(power['at_max_copy_rate'])}; "
            "more unseen patients are needed"
        )
    if high > policy["max_copy_rate"]:
        blind.append(
            f"the copy rate's upper bound is {percent(high)}; the policy allows {allowed}: more synthetic images are needed"
        )
    if blind:
        return "INCONCLUSIVE", [*blind, copies]
    return "PASS", [
        f"{copies}; upper bound {percent(high)}, allowed {allowed}",
        f"planted copies are seen with recall {percent(power['recall'])} {span(power['recall_ci'])}, and a copy rate of {allowed} "
        f"would have been found with probability {percent(power['at_max_copy_rate'])}",
    ]


def check(policy: dict[str, float]) -> None:
    """Raises ValueError unless the policy has every value, in range."""
    for name in POLICY:
        value = policy.get(name)
        top = float("inf") if name == "max_patients" else 1.0
        if value is None or not 0 <= value <= top:
            raise ValueError(f"config.audit.policy.{name}={value!r}: give a number from 0 to {top:g}")
