"""Defends the registry's champion where a verdict is applied; `stages.promote.defense` says whether it stays.

Nothing of this enters a step's identity: a verdict depends on its scores alone, and is a HIT whoever reigns.
"""

import logging
from typing import Any

from stages.contract import Artifact
from workflows.engine.store import ArtifactStore

__all__ = ["champion_stays"]

logger = logging.getLogger(__name__)


def champion_stays(store_uri: str, client: Any, name: str, champion: str, newcomer: str) -> bool:
    """Return whether a registered model's champion keeps its place before a newcomer, whose version says why.

    Args:
        store_uri: the store, which has the scores that versions were judged by.
        client: MLflow's.
        name: the registered model.
        champion: the version that reigns.
        newcomer: the version that a verdict accepted.
    """
    from stages.promote.defense import judge_challenge

    def scores(fingerprint: str) -> Artifact | None:
        commit = ArtifactStore(store_uri).newest(fingerprint)
        return None if commit is None else commit.artifact

    reigning, tags = (dict(client.get_model_version(name, version).tags) for version in (champion, newcomer))
    defense = judge_challenge(reigning, tags, scores)
    client.set_model_version_tag(name, newcomer, "challenge", defense.text)
    if defense.stays:
        text = "version %s of %s does not become champion, version %s stays: %s"
        logger.warning(text, newcomer, name, champion, defense.text)
    return defense.stays
