"""Extension of griffe: the reference shows what the layers' constructors take.

A LoRA layer's arguments are those of its Keras layer and those of LoRA, which only
`inspect.signature` of the class tells.
"""

import inspect

import griffe

KINDS = {kind.name: kind for kind in griffe.ParameterKind}


def as_griffe(parameter):
    annotation, default = parameter.annotation, parameter.default
    return griffe.Parameter(
        parameter.name,
        kind=KINDS[parameter.kind.name.lower()],
        annotation=None
        if annotation is parameter.empty
        else inspect.formatannotation(annotation),
        default=None if default is parameter.empty else repr(default),
    )


class Signatures(griffe.Extension):
    """Gives classes that say their own signature a constructor with it."""

    def on_class_members(self, *, node, cls, agent, **kwargs):
        if "__signature__" in vars(getattr(node, "obj", object)):
            found = inspect.signature(node.obj).parameters.values()
            own = griffe.Parameter("self", kind=KINDS["positional_or_keyword"])
            parameters = griffe.Parameters(own, *map(as_griffe, found))
            cls.set_member(
                "__init__", griffe.Function("__init__", parameters=parameters)
            )
