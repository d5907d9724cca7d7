"""The key of this server: what a table has to have been measured on to be used here."""

import importlib
import importlib.metadata
import logging
from typing import Any

import torch

from sglang_tokenweave import __version__, architectures
from sglang_tokenweave.tuning.table import Key

logger = logging.getLogger(__name__)


def key_of(
    model_runner: Any, *, device: torch.device, sms: int, tp_size: int, transport: str
) -> Key:
    """Return the key of a server with this model on this device.

    Raises:
        ValueError: the model's sizes do not divide among the ranks.
    """
    config = model_runner.model_config
    return Key(
        gpu=_gpu(device),
        sms=sms,
        driver=_driver(device),
        model=type(model_runner.model).__name__,
        **architectures.layer_sizes(config.hf_config),
        layers=config.hf_config.num_hidden_layers,
        dtype=str(model_runner.dtype).removeprefix("torch."),
        quantization=getattr(config, "quantization", None) or "none",
        tp_size=tp_size,
        transport=transport,
        sglang=importlib.metadata.version("sglang"),
        tokenweave=__version__,
    )


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    try:
        nvml = importlib.import_module("pynvml")  # SGLang's GPU installation brings it
        nvml.nvmlInit()
        try:
            return str(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    except Exception as error:  # noqa: BLE001 - some containers lack NVML; they can weave all the same
        logger.warning("TokenWeave cannot tell the driver that a tuned table is of: %s", error)
        return "unknown"
