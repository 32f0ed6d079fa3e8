"""Loads a checkpoint into vLLM and frees it; and vLLM's errors in one line.

On a GPU, vLLM's engine runs in a child process, which ends with the model: within this process it would keep the GPU's
memory (vllm-project/vllm#21073).
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from mpa.files.records import InputError
from mpa.models import loading

MAX_IN_FLIGHT = {"cpu": 64, "gpu": 256}  # requests that vLLM has at a time
PATIENCE = 60  # seconds in which vLLM's processes may end by themselves

INSTALL = (
    "--engine vllm needs vLLM, in a separate environment. `bash scripts/setup.sh vllm` makes .venv-vllm, which the "
    "bash scripts use. To run a Python file yourself: .venv-vllm/bin/python scripts/PA.py …"
)


class VLLMModel:
    """One checkpoint in vLLM. `llm` is None while it is not loaded; `length` is its max_model_len."""

    def __init__(
        self,
        model_path: str,
        dtype: str,
        trust_remote_code: bool,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
        gpu_memory_utilization: float,
    ):
        self.model_path, self.dtype, self.trust_remote_code = model_path, dtype, trust_remote_code
        self.parallel, self.gpu_memory_utilization = (
            (tensor_parallel_size, pipeline_parallel_size),
            gpu_memory_utilization,
        )
        self.device, self.llm, self.length = "auto", None, 0
        self.children: list[multiprocessing.Process] = []  # vLLM's
        self.guard: subprocess.Popen | None = None

    @property
    def engine(self):
        """vLLM's own engine, which takes requests and makes steps."""
        return self.llm.llm_engine

    def load(self, length: int, processor_settings: dict | None) -> None:
        """Load the model for `length` tokens of prompt, image and reply. Raises InputError where vLLM cannot."""
        _set_environment()
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise InputError(f"vLLM is installed but cannot be imported: {error}. {INSTALL}") from None
        if Path(self.model_path).is_dir():  # vLLM itself refuses missing tensors only
            loading.check_files(self.model_path)
        on_cpu, gpus = current_platform.is_cpu(), self.parallel[0] * self.parallel[1]
        if on_cpu and gpus == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.device = current_platform.device_type + (f" x {gpus}" if gpus > 1 else "")
        device = "cpu" if on_cpu else "cuda"
        self.dtype = loading.resolved_dtype(str(self.dtype).removeprefix("torch."), device, self.model_path)
        before = multiprocessing.active_children()
        self.max_in_flight, self.length = MAX_IN_FLIGHT["cpu" if on_cpu else "gpu"], length
        try:
            self.llm = LLM(
                model=self.model_path,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                tensor_parallel_size=self.parallel[0],
                pipeline_parallel_size=self.parallel[1],
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=length,
                max_num_seqs=self.max_in_flight,
                enable_prefix_caching=True,
                mm_processor_cache_gb=1 if on_cpu else 4,
                limit_mm_per_prompt={"image": 1, "video": 0},
                mm_processor_kwargs=processor_settings,
                hf_overrides=_same_grids(processor_settings),
                generation_config="vllm",  # the checkpoint's sampling settings are ignored
                use_tqdm_on_load=sys.stderr.isatty(),
                **({"enforce_eager": True, "block_size": 32} if on_cpu else {}),
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise InputError(f"{self.model_path}: vLLM cannot load it: {reason(error)}") from error
        finally:
            self.children = [child for child in multiprocessing.active_children() if child not in before]
            if not self.llm:
                self._await_children()
        if self.children:
            self._guard()
        self.repetition_penalty = _repetition_penalty(self.model_path)

    def unload(self) -> None:
        """Free the memory. When this returns, vLLM's processes have ended."""
        if not self.llm:
            return
        engine, self.llm = self.llm.llm_engine, None
        engine.renderer.shutdown()
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        if self.children:
            self._await_children()
        else:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    def _await_children(self) -> None:
        """A GPU's memory is free when the process that had it has ended: vLLM kills a slow one, and does not wait."""
        deadline = time.monotonic() + PATIENCE
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.join(max(0, deadline - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()
        self.children = []
        if self.guard:
            self.guard.kill()
            self.guard.communicate()
            self.guard = None

    def _guard(self) -> None:
        """Have vLLM's processes end with this one, also by kill -9, where they would stay on the GPU (vllm-project/vllm#55510)."""
        command = ["bash", "-c", 'read -r; kill -9 "$@"', "guard", *(str(child.pid) for child in self.children)]
        # It reads from a pipe that this process closes by ending. Ctrl-C, which reaches a session, does not end it.
        self.guard = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def max_positions(self) -> int | None:
        """The longest sequence that the checkpoint is made for; None where its config does not say."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.model_path, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)


def _same_grids(processor_settings: dict | None) -> dict | None:
    """LLaVA-NeXT's grids of tiles for the configuration too, by which vLLM counts."""
    grids = (processor_settings or {}).get("image_grid_pinpoints")
    return {"image_grid_pinpoints": grids} if grids else None


def _set_environment() -> None:
    """What vLLM reads when it is imported, and later."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB


def _repetition_penalty(path: str) -> float:
    """The checkpoint's, as transformers' greedy search applies it."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path).repetition_penalty or 1.0
    except OSError:
        return 1.0


def reason(error: BaseException) -> str:
    """The first line of the error's root cause, without the words that pydantic puts around it."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else repr(error))
    return said.removeprefix("Value error, ").split(" [type=", 1)[0]


def too_long(error: Exception) -> str:
    """Why a prompt is too long, if the error says so; else ""."""
    said = reason(error)
    return f"prompt: {said}" if "maximum context length" in said or "maximum model length" in said else ""
