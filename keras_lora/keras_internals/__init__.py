"""Uses of what Keras does not make public, each with its reason.

`private_names` has the table, and a probe that runs when it is first imported;
nothing private is touched elsewhere.
"""
