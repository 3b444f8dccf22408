"""analyze, against NumPy's decomposition of updates that are formed in full."""

import sys

import keras
import numpy as np
import pytest
import torch
from layer_cases import CASES, fill, to_numpy
from peft import LoraConfig, get_peft_model
from pretrained import convolutional, sequential, transformer

import keras_lora
from keras_lora.models.sites import adapted_sites, layers_by_path


def as_matrices(name, kernel):
    """(inputs, outputs), as the equation or the convolution says."""
    if name == "einsum-dense-query":  # c is summed over, d and e are new
        return kernel.reshape(len(kernel), -1)
    if name == "einsum-dense-batch-axis":
        return kernel
    return kernel.reshape(-1, kernel.shape[-1])


def by_numpy(name, kernel):
    values = np.linalg.svd(as_matrices(name, kernel.astype("float64")))[1]
    return np.sort(values.ravel())[::-1]


def assert_values(found, expected):
    """Beyond the rank there is what float32 leaves."""
    noise = 1e-5 * expected[0]
    assert len(found) <= len(expected)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=noise)
    assert (expected[len(found) :] < noise).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_has_numpys_singular_values(case):
    layer = case.trained_layer()
    delta, kernel = (
        to_numpy(x).astype("float64") for x in (layer.lora.delta(), layer.frozen_kernel)
    )
    (row,) = keras_lora.analyze(layer)
    expected = by_numpy(case.name, delta)
    assert_values(row.singular_values, expected)
    assert (row.path, row.rank) == (next(iter(layers_by_path(layer))), layer.lora.rank)
    assert row.norm == pytest.approx(np.sqrt(np.sum(delta**2)), rel=1e-5)
    relative = row.norm / np.sqrt(np.sum(kernel**2))
    assert row.relative_norm == pytest.approx(relative, rel=1e-5)
    for energy in (0.5, 0.9, 0.99):
        needed = next(
            n
            for n in range(1, len(expected) + 1)
            if sum(expected[:n] ** 2) >= energy * sum(expected**2)
        )
        assert row.effective_rank(energy) == needed


def filled(build, **settings):
    model = build()
    keras_lora.apply_lora(model, **{"rank": 3, "alpha": 5, **settings})
    for seed, layer in enumerate(adapted_sites(model)):
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed + 50, 0.3)
    return model


@pytest.mark.parametrize("build", [sequential, convolutional, transformer])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_says_what_its_model_says(build, use_rslora, tmp_path):
    model = filled(build, use_rslora=use_rslora)
    keras_lora.save_adapter(model, tmp_path / "one")
    rows = keras_lora.analyze(model)
    for source in (tmp_path / "one", keras_lora.Adapter.read(tmp_path / "one")):
        found = keras_lora.analyze(source)
        own = {row.path.replace("/", "."): row for row in rows}
        assert {row.path for row in found} == own.keys() and len(found) == len(own)
        for other in found:
            row = own[other.path]
            assert (other.rank, other.relative_norm) == (row.rank, None)
            np.testing.assert_allclose(
                row.singular_values, other.singular_values, rtol=0, atol=1e-6
            )


def test_an_embedding_and_a_merged_dense_layer_from_a_folder(tmp_path):
    layers = [
        keras_lora.LoRAEmbedding(11, 6, rank=2, alpha=3, name="tokens"),
        keras_lora.LoRAMergedDense(12, enable_lora=(True, False, True), name="qkv"),
    ]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), *layers])
    for seed, layer in enumerate(layers):
        fill(layer.lora.a, seed, 0.3)
        fill(layer.lora.b, seed, 0.3)
    keras_lora.save_adapter(model, tmp_path / "one")
    rows = keras_lora.analyze(tmp_path / "one")
    assert [row.path for row in rows] == ["qkv", "tokens"]
    for row in rows:
        delta = to_numpy(model.get_layer(row.path).lora.delta())
        assert_values(row.singular_values, by_numpy("", delta))


def test_slices_of_one_module_have_rows_of_their_own(tmp_path):
    names = {"attention/query": "qkv[0/3]", "attention/value": "qkv[2/3]"}
    model = filled(transformer, target=list(names))
    keras_lora.save_adapter(model, tmp_path / "one", names=names)
    rows = keras_lora.analyze(tmp_path / "one")
    assert [row.path for row in rows] == ["qkv[0/3]", "qkv[2/3]"]
    for row, own in zip(rows, keras_lora.analyze(model), strict=True):
        np.testing.assert_allclose(row.norm, own.norm, rtol=1e-5)


def test_a_folder_of_pefts(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(6, 5)

    model = get_peft_model(Model(), LoraConfig(target_modules=["one"], r=3))
    torch.nn.init.normal_(model.base_model.model.one.lora_B.default.weight)
    model.save_pretrained(tmp_path)
    delta = model.base_model.model.one.get_delta_weight("default").detach().numpy()
    (row,) = keras_lora.analyze(tmp_path)
    assert row.path == "one"
    assert_values(row.singular_values, by_numpy("", delta))


def test_of_dora_it_is_the_update_without_the_lengths(tmp_path):
    model = filled(sequential, use_dora=True)
    keras_lora.save_adapter(model, tmp_path / "one")
    for source in (model, tmp_path / "one"):
        found = keras_lora.analyze(source)
        assert "without the magnitudes m" in str(found)
        for row in found:
            delta = to_numpy(model.get_layer(row.path).lora.delta())
            assert_values(row.singular_values, by_numpy("", delta))
    assert not keras_lora.analyze(filled(sequential)).notes


def test_a_start_is_subtracted(tmp_path):
    model = sequential()
    keras_lora.apply_lora(model, rank=2)
    keras_lora.initialize_lora(model, "pissa")
    assert [row.norm for row in keras_lora.analyze(model)] == [0, 0]
    assert [row.effective_rank() for row in keras_lora.analyze(model)] == [0, 0]
    for seed, layer in enumerate(adapted_sites(model)):
        layer.lora.b.assign(layer.lora.b + np.float32(0.1) * (seed + 1))
    keras_lora.save_adapter(model, tmp_path / "one")
    for source in (model, tmp_path / "one"):
        for row in keras_lora.analyze(source):
            delta = to_numpy(model.get_layer(row.path).lora.delta())
            assert_values(row.singular_values, by_numpy("", delta))


def test_rows_of_a_file_are_counted_as_people_count():
    values = np.ones((1, 1), "float32")
    modules = [f"h.{number}.up" for number in (10, 9, 0, 100)]
    tensors = {f"{m}.lora_{x}.weight": values for m in modules for x in "AB"}
    config = {"peft_type": "LORA", "target_modules": modules, "r": 1}
    rows = keras_lora.analyze(keras_lora.Adapter(tensors, config))
    assert [row.path for row in rows] == ["h.0.up", "h.9.up", "h.10.up", "h.100.up"]


def test_what_a_file_has_in_a_layers_own_form_is_refused(tmp_path):
    for case in CASES:
        if case.name in ("einsum-dense-batch-axis", "conv2d-loralib"):
            model = case.model()
            keras_lora.save_adapter(model, tmp_path / case.name)
            for call in (
                lambda x: keras_lora.analyze(x),
                lambda x: keras_lora.combine_adapters([x]),
            ):
                with pytest.raises(ValueError, match="Load the adapter into its model"):
                    call(tmp_path / case.name)


def test_bad_input_to_analyze():
    model = filled(sequential)
    for source in (7, None, [model]):
        with pytest.raises(ValueError, match="a model, an Adapter or a folder"):
            keras_lora.analyze(source)
    with pytest.raises(OSError):
        keras_lora.analyze("nowhere")
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        keras_lora.analyze(sequential())
    with keras_lora.disabled(model), pytest.raises(ValueError, match="Leave that"):
        keras_lora.analyze(model)
    adapted_sites(model)[1].lora.a.assign(adapted_sites(model)[1].lora.a * np.nan)
    with pytest.raises(ValueError, match="'dense' holds values that are not finite"):
        keras_lora.analyze(model)


def test_table_and_html():
    model = filled(sequential)
    found = keras_lora.analyze(model)
    first = next(line for line in str(found).splitlines() if line.startswith("first "))
    row = found[0]
    assert first.split() == [
        "first",
        "3",
        f"{row.norm:.4g}",
        f"{row.relative_norm:.4g}",
        f"{row.singular_values[0]:.4g}",
        str(row.effective_rank(0.9)),
        str(row.effective_rank(0.99)),
    ]
    assert "<td>first</td>" in found._repr_html_()
    assert "2 rows" in repr(found)


def test_names_of_files_are_shown_and_do_nothing():
    name = "<b>\x1b[31mx</b>"
    rows = [keras_lora.analyze(filled(sequential))[0]._replace(path=name)]
    from keras_lora.files.analyze import Analysis

    shown = Analysis("two", rows)
    assert r"<b>\x1b[31mx</b>" in str(shown)
    assert r"&lt;b&gt;\x1b[31mx&lt;/b&gt;" in shown._repr_html_()


def test_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a: (drawn.append(self), savefig(self, *a))
    )
    model = filled(transformer)
    found = keras_lora.analyze(model)
    found.plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    norms, spectra, _ = drawn[0].axes
    np.testing.assert_allclose(
        [bar.get_width() for bar in norms.patches], [r.relative_norm for r in found]
    )
    assert [text.get_text() for text in norms.get_yticklabels()] == [
        row.path for row in found
    ]
    image = np.ma.filled(spectra.images[0].get_array(), np.nan)
    for pixels, row in zip(image, found, strict=True):
        values = row.singular_values
        np.testing.assert_allclose(pixels[: len(values)], values / values[0])
    keras_lora.save_adapter(model, tmp_path / "adapter")
    keras_lora.analyze(tmp_path / "adapter").plot(tmp_path / "two.svg")
    assert "<svg" in (tmp_path / "two.svg").read_text()
    with pytest.raises(ValueError, match="supported"):
        found.plot(tmp_path / "one.docx")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "one.png",
        "two.svg",
    ]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        keras_lora.analyze(filled(sequential)).plot(tmp_path / "one.png")


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_cut_to_what_the_spectrum_needs(energy, tmp_path):
    model = filled(transformer)
    updates = {
        path.replace("/", "."): to_numpy(layer.lora.delta()).astype("float64")
        for path, layer in layers_by_path(model).items()
        if getattr(layer, "lora", None) is not None
    }
    keras_lora.save_adapter(model, tmp_path / "one")
    small = keras_lora.combine_adapters([tmp_path / "one"], energy=energy)
    plain = transformer()
    keras_lora.load_adapter(plain, small)
    ranks = set()
    for row in keras_lora.summary(plain):
        module = row.path.replace("/", ".")
        # An output projection sums over two axes: heads and their size.
        axes = 2 if module.endswith("attention_output") else 1
        shape = updates[module].shape
        matrix = updates[module].reshape(np.prod(shape[:axes]), -1)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        shares = np.cumsum(values**2) / np.sum(values**2)
        needed = int(np.argmax(shares >= energy)) + 1
        assert row.rank == needed
        ranks.add(needed)
        best = ((left[:, :needed] * values[:needed]) @ right[:needed]).reshape(shape)
        np.testing.assert_allclose(
            to_numpy(row.layer.lora.delta()), best, rtol=0, atol=1e-6
        )
        error = np.sqrt(max(0, 1 - shares[needed - 1]))
        assert (module in small.errors) == (needed < 3)
        assert small.errors.get(module, 0) == pytest.approx(error, abs=1e-6)
    assert max(ranks) == {0.5: 1, 0.9: 2, 0.999: 3}[energy]


def test_a_rank_above_a_layers_is_cut_without_loss(tmp_path):
    model = filled(sequential, rank=9)
    keras_lora.save_adapter(model, tmp_path / "one")
    for options in ({"rank": 7}, {"energy": 1}):
        small = keras_lora.combine_adapters([tmp_path / "one"], **options)
        plain = sequential()
        keras_lora.load_adapter(plain, small)
        for layer, other in zip(
            adapted_sites(model), adapted_sites(plain), strict=True
        ):
            assert other.lora.rank == min(layer.kernel.shape)
            np.testing.assert_allclose(
                to_numpy(other.lora.delta()),
                to_numpy(layer.lora.delta()),
                rtol=0,
                atol=1e-5,
            )


def test_bad_energy(tmp_path):
    keras_lora.save_adapter(filled(sequential), tmp_path)
    for energy in (0, -1, 1.1, float("nan"), "0.9", True):
        with pytest.raises(ValueError, match=r"in \(0, 1\].*energy="):
            keras_lora.combine_adapters([tmp_path], energy=energy)
    with pytest.raises(ValueError, match="cannot be used together"):
        keras_lora.combine_adapters([tmp_path], rank=2, energy=0.9)
