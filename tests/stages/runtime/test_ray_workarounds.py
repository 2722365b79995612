"""When a workaround for Ray can go: these fail where its reason, or what it leans on, may have gone."""

from pathlib import Path

import pytest
import ray

from stages.runtime.ray_workarounds import RAY_VERSION, deprecated_options, trainer_class


def test_ray_is_of_the_version_that_the_workarounds_were_seen_in() -> None:
    assert ray.__version__.startswith(f"{RAY_VERSION}."), (
        f"Ray is {ray.__version__}, and stages/runtime/ray_workarounds.py was written for {RAY_VERSION}: look at the "
        "reason of each workaround, delete those that have none left, and set RAY_VERSION"
    )


@pytest.mark.ray
def test_trainer_leaves_out_just_the_unwanted_callbacks(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def callbacks(kind: type) -> list[str]:
        run = RunConfig(storage_path=str(tmp_path), name="run")
        trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1), run_config=run)
        return [type(callback).__name__ for callback in trainer._create_default_callbacks()]

    unwanted = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    default = callbacks(TorchTrainer)
    assert unwanted < set(default), "Ray starts them no longer: trainer_class can go"
    assert callbacks(trainer_class()) == [name for name in default if name not in unwanted]


@pytest.mark.ray
def test_ray_data_still_deprecates_being_told_not_to_retry(local_ray: None) -> None:
    from ray.util.annotations import RayDeprecationWarning

    data = ray.data.from_items([{"item": 1}])
    with pytest.warns(RayDeprecationWarning):  # else deprecated_options can go
        data.map(lambda row: row, max_retries=0)
    with deprecated_options():
        data.map(lambda row: row, max_retries=0)
