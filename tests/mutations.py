"""Small faults in keras_lora, and the tests that should see each of them.

A tool for whoever changes tests: what was caught before a change is caught after it.
One fault at a time is put into a copy of the tree, where its tests run.

    python tests/mutations.py                     all of them
    python tests/mutations.py layers/dora 17-20   by a part of the path, and by number
    python tests/mutations.py --tree DIRECTORY    in a copy of another checkout
"""

import argparse
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = "output of pytest"
RAN = 10  # plus what pytest returns: a process of which it did not says 1
SETTING = re.compile("[A-Z_]+=")
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
LAWS = "test_laws.py test_dora.py -k"  # the laws hold for both methods
WORKERS = "test_distribution.py -m slow -k two_workers"  # two processes
REPLICAS = "test_distribution.py -m slow -k outside"  # of one process
LAYOUTS = "KERAS_BACKEND=jax test_distribution.py -k factors_lie"


class Mutation(NamedTuple):
    """A fault: `text`, which stands once in a file, becomes `other`."""

    number: int
    file: str
    text: str
    other: str
    tests: str  # arguments of pytest, after settings for a process of its own


# File -> [(text, what stands in its place, the tests that should see it)]
FAULTS = {
    "layers/settings.py": [
        (
            "is_whole(i, lowest=0)",
            "is_whole(i, lowest=-9)",
            "test_token_rows.py -k ids_that_are_none",
        ),
        (
            "math.sqrt(rank) if use_rslora else rank",
            "rank",
            "test_laws.py -k 'delta_is_scaling and rslora'",
        ),
        (
            "divisor(rank, use_rslora) / divisor(self.rank, self.use_rslora)",
            "rank / self.rank",
            "test_combining.py -k rslora_stays",
        ),
        (
            "return self.alpha / divisor(self.rank, self.use_rslora)",
            "return self.alpha / self.rank",
            "test_laws.py -k 'delta_is_scaling and rslora'",
        ),
        ("and value >= lowest", "", "test_bad_input.py -k test_rank"),
        ("or alpha <= 0", "or alpha < 0", "test_bad_input.py -k test_alpha"),
        ("0 <= dropout < 1", "0 <= dropout <= 1", "test_bad_input.py -k test_dropout"),
    ],
    "layers/adapter.py": [
        (
            'getattr(self.stand_in, "kernel", None)]',
            "None]",
            "KERAS_BACKEND=jax test_processes.py -m slow -k calls_give",
        ),
        (
            "ops.add(kernel, self.delta())",
            "ops.subtract(kernel, self.delta())",
            "test_laws.py -k training_and_merged_paths_agree",
        ),
        (
            "ops.multiply(value, self._scaling.variable.value)",
            "ops.convert_to_tensor(value)",
            "test_laws.py -k delta_is_scaling",
        ),
        (
            "self.apply_dropout(inputs) if training else inputs",
            "self.apply_dropout(inputs)",
            "test_laws.py -k 'unmerged and dropout'",
        ),
        (
            "self.apply_dropout(inputs) if training else inputs",
            "inputs",
            "test_laws.py -k 'dropout_acts and dense'",
        ),
        (
            "or uniform(form.fan_in)",
            "or uniform(5 * form.fan_in)",
            "test_laws.py -k starting_values",
        ),
        (
            "regularizer=regularizer,\n            trainable=trainable",
            "trainable=trainable",
            "test_laws.py -k regularizer",
        ),
        (
            "trainable=trainable,\n            autocast=False",
            "trainable=trainable",
            "test_laws.py -k 'merging_rounds_once or stays_float32'",
        ),
        (
            "self.b.lora_factor = ",
            "self.lora_factor = ",
            "test_lora_plus.py -k 'equals_two_plain and SGD'",
        ),
        ("[a - a_start, a_start]", "[a, a_start]", "test_starts.py -k nothing_changes"),
        ("[b, b - b_start]", "[b, b]", "test_starts.py -k delta_is_the_difference"),
        (
            "self.off_count += -1 if on else 1",
            "self.off_count = 0 if on else 1",
            "test_merging.py test_models_around.py test_trained_beside.py -k nest",
        ),
        (
            "self.settings = Settings(self.rank, alpha, use_rslora)\n"
            "        self._write_scaling()",
            "self.settings = Settings(self.rank, alpha, use_rslora)",
            "test_laws.py -k delta_is_scaling",
        ),
    ],
    "layers/saved_values.py": [
        ('"b_start": b - b_change', '"b_start": b', "test_starts.py -k losses_go_on"),
        (
            'store["alpha"] = self.alpha',
            'store["alpha"] = self.rank',
            "test_saving.py -k weights_file_brings",
        ),
        (
            "self.seed_generator.state.assign(seed)",
            "pass",
            "test_saving.py -k 'losses_go_on and dropout'",
        ),
        (
            '"use_rslora": self.settings.use_rslora',
            '"use_rslora": False',
            "test_laws.py -k config_round_trip",
        ),
        (
            '"dropout": self.dropout',
            '"dropout": 0.0',
            "test_laws.py -k config_round_trip",
        ),
        (
            "    if not held.contexts:",
            "    if True:",
            "test_trained_beside.py -k do_not_nest",
        ),
    ],
    "layers/rematerialized.py": [
        (
            "return count > 0",
            "return False",
            "test_rematerialization.py -k 'functions_under and plain'",
        ),
        (
            'if kwargs.get("training") is True else {}',
            "if False else {}",
            "test_rematerialization.py -k 'scope_train and dropout'",
        ),
        (
            'BACKEND == "tensorflow" and calls.recording_is_stopped',
            "False and calls.recording_is_stopped",
            "test_rematerialization.py -k is_one_or_refused",
        ),
        (
            "if not has_gradient(x)",
            "if False",
            "test_rematerialization.py -k blocks_made",
        ),
    ],
    "layers/lora_layer.py": [
        (
            "if calls.is_traced(training):",
            "if False:",
            "test_rematerialization.py -k 'flag_that_is_traced and relu'",
        ),
        (
            "ops.add(outputs, self.over_outputs(bias))",
            "ops.subtract(outputs, self.over_outputs(bias))",
            "test_laws.py -k fresh_adapter",
        ),
        (
            "variable.trainable = False",
            "variable.trainable = True",
            "test_carriers.py -k frozen_biases",
        ),
        (
            "and not self.takes_dropout",
            "and False",
            "test_base_arguments.py -k refuses_dropout",
        ),
        (
            "kernel = ops.stop_gradient(self.base_kernel(self.compute_dtype))",
            "kernel = self.base_kernel(self.compute_dtype)",
            "test_gradient_sizes.py -k 'eager_gradient or no_kernel_sized'",
        ),
        (
            'store["adapter"] = max(x.settings.rank for x in self.loras.values())',
            "pass",
            "test_carriers.py -k 'do_not_go_into_a_plain_model'",
        ),
        (
            "not torch_layout.to_numpy(lora.delta()).any()",
            "False",
            "test_laws.py -k 'fresh_layer_takes and dora'",
        ),
        (
            "torch_layout.to_numpy(lora.delta()).any()",
            "False",
            "test_laws.py -k 'leave_the_adapter_alone and dora'",
        ),
        (
            "reversed(sites)",
            "sites",
            "test_laws.py -k 'fresh_layer_takes and recurrent'",
        ),
        (
            "if tuple(variable.shape) != tuple(value.shape):",
            "if False:",
            "test_laws.py -k 'leave_the_adapter_alone and dense'",
        ),
    ],
    "layers/site.py": [
        (
            "isinstance(calls.innermost_layer(), keras.layers.SpectralNormalization)",
            "False",
            "test_hosts_that_move.py -k refused_when_it_is_built",
        ),
        ("    if names:", "    if False:", "test_rematerialization.py -k bound_to"),
        (
            '== "tensorflow" and classes.calls_remat(layer)',
            '== "none" and classes.calls_remat(layer)',
            "test_rematerialization.py -k read_under_remat",
        ),
        (
            "if constraint is not None:",
            "if False:",
            "test_bad_input.py -k kernel_constraint",
        ),
        (
            'if getattr(layer, "lora_enabled", False):',
            "if False:",
            "test_hosts_that_move.py -k keras_own_adapter",
        ),
        (
            "kernel = self.base_kernel(self.lora.variable_dtype)",
            "kernel = self.base_kernel(dtype)",
            "test_laws.py -k merging_rounds_once",
        ),
        (
            "self.lora.kernel_place = variable_state.freeze(\n"
            "                self.kernel_owner(), self.frozen_kernel\n"
            "            )\n",
            "pass\n",
            "test_laws.py -k 'toggling and recurrent-lstm'",
        ),
    ],
    "layers/dense.py": [
        (
            "fan_in=inputs",
            "fan_in=units",
            "test_laws.py -k 'starting_values and dense'",
        ),
        (
            "acts_on_rows=True",
            "acts_on_rows=False",
            "test_gradient_sizes.py -k share_one_reshape",
        ),
    ],
    "layers/embedding.py": [
        (
            'a_initializer="zeros"',
            'a_initializer="ones"',
            "test_laws.py -k 'fresh_adapter and embedding'",
        ),
        (
            "return ops.cast(outputs, self.compute_dtype)",
            "return outputs",
            "test_laws.py -k 'stays_float32 and embedding'",
        ),
        (
            "return quantized_host.dequantize(integers, scale, zero, groups, axis=1)",
            "return quantized_host.dequantize(integers, scale, zero, groups)",
            "test_quantized.py -k 'what_it_loses or gradients_are'",
        ),
        (
            "return ops.stop_gradient(self.linear(inputs, self.frozen_kernel))",
            "return self.linear(inputs, self.frozen_kernel)",
            "test_gradient_sizes.py -k embedding",
        ),
    ],
    "layers/conv.py": [
        (
            "return np.moveaxis(a, (0, 1), (-1, -2)), b",
            "return np.moveaxis(a, (0, 1), (-2, -1)), b",
            "test_adapter_files.py -k 'every_kind and conv'",
        ),
        (
            "(self.dilation_rate[0] * (self.kernel_size[0] - 1), 0)",
            "(0, self.dilation_rate[0] * (self.kernel_size[0] - 1))",
            "test_laws.py -k 'fresh_adapter and causal'",
        ),
        (
            "strides=list(self.strides)",
            "strides=1",
            "test_laws.py -k 'fresh_adapter and conv'",
        ),
        (
            "dilation_rate=self.dilation_rate",
            "dilation_rate=1",
            "test_laws.py -k 'fresh_adapter and conv'",
        ),
        (
            "fan_in=math.prod(window)",
            "fan_in=math.prod(window[:-1])",
            "test_laws.py -k 'starting_values and conv'",
        ),
        (
            "ops.tile(a, (1,) * (len(a.shape) - 1) + (layer.groups,))",
            "ops.repeat(a, layer.groups, axis=-1)",
            "test_laws.py -k 'training_and_merged and groups'",
        ),
        (
            "set(layer.kernel_size + layer.strides) == {1}",
            "set(layer.kernel_size) == {1}",
            "test_against_torch.py test_dora.py -k 'forward and conv2d'",
        ),
    ],
    "layers/einsum_dense.py": [
        (
            "fan_in=math.prod(contracted)",
            "fan_in=math.prod(new)",
            "test_laws.py -k 'starting_values and einsum'",
        ),
        (
            "batch + contracted + rank, batch + rank + new",
            "contracted + batch + rank, batch + rank + new",
            "test_laws.py -k 'training_and_merged and batch'",
        ),
        (
            "if not first and not self.scales_outputs(scale, zero):",
            "if False:",
            "test_quantized.py -k named",
        ),
    ],
    "layers/merged_dense.py": [
        (
            "[list(self.adapted_slices)]",
            "[::-1][list(self.adapted_slices)]",
            "test_base_arguments.py -k equals_layers_of_its_own",
        ),
        (
            "file_rank=adapted * rank",
            "file_rank=rank",
            "test_peft_exchange.py test_adapter_files.py -k merged",
        ),
        (
            "adapted_outputs=np.repeat(\n                self.adapted_slices, units // "
            "len(self.adapted_slices)\n            ),",
            "adapted_outputs=np.tile(\n                self.adapted_slices, units // "
            "len(self.adapted_slices)\n            ),",
            "test_dora.py -k 'merged-dense and outputs_are'",
        ),
        (
            "if any(len(row_numbers) > rank for row_numbers in rows):",
            "if False:",
            "test_adapter_files.py -k another_slice",
        ),
    ],
    "layers/form.py": [
        (
            "ops.transpose(product, np.argsort(order).tolist())",
            "ops.reshape(product, sizes)",
            "test_every_weight.py -k registered_axes",
        ),
        (
            "return Axes((1,), (0,)) if ndim == 3",
            "return Axes((0, 1)) if ndim == 3",
            "test_every_weight.py -k every_weight_of",
        ),
        (
            "others.count(-1) > 1 or 0 in others",
            "others.count(-1) > 1",
            "test_gradient_sizes.py -k share_one_reshape",
        ),
        (
            "rows >= self.a_shape[0]",
            "rows > self.a_shape[0]",
            "test_gradient_sizes.py -k as_many_ids",
        ),
        (
            "ids + slots * vocabulary",
            "ids + slots",
            "test_bank.py -k 'each_row_is_the_layer and embedding'",
        ),
        ("    if transpose:", "    if False:", "test_bank.py -k tied_embedding"),
        (
            "for axis in sorted(self.input_axes):",
            "for axis in sorted(self.input_axes, reverse=True):",
            "test_dora.py -k 'outputs_are and (einsum or conv)'",
        ),
        (
            "b.T.reshape(self.b_shape)",
            "b.reshape(self.b_shape)",
            "test_adapter_files.py -k every_kind",
        ),
        (
            "return min(inputs, math.prod(sizes) // (inputs * batch))",
            "return inputs",
            "test_apply.py -k rank_that_no_update",
        ),
        (
            "parts = (self.file_rank or rank) // rank",
            "parts = 1",
            "test_bank.py -k 'each_row_is_the_layer and merged'",
        ),
    ],
    "layers/dora.py": [
        ("(2 * with_kernel + with_a)", "(with_kernel + with_a)", f"{LAWS} outputs_are"),
        ("there = norm > 0", "there = norm >= 0", f"{LAWS} zero_columns"),
        (
            "(ops.stop_gradient(value) for value in (a, b, kernel))",
            "(value for value in (a, b, kernel))",
            f"{LAWS} gradients_are_those_of_lora",
        ),
        ("gain - 1)", "gain)", f"{LAWS} 'dropout_is_that and linear'"),
        (
            "acts = ops.logical_and(there, self.switched > 0)",
            "acts = there",
            f"{LAWS} contexts_and_merging",
        ),
        (
            "ops.multiply(ops.cast(values, self.variable_dtype), gain)",
            "ops.multiply(values, ops.cast(gain, values.dtype))",
            f"{LAWS} half_precision_multiplies",
        ),
        (
            'norm = np.linalg.norm(weight.astype("float64"), axis=1)',
            'norm = np.linalg.norm(weight.astype("float64"), axis=0)',
            "test_dora_files.py -k slices_without",
        ),
        (
            "if not np.allclose(*others, rtol=1e-4, atol=0):",
            "if False:",
            "test_dora_files.py",
        ),
        (
            "        self.magnitude.assign(self.starting_magnitude())",
            "        pass",
            f"{LAWS} start_is_that_of_peft",
        ),
    ],
    "layers/loralib.py": [
        (
            "(*range(2, len(shape)), 1, 0)",
            "(*range(len(shape) - 1, 1, -1), 1, 0)",
            "test_loralib_files.py test_against_torch.py -k convolution",
        ),
        (
            "[b[start::copies] for start in range(copies)]",
            "np.split(b, copies)",
            "test_loralib_files.py -k standard_convolution",
        ),
        (
            "slice(block * size, (block + 1) * size)",
            "slice(group * size, (group + 1) * size)",
            "test_loralib_files.py -k 'outputs_agree or plain_layers'",
        ),
    ],
    "layers/kinds.py": [
        (
            "if known or issubclass(lora_class, keras.Model):",
            "if False:",
            "test_every_weight.py -k do_not_fit",
        ),
        (
            "        refuse_axes(site)\n",
            "",
            "test_every_weight.py -k do_not_fit",
        ),
        (
            "getattr(cls, m) is not getattr(base, m)",
            "False",
            "test_apply.py -k subclass_with_another_call",
        ),
    ],
    "layers/methods.py": [
        (
            '"float64" if dtype == "float64" else "float32"',
            '"float32"',
            "test_laws.py -k float64",
        ),
    ],
    "layers/merged_training.py": [
        (
            "tf.matmul(inputs, of_hidden, transpose_a=True),",
            "tf.matmul(inputs, of_hidden * 2, transpose_a=True),",
            "test_every_weight.py -k 'loops and lstm'",
        ),
        (
            "tf.matmul(upstream, kernel, transpose_b=True),",
            "tf.matmul(upstream, tf.stop_gradient(kernel), transpose_b=True),",
            "test_second_order.py -k recurrent-lstm",
        ),
        (
            "adapter.dropout == 0",
            "True",
            "test_gradient_sizes.py -k low_rank_path",
        ),
        (
            "and host.compute_dtype == adapter.variable_dtype",
            "",
            "test_gradient_sizes.py -k 'no_kernel_sized and conv2d'",
        ),
        (
            ">= host.form.merges_from",
            ">= 0",
            "test_gradient_sizes.py -k 'no_kernel_sized and deep'",
        ),
        (
            "return of_inputs, *tape.gradient(outputs, [a, b], upstream)",
            "return of_inputs, *tape.gradient(outputs, [a, b], 2 * upstream)",
            "test_second_order.py -k wide",
        ),
        (
            "if form.forms_gradient:",
            "if False:",
            "test_gradient_sizes.py -k few_filters",
        ),
        (
            "form.gradient_of_a(inputs, of_hidden), of_b",
            "form.gradient_of_a(inputs, 2 * of_hidden), of_b",
            "test_second_order.py -k dense",
        ),
    ],
    "layers/torch_layout.py": [
        (
            "if kernel.ndim < 2 or (inputs_first and kernel.ndim == 2):",
            "if kernel.ndim < 2:",
            "test_peft_settings.py -k fan_in_fan_out",
        ),
    ],
    "files/command.py": [
        (
            "if os.path.realpath(path) == os.path.realpath(options.output):",
            "if False:",
            "test_command.py -k write_over",
        ),
    ],
    "serving/sweep.py": [
        (
            'validate_rate(setting.get("learning_rate", 0.0))',
            "pass",
            "test_sweep.py -k what_is_wrong",
        ),
    ],
    "layers/quantized_host.py": [
        (
            "and is_reported_calibrated(layer)",
            "and True",
            "test_quantized.py -k has_no_integers",
        ),
        (
            "    if in_artifact():\n",
            "    if False:\n",
            "test_quantized.py -m slow -k 'formats and output and onnx'",
        ),
        (
            "return self.merge_weights and not self.is_quantized",
            "return self.merge_weights",
            "test_quantized.py -k fresh_adapter",
        ),
        (
            "        return ops.divide(values, scale)",
            "        return ops.multiply(values, scale)",
            "test_quantized.py -k 'gradients_are_those and dense'",
        ),
        (
            "values = ops.reshape(matrix, values.shape)",
            "pass",
            "test_quantized.py -k 'gradients_are_those and awq'",
        ),
    ],
    "layers/reversible_embedding.py": [
        (
            "layer.reverse_dtype or both",
            "layer.reverse_dtype or layer.compute_dtype",
            "test_apply.py -k float32_inputs",
        ),
        (
            "ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)",
            "ops.tanh(ops.divide(logits, cap))",
            "test_apply.py -k reversible",
        ),
    ],
    "layers/arguments.py": [
        (
            '"lora_alpha": "alpha"',
            '"lora_alpha": "rank"',
            "test_bad_input.py -k keywords_of_other",
        ),
        (
            'class_name.replace("LoRA", "Lora")',
            "class_name",
            "test_base_arguments.py -k default_names",
        ),
    ],
    "files/slices.py": [
        (
            "block * (own.scaling / first.scaling)",
            "block * 1",
            "test_name_tables.py -k slices_of_other",
        ),
        (
            "        if remainder.any():",
            "        if False:",
            "test_name_tables.py -k fit",
        ),
        (
            "return value.take(columns, axis)",
            "return value",
            "test_derived_names.py -k layouts",
        ),
    ],
    "files/factors.py": [
        (
            "if not np.isfinite(values).all():",
            "if False:",
            "test_adapter_files.py -k 'bad_tensors and nan'",
        ),
        (
            "        if set(values) not in complete:",
            "        if False:",
            "test_adapter_files.py test_dora_files.py -k 'bad_tensors or damaged'",
        ),
        (
            "return b.transpose(2, 0, 1), a.transpose(1, 0, 2)",
            "return b.reshape(len(b), -1), a.reshape(-1, a.shape[-1])",
            "test_expert_files.py -k spectra",
        ),
    ],
    "files/matching.py": [
        (
            "        if rank != rank_here:",
            "        if False:",
            "test_adapter_files.py -k rank",
        ),
        (
            "if modules != adapted:",
            "if adapted - modules:",
            "test_adapter_files.py -k or_targets",
        ),
        (
            "if np.max(np.abs(value), initial=0) > limit:",
            "if False:",
            "test_hostile_files.py -k infinite",
        ),
        (
            "hint += prefix_between(factors, able)",
            "pass",
            "test_other_formats.py -k prefix",
        ),
        (
            "math.prod(form.a_shape) + math.prod(form.b_shape) > module_factors.size",
            "False",
            "test_hostile_files.py -k without_its_values",
        ),
        (
            "{module: site for module, site in sites if module in self.factors}",
            "{m: self.modules.sites[m] for m in self.factors}",
            "test_expert_files.py -k loads_ours",
        ),
    ],
    "files/combine.py": [
        (
            "if list(other_ids) != list(ids):",
            "if False:",
            "test_token_rows.py -k combined",
        ),
        (
            "**{validation.KEYWORD: ids},",
            "",
            "test_token_rows.py -k combined",
        ),
        (
            "weight * term.settings.scaling / scaling for",
            "weight * term.settings.scaling for",
            "test_combining.py -k exact",
        ),
        (
            "not all(\n        settings.is_number(weight) and math.isfinite(weight)",
            "not all(\n        True",
            "test_combining.py -k bad_input",
        ),
        (
            "stack = b.shape[2] if first.is_stack else 1",
            "stack = 1",
            "test_expert_files.py -k spectra",
        ),
        (
            'new_settings, {x for f in files for x in f.config["target_parameters"]}',
            "new_settings, ()",
            "test_expert_files.py -k spectra",
        ),
    ],
    "files/analyze.py": [
        ("if file.rows:", "if False:", "test_check_adapter.py -k rows_of"),
        (
            "np.linalg.norm(norms[rank:])",
            "np.linalg.norm(norms[:rank])",
            "test_combining.py -k nearest",
        ),
        (
            "energy * sums[-1])) + 1",
            "energy * sums[-1]))",
            "test_analyze.py -k 'cut_to or every_kind'",
        ),
        (
            "norms = np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=0)",
            "norms = values.reshape(-1, values.shape[-1])[0]",
            "test_expert_files.py -k spectra",
        ),
        ("[b, -other_b]", "[b, other_b]", "test_command.py -k diff"),
        (
            "abs(x.settings.scaling - usual.scaling)",
            "0 * abs(x.settings.scaling - usual.scaling)",
            "test_check_adapter.py",
        ),
        (
            "values = scaling * singular_values(left, right)",
            "values = singular_values(left, right)",
            "test_analyze.py -k 'a_folder_says and sequential'",
        ),
        ("{path!r} has no A", "{site.path!r} has no A", "test_own_method.py -k path"),
    ],
    "files/experts.py": [
        (
            "b = b.reshape(len(b), rank, -1)",
            "b = b.reshape(len(b), -1, rank).swapaxes(1, 2)",
            "test_expert_files.py -k 'files_of_peft and mixtral'",
        ),
        (
            "enumerate(reversed(adapted))",
            "enumerate(adapted)",
            "test_expert_files.py -k 'loads_ours and mixtral'",
        ),
        (
            "a = a.transpose(1, 0, 2).reshape(-1, a.shape[-1])",
            "a = a.reshape(-1, a.shape[-1])",
            "test_expert_files.py -k 'loads_ours and mixtral'",
        ),
        (
            "{key[match.end() :]}",
            "",
            "test_expert_files.py -k 'pair_for and mixtral'",
        ),
        (
            "np.stack(b, 2)",
            "np.stack(b[::-1], 2)",
            "test_expert_files.py -k 'pair_for and mixtral'",
        ),
        (
            "if modules and own_depths != set(range(len(modules))):",
            "if False:",
            "test_expert_files.py -k not_fit",
        ),
        (
            " or len(a) % rank",
            "",
            "test_expert_files.py -k not_fit",
        ),
        (
            "if len(different) > 1:",
            "if False:",
            "test_expert_files.py -k no_stacks",
        ),
        (
            "if not is_complete or [",
            "if [",
            "test_expert_files.py -k no_stacks",
        ),
        (
            "elif not suffix or match[0] != module:",
            "elif False:",
            "test_expert_files.py -k no_stacks",
        ),
    ],
    "files/families.py": [
        (
            "rows = np.arange(size) + index * size",
            "rows = np.arange(size) + (len(parts) - 1 - index) * size",
            "test_expert_files.py -k 'files_of_peft and mixtral'",
        ),
    ],
    "files/config.py": [
        (
            '"target_modules": sorted(settings.keys() - parameters.keys()),',
            '"target_modules": sorted(settings.keys() - parameters.keys()) or None,',
            "test_expert_files.py -k nothing_but",
        ),
        (
            "            if other_index > index:\n                break\n",
            "",
            "test_hostile_files.py test_adapter_files.py test_peft_settings.py",
        ),
        (
            "if len(unmatched) + len(lost) == len(targets) + len(parameters):",
            "if False:",
            "test_hostile_files.py -k mean_nothing",
        ),
    ],
    "files/extract.py": [
        (
            "pissa(matrix, own_rank, scaling=1.0)",
            "pissa(matrix, own_rank, scaling=2.0)",
            "test_combining.py -k extracted_adapter",
        ),
        (
            "return isinstance(site, WeightSite) or kinds",
            "return kinds",
            "test_expert_files.py -k are_extracted",
        ),
    ],
    "files/validation.py": [
        (
            'if file.get("peft_type") != "LORA":',
            "if False:",
            "test_adapter_files.py -k bad_settings",
        ),
        (
            "if file.get(key) and key not in torch_layout.METHODS:",
            "if False:",
            "test_files_as_found.py -k change_the_mathematics",
        ),
        (
            "if isinstance(start, str) and start.lower()",
            "if isinstance(start, str) and str()",
            "test_adapter_files.py test_files_as_found.py -k settings",
        ),
        (
            "not 1e-37 < alpha < 3e38",
            "not 0 < alpha",
            "test_hostile_files.py -k 'infinite or numbers'",
        ),
        (
            "or len(values) != len(tokens[names[0]])",
            "",
            "test_token_rows.py -k disagree",
        ),
    ],
    "files/disk.py": [
        (
            'if metadata.get("sha256", sha256) != sha256:',
            "if False:",
            "test_adapter_files.py -k flipped",
        ),
        (
            "if stored.get(key) != settings.get(key):",
            "if False:",
            "test_adapter_files.py test_folders.py test_hostile_files.py"
            " -k 'belong or between_the_files or bad_settings'",
        ),
        (
            'config.get("sha256") == metadata.get("sha256")',
            'config.get("sha256") != metadata.get("sha256")',
            "test_folders.py -k stopped_between",
        ),
        (
            "if kind not in FLOATS:",
            "if False:",
            "test_adapter_files.py -k 'bad_tensors and int'",
        ),
        (
            "        if read_config(directory) == config:",
            "        if True:",
            "test_folders.py -k 'read_while or between'",
        ),
    ],
    "files/patterns.py": [
        ("*(dot.end() for", "*(0 for", "test_hostile_files.py -k what_python_makes"),
        (
            "if closed and (",
            "if False and (",
            "test_hostile_files.py -k inside_of_repeats",
        ),
        (
            "groups[-1][2] *= closed[2]",
            "pass",
            "test_hostile_files.py -k ways_to_match",
        ),
        (
            "self.budget.spend(len(starts) * ways)",
            "pass",
            "test_hostile_files.py -k 'thousand or is_spent'",
        ),
    ],
    "files/save.py": [
        (
            "settings.with_rank(site.lora.file_rank, use_rslora)",
            "settings",
            "test_adapter_files.py -k 'every_kind and merged'",
        ),
        (
            "processes.run_on_all(model, lambda: writes and adapter.save(directory))",
            "writes and adapter.save(directory)",
            WORKERS,
        ),
        (
            'bias = "all" if biases - settings.keys() else "lora_only"',
            'bias = "lora_only"',
            "test_adapter_files.py -k which_biases",
        ),
        (
            "        return 0.0\n",
            "        return dropout\n",
            "test_expert_files.py -k has_not",
        ),
        (
            "if slices.without_slice(module) in parameters and site.lora.keyword:",
            "if False:",
            "test_expert_files.py -k has_not",
        ),
        (
            "format(epoch=epoch + 1",
            "format(epoch=epoch",
            "test_adapter_checkpoint.py -k epoch",
        ),
        (
            "math.isnan(logs[self.monitor]) or",
            "",
            "test_adapter_checkpoint.py -k no_number",
        ),
    ],
    "files/tensors.py": [
        (
            '    if variable.name == "bias":\n        return value.reshape(-1)',
            "",
            "test_adapter_files.py test_name_tables.py -k 'biases or peft_loads_ours'",
        ),
    ],
    "files/names.py": [
        (
            "other = modules.get(module)",
            "other = None",
            "test_bad_input.py test_adapter_files.py -k names",
        ),
        (
            "if kinds.looks_up(layer) and id(kinds.layer_of(layer)) in output_ids:",
            "if False:",
            "test_peft_settings.py -k tied",
        ),
        (
            "if names == families.TRANSFORMERS_4:  # where",
            "if False:  # whose",
            "test_expert_files.py -k has_not",
        ),
    ],
    "files/load.py": [
        (
            "site.lora.set_alpha(settings.alpha, settings.use_rslora)",
            "site.lora.set_alpha(settings.alpha)",
            "test_adapter_files.py -k every_kind",
        ),
        (
            "values += unread_base_values(layers_and_model, values)",
            "pass",
            "test_trained_beside.py -k brings_the_bases_own",
        ),
    ],
    "files/other_formats.py": [
        (
            'parts.get("alpha", len(parts["A"]))',
            'len(parts["A"])',
            "test_other_formats.py -k files_of_kohya",
        ),
        (
            'scale * len(x["A"])',
            "scale",
            "test_other_formats.py -k folders_of_mlx_are",
        ),
        (
            "if name in modules or not FLAT.match(name)",
            "if True",
            "test_other_formats.py -k files_of_kohya",
        ),
        (
            "if format is not None and format not in PEFT",
            "if False",
            "test_other_formats.py -k beside_those",
        ),
        ("if format.next_step:", "if False:", "test_other_formats.py -k named_with"),
    ],
    "files/from_keras.py": [
        (
            "layer.lora_alpha / layer.lora_rank",
            "layer.lora_alpha",
            "test_enable_lora_files.py -k layers_of_keras",
        ),
        (
            "np.kron(np.eye(count, dtype=b.dtype), b)",
            "np.kron(b, np.eye(count, dtype=b.dtype))",
            "test_enable_lora_files.py -k layers_of_keras",
        ),
    ],
    "files/from_loralib.py": [
        (
            "given.with_rank(given.rank if loralib_form else len(a))",
            "given",
            "test_loralib_files.py",
        ),
    ],
    "models/targets.py": [
        (
            "isinstance(layer, PASS_THROUGH) else layer",
            "False else layer",
            "test_report.py -k subclassed",
        ),
        ('vars(layer).pop("call", None)', "pass", "test_report.py -k subclassed"),
        (
            "    keras.layers.Activation,\n",
            "",
            "test_apply.py -k leaves_the_head_out",
        ),
        (
            "values.setdefault(path, pattern[key])",
            "values[path] = pattern[key]",
            "test_apply.py -k patterns",
        ),
    ],
    "models/choose.py": [
        (
            "in matches_of(target, layers_and_sites, paths.sites, candidates)",
            'in targets.matching_paths(target, layers_and_sites, "target", candidates)',
            "test_every_weight.py -k in_a_layer_that_trains",
        ),
        (
            "    if held:\n",
            "    if False:\n",
            "test_every_weight.py -k cell_as_a_target",
        ),
        (
            "    warn_of_axes(map(kinds.layer_of, chosen.values()))\n",
            "",
            "test_every_weight.py -k do_not_fit",
        ),
        (
            "            or sharing_reason(path, site, holders)\n",
            "",
            "test_every_weight.py -k several_layers",
        ),
        (
            "(adapted if path in chosen else frozen)",
            "adapted",
            "test_report.py -k subclassed",
        ),
        (
            "while owner and paths.layers.get(owner, layer) is layer:",
            "while owner and owner not in paths.layers:",
            "test_every_weight.py -k calls_itself",
        ),
        (
            "if id(layer) in output_ids or is_named_bias(site):",
            "if id(layer) in output_ids:",
            "test_every_weight.py -k means_the_weights",
        ),
        (
            "for x in (p, *paths.sites_of.get(p, ()))",
            "for x in (p,)",
            "test_every_weight.py -k means_the_weights",
        ),
        (
            'target == "all" or (is_known and kinds.as_site(site).in_all_linear)',
            'target == "all" or True',
            "test_apply.py -k leaves_the_head_out",
        ),
        (
            "if paths_meant and excluded.issuperset(paths_meant):",
            "if False:",
            "test_apply.py -k matches_nothing",
        ),
    ],
    "models/apply.py": [
        (
            "if asked.target is None and not tokens:",
            "if False:",
            "test_token_rows.py -k ids_that_are_none",
        ),
        (
            "report.is_dry_run = bool(dry_run)",
            "pass",
            "test_apply.py -k dry_run",
        ),
        (
            '"rank": ranks.get(path, asked.rank)',
            '"rank": asked.rank',
            "test_apply.py -k test_patterns",
        ),
        (
            "    sites.refuse_adapters(paths)\n",
            "",
            "test_apply.py -k applying_twice",
        ),
    ],
    "models/training_state.py": [
        (
            "layer.trainable = any(id(v) in kept for v in variables)",
            "layer.trainable = True",
            "test_freezing.py -k batch_normalization",
        ),
        (
            '    if variable.name == "beta":\n'
            "        return not layer_state.non_trainable_variables(layer)\n",
            "",
            "test_trained_beside.py -k calls_so",
        ),
        (
            "            variable.trainable = id(variable) in kept",
            "            pass",
            "test_freezing.py -k only_the_factors",
        ),
        (
            "{**values, **old.base_values}",
            "{**old.base_values, **values}",
            "test_trained_beside.py test_freezing.py test_carriers.py"
            " -k 'base or marked'",
        ),
        (
            "    for variable, flag in zip(variables, flags, strict=True):\n"
            "        variable.trainable = flag",
            "    for variable in variables:\n        variable.trainable = trainable",
            "test_trained_beside.py test_apply.py -k 'undoing or frozen'",
        ),
    ],
    "models/merge.py": [
        (
            "return bool(np.isfinite(ops.convert_to_numpy(values)).all())",
            "return True",
            "test_merging.py -k 'finite or cannot_hold'",
        ),
        (
            '        refuse_not_finite(site, {"the merged kernel": kernel})\n',
            "",
            "test_merging.py -k 'finite or cannot_hold'",
        ),
        (
            "            small[site] = kernel",
            "            small[site] = site.lora.delta()",
            "test_merging.py -k 'leaves_plain_layers and sequential'",
        ),
        (
            "                kernel = site.merged_kernel(site.kernel_dtype)",
            "                kernel = site.lora.delta()",
            "test_merging.py -k large_kernels",
        ),
        (
            "        for variable, value in training_state.base_values(layer):\n"
            "            distribution.assign(variable, value)\n",
            "        pass\n",
            "test_trained_beside.py -k the_base_model_is",
        ),
        (
            "dtype = layer.lora.variable_dtype",
            "dtype = layer.kernel_dtype",
            "test_quantized.py -k half_precision_is",
        ),
        (
            "for x in (kernel, layer.merged_kernel(dtype))",
            "for x in (kernel, kernel)",
            "test_quantized.py -k 'what_it_loses and dense'",
        ),
    ],
    "models/contexts.py": [
        (
            'refusing = compiled.refusing_to_train(model, UNTRAINED.format("merged"))',
            "refusing = contextlib.nullcontext()",
            "test_merging.py -k fitting_inside",
        ),
    ],
    "models/start_values.py": [
        ("        moments.sum_over_processes(model)", "        pass", WORKERS),
        (
            "np.sqrt(values / scaling)",
            "np.sqrt(values)",
            "test_starts.py -k 'trajectory or brings'",
        ),
        (
            "(r[..., :rank, :], q[..., :rank])",
            "(r[..., -rank:, :], q[..., -rank:])",
            "test_starts.py -k trajectory",
        ),
        ("q[..., 1::2, :]", "q[..., 0::2, :]", "test_starts.py -k orthogonal"),
        (" - np.outer(mean, mean)", "", "test_starts.py -k eva_starts"),
        ("-pair[0]", "pair[0]", "test_starts.py -k moves_ranks"),
        ("return min(tried", "return max(tried", "test_starts.py -k loftq"),
    ],
    "models/initialize.py": [
        (
            "if not site.lora.trains_rows",
            "",
            "test_starts.py -k token_rows",
        ),
        (
            "if torch_layout.to_numpy(lora.a).any() and "
            "torch_layout.to_numpy(lora.b).any():",
            "if False:",
            "test_starts.py -k refusals",
        ),
    ],
    "models/lora_plus.py": [
        (
            "learning_rate * self.lora_plus_ratio",
            "learning_rate",
            "test_lora_plus.py -k 'equals_two_plain and SGD'",
        ),
        (
            "if not any(map(self.is_faster, variables)):",
            "if False:",
            "test_lora_plus.py -k no_b_among",
        ),
    ],
    "models/sites.py": [
        (
            'if getattr(base, "plain_class", None)',
            "if issubclass(base, LoRALayer)",
            "test_every_weight.py -k paths_stay",
        ),
        (
            "            if used[part] > 1:",
            "            if False:",
            "test_report.py test_apply.py -k 'path or report or target'",
        ),
        (
            "of_cells.add(id(site.kernel_owner()))",
            "pass",
            "test_every_weight.py -k means_the_weights",
        ),
    ],
    "models/report.py": [
        (
            "return self.total - self.added",
            "return self.total",
            "test_report.py -k rows_and_table",
        ),
        (
            "parameters = self.plain + self.packed",
            "parameters = self.plain",
            "test_report.py -k int4",
        ),
    ],
    "models/atomic.py": [
        (
            "            raise_as_os_error(error, path)\n",
            "",
            "test_export.py -k full_disk",
        ),
        ("        os.fsync(file.fileno())", "        pass", "test_folders.py -k disk"),
        (
            "        elif path.is_dir():",
            "        elif False:",
            "test_export.py -k second",
        ),
    ],
    "files/folder.py": [
        (
            "if path.suffix in PICKLES:",
            "if False:",
            "test_other_formats.py -k pickles_are_not_opened",
        ),
        (
            "        refuse_pickles(directory.parent, [directory])\n",
            "",
            "test_other_formats.py -k pickles_are_not_opened",
        ),
    ],
    "models/export.py": [
        (
            "get_input_element_type(0).is_integral()",
            "get_input_element_type(0).is_dynamic()",
            "test_quantized.py -m slow -k 'openvino and int8'",
        ),
        (
            "if format not in FORMATS:",
            "if False:",
            "test_export.py -k format_that_is_none",
        ),
        (
            "refuse_broken_artifact(new, format)",
            "pass",
            "test_quantized.py -m slow -k 'cannot_be_run and litert'",
        ),
        ("    if foreign:", "    if False:", "test_folders.py -k deletes_nothing"),
    ],
    "models/keras_files.py": [
        (
            'if str(filepath).endswith((".h5", ".hdf5")):',
            "if False:",
            "test_carriers.py -k old_h5",
        ),
        (
            "            quantized_host.refuse_quantizing(site, mode)  # before any "
            "change",
            "            pass",
            "test_quantized.py -k 'calibrating or before_any_layer'",
        ),
        (
            '"merge_weights": {p: x.merge_weights for',
            '"merge_weights": {p: True for',
            "test_carriers.py -k how_a_layer_merges",
        ),
        (
            '        training_state.restore_flags(layers_now, config["trainable"])\n',
            "",
            "test_carriers.py -k 'frozen_biases or only_marked'",
        ),
    ],
    "serving/banked.py": [
        (
            "        self.write(count - 1, b=np.nan)\n",
            "",
            "test_bank.py -k ids_that_name_nothing",
        ),
        (
            'return 1.0 if name == "gain" else 0.0',
            "return 0.0",
            "test_bank.py -k 'dora or lengths'",
        ),
        (
            "if gain is not None and not backwards:",
            "if False:",
            "test_bank.py -k lengths_of_its_dora",
        ),
    ],
    "serving/id_table.py": [
        (
            "self.id_of.pop(name) + self.capacity + 1",
            "self.id_of.pop(name)",
            "test_bank.py -k ids_that_name_nothing",
        ),
        (
            "np.where(entries[:, 0] == ids, entries[:, 1], self.no_slot)",
            "entries[:, 1]",
            "test_bank.py -k ids_that_name_nothing",
        ),
    ],
    "serving/rows.py": [
        (
            "row = ops.floor_divide(row, times)",
            "row = ops.mod(row, times)",
            "test_bank.py -k another_leading_axis",
        ),
        ("kept / (1 - rates)", "kept", "test_bank_fit.py -k dropout"),
    ],
    "models/quantized.py": [
        (
            "elif of_inputs and",
            "elif False and",
            "test_quantized.py -k quantizes_inputs_where",
        ),
    ],
    "serving/per_adapter.py": [
        (
            "list(grads), distribution.gather_over_replicas(self.batch.ids)",
            "list(grads), self.batch.ids",
            REPLICAS,
        ),
        (
            "ops.where(ids == 0, 0.0, values)",
            "values",
            "test_bank_fit.py",
        ),
        (
            "used = used * expand_to(ops.cast(mask, values.dtype), values)",
            "pass",
            "test_bank_fit.py -k masked",
        ),
    ],
    "serving/reading.py": [
        (
            "ops.subtract(self.bias, self.layer.bias)",
            "ops.convert_to_tensor(self.bias)",
            "test_bank.py -k biases_and_heads",
        ),
    ],
    "keras_internals/classes.py": [
        (
            "    cls = class_that_warns_of_lists(cls)\n",
            "",
            "test_every_weight.py -k list_of_weights",
        ),
    ],
    "keras_internals/processes.py": [
        ("if known.setdefault(key, text) != text:", "if False:", WORKERS),
        ('if other["kind"] is not None:', "if False:", WORKERS),
    ],
    "keras_internals/distribution.py": [
        (
            "variable.assign(keras.ops.where(kept, now, value))",
            "variable.assign(now)",
            "test_bank_fit.py -k takes_no_step",
        ),
        (
            "contextlib.nullcontext() if strategy is None else strategy.scope()",
            "contextlib.nullcontext()",
            REPLICAS,
        ),
        (
            "if strategy is not now and isinstance(now, mirrored):",
            "if False:",
            REPLICAS,
        ),
        (
            "return context.all_gather(keras.ops.copy(rows), axis=0)",
            "return rows",
            REPLICAS,
        ),
        ("inside.get_variable_layout = get_variable_layout", "pass", LAYOUTS),
        (
            'layout if any(getattr(layout, "axes", None) or ()) else None',
            "layout if any((layout.axes or ())[:1]) else None",
            "KERAS_BACKEND=jax test_distribution.py -k factors_of_every_weight",
        ),
        (
            'options["layout"] = distribution.get_variable_layout(variable)',
            "pass",
            LAYOUTS,
        ),
    ],
    "serving/training.py": [
        (
            "if not self.in_training:",
            "if False:",
            "test_bank_fit.py -k cannot_be_trained_apart",
        ),
    ],
    "keras_internals/variable_state.py": [
        (
            "variable.__class__ = watched_class(type(variable))",
            "pass",
            "test_every_weight.py -k reads_past",
        ),
        (
            "tracked.insert(place.position, tracked.pop())",
            "pass",
            "test_merging.py -k leaves_plain_layers",
        ),
        (
            "        variable.assign(value)\n",
            "        pass\n",
            "test_laws.py -k delta_is_scaling",
        ),
    ],
    "keras_internals/layer_state.py": [
        (
            "own_variables(layer)) if id(v) not in held]",
            "own_variables(layer)) if False]",
            "test_every_weight.py -k reads_past",
        ),
        (
            "    replace(tracked, old, new)\n    try",
            "    try",
            "test_every_weight.py -k exported",
        ),
    ],
    "keras_internals/compiled.py": [
        (
            "found, _ = [*models], [*same]",
            "found = list(models)",
            "test_models_around.py -k build_tuples",
        ),
    ],
    "keras_internals/optimizers.py": [
        (
            "            learning_rate = self.faster(learning_rate)",
            "            pass",
            "test_lora_plus.py -k 'equals_two_plain and SGD'",
        ),
    ],
    "layers/experts.py": [
        (
            "return outputs + ops.cast(low_rank, outputs.dtype)",
            "return outputs",
            "test_experts.py -k 'both_paths and QwenMoe'",
        ),
        (
            "or not self.is_low_rank",
            "",
            "test_experts.py -k dora",
        ),
        (
            "and rows not in outputs",
            "",
            "test_experts.py -k another_kind",
        ),
        (
            "# So that Keras passes `training` to the call.",
            "return",
            "test_experts.py -k 'size and QwenMoe and float32'",
        ),
    ],
    "layers/products.py": [
        (
            "lambda x: x.whole() if isinstance(x, AdaptedWeight) else x,",
            "lambda x: 0 if isinstance(x, AdaptedWeight) else x,",
            "test_experts.py -k does_otherwise",
        ),
        (
            "return lora.stand_in is None and all(",
            "return all(",
            "test_experts.py -k 'both_paths and QwenMoe'",
        ),
    ],
    "layers/substituted.py": [
        (
            "            self.refuse_attribute(error, kernels)\n",
            "",
            "test_every_weight.py -k only_variables_have",
        ),
        (
            "dict.fromkeys(places[site.weight_name], site",
            "dict.fromkeys(places[site.weight_name][:1], site",
            "test_every_weight.py -k several_places",
        ),
        (
            "kernels |= self.calls_inside(",
            "kernels = self.calls_inside(",
            "test_every_weight.py -k cudnn",
        ),
        (
            "if not places or kept_for != [adapters, variable_ids(self, places)]:",
            "if not places:",
            "test_every_weight.py -k stand_elsewhere",
        ),
        (
            "kernel = ops.stop_gradient(self.base_kernel(lora.variable_dtype))",
            "kernel = self.base_kernel(lora.variable_dtype) * 2",
            "test_every_weight.py -k every_weight_of",
        ),
        (
            "(lora.stand_in or lora).effective_kernel(kernel)",
            "lora.effective_kernel(kernel)",
            "test_every_weight.py -k every_weight_of",
        ),
        (
            "self.kernel_owner().compute_dtype if casts",
            '"float32" if casts',
            "test_laws.py -k 'every_policy and recurrent'",
        ),
        (
            'names = {f"{word}_constraint" for word in words} | vars(layer).keys()',
            "names = set()",
            "test_every_weight.py -k says_why",
        ),
    ],
    "layers/recurrent.py": [
        (
            "if training is not True or not calls.in_tensorflow_graph():",
            "if True:",
            "test_gradient_sizes.py -k of_a_cell",
        ),
        (
            "return type(cell) in CELLS and all(",
            "return all(",
            "test_every_weight.py -k 'loops and own'",
        ),
        (
            'isinstance(x, types.FunctionType) and x.__module__.startswith("keras.")',
            "True",
            "test_every_weight.py -k 'loops and function'",
        ),
        (
            "exact = self.dtype == site.lora.variable_dtype",
            "exact = True",
            "test_every_weight.py -k whole_kernels",
        ),
        (
            "if issubclass(cls.plain_class, (*convolves, keras.layers.ConvLSTM3D)):",
            "if True:",
            "test_every_weight.py -k cell_of_a_users",
        ),
        (
            'walk(inner, (*keys, "cells", place), f"{prefix}cells/{place}/")',
            "pass",
            "test_every_weight.py -k means_the_weights",
        ),
    ],
    "layers/token_rows.py": [
        (
            "for more in (-tf.gather(flat, places), own):",
            "for more in (own,):",
            "test_token_rows.py -k touches_what_is_chosen",
        ),
        (
            "own = tf.matmul(tf.cast(tf.gather(chosen, places), rows.dtype), rows)",
            "own = tf.repeat(rows[:1], tf.shape(places)[0], axis=0)",
            "test_token_rows.py -k touches_what_is_chosen",
        ),
        (
            "return calls.in_tensorflow_graph() and not calls.traced_for_xla()",
            "return calls.in_tensorflow_graph()",
            "test_token_rows.py -k touches_what_is_chosen",
        ),
        (
            "return outputs * others + ops",
            "return outputs + ops",
            "test_token_rows.py -k take_the_place",
        ),
        (
            "chosen = ops.logical_and(chosen, self.switched > 0)",
            "pass",
            "test_token_rows.py -k take_the_place",
        ),
        (
            "source[list(self.indices)] = size + np.arange(len(self.indices))",
            "pass",
            "test_token_rows.py -k quantized",
        ),
        (
            "if i >= size",
            "if i > size",
            "test_token_rows.py -k ids_that_are_none",
        ),
    ],
}


def rows() -> list:
    faults = [(file, *fault) for file, found in FAULTS.items() for fault in found]
    return [Mutation(number, *fault) for number, fault in enumerate(faults, start=1)]


def chosen(words) -> list:
    """Rows by number (17, 17-20) or by a part of their file's path."""

    def means(word, row):
        low, _, high = word.partition("-")
        if low.isdecimal():
            return int(low) <= row.number <= int(high or low)
        return word in row.file

    return [row for row in rows() if not words or any(means(w, row) for w in words)]


def run(row, tree, limit) -> str:
    """What became of a fault: "caught", or why it was not."""
    path = tree / "keras_lora" / row.file
    before = path.read_text(encoding="utf-8")
    if (count := before.count(row.text)) != 1:
        return f"NOT TRIED: the text stands {count} times in the file"
    arguments = [
        f"tests/{word}" if word.endswith(".py") else word
        for word in shlex.split(row.tests)
        if not word.endswith(".py") or (tree / "tests" / word).exists()
    ]
    path.write_text(before.replace(row.text, row.other), encoding="utf-8")
    try:
        # Forked, as importing Keras takes longer than most of these tests.
        context = multiprocessing.get_context("fork")
        process = context.Process(target=run_tests, args=(tree, arguments))
        process.start()
        process.join(limit)
        process.kill()
        process.join()
    finally:
        path.write_text(before, encoding="utf-8")
    last = (tree / OUTPUT).read_text(encoding="utf-8").strip().splitlines()[-1:]
    if process.exitcode < 0:
        return f"NOT CAUGHT in {limit} s"
    code = process.exitcode - RAN
    if code == pytest.ExitCode.TESTS_FAILED:
        return "caught"
    found = {
        pytest.ExitCode.OK: "NOT CAUGHT",
        pytest.ExitCode.INTERRUPTED: "caught while collecting",
    }
    return f"{found.get(code, 'NOT TRIED')}: {' '.join(last)}"


def run_tests(tree, arguments):
    output = os.open(tree / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    settings = [word for word in arguments if SETTING.match(word)]
    if settings:  # of what was read when Keras was imported
        own = [word for word in arguments if word not in settings]
        env = os.environ | dict(word.split("=", 1) for word in settings)
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider"]
        os._exit(RAN + subprocess.run([*command, *own], env=env).returncode)
    # No bytecode: two faults of a file may have one size, in one second.
    sys.dont_write_bytecode = True
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # before pytest could see
    options = ["-xq", "-p", "no:cacheprovider", "-W", imported, "-m", ""]  # slow too
    code = pytest.main([*options, *arguments])
    sys.stdout.flush()
    os._exit(RAN + int(code))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("rows", nargs="*", help="numbers, ranges, or parts of paths")
    parser.add_argument("--tree", type=Path, default=ROOT, help="what is copied")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each")
    arguments = parser.parse_args()
    for name in ("keras", "torch", "peft", "keras_hub"):
        importlib.import_module(name)
    missed, found = [], chosen(arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(arguments.tree, tree, ignore=IGNORED)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        for row in found:
            start = time.perf_counter()
            outcome = run(row, tree, arguments.limit)
            seconds = time.perf_counter() - start
            where = f"{row.number:3} {row.file}: {row.text.strip().splitlines()[0]}"
            print(f"{outcome:10} {seconds:4.0f} s  {where}", flush=True)
            missed += [] if outcome.startswith("caught") else [row]
    print(f"{len(found) - len(missed)} of {len(found)} faults were caught.")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
