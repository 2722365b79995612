"""Imports of torch, transformers and llm-compressor, a third faster, for processes that live for one trial.

The trial of a small model takes 1.5 s of CPU (round to nearest) and its imports take 7. Without the garbage collector
walking over modules that stay, and without three packages that transformers and accelerate import because they are
installed (for assisted decoding, object detection and SageMaker), they take 5 (2-core CPU, 2026-11-21).

Does not: hide anything that is imported already, or after it is done.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

UNUSED_PACKAGES = ("sklearn", "scipy", "boto3")


@contextlib.contextmanager
def swift_imports() -> Iterator[None]:
    """Import faster inside of this block. Only for a process of one's own."""
    hidden = [name for name in UNUSED_PACKAGES if name not in sys.modules]
    enabled = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None there makes an import fail at once
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
        if enabled:
            gc.enable()


def silence_libraries() -> None:
    """Keep llm-compressor's log off standard output (it reads this while it is imported), and a tokenizer's warning."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def import_for_measuring() -> None:
    """Import what loading and running any checkpoint needs, quantized ones too."""
    with swift_imports():
        import compressed_tensors
        import torch
        import transformers

        from stages.quantize import trial

        del compressed_tensors, torch, transformers, trial


def import_for_quantizing() -> None:
    """Import what a trial needs."""
    silence_libraries()
    with swift_imports():
        import_for_measuring()
        import llmcompressor
        from llmcompressor.modifiers.transform import smoothquant

        from stages.quantize import gptq

        del llmcompressor, gptq, smoothquant
