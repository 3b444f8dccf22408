"""Adapters in the words of other libraries: read where they say the same as PEFT's."""

import json

import keras
import numpy as np
import pytest
from layer_cases import to_numpy
from safetensors.numpy import save_file
from shared import assert_close

import keras_lora


def build():
    """Two layers inside of a block, whose names have underscores, and a convolution."""
    inputs = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(5, 3, name="conv_in")(inputs)
    block = keras.Sequential(
        [
            keras.Input((4, 4, 5)),
            keras.layers.Dense(6, name="to_q"),
            keras.layers.Dense(3, name="to_out"),
        ],
        name="attn_1",
    )
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(block(x)))


SHAPES = {  # path -> (what a kernel (out, in, ...) has, rank, alpha)
    "conv_in": ((5, 4, 3, 3), 2, 1.0),
    "attn_1/to_q": ((6, 5), 3, 6.0),
    "attn_1/to_out": ((3, 6), 2, 2.0),
}


def factors():
    """Path -> (A, B) as torch has them, (r, in, ...) and (out, r, ...)."""
    random, found = np.random.default_rng(0), {}
    for path, ((out, *rest), rank, _) in SHAPES.items():
        ones = [1] * (len(rest) - 1)
        a, b = random.normal(size=(rank, *rest)), random.normal(size=(out, rank, *ones))
        found[path] = a.astype("float32"), b.astype("float32")
    return found


def layer_of(model, path):
    for name in path.split("/"):
        model = model.get_layer(name)
    return model


def assert_loaded(path, scales, **more):
    """The plain model with W + scale * B A gives what the adapted one does."""
    model, plain = build(), build()
    plain.set_weights(model.get_weights())
    for name, (a, b) in factors().items():
        if name in scales:
            product = np.tensordot(b.reshape(b.shape[:2]), a, 1)  # (out, in, ...)
            # Keras has (height, width, in, out).
            product = np.moveaxis(product, (0, 1), (-1, -2))
            kernel = layer_of(plain, name).kernel
            kernel.assign(to_numpy(kernel) + scales[name] * product)
    report = keras_lora.load_adapter(model, path, **more)
    assert {row.path for row in report} == set(scales)
    inputs = np.random.default_rng(1).standard_normal((2, 6, 6, 4)).astype("float32")
    assert_close(model(inputs), plain(inputs))
    return model


def kohya(prefix="lora_unet_", down="lora_down", up="lora_up"):
    tensors = {}
    for path, (a, b) in factors().items():
        name = prefix + path.replace("/", "_")
        tensors[f"{name}.{down}.weight"] = a
        tensors[f"{name}.{up}.weight"] = b
        tensors[f"{name}.alpha"] = np.array(SHAPES[path][2], "float32")
    return tensors


SCALES = {path: alpha / rank for path, (_, rank, alpha) in SHAPES.items()}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te1_"])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_files_of_kohya_are_read(prefix, place, tmp_path):
    save_file(kohya(prefix), tmp_path / "style.safetensors")
    path = tmp_path / "style.safetensors" if place == "file" else tmp_path
    model = assert_loaded(path, SCALES)
    keras_lora.save_adapter(model, tmp_path / "ours")
    assert_loaded(tmp_path / "ours", SCALES)


def test_alphas_beside_the_factors_of_peft_are_read(tmp_path):
    """As trainers of diffusion models write them, under the model's own names."""
    tensors = {}
    for path, (a, b) in factors().items():
        name = path.replace("/", ".")
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        tensors[f"{name}.alpha"] = np.array([SHAPES[path][2]], "float32")
    save_file(tensors, tmp_path / "style.safetensors")
    assert_loaded(tmp_path / "style.safetensors", SCALES)


def test_without_an_alpha_kohya_means_the_rank(tmp_path):
    tensors = {k: v for k, v in kohya().items() if not k.endswith(".alpha")}
    save_file(tensors, tmp_path / "style.safetensors")
    assert_loaded(tmp_path / "style.safetensors", dict.fromkeys(SHAPES, 1.0))


def test_names_that_kohya_cannot_tell_apart_are_refused(tmp_path):
    inputs = keras.Input((4,))
    block = keras.Sequential([keras.layers.Dense(4, name="b")], name="a")
    model = keras.Model(inputs, keras.layers.Dense(4, name="a_b")(block(inputs)))
    ones = np.ones((2, 4), "float32")
    tensors = {"lora_x_a_b.lora_down.weight": ones, "lora_x_a_b.lora_up.weight": ones.T}
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"'lora_x_a_b' may mean 'a.b' or 'a_b'"):
        keras_lora.load_adapter(model, tmp_path / "style.safetensors")


DENSE = ("attn_1/to_q", "attn_1/to_out")  # mlx adapts no convolution


def mlx(folder, tensors=None, **config):
    found = {}
    for path in DENSE:
        (a, b), name = factors()[path], path.replace("/", ".")
        # nn.Linear's lora_a is (in, r) there, and lora_b (r, out).
        found[f"{name}.lora_a"] = np.ascontiguousarray(a.T)
        found[f"{name}.lora_b"] = np.ascontiguousarray(b.T)
    save_file(found if tensors is None else tensors, folder / "adapters.safetensors")
    said = {
        "fine_tune_type": "lora",
        "model": "base",
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.1},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))


def test_folders_of_mlx_are_read(tmp_path):
    mlx(tmp_path)
    (tmp_path / "0000100_adapters.safetensors").write_bytes(b"a checkpoint of mlx")
    model = assert_loaded(tmp_path, dict.fromkeys(DENSE, 20.0))
    assert layer_of(model, "attn_1/to_q").lora.dropout == 0.1


ODD = {
    "dora": ({"fine_tune_type": "dora"}, r"mlx \('dora'\).*mlx_lm.fuse"),
    "no scale": ({"lora_parameters": {"rank": 3}}, "number for `scale`"),
    "alpha": ({"lora_parameters": {"scale": 1.0, "alpha": 16}}, "without `alpha`"),
    "a list": ({"lora_parameters": []}, "number for `scale`"),
}


@pytest.mark.parametrize(("config", "message"), ODD.values(), ids=ODD)
def test_folders_of_mlx_that_say_something_else_are_refused(config, message, tmp_path):
    mlx(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        keras_lora.load_adapter(build(), tmp_path)


def test_experts_of_mlx_are_refused(tmp_path):
    stack = np.ones((2, 3, 4), "float32")
    mlx(tmp_path, {"mlp.switch.lora_a": stack, "mlp.switch.lora_b": stack})
    with pytest.raises(ValueError, match=r"'mlp.switch', a stack of kernels"):
        keras_lora.load_adapter(build(), tmp_path)


OTHERS = {
    "x.lokr_w1": "LoKr.*extract_adapter",
    "x.lokr_w2_a": "LoKr.*extract_adapter",
    "x.hada_w1_a": "LoHa.*extract_adapter",
    "x.lora_mid.weight": "three factors.*extract_adapter",
    "x.oft_blocks": "OFT.*extract_adapter",
    "x.ia3_l": "IA3.*extract_adapter",
    "x.vblora_logits_A": "VB-LoRA.*extract_adapter",
    "prompt_embeddings": "prompt.*inputs for the model",
    "unet.x.lora.down.weight": "before PEFT.*get_peft_model",
    "x.dora_scale": "DoRA of LyCORIS.*lora_magnitude_vector",
    "x.lora_velora_embed": "VeLoRA.*velora_config",
    "double_blocks.0.processor.qkv_lora1.down.weight": "XLabs.*get_peft_model",
    "down_blocks.0.attn1.processor.to_q_lora.up.weight": "before PEFT.*get_peft_model",
    "layers.0.attn.q_proj.lora_a.weight": "torchtune.*save_adapter_weights_only",
    "unet.down_blocks.0.to_q.lora_A.weight": "diffusers'.*lora_alpha",
    "base_model.model.x.lora_A.weight": "without its settings.*adapter_config.json",
    "model.layers.0.weight": "holds no adapter.*lora_A.weight",
}
over_others = pytest.mark.parametrize(("key", "message"), OTHERS.items(), ids=OTHERS)


@over_others
def test_files_of_other_formats_are_named_with_the_next_step(key, message, tmp_path):
    """Beside kohya's factors, as such keys are found, and as a file alone."""
    pair = {key: np.ones((2, 2), "float32")}
    save_file(pair, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        keras_lora.load_adapter(build(), tmp_path / "style.safetensors")


IN_PEFT = [key for key in OTHERS if "lora_A" not in key and not key.startswith("model")]
IN_PEFT += ["x.lora_down.weight", "x.lora_a", "attn_1.to_q.alpha"]


@pytest.mark.parametrize("key", IN_PEFT)
def test_keys_of_other_formats_beside_those_of_peft_are_named(key, tmp_path):
    model = build()
    keras_lora.apply_lora(model, rank=2)
    keras_lora.save_adapter(model, tmp_path)
    tensors = {key: np.ones((2, 2), "float32")}
    for path, (a, b) in factors().items():
        name = f"base_model.model.{path.replace('/', '.')}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"looks like .* format, not like PEFT's"):
        keras_lora.load_adapter(build(), tmp_path)


@pytest.mark.parametrize(
    "written, names",
    [
        (lambda path: "model." + path.replace("/", "."), r'"model\." \+ path'),
        (lambda path: path.replace("/", ".").removeprefix("attn_1."), "removeprefix"),
    ],
    ids=["one more", "one less"],
)
def test_a_prefix_between_a_file_and_a_model_is_named(written, names, tmp_path):
    model = build()
    keras_lora.apply_lora(model, rank=2, target=["attn_1/to_q"])
    keras_lora.save_adapter(model, tmp_path, names=written)
    with pytest.raises(ValueError, match=f"The file's names are.*{names}") as error:
        keras_lora.load_adapter(build(), tmp_path)
    shown = str(error.value).partition("names=")[2].partition(" `names`")[0]
    found = eval(shown.rstrip("."))  # what the error says is what a user writes
    report = keras_lora.load_adapter(build(), tmp_path, names=found)
    assert [row.path for row in report] == ["attn_1/to_q"]


@pytest.mark.parametrize("name", ["adapter_0.pt", "style.ckpt"])
def test_pickles_are_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"a program")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"holds {name}, a pickle.*load.'{name}'"):
            keras_lora.load_adapter(build(), path)
