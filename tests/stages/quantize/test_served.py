"""Schemes that the runtime of a search refuses are no finalists."""

import json
from dataclasses import replace

from stages.contract import Context
from stages.quantize.records import Receipt, assemble_search, failed_receipt, points_of
from stages.quantize.schemes import Scheme
from stages.quantize.selection import Verification, pareto_front
from stages.quantize.served import find_refused
from stages.storage import Folder
from tests.fakes import fake_context
from tests.stages.quantize.test_records import INT3, INT4, INT8, done


def write_checkpoint(folder, num_bits: int) -> None:
    weights = {"num_bits": num_bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def receipts(tmp_path) -> dict[str, Receipt]:
    found = {}
    for scheme, bits, kl in ((INT8, 8, 0.01), (INT4, 4, 0.1), (INT3, 3, 0.2)):
        write_checkpoint(tmp_path / scheme.name, bits)
        found[scheme.name] = Receipt(trial=done(scheme, kl, 10 * bits), folder=scheme.name)
    wide = Scheme(weight_bits=4, group_size=48)
    return found | {wide.name: failed_receipt(wide, "no fit", 0.0)}


def context_of(resume) -> Context:
    return replace(fake_context(resume / "run"), resume=Folder.at(resume))


def test_checkpoints_that_the_runtime_refuses_are_found_by_their_config(tmp_path):
    found = receipts(tmp_path)
    context = context_of(tmp_path)
    refused = find_refused(found, context, "vllm-cpu")
    assert context.reporter.notes == [f"{name} is no finalist: {reason}" for name, reason in refused.items()]
    assert set(refused) == {INT8.name, INT3.name}
    assert "the only kernel takes 4 bits" in refused[INT3.name]
    assert find_refused(found, context, "vllm-cuda") == {}
    assert find_refused(found, context, None) == {}


def test_search_json_says_why_a_scheme_is_no_finalist(tmp_path):
    found = receipts(tmp_path)
    refused = find_refused(found, context_of(tmp_path), "vllm-cpu")
    trials = [receipt.trial for receipt in found.values()]
    front = pareto_front(points_of(trial for trial in trials if trial.scheme not in refused))
    assert [point.name for point in front] == [INT4.name]
    verdict = Verification(accepted={INT4.name: 0.1}, refused=refused)
    search = assemble_search(trials, front, verdict, base="abc", base_bytes=400, max_kl=0.5)
    reasons = {trial.scheme: getattr(trial, "refused", None) for trial in search.trials}
    assert reasons[INT4.name] is None
    assert reasons[INT3.name] == refused[INT3.name]
