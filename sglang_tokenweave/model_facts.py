"""What of a loaded model decides whether it can be woven."""

from typing import Any

from sglang_tokenweave import architectures
from sglang_tokenweave.refusals import ModelFacts

# Options of SGLang's RMSNorm that change what it computes.
_NORM_VARIANTS = (
    "fp32_residual",
    "override_orig_dtype",
    "variance_size_override",
    "cast_x_before_out_mul",
)


def find(model_runner: Any) -> ModelFacts:
    """Return the facts about the model that a ModelRunner has loaded."""
    model, config = model_runner.model, model_runner.model_config
    architecture = architectures.ARCHITECTURES.get(type(model).__name__)
    inner = getattr(model, "model", None)
    return ModelFacts(
        architecture=type(model).__name__,
        is_supported=architecture is not None,
        is_multimodal=config.is_multimodal,
        is_mla=config.attention_arch.name == "MLA",
        captures_layers=bool(getattr(inner, "layers_to_capture", ())),
        has_plain_norms=all(_is_plain(norm) for norm in norms(model)),
        has_megakernel="_megakernel" in vars(model),
    )


def norms(model: Any) -> list[Any]:
    """Return the norm modules that the woven loop takes over; none of an unknown architecture."""
    architecture = architectures.ARCHITECTURES.get(type(model).__name__)
    inner = getattr(model, "model", None)
    return architectures.norms(architecture, inner) if architecture else []


def _is_plain(norm: Any) -> bool:
    return not any(getattr(norm, name, None) for name in _NORM_VARIANTS)
