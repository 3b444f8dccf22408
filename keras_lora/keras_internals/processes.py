"""Agreement between the processes that hold one model, as on JAX."""

import json

import keras

from keras_lora.keras_internals import private_names, probes, warn_caller

MEETING_SECONDS = 30  # until a process that waits for the others gives up
WORKING_SECONDS = 600  # the same, while one of them writes or reads a file


class Meetings:
    """The number of those that all processes came to."""

    count = 0


def is_shared(model) -> bool:
    """Whether a model's weights lie on devices of several processes."""
    return keras.backend.backend() == "jax" and any(
        not getattr(variable.value, "is_fully_addressable", True)
        for variable in model.variables
    )


def is_writer(model) -> bool:
    """Whether this process is the one of those that hold a model that writes files."""
    return not is_shared(model) or probes.module("jax").process_index() == 0


def exchange(message, seconds) -> list:
    """Returns the messages of all processes, in their order; all must call.

    A collective of devices would wait for a process that does not call, some for ever.

    message: what can be written as JSON.
    """
    probes.require(private_names.PROCESSES)
    jax = probes.module("jax")
    client = probes.module("jax._src.distributed").global_state.client
    meeting, process = f"keras_lora/{Meetings.count}", jax.process_index()
    key = f"{meeting}/{process:08}"
    client.key_value_set(key, json.dumps(message))
    try:
        client.wait_at_barrier(meeting, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        client.key_value_delete(key)  # of a meeting that may be held again
        raise RuntimeError(
            f"Process {process} has waited {seconds} seconds for the others. The model "
            "is distributed over several processes: all of them have to make each "
            "call of keras_lora, in the same order. Nothing was changed."
        ) from error
    Meetings.count += 1
    said = dict(client.key_value_dir_get(f"{meeting}/"))
    return [json.loads(said[key]) for key in sorted(said)]


def meet(model):
    """Raises RuntimeError unless all processes that hold a model call."""
    if is_shared(model):
        exchange(None, MEETING_SECONDS)


def on_all(model, function, identity=None, differ=""):
    """Returns function(), unless it raises on one of the processes: then all raise.

    model: What the processes hold; where one alone does, nothing is exchanged.
    identity: a function of what it returns, to a text that all have to agree in, or
        to {key: text} for those that have the key.
    differ: what an error says where they do not.
    """
    if not is_shared(model):
        return function()
    result = error = None
    try:
        result = function()
    except Exception as raised:  # told to the others, and raised below
        error = raised
    message = {
        "kind": None if error is None else type(error).__name__,
        "is_os_error": isinstance(error, OSError),
        "text": str(error),
        "identity": identity(result) if identity and error is None else None,
    }
    said = exchange(message, WORKING_SECONDS)
    if error is not None:
        raise error
    for process, other in enumerate(said):
        if other["kind"] is not None:
            kind = OSError if other["is_os_error"] else ValueError
            raise kind(
                f"Process {process} has raised {other['kind']}: {other['text']} "
                "Nothing was changed on any process."
            )
    known: dict = {}
    for other in said:
        found = other["identity"]
        for key, text in (found if isinstance(found, dict) else {"": found}).items():
            if known.setdefault(key, text) != text:
                raise ValueError(f"{differ} Nothing was changed on any process.")
    return result


def in_step(model, items, identity, differ):
    """Yields what each process has; all have to have as many, or all raise.

    model, identity, differ: as in `on_all`, of each item.
    """
    items, end = iter(items), object()

    def said(item):
        return {"more": "no"} if item is end else {"more": "yes", **identity(item)}

    while True:
        item = on_all(model, lambda: next(items, end), said, differ)
        if item is end:
            return
        yield item


def warn_of_process_group():
    """Keras's `fit` knows nothing of torch's process groups."""
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
