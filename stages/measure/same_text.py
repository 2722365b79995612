"""Whether a runtime computes what transformers does: its own greedy tokens, judged by transformers' logits.

transformers reads a prompt and the tokens that the runtime wrote after it, in one forward pass and in the number
format that the checkpoint is stored in. Where the runtime chose another token than transformers finds likeliest, the
gap between the two logits says how much that matters. Rounding explains a gap of up to four times the error of a
logit: two logits in each of two runtimes err. That error is measured: the same pass in the next wider format.

Letters: P prompt tokens, N generated tokens, V vocabulary.
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from stages.formats.speed import SameText
from stages.models.checkpoints import load_model
from stages.models.tokenization import has_tokenizer, load_tokenizer

__all__ = ["NUM_PROMPTS", "compare_text", "release_memory", "text_prompts"]

SENTENCES = (
    "The following is a list of the most important",
    "In the beginning of the year, she decided to",
    "This function returns the number of elements in the",
    "The capital of France is Paris, and the capital of",
)
WIDER = {"bfloat16": torch.float32, "float16": torch.float32, "float32": torch.float64}
ERRORS_OF_A_GAP = 4
NUM_PROMPTS = len(SENTENCES)


def text_prompts(folder: Path, *, max_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts as token ids: a few sentences, or random ids for a checkpoint without a tokenizer."""
    if not has_tokenizer(folder):
        generator = torch.Generator().manual_seed(seed)
        length = min(16, max_tokens)
        found: list[list[int]] = torch.randint(0, vocab_size, (len(SENTENCES), length), generator=generator).tolist()
        return found
    tokenizer = load_tokenizer(folder)
    return [list(tokenizer(sentence)["input_ids"])[:max_tokens] for sentence in SENTENCES]


def compare_text(
    folder: Path, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], *, dtype: str, device: str
) -> SameText:
    """Judge the tokens that a runtime wrote after prompts.

    Args:
        folder: the checkpoint, which transformers loads too.
        prompts: token ids.
        written: the runtime's greedy tokens after each prompt.
        dtype: the number format that both compute in.
        device: torch's name of the device.

    Raises:
        StageFailed: transformers cannot load the checkpoint.
        OutOfMemory: it does not fit.
    """
    model = load_model(folder, dtype=dtype, device=device)
    narrow = [_logits(model, prompt, tokens) for prompt, tokens in zip(prompts, written, strict=True)]
    model = model.to(WIDER[dtype])
    first, gaps, rounding = None, [0.0], 0.0
    num_differing = 0
    for prompt, tokens, narrow_NV in zip(prompts, written, narrow, strict=True):
        wide_NV = _logits(model, prompt, tokens)
        chosen_N1 = torch.tensor(tokens, device=narrow_NV.device)[:, None]
        best_N1 = narrow_NV.argmax(-1, keepdim=True)
        for index_N1 in (chosen_N1, best_N1):
            errors_N1 = (narrow_NV.double().gather(1, index_N1) - wide_NV.double().gather(1, index_N1)).abs()
            rounding = max(rounding, float(errors_N1.max()))
        gap_N1 = narrow_NV.double().gather(1, best_N1) - narrow_NV.double().gather(1, chosen_N1)
        # Equal logits are a tie, which two runtimes may break in two ways.
        differing = (chosen_N1 != best_N1).flatten().nonzero().flatten().tolist()
        num_differing += len(differing)
        gaps += gap_N1.flatten().tolist()
        if differing:
            first = differing[0] if first is None else min(first, differing[0])
    return SameText(
        tokens=sum(map(len, written)),
        differing=num_differing,
        first_difference=first,
        largest_gap=max(gaps),
        rounding=rounding,
        holds=max(gaps) <= ERRORS_OF_A_GAP * rounding,
    )


def release_memory() -> None:
    """Give the memory of models that are no longer used back to the device: another process needs it."""
    gc.collect()
    torch.cuda.empty_cache()


def _logits(model: "torch.nn.Module", prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits `[N, V]` by which each of the tokens is predicted."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=device)
    with torch.no_grad():  # weights that are unpacked here are converted afterwards, which inference mode forbids
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits
