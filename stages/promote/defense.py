"""Whether a newly accepted model may take the place of the one that reigns in the registry.

On the same text only: the newcomer must be smaller, within the limits that its gate sets anyway, or of equal size and
not worse, or larger and better. Not worse is a claim of non-inferiority: the upper end of the 95 % interval of its
perplexity over the champion's, paired by document, is below `MARGIN`. What cannot be compared changes nothing.

The champion is found among the scores that the newcomer was judged by, where it was scored again beside it, and else in
those that it was judged by itself: scores are a function of model and text, so that on one text both say the same.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from stages.contract import Artifact
from stages.formats.documents import ModelDocuments, read_documents
from stages.formats.scores import CandidateScores, Scores
from stages.ops.statistics import ALPHA, Resamples

__all__ = ["MARGIN", "Defense", "ScoredModel", "defend", "judge_challenge"]

_REMEDY = "score the champion beside the newcomers (compress: --champion {}), or move the alias yourself"
MARGIN = 0.01
"""Of perplexity: the customary margin within which a compressed model counts as not worse."""


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """One model in the scores that it was judged by."""

    name: str
    scores: Scores
    documents: Mapping[str, ModelDocuments]

    @property
    def entry(self) -> CandidateScores:
        """Its own scores."""
        return self.scores.models[self.name]

    @property
    def own_documents(self) -> ModelDocuments:
        """Its sums over documents."""
        return self.documents[self.name]


@dataclass(frozen=True, slots=True)
class Defense:
    """What came of a challenge."""

    stays: bool
    """Whether the champion keeps its place."""
    text: str


def defend(champion: ScoredModel, newcomer: ScoredModel, artifact: str | None = None) -> Defense:
    """Compare a newcomer with the reigning champion, whose checkpoint is `artifact`."""
    old, new = champion.own_documents, newcomer.own_documents
    if not _same_text(champion, newcomer):
        return Defense(
            True,
            f"{newcomer.name} was scored on other text ({newcomer.scores.tokens:,} tokens of the dataset "
            f"{newcomer.scores.dataset_fingerprint[:12]}) than the champion ({champion.scores.tokens:,} of "
            f"{champion.scores.dataset_fingerprint[:12]}), so that it is not shown to be as good; "
            + _REMEDY.format(artifact),
        )
    sizes = f"{newcomer.entry.size_bytes:,} bytes against {champion.entry.size_bytes:,}"
    resamples = Resamples({"old": old.nll, "new": new.nll}, new.tokens)
    increase = resamples.estimate(lambda sums: np.exp((sums["new"] - sums["old"]) / sums["tokens"]) - 1)
    found = increase.interval()
    quality = (
        f"perplexity {math.exp(champion.entry.cross_entropy):.4g} → {math.exp(newcomer.entry.cross_entropy):.4g}, "
        f"{found.estimate:+.2%} (95% interval {found.low:+.2%} to {found.high:+.2%} over {len(old.tokens)} documents)"
    )
    if newcomer.entry.size_bytes < champion.entry.size_bytes:
        return Defense(False, f"{newcomer.name} is smaller ({sizes}) and keeps its limits, at {quality}")
    is_larger = newcomer.entry.size_bytes > champion.entry.size_bytes
    bound = 0.0 if is_larger else MARGIN  # what is larger and only about as good would be a step back
    needed = "better" if is_larger else f"not worse by more than {MARGIN:.0%} of perplexity"
    if found.high < bound and increase.p_above(bound) <= ALPHA:
        return Defense(False, f"{newcomer.name} is {needed}: {quality}; {sizes}")
    return Defense(
        True, f"{newcomer.name} is not smaller than the champion ({sizes}), nor shown to be {needed}: {quality}"
    )


def _same_text(champion: ScoredModel, newcomer: ScoredModel) -> bool:
    one, other = champion.scores, newcomer.scores
    if (one.dataset_fingerprint, one.split) != (other.dataset_fingerprint, other.split):
        return False
    pairs = [(getattr(each.own_documents, key) for each in (champion, newcomer)) for key in ("document_id", "tokens")]
    return all(np.array_equal(*pair) for pair in pairs)


def judge_challenge(
    champion: Mapping[str, str], newcomer: Mapping[str, str], find_scores: Callable[[str], Artifact | None]
) -> Defense:
    """Say whether the champion stays, given what the registry keeps of it and of a newcomer.

    Args:
        champion: `artifact`, `fingerprint`, `candidate` and `scores` of the version that reigns, as far as known.
        newcomer: the same of the one that a verdict accepted.
        find_scores: fingerprint → scores, or None where they are gone.
    """
    name, artifact = newcomer.get("candidate", "the newcomer"), champion.get("artifact")
    if newcomer.get("artifact") == artifact:
        return Defense(True, f"{name} is the champion itself, scored again")
    try:
        theirs = _read(newcomer, find_scores)
        same = (champion.get("fingerprint"), champion.get("candidate"))
        again = [
            other
            for other, entry in theirs.scores.models.items()
            if entry.uri_prefix == artifact or (entry.fingerprint, other) == same
        ]
        ours = replace(theirs, name=again[0]) if again else _read(champion, find_scores)
        return defend(ours, theirs, artifact)
    except Exception as error:  # noqa: BLE001  whatever is the matter with a record must not move the alias
        text = f"{name} cannot be compared with the champion, as a record cannot be read ({error}); "
        return Defense(True, text + _REMEDY.format(artifact))


def _read(record: Mapping[str, str], find_scores: Callable[[str], Artifact | None]) -> ScoredModel:
    scores = find_scores(record["scores"])
    if scores is None:
        raise LookupError(f"the store has no scores {record['scores'][:12]}")
    return ScoredModel(record["candidate"], Scores.read(scores), read_documents(scores))
