"""What vLLM calls when it starts where modekit is installed (an entry point of the group `vllm.general_plugins`).

It says which class serves the modekit architecture, and what of vLLM does not go with it: asked for together they end the start
with a reason, never a request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modekit.files.typed import as_kind
from modekit.planning.mixture_config import MixtureConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ARCHITECTURE = "ModekitForCausalLM"
_KEPT = "what its routers remember of a text is kept beside one engine's keys and values"


def register() -> None:
    """Let vLLM open modekit checkpoints without remote code."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import modekit.architecture

    modekit.architecture.register()
    ModelRegistry.register_model(ARCHITECTURE, f"modekit.engines.vllm_model:{ARCHITECTURE}")
    members = {"verify_and_update_config": staticmethod(check_config)}
    MODELS_CONFIG_MAP[ARCHITECTURE] = type("ModekitVllmConfig", (VerifyAndUpdateConfig,), members)


def check_config(vllm_config: VllmConfig) -> None:
    """Raise ValueError for what does not go with a mixture; keep CUDA graphs from routers that remember."""
    said = as_kind(vllm_config.model_config.hf_config.modekit, MixtureConfig)
    refused = said.without_vllm or _refusal_of_settings(vllm_config, said)
    if refused is not None:
        raise ValueError(f"vLLM cannot serve this mixture so: {refused}")
    if said.routing.remembers:
        from vllm.config import CUDAGraphMode

        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE


def _refusal_of_settings(vllm_config: VllmConfig, said: MixtureConfig) -> str | None:
    parallel = vllm_config.parallel_config
    if max(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.prefill_context_parallel_size) > 1:
        return "it cannot be split over devices; leave out --tensor-parallel-size, --pipeline-parallel-size and the like"
    if not said.routing.remembers:
        return None
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        return f"{_KEPT}; leave out --kv-transfer-config and --kv-offloading-size"
    if vllm_config.speculative_config is not None:
        return "speculative decoding was never run with its routers; leave out --speculative-config"
    if parallel.enable_dbo or parallel.use_ubatching or parallel.decode_context_parallel_size > 1:
        return f"{_KEPT}; leave out --enable-dbo and --decode-context-parallel-size"
    return None
