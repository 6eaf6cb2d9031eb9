"""What a report tells besides the gains: what travelled, who was left out, how everybody was set up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyfed.core.history import RoundLog
from polyfed.core.manifest import manifest_of
from polyfed.core.tree import Spec
from polyfed.run.report_comparison import SHORT, model_name
from polyfed.run.result import Result

MOST = 50
WORDS = {
    "soft": ("their mean over the sites", "predictions for the shared rows"),
    "params": ("shared model parameters", "changes of model parameters (trained minus start)"),
    "stats": ("statistics of normalisation layers", "statistics of normalisation layers"),
}


#: Trees that `polyfed.core.aggregate` adds where a site trains some of its entries only, such as "params#".
COUNTS = ("", "counts of the entries it trained")


@dataclass(frozen=True)
class Parcel:
    """One named tree that travels, as the algorithm declares it; `sites` is empty where it is the same for all."""

    way: str
    tree: str
    what: str
    size: str
    num_bytes: str
    sites: str


@dataclass(frozen=True)
class Shared:
    """What the messages of a run held."""

    rows: str
    unlisted: bool
    from_sites: Sequence[tuple[str, int]]
    columns: str
    parcels: Sequence[Parcel]
    model: str
    numbers: str
    kept: str
    traffic: str


def shared(result: Result) -> Shared:
    """Which rows, trees and numbers left the sites, and what did not."""
    population = result.population
    aside = [(name, len(parts.public)) for name, parts in population.parts.items() if len(parts.public)]
    parcels = _parcels(result)
    return Shared(
        rows=_rows_told(result, sum(count for _, count in aside)),
        unlisted=population.public is not None and not aside,
        from_sites=aside if len(aside) <= MOST else [],
        columns=_columns(result),
        parcels=parcels,
        model=_model_told(parcels),
        numbers=_numbers_told(result),
        kept=_kept(result, bool(aside)),
        traffic=_traffic(result),
    )


def _rows_told(result: Result, aside: int) -> str:
    public = result.population.public
    if public is None:
        return "No row of any site left it: neither inputs nor targets. There were no shared rows."
    if aside:
        return (
            f"{aside} real rows of the sites were shared: each site set some of its training rows aside, and their "
            "inputs went to every other site as they are, before preprocessing. Their targets did not travel."
        )
    return (
        f"No row of any site's own data left it. All sites looked at the same {len(public)} rows that came with the "
        "run; none of them was set aside from a site's data."
    )


def _columns(result: Result) -> str:
    public = result.population.public
    if public is None:
        return ""
    names: list[str] = []
    for name, value in public.inputs.items():
        names += [str(column) for column in getattr(value, "columns", [name])]
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def _parcels(result: Result) -> list[Parcel]:
    """The trees of a last round's messages, once for sites whose trees are equal."""
    found: dict[tuple[str, str, str, str, str], list[str]] = {}
    sites = result.population.sites
    for name in sites:
        env = result.federation.env(result.version, len(sites), name)
        sent = result.algorithm.broadcast(result.state, name, env)
        down = {tree: array.spec for tree, array in sent.trees.items()}
        for way, trees in (("server → site", down), ("site → server", dict(result.algorithm.expects(sent, env)))):
            for tree, spec in trees.items():
                what = WORDS.get(tree, COUNTS if tree.endswith("#") else ("", ""))[way == "site → server"]
                found.setdefault((way, tree, what, _size(spec), num_bytes(spec.num_bytes)), []).append(name)
    order = sorted(found.items(), key=lambda item: item[0][0] == "server → site")
    return [Parcel(*key, sites="" if len(names) == len(sites) else some(names)) for key, names in order][:MOST]


def _size(spec: Spec) -> str:
    entries = list(spec.values())
    if len(entries) == 1:
        shape = " × ".join(str(n) for n in entries[0].shape) or "1"
        return f"{shape} numbers ({entries[0].dtype})"
    return f"{len(entries)} arrays"


def _model_told(parcels: Sequence[Parcel]) -> str:
    up = {parcel.tree for parcel in parcels if parcel.way == "site → server"}
    if not up:
        return "No array left a site: no model parameter and no prediction."
    if "params" in up:
        return "Model parameters left the sites, as listed."
    return "No model parameter left a site; what the list names did."


def _numbers_told(result: Result) -> str:
    names = {name for log in result.history for values in log.metrics.values() for name in values}
    words = [SHORT.get(name, name.replace("_", " ")) for name in sorted(names)]
    said = "Besides, each site told how many training rows it has and, where its model has one, its mean training loss"
    if words:
        said += (
            f"; after each evaluation the size of its validation part and what it reached there ({', '.join(words)})"
        )
    return f"{said}; and at the end the same for its test rows."


def _kept(result: Result, has_aside: bool) -> str:
    rows = "the remaining training rows, all validation and test rows" if has_aside else "all rows"
    said = f"{rows[0].upper()}{rows[1:]} with their targets, and the fitted preprocessing"
    own = any("own" in memory.trees for memory in result.memories.values())
    return f"{said}{'; the trained model, or the part of it that is the site’s own' if own else ''}."


def _traffic(result: Result) -> str:
    asked = sum(len(log.cohort) for log in result.history)
    if not asked:
        return "No round was finished, so no message counts."
    up, down = result.bytes_up, result.bytes_down
    handed = "" if result.population.public is None else "; handing out the shared rows is not counted"
    return (
        f"All rounds together: {num_bytes(up)} up (site to server), {num_bytes(down)} down. For one site and round on "
        f"average {num_bytes(up / asked)} up and {num_bytes(down / asked)} down, framing and evaluation included{handed}."
    )


@dataclass(frozen=True)
class Absence:
    """Why a site's updates did not count, and in which rounds."""

    client: str
    rounds: str
    reason: str


def absences(result: Result) -> list[Absence]:
    found: dict[tuple[str, str], list[int]] = {}
    for log in result.history:
        for client, reason in log.left_out.items():
            found.setdefault((client, reason), []).append(log.round_num)
    return [Absence(client, spans(numbers), reason) for (client, reason), numbers in found.items()]


def never_asked(result: Result) -> list[str]:
    """Who was there and was never drawn; who came late or was away is told of by `Result.presence`."""
    asked = {name for log in result.history for name in log.cohort}
    never = [name for name in result.population.sites if name not in asked and name not in result.presence]
    return never if result.history else []


@dataclass(frozen=True)
class Setup:
    """Sites that are set up alike."""

    clients: str
    model: str
    settings: Sequence[tuple[str, str]]
    preprocess: str


def setups(result: Result) -> tuple[list[Setup], list[tuple[str, str]]]:
    """How each site trains, sites of equal settings on one line, and the preprocessings by letter."""
    letters: dict[str, str] = {}
    groups: dict[tuple[str, tuple[tuple[str, str], ...], str], list[str]] = {}
    for name, site in result.population.sites.items():
        text = result.population.prepared[name].preprocess
        letter = letters.setdefault(text, _letter(len(letters)))
        settings = tuple((str(key), _plain(value)) for key, value in site.model.settings.items())
        groups.setdefault((" ".join(model_name(result, name)).strip(), settings, letter), []).append(name)
    made = [Setup(some(names), *key) for key, names in groups.items()]
    return made[:MOST], [(letter, text) for text, letter in letters.items()][:MOST]


def _letter(number: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    turn, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(turn) if turn else "")


def run_settings(result: Result) -> list[tuple[str, str]]:
    """The algorithm's parameters and the run's rules, as name and value."""
    rules = result.federation.rules
    params = manifest_of(result.algorithm)["params"]
    told = [("algorithm", result.algorithm.name), *((f"  {name}", _plain(value)) for name, value in params.items())]
    told += [
        ("rounds finished", str(len(result.history))),
        ("ended because", result.reason),
        ("not reached", result.unmet or "nothing"),
        ("stopping rule", repr(result.federation.stop)),
    ]
    if result.version != len(result.history):
        told.append(("state kept", f"of version {result.version}, not of the last round"))
    told.append(("schedule", repr(rules.schedule)))
    every = f"every {rules.evaluate_every} rounds" if rules.evaluate_every > 1 else "every round"
    told += [
        ("evaluation", every if rules.evaluate_every else "never"),
        ("seed", str(result.seed)),
        (
            "time",
            f"{result.seconds:.1f} s for the rounds; {sum(x.cpu_seconds for x in result.history):.1f} s processor time",
        ),
    ]
    return told


def round_rows(history: Sequence[RoundLog]) -> tuple[list[dict[str, Any]], int]:
    """One row a round for people; of many rounds the first and the last, and how many are left away."""
    kept = history if len(history) <= MOST else [*history[:10], *history[-30:]]
    made = [
        {
            "round": log.round_num,
            "seconds": f"{log.seconds:.2f}",
            "asked": len(log.cohort),
            "accepted": len(log.accepted),
            "up": num_bytes(log.bytes_up),
            "down": num_bytes(log.bytes_down),
            "loss": _mean(log.loss.values()),
        }
        for log in kept
    ]
    return made, len(history) - len(kept)


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{sum(known) / len(known):.4f}" if known else "–"


def spans(numbers: Sequence[int]) -> str:
    """Rounds in words.

    >>> spans([1, 2, 3, 5, 7, 8])
    '1–3, 5, 7–8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def num_bytes(count: float) -> str:
    """A size for people.

    >>> num_bytes(532), num_bytes(20_160), num_bytes(3_400_000)
    ('532 bytes', '20.2 kB', '3.4 MB')
    """
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95 or unit == "GB":
            break
    return f"{count:.1f} {unit}"


def some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "–"
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
