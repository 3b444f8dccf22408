"""What an adapter writes into configurations, weight files and adapter files."""

import keras
import numpy as np

from keras_lora.layers.form import LowRankForm
from keras_lora.layers.settings import Settings
from keras_lora.layers.torch_layout import to_numpy


class AdapterFiles:
    """Mixin of the adapter: what is kept of it, and how."""

    settings: Settings
    dropout: float
    a_initializer: keras.initializers.Initializer | None
    b_initializer: keras.initializers.Initializer | None
    keyword: str | None
    more_suffixes: tuple[str, ...]
    form: LowRankForm
    a: keras.Variable
    b: keras.Variable

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Without alpha the tensors mean nothing: the file brings its own. And with
        # the seed's state the next dropout masks are those of a run never stopped.
        store["alpha"] = self.alpha
        store["use_rslora"] = self.use_rslora
        if self.seed_generator is not None:
            store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118
        if not values:
            raise ValueError(
                f"The file has no A and B for {self.path!r}: it is of a plain layer, "
                "as merge_lora and remove_lora leave it, and the model that loads it "
                "makes a LoRA layer. Build the model, call merge_lora on it too, and "
                "load the file by load_weights."
            )
        if "alpha" in values:
            alpha = values.pop("alpha")[()]
            self.set_alpha(alpha, values.pop("use_rslora")[()])
        seed = values.pop("seed", None)
        if seed is not None and self.seed_generator is not None:
            self.seed_generator.state.assign(seed)
        super().load_own_variables(values)

    def options(self) -> dict:
        """The constructor's arguments, as they go into the host's config."""
        options = {
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "dropout": self.dropout,
            "use_rslora": self.settings.use_rslora,
            "a_initializer": keras.initializers.serialize(self.a_initializer),
            "b_initializer": keras.initializers.serialize(self.b_initializer),
        }
        return options | ({self.keyword: True} if self.keyword else {})

    @classmethod
    def suffixes_for(cls, suffixes) -> tuple:
        """All that a file has for an adapter; suffixes: its host's for A and B."""
        return (*suffixes, *cls.more_suffixes)

    @classmethod
    def of_plain_layer(cls, weight) -> dict:
        """Suffix -> array for a slice of a module that is adapted in other slices.

        weight: (outputs, inputs), as NumPy. For methods that have `more_suffixes`.
        """
        raise ValueError(
            f"{cls.__name__} needs an adapter on all slices of a module. Adapt them."
        )

    @property
    def file_rank(self) -> int:
        """The rank that a file's arrays have: G * r for a merged dense layer."""
        return self.form.file_rank or self.settings.rank

    def to_file(self, suffixes) -> dict:
        """Suffix -> array, as a file has the factors; suffixes: the host's for A, B."""
        arrays = self.form.to_file(to_numpy(self.a), to_numpy(self.b))
        return dict(zip(suffixes, map(np.ascontiguousarray, arrays), strict=True))

    def from_file(self, arrays, suffixes) -> dict:
        """The inverse: name of a factor -> array. Shapes were compared before."""
        return dict(
            zip(
                ("a", "b"),
                self.form.read_file(*(arrays[s] for s in suffixes)),
                strict=True,
            )
        )

    def get_config(self):
        options = self.options()
        options.pop(self.keyword, None)
        return {**super().get_config(), **options}
