"""The tables of the benchmarks, and the bars that they should meet."""

from typing import NamedTuple

from benchmarks import files, inference, memory, serving, training


class Bar(NamedTuple):
    """A column's figure, and the most it should be (or the least); for some rows."""

    column: str
    most: float
    rows: str = ""
    over: str | None = None  # the column that it is divided by
    least: bool = False


class Section(NamedTuple):
    """A table. Settings: (row, function, network, arguments, rounds)."""

    title: str
    note: str
    settings: list
    bars: tuple = ()
    axis: str | None = None  # a figure of the row's number on this axis
    why: str = ""  # what keeps a bar from being met, and what was tried


methods = training.methods


def stack(title, *arguments, rounds, function=training.step):
    """A row about Dense layers: width, rows, rank, layers, dropout, policy, ..."""
    defaults = (None, None, None, 6, 0.0)
    arguments = [*arguments, *defaults[len(arguments) :]]
    return (title, function, "dense", arguments, rounds)


SECTIONS = [
    Section(
        "Training step: Dense stacks",
        "Six square layers (two at d=4096) with AdamW. The floor is the same network, "
        "frozen and without adapters; for loralib and PEFT it is that network in "
        "torch.",
        [
            stack(f"d={d}, {n} rows, r={r}", d, n, r, *others, rounds=k, function=f)
            for d, n, r, others, k, f in (
                (512, 64, 8, (), 60, training.dense),
                (1024, 512, 8, (), 25, training.dense),
                (1024, 2048, 8, (), 12, training.dense),
                (1024, 2048, 64, (), 10, training.dense),
                (2048, 1024, 16, (), 8, training.dense),
                (4096, 1024, 16, (2,), 6, training.dense),
            )
        ],
        bars=(
            Bar("keras_lora", 1.13, "d=1024, 512 rows"),
            Bar("keras_lora", 1.14, "d=1024, 2048 rows, r=8"),
            Bar("keras_lora", 1.30, "r=64"),
            Bar("keras_lora", 1.07, "d=2048"),
            Bar("keras_lora", 1.07, "d=4096"),
            Bar("keras_lora", 1.0, over="loralib"),
            Bar("keras_lora", 1.0, over="PEFT"),
            Bar("Keras enable_lora", 1.35, over="keras_lora", least=True),
        ),
        why=(
            "With large inputs, a step computes outputs and dx with W + delta, and dA "
            "and dB by four thin products in each layer, each of which reads an "
            "activation. With small inputs, the number of operations decides."
        ),
    ),
    Section(
        "Training step: Dense stacks over sequences",
        "The same with three-axis inputs, which transformers have.",
        [
            (
                f"d={d}, {n // length} x {length} tokens, r=8",
                training.step,
                "dense",
                (d, n, 8, 6, 0.0, "float32", None, length),
                k,
            )
            for d, n, length, k in ((512, 64, 16, 60), (1024, 1024, 128, 15))
        ],
        why=(
            "Where the batch is unknown when the step is traced, as in `fit`, inputs "
            "become rows once in each layer, in place of around each product: 1.14 to "
            "1.16 for 1.19 to 1.22 in the first row."
        ),
    ),
    Section(
        "Training step: dropout, jit_compile, bfloat16",
        "The same stack with d=1024, 512 rows and r=8 unless the row says otherwise; "
        "each row has its own floor. `enable_lora` has no dropout.",
        [
            stack(
                "dropout=0.1", 1024, 512, 8, 6, 0.1, rounds=15, function=training.dense
            ),
            stack("jit_compile", 1024, 512, 8, rounds=15, function=training.jit_step),
            *(
                stack(
                    f"jit_compile, d={d}, {n} rows, r={r}",
                    d,
                    n,
                    r,
                    rounds=k,
                    function=training.jit_step,
                )
                for d, n, r, k in (
                    (512, 64, 8, 40),
                    (1024, 2048, 8, 6),
                    (1024, 2048, 64, 6),
                    (2048, 1024, 16, 4),
                )
            ),
            *(
                (
                    f"jit_compile, Conv2D, {channels} channels",
                    training.jit_step,
                    "convolution",
                    (channels, 16, 8),
                    k,
                )
                for channels, k in ((64, 10), (256, 4))
            ),
            stack("mixed_bfloat16", 1024, 512, 8, 6, 0.0, "mixed_bfloat16", rounds=6),
            stack(
                "relu between the layers",
                1024,
                512,
                8,
                6,
                0.0,
                "float32",
                "relu",
                rounds=15,
            ),
        ],
    ),
    Section(
        "Training step against rows",
        "d=1024, r=8.",
        [
            stack(f"rows={n:,}", 1024, n, 8, 4, rounds=k)
            for n, k in ((64, 40), (256, 30), (1024, 15), (4096, 6))
        ],
        axis="rows",
    ),
    Section(
        "Training step against rank",
        "d=1024, 1024 rows.",
        [stack(f"r={r}", 1024, 1024, r, 4, rounds=12) for r in (1, 4, 16, 64)],
        axis="rank",
    ),
    Section(
        "Training step: query, key and value in one kernel",
        "Two of three slices have adapters; the floor is the frozen layer, for "
        "loralib in torch.",
        [("d=1024, 1024 rows, r=8", training.fused, "fused", (1024, 1024, 8), 25)],
        bars=(
            Bar("LoRAMergedDense", 1.15),
            Bar("LoRAMergedDense", 1.0, over="three LoRADense"),
            Bar("loralib MergedLinear", 2.0, over="LoRAMergedDense", least=True),
        ),
    ),
    Section(
        "Training step: a transformer block",
        "MultiHeadAttention and two Dense layers, all with adapters. The floor is the "
        "frozen block.",
        [
            ("d=512, 8 x 64 tokens, r=8", training.step, "attention", (512, 64, 8), 25),
            (
                "d=768, 8 x 128 tokens, r=8",
                training.step,
                "attention",
                (768, 128, 8),
                12,
            ),
            (
                "d=1024, 8 x 128 tokens, r=8",
                training.step,
                "attention",
                (1024, 128, 8),
                8,
            ),
        ],
        bars=(Bar("keras_lora", 1.15),),
    ),
    Section(
        "Training step: every other weight",
        "Recurrent layers, transposed convolutions, a layer of experts from KerasHub, "
        "and rows of a table (trainable_token_indices). The floor is the same "
        "network, frozen. PEFT adapts the same matrices of transformers' Mixtral by "
        "target_parameters; every token goes through all experts, as in KerasHub.",
        [
            ("LSTM, 256 units, 64 steps", training.step, "recurrent", (256, 64, 8), 15),
            (
                "GRU, 256 units, 64 steps",
                training.step,
                "recurrent",
                (256, 64, 8, 32, "GRU"),
                15,
            ),
            ("Conv2DTranspose, 64", training.step, "transposed", (64, 16, 8), 25),
            ("Conv2DTranspose, 256", training.step, "transposed", (256, 8, 8), 15),
            (
                "8 experts, 512 x 1024, 512 tokens",
                training.experts,
                "experts",
                (8, 512, 1024, 512, 8),
                8,
            ),
            (
                "8 rows of 250,000 x 256",
                training.step,
                "token_rows",
                (250_000, 256, 8),
                25,
            ),
            (
                "8 rows, then 2 Dense of 256",
                training.step,
                "token_rows",
                (250_000, 256, 8, 2),
                25,
            ),
        ],
        bars=(
            Bar("keras_lora", 1.30, "LSTM"),
            Bar("keras_lora", 1.15, "experts"),
            Bar("keras_lora", 1.10, "rows"),
        ),
        why=(
            "After the rows of a table comes a trained bias. With a trained product in "
            "its place the first row was 1.10 to 1.15; rows that cost nothing (an "
            "identity whose gradient is theirs) had 1.09 to 1.13 there, because the "
            "frozen table needs no gradient of the product's inputs."
        ),
    ),
    Section(
        "Training step: Conv2D",
        "Three 3x3 convolutions on 8 images of 16 x 16, and a ResNet bottleneck with "
        "batch normalization; r=8. The floor is the frozen network.",
        [
            ("64 channels", training.step, "convolution", (64, 16, 8), 25),
            ("256 channels", training.step, "convolution", (256, 16, 8), 12),
            ("512 channels", training.step, "convolution", (512, 16, 8), 5),
            ("16 channels", training.step, "convolution", (16, 16, 8), 30),
            ("32 channels", training.step, "convolution", (32, 16, 8), 30),
            ("64 channels, r=4", training.step, "convolution", (64, 16, 4), 20),
            ("64 channels, r=64", training.step, "convolution", (64, 16, 64), 20),
            ("256 channels, r=64", training.step, "convolution", (256, 16, 64), 6),
            (
                "1x1, 64 channels",
                training.step,
                "convolution",
                (64, 16, 8, 8, "Conv2D", 1),
                30,
            ),
            (
                "Conv1D, 64 channels",
                training.step,
                "convolution",
                (64, 256, 8, 8, "Conv1D"),
                30,
            ),
            (
                "Conv3D, 32 channels",
                training.step,
                "convolution",
                (32, 8, 8, 4, "Conv3D"),
                15,
            ),
            ("ResNet block, 256", training.step, "resnet_block", (256, 16, 8), 25),
        ],
        bars=(
            Bar("Keras enable_lora", 1.15, "256 channels", "keras_lora", True),
            Bar("Keras enable_lora", 1.0, "", "keras_lora", True),
        ),
        why=(
            "On a CPU, a convolution to eight channels takes much longer than its "
            "arithmetic suggests. So where the kernel is no larger than the layer's "
            "inputs, one convolution with W + delta computes outputs and dx, and only "
            "dA and dB are low-rank. With few filters for the rank, dA and dB come "
            "from the gradient of W + delta, as in `enable_lora`."
        ),
    ),
    Section(
        "Training step: DoRA and a start that is subtracted",
        "Compared with LoRA in the same network; PEFT's DoRA with PEFT's LoRA. "
        "Convolutions have no such start.",
        [
            stack("d=1024, 1024 rows, r=8", 1024, 1024, 8, rounds=15, function=methods),
            stack("d=1024, 256 rows, r=8", 1024, 256, 8, rounds=25, function=methods),
            ("Conv2D, 64 channels", methods, "convolution", (64, 16, 8), 25),
            ("Conv2D, 256 channels", methods, "convolution", (256, 16, 8), 12),
            (
                "transformer block, d=768, 8 x 128 tokens",
                methods,
                "attention",
                (768, 128, 8),
                12,
            ),
        ],
        bars=(Bar("DoRA", 1.15, "d=1024, 1024 rows"),),
    ),
    Section(
        "Training step over a quantized kernel",
        "Six layers of d=1024 with r=8, compared with the same layers over float32 "
        "kernels. Keras's own adapters over quantized kernels are in the same table. "
        "PEFT's adapters over integers, which are dequantized in each forward pass, "
        "are compared with PEFT's over float32.",
        [
            (f"{rows} rows", training.quantized, "quantized", (1024, rows, 8), 12)
            for rows in (1024, 64)
        ],
    ),
    Section(
        "Memory over a quantized kernel",
        "Compared with float32, d=8192, r=8. First the bytes of a layer's frozen "
        "weights, with scales and zeros. Then how much each additional layer adds to "
        "the peak of a training process (16 rows, from 1 to 3 layers), including A, "
        "B, the optimizer's state and traced operations.",
        [
            (
                "frozen weights",
                memory.frozen,
                "quantized",
                (8192, 16, 8, 1),
                1,
            ),
            (
                "training process",
                memory.by_layer,
                "quantized",
                (8192, 16, 8, 1, 3),
                1,
            ),
        ],
        bars=(
            Bar("int8", 0.27, "frozen weights"),
            Bar("int4", 0.15, "frozen weights"),
        ),
    ),
    Section(
        "Training step: Embedding",
        "SGD on 2048 ids of width 256, r=8, for several sizes of the vocabulary, "
        "compared with the plain layer, which trains its table.",
        [
            (f"vocabulary={v:,}", training.step, "embedding", (v, 8), k)
            for v, k in ((1_000, 25), (50_000, 25), (1_000_000, 12))
        ],
        bars=(Bar("keras_lora", 1.3),),
        axis="vocabulary",
    ),
    Section(
        "Inference: LoRADense",
        "One call of a 1024 x 1024 layer, r=8, compared with the plain layer; the "
        "exported SavedModel is compared with that of the plain layer.",
        [
            (f"{rows} rows", inference.dense, "dense", (1024, rows, 8), 40)
            for rows in (1, 16, 128, 512, 2048)
        ],
        bars=(
            Bar("merged in the call", 1.25, "512 rows"),
            Bar("merged in the call", 1.25, "2048 rows"),
        ),
    ),
    Section(
        "Inference: Embedding",
        "2048 ids of width 256, r=8, compared with the plain layer.",
        [
            (f"vocabulary={v:,}", inference.embedding, "embedding", (v, 8), k)
            for v, k in ((1_000, 25), (50_000, 25), (1_000_000, 12))
        ]
        + [
            (
                "vocabulary=50,000, jit_compile",
                inference.embedding,
                "embedding",
                (50_000, 8, True),
                25,
            )
        ],
        bars=(Bar("keras_lora", 1.35),),
        why=(
            "A lookup of 2 MB becomes a lookup, a product and an addition of 2 MB "
            "each. The whole table is never read, so the cost grows with the "
            "vocabulary by cache misses alone: each id also reads a row of A. With at "
            "least as many ids as rows, W + delta is formed once and looked up."
        ),
    ),
    Section(
        "Inference: generation",
        "KerasHub's GPT-2 with four layers of width 768 and random weights, r=8 at "
        "every projection. It generates 32 tokens for each text, greedily; compared "
        "with the plain model.",
        [
            ("1 text", inference.generation, "", (1, False), 7),
            ("8 texts", inference.generation, "", (8, False), 7),
            ("1 text, jit_compile", inference.generation, "", (1, True), 7),
        ],
        bars=(Bar("inside merged()", 1.1),),
        why=(
            "Each token is a call with one row for each text. Outside of `merged()` "
            "and without XLA, every call forms W + delta."
        ),
    ),
    Section(
        "Peak memory of a training process",
        "How much the peak grows after the imports, compared with the floor; the "
        "median of three processes (one with 48 x 48).",
        [
            (
                "Dense d=2048, 1024 rows, r=16",
                memory.step,
                "dense",
                (2048, 1024, 16, 6, 0.0),
                3,
            ),
            (
                "the same with relu between",
                memory.step,
                "dense",
                (2048, 1024, 16, 6, 0.0, "float32", "relu"),
                3,
            ),
            ("transformer block, d=1024", memory.step, "attention", (1024, 128, 8), 3),
            ("Conv2D, 256 channels", memory.exact_step, "convolution", (256, 16, 8), 3),
            (
                "Conv2D, 256 channels, 48 x 48, relu between",
                memory.exact_step,
                "convolution",
                (256, 48, 8, 8, "Conv2D", 3, "relu"),
                1,
            ),
        ],
        bars=(
            *(Bar("keras_lora", 1.05, rows) for rows in ("Dense", "the same", "block")),
            Bar("keras_lora", 1.2, "Conv2D"),
            Bar("keras_lora", 1.0, over="Keras enable_lora"),
        ),
        why=(
            "A stack of linear layers is the worst case: the floor's backward pass "
            "needs none of the layers' inputs, and dA needs all of them. With an "
            "activation between the layers, the floor keeps them too. So three linear "
            "convolutions of 48 x 48 need at least 54 MiB, three inputs of 18, beside "
            "a floor of 200 MiB: 1.27. 71 were measured, with enable_lora 76, of which "
            "16 (22) are there with images of 2 x 2 too: operations, their kernels and "
            "what tracing needs. The rows of convolutions have an exact allocator."
        ),
    ),
    Section(
        "Memory and time of a step that computes layers once more",
        "A training process with an adapter on each layer, d=512, r=8, compared with "
        "one that keeps all activations: four transformer blocks under `keras.remat`, "
        "and six Dense layers with gelu made in a `keras.RematScope`.",
        [
            ("memory, blocks, 8 x 256 tokens", memory.step, "blocks", (512, 256, 8), 3),
            ("time of the same", training.step, "blocks", (512, 256, 8), 8),
            ("memory, Dense, 8192 rows", memory.step, "scope", (512, 8192, 8), 3),
        ],
        bars=(Bar("remat", 0.7, "memory"),),
    ),
    Section(
        "Files",
        "An adapter's files, compared with a weights file of the whole model with "
        "adapters.",
        [
            (
                "six Dense, d=1024, r=8",
                files.switch,
                "dense",
                (1024, 64, 8, 6, 0.0),
                8,
            ),
            (
                "transformer block, d=768, r=8",
                files.switch,
                "attention",
                (768, 64, 8),
                8,
            ),
        ],
    ),
    Section(
        "Serving: an adapter for each row",
        "A transformer block of width 768 and a dense layer, r=8 at every projection, "
        "compared with the plain model: batches in which each row uses its own "
        "adapter out of 8, 64 or 256, and batches with one adapter for all rows.",
        [
            (title, serving.call, "", (768, rows, length, 8, jit), rounds)
            for title, rows, length, jit, rounds in (
                ("32 x 128 tokens", 32, 128, False, 7),
                ("32 x 128 tokens, XLA", 32, 128, True, 7),
                ("1 x 128 tokens", 1, 128, False, 20),
                ("32 x 1 tokens", 32, 1, False, 40),
                ("1 x 1 token", 1, 1, False, 40),
            )
        ],
        bars=(
            *(Bar(f"{n} adapters", 1.25, "32 x 128") for n in serving.COUNTS),
            Bar("256 adapters", 1.1, "32 x 128", over="8 adapters"),
            Bar("one for all rows", 1.2, "32 x 128"),
        ),
    ),
    Section(
        "Serving: one artifact, or one for each adapter",
        "The same network with 8 adapters, exported as a bank and as 8 merged models.",
        [("8 adapters, r=8", serving.artifacts, "", (768, 128, 8, 8), 3)],
    ),
    Section(
        "Adopting 1,000 layers",
        "Seconds, the best of five, of apply_lora, remove_lora and merge_lora; beside "
        "them what cannot be left out: creating A, B and the scaling of each layer as "
        "bare Keras variables, and assigning W + scaling * A @ B to each kernel.",
        [("1,000 Dense layers", files.adopting, "", (1000,), 5)],
        bars=(
            Bar("apply_lora beyond, s", 0.3),
            Bar("remove_lora, s", 0.3),
            Bar("merge_lora beyond, s", 0.3),
        ),
    ),
]


# What was measured and not kept: what, its figure (and that of what is), and why.
TRIED = [
    (
        "Dense: a hand-written gradient of the low-rank path",
        "1.17 for 1.17 (d=1024, 512 rows)",
        "no gain",
    ),
    (
        "Dense: the skinny products as tf.einsum",
        "1.33 for 1.17 (4,096 rows), 1.64 for 1.24 (d=512, 64 rows)",
        "slower",
    ),
    (
        "Dense: W + delta formed again in the backward pass",
        "1.13 for 1.10 (2,048 rows), 1.26 for 1.23 (r=64)",
        "slower; saves a kernel's size of memory a layer",
    ),
    (
        "Dense: W + delta for few rows",
        "1.33 for 1.24 (d=512, 64 rows)",
        "slower",
    ),
    (
        "Dense: tf.cond on the number of rows where the batch is unknown",
        "1.10 for 1.16 (1,024 rows); tracing 40 layers 22 to 27 s for 14",
        "tracing takes half as long again, and more",
    ),
    (
        "Conv2D, 256 channels: W + delta",
        "1.08 for 0.99, and 1.48 for 1.35 of the floor's memory",
        "slower",
    ),
    (
        "Conv2D: one product to k*k*r channels and a sum of shifted slices",
        "2.45 to 2.92 at 64 channels",
        "slower",
    ),
    (
        "Embedding: ids as a flat vector, negative ids set right once, another order "
        "of the sum, add_n, a bias that TensorFlow could fuse",
        "1.34 to 1.55 for 1.46 to 1.56",
        "ties",
    ),
    (
        "Token rows: one update in the place of two additions, with a gradient of its "
        "own",
        "1.17 to 1.21 for 1.10 to 1.15",
        "slower",
    ),
    (
        "Embedding: [A, W] looked up and one product; eight chunks; each id once",
        "2.80 to 3.10; 1.65 to 1.84; 1.38 to 1.66; all for 1.38 to 1.49",
        "slower, or no faster",
    ),
    (
        "Embedding: a lookup in the variable itself (ResourceGather)",
        "every other read of that table copies it from then on: 88 for 1.5 (1,000,000)",
        "a copy of the table",
    ),
    (
        "Dense: A transposed first, so that dA needs no transposition",
        "1.17 for 1.20 (d=1024, 256 rows), 1.12 for 1.12 (512 rows), 1.45 for 1.25 "
        "(d=512, 64 rows)",
        "slower for few rows",
    ),
    (
        "Dense, d=1024: W + delta for 256 and 512 rows",
        "1.25 for 1.16; 1.16 for 1.14",
        "slower",
    ),
    (
        "Dense, d=1024: fewer operations in a step",
        "a layer adds six products, two additions, two scalings of B; AdamW alone, on "
        "as many variables in no product, is 1.02 to 1.03",
        "none to leave out",
    ),
    (
        "Dense: the additions inside the products, with a zero bias that lets "
        "TensorFlow fuse them: in the low-rank product, or in x @ W",
        "1.20 to 1.22 for 1.20 to 1.25 (d=1024, 256 rows, on a slow day); 1.23 and "
        "1.32 for 1.21 (d=512, 64 rows)",
        "a tie, and slower for few rows",
    ),
    (
        "Dense: inputs of three known sizes made rows before all products",
        "1.22 to 1.24 for 1.21 to 1.23 (d=512, 4 x 16 tokens)",
        "a tie; kept where a size is unknown: 1.14 to 1.16 for 1.19 to 1.22",
    ),
    (
        "Dense, d=512, 64 rows: fewer operations in a step",
        "AdamW alone, on as many variables in no product, is 1.06 to 1.08 of 1.21",
        "none to leave out",
    ),
    (
        "Conv2D, 64 channels, jit_compile: the gradient of W + delta; low-rank path",
        "1.60 and 1.55; 1.83 and 1.70; for 1.65 and 1.52 (1.71 and 1.64 the same "
        "graph once more; enable_lora 1.61 and 1.53), two runs",
        "a tie; with 128 channels 1.57 for 1.46",
    ),
    (
        "merge_lora: each small kernel formed for the check and again to be assigned",
        "1.9 s for 1.1 s (1,000 Dense layers)",
        "slower; large kernels are still formed twice, to hold one at a time",
    ),
    (
        "LSTM: the low-rank path beside each product in the loop",
        "1.14 and 1.20 for 1.08 and 1.11 (a loop of TensorFlow's own)",
        "slower than W + delta with gradients of rank r",
    ),
    (
        "Token rows: tensor_scatter_nd_update; a product over all outputs and tf.where",
        "1.19 and 1.48 for 1.11",
        "they copy or read all outputs once more",
    ),
]


def sentence(bars, rows):
    """Which bars are met, and by how much the others are missed."""
    lines = []
    for bar in bars:
        found = {title: cells for title, cells in rows if applies(bar, title, cells)}
        if not found:
            continue  # a quick run has one row
        values = {
            title: cells[bar.column].median
            / (cells[bar.over].median if bar.over else 1.0)
            for title, cells in found.items()
        }
        missed = [
            f"{title}: {value:.2f}"
            for title, value in values.items()
            if (bar.most - value if bar.least else value - bar.most) > 0.005
        ]
        name = bar.column + (f" over {bar.over}" if bar.over else "")
        where = f" at {bar.rows}" if bar.rows else ""
        limit = f"{'at least' if bar.least else 'at most'} {bar.most:.2f}"
        verdict = f"missed ({'; '.join(missed)})" if missed else "met"
        lines.append(f"- Bar: {name}{where}, {limit}: {verdict}.")
    return "\n".join(lines)


def applies(bar, title, cells):
    return bar.rows in title and {bar.column, bar.over or bar.column} <= cells.keys()
