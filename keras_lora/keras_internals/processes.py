"""Messages between the processes that hold one model.

On JAX these are processes of `keras.distribution`, on TensorFlow the workers of
`MultiWorkerMirroredStrategy`.
"""

import json
import types

import keras
import numpy as np

from keras_lora.keras_internals import (
    calls,
    layer_state,
    private_names,
    probes,
    warn_caller,
)

BARRIER_SECONDS = 30  # how long a process waits for the others
WORKING_SECONDS = 600  # the same, while one of them reads or writes a file


EXCHANGES = types.SimpleNamespace(count=0)  # in which all processes took part


def strategy_of(variables):
    """Returns the `tf.distribute` strategy under which variables were made, or None."""
    values = (getattr(x.value, "distribute_strategy", None) for x in variables)
    return next(filter(None, values), None)


def worker_strategy(model):
    """Returns the strategy over several TensorFlow processes of a model, or None."""
    if keras.backend.backend() != "tensorflow":
        return None
    strategy = strategy_of(model.variables)
    kind = probes.module("tensorflow").distribute.MultiWorkerMirroredStrategy
    return strategy if isinstance(strategy, kind) and len(tasks(strategy)) > 1 else None


def tasks(strategy) -> list:
    """Returns (type, number) of each process that trains, the chief first."""
    jobs = strategy.cluster_resolver.cluster_spec().as_dict()
    return [
        (job, n) for job in ("chief", "worker") for n in range(len(jobs.get(job, ())))
    ]


def is_shared(model) -> bool:
    """Whether a model's weights lie on devices of several processes."""
    if keras.backend.backend() != "jax":
        return worker_strategy(model) is not None
    values = (v.value for v in model.variables if not calls.is_emptied(v))
    return any(not calls.is_traced(x) and not x.is_fully_addressable for x in values)


def process_index(strategy) -> int:
    """Returns the number of this process.

    strategy: The strategy on TensorFlow; None on JAX.
    """
    if strategy is None:
        return probes.module("jax").process_index()
    resolver = strategy.cluster_resolver
    return tasks(strategy).index((resolver.task_type, resolver.task_id))


def is_writer(model) -> bool:
    """Whether this process writes the files of a model."""
    return not is_shared(model) or process_index(worker_strategy(model)) == 0


def exchange(message, seconds, strategy=None) -> list:
    """Returns the messages of all processes, in their order; all must call.

    Args:
        message: A value that JSON can represent.
        seconds: How long to wait for the other processes.
        strategy: The strategy on TensorFlow; None on JAX.
    """
    text, process = json.dumps(message), process_index(strategy)
    try:
        if strategy is None:
            texts = exchange_texts(text, process, seconds)
        else:
            codes = [*text.encode(), ord("\n")]
            codes = gather(np.array(codes, "int32"), strategy, seconds)
            texts = bytes(codes.tolist()).decode().splitlines()
    except timeout_error(strategy) as error:
        raise RuntimeError(
            f"Process {process} has waited up to {seconds} seconds for the others, or "
            "one of them has ended. The model is distributed over several processes: "
            "all of them have to make each call of keras_lora, in the same order. "
            "Nothing was changed."
        ) from error
    return [json.loads(each) for each in texts]


def timeout_error(strategy):
    """Returns the error class for processes that do not call in time."""
    if strategy is None:
        return probes.module("jax").errors.JaxRuntimeError
    return probes.module("tensorflow").errors.OpError


def exchange_texts(text, process, seconds) -> list:
    """Sends a text to all JAX processes; returns those of all, in their order.

    They go through the coordinator. A collective of devices might wait forever for a
    missing process.
    """
    probes.require(private_names.PROCESSES)
    client = probes.module("jax._src.distributed").global_state.client
    name = f"keras_lora/{EXCHANGES.count}"
    key = f"{name}/{process:08}"
    client.key_value_set(key, text)
    try:
        client.wait_at_barrier(name, round(1000 * seconds))
    except timeout_error(None):
        client.key_value_delete(key)  # so that the exchange can be repeated
        raise
    EXCHANGES.count += 1
    texts = dict(client.key_value_dir_get(f"{name}/"))
    return [texts[key] for key in sorted(texts)]


def gather(values, strategy, seconds):
    """Joins the arrays of all TensorFlow processes along the first axis.

    After a timeout, this process cannot train with the others any more.
    """
    tf = probes.module("tensorflow")
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=seconds)

    def gather_on_replica():
        context, own = tf.distribute.get_replica_context(), tf.constant(values)
        if context.replica_id_in_sync_group % replicas:
            own = own[:0]  # only the first device of a process contributes
        return context.all_gather(own, axis=0, options=options)

    replicas = strategy.num_replicas_in_sync // len(tasks(strategy))
    gathered = strategy.experimental_local_results(strategy.run(gather_on_replica))
    return gathered[0].numpy()


def sum_over_processes(values, model):
    """Sums an array over all processes of TensorFlow that hold a model."""
    strategy = worker_strategy(model)
    return gather(values[None], strategy, BARRIER_SECONDS).sum(axis=0)


def barrier(model):
    """Raises RuntimeError unless all processes that hold a model make this call."""
    layer_state.validate_model(model)
    if is_shared(model):
        exchange(None, BARRIER_SECONDS, worker_strategy(model))


def run_on_all(model, function, identity=None, differ=""):
    """Returns function(); if it raises on one process, it raises on all.

    Args:
        model: The model; if one process alone holds it, nothing is exchanged.
        function: What each process computes.
        identity: A function from its result to a text that must be equal on all
            processes, or to {key: text}, equal where processes have the same key.
        differ: What the error says if these texts differ.
    """
    if not is_shared(model):
        return function()
    result = error = None
    try:
        result = function()
    except Exception as raised:  # sent to the others, and raised below
        error = raised
    message = {
        "kind": None if error is None else type(error).__name__,
        "is_os_error": isinstance(error, OSError),
        "text": str(error),
        "identity": identity(result) if identity and error is None else None,
    }
    messages = exchange(message, WORKING_SECONDS, worker_strategy(model))
    if error is not None:
        raise error
    for process, other in enumerate(messages):
        if other["kind"] is not None:
            kind = OSError if other["is_os_error"] else ValueError
            raise kind(
                f"Process {process} has raised {other['kind']}: {other['text']} "
                "Nothing was changed on any process."
            )
    known: dict = {}
    for other in messages:
        texts = other["identity"]
        texts = texts if isinstance(texts, dict) else {"": texts}
        for key, text in texts.items():
            if known.setdefault(key, text) != text:
                raise ValueError(f"{differ} Nothing was changed on any process.")
    return result


def in_step(model, items, identity, differ):
    """Yields this process's items, while all processes yield theirs.

    All of them raise if their numbers of items differ, or the identities of items.

    model, identity, differ: As in `run_on_all`, for each item.
    """
    items, end = iter(items), object()

    def item_identity(item):
        return {"more": "no"} if item is end else {"more": "yes", **identity(item)}

    while True:
        item = run_on_all(model, lambda: next(items, end), item_identity, differ)
        if item is end:
            return
        yield item


def warn_of_process_group():
    """Warns that Keras's `fit` does not synchronize a torch process group."""
    if keras.backend.backend() != "torch":
        return
    group = probes.module("torch.distributed")
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        warn_caller(
            f"This is one of {group.get_world_size()} processes of a torch process "
            "group. Keras's `fit` trains each of them alone, and their adapters "
            "become different ones. Put torch.nn.parallel.DistributedDataParallel "
            "around the model after apply_lora, and train in a loop of your own."
        )
