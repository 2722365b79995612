"""Judge the claim that one model, or one method, predicts held-out text better than another.

One model a side says something of these checkpoints only: with other seeds of the same two methods gains of +0.13,
-0.03, +0.06, +0.09 and +0.23 nats per token were seen, and one of them lay in the interval that the first had over
documents. From three seeds a side the claim is about the methods, and its interval holds over seeds and documents.
"""

import numpy as np

from stages.errors import StageFailed, nearest
from stages.formats.report import QualityClaim
from stages.ops.statistics import ALPHA, MIN_SEEDS
from stages.promote.evidence import Evidence
from stages.promote.method import Method

__all__ = ["judge_claim"]


def judge_claim(evidence: Evidence, *, baseline: Method, contender: Method) -> QualityClaim:
    """Judge whether the contender beats the baseline, beyond noise.

    Returns:
        the difference of cross-entropies (baseline - contender, nats per token), its 95 % interval, and whether that
        lies above zero.

    Raises:
        StageFailed: a model was not scored.
    """
    for field, side in (("baseline", baseline), ("contender", contender)):
        for name in side.models:
            if name not in evidence.models:
                raise StageFailed(
                    f"{field}={name!r} is no model that was scored{nearest(name, list(evidence.models))}; set it to one"
                )
    estimate = evidence.gain(baseline.models, contender.models)
    found = estimate.interval()
    of_method = min(len(baseline.models), len(contender.models)) >= MIN_SEEDS
    holds = found.low > 0 and estimate.p_below(0) <= ALPHA
    smallest = estimate.minimum_detectable()
    perplexities = {side.name: _perplexity(evidence, side) for side in (baseline, contender)}
    outcome = "beats" if holds else "is worse than" if found.high < 0 else "does not beat, beyond noise,"
    text = (
        f"{_subject(contender, of_method)} {outcome} {baseline.name} on held-out text: perplexity "
        f"{perplexities[baseline.name]:.4g} → {perplexities[contender.name]:.4g}, a gain of {found.estimate:+.4f} nats "
        f"per token (95% interval {found.low:+.4f} to {found.high:+.4f} over {_units(evidence, baseline, contender)}; "
        f"a true gain of {smallest:.4f} would be shown in 80% of cases)"
    )
    if not of_method:
        text += f". It says nothing of the method: that takes {MIN_SEEDS} training seeds a side"
    return QualityClaim(
        claim=f"{contender.name} beats {baseline.name} on held-out text",
        about="method" if of_method else "checkpoint",
        models={contender.name: contender.models, baseline.name: baseline.models},
        difference_nats_per_token=found.estimate,
        interval=(found.low, found.high),
        minimum_detectable_nats=smallest,
        perplexities=perplexities,
        holds=holds,
        text=text,
    )


def _subject(side: Method, of_method: bool) -> str:
    if of_method:
        return f"the method {side.name}"
    return f"this checkpoint, {side.name}," if len(side.models) == 1 else f"these checkpoints of {side.name}"


def _units(evidence: Evidence, baseline: Method, contender: Method) -> str:
    resamples = evidence.resamples
    documents = f"{resamples.num_documents} documents, worth {resamples.effective:.1f} of equal length"
    seeds = (len(contender.models), len(baseline.models))
    if min(seeds) < MIN_SEEDS:
        return documents
    return f"{seeds[0]} training seeds {'a side' if len(set(seeds)) == 1 else f'against {seeds[1]}'} and {documents}"


def _perplexity(evidence: Evidence, side: Method) -> float:
    return float(np.exp(np.mean([np.log(evidence.perplexity(name)) for name in side.models])))
