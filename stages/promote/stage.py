"""Judge scored candidates: the gate, the champion, the claim, and the report that people read.

Pure: it reads scores and speed, and writes what it decided with the reasons; tracking applies it to the registry.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from stages.contract import Context, Input, Kind, Outcome, Stage
from stages.models.serving import RULES
from stages.promote.gate import Gate
from stages.promote.method import Method

__all__ = ["Gate", "Method", "Promote"]


class Promote(Stage):
    """The verdict on all candidates of one evaluation."""

    KIND: ClassVar[Kind] = "report"
    REVISION: ClassVar[str] = (
        "2026-11-25 intervals that cover, claims over seeds, no default limits, nothing that is beaten or not served, "
        f"by {RULES}"
    )
    INPUTS: ClassVar[Mapping[str, Input]] = {
        "scores": Input(("scores",)),
        "speed": Input(("speed",), required=False),
    }

    gate: Gate = Gate()
    """Limits that the champion must keep; without one nothing is judged, and nothing promoted."""
    baseline: str | Method | None = None
    """What the contender must beat on held-out text: a candidate, e.g. the student of plain cross-entropy, or a method
    with its candidates of several training seeds."""
    contender: str | Method | None = None
    """What the claim is about, e.g. the distilled student, or that method. The claim is reported and does not decide;
    from three seeds a side it is about the methods, with fewer about these checkpoints only."""
    registered_name: str = Field(min_length=1)
    """Name in the model registry under which a champion is registered."""
    resamples: int = Field(10_000, ge=1000)
    """Random halves of the documents; 10,000 fix the ends of a 95 % interval to some percent of its width."""
    seed: int = 0
    """Seed of the resamples."""

    @model_validator(mode="after")
    def _check_claim(self) -> Self:
        if (self.baseline is None) != (self.contender is None):
            raise ValueError(f"baseline={self.baseline!r} and contender={self.contender!r}; expected both or neither")
        if self.baseline is None or self.contender is None:
            return self
        sides = Method.of(self.baseline), Method.of(self.contender)
        if sides[0].name == sides[1].name or set(sides[0].models) & set(sides[1].models):
            raise ValueError(
                f"baseline and contender are both {sides[0].name!r}, or have a model in common; expected two that "
                "differ"
            )
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
            num_resamples=self.resamples,
            seed=self.seed,
        )
        verdict = decide(
            evidence,
            self.gate,
            registered_name=self.registered_name,
            baseline=None if self.baseline is None else Method.of(self.baseline),
            contender=None if self.contender is None else Method.of(self.contender),
        )
        report = build_report(evidence, verdict)
        report.write(context.out)
        context.out.put("leaderboard.md", write_markdown(report).encode())
        context.out.put("quality-size.png", draw_quality_against_size(report))
        for warning in verdict.warnings:
            context.reporter.note(f"warning: {warning}")
        context.reporter.note(verdict.reasons[0])
        metrics = {"accepted": float(verdict.champion is not None), "candidates": float(len(verdict.checks))}
        for claim in verdict.claims:
            metrics["claim_holds"] = float(claim.holds)
            metrics["claim_difference_nats_per_token"] = claim.difference_nats_per_token
            metrics["claim_minimum_detectable_nats"] = claim.minimum_detectable_nats
        if verdict.champion is not None:
            champion = evidence.models[verdict.champion]
            metrics["champion/perplexity"] = champion.perplexity
            metrics["champion/kl_to_reference"] = champion.kl_to_reference
            metrics["champion/compression_x"] = champion.compression_x
        return Outcome(metrics)
