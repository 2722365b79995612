"""Imports of torch, transformers and llm-compressor, a fifth faster, for processes that live for one trial.

The trial of a small model takes 1.5 s of CPU (round to nearest) and its imports take 7. The garbage collector, which
walks again and again over modules that stay, takes more than a second of them (2-core CPU, 2026-11-21).
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def swift_imports() -> Iterator[None]:
    """Import faster inside of this block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
    with swift_imports():
        import_for_measuring()
        from stages.quantize.compress import silence_libraries

        silence_libraries()
        import llmcompressor

        from stages.quantize import gptq, scaling

        del llmcompressor, gptq, scaling
