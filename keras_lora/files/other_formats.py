"""Adapters in formats other than PEFT's: converted, or refused with a next step."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_lora.files import disk, factors
from keras_lora.files.config import CONFIG, make_config
from keras_lora.layers import settings
from keras_lora.layers.settings import Settings


class Format(NamedTuple):
    """A format, what its keys look like, and what to do with such a file."""

    name: str
    key: str  # a regular expression that one of its keys matches
    next_step: str


IN_DIFFUSERS = (
    "diffusers reads it: pipe.load_lora_weights(file), then peft's "
    "get_peft_model_state_dict(pipe.unet) or (pipe.transformer) has PEFT's tensors; "
    "save them beside an adapter_config.json."
)
NO_PRODUCT = (
    "Its update is not a product of A and B, so no LoRA equals it. Merge it into the "
    "base model with its own library; extract_adapter(base, merged, rank) then gives "
    "the nearest LoRA."
)
# The first format that has a matching key is taken.
FORMATS = [
    Format("LoKr of LyCORIS", r"\.lokr_(w[12](_[ab])?|t[12])$", NO_PRODUCT),
    Format("LoHa of LyCORIS", r"\.hada_(w[12]_[ab]|t[12])$", NO_PRODUCT),
    Format("LoCon of LyCORIS with three factors", r"\.lora_mid\.weight$", NO_PRODUCT),
    Format("OFT or BOFT", r"\.(oft_(blocks|diag|R|r)|boft_[RS])(\.|$)", NO_PRODUCT),
    Format("IA3", r"\.ia3_l$", NO_PRODUCT),
    Format("VB-LoRA", r"\.vblora_", NO_PRODUCT),
    Format(
        "prompt or prefix tuning",
        r"^prompt_embeddings$",
        "It holds additional inputs for the model, not an update of its weights.",
    ),
    Format(
        "DoRA of LyCORIS or ComfyUI",
        r"\.dora_scale$",
        "PEFT stores DoRA's magnitudes as `lora_magnitude_vector`, in another shape, "
        "and LyCORIS may take the norm over the other axis of the kernel. Merge it "
        "with its own library, or train it in PEFT.",
    ),
    Format(
        "VeLoRA of PEFT",
        r"\.lora_velora_embed(\.|$)",
        "Its projections are only needed in training. Delete them from the tensors in "
        "PEFT, and velora_config from adapter_config.json: the rest is a LoRA.",
    ),
    Format("XLabs's for Flux", r"(proj|qkv)_lora\d?\.(down|up)\.weight$", IN_DIFFUSERS),
    Format(
        "the one of diffusers before PEFT",
        r"[_.]lora\.(down|up)\.weight$",
        IN_DIFFUSERS,
    ),
    Format("kohya's (sd-scripts, ComfyUI)", r"\.lora_(down|up)\.weight$", ""),
    Format(
        "torchtune's",
        r"\.lora_[ab]\.weight$",
        "It has no alpha, and its names are torchtune's. torchtune's "
        "FullModelHFCheckpointer writes PEFT's files (save_adapter_weights_only).",
    ),
    Format("mlx's", r"\.lora_[ab]$", ""),
    Format("PEFT's with alphas among the tensors", r"\.alpha$", ""),
    Format(
        "diffusers'",
        r"^(unet|transformer|text_encoder(_2)?)\..*\.lora_[AB]\.weight$",
        "It has no alpha. Save it with PEFT (pipe.unet.save_lora_adapter) together "
        "with adapter_config.json, or write that file: r, lora_alpha, target_modules.",
    ),
    Format(
        "PEFT's, without its settings",
        r"\.lora_(embedding_)?[AB](\.|$)",
        f"Give the whole folder that PEFT has written: {CONFIG} has the alpha that "
        "scales the factors.",
    ),
]
PEFT = FORMATS[-2:]


def format_of(keys):
    """Returns the format of the keys, and the key that shows it; else None, None."""
    for format in FORMATS:
        for key in keys:
            if re.search(format.key, key):
                return format, key
    return None, None


def refuse_other_format(keys):
    """Raises ValueError if the keys have a format other than PEFT's."""
    format, key = format_of(keys)
    if format is not None and format not in PEFT:
        step = format.next_step or (
            "Such a file is read only if no adapter_config.json with a peft_type is "
            "next to it."
        )
        raise ValueError(
            f"{disk.TENSORS} has the tensor {key[:200]!r}, which looks like "
            f"{format.name} format, not like PEFT's. {step}"
        )


def read_other_format(path):
    """Converts a file of another format to (config, tensors) of PEFT.

    Returns None for the files of PEFT and `save_adapter`.

    Raises:
        ValueError: If the format cannot be converted, or the file lacks something.
    """
    path = Path(path)
    file = path if path.is_file() else tensors_in(path)
    if file is None or file.suffix != ".safetensors":
        return None
    config = disk.read_config(path) if (path / CONFIG).exists() else {}
    if not isinstance(config, dict) or "peft_type" in config:
        return None
    tensors, _ = disk.read_tensors(file)
    format, key = format_of(tensors)
    if format is None:
        raise ValueError(
            f"{file} holds no adapter: its tensors are called {sorted(tensors)[:3]}. "
            "PEFT's end with .lora_A.weight and .lora_B.weight."
        )
    if format.next_step:
        raise ValueError(
            f"{file} has the tensor {key[:200]!r}, which looks like {format.name} "
            f"format. {format.next_step}"
        )
    if format.name == "mlx's":
        return from_mlx(file, tensors, config)
    return from_kohya(file, tensors)


def tensors_in(folder):
    """Returns the one .safetensors of a folder, unless it has PEFT's name."""
    files = sorted(folder.glob("*.safetensors"))
    candidates = [x for x in files if x.name == "adapters.safetensors"] or files  # mlx
    if len(candidates) == 1 and candidates[0].name != disk.TENSORS:
        return candidates[0]
    return None


def parts_by_module(file, tensors, parts) -> dict:
    """Module -> {part: array}; parts: the suffix of a key -> the part it holds."""
    arrays, others = factors.group_by_module(tensors, parts)
    if others:
        raise ValueError(
            f"{file} has {sorted(others)[:3]} besides its factors, which a LoRA "
            "cannot store. Leave them out, or merge the adapter with its own library."
        )
    modules = {
        module: {parts[suffix]: value for suffix, value in own.items()}
        for module, own in arrays.items()
    }
    for module, own in modules.items():
        if not {"A", "B"} <= own.keys():
            raise ValueError(
                f"{file} has only {sorted(own)} of {module!r}: A and B are needed."
            )
    return modules


KOHYA = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".alpha": "alpha",
}


def from_kohya(file, tensors):
    """Takes down (r, in) and up (out, r) as PEFT's A and B, and each module's alpha.

    If there is none, alpha is the rank, as in sd-scripts.
    """
    modules = parts_by_module(file, tensors, KOHYA)
    alphas = {}
    for module, parts in modules.items():
        alpha = np.ravel(parts.get("alpha", len(parts["A"])))
        if alpha.size != 1:
            raise ValueError(f"{file}: the alpha of {module!r} must be one number.")
        alphas[module] = float(alpha[0])
    return to_peft(modules, alphas)


MLX = {".lora_a": "A", ".lora_b": "B", ".m": "m"}


def from_mlx(file, tensors, config):
    """Transposes the factors of y = x W + scale * (x @ lora_a) @ lora_b."""
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    kind = config.get("fine_tune_type", "lora")
    modules = parts_by_module(file, tensors, MLX)
    if kind != "lora" or any("m" in parts for parts in modules.values()):
        raise ValueError(
            f"{file} is an adapter of mlx ({kind!r}) with tensors other than A and B. "
            "Fuse it with mlx_lm.fuse, or train it with fine_tune_type lora."
        )
    if not settings.is_number(scale) or "alpha" in parameters:
        raise ValueError(
            f"In {CONFIG} of mlx, lora_parameters must have a number for `scale` "
            "without `alpha`, by which mlx_lm of early 2024 multiplied it. Received: "
            f"{parameters!r}. Set `scale` to the factor in front of A @ B."
        )
    for module, parts in modules.items():
        if parts["A"].ndim != 2 or parts["B"].ndim != 2:
            raise ValueError(
                f"{file} adapts {module!r}, a stack of kernels (experts), which cannot "
                "be read from mlx's files."
            )
    pairs = {m: {"A": x["A"].T, "B": x["B"].T} for m, x in modules.items()}
    alphas = {m: scale * len(x["A"]) for m, x in pairs.items()}
    dropout = settings.validate_dropout(parameters.get("dropout", 0.0))
    return to_peft(pairs, alphas, lora_dropout=dropout)


def to_peft(modules, alphas, **options):
    tensors = {
        f"{module}.lora_{part}.weight": np.ascontiguousarray(parts[part])
        for module, parts in modules.items()
        for part in "AB"
    }
    own_settings = {}
    for module, parts in modules.items():
        rank = len(parts["A"])
        if parts["B"].ndim < 2 or parts["B"].shape[1] != rank:
            shapes = parts["A"].shape, parts["B"].shape
            raise ValueError(
                f"A and B of {module!r} have shapes {shapes}, with different ranks."
            )
        own_settings[module] = Settings(rank, alphas[module])
    return make_config(own_settings, **options), tensors


# kohya's names have underscores for dots: lora_unet_down_blocks_0_attn_to_q.
FLAT = re.compile(r"^lora_[a-z0-9]+_")


def module_of(name, modules):
    """Returns the model's name for a module that may have kohya's name."""
    if name in modules or not FLAT.match(name):
        return name
    flat = FLAT.sub("", name)
    meant = [module for module in modules if module.replace(".", "_") == flat]
    if len(meant) > 1:
        raise ValueError(
            f"The file's {name!r} may mean {' or '.join(map(repr, meant))}. Give "
            "`names` that differ by more than dots and underscores."
        )
    return meant[0] if meant else name
