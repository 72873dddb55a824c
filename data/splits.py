"""Which patients train, which validate: a pure function of the patient's id, so that adding data moves nobody."""

import collections
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

NAMES = ("train", "select", "val", "control")
NONE = "none"  # as a split that is said: in no split
FOLDS = 5
FRACTIONS = {"train": 0.6, "select": 0.05, "val": 0.2, "control": 0.15}


def uniform(patient: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but the patient's id and the salt."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{patient}".encode()).digest()[:6], "big") / 2**48


def assign(
    patients: Sequence[str],
    given: Sequence[str] = (),
    *,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    fold: int | None = None,
    whole_train: bool = False,
) -> np.ndarray:
    """Gives every image the split of its patient.

    Four disjoint sets of patients: 'train' fits the models; 'select', carved from the training patients, chooses their
    checkpoints; 'val' sets the audit's threshold; 'control' is the audit's negative control.

    Args:
      patients: patient id of each image.
      given: for each image a split that the data's owner says, or ''. It wins over the hash, for all of that patient's
        images. 'test' means 'control', and 'none' no split. Where nobody is given 'select', it is carved by hash from
        those given 'train'; likewise 'control' from 'val', or 'val' from 'control'; in the proportions of `fractions`.
      fractions: expected share of the patients in each split; what they sum to short of 1 is left in no split.
      seed: another seed is another partition.
      fold: 0 to FOLDS - 1, for cross-validation: those who are in 'train' or 'val' by the above are put in the order of
        another hash and cut in FOLDS, of which this one is 'val' and the others 'train'. Adding patients may move some.
      whole_train: 'select' is carved from those given 'val' or 'control', too, so that all who are given 'train', as a
        generator has seen them, stay in it.
    Returns:
      (n,) str, each one of NAMES or ''.
    Raises:
      ValueError: a bad fraction or split name, or a patient given two splits.
    """
    fractions = FRACTIONS if fractions is None else fractions
    shares = {name: fractions.get(name, 0.0) for name in NAMES}
    if set(fractions) - set(NAMES) or min(shares.values()) < 0 or not 0 < sum(shares.values()) < 1 + 1e-9:
        raise ValueError(
            f"data.fractions needs shares of {', '.join(NAMES)} that sum to at most 1, not {dict(fractions)}"
        )
    edges = dict(zip(NAMES, np.cumsum(list(shares.values())), strict=True))
    # Where the shares sum to 1 but for rounding, the last split takes what is left.
    rest = [name for name in NAMES if shares[name] > 0][-1] if sum(shares.values()) > 1 - 1e-9 else ""
    said = said_of(patients, given)
    present = set(said.values())
    carved = collections.defaultdict(list)  # split said -> splits carved out of it, one after the other
    unseen = "val" if "val" in present else "control"
    for whole, part in ((unseen if whole_train else "train", "select"), ("val", "control"), ("control", "val")):
        if part not in present and shares[part]:
            carved[whole].append(part)
    salt = f"facsimile-{seed}"

    def split_of(patient: str) -> str:
        if patient in said:
            left = [*carved[said[patient]], said[patient]]
            while len(left) > 1:
                share = shares[left[0]] / sum(shares[name] for name in left)
                if uniform(patient, f"{salt}-{left[0]}") < share:
                    break
                left.pop(0)
            return left[0]
        return next((name for name in NAMES if uniform(patient, salt) < edges[name]), rest)

    table = {patient: split_of(patient) for patient in dict.fromkeys(patients)}
    if fold is not None:
        if fold not in range(FOLDS):
            raise ValueError(f"data.fold must be 0 to {FOLDS - 1}, not {fold}")
        pool = [patient for patient, split in table.items() if split in ("train", "val")]
        pool.sort(key=lambda patient: (uniform(patient, f"{salt}-fold"), patient))
        table |= dict.fromkeys(pool, "train")
        table |= dict.fromkeys((pool[i] for i in np.array_split(np.arange(len(pool)), FOLDS)[fold]), "val")
    return np.array([table[patient] for patient in patients], dtype="U8")


def first(patients: Sequence[str], count: int, *, seed: int = 0) -> np.ndarray:
    """Indices, ascending, of `count` images: whole patients in the order of their hash, the last one cut."""
    order = sorted(
        range(len(patients)), key=lambda i: (uniform(patients[i], f"facsimile-{seed}-first"), patients[i], i)
    )
    return np.sort(np.array(order[:count], dtype=np.int64))


def said_of(patients: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Patient -> the split given, or '' where that is none, of those who are given one. Raises ValueError as `assign`."""
    said, known = collections.defaultdict(set), {"test": "control", NONE: "", **{name: name for name in NAMES}}
    for patient, split in zip(patients, given, strict=True) if given else ():
        if split and split not in known:
            raise ValueError(
                f"patient {patient}: no split {split!r}; a manifest's are {', '.join(NAMES)}, test, {NONE}"
            )
        if split:
            said[patient].add(known[split])
    for patient, names in said.items():
        if len(names) > 1:
            both = " and ".join(name or NONE for name in sorted(names))
            raise ValueError(f"patient {patient} is in the splits {both}; correct the manifest")
    return {patient: names.pop() for patient, names in said.items()}
