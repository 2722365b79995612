"""What vLLM can do, as tables read in its sources: architectures, head sizes, methods; and the answer to a question.

Revise with each version of vLLM that is pinned: `VERSION` says in which one all of this was read. Plain data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "ARCHITECTURES",
    "HEAD_SIZES",
    "METHODS",
    "PACKAGE",
    "VERSION",
    "Answer",
    "Device",
    "HeadSizes",
    "Served",
    "worst_of",
]

VERSION = "0.32"
PACKAGE = f"vLLM {VERSION}, model_executor/layers/quantization"
Device = Literal["cpu", "cuda"]
Answer = Literal["served", "unknown", "refused"]
"""In the order of their weight: of several answers about one checkpoint the last counts."""


@dataclass(frozen=True, slots=True)
class Served:
    """Whether a runtime serves a checkpoint."""

    answer: Answer
    reason: str
    source: str
    """Where the rule was read: the package, its version and the file."""
    seen: bool = False
    """Whether the runtime itself loaded, or refused, such a checkpoint; else it holds by rule."""

    @property
    def text(self) -> str:
        """The answer in one line, with where it comes from."""
        return f"{self.answer}: {self.reason} ({'seen' if self.seen else 'by rule'}; {self.source})"


def worst_of(answers: Iterable[Served]) -> Served:
    """Return the answer that counts of several about one checkpoint; of equal ones the first."""
    order = get_args(Answer)
    return max(answers, key=lambda found: order.index(found.answer))


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """The sizes of attention heads that a device's kernels take."""

    allows: Callable[[int], bool]
    text: str
    source: str
    seen: bool


HEAD_SIZES: dict[Device, HeadSizes] = {
    # The file names 32, 64, 80, 96, …; of others it served 48 and failed at its first token with 16, 20, 24 and 40.
    "cpu": HeadSizes(
        lambda size: size % 16 == 0 and 32 <= size <= 512,
        "expected a multiple of 16 from 32 on",
        f"vLLM {VERSION}, v1/attention/backends/cpu_attn.py",
        seen=True,
    ),
    "cuda": HeadSizes(
        lambda size: size % 8 == 0 and size <= 512,
        "expected a multiple of 8, 512 at most",
        f"vLLM {VERSION}, v1/attention/backends/flash_attn.py",
        seen=False,
    ),
}

METHODS = frozenset(
    (  # noqa: SIM905  a list of one name a line would hide the rest of the file
        "awq auto_awq fp8 fbgemm_fp8 fp_quant modelopt modelopt_fp4 modelopt_mxfp8 modelopt_mixed auto_gptq gptq "
        "gptq_marlin awq_marlin humming compressed-tensors experts_int8 quark moe_wna16 torchao inc mxfp4 "
        "gpt_oss_mxfp4 deepseek_v4_fp8"
    ).split()
)
"""`QuantizationMethods` of `model_executor/layers/quantization/__init__.py`, those that a checkpoint can name."""

ARCHITECTURES = frozenset(
    (  # noqa: SIM905
        "AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BailingMoeForCausalLM "
        "BailingMoeV2ForCausalLM BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BloomForCausalLM "
        "ChatGLMForConditionalGeneration ChatGLMModel Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM "
        "CwmForCausalLM DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekV2ForCausalLM "
        "DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Emu3ForConditionalGeneration "
        "Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneForCausalLM ExaoneMoEForCausalLM "
        "ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM "
        "GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM "
        "Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma4ForCausalLM "
        "Gemma4ForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM "
        "Glm5NextForCausalLM GlmForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM GraniteForCausalLM "
        "GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM "
        "GraniteSWAForCausalLM HCXVisionV2ForCausalLM HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM "
        "HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM "
        "IQuestCoderForCausalLM IQuestLoopCoderForCausalLM InklingForCausalLM InklingForConditionalGeneration "
        "InternLM2ForCausalLM InternLM3ForCausalLM Jais2ForCausalLM JambaForCausalLM K2HorizonForCausalLM "
        "KimiLinearForCausalLM LLaMAForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM "
        "Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM LongcatFlashForCausalLM "
        "LongcatFlashNgramForCausalLM Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM MiMoForCausalLM "
        "MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM MiniMaxM2ForCausalLM "
        "MiniMaxM3SparseForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM "
        "MistralLarge3ForCausalLM MixtralForCausalLM MuseGlimmerForCausalLM NanbeigeForCausalLM NemotronForCausalLM "
        "NemotronHForCausalLM NemotronHPuzzleForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM "
        "OlmoForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM OrionForCausalLM PanguEmbeddedForCausalLM "
        "PanguProMoEV2ForCausalLM PanguUltraMoEForCausalLM Param2MoEForCausalLM Phi3ForCausalLM PhiForCausalLM "
        "PhiMoEForCausalLM Plamo3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM "
        "Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM "
        "Qwen3VLForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM "
        "Qwen3_5MoeForConditionalGeneration Qwen4ExpForCausalLM Rnj1ForCausalLM SarvamMLAForCausalLM "
        "SarvamMoEForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM SolarForCausalLM StableLmForCausalLM "
        "Starcoder2ForCausalLM Step1ForCausalLM Step3TextForCausalLM Step3p5ForCausalLM TeleChat2ForCausalLM "
        "TeleChat3ForCausalLM TeleFLMForCausalLM VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration "
        "Zamba2ForCausalLM"
    ).split()
)
"""Text generation in `model_executor/models/registry.py`, and the multimodal ones that have a text model."""
