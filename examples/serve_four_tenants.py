"""Serves four tenants from one model: an adapter each, and one SavedModel for all.

The text and the transformer are those of adapt_text_model.py. Each of four tenants has
two Python modules of its own, and an adapter that tells which of the two some words are
from. An AdapterBank holds the four over one model, and is exported as one artifact, in
which the rows of a batch name their tenants.

It takes less than three minutes on two cores.

    python examples/serve_four_tenants.py
"""

import tempfile
from pathlib import Path

import adapt_text_model as text
import keras
import numpy as np
import tensorflow as tf

import keras_lora

TENANTS = {
    name: text.UNSEEN[2 * place : 2 * place + 2]
    for place, name in enumerate(("north", "east", "south", "west"))
}
CLASSES = 2


def pretrained_model():
    """The transformer, trained on other modules; its head starts anew."""
    seen, _ = text.pieces(text.SEEN)
    pretrained = text.transformer(len(text.SEEN))
    text.train(pretrained, f"Pretraining on {', '.join(text.SEEN)}", seen, 4, 1e-3)
    model = text.transformer(CLASSES)
    for old, new in zip(pretrained.layers[:-1], model.layers[:-1], strict=True):
        new.set_weights(old.get_weights())
    return model


def train_adapter(model, tenant, folder):
    """Writes the tenant's adapter; returns unseen rows and what the model says."""
    data, (ids, labels) = text.pieces(TENANTS[tenant])
    text.lora(model)
    title = f"\n{tenant.capitalize()}: {' or '.join(TENANTS[tenant])}?"
    text.train(model, title, data, 3, 5e-3)
    keras_lora.save_adapter(model, folder)
    logits = model.predict(ids, verbose=0)
    keras_lora.remove_lora(model)
    return ids, labels, logits


def accuracy(logits, labels):
    return np.mean(logits.argmax(axis=-1) == labels)


def megabytes(folder):
    return (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    )


def main():
    keras.utils.set_random_seed(0)
    model = pretrained_model()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folders = {tenant: folder / tenant for tenant in TENANTS}
        alone = {t: train_adapter(model, t, folders[t]) for t in TENANTS}

        bank = keras_lora.AdapterBank(model, folders, capacity=8)
        bank.export(folder / "served")
        bank.release()
        model.export(folder / "plain", verbose=False)
        sizes = megabytes(folder / "served"), megabytes(folder / "plain")
        served = tf.saved_model.load(folder / "served")

        # All tenants' rows in one batch, in any order.
        ids = np.concatenate([ids for ids, _, _ in alone.values()])
        names = np.repeat(list(TENANTS), [len(ids) for ids, _, _ in alone.values()])
        order = np.random.default_rng(0).permutation(len(ids))
        logits = np.empty((len(ids), CLASSES), "float32")
        logits[order] = served.serve(ids[order], tf.constant(names[order])).numpy()

    print(f"\n{'':8}{'in one batch':>14}{'alone':>10}{'logits differ by':>18}")
    for tenant, (_, labels, expected) in alone.items():
        found = logits[names == tenant]
        difference = np.abs(found - expected).max()
        print(
            f"{tenant:8}{accuracy(found, labels):>14.1%}"
            f"{accuracy(expected, labels):>10.1%}{difference:>18.1e}"
        )
        assert difference < 1e-4, "a row of the bank is not what its model says"
    print(
        f"\nOne artifact for four tenants: {sizes[0]:.1f} MB. Four exported models: "
        f"{len(TENANTS) * sizes[1]:.1f} MB."
    )


if __name__ == "__main__":
    main()
