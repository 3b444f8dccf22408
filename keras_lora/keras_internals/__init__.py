"""All that Keras does not make public, each with its reason.

`private_names` has the table; nothing private is touched elsewhere.
"""

from keras_lora.keras_internals import private_names

private_names.probe()
