"""One training step of networks with LoRA layers, as ratios to the floor."""

import loralib
import peft
import tensorflow as tf
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks import networks
from benchmarks.networks import normal
from benchmarks.timing import ratios


def keras_step(model, work, jit=False):
    """A compiled step, as a function without arguments."""
    model.compile(work.optimizer(1e-4), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    x, y = tf.constant(work.x), tf.constant(work.y)

    @tf.function(jit_compile=jit)
    def step():
        return model.train_step((x, y))["loss"]

    def run():
        return step().numpy()

    run(), run()
    return run


def torch_step(module, inputs, targets):
    x, y = torch.tensor(inputs), torch.tensor(targets)
    vector = torch.nn.Parameter(torch.ones(x.shape[-1]))
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([vector, *trained], 1e-4)

    def run():
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x * vector), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    run(), run()
    return run


def step(network, arguments, rounds, jit=False):
    """Every variant of a network of `benchmarks.networks`, over its baseline."""
    work = getattr(networks, network)(*arguments)
    steps = {name: keras_step(make(), work, jit) for name, make in work.models.items()}
    return ratios(steps, work.baseline, rounds)


def methods(network, arguments, rounds):
    """Methods over LoRA, and for a stack of Dense layers PEFT's DoRA over its LoRA."""
    work = getattr(networks, network)(*arguments)
    steps = {name: keras_step(make(), work) for name, make in work.methods.items()}
    found = ratios(steps, "LoRA", rounds)
    if network != "dense":
        return found
    width, _, rank, layers, dropout = arguments
    names = [str(index) for index in range(layers)]
    theirs = {}
    for name, use_dora in (("PEFT's LoRA", False), ("PEFT's DoRA", True)):
        linears = (torch.nn.Linear(width, width, bias=False) for _ in names)
        config = peft.LoraConfig(
            r=rank, lora_dropout=dropout, target_modules=names, use_dora=use_dora
        )
        model = peft.get_peft_model(torch.nn.Sequential(*linears), config)
        theirs[name] = torch_step(model, work.x, work.y)
    return found | ratios(theirs, "PEFT's LoRA", rounds)


class Int8Linear(torch.nn.Linear):
    """A layer of integers and one scale for each output, as a float one in forward."""

    def __init__(self, width):
        super().__init__(width, width, bias=False)
        weight = self.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        integers = torch.round(weight / scale).to(torch.int8)
        self.weight = torch.nn.Parameter(integers, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale)


def quantized(network, arguments, rounds):
    """Every variant over float32, and PEFT over a dequantized kernel over its own."""
    width, _, rank = arguments
    work = networks.quantized(*arguments)
    names = [str(index) for index in range(6)]
    config = peft.LoraConfig(r=rank, target_modules=names)
    theirs = {}
    for name, linear in (
        ("PEFT float32", lambda n: torch.nn.Linear(n, n, bias=False)),
        ("PEFT int8", Int8Linear),
    ):
        network = torch.nn.Sequential(*(linear(width) for _ in names))
        theirs[name] = torch_step(peft.get_peft_model(network, config), work.x, work.y)
    found = step("quantized", arguments, rounds)
    return found | ratios(theirs, "PEFT float32", rounds)


def jit_step(network, arguments, rounds):
    return step(network, arguments, rounds, jit=True)


def dense(network, arguments, rounds):
    """The same, and torch's peers over torch's own floor."""
    found = step("dense", arguments, rounds)
    width, rows, rank, layers, dropout = arguments
    x = normal(rows, width)

    def linear():
        return torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
        )

    of_loralib = torch.nn.Sequential(
        *(
            loralib.Linear(width, width, r=rank, lora_dropout=dropout, bias=False)
            for _ in range(layers)
        )
    )
    loralib.mark_only_lora_as_trainable(of_loralib)
    config = peft.LoraConfig(
        r=rank, lora_dropout=dropout, target_modules=[str(i) for i in range(layers)]
    )
    steps = {
        "torch floor": torch_step(linear().requires_grad_(False), x, x),
        "loralib": torch_step(of_loralib, x, x),
        "PEFT": torch_step(peft.get_peft_model(linear(), config), x, x),
    }
    return found | ratios(steps, "torch floor", rounds)


def experts(network, arguments, rounds):
    """The same, and PEFT over a bank of transformers, which all tokens go through."""
    count, width, inner, _, rank = arguments
    config = transformers.MixtralConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_local_experts=count,
        num_experts_per_tok=count,
    )
    x = networks.normal(arguments[3], width)

    class Bank(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = MixtralExperts(config)
            for parameter in self.parameters():
                torch.nn.init.normal_(parameter, std=0.02)

        def forward(self, x):
            chosen = torch.arange(count).expand(len(x), count)
            return self.experts(x, chosen, torch.full(chosen.shape, 1 / count))

    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=rank, target_modules=[], target_parameters=names)
    theirs = {
        "torch floor": torch_step(Bank().requires_grad_(False), x, x),
        "PEFT": torch_step(peft.get_peft_model(Bank(), lora), x, x),
    }
    found = step("experts", arguments, rounds)
    return found | ratios(theirs, "torch floor", rounds)


def fused(network, arguments, rounds):
    """The same for one kernel of query, key and value, with loralib's MergedLinear."""
    width, _, rank = arguments
    work = networks.fused(*arguments)
    linear = torch.nn.Linear(width, 3 * width, bias=False).requires_grad_(False)
    of_loralib = loralib.MergedLinear(
        width, 3 * width, r=rank, enable_lora=[True, False, True], bias=False
    )
    loralib.mark_only_lora_as_trainable(of_loralib)
    theirs = {
        "torch floor": torch_step(linear, work.x, work.y),
        "loralib MergedLinear": torch_step(of_loralib, work.x, work.y),
    }
    found = step("fused", arguments, rounds)
    return found | ratios(theirs, "torch floor", rounds)
