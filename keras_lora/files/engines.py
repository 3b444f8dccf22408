"""What an engine that serves PEFT's folders would refuse, before it is asked."""

import os

from keras_lora.files.factors import factors_of
from keras_lora.files.folder import Adapter
from keras_lora.layers.settings import checked_rank
from keras_lora.layers.settings import divisor

# Read on 2026-11-25 in the documentation of vLLM 0.22.1 (vllm.lora.peft_helper,
# vllm.lora.utils, vllm.config.lora).
VLLM = "vLLM 0.22 (its documentation of 2026-11-25)"


def check_adapter(
    adapter: Adapter | str | os.PathLike,
    engine: str = "vllm",
    max_lora_rank: int = 16,
) -> list:
    """Says what a serving engine would refuse in an adapter, or read otherwise.

    Args:
        adapter: A folder, or an `Adapter`.
        engine: "vllm", by its documented rules of 2026-11-25.
        max_lora_rank: What the server is started with.

    Returns:
        A list of sentences; an empty one means that nothing speaks against it. It
        says nothing about which modules of a model the engine can adapt.

    Raises:
        ValueError: If the engine is unknown, or the adapter is damaged.
        OSError: If a file cannot be read.

    Examples:
        >>> keras_lora.mark_only_lora_as_trainable(model)
        >>> keras_lora.save_adapter(model, "adapter")
        >>> keras_lora.check_adapter("adapter", max_lora_rank=64)
        []
    """
    if engine != "vllm":
        raise ValueError(f"`engine` must be 'vllm'. Received: engine={engine!r}.")
    max_lora_rank = checked_rank(max_lora_rank)
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.read(adapter)
    file, found = factors_of(adapter, ()), []
    if heads := file.config["modules_to_save"]:
        found.append(
            f"{VLLM} refuses modules_to_save, here {heads}: train without "
            "`also_train`, or merge and serve the whole model."
        )
    for word in file.method:
        found.append(
            f"{VLLM} refuses {word}: serve the merged model, or extract_adapter's "
            "nearest plain LoRA of it."
        )
    if file.bias != "none":
        found.append(
            f"{VLLM} takes no bias, here bias={file.config['bias']!r}: train with "
            'bias="none".'
        )
    others = sorted(file.others)
    if others and not heads and file.bias == "none":
        found.append(f"{VLLM} refuses tensors that are no A or B: {others[:5]}.")
    if not adapter.config.get("target_modules"):
        found.append(f"{VLLM} needs target_modules, which the file has not.")
    largest = max(file.ranks, key=file.ranks.__getitem__)
    if file.ranks[largest] > max_lora_rank:
        found.append(
            f"{VLLM} refuses ranks above max_lora_rank={max_lora_rank}, and "
            f"{largest!r} has {file.ranks[largest]}: start it with --max-lora-rank, or "
            f"cut with combine_adapters([adapter], rank={max_lora_rank})."
        )
    rslora = file.config["use_rslora"]
    scaling = file.config["lora_alpha"] / divisor(file.config["r"], rslora)
    otherwise = [
        module
        for module, rank in file.ranks.items()
        if abs(file.alphas[module] / divisor(rank, rslora) - scaling) > 1e-6 * scaling
    ]
    if otherwise:
        found.append(
            f"{VLLM} reads no rank_pattern and no alpha_pattern: it would scale "
            f"{otherwise[:5]} by {scaling:.4g}, which is another adapter. Give all "
            "layers one alpha and one rank, or the same ratio of both."
        )
    return found
