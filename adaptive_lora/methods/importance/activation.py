"""The activation spectrum: the variance of a site's inputs by principal component (EVA)."""

from __future__ import annotations

import math

import torch

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.methods.importance.capture import Measures, SiteRows, measure_sites
from adaptive_lora.methods.importance.contract import Measurement, ProfileTask, SiteMeasure
from adaptive_lora.methods.importance.passes import halved
from adaptive_lora.methods.importance.spectra import SPECTRUM_LIMIT, spectrum, squared_singular_values


def activation_spectrum(task: ProfileTask) -> Measurement:
    """Measure the share of the inputs' variance explained by each principal component.

    Spectrum: EVA's normalised explained variance (Paischer et al. 2024, 2410.07170;
    computed as PEFT does, about the mean). EVA sorts these over all sites. Score: the effective
    rank of the spectrum, the exponential of its entropy (Roy and Vetterli 2007); EVA has none.
    Departures: padding does not count; all calibration batches are used, whereas EVA runs until its
    directions converge; and the decomposition is exact up to 256 components per pass.

    Sites with the same input (query, key and value; gate and up) get equal values: the metric does
    not depend on a site's output or on the loss.
    """
    several = len(halved(task.batches, task.limits.forward_tokens, divide=True)) > 1
    return measure_sites(
        task,
        lambda site: _Halves(site, condense=several),
        floats=lambda site: 2 * SPECTRUM_LIMIT * site.in_features,
        backward=False,
    )


class Scatter:
    """Scatter of rows about their mean, stored as a few rows with nearly the same Gram matrix.

    Rows can be added pass by pass (blocks of different mean are merged as in Ross et al. 2008).
    PEFT's IncrementalPCA computes the same by decomposing the rows themselves; the Gram matrix of the
    smaller side takes a tenth of the time.
    """

    def __init__(self, limit: int = SPECTRUM_LIMIT) -> None:
        """Start empty; `condense` keeps at most `limit` rows."""
        self.limit, self.count, self.total = limit, 0, 0.0
        self.kept = self.mean = torch.zeros(0)

    def add(self, rows: torch.Tensor) -> None:
        """Add rows of shape (N, n)."""
        if len(rows) == 0:
            return
        other = Scatter(self.limit)
        other.count, other.mean = len(rows), rows.mean(dim=0)
        other.kept = rows - other.mean
        other.total = float(other.kept.square().sum(dtype=torch.float64))
        self.merge(other)

    def condense(self) -> None:
        """Reduce to at most `limit` rows."""
        self.kept = _condensed(self.kept, self.limit)

    def merge(self, other: Scatter) -> None:
        """Add the rows of another scatter without reducing them."""
        if self.count == 0 or other.count == 0:
            source = other if self.count == 0 else self
            self.kept, self.mean = source.kept, source.mean
        else:
            count = self.count + other.count
            shift = math.sqrt(self.count / count * other.count) * (self.mean - other.mean)
            self.kept = torch.cat([self.kept, other.kept, shift[None]])
            self.total += float(shift.square().sum(dtype=torch.float64))
            self.mean = self.mean + (other.mean - self.mean) * (other.count / count)
        self.count += other.count
        self.total += other.total

    def shares(self) -> torch.Tensor:
        """Return each component's share of the variance, not increasing; zeros if there is no variance."""
        if self.total == 0:
            return torch.zeros(1)
        most = min(self.limit, self.count - 1)
        return squared_singular_values(self.kept)[:most] / self.total


def _condensed(rows: torch.Tensor, limit: int) -> torch.Tensor:
    """Return at most `limit` rows with the same leading components of the Gram matrix rowsᵀ rows."""
    if len(rows) <= min(limit, rows.shape[1]):
        return rows
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        scaled: torch.Tensor = vectors.T * values.clamp(min=0).sqrt()[:, None]
        return scaled.flip(0)[:limit]
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    rotated: torch.Tensor = vectors.T @ rows
    return rotated.flip(0)[:limit]


class _Halves:
    """Statistic: scatter of the inputs of each half of the data."""

    def __init__(self, site: AdapterSite, *, condense: bool) -> None:
        """Start empty; `condense` is needed where several passes follow."""
        self.halves, self.most, self.condense = (Scatter(), Scatter()), site.max_rank, condense

    def add(self, rows: SiteRows) -> None:
        for scatter, chosen in zip(self.halves, rows.halves, strict=True):
            scatter.add(rows.inputs[chosen][rows.mask[chosen]])
            if self.condense and scatter.count:
                scatter.condense()

    def finish(self) -> Measures:
        whole = Scatter()
        for half in self.halves:
            whole.merge(half)
        return [self._measure(scatter) for scatter in (whole, *self.halves)]

    def _measure(self, scatter: Scatter) -> SiteMeasure:
        shares = scatter.shares()
        return SiteMeasure(score=effective_rank(shares, scatter), spectrum=spectrum(shares[: self.most]))


def effective_rank(shares: torch.Tensor, scatter: Scatter) -> float:
    """Return exp(entropy) of shares; the variance cut off counts as spread evenly over the other dimensions.

    The result is 0 if there is no variance.
    """
    found = shares[shares > 0]
    if len(found) == 0:
        return 0.0
    entropy = -float((found * found.log()).sum())
    rest = 1 - float(found.sum())
    left = min(len(scatter.mean), scatter.count - 1) - len(found)
    if left > 0 and rest > 1e-6:
        entropy -= rest * math.log(rest / left)
    return math.exp(entropy)
