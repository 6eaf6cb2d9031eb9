"""Public rows that cost little thought: noise, and mixtures of real rows. Baselines for `generate_public` and for real rows.

All three have one form, ``(source, rows, seed=...) -> Raw`` in the schema of the sites' own rows, unlabelled:

| function | source | what leaves a site |
|---|---|---|
| `generate_public` | merged statistics | sums per class, small cells suppressed |
| `noise_public` | merged statistics | the same message; of it only mean, deviation and words over all classes are used |
| `mixup_public` | a site's own rows | mixtures of pairs of real rows |
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from polyfed.core import seed as streams
from polyfed.core.errors import DataError
from polyfed.core.message import Message
from polyfed.core.tree import Array
from polyfed.data.sources import TargetOf, rows_for
from polyfed.data.synthetic import CUT, as_flagged, as_sites_have_it, check_merged, words_of
from polyfed.data.table import Raw, is_frame, values_of

Law = Literal["gaussian", "uniform"]
Mixed = tuple[Array, Array, Array]


def noise_public(merged: Message, rows: int, *, law: Law = "gaussian", seed: int = 0) -> Raw:
    """Unlabelled rows of noise: each column by itself, without regard to classes; a pure function of its arguments.

    What teachers say of such rows tells little: they lie away from real ones, whose columns go together. Use it to see how
    much better rows are worth.

    Args:
        merged: what `polyfed.data.merge_statistics` returned.
        rows: how many.
        law: of numbers: "gaussian" has the mean m and deviation s of all sites' values, cut at 2.5 deviations; "uniform"
            lies in m ± √3·s, which has the same deviation. Minimum and maximum are not known, as no site sends them.
            Text and true/false values are drawn uniformly from the words that were not suppressed.
        seed: of these rows.

    Returns:
        rows without gaps, but for a column that was suppressed everywhere: all gaps. Where the sites' own numbers are never
        negative, or always whole, so are these.

    Raises:
        DataError: an unknown law, or statistics in which everything was suppressed.
    """
    if law not in ("gaussian", "uniform"):
        raise DataError(f"noise_public(law={law!r}) is unknown; use 'gaussian' or 'uniform'")
    check_merged("noise_public", merged)
    if not merged.trees["total"]["rows"].sum():
        raise DataError("every class has fewer rows than min_count at every site; no public rows can be drawn")
    rng = streams.rng(seed, "public", "noise")
    kinds = merged.text["kinds"]
    return as_sites_have_it(merged, [_noise(merged, str(i), kind, law, rows, rng) for i, kind in enumerate(kinds)])


def _noise(merged: Message, entry: str, kind: str, law: Law, rows: int, rng: np.random.Generator) -> Array:
    if kind == "number":
        z = rng.standard_normal(rows).clip(-CUT, CUT) if law == "gaussian" else np.sqrt(3) * rng.uniform(-1, 1, rows)
        if not (n := merged.trees["present"][entry].sum()):
            return np.full(rows, np.nan)
        total, squares = merged.trees["sums"][entry].sum(axis=1)
        sd = np.sqrt(max(squares / n - (total / n) ** 2, 0.0))
        return as_flagged(merged, entry, total / n + sd * z)
    drawn = rng.random(rows)
    words = words_of(merged, entry, kind) if entry in merged.trees["categories"] else np.zeros(0, object)
    return words[(drawn * len(words)).astype(np.int64)] if len(words) else np.full(rows, np.nan)


def mixup_public(data: Any, rows: int, *, target: TargetOf = None, alpha: float = 1.0, seed: int = 0) -> Raw:
    """Unlabelled mixtures λ·a + (1 - λ)·b of pairs of different rows, λ from Beta(α, α) (Zhang et al. 2018, eq. 1).

    Privacy: real rows leave the site, two at a time. A mixture shows much of both, with λ near 1 nearly all of one; who knows
    one row of a pair can compute the other, and mixtures of images have been taken apart (Carlini et al. 2021). Nothing in
    polyfed makes such rows by itself: call this only for rows that may leave, and give it training rows only.

    Args:
        data: a site's rows, a `Raw`, one array or any form of ``data=`` of a client; labels are not used.
        target: as a client's: the columns that are labels, and so are left out.
        rows: how many.
        alpha: 1 draws λ uniformly; larger values mix more evenly, smaller ones leave more rows nearly as they are.
        seed: of these rows.

    Returns:
        floats are mixed and keep their dtype; bytes (pixels) are mixed and rounded; numbers of a DataFrame become floats.
        What cannot be mixed (text, true/false, dates, whole numbers of an array, which are tokens) is the heavier row's,
        and so is a gap; a gap of the lighter row alone counts as the heavier row's value.

    Raises:
        DataError: fewer than two rows, or α is not positive.

    >>> mixup_public(np.eye(3), 10).x.shape  # then FedMD(public=...)
    (10, 3)
    """
    raw = rows_for("mixup_public", data, target=target)
    if len(raw) < 2:
        raise DataError(f"mixup_public needs at least 2 rows to mix, got {len(raw)}")
    if not alpha > 0:
        raise DataError(f"mixup_public(alpha={alpha}): α is above 0; 1 draws the shares uniformly")
    rng = streams.rng(seed, "public", "mixup")
    heavy = rng.integers(0, len(raw), rows)
    light = (heavy + rng.integers(1, len(raw), rows)) % len(raw)
    share = rng.beta(alpha, alpha, rows)
    how = (heavy, light, np.maximum(share, 1 - share))
    return Raw({name: _mixed(value, how) for name, value in raw.inputs.items()})


def _mixed(value: Any, how: Mixed) -> Any:
    if not is_frame(value):
        return _mixed_array(value, how) if value.dtype.kind == "f" or value.dtype == np.uint8 else value[how[0]]
    made = value.iloc[how[0]].reset_index(drop=True)
    for j, column in enumerate(value.columns):
        values = values_of(value.iloc[:, j])
        if values.dtype.kind in "iuf":
            made[column] = _mixed_array(values.astype(np.float64), how)
    return made


def _mixed_array(values: Array, how: Mixed) -> Array:
    heavy, light = (values[index].astype(np.float64) for index in how[:2])
    share = how[2].reshape(-1, *[1] * (values.ndim - 1))
    mixed = share * heavy + (1 - share) * np.where(np.isnan(light), heavy, light)
    return np.asarray(np.round(mixed) if values.dtype == np.uint8 else mixed).astype(values.dtype)
