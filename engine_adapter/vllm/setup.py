"""What a vLLM engine runs on, and the cost model that was measured there."""

from __future__ import annotations

import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from engine_adapter.cost_files import file_name, find
from engine_adapter.scheduling.cost import CostModel, Setup

logger = logging.getLogger("vllm.stream2llm")

CPUINFO = Path("/proc/cpuinfo")


def setup_of(config: Any) -> Setup:
    """Model, hardware and settings of an engine, out of its `VllmConfig`."""
    served = config.model_config.served_model_name
    parallel = config.parallel_config
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    step_tokens = config.scheduler_config.max_num_batched_tokens
    return Setup(
        model=served if isinstance(served, str) else served[0],
        hardware=_hardware(parallel.world_size),
        settings=f"{dtype} tp{parallel.tensor_parallel_size} step{step_tokens} "
        f"block{config.cache_config.block_size}",
    )


def _hardware(accelerators: int) -> str:
    if current_platform.is_cpu():
        return f"{_cpu_name()}, {_cores(os.environ.get('VLLM_CPU_OMP_THREADS_BIND', ''))} cores"
    name = current_platform.get_device_name()
    return f"{accelerators}x {name}" if accelerators > 1 else str(name)


def _cpu_name() -> str:
    found = CPUINFO.exists() and re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.M)
    name = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", name)


def _cores(bound: str) -> int:
    """How many cores vLLM computes on, from its setting like `0-3,6|8-11`; all, if it has none."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", bound)
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or os.cpu_count() or 1


def cost_model(place: str | None, setup: Setup) -> CostModel | None:
    """Load the cost model of an engine, and log which it is.

    Args:
        place: a file, or a folder as `calibrate` fills it; None for no cost model.

    Raises:
        BadCostModel: the file can't be read, or is of another model.
    """
    cost = find(Path(place), setup) if place else None
    if cost is None:
        missing = f" ({file_name(setup)} is not in {place})" if place else ""
        logger.info("no cost model: recompute only%s", missing)
        return None
    logger.info("cost model: %s", cost)
    if cost.setup != setup:
        logger.warning(
            "the cost model is of %s (%s), this engine is on %s (%s)",
            cost.setup.hardware, cost.setup.settings, setup.hardware, setup.settings,
        )  # fmt: skip
    return cost
