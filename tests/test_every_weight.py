"""Weights of layers whose call is not one product: W + delta takes their place."""

import sys
import threading

import keras
import numpy as np
import pytest
from backbones import backbone
from gradients import gradients
from keras import ops
from layer_cases import ON_TORCH, fill, slow_but, to_numpy
from shared import assert_close, assert_equal_bits
from test_gradient_sizes import formed, training_step

import keras_lora
from keras_lora.layers import kinds
from keras_lora.models.sites import adapted_sites, layers_by_path

L = keras.layers


@keras.saving.register_keras_serializable(package="tests")
class Own(L.Layer):
    """A matrix, a stack, a list, a dict, a bias of two axes, and a counter."""

    def build(self, input_shape):
        width = input_shape[-1]
        self.matrix = self.add_weight(shape=(width, 5), name="matrix")
        self.stack = self.add_weight(shape=(2, 5, 4), name="stack")
        self.row = self.add_weight(shape=(1, 4), name="row_bias")
        self.listed = [self.add_weight(shape=(4, 4), name=f"listed{n}") for n in (0, 1)]
        self.held = {"w": self.add_weight(shape=(4, 3), name="held")}
        self.calls = 0
        self.built = True

    def call(self, inputs):
        self.calls += 1
        hidden = keras.ops.matmul(inputs, self.matrix)
        hidden = keras.ops.einsum("bi,eio->bo", hidden, self.stack) + self.row
        for weight in self.listed:
            hidden = keras.ops.tanh(keras.ops.matmul(hidden, weight))
        self.add_loss(keras.ops.sum(hidden))
        return keras.ops.matmul(hidden, self.held["w"])

    def numpy(self, inputs, values):
        hidden = inputs.astype("float64") @ values["matrix"]
        hidden = np.einsum("bi,eio->bo", hidden, values["stack"]) + values["row_bias"]
        for name in ("listed0", "listed1"):
            hidden = np.tanh(hidden @ values[name])
        return hidden @ values["held"]


NAMES = ["matrix", "stack", "listed0", "listed1", "held"]


def own_model(name="own"):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.Input((6,)), Own(name=name), L.Dense(2, name="head")]
    )


def rows(count=3):
    return np.random.default_rng(4).standard_normal((count, 6)).astype("float32")


def values_of(layer):
    """In float64, by the names of the variables."""
    return {v.name: to_numpy(v).astype("float64") for v in layer.weights}


def delta(lora, shape):
    """scaling * A @ B, for matrices and stacks of them."""
    a, b = (to_numpy(x).astype("float64") for x in (lora.a, lora.b))
    return (lora.scaling * a @ b).reshape(shape)


def filled(model, scale=0.4):
    for seed, site in enumerate(adapted_sites(model)):
        fill(site.lora.a, 2 * seed, scale)
        fill(site.lora.b, 2 * seed + 1, scale)


def test_every_weight_of_a_users_own_layer():
    model, x = own_model(), rows()
    before, outputs = values_of(model.layers[0]), to_numpy(model(x))
    report = keras_lora.apply_lora(model, rank=2, alpha=3, target=["own"])
    assert [(row.path, row.weight) for row in report] == [
        (f"own/{name}", name) for name in NAMES
    ]
    layer = model.layers[0]
    assert isinstance(layer, Own)
    assert list(layer.loras) == NAMES
    stack = layer.loras["stack"]  # a pair for each matrix of it
    assert (tuple(stack.a.shape), tuple(stack.b.shape)) == ((2, 5, 2), (2, 2, 4))
    assert_equal_bits(model(x), outputs)
    filled(model)
    tuned = dict(before)
    for name, lora in layer.loras.items():
        tuned[name] = before[name] + delta(lora, before[name].shape)
    expected = layer.numpy(x, tuned)
    for training in (True, False):
        assert_close(layer(x, training=training), expected)
    with keras_lora.disabled(model):
        assert_equal_bits(model(x), outputs)
    merged = to_numpy(model(x))
    trained = to_numpy(stack.b)
    with keras_lora.merged(model):
        stack.b.assign(stack.b * 0)  # what stands in for it is fixed
        assert_close(model(x), merged, 1e-6)
    stack.b.assign(trained)
    keras_lora.merge_lora(model)
    assert type(layer) is Own
    assert_close(layer(x), expected)
    assert [v.name for v in layer.trainable_weights] == list(before)


def test_what_a_call_sets_and_adds_stays():
    model, x = own_model(), rows()
    keras_lora.apply_lora(model, rank=1, target=["own"])
    layer = model.layers[0]
    calls = layer.calls
    for _ in range(3):
        layer(x)
    assert layer.calls == calls + 3
    assert len(layer.losses) == 1


def test_files_of_a_users_own_layer(tmp_path):
    model, x = own_model(), rows()
    keras_lora.apply_lora(model, rank=2, target=["own/stack", "own/listed1"])
    filled(model)
    expected = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_equal_bits(loaded(x), expected)
    assert list(loaded.layers[0].loras) == ["stack", "listed1"]
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = own_model()
    report = keras_lora.load_adapter(plain, tmp_path / "adapter")
    assert [row.path for row in report] == ["own/stack", "own/listed1"]
    assert_equal_bits(plain(x), expected)
    keras_lora.remove_lora(plain)
    assert_equal_bits(plain(x), own_model()(x))


def test_one_adapted_weight_is_the_layers_adapter():
    model = own_model()
    keras_lora.apply_lora(model, target=["own/matrix"])
    layer = model.layers[0]
    assert layer.lora is layer.loras["matrix"]
    model = own_model()
    keras_lora.apply_lora(model, target=["own"])
    with pytest.raises(AttributeError, match=r"matrix, stack, .*`layer\.loras`"):
        _ = model.layers[0].lora
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.layers[0].nothing


def test_weights_that_stand_elsewhere_are_found_again():
    model, x = own_model(), rows()
    keras_lora.apply_lora(model, rank=2, target=["own"])
    filled(model)
    layer = model.layers[0]
    layer(x)  # and remembers where its weights stand
    vars(layer)["listed"] = layer.listed[::-1]
    values = values_of(layer)
    for name, lora in layer.loras.items():
        values[name] = values[name] + delta(lora, values[name].shape)
    values["listed0"], values["listed1"] = values["listed1"], values["listed0"]
    assert_close(layer(x), layer.numpy(x, values))


class Names(L.Layer):
    """Reads one weight under three names."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(6, 6), name="w")
        self.other, self.both = self.w, {"again": [self.w]}

    def call(self, inputs):
        hidden = ops.matmul(ops.matmul(inputs, self.w), self.other)
        return ops.matmul(hidden, self.both["again"][0])


def test_one_weight_at_several_places():
    """W + delta at each of them, as a plain layer with W + delta computes."""
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype("float32")
    cell = L.GRUCell(6)
    stacked = L.RNN([cell, cell], name="stacked")
    model = keras.Sequential([keras.Input((4, 6)), Names(name="names"), stacked])
    before = to_numpy(model(x))
    report = keras_lora.apply_lora(model, rank=2, target=["names", "stacked"])
    assert [row.path for row in report] == [
        "names",
        "stacked/cells/0/kernel",
        "stacked/cells/0/recurrent_kernel",
    ]
    sites = adapted_sites(model)
    for seed, site in enumerate(sites):
        fill(site.lora.b, seed, 0.3)
    found = to_numpy(model(x))
    deltas = [(site.frozen_kernel, to_numpy(site.lora.delta())) for site in sites]
    keras_lora.remove_lora(model)
    assert_equal_bits(model(x), before)
    for kernel, delta in deltas:
        kernel.assign(to_numpy(kernel) + delta)
    assert_close(found, model(x), 1e-5)


def test_a_weight_of_several_layers_is_refused():
    cell = L.GRUCell(6)
    model = keras.Sequential(
        [
            keras.Input((4, 6)),
            L.RNN(cell, return_sequences=True, name="one"),
            L.RNN(cell, return_sequences=True, name="two"),
            L.Dense(6, name="dense"),
            L.Dense(6, name="head"),
        ]
    )
    with pytest.raises(ValueError, match="two/kernel has the same weight"):
        keras_lora.apply_lora(model, target=["one"])
    assert type(model.layers[0]) is L.RNN
    report = keras_lora.apply_lora(model, rank=2)
    assert [row.path for row in report] == ["dense"]
    assert "one/kernel has the same weight" in report.skipped["two/kernel"]


class Reader(L.Layer):
    """A layer of a user's, whose call reads its first weight in some way."""

    def __init__(self, read):
        super().__init__(name="reader")
        self.read = read

    def build(self, shape):
        self.first = self.add_weight(shape=(shape[-1], shape[-1]), name="first")
        self.second = self.add_weight(shape=(shape[-1], shape[-1]), name="second")

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.read(self))


def adapted_reader(read):
    model = keras.Sequential([keras.Input((3,)), Reader(read), L.Dense(1)])
    keras_lora.apply_lora(model, rank=2, target=["reader/first"])
    return model


@pytest.mark.parametrize("name", ["value", "path", "assign"])
def test_an_attribute_that_only_variables_have_is_refused_by_name(name):
    model = adapted_reader(lambda layer: (getattr(layer.first, name), layer.first)[1])
    with pytest.raises(ValueError, match=f"`.{name}` of its weight 'first'.*exclude="):
        model(np.ones((2, 3)))


@pytest.mark.parametrize(
    "name", ["weights", "trainable_weights", "variables", "trainable_variables"]
)
def test_a_call_that_reads_its_list_of_weights_warns(name):
    model = adapted_reader(lambda layer: (getattr(layer, name), layer.first)[1])
    with pytest.warns(UserWarning, match="call of 'reader' reads its list of weights"):
        model(np.ones((2, 3)))
    assert len(model.get_layer("reader").weights) == 4  # outside of calls


def test_other_errors_of_a_call_stay_what_they_are():
    model = adapted_reader(lambda layer: layer.first)
    model.get_layer("reader").read = lambda layer: layer.nothing
    with pytest.raises(AttributeError, match="nothing"):
        model(np.ones((2, 3)))


@pytest.mark.parametrize("target", [["cell"], ["gate/cell"], "gate/cell"])
def test_a_cell_as_a_target_is_told_the_paths_of_its_weights(target):
    layers = [keras.Input((4, 3)), L.GRU(2, name="gate"), L.Dense(1, name="d")]
    model = keras.Sequential(layers)
    message = "'gate/cell', .*name gate/kernel, gate/recurrent_kernel"
    with pytest.raises(ValueError, match=message):
        keras_lora.apply_lora(model, target=target)


@pytest.mark.parametrize(
    "target", [["gate/kernel"], ["gate/kernel", "d"], "gate/kernel", ["kernel"]]
)
def test_a_weight_as_a_target_in_a_layer_that_trains_is_refused(target):
    layers = [keras.Input((4, 3)), L.GRU(2, name="gate"), L.Dense(1, name="d")]
    model = keras.Sequential(layers)
    message = "names gate/kernel, and `also_train` names the layer"
    with pytest.raises(ValueError, match=message):
        keras_lora.apply_lora(model, target=target, also_train=["gate"])


class ReadsOutside(L.Layer):
    """Has a function that holds the layer, and a weight that stands in an object."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(6, 6), name="w")
        self.hidden = lambda x: ops.matmul(x, self.w)
        self.object = threading.Event()  # any object
        self.object.w = self.add_weight(shape=(6, 6), name="held")

    def call(self, inputs):
        return ops.matmul(self.hidden(inputs), self.object.w)


def test_reads_past_an_adapter_are_warned_of():
    model = keras.Sequential(
        [keras.Input((6,)), ReadsOutside(name="own"), L.Dense(2, name="head")]
    )
    x = np.ones((2, 6), "float32")
    report = keras_lora.apply_lora(model, rank=2, target="all")
    assert [row.path for row in report] == ["own"]
    assert "in no attribute, list or dict" in report.skipped["own/held"]
    with pytest.warns(UserWarning, match="reads the kernel of 'own'"):
        model(x)
    keras_lora.merge_lora(model)
    model(x)  # without a warning, which would be an error


def test_registered_axes():
    class Turned(L.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(5, 3, input_shape[-1]), name="w")

        def call(self, inputs):
            return keras.ops.einsum("bi,oni->bon", inputs, self.w)

    for axes, shapes in (
        ((2,), ((6, 2), (2, 5, 3))),
        ({"input_axes": (2,), "batch_axes": (1,)}, ((3, 6, 2), (3, 2, 5))),
    ):
        keras_lora.register_lora_layer(Turned, weights={"w": axes})
        model = keras.Sequential(
            [keras.Input((6,)), Turned(name="turned"), L.Flatten()]
        )
        keras_lora.apply_lora(model, rank=2, target=["turned"])
        lora = model.layers[0].lora
        assert (tuple(lora.a.shape), tuple(lora.b.shape)) == shapes
        filled(model)
        a, b = (to_numpy(x).astype("float64") for x in (lora.a, lora.b))
        equation = "ir,ron->oni" if len(a.shape) == 2 else "nir,nro->oni"
        kernel = to_numpy(model.layers[0].w) + np.einsum(equation, a, b)
        x = rows()
        expected = np.einsum("bi,oni->bon", x.astype("float64"), kernel)
        assert_close(model.layers[0](x), expected)
    for wrong in ((), (0, 0), (-1,), {"inputs": (0,)}, {"batch_axes": (0,)}, "ab"):
        with pytest.raises(ValueError, match="axes of 'w' must be"):
            keras_lora.register_lora_layer(Turned, weights={"w": wrong})
    del kinds.AXES[Turned]


def recurrent_model():
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4, 6))
    hidden = L.Bidirectional(L.LSTM(3, return_sequences=True), name="both")(inputs)
    cells = [L.SimpleRNNCell(4), L.GRUCell(3)]
    hidden = L.RNN(cells, return_sequences=True, name="stack")(hidden)
    hidden = L.TimeDistributed(L.Dense(4), name="each")(hidden)
    hidden = L.GRU(3, name="gru")(hidden)
    return keras.Model(inputs, L.Dense(2, name="head")(hidden))


def test_a_rule_for_a_layer_means_the_weights_of_what_it_runs():
    def paths(target, **more):
        model = recurrent_model()
        return [row.path for row in keras_lora.apply_lora(model, target=target, **more)]

    gates = ["kernel", "recurrent_kernel"]
    both = [
        f"both/{way}_layer/{gate}" for way in ("forward", "backward") for gate in gates
    ]
    cells = [f"stack/cells/{place}/{gate}" for place in (0, 1) for gate in gates]
    assert paths(["both"]) == both
    assert paths("stack") == cells
    assert paths(["each"]) == ["each/layer"]
    assert paths(L.GRU) == ["gru/kernel", "gru/recurrent_kernel"]
    assert paths(["gru/recurrent_kernel"]) == ["gru/recurrent_kernel"]
    assert paths(".*/recurrent_kernel")[-1] == "gru/recurrent_kernel"
    assert paths(["gru", "both"], exclude=["both", "gru/kernel"]) == [
        "gru/recurrent_kernel"
    ]
    assert (
        paths("all")
        == paths("all-linear")
        == [*both, *cells, "each/layer", *(f"gru/{gate}" for gate in gates)]
    )
    report = keras_lora.apply_lora(
        recurrent_model(),
        rank=2,
        target=["gru", "both"],
        rank_pattern={"gru": 3, "both/.*/kernel": 1},
    )
    assert [row.rank for row in report] == [1, 2, 1, 2, 3, 3]


def test_a_layer_whose_wrapper_calls_itself_is_adapted():
    """TimeDistributed runs the call of the layer inside, and not the layer."""
    model = keras.Sequential(
        [
            keras.Input((2, 5, 3)),
            L.TimeDistributed(L.LSTM(4, name="inner"), name="each"),
            L.Dense(2),
        ]
    )
    x = np.random.default_rng(1).standard_normal((3, 2, 5, 3)).astype("float32")
    before = to_numpy(model(x))  # the cell is called by it, and the layer is not
    report = keras_lora.apply_lora(model, rank=2)
    assert [row.path for row in report] == [
        f"each/inner/{name}" for name in ("kernel", "recurrent_kernel")
    ]
    assert not report.skipped
    filled(model)
    expected = to_numpy(model(x))
    assert np.abs(expected - before).max() > 1e-3
    keras_lora.merge_lora(model)
    assert_close(model(x), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:.*support masking")  # the coming Keras's own
def test_masks_states_and_sequences():
    keras.utils.set_random_seed(6)
    layer = L.LSTM(3, return_sequences=True, return_state=True)
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype("float32")
    mask = np.arange(5) < np.array([[3], [5]])
    layer(x)
    keras_lora.apply_lora(layer, rank=2)
    for seed, lora in enumerate(layer.loras.values()):
        fill(lora.b, seed)
    found = layer(x, mask=mask)
    assert_equal_bits(found[0][0, 3], found[0][0, 2])  # nothing is read any more
    keras_lora.merge_lora(layer)
    for one, other in zip(found, layer(x, mask=mask), strict=True):
        assert_close(one, other, 1e-6)


def real(x):
    """As a function of a backend takes it, which knows no tensors of Keras's."""
    if isinstance(x, keras.KerasTensor):
        raise TypeError("This is a symbolic tensor.")
    return x


def twice(x):
    return keras.ops.tanh(2 * real(x))


@keras.saving.register_keras_serializable(package="tests")
class OtherCell(L.SimpleRNNCell):
    """A cell of a user's, whose call takes no symbolic kernel."""

    def call(self, inputs, states, training=False):
        hidden = keras.ops.matmul(inputs, real(self.kernel))
        state = hidden + keras.ops.matmul(states[0], real(self.recurrent_kernel))
        return state, [state]


RECURRENT = {
    "simple": lambda: [L.SimpleRNN(3)],
    "lstm": lambda: [L.LSTM(3)],
    "gru": lambda: [L.GRU(3)],
    "mask": lambda: [L.Masking(), L.LSTM(3)],
    "both": lambda: [L.Bidirectional(L.LSTM(3))],
    "stack": lambda: [L.RNN([L.LSTMCell(3), L.GRUCell(3, reset_after=False)])],
    "slices": lambda: [L.LSTM(3, implementation=1)],
    "no bias": lambda: [L.LSTM(3, use_bias=False, go_backwards=True)],
    "dropout": lambda: [L.SimpleRNN(3, dropout=0.5, recurrent_dropout=0.5)],
    "function": lambda: [L.LSTM(3, activation=twice)],
    "own cell": lambda: [L.RNN(OtherCell(3))],
    "DoRA": lambda: [L.GRU(3)],
}


@pytest.mark.skipif(ON_TORCH, reason="torch compiles no loop")
@pytest.mark.filterwarnings("ignore:.*support masking")  # the coming Keras's own
@pytest.mark.parametrize(
    "name", slow_but(RECURRENT.keys() - {"simple", "gru", "both", "slices"}, RECURRENT)
)
def test_compiled_loops_have_the_eager_gradients(name):
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((5, 4)), *RECURRENT[name](), L.Dense(2)])
    keras_lora.apply_lora(model, rank=2, use_dora=name == "DoRA")
    for seed, factor in enumerate(model.trainable_variables):
        fill(factor, seed, 0.5)
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype("float32")
    x[0, 3:] = 0

    def found(compiled):
        for variable in model.non_trainable_variables:
            if "seed" in variable.path:
                variable.assign([1, 2])
        return gradients(model, x, np.ones((2, 2), "float32"), compiled=compiled)

    for one, other in zip(found(True), found(False), strict=True):
        assert np.abs(other).max() > 0
        assert_close(one, other, 1e-5)


def lstm_of_cudnn(inputs, h, c, kernel, recurrent, bias, *_):
    """What Keras's function of this name returns, by plain TensorFlow."""
    for x in ops.unstack(inputs, axis=1):
        i, f, g, o = ops.split(x @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
    return h, h[:, None], [h, c]


def gru_of_cudnn(inputs, states, kernel, recurrent, bias, *_):
    h = states[0] if isinstance(states, (list, tuple)) else states
    for x in ops.unstack(inputs, axis=1):
        z, r, g = ops.split(x @ kernel + bias[0], 3, axis=-1)
        more = ops.split(h @ recurrent + bias[1], 3, axis=-1)
        z, r = ops.sigmoid(z + more[0]), ops.sigmoid(r + more[1])
        h = z * h + (1 - z) * ops.tanh(g + r * more[2])
    return h, h[:, None], [h]


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow's layers use cuDNN"
)
@pytest.mark.parametrize("kind, function", [("LSTM", "lstm"), ("GRU", "gru")])
def test_cudnn_gets_w_plus_delta_where_the_plain_layer_uses_it(
    kind, function, monkeypatch
):
    rnn = sys.modules["keras.src.backend.tensorflow.rnn"]
    model = keras.Sequential([keras.Input((5, 4)), getattr(L, kind)(3), L.Dense(2)])
    plain = keras.models.clone_model(model)
    keras_lora.apply_lora(model, rank=2)
    for seed, factor in enumerate(model.trainable_variables):
        fill(factor, seed, 0.5)
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype("float32")

    def found(compiled):
        return gradients(model, x, np.ones((2, 2), "float32"), compiled=compiled)

    expected, outputs, calls = found(False), to_numpy(model(x)), []

    def counted(*args):
        calls.append(args)
        return globals()[f"{function}_of_cudnn"](*args)

    monkeypatch.setattr(rnn, "_is_gpu_available", lambda: True)
    monkeypatch.setattr(rnn, f"_cudnn_{function}", counted)
    plain(x)
    assert len(calls) == 1
    assert_close(model(x), outputs, 1e-6)
    for compiled in (False, True):
        for one, other in zip(found(compiled), expected, strict=True):
            assert_close(one, other, 1e-5)
    assert len(calls) == 4


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="reads TensorFlow's graphs"
)
def test_what_a_step_of_a_cell_cannot_do_gets_whole_kernels():
    """A method of its own, half precision, an activation that wants real tensors."""
    for settings, words, low_rank in (
        ({}, {}, True),
        ({"activation": twice}, {}, False),
        ({"dtype": "mixed_bfloat16"}, {}, False),
        ({}, {"use_dora": True}, False),
    ):
        layer = keras_lora.LoRAGRU(7, rank=3, unroll=True, **settings, **words)
        inputs = np.ones((2, 5, 11), "float32")
        layer(inputs)
        operations = formed(list(training_step(layer, inputs)), 7 * 3 * 7)
        assert any(op.of_inputs for op in operations) != low_rank


def test_a_stateful_layer_goes_on_where_it_was():
    layer = L.GRU(3, stateful=True)
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype("float32")
    layer(x)
    keras_lora.apply_lora(layer, rank=2)
    for seed, lora in enumerate(layer.loras.values()):
        fill(lora.b, seed)
    layer.reset_state()
    found = [to_numpy(layer(x)) for _ in range(2)]
    assert np.abs(found[0] - found[1]).max() > 1e-3
    keras_lora.merge_lora(layer)
    layer.reset_state()
    for outputs in found:
        assert_close(layer(x), outputs, 1e-6)


def test_frozen_kernels_stay_frozen_and_biases_follow_their_flag(tmp_path):
    model = recurrent_model()
    keras_lora.apply_lora(model, bias="none")
    assert not [v.path for v in model.trainable_weights if "bias" in v.name]
    model.trainable = False
    model.trainable = True
    model.layers[-2].trainable = False
    model.layers[-2].trainable = True
    frozen = [to_numpy(site.frozen_kernel) for site in adapted_sites(model)]
    model.compile("adam", "mse", run_eagerly=True)
    x = np.random.default_rng(1).standard_normal((4, 4, 6)).astype("float32")
    model.fit(x, np.ones((4, 2)), epochs=2, verbose=0)
    for site, kernel in zip(adapted_sites(model), frozen, strict=True):
        assert_equal_bits(site.frozen_kernel, kernel)
    model = recurrent_model()
    keras_lora.apply_lora(model, bias="lora_only")
    flags = {v.path: v.trainable for v in model.weights}
    assert sum("bias" in path for path, flag in flags.items() if flag) == 6
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.trainable for v in loaded.weights] == list(flags.values())


EXPERTS = {
    "MixtralBackbone": 3,
    "QwenMoeBackbone": 2,
    "Qwen3MoeBackbone": 2,
    "Qwen3_5MoeBackbone": 2,
    "GptOssBackbone": 2,
    "Gemma4Backbone": 3,
}


@pytest.mark.parametrize("name", ["MixtralBackbone", "GptOssBackbone"])
def test_banks_of_experts(name):
    model = backbone(name)
    x = {"token_ids": np.arange(1, 13).reshape(2, 6), "padding_mask": np.ones((2, 6))}
    x = {key: value.astype("int32") for key, value in x.items()}
    before = to_numpy(model(x))
    report = keras_lora.apply_lora(model)  # "all-linear" means no experts
    experts = [path for path in report.skipped if "/experts/" in path]
    assert len(experts) == 2 * EXPERTS[name]
    assert all('target="all"' in report.skipped[path] for path in experts)
    keras_lora.remove_lora(model)
    report = keras_lora.apply_lora(model, rank=2, target=["experts"])
    assert [row.path for row in report] == experts
    assert_equal_bits(model(x), before)
    for seed, row in enumerate(report):
        lora = row.layer.loras[row.weight]
        assert (lora.a.shape[0], lora.a.shape[-1]) == (lora.b.shape[0], 2)
        fill(lora.b, seed, 0.1)
    tuned = to_numpy(model(x))
    assert np.abs(tuned - before).max() > 1e-3
    row = report[0]
    kernel = {v.name: v for v in row.layer.weights}[row.weight]
    merged = to_numpy(kernel) + delta(row.layer.loras[row.weight], kernel.shape)
    keras_lora.merge_lora(model)
    assert_close(kernel, merged, 1e-6)
    assert_close(model(x), tuned, 1e-6)


def test_paths_stay_whatever_a_layer_is_called(tmp_path):
    model = backbone("MixtralBackbone")  # whose banks are called as a class of ours
    before = layers_by_path(model)
    keras_lora.apply_lora(model, rank=2, target="all")
    after = {id(layer): path for path, layer in layers_by_path(model).items()}
    assert [after[id(layer)] for layer in before.values()] == list(before)
    for seed, site in enumerate(adapted_sites(model)):
        fill(site.lora.b, seed, 0.1)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    other = backbone("MixtralBackbone")
    keras_lora.load_adapter(other, tmp_path / "adapter")
    for one, two in zip(adapted_sites(model), adapted_sites(other), strict=True):
        assert_equal_bits(two.lora.delta(), one.lora.delta())


def test_what_cannot_be_says_why():
    class Bound(L.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(
                shape=(input_shape[-1], 3), name="w", constraint="non_neg"
            )

        def call(self, inputs):
            return keras.ops.matmul(inputs, self.w)

    model = keras.Sequential([keras.Input((6,)), Bound(name="bound")])
    with pytest.raises(ValueError, match=r"w_constraint.*cannot be kept"):
        keras_lora.apply_lora(model, target=["bound"])
    for kind, argument in (
        (keras_lora.LoRALSTM, "recurrent_constraint"),
        (keras_lora.LoRADepthwiseConv2D, "depthwise_constraint"),
    ):
        with pytest.raises(ValueError, match=f"`{argument}`"):
            kind(3, **{argument: "non_neg"})
    with pytest.raises(ValueError, match="no inputs that could be dropped"):
        keras_lora.LoRAConv2DTranspose(3, 2, dropout=0.1)
    assert keras_lora.LoRAGRU(3, dropout=0.25).dropout == 0.25
    model = recurrent_model()
    with pytest.raises(ValueError, match="bank cannot hold adapters of 'gru/kernel'"):
        keras_lora.AdapterBank(model, target=["gru"])
    keras_lora.apply_lora(model, target=["gru"], rank=2)
    data = [np.zeros((2, 4, 6), "float32")]
    with pytest.raises(ValueError, match="'eva' does not support 'gru/kernel'"):
        keras_lora.initialize_lora(model, "eva", data)
    before = to_numpy(model(data[0] + 1))
    keras_lora.initialize_lora(model, "pissa")
    assert_close(model(data[0] + 1), before, 1e-6)


def test_registered_axes_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(kinds, "AXES", {})
    for weights in ({}, ["w"], {"w": None}, {"w": (-1,)}, {"w": {"batch_axes": (0,)}}):
        with pytest.raises(ValueError, match="must be a"):
            keras_lora.register_lora_layer(Names, weights=weights)
    for known in (L.Dense, L.LSTM, keras_lora.LoRADense, keras.Model):
        with pytest.raises(ValueError, match="cannot be chosen"):
            keras_lora.register_lora_layer(known, weights={"kernel": (1,)})

    def adapt(weights):
        keras_lora.register_lora_layer(Names, weights=weights)
        model = keras.Sequential([keras.Input((6,)), Names(name="names")])
        return keras_lora.apply_lora(model, rank=2, target=["names"])

    with pytest.raises(ValueError, match=r"shape is \(6, 6\)"):
        adapt({"w": (2,)})
    with pytest.warns(UserWarning, match="names 'typo' of Names"):
        adapt({"w": (0,), "typo": (0,)})
    kinds.substituted_class.cache_clear()


@pytest.mark.parametrize("both", [True, False])
def test_an_untied_head(both, tmp_path):
    def build():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((5,), dtype="int32")
        table = L.ReversibleEmbedding(9, 4, tie_weights=False, name="table")
        return keras.Model(inputs, table(table(inputs), reverse=True))

    x = np.array([[1, 2, 8, 0, 3]])
    model, before = build(), to_numpy(build()(x))
    target = ["table/reverse_embeddings", *(["table"] if both else [])]
    report = keras_lora.apply_lora(model, rank=2, target=target, dropout=0.1)
    assert sorted(row.path for row in report) == sorted(
        ["table/reverse_embeddings", "table"] if both else target
    )
    assert any(note.startswith("No dropout: ") for note in report.notes)
    assert_equal_bits(model(x), before)
    layer = model.get_layer("table")
    head = layer.loras["reverse_embeddings"]
    fill(head.b, 1)
    if both:
        fill(layer.lora.a, 2)
    tuned = to_numpy(model(x))
    table, kernel = to_numpy(layer.embeddings), to_numpy(layer.reverse_embeddings)
    if both:
        table = table + delta(layer.lora, table.shape)
    assert_close(tuned, table[x] @ (kernel + delta(head, kernel.shape)))
    model.save(tmp_path / "model.keras")
    assert_equal_bits(keras.models.load_model(tmp_path / "model.keras")(x), tuned)
    keras_lora.save_adapter(model, tmp_path / "adapter")
    plain = build()
    keras_lora.load_adapter(plain, tmp_path / "adapter")
    assert_equal_bits(plain(x), tuned)
    keras_lora.merge_lora(plain)
    assert type(plain.get_layer("table")) is L.ReversibleEmbedding
    assert_close(plain(x), tuned, 1e-6)
    model = build()
    tokens = {"table/reverse_embeddings": [8, 1]}
    keras_lora.apply_lora(model, target=None, trainable_token_indices=tokens)
    rows = model.get_layer("table").loras["reverse_embeddings"].rows
    assert_equal_bits(model(x), before)
    fill(rows, 4)
    kernel[:, [8, 1]] = to_numpy(rows).T
    assert_close(model(x), to_numpy(layer.embeddings)[x] @ kernel)


def test_padding_of_the_outputs():
    arguments = {"strides": 2, "padding": "same", "output_padding": 1}
    layer = keras_lora.LoRAConv2DTranspose(3, 3, rank=2, **arguments)
    x = np.random.default_rng(1).standard_normal((2, 4, 4, 5)).astype("float32")
    assert tuple(layer(x).shape) == (2, 8, 8, 3)
    fill(layer.lora.b, 1)
    plain = L.Conv2DTranspose(3, 3, **arguments)
    plain(x)
    plain.set_weights([layer.merged_kernel("float32"), layer.bias])
    assert_equal_bits(layer(x), plain(x))


def test_dora_over_substituted_kernels():
    """V * m / n, in NumPy; no gradient goes through n."""
    layer = keras_lora.LoRAConv2DTranspose(3, 2, rank=2, use_dora=True)
    layer.build((None, 4, 4, 5))
    fill(layer.lora.a, 1), fill(layer.lora.b, 2)
    kernel = to_numpy(layer.kernel).astype("float64")
    a, b = (to_numpy(x).astype("float64") for x in (layer.lora.a, layer.lora.b))
    whole = kernel + np.einsum("ir,rhwf->hwfi", a, b)
    lengths = to_numpy(layer.lora.magnitude).astype("float64")
    assert_close(lengths, np.linalg.norm(kernel, axis=-1))
    whole *= (lengths / np.linalg.norm(whole, axis=-1))[..., None]
    assert_close(layer.merged_kernel("float32"), whole)


@pytest.mark.slow
@pytest.mark.skipif(ON_TORCH, reason="needs torch_xla")
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="converts by TensorFlow")
def test_models_are_called_while_they_are_exported(tmp_path):
    model = recurrent_model()
    dense = keras.Sequential([keras.Input((6,)), L.Dense(8), L.Dense(2)])
    failed, called, done = [], [], threading.Event()
    x = np.random.default_rng(1).standard_normal((4, 4, 6)).astype("float32")
    for each in (model, dense):
        keras_lora.apply_lora(each, rank=2, target=".*")
        filled(each)
    expected = [to_numpy(model(x)), to_numpy(dense(x[:, 0]))]

    def call():
        while not done.is_set():
            try:
                found = [to_numpy(model(x)), to_numpy(dense(x[:, 0]))]
                for one, other in zip(found, expected, strict=True):
                    assert_close(one, other)
                called.append(1)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            keras_lora.export(dense, tmp_path / "dense")
        keras_lora.export(model, tmp_path / "recurrent")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert called
    assert not failed
    for each, values, name in zip(
        (dense, model), (x[:, 0], x), ("dense", "recurrent"), strict=True
    ):
        import tensorflow as tf

        served = tf.saved_model.load(str(tmp_path / name))
        assert_close(served.serve(values), each(values), 1e-6)
        shapes = sorted(tuple(v.shape) for v in served.variables)
        keras_lora.remove_lora(each)
        assert shapes == sorted(tuple(v.shape) for v in each.variables)


def test_the_cell_of_a_users_own_may_hold_a_stack():
    class Stacked(L.Layer):
        state_size = output_size = 4

        def build(self, input_shape):
            shape = (2, input_shape[-1] + 4, 4)
            self.stack = self.add_weight(shape=shape, name="stack")

        def call(self, inputs, states):
            both = keras.ops.concatenate([inputs, states[0]], axis=-1)
            found = keras.ops.einsum("bi,eio->bo", both, self.stack)
            return keras.ops.tanh(found), [keras.ops.tanh(found)]

    for layer, shape in (
        (L.RNN(Stacked()), (2, 2, 4)),
        (L.ConvLSTM1D(3, 2), (2, 12)),
    ):
        x = np.random.default_rng(1).standard_normal((2, 3, 6)).astype("float32")
        x = x[..., None].repeat(6, -1) if isinstance(layer, L.ConvLSTM1D) else x
        before = to_numpy(layer(x))
        keras_lora.apply_lora(layer, rank=2, target=".*")
        first = next(iter(layer.loras.values()))
        assert tuple(first.b.shape) == shape
        assert_equal_bits(layer(x), before)
        for seed, lora in enumerate(layer.loras.values()):
            fill(lora.b, seed, 0.3)
        found = to_numpy(layer(x))
        assert np.abs(found - before).max() > 1e-3
        keras_lora.merge_lora(layer)
        assert_close(layer(x), found, 1e-6)
