"""Adapts the network of finetune_digits.py over kernels in float32, int8 and int4.

It takes less than a minute on two cores.

    python examples/finetune_quantized.py
"""

import finetune_digits as digits
import keras
import numpy as np

import keras_lora

MODES = {"float32": None, "int8": "int8", "int4, blocks of 128": "int4"}


def kernel_bytes(model):
    """What the frozen kernels of the hidden layers take, scales and all."""
    return sum(
        np.prod(weight.shape) * keras.ops.convert_to_numpy(weight).itemsize
        for layer in model.layers[:-1]
        for weight in layer.weights
        if not weight.trainable and "bias" not in weight.path
    )


def main():
    keras.utils.set_random_seed(0)
    images, _, labels, _ = digits.digits(range(5))
    pretrained = digits.network()
    digits.train(
        pretrained, "Pretraining on the digits 0-4", (images, labels), 15, 1e-3
    )
    images, unseen, labels, unseen_labels = digits.digits(range(5, 10))
    rows = []
    for name, mode in MODES.items():
        model = digits.start_from(pretrained, digits.network())
        hidden = [layer.name for layer in model.layers[:-1]]
        if mode is not None:
            model.quantize(mode, filters=f"^({'|'.join(hidden)})$")
        keras_lora.apply_lora(
            model,
            rank=digits.RANK,
            alpha=2 * digits.RANK,
            target=hidden,
            also_train=[model.layers[-1].name],
        )
        digits.train(model, f"LoRA over {name}", (images, labels), 25, 5e-3)
        accuracy = model.evaluate(unseen, unseen_labels, verbose=0)[1]
        rows.append((name, accuracy, kernel_bytes(model)))
    print(f"\n{'frozen kernels':22}{'accuracy':>9}{'bytes':>10}{'of float32':>12}")
    for name, accuracy, size in rows:
        share = size / rows[0][2]
        print(f"{name:22}{accuracy:>9.1%}{size:>10,}{share:>12.3f}")


if __name__ == "__main__":
    main()
