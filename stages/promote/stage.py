"""Judge scored candidates: the gate, the champion, the claim, and the report that people read.

Pure: it reads scores and speed, and writes what it decided with the reasons; tracking applies it to the registry.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from stages.contract import Context, Input, Kind, Outcome, Stage
from stages.promote.gate import Gate

__all__ = ["Gate", "Promote"]


class Promote(Stage):
    """The verdict on all candidates of one evaluation."""

    KIND: ClassVar[Kind] = "report"
    REVISION: ClassVar[str] = "2026-11-25 who serves a candidate"
    INPUTS: ClassVar[Mapping[str, Input]] = {
        "scores": Input(("scores",)),
        "speed": Input(("speed",), required=False),
    }

    gate: Gate = Gate()
    """Limits that the champion must keep."""
    baseline: str | None = None
    """Candidate that the contender must beat on held-out text, e.g. the student of plain cross-entropy."""
    contender: str | None = None
    """Candidate of the claim, e.g. the distilled student. The claim is reported and does not decide."""
    registered_name: str = Field(min_length=1)
    """Name in the model registry under which a champion is registered."""
    bootstrap_resamples: int = Field(10_000, ge=100)
    """Resamples of the documents; 10,000 is usual for 95 % BCa intervals."""
    seed: int = 0
    """Seed of the resamples."""

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        if (self.baseline is None) != (self.contender is None):
            raise ValueError(f"baseline={self.baseline!r} and contender={self.contender!r}; expected both or neither")
        if self.baseline is not None and self.baseline == self.contender:
            raise ValueError(f"baseline and contender are both {self.baseline!r}; expected two models")
        return self

    def run(self, context: Context) -> Outcome:
        """Decide, and write the report.

        Raises:
            StageFailed: the scores do not fit together, or lack a model of the claim.
        """
        from stages.formats.documents import read_documents
        from stages.formats.scores import Scores
        from stages.formats.speed import Speed
        from stages.promote.evidence import read_evidence
        from stages.promote.figure import draw_quality_against_size
        from stages.promote.leaderboard import write_markdown
        from stages.promote.report import build_report
        from stages.promote.verdict import decide

        scores, speed = context.one("scores"), context.optional("speed")
        evidence = read_evidence(
            Scores.read(scores),
            read_documents(scores),
            None if speed is None else Speed.read(speed),
            num_resamples=self.bootstrap_resamples,
            seed=self.seed,
        )
        verdict = decide(
            evidence,
            self.gate,
            registered_name=self.registered_name,
            baseline=self.baseline,
            contender=self.contender,
        )
        report = build_report(evidence, verdict)
        report.write(context.out)
        context.out.put("leaderboard.md", write_markdown(report).encode())
        context.out.put("quality-size.png", draw_quality_against_size(report))
        context.reporter.note(verdict.reasons[0])
        metrics = {"accepted": float(verdict.champion is not None), "candidates": float(len(verdict.checks))}
        for claim in verdict.claims:
            metrics["claim_holds"] = float(claim.holds)
            metrics["claim_difference_nats_per_token"] = claim.difference_nats_per_token
        if verdict.champion is not None:
            champion = evidence.models[verdict.champion]
            metrics["champion/perplexity"] = champion.perplexity
            metrics["champion/kl_to_reference"] = champion.kl_to_reference
            metrics["champion/compression_x"] = champion.compression_x
        return Outcome(metrics)
