"""Which trials become finalists and which finalist is chosen: pure, over (KL, bytes) points.

Promises: no point on the front is beaten in both numbers by any trial; the chosen one is the smallest whose measured
KL is within the limit; equal inputs give equal answers in any order.

The rule. The front is sorted by size. The *favorite* is its smallest point with `kl <= max_kl`, or the point with the
lowest KL where none is within the limit. Finalists are the favorite, then the *faithful* one, the smallest with a tenth
of that KL (8-bit formats, as a rule, which are what is left where a verdict is stricter than `max_kl`), then the
favorite's neighbors on the front outwards, the larger (safer) one before the smaller (bolder) one: a reader sees what a
little more or less size would have given, and where the favorite does not survive its reload, a safer one stands ready.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FAITHFUL = 10
"""Part of `max_kl` that the faithful finalist may have."""


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """One measured scheme."""

    name: str
    kl: float
    """Nats per token to the unquantized model."""
    size_bytes: int
    """Weights on disk."""


def pareto_front(points: Iterable[TrialPoint]) -> tuple[TrialPoint, ...]:
    """Return the points that no other beats, smallest first; of points equal in both numbers, the first by name."""
    front: list[TrialPoint] = []
    for point in sorted(points, key=lambda p: (p.size_bytes, p.kl, p.name)):
        if math.isfinite(point.kl) and (not front or point.kl < front[-1].kl):
            front.append(point)
    return tuple(front)


def preference(front: tuple[TrialPoint, ...], max_kl: float) -> tuple[TrialPoint, ...]:
    """Return the front in the order in which its points become finalists (see the module's rule)."""
    if not front:
        return ()
    favorite = next((i for i, point in enumerate(front) if point.kl <= max_kl), len(front) - 1)
    faithful = next((i for i, point in enumerate(front) if point.kl <= max_kl / FAITHFUL), len(front) - 1)
    order = [favorite, faithful]
    for distance in range(1, len(front)):
        order += [i for i in (favorite + distance, favorite - distance) if 0 <= i < len(front)]
    return tuple(front[i] for i in dict.fromkeys(order))


def choose(points: Iterable[TrialPoint], max_kl: float) -> TrialPoint | None:
    """Return the smallest point whose KL is within the limit, or None."""
    within = [point for point in points if point.kl <= max_kl]
    return min(within, key=lambda p: (p.size_bytes, p.kl, p.name), default=None)


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of the points that were measured again from their files."""

    accepted: dict[str, float] = field(default_factory=dict)
    """KL after the reload, by name, in order of preference."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Why it does not count, by name."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why the runtime that the search is for does not serve it, by name: such points are not measured again."""


def rounding(kl: float, noise: float) -> float:
    """Return by how much rounding alone may change a KL, in nats per token.

    Near 0 a KL is half a squared distance, so that its square root obeys the triangle inequality: two models that are
    `noise` apart from themselves measure `(√kl ± √noise)²`. In bfloat16 noise is 1e-4 to 1e-3, in float32 1e-10.
    """
    return noise + 2 * math.sqrt(max(kl, 0.0) * noise)


def verify(
    order: Sequence[TrialPoint],
    *,
    wanted: int,
    tolerance: float,
    noise: float,
    reload: Callable[[Sequence[str]], Mapping[str, float | str]],
) -> Verification:
    """Measure points again in order of preference until enough of them hold.

    Args:
        order: from `preference`.
        wanted: how many are to be accepted.
        tolerance: largest difference of the two KLs, in nats per token, beyond what rounding makes.
        noise: KL of the unquantized model to itself in batches of another size, in nats per token.
        reload: measures points from their files; gives a KL, or why there is none.
    """
    verdict, rest = Verification(), list(order)
    while rest and len(verdict.accepted) < wanted:
        num = wanted - len(verdict.accepted)
        batch, rest = rest[:num], rest[num:]
        found = reload([point.name for point in batch])
        for point in batch:
            again = found[point.name]
            if isinstance(again, str):
                verdict.rejected[point.name] = again
            elif not abs(again - point.kl) <= (allowed := tolerance + rounding(point.kl, noise)):  # not a number, too
                verdict.rejected[point.name] = (
                    f"its KL was {point.kl:.6f} nats/token in its trial and is {again:.6f} after the reload; "
                    f"expected a difference of {allowed:.2g} at most"
                )
            else:
                verdict.accepted[point.name] = again
    return verdict
